# ruff: noqa: N801, N815  the names are those of CUDA
"""The types and constants of `cuda.bindings.runtime`, and the GPU that the stand-ins pretend to see."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tensorrt_standin.cuda_errors import DeviceAttribute, Error, MemcpyKind, StreamCaptureMode, StreamCaptureStatus

#: Flags of driver_types.h
CONSTANTS = {
    "cudaStreamDefault": 0,
    "cudaStreamNonBlocking": 1,
    "cudaEventDefault": 0,
    "cudaEventBlockingSync": 1,
    "cudaEventDisableTiming": 2,
    "cudaHostAllocDefault": 0,
    "cudaHostAllocPortable": 1,
    "cudaHostAllocMapped": 2,
    "cudaHostAllocWriteCombined": 4,
    "cudaStreamLegacy": 1,
    "cudaStreamPerThread": 2,
}


@dataclass(frozen=True)
class FakeGpu:
    """The GPU that the stand-ins pretend to see.

    Attributes:
        memory: bytes.
        integrated: True as on a Jetson.
    """

    name: str = "NVIDIA H200"
    sm: int = 90
    memory: int = 141 << 30
    integrated: bool = False
    multiprocessors: int = 132


class Handle:
    """cudaStream_t, cudaEvent_t, cudaGraph_t, cudaGraphExec_t: a number in an object."""

    def __init__(self, init_value: Any = 0) -> None:
        self._number = int(init_value)

    def __int__(self) -> int:
        return self._number

    __index__ = __int__

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Handle) and int(other) == self._number

    def __hash__(self) -> int:
        return hash(self._number)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} 0x{self._number:x}>"


class cudaStream_t(Handle):
    """A stream."""


class cudaEvent_t(Handle):
    """An event."""


class cudaGraph_t(Handle):
    """A graph."""


class cudaGraphExec_t(Handle):
    """A graph ready to be launched."""


@dataclass
class cudaDeviceProp:
    """The part of the device's properties that the stand-in knows."""

    name: bytes
    major: int
    minor: int
    totalGlobalMem: int
    multiProcessorCount: int
    integrated: int


TYPES = {
    "cudaError_t": Error,
    "cudaMemcpyKind": MemcpyKind,
    "cudaStreamCaptureMode": StreamCaptureMode,
    "cudaStreamCaptureStatus": StreamCaptureStatus,
    "cudaDeviceAttr": DeviceAttribute,
    "cudaStream_t": cudaStream_t,
    "cudaEvent_t": cudaEvent_t,
    "cudaGraph_t": cudaGraph_t,
    "cudaGraphExec_t": cudaGraphExec_t,
    "cudaDeviceProp": cudaDeviceProp,
}
