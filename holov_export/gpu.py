"""Ask the CUDA driver what GPU there is, without any package and without TensorRT.

TensorRT's `Runtime` kills the process when there is no driver, so whoever is about to touch it asks here first.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import sys
from dataclasses import dataclass

from holov_export.errors import HardwareError

#: CUdevice_attribute numbers. Source: cuda.h of the CUDA toolkit
_MAJOR, _MINOR, _INTEGRATED = 75, 76, 18
#: CUDA_ERROR_NO_DEVICE. Source: cuda.h
_NO_DEVICE = 100


@dataclass(frozen=True)
class Gpu:
    """The first CUDA device.

    Attributes:
        name: as the driver gives it, "NVIDIA H200".
        sm: compute capability without the dot: 87 for Orin, 90 for H100 and H200.
        memory_bytes: all of its memory.
        integrated: True where it shares the memory of the CPU (Jetson).
        cuda: newest CUDA version that the driver supports, "12.6".
    """

    name: str
    sm: int
    memory_bytes: int
    integrated: bool
    cuda: str


@dataclass(frozen=True)
class NoGpu:
    """Why there is none: no driver library, or what cuInit returned. `broken`: a driver is there and refuses."""

    reason: str
    broken: bool = False


def probe() -> Gpu | NoGpu:
    """The GPU that CUDA would use, or why it has none. Creates no context."""
    name = "nvcuda.dll" if sys.platform == "win32" else ctypes.util.find_library("cuda") or "libcuda.so.1"
    try:
        driver = ctypes.CDLL(name)
    except OSError:
        return NoGpu("there is no CUDA driver (libcuda)")
    code = int(driver.cuInit(0))
    if code == _NO_DEVICE:
        return NoGpu("the CUDA driver sees no device")
    if code != 0:
        return NoGpu(f"the CUDA driver refuses (cuInit returned {code}); nvidia-smi may say why", broken=True)
    return _first_device(driver)


def _first_device(driver: ctypes.CDLL) -> Gpu | NoGpu:
    count, device, version = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    if driver.cuDeviceGetCount(ctypes.byref(count)) or not count.value:
        return NoGpu("the CUDA driver sees no device")
    name, memory = ctypes.create_string_buffer(256), ctypes.c_size_t()
    codes = [
        driver.cuDeviceGet(ctypes.byref(device), 0),
        driver.cuDeviceGetName(name, len(name), device),
        driver.cuDeviceTotalMem_v2(ctypes.byref(memory), device),
        driver.cuDriverGetVersion(ctypes.byref(version)),
    ]
    values = {}
    for attribute in (_MAJOR, _MINOR, _INTEGRATED):
        value = ctypes.c_int()
        codes.append(driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, device))
        values[attribute] = value.value
    if any(codes):
        return NoGpu("the CUDA driver does not describe its first device; nvidia-smi may say why", broken=True)
    return Gpu(
        name=name.value.decode(errors="replace"),
        sm=values[_MAJOR] * 10 + values[_MINOR],
        memory_bytes=memory.value,
        integrated=bool(values[_INTEGRATED]),
        cuda=f"{version.value // 1000}.{version.value % 1000 // 10}",
    )


def require_gpu() -> Gpu:
    """The GPU.

    Raises:
        HardwareError: there is none; the message says why.
    """
    found = probe()
    if isinstance(found, NoGpu):
        raise HardwareError(
            f"no usable NVIDIA GPU: {found.reason}.", hint="Engines are built and run on the GPU that they are for."
        )
    return found
