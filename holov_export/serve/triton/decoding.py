"""Answers that are made in turn in one thread: the decoder's lanes, without a word about Triton."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol

from holov_export.errors import BusyError
from holov_export.runtime.answer_stream import AnswerStream

#: seconds, for a client that is turned away
RETRY_AFTER = 5


class Sink(Protocol):
    """Who wants an answer. All methods are called from the loop's thread and must return at once."""

    def cancelled(self) -> bool:
        """Nobody wants it any more."""
        ...

    def piece(self, text: str, token_ids: list[int]) -> None:
        """More of it. Either may be empty, not both."""
        ...

    def finished(self, reason: str) -> None:
        """That was all: "stop", "length" or "cancelled"."""
        ...

    def failed(self, error: Exception) -> None:
        """There will be no (further) answer."""
        ...


@dataclass
class _Open:
    sink: Sink
    stream: AnswerStream
    told: int = 0


class DecodingLoop:
    """A thread that pulls one token of each open answer in turn; as many are open as the decoder has lanes."""

    def __init__(self, lanes: int, waiting: int) -> None:
        """`waiting` is how many answers may wait for a lane."""
        self._lanes = max(1, lanes)
        self._waiting: queue.Queue[tuple[Callable[[], AnswerStream], Sink] | None] = queue.Queue(waiting)
        self._open: list[_Open] = []
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="decoding", daemon=True)
        self._thread.start()

    def submit(self, make: Callable[[], AnswerStream], sink: Sink) -> None:
        """Want an answer; `make` is called in the loop's thread when a lane is free.

        Raises:
            BusyError: too many wait, or the loop is being closed.
        """
        if self._closing.is_set():
            raise BusyError("the server is shutting down.", retry_after=RETRY_AFTER)
        try:
            self._waiting.put_nowait((make, sink))
        except queue.Full:
            raise BusyError(f"{self._waiting.maxsize} answers wait already.", retry_after=RETRY_AFTER) from None

    def close(self) -> None:
        """End the thread; answers that are being made or wait are told that they failed."""
        self._closing.set()
        with suppress(queue.Full):
            self._waiting.put_nowait(None)  # wakes a loop that waits
        self._thread.join()

    def _run(self) -> None:
        while not self._closing.is_set():
            self._admit()
            for answer in list(self._open):
                self._step(answer)
        gone = BusyError("the server is shutting down.", retry_after=RETRY_AFTER)
        for answer in self._open:
            answer.stream.close()
            _tell_failed(answer.sink, gone)
        while not self._waiting.empty():
            item = self._waiting.get_nowait()
            if item is not None:
                _tell_failed(item[1], gone)

    def _admit(self) -> None:
        """Open what waits while there are lanes; wait for work if there is none."""
        while len(self._open) < self._lanes:
            try:
                item = self._waiting.get(block=not self._open)
            except queue.Empty:
                return
            if item is None:
                return
            make, sink = item
            try:
                if sink.cancelled():
                    sink.finished("cancelled")
                else:
                    self._open.append(_Open(sink, make()))
            except Exception as error:
                _tell_failed(sink, error)

    def _step(self, answer: _Open) -> None:
        try:
            if answer.sink.cancelled():
                answer.stream.close()
                self._end(answer, "cancelled")
                return
            piece = next(answer.stream, None)
            token_ids = answer.stream.token_ids[answer.told :]
            answer.told += len(token_ids)
            if piece or token_ids:
                answer.sink.piece(piece or "", token_ids)
            if piece is None or answer.stream.ended:
                self._end(answer, answer.stream.generation().finish_reason)
        except Exception as error:
            answer.stream.close()
            self._open = [other for other in self._open if other is not answer]
            _tell_failed(answer.sink, error)

    def _end(self, answer: _Open, reason: str) -> None:
        self._open.remove(answer)
        answer.sink.finished(reason)


def _tell_failed(sink: Sink, error: Exception) -> None:
    """The error may be that of a sink whose reader is gone; then there is nobody to tell, and the loop goes on."""
    with suppress(Exception):
        sink.failed(error)
