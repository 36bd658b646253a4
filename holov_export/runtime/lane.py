"""One lane of a TensorRT runner: a stream with its buffers, contexts and CUDA graphs, for one thread at a time."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np

from holov_export.engine import AxisSizes
from holov_export.errors import EngineError, EnvironmentFaultError, HolovExportError
from holov_export.runtime.device_array import CudaArray, device_view
from holov_export.runtime.device_memory import CudaApi
from holov_export.runtime.device_tokens import DeviceTokens, OutputSlot, device_tokens
from holov_export.runtime.engine_context import LoadedEngine
from holov_export.runtime.host_arrays import bfloat16_bits, float32_from_bits, host_view
from holov_export.runtime.packing import NamedArray
from holov_export.runtime.runner import RunTimes
from holov_export.signature import BUDGET, COUNTS, OUTPUTS, PIXEL_VALUES, POSITIONS, QUOTA, SALIENCY, VISUAL_TOKENS
from holov_export.tensors import FloatArray, Int64Array, VisualTokens

Pixels = FloatArray | CudaArray
#: of the pinned word that holds a budget, int32 or int64
_BUDGET_BYTES = 8


class Shape(NamedTuple):
    """What a run looks like to the engine: the index of the profile, and how long all dynamic axes are."""

    profile: int
    sizes: AxisSizes


@dataclass(frozen=True)
class Feed:
    """What a run is fed.

    Attributes:
        pixels: in host memory or on the device.
        quota: int64 [B].
        further: of packed graphs, the other inputs but the budget.
    """

    pixels: Pixels
    quota: Int64Array
    further: tuple[NamedArray, ...] = ()

    @property
    def on_host(self) -> tuple[NamedArray, ...]:
        """All that is in host memory."""
        own = (NamedArray(QUOTA, self.quota), *self.further)
        return (NamedArray(PIXEL_VALUES, self.pixels), *own) if isinstance(self.pixels, np.ndarray) else own


@dataclass
class _Prepared:
    """A context over the lane's buffers, the pinned word that holds its budget, and what it is shaped for."""

    context: Any
    budget: int
    key: tuple[Shape, int] | None = None
    graph: int = 0


@dataclass
class LaneSettings:
    """For all lanes of a runner: how many CUDA graphs each keeps, 0 for none; whom it tells that none can be made."""

    graphs: int
    no_graphs: Callable[[str], None]


class Lane:
    """See the module. All memory is taken when it is made, at the largest shape that any profile holds."""

    def __init__(
        self,
        cuda: CudaApi,
        engine: LoadedEngine,
        settings: LaneSettings,
        quiet: threading.RLock,
    ) -> None:
        """Allocate. `quiet` is shared by a runner's lanes: captures and waits for the whole device exclude one another.

        Raises:
            EnvironmentFaultError: out of memory, or another CUDA error.
        """
        self._cuda, self._engine, self._settings, self._quiet = cuda, engine, settings, quiet
        self._graphs: OrderedDict[tuple[Shape, int], _Prepared] = OrderedDict()
        self._seen: OrderedDict[tuple[Shape, int], None] = OrderedDict()
        self._plain: dict[int, _Prepared] = {}
        self._slots: list[OutputSlot] = []
        self._candidate: _Prepared | None = None
        self._last: OutputSlot | None = None
        self._lent_pixels: CudaArray | None = None
        self._sizes = {
            name: max(tensor.bytes_for(profile.corners[2]) for profile in engine.profiles)
            for name, tensor in engine.tensors.items()
        }
        with ExitStack() as stack:
            self._stack = stack
            self._stream = self._own(cuda.create_stream(), cuda.destroy_stream)
            self._marks = [self._own(cuda.create_event(), cuda.destroy_event) for _ in range(4)]
            self._handed_in = self._own(cuda.create_event(), cuda.destroy_event)
            self._scratch = self._own(cuda.allocate(max(engine.scratch_bytes, 1)), cuda.free)
            fed = [name for name in engine.inputs if name != BUDGET]
            self._inputs = {name: self._own(cuda.allocate(self._sizes[name]), cuda.free) for name in fed}
            self._staging = {
                name: self._own(cuda.allocate_pinned(self._sizes[name]), cuda.free_pinned) for name in (*fed, *OUTPUTS)
            }
            self._slots.append(self._new_slot())
            self._stack = stack.pop_all()

    def _own(self, handle: int, release: Callable[[int], None]) -> int:
        self._stack.callback(release, handle)
        return handle

    def _new_slot(self) -> OutputSlot:
        return OutputSlot(self._cuda, len(self._slots), {name: self._sizes[name] for name in OUTPUTS}, self._quiet)

    @property
    def device_bytes(self) -> int:
        """Device memory that the lane holds, without what TensorRT keeps for its contexts."""
        outputs = sum(self._sizes[name] for name in OUTPUTS) * len(self._slots)
        return outputs + sum(self._sizes[name] for name in self._inputs) + self._engine.scratch_bytes

    # ------------------------------------------------------------------------------------------------ runs

    def run(
        self, feed: Feed, shape: Shape, *, saliency: bool, stream: int | None = None
    ) -> tuple[VisualTokens, RunTimes]:
        """Run, wait, and copy the result to the host. `stream` is the one that writes pixels on the device."""
        began = perf_counter()
        wanted = [name for name in OUTPUTS if saliency or name != SALIENCY]
        with self._slot() as slot:
            self._enqueue(feed, shape, slot, stream)
            for name in wanted:
                size = self._engine.tensors[name].bytes_for(shape.sizes)
                self._cuda.copy(self._staging[name], slot.addresses[name], size, self._stream)
            self._cuda.record(self._marks[3], self._stream)
            self._cuda.record(slot.written, self._stream)
            self._cuda.wait_for_stream(self._stream)
            arrays = {name: self._fetched(name, shape) for name in wanted}
            slot.give_back()
        host = perf_counter() - began
        steps = [self._cuda.seconds_between(*self._marks[at : at + 2]) for at in range(3)]
        self._capture()
        visual = VisualTokens(arrays[VISUAL_TOKENS], arrays[POSITIONS], arrays[COUNTS], arrays.get(SALIENCY))
        return visual, RunTimes(host, *steps)

    def run_on_device(self, feed: Feed, shape: Shape, *, stream: int | None = None) -> DeviceTokens:
        """Enqueue a run and return at once; the result stays on the device."""
        with self._slot() as slot:
            self._enqueue(feed, shape, slot, stream)
            self._cuda.record(slot.written, self._stream)
            tokens = device_tokens(slot, self._engine.tensors, shape.sizes)
        self._capture()
        return tokens

    @contextmanager
    def _slot(self) -> Iterator[OutputSlot]:
        """An output slot that nobody reads, after the last run has read the lane's staging buffers."""
        if self._last is not None:
            self._cuda.wait_for_event(self._last.written)
            self._last = self._lent_pixels = None
        slot = next((slot for slot in self._slots if slot.free), None)
        if slot is None:
            slot = self._new_slot()
            self._slots.append(slot)
        slot.take(self._stream)
        try:
            yield slot
        except BaseException:
            self._settle()
            slot.give_back()
            if self._candidate is not None:
                self._drop(self._candidate)
                self._candidate = None
            raise
        self._last = slot

    def _settle(self) -> None:
        """After an error: let what was enqueued end, so that the lane's buffers are nobody's."""
        with suppress(EnvironmentFaultError):  # CUDA repeats a sticky error in every call; the first is being raised
            self._cuda.wait_for_stream(self._stream)

    def _enqueue(self, feed: Feed, shape: Shape, slot: OutputSlot, stream: int | None) -> None:
        """Put the copies and the engine's work on the stream; what the host does comes first, outside of the marks."""
        prepared = self._ready(shape, slot)
        sources, writer = dict(self._staging), None
        for array in feed.on_host:
            self._stage(array.name, shape, array.values)
        if not isinstance(feed.pixels, np.ndarray):
            sources[PIXEL_VALUES], writer = self._after_writer(feed.pixels, stream)
        self._cuda.record(self._marks[0], self._stream)
        for name, target in self._inputs.items():
            size = self._engine.tensors[name].bytes_for(shape.sizes)
            self._cuda.copy(target, sources[name], size, self._stream)
        self._cuda.record(self._marks[1], self._stream)
        if writer is not None:
            self._cuda.stream_waits(writer, self._marks[1])  # it may write there again once we have read
        if prepared.graph:
            self._cuda.launch(prepared.graph, self._stream)
        else:
            self._engine.enqueue(prepared.context, self._stream)
        self._cuda.record(self._marks[2], self._stream)

    def _stage(self, name: str, shape: Shape, values: np.ndarray[Any, Any]) -> None:
        """Write values into pinned memory in the engine's type."""
        tensor = self._engine.tensors[name]
        target = host_view(self._staging[name], tensor.sized(shape.sizes), tensor.dtype)
        if tensor.bfloat16:
            target[...] = bfloat16_bits(values)
        else:
            np.copyto(target, values, casting="same_kind")

    def _after_writer(self, pixels: CudaArray, stream: int | None) -> tuple[int, int | None]:
        """(address, the stream that writes there) of pixels on the device; the lane's stream waits for the writer."""
        view = device_view(pixels)
        writer = stream if stream is not None else view.writer
        if writer is not None:
            self._cuda.record(self._handed_in, writer)
            self._cuda.stream_waits(self._stream, self._handed_in)
        elif not view.ready:
            with self._quiet:
                self._cuda.wait_for_device()
        self._lent_pixels = pixels  # the copy is still to come
        return view.pointer, writer

    def _fetched(self, name: str, shape: Shape) -> np.ndarray[Any, Any]:
        """An output as a new array on the host: int64 whatever the engine's integers are, float32 from bfloat16."""
        tensor = self._engine.tensors[name]
        values = host_view(self._staging[name], tensor.sized(shape.sizes), tensor.dtype)
        if tensor.bfloat16:
            return float32_from_bits(values)
        return values.astype(np.int64) if tensor.dtype.kind == "i" else values.copy()

    # ------------------------------------------------------------------------------------------------ contexts

    def _ready(self, shape: Shape, slot: OutputSlot) -> _Prepared:
        """A CUDA graph for the shape, or a context with it. A shape that comes again gets a context of its own."""
        key = (shape, slot.index)
        if key in self._graphs:
            self._graphs.move_to_end(key)
            return self._graphs[key]
        if self._settings.graphs > 0 and self._comes_again(key):
            try:
                self._candidate = self._prepared(shape.profile)
            except EngineError as error:
                self._settings.no_graphs(str(error))
        prepared = self._candidate or self._plain.get(shape.profile)
        if prepared is None:
            prepared = self._plain[shape.profile] = self._prepared(shape.profile)
        self._shape(prepared, shape, slot)
        return prepared

    def _comes_again(self, key: tuple[Shape, int]) -> bool:
        """Whether a shape was seen before: one that comes once is not worth a graph."""
        again = key in self._seen
        self._seen[key] = None
        self._seen.move_to_end(key)
        while len(self._seen) > 4 * self._settings.graphs:
            self._seen.popitem(last=False)
        return again

    def _prepared(self, profile: int) -> _Prepared:
        context = self._engine.context(self._scratch, self._stream, profile)
        return _Prepared(context, self._cuda.allocate_pinned(_BUDGET_BYTES))

    def _shape(self, prepared: _Prepared, shape: Shape, slot: OutputSlot) -> None:
        key = (shape, slot.index)
        if prepared.key == key:
            return
        tensor = self._engine.tensors[BUDGET]
        host_view(prepared.budget, (1,), tensor.dtype)[0] = shape.sizes.budget
        addresses = {**self._inputs, BUDGET: prepared.budget, **slot.addresses}
        prepared.key = None
        self._engine.shape(prepared.context, shape.sizes, addresses)
        prepared.key = key

    def _capture(self) -> None:
        """Make a CUDA graph of the context that has just run for it; its shapes and addresses stay from now on.

        NVIDIA's rule: enqueue once with the shapes, then capture; a graph belongs to its context as it was then.
        """
        prepared, self._candidate = self._candidate, None
        if prepared is None or prepared.key is None:
            return
        try:
            with self._quiet:
                prepared.graph = self._cuda.capture(
                    self._stream, lambda: self._engine.enqueue(prepared.context, self._stream)
                )
        except HolovExportError as error:
            self._settings.no_graphs(str(error))
            self._settle()
            self._drop(prepared)
            return
        self._graphs[prepared.key] = prepared
        while len(self._graphs) > max(1, self._settings.graphs):
            self._cuda.wait_for_stream(self._stream)
            self._drop(self._graphs.popitem(last=False)[1])

    def _drop(self, prepared: _Prepared) -> None:
        if prepared.graph:
            self._cuda.destroy_graph(prepared.graph)
        prepared.context = None
        self._cuda.free_pinned(prepared.budget)

    def close(self) -> None:
        """Free everything, except outputs that somebody still holds: those go with their last holder."""
        self._settle()
        for prepared in (*self._graphs.values(), *self._plain.values()):
            self._drop(prepared)
        self._graphs.clear()
        self._plain.clear()
        for slot in self._slots:
            slot.close()
        self._slots.clear()
        self._last = self._lent_pixels = None
        self._stack.close()
