"""CUDA memory, streams, events and graphs, as little of it as running an engine takes, from cuda-python or from torch.

Pointers and handles are plain integers, as TensorRT takes them; sizes are bytes; times are seconds.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, Literal, Protocol

from holov_export.errors import EnvironmentFaultError, MissingExtraError, UnknownNameError

Memory = Literal["auto", "cuda-python", "torch"]
MEMORIES = ("auto", "cuda-python", "torch")
#: cuda-python's binding of the CUDA runtime, and its older name
_MODULES = ("cuda.bindings.runtime", "cuda.cudart")


class CudaApi(Protocol):
    """What running an engine needs of CUDA.

    Every method raises EnvironmentFaultError with CUDA's own words when CUDA refuses.

    Attributes:
        name: of the package behind it.
    """

    name: str

    def allocate(self, size: int) -> int:
        """The address of `size` fresh bytes on the device, aligned to 256 at least."""
        ...

    def free(self, pointer: int) -> None: ...

    def allocate_pinned(self, size: int) -> int:
        """The address of `size` fresh bytes of page-locked host memory: copies from and to it do not block."""
        ...

    def free_pinned(self, pointer: int) -> None: ...

    def copy(self, target: int, source: int, size: int, stream: int) -> None:
        """Enqueue a copy. The driver knows of each address whether it is on the device or pinned on the host."""
        ...

    def create_stream(self) -> int:
        """A stream that does not wait for the legacy default stream."""
        ...

    def destroy_stream(self, stream: int) -> None: ...

    def wait_for_stream(self, stream: int) -> None:
        """Block until all that was enqueued on the stream is done."""
        ...

    def wait_for_device(self) -> None:
        """Block until all that was enqueued anywhere is done. It must not meet a capture of any thread."""
        ...

    def create_event(self) -> int:
        """An event with a time."""
        ...

    def destroy_event(self, event: int) -> None: ...

    def record(self, event: int, stream: int) -> None:
        """Mark the present end of the stream; an earlier mark is forgotten."""
        ...

    def wait_for_event(self, event: int) -> None:
        """Block until the stream has come to the mark; at once if there is none."""
        ...

    def stream_waits(self, stream: int, event: int) -> None:
        """What is enqueued on `stream` from now on waits for the mark. The caller does not wait."""
        ...

    def seconds_between(self, start: int, end: int) -> float:
        """Time on the device between two marks that were passed."""
        ...

    def capture(self, stream: int, enqueue: Callable[[], None]) -> int:
        """Record what `enqueue` puts on the stream, without running it, as a graph.

        Other threads may go on meanwhile; this one may not allocate within `enqueue`. If `enqueue` raises or enqueues
        what cannot be captured, the stream is usable afterwards and the error is raised.
        """
        ...

    def launch(self, graph: int, stream: int) -> None: ...

    def destroy_graph(self, graph: int) -> None: ...

    def free_bytes(self) -> int:
        """Device memory that nobody has taken, by any program."""
        ...


class CudaPython:
    """`CudaApi` over cuda-python's binding of the CUDA runtime."""

    def __init__(self, runtime: Any) -> None:
        """`runtime` is the module cuda.bindings.runtime, or cuda.cudart of older releases."""
        self.name = "cuda-python"
        self._rt = runtime

    def _call(self, function: str, *arguments: Any) -> Any:
        """The result of a CUDA call without its error code: nothing, one value or a tuple.

        Raises:
            EnvironmentFaultError: the call failed; names it and the error.
        """
        code, *values = getattr(self._rt, function)(*arguments)
        if int(code) != 0:
            raise EnvironmentFaultError(f"{function} failed: {self._words(code)}.", hint=_hint(self._error_name(code)))
        return values[0] if len(values) == 1 else tuple(values)

    def _error_name(self, code: Any) -> str:
        return _text(self._rt.cudaGetErrorName(code)[1])

    def _words(self, code: Any) -> str:
        return f"{self._error_name(code)} ({_text(self._rt.cudaGetErrorString(code)[1])})"

    def allocate(self, size: int) -> int:
        code, pointer = self._rt.cudaMalloc(size)
        if int(code) == 0:
            return int(pointer)
        if self._error_name(code) == "cudaErrorMemoryAllocation":
            raise out_of_memory(size, self.free_bytes())
        raise EnvironmentFaultError(f"cudaMalloc failed: {self._words(code)}.", hint=_hint(self._error_name(code)))

    def free(self, pointer: int) -> None:
        self._call("cudaFree", pointer)

    def allocate_pinned(self, size: int) -> int:
        return int(self._call("cudaHostAlloc", size, self._rt.cudaHostAllocDefault))

    def free_pinned(self, pointer: int) -> None:
        self._call("cudaFreeHost", pointer)

    def copy(self, target: int, source: int, size: int, stream: int) -> None:
        self._call("cudaMemcpyAsync", target, source, size, self._rt.cudaMemcpyKind.cudaMemcpyDefault, stream)

    def create_stream(self) -> int:
        return int(self._call("cudaStreamCreateWithFlags", self._rt.cudaStreamNonBlocking))

    def destroy_stream(self, stream: int) -> None:
        self._call("cudaStreamDestroy", stream)

    def wait_for_stream(self, stream: int) -> None:
        self._call("cudaStreamSynchronize", stream)

    def wait_for_device(self) -> None:
        self._call("cudaDeviceSynchronize")

    def create_event(self) -> int:
        return int(self._call("cudaEventCreate"))

    def destroy_event(self, event: int) -> None:
        self._call("cudaEventDestroy", event)

    def record(self, event: int, stream: int) -> None:
        self._call("cudaEventRecord", event, stream)

    def wait_for_event(self, event: int) -> None:
        self._call("cudaEventSynchronize", event)

    def stream_waits(self, stream: int, event: int) -> None:
        self._call("cudaStreamWaitEvent", stream, event, 0)

    def seconds_between(self, start: int, end: int) -> float:
        return float(self._call("cudaEventElapsedTime", start, end)) / 1e3

    def capture(self, stream: int, enqueue: Callable[[], None]) -> int:
        mode = self._rt.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self._call("cudaStreamBeginCapture", stream, mode)
        try:
            enqueue()
        except BaseException:
            code, graph = self._rt.cudaStreamEndCapture(stream)  # its error would only repeat what is being raised
            if int(code) == 0:
                self._rt.cudaGraphDestroy(graph)
            raise
        graph = self._call("cudaStreamEndCapture", stream)
        try:
            return int(self._call("cudaGraphInstantiate", graph, 0))
        finally:
            self._call("cudaGraphDestroy", graph)

    def launch(self, graph: int, stream: int) -> None:
        self._call("cudaGraphLaunch", graph, stream)

    def destroy_graph(self, graph: int) -> None:
        self._call("cudaGraphExecDestroy", graph)

    def free_bytes(self) -> int:
        return int(self._call("cudaMemGetInfo")[0])


def cuda_api(memory: str = "auto") -> CudaApi:
    """CUDA through one of `MEMORIES`; "auto" takes cuda-python, then a torch that has CUDA.

    Raises:
        UnknownNameError: another name.
        MissingExtraError: the package is not installed, or "auto" and neither is.
        EnvironmentFaultError: torch was asked for and has no CUDA.
    """
    if memory not in MEMORIES:
        raise UnknownNameError(f"unknown memory '{memory}'.", hint=f"Known: {', '.join(MEMORIES)}.")
    runtime = _cuda_python() if memory != "torch" else None
    if runtime is not None:
        return CudaPython(runtime)
    if memory == "cuda-python":
        raise MissingExtraError("the Python package 'cuda-bindings' is not installed.", hint=_INSTALL)
    from holov_export.runtime.device_memory_torch import torch_cuda

    return torch_cuda(required=memory == "torch", install=_INSTALL)


_INSTALL = (
    "Run: pip install cuda-bindings, of your driver's CUDA major version (nvidia-smi shows it), or install a torch "
    "with CUDA."
)


def _cuda_python() -> Any:
    """cuda-python's runtime module, None where it is not installed."""
    for name in _MODULES:
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError:
            continue
    return None


def out_of_memory(size: int, free: int) -> EnvironmentFaultError:
    """The error for an allocation of `size` bytes where `free` are left."""
    return EnvironmentFaultError(
        f"the GPU is out of memory: {_mib(size)} asked for, {_mib(free)} free.",
        hint="Close what else uses the GPU, run fewer lanes, or compile for a smaller batch.",
    )


def _mib(size: int) -> str:
    return f"{size / 2**20:.1f} MiB"


def _hint(name: str) -> str:
    if name == "cudaErrorInsufficientDriver":
        return "The driver is older than this cuda-bindings: install one of the driver's CUDA major version."
    if name == "cudaErrorMemoryAllocation":
        return "Close other programs, or run fewer lanes."
    return ""


def _text(value: Any) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)
