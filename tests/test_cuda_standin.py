"""The stand-in of cuda-python: its names against the real package, memory, streams, events, captures, leaks."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import tensorrt_standin
from tensorrt_standin import VERSIONS, FakeGpu, Misuse
from tensorrt_standin.cuda_runtime import FakeCuda
from tensorrt_standin.cuda_types import CONSTANTS, TYPES
from tensorrt_standin.trial import H200

every_version = pytest.mark.parametrize("version", VERSIONS)


@contextmanager
def cuda() -> Iterator[tuple[Any, FakeCuda]]:
    with tensorrt_standin.installed("10.3.0", gpu=FakeGpu(memory=1 << 20)):
        from cuda.bindings import runtime

        yield runtime, tensorrt_standin.current().cuda


def test_every_cuda_name_exists_in_cuda_python() -> None:
    real = pytest.importorskip("cuda.bindings.runtime")
    fake = FakeCuda(H200).module("stand-in")
    functions = [name for name in dir(fake) if name.startswith("cuda") and callable(getattr(fake, name))]
    assert len(functions) > 40
    for name in (*functions, *TYPES, *CONSTANTS):
        assert hasattr(real, name), name
    for name, value in CONSTANTS.items():
        assert int(getattr(real, name)) == value, name
    for name, kind in TYPES.items():
        for member in getattr(kind, "__members__", ()):
            assert int(getattr(getattr(real, name), member)) == int(kind[member]), f"{name}.{member}"


def test_every_cuda_function_takes_what_cuda_python_takes() -> None:
    real = pytest.importorskip("cuda.bindings.runtime")
    fake = FakeCuda(H200)
    compared = 0
    for name in (name for name in dir(fake) if name.startswith("cuda")):
        try:
            wanted = [item.lstrip("*") for item in inspect.signature(getattr(real, name)).parameters]
        except ValueError:
            continue
        assert list(inspect.signature(getattr(fake, name)).parameters) == wanted, name
        compared += 1
    assert compared > 40


def test_the_older_layout_of_cuda_python_and_none() -> None:
    with tensorrt_standin.installed("10.3.0", gpu=H200, cuda_python="cudart"):
        from cuda import cudart

        assert cudart.cudaGetDeviceCount() == (0, 1)
        with pytest.raises(ModuleNotFoundError):
            importlib.import_module("cuda.bindings.runtime")
    with tensorrt_standin.installed("10.3.0", gpu=H200, cuda_python=None):
        for name in ("cuda.bindings.runtime", "cuda.cudart"):
            with pytest.raises(ModuleNotFoundError):
                importlib.import_module(name)


def test_device_facts() -> None:
    with cuda() as (runtime, _):
        properties = runtime.cudaGetDeviceProperties(0)[1]
        assert (properties.name, properties.major, properties.minor) == (b"NVIDIA H200", 9, 0)
        assert runtime.cudaMemGetInfo() == (0, 1 << 20, 1 << 20)
        error, pointer = runtime.cudaMalloc(1 << 21)
        assert error == runtime.cudaError_t.cudaErrorMemoryAllocation and pointer is None
        assert runtime.cudaGetErrorName(error)[1] == b"cudaErrorMemoryAllocation"
        assert runtime.cudaSetDevice(1)[0] == runtime.cudaError_t.cudaErrorInvalidDevice


def test_copies_keep_to_their_blocks_and_directions() -> None:
    with cuda() as (runtime, _):
        kinds = runtime.cudaMemcpyKind
        device = runtime.cudaMalloc(64)[1]
        host = np.arange(16, dtype=np.float32)
        back = np.zeros(16, np.float32)
        assert device % 256 == 0
        assert runtime.cudaMemcpy(device, host.ctypes.data, 64, kinds.cudaMemcpyHostToDevice)[0] == 0
        assert runtime.cudaMemcpy(back.ctypes.data, device, 64, kinds.cudaMemcpyDefault)[0] == 0
        np.testing.assert_array_equal(back, host)
        with pytest.raises(Misuse, match="touches 68 bytes where 64 are left"):
            runtime.cudaMemcpy(device, np.zeros(17, np.float32).ctypes.data, 68, kinds.cudaMemcpyHostToDevice)
        backwards = runtime.cudaMemcpy(device, host.ctypes.data, 64, kinds.cudaMemcpyDeviceToHost)[0]
        assert backwards == runtime.cudaError_t.cudaErrorInvalidValue
        runtime.cudaFree(device)
        with pytest.raises(Misuse, match="freed"):
            runtime.cudaMemcpy(back.ctypes.data, device, 64, kinds.cudaMemcpyDefault)


def test_pageable_memory_may_change_after_an_asynchronous_copy_and_pinned_may_not() -> None:
    with cuda() as (runtime, fake):
        kinds, stream = runtime.cudaMemcpyKind, runtime.cudaStreamCreate()[1]
        device, pinned = runtime.cudaMalloc(4)[1], runtime.cudaMallocHost(4)[1]
        for source, wanted in (
            (np.array([1], np.int32), 1),
            (fake.memory.block_at(pinned, 4, "").buffer.view(np.int32), 2),
        ):  # type: ignore[union-attr]
            source[0] = 1
            runtime.cudaMemcpyAsync(device, source.ctypes.data, 4, kinds.cudaMemcpyHostToDevice, stream)
            source[0] = 2
            back = np.zeros(1, np.int32)
            runtime.cudaMemcpyAsync(back.ctypes.data, device, 4, kinds.cudaMemcpyDeviceToHost, stream)
            assert back[0] == wanted


def test_a_capture_forbids_what_waits_or_allocates() -> None:
    with cuda() as (runtime, _):
        modes, errors = runtime.cudaStreamCaptureMode, runtime.cudaError_t
        stream = runtime.cudaStreamCreateWithFlags(runtime.cudaStreamNonBlocking)[1]
        calls = [
            lambda: runtime.cudaMalloc(16),
            lambda: runtime.cudaHostAlloc(16, 0),
            lambda: runtime.cudaStreamSynchronize(stream),
            lambda: runtime.cudaDeviceSynchronize(),
        ]
        for call in calls:
            assert runtime.cudaStreamBeginCapture(stream, modes.cudaStreamCaptureModeGlobal)[0] == 0
            assert call()[0] == errors.cudaErrorStreamCaptureUnsupported
            assert runtime.cudaStreamEndCapture(stream)[0] == errors.cudaErrorStreamCaptureInvalidated
        runtime.cudaStreamBeginCapture(stream, modes.cudaStreamCaptureModeRelaxed)
        assert runtime.cudaMalloc(16)[0] == 0 and runtime.cudaStreamEndCapture(stream)[0] == 0


def test_events_order_streams_and_take_times() -> None:
    with cuda() as (runtime, _):
        first, second = (runtime.cudaStreamCreateWithFlags(1)[1] for _ in range(2))
        start, end = (runtime.cudaEventCreate()[1] for _ in range(2))
        device = runtime.cudaMalloc(4)[1]
        runtime.cudaEventRecord(start, first)
        runtime.cudaMemsetAsync(device, 7, 4, first)
        runtime.cudaEventRecord(end, first)
        assert runtime.cudaEventElapsedTime(start, end)[0] == runtime.cudaError_t.cudaErrorNotReady
        runtime.cudaStreamWaitEvent(second, end, 0)
        back = np.zeros(4, np.uint8)
        runtime.cudaMemcpyAsync(back.ctypes.data, device, 4, runtime.cudaMemcpyKind.cudaMemcpyDeviceToHost, second)
        assert back.tolist() == [7] * 4
        error, milliseconds = runtime.cudaEventElapsedTime(start, end)
        assert error == 0 and milliseconds >= 0
        assert runtime.cudaEventDestroy(end)[0] == 0
        assert runtime.cudaEventSynchronize(end)[0] == runtime.cudaError_t.cudaErrorInvalidResourceHandle


def test_leaks_are_named() -> None:
    with cuda() as (runtime, fake):
        runtime.cudaMalloc(8)
        runtime.cudaHostAlloc(16, 0)
        stream = runtime.cudaStreamCreate()[1]
        runtime.cudaEventCreate()
        assert sorted(fake.leaked()) == ["device memory of 8 bytes", "event", "pinned memory of 16 bytes", "stream"]
        runtime.cudaStreamDestroy(stream)
        assert "stream" not in fake.leaked()
