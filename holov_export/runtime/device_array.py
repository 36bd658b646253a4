"""Arrays on the GPU that torch, cupy and others take without a copy: DLPack and `__cuda_array_interface__`.

DLPack carries the consumer's stream, so nobody waits but the GPU. The CUDA array interface is read by libraries that
ignore its stream (torch does), so reading it waits on the host until the values are there.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from holov_export.errors import ImageError

#: Source: dlpack.h of github.com/dmlc/dlpack, DLDeviceType and DLDataTypeCode
DL_CPU, DL_CUDA = 1, 2
_DL_CODES = {"i": 0, "u": 1, "f": 2}
_DL_BFLOAT = 4


class CudaArray(Protocol):
    """Anything on the device that says where it is: a torch tensor, a cupy array, a `DeviceArray`."""

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]: ...


class Readiness(Protocol):
    """When the values of an array are there, and who reads them."""

    def wait(self) -> None:
        """Block until the values are there."""
        ...

    def order_before(self, stream: int) -> None:
        """What is enqueued on `stream` from now on comes after the values are there."""
        ...

    def read_by_unknown(self) -> None:
        """Somebody may read the values on a stream that nobody names."""
        ...


@dataclass(frozen=True, eq=False)
class DeviceArray:
    """A C-contiguous array in device memory that its owner keeps alive.

    Attributes:
        dtype: of the elements in numpy; for bfloat16 "uint16", the same 16 bits.
        bfloat16: whether the elements are bfloat16. DLPack says so; the CUDA array interface has no word for it.
        pointer: its address.
    """

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    pointer: int
    owner: Readiness = field(repr=False)
    bfloat16: bool = False

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        if self.bfloat16:
            raise AttributeError("the CUDA array interface has no bfloat16; use DLPack: torch.from_dlpack(array)")
        self.owner.wait()
        self.owner.read_by_unknown()
        return {
            "shape": self.shape,
            "typestr": self.dtype.str,
            "data": (self.pointer, False),
            "strides": None,
            "version": 3,
            "stream": None,  # no consumer has to wait: the values are there
        }

    def __dlpack_device__(self) -> tuple[int, int]:
        return DL_CUDA, 0

    def __dlpack__(
        self,
        *,
        stream: int | None = None,
        max_version: tuple[int, int] | None = None,
        dl_device: tuple[int, int] | None = None,
        copy: bool | None = None,
    ) -> Any:
        """A capsule, once consumed the consumer's.

        Args:
            stream: the consumer's: None or 1 for the legacy default stream, 2 for the thread's own, -1 for no waiting.
            max_version, dl_device, copy: as in the array API standard; there is one version, one device and no copy.

        Raises:
            BufferError: a copy or another device is asked for.
        """
        if copy or (dl_device is not None and tuple(dl_device) != self.__dlpack_device__()):
            raise BufferError("the array is on the GPU and is handed over as it is, without a copy.")
        if stream == 0:
            raise ValueError("stream 0 is ambiguous in DLPack; give 1 (legacy default) or 2 (per thread).")
        if stream != -1:
            self.owner.order_before(1 if stream is None else stream)
        self.owner.read_by_unknown()
        code = _DL_BFLOAT if self.bfloat16 else _DL_CODES[self.dtype.kind]
        return capsule(self.pointer, self.shape, code, self.dtype.itemsize * 8, DL_CUDA, keep=self)


@dataclass(frozen=True)
class DeviceView:
    """What an array of somebody else says of itself.

    Attributes:
        writer: the stream that its values come from (1 legacy default, 2 per thread); None if it names none.
        ready: it says that its values are there. The interface before version 3 says neither.
    """

    pointer: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    writer: int | None
    ready: bool


def device_view(array: CudaArray) -> DeviceView:
    """Read `__cuda_array_interface__`.

    Raises:
        ImageError: it is not C-contiguous, or masked.
    """
    said = array.__cuda_array_interface__
    shape, dtype = tuple(int(size) for size in said["shape"]), np.dtype(said["typestr"])
    strides = said.get("strides")
    if strides is not None and tuple(strides) != _c_strides(shape, dtype.itemsize):
        raise ImageError(
            "the pixels on the device are not C-contiguous.", hint="Call .contiguous() (torch) or ascontiguousarray."
        )
    if said.get("mask") is not None:
        raise ImageError("the pixels on the device are masked.")
    writer = said.get("stream")
    ready = said.get("version", 0) >= 3 and writer is None
    return DeviceView(int(said["data"][0]), shape, dtype, None if writer is None else int(writer), ready)


def _c_strides(shape: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    return tuple(itemsize * int(np.prod(shape[axis + 1 :], dtype=np.int64)) for axis in range(len(shape)))


# ---------------------------------------------------------------------------------------------------- the capsule


class _Tensor(ctypes.Structure):
    """DLTensor with its DLDevice and DLDataType inline; DLManagedTensor begins with it. Source: dlpack.h"""

    _fields_ = [
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    ]


class _Anchor(np.ndarray[Any, Any]):
    """An array without memory of its own that keeps something alive."""

    keep: object


_pointer_of = ctypes.pythonapi.PyCapsule_GetPointer
_pointer_of.restype, _pointer_of.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]


def capsule(pointer: int, shape: tuple[int, ...], code: int, bits: int, device: int, *, keep: object) -> Any:
    """A DLPack capsule over memory at `pointer`. `keep` stays alive until the consumer is done, or nobody consumes it.

    numpy makes the capsule, over an anchor of the right shape, and we put another address into it: so all that runs
    when a consumer lets go is numpy's C. A Python function there would lose an exception that is on its way just then.

    Args:
        code, bits: DLPack's type code and the size of an element.
        device: DL_CUDA or DL_CPU.
    """
    anchor = _Anchor(shape, f"u{bits // 8}", bytearray(bits // 8), strides=(0,) * len(shape))
    anchor.keep = keep
    made = anchor.__dlpack__()
    tensor = _Tensor.from_address(_pointer_of(made, b"dltensor"))
    tensor.data, tensor.byte_offset = pointer, 0
    tensor.device_type, tensor.device_id = device, 0
    tensor.code, tensor.bits, tensor.lanes = code, bits, 1
    tensor.strides = None  # C-contiguous
    return made
