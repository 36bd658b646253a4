# ruff: noqa: N802, N803  the names are those of CUDA
"""A stand-in of cuda-python's `cuda.bindings.runtime` over host memory: same names, arguments and returned tuples.

Each call returns (error,) or (error, value, ...). What real CUDA reports as an error code comes back as that code;
what it leaves undefined raises `Misuse`. Source of the signatures: cuda-bindings 13 (compared in the tests).
"""

from __future__ import annotations

import ctypes
import functools
import inspect
import threading
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np

from tensorrt_standin.cuda_errors import DeviceAttribute, Error, MemcpyKind, StreamCaptureMode, StreamCaptureStatus
from tensorrt_standin.cuda_memory import Memory, bytes_at, copy
from tensorrt_standin.cuda_streams import CudaError, Event, Stream, Streams, Work
from tensorrt_standin.cuda_types import (
    CONSTANTS,
    TYPES,
    FakeGpu,
    Handle,
    cudaDeviceProp,
    cudaEvent_t,
    cudaGraph_t,
    cudaGraphExec_t,
    cudaStream_t,
)

_CUDA_VERSION = 12060  # the CUDA version that the fake driver and runtime say


def _address(pointer: Any) -> int:
    """A pointer as cuda-python takes it: an int, a handle, or an object with a buffer."""
    if pointer is None:
        return 0
    if hasattr(pointer, "__index__") or isinstance(pointer, Handle):
        return int(pointer)
    return int(np.frombuffer(pointer, np.uint8).ctypes.data)


def _call(method: Callable[..., Any]) -> Callable[..., tuple[Any, ...]]:
    """One CUDA call: locked, its result as the tuple of cuda-python."""

    @functools.wraps(method)
    def call(self: FakeCuda, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        wanted = getattr(method, "values", 0)
        inspect.signature(method).bind(self, *args, **kwargs)  # a TypeError here is the caller's
        if self.gpu is None:
            return (Error.cudaErrorInsufficientDriver, *[None] * wanted)
        with self.lock:
            self.calls.append(method.__name__)
            try:
                result = method(self, *args, **kwargs)
            except CudaError as error:
                self.last_error = error.code
                return (error.code, *[None] * wanted)
        values = result if isinstance(result, tuple) else (result,) if wanted else ()
        return (Error.cudaSuccess, *values)

    return call


def _gives(values: int) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """How many values come back beside the error."""

    def mark(method: Callable[..., Any]) -> Callable[..., Any]:
        method.values = values
        return _call(method)

    return mark


class FakeCuda:
    """The device behind the stand-in; its methods named cuda* are the module's functions.

    Attributes:
        calls: names of the calls so far, in order.
    """

    def __init__(self, gpu: FakeGpu | None) -> None:
        self.gpu = gpu
        self.lock = threading.RLock()
        self.memory = Memory(gpu.memory if gpu else 0)
        self.streams = Streams()
        self.calls: list[str] = []
        self.last_error = Error.cudaSuccess

    def leaked(self) -> list[str]:
        """What was made and never destroyed, in words."""
        left = [f"{block.kind} memory of {block.size} bytes" for block in self.memory.alive()]
        left += ["stream"] * (len(self.streams.streams) - 1)
        left += ["event"] * len(self.streams.events)
        left += ["graph"] * len(self.streams.graphs)
        left += ["executable graph"] * len(self.streams.executables)
        return left

    def module(self, name: str) -> ModuleType:
        """The stand-in of `cuda.bindings.runtime` under that name."""
        module = ModuleType(name)
        for key, value in {**TYPES, **CONSTANTS}.items():
            setattr(module, key, value)
        for key in dir(self):
            if key.startswith("cuda"):
                setattr(module, key, getattr(self, key))
        return module

    # ---- memory

    @_gives(1)
    def cudaMalloc(self, size: int) -> int:
        self.streams.forbid_unsafe()
        if size > self.memory.free_bytes:
            raise CudaError(Error.cudaErrorMemoryAllocation)
        return self.memory.allocate("device", int(size)).address

    @_gives(0)
    def cudaFree(self, devPtr: Any) -> None:
        self.streams.forbid_unsafe()
        self._free(devPtr, "device")

    @_gives(1)
    def cudaHostAlloc(self, size: int, flags: int) -> int:
        self.streams.forbid_unsafe()
        return self.memory.allocate("pinned", int(size), int(flags)).address

    @_gives(1)
    def cudaMallocHost(self, size: int) -> int:
        self.streams.forbid_unsafe()
        return self.memory.allocate("pinned", int(size)).address

    @_gives(0)
    def cudaFreeHost(self, ptr: Any) -> None:
        self.streams.forbid_unsafe()
        self._free(ptr, "pinned")

    @_gives(2)
    def cudaMemGetInfo(self) -> tuple[int, int]:
        return self.memory.free_bytes, self.memory.total

    @_gives(0)
    def cudaMemcpy(self, dst: Any, src: Any, count: int, kind: MemcpyKind) -> None:
        self.streams.forbid_unsafe()
        self.streams.forbid_implicit()
        work = self._copy(dst, src, count, kind, staged=False)
        self.streams.finish_blocking()
        work.run()

    @_gives(0)
    def cudaMemcpyAsync(self, dst: Any, src: Any, count: int, kind: MemcpyKind, stream: Any) -> None:
        """Pageable host memory makes it half synchronous, as in "API synchronization behavior" of the runtime API."""
        target = self._stream(stream)
        capturing = target.capture is not None
        self.streams.enqueue(target, self._copy(dst, src, count, kind, staged=not capturing))
        pageable = self.memory.block_at(_address(dst), 0, "cudaMemcpyAsync") is None
        if pageable and not capturing:
            self.streams.synchronize(target)

    @_gives(0)
    def cudaMemset(self, devPtr: Any, value: int, count: int) -> None:
        self.streams.forbid_implicit()
        work = self._set(devPtr, value, count)
        self.streams.finish_blocking()
        work.run()

    @_gives(0)
    def cudaMemsetAsync(self, devPtr: Any, value: int, count: int, stream: Any) -> None:
        self.streams.enqueue(self._stream(stream), self._set(devPtr, value, count))

    # ---- streams and graphs

    @_gives(1)
    def cudaStreamCreate(self) -> cudaStream_t:
        return cudaStream_t(self.streams.create(0).handle)

    @_gives(1)
    def cudaStreamCreateWithFlags(self, flags: int) -> cudaStream_t:
        return cudaStream_t(self.streams.create(int(flags)).handle)

    @_gives(1)
    def cudaStreamCreateWithPriority(self, flags: int, priority: int) -> cudaStream_t:
        return cudaStream_t(self.streams.create(int(flags)).handle)

    @_gives(0)
    def cudaStreamDestroy(self, stream: Any) -> None:
        self.streams.destroy(_address(stream))

    @_gives(0)
    def cudaStreamSynchronize(self, stream: Any) -> None:
        self.streams.synchronize(self._stream(stream))

    @_gives(0)
    def cudaStreamQuery(self, stream: Any) -> None:
        if self._stream(stream).pending:
            raise CudaError(Error.cudaErrorNotReady)

    @_gives(0)
    def cudaStreamWaitEvent(self, stream: Any, event: Any, flags: int) -> None:
        self.streams.wait(self._stream(stream), self._event(event))

    @_gives(0)
    def cudaStreamBeginCapture(self, stream: Any, mode: StreamCaptureMode) -> None:
        if not isinstance(mode, StreamCaptureMode):
            raise TypeError("Argument 'mode' is not instance of type 'cudaStreamCaptureMode'")
        self.streams.begin_capture(self._stream(stream), int(mode))

    @_gives(1)
    def cudaStreamEndCapture(self, stream: Any) -> cudaGraph_t:
        return cudaGraph_t(self.streams.end_capture(self._stream(stream)))

    @_gives(1)
    def cudaStreamIsCapturing(self, stream: Any) -> StreamCaptureStatus:
        capture = self._stream(stream).capture
        return StreamCaptureStatus(0 if capture is None else 2 if capture.invalid else 1)

    @_gives(1)
    def cudaGraphInstantiate(self, graph: Any, flags: int) -> cudaGraphExec_t:
        return cudaGraphExec_t(self.streams.instantiate(_address(graph)))

    @_gives(0)
    def cudaGraphUpload(self, graphExec: Any, stream: Any) -> None:
        if _address(graphExec) not in self.streams.executables:
            raise CudaError(Error.cudaErrorInvalidValue)

    @_gives(0)
    def cudaGraphLaunch(self, graphExec: Any, stream: Any) -> None:
        self.streams.launch(_address(graphExec), self._stream(stream))

    @_gives(0)
    def cudaGraphDestroy(self, graph: Any) -> None:
        if self.streams.graphs.pop(_address(graph), None) is None:
            raise CudaError(Error.cudaErrorInvalidValue)

    @_gives(0)
    def cudaGraphExecDestroy(self, graphExec: Any) -> None:
        if self.streams.executables.pop(_address(graphExec), None) is None:
            raise CudaError(Error.cudaErrorInvalidValue)

    # ---- events

    @_gives(1)
    def cudaEventCreate(self) -> cudaEvent_t:
        return cudaEvent_t(self.streams.create_event(0).handle)

    @_gives(1)
    def cudaEventCreateWithFlags(self, flags: int) -> cudaEvent_t:
        return cudaEvent_t(self.streams.create_event(int(flags)).handle)

    @_gives(0)
    def cudaEventRecord(self, event: Any, stream: Any) -> None:
        self.streams.record(self._event(event), self._stream(stream))

    @_gives(0)
    def cudaEventQuery(self, event: Any) -> None:
        found = self._event(event)
        if found.completed < found.recorded:
            raise CudaError(Error.cudaErrorNotReady)

    @_gives(0)
    def cudaEventSynchronize(self, event: Any) -> None:
        self.streams.synchronize_event(self._event(event))

    @_gives(1)
    def cudaEventElapsedTime(self, start: Any, end: Any) -> float:
        return self.streams.elapsed_ms(self._event(start), self._event(end))

    @_gives(0)
    def cudaEventDestroy(self, event: Any) -> None:
        del self.streams.events[self._event(event).handle]

    # ---- device

    @_gives(0)
    def cudaDeviceSynchronize(self) -> None:
        self.streams.synchronize_device()

    @_gives(0)
    def cudaSetDevice(self, device: int) -> None:
        self._device(device)

    @_gives(1)
    def cudaGetDevice(self) -> int:
        return 0

    @_gives(1)
    def cudaGetDeviceCount(self) -> int:
        return 1

    @_gives(1)
    def cudaGetDeviceProperties(self, device: int) -> cudaDeviceProp:
        gpu = self._device(device)
        major, minor = divmod(gpu.sm, 10)
        return cudaDeviceProp(gpu.name.encode(), major, minor, gpu.memory, gpu.multiprocessors, int(gpu.integrated))

    @_gives(1)
    def cudaDeviceGetAttribute(self, attr: DeviceAttribute, device: int) -> int:
        gpu = self._device(device)
        return {
            DeviceAttribute.cudaDevAttrComputeCapabilityMajor: gpu.sm // 10,
            DeviceAttribute.cudaDevAttrComputeCapabilityMinor: gpu.sm % 10,
            DeviceAttribute.cudaDevAttrMultiProcessorCount: gpu.multiprocessors,
            DeviceAttribute.cudaDevAttrIntegrated: int(gpu.integrated),
        }[attr]

    @_gives(1)
    def cudaDriverGetVersion(self) -> int:
        return _CUDA_VERSION

    @_gives(1)
    def cudaRuntimeGetVersion(self) -> int:
        return _CUDA_VERSION

    @_gives(1)
    def cudaGetErrorName(self, error: Error) -> bytes:
        return error.name.encode()

    @_gives(1)
    def cudaGetErrorString(self, error: Error) -> bytes:
        return error.name.removeprefix("cudaError").encode()

    def cudaGetLastError(self) -> tuple[Error]:
        error, self.last_error = self.last_error, Error.cudaSuccess
        return (error,)

    def cudaPeekAtLastError(self) -> tuple[Error]:
        return (self.last_error,)

    # ---- parts

    def _stream(self, stream: Any) -> Stream:
        return self.streams.stream(_address(stream))

    def _event(self, event: Any) -> Event:
        return self.streams.event(_address(event))

    def _device(self, device: int) -> FakeGpu:
        if int(device) or self.gpu is None:
            raise CudaError(Error.cudaErrorInvalidDevice)
        return self.gpu

    def _free(self, pointer: Any, kind: str) -> None:
        """Waits for the device first, as cudaFree and cudaFreeHost do; freeing NULL does nothing."""
        address = _address(pointer)
        for stream in list(self.streams.streams.values()):
            self.streams.finish(stream)
        if address and not self.memory.release(address, kind):
            raise CudaError(Error.cudaErrorInvalidValue)

    def _copy(self, dst: Any, src: Any, count: int, kind: MemcpyKind, *, staged: bool) -> Work:
        target, source, size = _address(dst), _address(src), int(count)
        if not isinstance(kind, MemcpyKind):
            raise TypeError("Argument 'kind' is not instance of type 'cudaMemcpyKind'")
        self._check_copy(target, source, size, kind)
        pageable = self.memory.block_at(source, size, "a copy") is None
        data = bytes_at(source, size) if staged and pageable else None

        def run() -> None:
            self._check_copy(target, source, size, kind)
            if data is None:
                copy(target, source, size)
            else:
                ctypes.memmove(target, data, size)

        return Work("copy", run)

    def _check_copy(self, target: int, source: int, size: int, kind: MemcpyKind) -> None:
        """Bounds, life, and that the two ends are where `kind` says."""
        if not target or not source:
            raise CudaError(Error.cudaErrorInvalidValue)
        for address, what in ((target, "a copy's target"), (source, "a copy's source")):
            block = self.memory.block_at(address, size, what)
            on_device = block is not None and block.kind == "device"
            wanted = kind in (
                (MemcpyKind.cudaMemcpyHostToDevice, MemcpyKind.cudaMemcpyDeviceToDevice)
                if what.endswith("target")
                else (MemcpyKind.cudaMemcpyDeviceToHost, MemcpyKind.cudaMemcpyDeviceToDevice)
            )
            if kind != MemcpyKind.cudaMemcpyDefault and on_device != wanted:
                raise CudaError(Error.cudaErrorInvalidValue)

    def _set(self, pointer: Any, value: int, count: int) -> Work:
        address, size = _address(pointer), int(count)
        self.memory.require("device", address, size, "cudaMemset")

        def run() -> None:
            self.memory.require("device", address, size, "cudaMemset")
            ctypes.memset(address, int(value), size)

        return Work("memset", run)
