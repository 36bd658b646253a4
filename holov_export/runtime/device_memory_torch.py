"""`CudaApi` over torch: for machines that have torch with CUDA and no cuda-python.

Torch hides addresses behind tensors, so each allocation is a tensor of bytes that is remembered by its address, and a
copy names the beginning of an allocation or memory of somebody else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from holov_export.errors import EnvironmentFaultError, MissingExtraError
from holov_export.extras import require
from holov_export.runtime.device_memory import CudaApi, out_of_memory

if TYPE_CHECKING:
    import torch

#: handles of the two default streams. Source: driver_types.h, cudaStreamLegacy and cudaStreamPerThread
_DEFAULT_STREAMS = (0, 1, 2)


def torch_cuda(*, required: bool, install: str) -> CudaApi:
    """CUDA through torch. `required` says that torch was asked for by name, `install` what to do without it.

    Raises:
        MissingExtraError: torch is not installed, or has no CUDA and was not asked for by name.
        EnvironmentFaultError: torch was asked for and has no CUDA.
    """
    try:
        torch = require("torch")
    except MissingExtraError:
        what = "torch is" if required else "neither cuda-python ('cuda-bindings') nor torch is"
        raise MissingExtraError(f"{what} installed, and device memory comes from one of them.", hint=install) from None
    if torch.cuda.is_available():
        return TorchCuda(torch)
    if required:
        raise EnvironmentFaultError(f"this torch ({torch.__version__}) has no CUDA.", hint=install)
    raise MissingExtraError(
        f"the Python package 'cuda-bindings' is not installed, and this torch ({torch.__version__}) has no CUDA.",
        hint=install,
    )


class _Foreign:
    """Device memory of somebody else, as torch.as_tensor takes it."""

    def __init__(self, pointer: int, size: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (size,),
            "typestr": "|u1",
            "data": (pointer, False),
            "version": 3,
            "stream": None,
        }


class TorchCuda:
    """`CudaApi` over torch.cuda."""

    def __init__(self, torch: Any) -> None:
        self.name = "torch"
        self._torch = torch
        self._tensors: dict[int, torch.Tensor] = {}
        self._streams: dict[int, Any] = {}
        self._events: dict[int, Any] = {}
        self._graphs: dict[int, Any] = {}

    @contextmanager
    def _refusals(self, what: str) -> Iterator[None]:
        """Torch's errors as ours."""
        try:
            yield
        except RuntimeError as error:
            raise EnvironmentFaultError(f"{what} failed: {error}") from error

    def allocate(self, size: int) -> int:
        try:
            tensor = self._torch.empty(size, dtype=self._torch.uint8, device="cuda")
        except self._torch.cuda.OutOfMemoryError as error:
            raise out_of_memory(size, self.free_bytes()) from error
        except RuntimeError as error:
            raise EnvironmentFaultError(f"an allocation of {size} bytes failed: {error}") from error
        return self._remembered(tensor)

    def allocate_pinned(self, size: int) -> int:
        with self._refusals(f"an allocation of {size} pinned bytes"):
            return self._remembered(self._torch.empty(size, dtype=self._torch.uint8, pin_memory=True))

    def _remembered(self, tensor: Any) -> int:
        pointer = int(tensor.data_ptr())
        self._tensors[pointer] = tensor
        return pointer

    def free(self, pointer: int) -> None:
        self.wait_for_device()  # torch gives the memory on at once, and it knows nothing of our streams
        del self._tensors[pointer]

    def free_pinned(self, pointer: int) -> None:
        del self._tensors[pointer]

    def copy(self, target: int, source: int, size: int, stream: int) -> None:
        with self._refusals("a copy"), self._torch.cuda.stream(self._stream(stream)):
            self._bytes(target, size).copy_(self._bytes(source, size), non_blocking=True)

    def _bytes(self, pointer: int, size: int) -> Any:
        if pointer in self._tensors:
            return self._tensors[pointer][:size]
        return self._torch.as_tensor(_Foreign(pointer, size), device="cuda")

    def create_stream(self) -> int:
        with self._refusals("a new stream"):
            stream = self._torch.cuda.Stream()
        self._streams[int(stream.cuda_stream)] = stream
        return int(stream.cuda_stream)

    def _stream(self, handle: int) -> Any:
        if handle in self._streams:
            return self._streams[handle]
        if handle in _DEFAULT_STREAMS:
            return self._torch.cuda.default_stream()
        return self._torch.cuda.ExternalStream(handle)

    def destroy_stream(self, stream: int) -> None:
        self._streams.pop(stream, None)  # torch keeps its streams in a pool and gives one handle out several times

    def wait_for_stream(self, stream: int) -> None:
        with self._refusals("waiting for a stream"):
            self._stream(stream).synchronize()

    def wait_for_device(self) -> None:
        with self._refusals("waiting for the device"):
            self._torch.cuda.synchronize()

    def create_event(self) -> int:
        event = self._torch.cuda.Event(enable_timing=True)
        self._events[id(event)] = event
        return id(event)

    def destroy_event(self, event: int) -> None:
        del self._events[event]

    def record(self, event: int, stream: int) -> None:
        with self._refusals("recording an event"):
            self._events[event].record(self._stream(stream))

    def wait_for_event(self, event: int) -> None:
        with self._refusals("waiting for an event"):
            self._events[event].synchronize()

    def stream_waits(self, stream: int, event: int) -> None:
        with self._refusals("waiting for an event"):
            self._stream(stream).wait_event(self._events[event])

    def seconds_between(self, start: int, end: int) -> float:
        with self._refusals("reading an event's time"):
            return float(self._events[start].elapsed_time(self._events[end])) / 1e3

    def capture(self, stream: int, enqueue: Callable[[], None]) -> int:
        graph = self._torch.cuda.CUDAGraph()
        with self._refusals("capturing a CUDA graph"), self._torch.cuda.stream(self._stream(stream)):
            graph.capture_begin(capture_error_mode="thread_local")
            try:
                enqueue()
            except BaseException:
                self._end_spoilt(graph)
                raise
            graph.capture_end()
        self._graphs[id(graph)] = graph
        return id(graph)

    @staticmethod
    def _end_spoilt(graph: Any) -> None:
        with suppress(RuntimeError):  # it only repeats what is being raised
            graph.capture_end()

    def launch(self, graph: int, stream: int) -> None:
        with self._refusals("launching a CUDA graph"), self._torch.cuda.stream(self._stream(stream)):
            self._graphs[graph].replay()

    def destroy_graph(self, graph: int) -> None:
        self._graphs.pop(graph).reset()

    def free_bytes(self) -> int:
        return int(self._torch.cuda.mem_get_info()[0])
