"""Streams, events and graphs that do nothing until somebody waits for them, so that a missing wait shows.

Work is queued and runs when its stream, the device or an event behind it is synchronised, in order. While a stream
captures, work is recorded instead and runs when the graph is launched, with the addresses of the capture.
Source: CUDA C++ programming guide, "CUDA Graphs" and "Stream capture"; CUDA runtime API, cudaStreamBeginCapture.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from tensorrt_standin.cuda_errors import Error
from tensorrt_standin.cuda_memory import Misuse

NON_BLOCKING, DISABLE_TIMING = 1, 2
GLOBAL, THREAD_LOCAL, RELAXED = 0, 1, 2


class CudaError(Exception):
    """An error that the real call returns as its code."""

    def __init__(self, code: Error) -> None:
        super().__init__(code.name)
        self.code = code


@dataclass(eq=False)
class Work:
    """Something queued.

    Attributes:
        run: does it.
        check: raises Misuse at a graph launch if it may not be replayed.
        exclusive: what no other stream may be using at the same time, with a word for it.
        event: for a record or a wait, the event and its count of records.
    """

    name: str
    run: Callable[[], None]
    check: Callable[[], None] = lambda: None
    exclusive: dict[int, str] = field(default_factory=dict)
    event: tuple[Event, int] | None = None


@dataclass(eq=False)
class Graph:
    works: list[Work] = field(default_factory=list)


@dataclass(eq=False)
class Capture:
    mode: int
    thread: int
    graph: Graph = field(default_factory=Graph)
    invalid: bool = False


@dataclass(eq=False)
class Stream:
    handle: int
    flags: int = 0
    pending: deque[Work] = field(default_factory=deque)
    capture: Capture | None = None


@dataclass(eq=False)
class Event:
    handle: int
    flags: int = 0
    stream: Stream | None = None
    recorded: int = 0
    completed: int = 0
    captured: bool = False
    at: float = 0.0


class Streams:
    """All streams, events and graphs of the device. Handle 0 is the legacy default stream."""

    def __init__(self) -> None:
        self._handles = itertools.count(0x1000, 0x10)
        self.streams: dict[int, Stream] = {0: Stream(0)}
        self.events: dict[int, Event] = {}
        self.graphs: dict[int, Graph] = {}
        self.executables: dict[int, Graph] = {}
        self.launches = 0

    # ---- streams

    def create(self, flags: int) -> Stream:
        stream = Stream(next(self._handles), flags)
        self.streams[stream.handle] = stream
        return stream

    def stream(self, handle: int) -> Stream:
        if handle in (1, 2):  # cudaStreamLegacy, cudaStreamPerThread
            handle = 0
        if handle not in self.streams:
            raise CudaError(Error.cudaErrorInvalidResourceHandle)
        return self.streams[handle]

    def destroy(self, handle: int) -> None:
        """Queued work still runs, as it does on a GPU."""
        stream = self.stream(handle)
        if not handle:
            raise CudaError(Error.cudaErrorInvalidResourceHandle)
        self.finish(stream)
        del self.streams[handle]

    def enqueue(self, stream: Stream, work: Work) -> None:
        if stream.capture is not None:
            if stream.capture.invalid:
                raise CudaError(Error.cudaErrorStreamCaptureInvalidated)
            stream.capture.graph.works.append(work)
            return
        if not stream.handle:
            self.forbid_implicit()
            self.finish_blocking()
        self.require_alone(stream, work)
        stream.pending.append(work)

    def require_alone(self, stream: Stream, work: Work) -> None:
        """No other stream has work queued over the same memory, unless this one waits for it.

        Source: NvInferRuntime.h, enqueueV3: one context on several streams at once is undefined.
        """
        for other in self.streams.values():
            if other is stream or not work.exclusive:
                continue
            queued = list(other.pending)
            for wait in (item for item in stream.pending if item.name == "wait"):
                marks = [at for at, item in enumerate(queued) if item.name == "event" and item.event == wait.event]
                queued = queued[marks[0] :] if marks else queued
            clash = [word for item in queued for key, word in item.exclusive.items() if key in work.exclusive]
            if clash:
                raise Misuse(f"two streams use the same {clash[0]} at once")

    def finish(self, stream: Stream) -> None:
        while stream.pending:
            stream.pending.popleft().run()

    def finish_blocking(self) -> None:
        """What the legacy default stream waits for: every stream made without cudaStreamNonBlocking."""
        for stream in list(self.streams.values()):
            if not stream.flags & NON_BLOCKING:
                self.finish(stream)

    def synchronize(self, stream: Stream) -> None:
        if stream.capture is not None:
            stream.capture.invalid = True
            raise CudaError(Error.cudaErrorStreamCaptureUnsupported)
        if not stream.handle:
            self.forbid_implicit()
            self.finish_blocking()
        self.finish(stream)

    def synchronize_device(self) -> None:
        self.forbid_unsafe(always=True)
        for stream in list(self.streams.values()):
            self.finish(stream)

    # ---- captures

    def forbid_unsafe(self, *, always: bool = False) -> None:
        """Calls such as cudaMalloc spoil a capture, depending on its mode."""
        for stream in self.streams.values():
            capture = stream.capture
            if capture is None or (capture.mode == RELAXED and not always):
                continue
            if capture.mode == GLOBAL or always or capture.thread == threading.get_ident():
                capture.invalid = True
                raise CudaError(Error.cudaErrorStreamCaptureUnsupported)

    def forbid_implicit(self) -> None:
        """The legacy default stream would wait for a stream that captures."""
        for stream in self.streams.values():
            if stream.capture is not None and not stream.flags & NON_BLOCKING:
                stream.capture.invalid = True
                raise CudaError(Error.cudaErrorStreamCaptureImplicit)

    def begin_capture(self, stream: Stream, mode: int) -> None:
        if not stream.handle:
            raise CudaError(Error.cudaErrorStreamCaptureUnsupported)
        if stream.capture is not None:
            raise CudaError(Error.cudaErrorIllegalState)
        stream.capture = Capture(mode, threading.get_ident())

    def end_capture(self, stream: Stream) -> int:
        capture, stream.capture = stream.capture, None
        if capture is None:
            raise CudaError(Error.cudaErrorIllegalState)
        if capture.invalid:
            raise CudaError(Error.cudaErrorStreamCaptureInvalidated)
        if capture.mode != RELAXED and capture.thread != threading.get_ident():
            raise CudaError(Error.cudaErrorStreamCaptureWrongThread)
        handle = next(self._handles)
        self.graphs[handle] = capture.graph
        return handle

    # ---- graphs

    def instantiate(self, graph: int) -> int:
        if graph not in self.graphs:
            raise CudaError(Error.cudaErrorInvalidValue)
        handle = next(self._handles)
        self.executables[handle] = Graph(list(self.graphs[graph].works))
        return handle

    def launch(self, executable: int, stream: Stream) -> None:
        if executable not in self.executables:
            raise CudaError(Error.cudaErrorInvalidValue)
        works = self.executables[executable].works
        for work in works:
            work.check()
        self.launches += 1
        exclusive = {key: word for work in works for key, word in work.exclusive.items()}
        self.enqueue(stream, Work("graph", lambda: [work.run() for work in works] and None, exclusive=exclusive))

    # ---- events

    def create_event(self, flags: int) -> Event:
        event = Event(next(self._handles), flags)
        self.events[event.handle] = event
        return event

    def event(self, handle: int) -> Event:
        if handle not in self.events:
            raise CudaError(Error.cudaErrorInvalidResourceHandle)
        return self.events[handle]

    def record(self, event: Event, stream: Stream) -> None:
        event.captured = stream.capture is not None
        event.recorded += 1
        event.stream = stream
        version = event.recorded

        def run() -> None:
            event.completed = max(event.completed, version)
            event.at = time.perf_counter()

        self.enqueue(stream, Work("event", run if not event.captured else lambda: None, event=(event, version)))

    def wait(self, stream: Stream, event: Event) -> None:
        if event.captured != (stream.capture is not None) and event.recorded:
            raise CudaError(Error.cudaErrorStreamCaptureIsolation)
        version = event.recorded
        if stream.capture is None:
            self.enqueue(stream, Work("wait", lambda: self.complete(event, version), event=(event, version)))

    def complete(self, event: Event, version: int) -> None:
        while event.completed < version and event.stream is not None and event.stream.pending:
            event.stream.pending.popleft().run()

    def synchronize_event(self, event: Event) -> None:
        if event.captured:
            raise CudaError(Error.cudaErrorCapturedEvent)
        self.complete(event, event.recorded)

    def elapsed_ms(self, start: Event, end: Event) -> float:
        if (start.flags | end.flags) & DISABLE_TIMING or not (start.recorded and end.recorded):
            raise CudaError(Error.cudaErrorInvalidResourceHandle)
        if start.captured or end.captured:
            raise CudaError(Error.cudaErrorCapturedEvent)
        if start.completed < start.recorded or end.completed < end.recorded:
            raise CudaError(Error.cudaErrorNotReady)
        return (end.at - start.at) * 1e3
