"""Numpy arrays over pinned memory, and the 16 bits of bfloat16, which numpy does not know."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np

from holov_export.tensors import FloatArray


def bfloat16_bits(values: np.ndarray[Any, Any]) -> np.ndarray[Any, np.dtype[np.uint16]]:
    """The 16 bits of bfloat16 that lie nearest, ties to even."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded: np.ndarray[Any, np.dtype[np.uint16]] = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return rounded


def float32_from_bits(values: np.ndarray[Any, Any]) -> FloatArray:
    """float32 from bfloat16's 16 bits: exact."""
    widened: FloatArray = (values.astype(np.uint32) << 16).view(np.float32)
    return widened


def host_view(pointer: int, shape: Sequence[int], dtype: np.dtype[Any]) -> np.ndarray[Any, Any]:
    """The array in host memory at `pointer`; whoever allocated it keeps it."""
    size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    memory = memoryview((ctypes.c_char * size).from_address(pointer)).cast("B")
    return np.ndarray(tuple(shape), dtype, memory)
