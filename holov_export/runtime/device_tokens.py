"""Visual tokens that stay on the GPU, and the output buffers that they lie in."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from threading import RLock

from holov_export.engine import AxisSizes
from holov_export.runtime.device_array import DeviceArray
from holov_export.runtime.device_memory import CudaApi
from holov_export.runtime.engine_context import EngineTensor


class OutputSlot:
    """Device buffers for the outputs of one run, at the largest shape, and who may still read them.

    A slot is lent to one run at a time; it comes back when the last Python object that names its memory is gone.

    Attributes:
        index: within its lane; CUDA graphs are captured for one slot.
        addresses: of the buffers, by tensor name.
        free: whether nobody holds it.
    """

    def __init__(self, cuda: CudaApi, index: int, sizes: Mapping[str, int], quiet: RLock) -> None:
        """Allocate. `sizes` are bytes by tensor name; `quiet` is held where the whole device is waited for."""
        self._cuda, self._quiet = cuda, quiet
        self.index = index
        self.addresses: dict[str, int] = {}
        self.free = True
        self.written = 0
        self._readers: deque[int] = deque()
        self._unknown_readers = False
        self._closed = False
        try:
            self.written = cuda.create_event()
            for name, size in sizes.items():
                self.addresses[name] = cuda.allocate(size)
        except BaseException:
            self._free_memory()
            raise

    def take(self, stream: int) -> None:
        """Lend the slot to a run on `stream`: it writes after all earlier readers have read."""
        self.free = False
        if self._unknown_readers:
            with self._quiet:
                self._cuda.wait_for_device()
            self._unknown_readers = False
        while self._readers:
            event = self._readers.popleft()
            self._cuda.stream_waits(stream, event)
            self._cuda.destroy_event(event)

    def lease(self) -> Lease:
        """The run's claim on the slot; the slot is free again when it is collected."""
        claim = Lease(self)
        weakref.finalize(claim, self.give_back).atexit = False
        return claim

    def give_back(self) -> None:
        """Nobody names the memory any more."""
        self.free = True
        if self._closed:
            self._free_memory()

    def close(self) -> None:
        """Free the memory now, or as soon as nobody names it."""
        self._closed = True
        if self.free:
            self._free_memory()

    def _free_memory(self) -> None:
        for pointer in self.addresses.values():
            self._cuda.free(pointer)
        self.addresses = {}
        while self._readers:
            self._cuda.destroy_event(self._readers.popleft())
        if self.written:
            self._cuda.destroy_event(self.written)
            self.written = 0


class Lease:
    """Keeps an output slot from being written; see `device_array.Readiness`."""

    def __init__(self, slot: OutputSlot) -> None:
        self._slot = slot

    def wait(self) -> None:
        self._slot._cuda.wait_for_event(self._slot.written)

    def order_before(self, stream: int) -> None:
        self._slot._cuda.stream_waits(stream, self._slot.written)

    def read_by_unknown(self) -> None:
        self._slot._unknown_readers = True

    def read_on(self, stream: int) -> None:
        """All reading was enqueued on `stream` by now: no need to wait for the whole device."""
        event = self._slot._cuda.create_event()
        self._slot._cuda.record(event, stream)
        self._slot._readers.append(event)
        self._slot._unknown_readers = False


@dataclass(frozen=True, eq=False)
class DeviceTokens:
    """What a run returned, still on the device, and the runner's own memory until the last of these arrays is dropped.

    The arrays have `__dlpack__` and `__cuda_array_interface__`; what torch or cupy make of them keeps the memory too.
    A later run writes elsewhere as long as anything holds it.

    Attributes:
        tokens: [B, K, D] in the engine's type; rows at and past an image's count are zero.
        positions: [B, K] and
        counts: [B], int64; int32 from TensorRT 8.
        saliency: float32 [B, N].
    """

    tokens: DeviceArray
    positions: DeviceArray
    counts: DeviceArray
    saliency: DeviceArray
    _lease: Lease = field(repr=False)

    def __len__(self) -> int:
        return self.tokens.shape[0]

    def wait(self) -> None:
        """Block until the values are there. Consumers of the arrays need not call it."""
        self._lease.wait()

    def read_on(self, stream: int) -> None:
        """Say that all work which reads these arrays has been enqueued on `stream` by now.

        Without it the next run that takes this memory, once everything that names it is dropped, waits for the whole
        device; with it, only for that stream, and the host does not wait at all.

        Args:
            stream: the handle: torch.cuda.current_stream().cuda_stream, cupy.cuda.get_current_stream().ptr.
        """
        self._lease.read_on(stream)


def device_tokens(slot: OutputSlot, tensors: Mapping[str, EngineTensor], sizes: AxisSizes) -> DeviceTokens:
    """The outputs in a slot that a run has been enqueued into."""
    lease = slot.lease()

    def array(name: str) -> DeviceArray:
        tensor = tensors[name]
        shape = tensor.sized(sizes)
        return DeviceArray(shape, tensor.dtype, slot.addresses[name], lease, tensor.bfloat16)

    return DeviceTokens(array("visual_tokens"), array("positions"), array("counts"), array("saliency"), lease)
