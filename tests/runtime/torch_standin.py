"""What `device_memory_torch` uses of torch.cuda, over the stand-in of the CUDA runtime.

Pool streams, events that are made when first recorded and graphs behave as in torch; memory is freed when the last
tensor of an allocation goes. `test_device_memory.py` compares the names and arguments with the real torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any


class OutOfMemoryError(RuntimeError):
    pass


class Torch:
    """The module. `world` is a stand-in that is installed."""

    __version__ = "2.13.0+standin"
    uint8 = "uint8"

    def __init__(self, world: Any) -> None:
        import cuda.bindings.runtime as runtime

        self._cuda, self._runtime = world.cuda, runtime
        self._current = _Stream(self, 0)
        self.cuda = SimpleNamespace(
            is_available=lambda: True,
            OutOfMemoryError=OutOfMemoryError,
            Stream=lambda: _Stream(self, int(self._call("cudaStreamCreateWithFlags", 1)), owned=True),
            ExternalStream=lambda handle: _Stream(self, handle),
            default_stream=lambda: _Stream(self, 0),
            Event=lambda enable_timing=False: _Event(self, enable_timing),
            CUDAGraph=lambda: _Graph(self),
            stream=self._stream,
            synchronize=lambda: self._call("cudaDeviceSynchronize"),
            mem_get_info=lambda: self._call("cudaMemGetInfo"),
        )

    def _call(self, name: str, *arguments: Any) -> Any:
        code, *values = getattr(self._cuda, name)(*arguments)
        if int(code):
            kind = OutOfMemoryError if code.name == "cudaErrorMemoryAllocation" else RuntimeError
            raise kind(f"CUDA error: {code.name}")
        return values[0] if len(values) == 1 else tuple(values)

    @contextmanager
    def _stream(self, stream: _Stream) -> Iterator[None]:
        before, self._current = self._current, stream
        try:
            yield
        finally:
            self._current = before

    def empty(self, size: int, *, dtype: Any, device: str = "cpu", pin_memory: bool = False) -> _Tensor:
        assert dtype == self.uint8
        if device == "cuda":
            return _Tensor(self, self._call("cudaMalloc", size), size, "cudaFree")
        assert pin_memory
        return _Tensor(self, self._call("cudaMallocHost", size), size, "cudaFreeHost")

    def as_tensor(self, data: Any, *, device: str) -> _Tensor:
        said = data.__cuda_array_interface__
        assert (device, said["typestr"]) == ("cuda", "|u1")
        return _Tensor(self, said["data"][0], said["shape"][0], keep=data)


class _Tensor:
    def __init__(self, torch: Torch, pointer: int, size: int, free: str = "", keep: Any = None) -> None:
        self._torch, self._pointer, self._size, self._free, self._keep = torch, pointer, size, free, keep

    def __del__(self) -> None:
        if self._free:
            self._torch._call(self._free, self._pointer)

    def data_ptr(self) -> int:
        return self._pointer

    def __getitem__(self, part: slice) -> _Tensor:
        assert part.start is None and part.stop <= self._size
        return _Tensor(self._torch, self._pointer, part.stop, keep=self)

    def copy_(self, source: _Tensor, non_blocking: bool = False) -> None:
        assert non_blocking and source._size == self._size
        kind = self._torch._runtime.cudaMemcpyKind.cudaMemcpyDefault
        handle = self._torch._current.cuda_stream
        self._torch._call("cudaMemcpyAsync", self._pointer, source._pointer, self._size, kind, handle)


class _Stream:
    def __init__(self, torch: Torch, handle: int, *, owned: bool = False) -> None:
        self._torch, self.cuda_stream, self._owned = torch, handle, owned

    def __del__(self) -> None:
        if self._owned:
            self._torch._call("cudaStreamDestroy", self.cuda_stream)

    def synchronize(self) -> None:
        self._torch._call("cudaStreamSynchronize", self.cuda_stream)

    def wait_event(self, event: _Event) -> None:
        if event.handle:
            self._torch._call("cudaStreamWaitEvent", self.cuda_stream, event.handle, 0)


class _Event:
    def __init__(self, torch: Torch, enable_timing: bool) -> None:
        self._torch, self._flags, self.handle = torch, 0 if enable_timing else 2, 0

    def __del__(self) -> None:
        if self.handle:
            self._torch._call("cudaEventDestroy", self.handle)

    def record(self, stream: _Stream) -> None:
        self.handle = self.handle or int(self._torch._call("cudaEventCreateWithFlags", self._flags))
        self._torch._call("cudaEventRecord", self.handle, stream.cuda_stream)

    def synchronize(self) -> None:
        if self.handle:
            self._torch._call("cudaEventSynchronize", self.handle)

    def elapsed_time(self, end: _Event) -> float:
        return float(self._torch._call("cudaEventElapsedTime", self.handle, end.handle))


class _Graph:
    def __init__(self, torch: Torch) -> None:
        self._torch, self._exec, self._stream = torch, 0, 0

    def capture_begin(self, pool: Any = None, capture_error_mode: str = "global") -> None:
        assert capture_error_mode == "thread_local"
        self._stream = self._torch._current.cuda_stream
        if not self._stream:
            raise RuntimeError("CUDA graphs must be captured on a non-default stream.")
        mode = self._torch._runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self._torch._call("cudaStreamBeginCapture", self._stream, mode)

    def capture_end(self) -> None:
        graph = self._torch._call("cudaStreamEndCapture", self._stream)
        self._exec = self._torch._call("cudaGraphInstantiate", graph, 0)
        self._torch._call("cudaGraphDestroy", graph)

    def replay(self) -> None:
        self._torch._call("cudaGraphLaunch", self._exec, self._torch._current.cuda_stream)

    def reset(self) -> None:
        self._torch._call("cudaGraphExecDestroy", self._exec)
        self._exec = 0
