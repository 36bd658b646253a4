"""CUDA behind one Protocol: both back ends against a stand-in of the CUDA runtime, and the real packages' names."""

from __future__ import annotations

import ctypes
import importlib.util
import inspect
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import tensorrt_standin
from runtime.engines import H200, Foundry, pixels_for
from runtime.torch_standin import Torch

from holov_export.bundle import Bundle
from holov_export.errors import EnvironmentFaultError, MissingExtraError, UnknownNameError
from holov_export.runtime.device_memory import CudaApi, CudaPython, cuda_api
from holov_export.runtime.device_memory_torch import TorchCuda
from holov_export.runtime.runner_ort import OrtRunner
from holov_export.runtime.runner_trt import TrtRunner
from holov_export.spec import ModelSpec

BACKENDS = ("cuda-python", "torch")


@pytest.fixture
def world() -> Iterator[Any]:
    with tensorrt_standin.installed("10.3.0", gpu=H200):
        yield tensorrt_standin.current()


@pytest.fixture(params=BACKENDS)
def api(request: pytest.FixtureRequest, world: Any) -> CudaApi:
    return cuda_api("cuda-python") if request.param == "cuda-python" else TorchCuda(Torch(world))


def written(pointer: int, text: bytes) -> None:
    ctypes.memmove(pointer, text, len(text))


def test_a_copy_there_and_back(api: CudaApi, world: Any) -> None:
    stream = api.create_stream()
    out, device, other, back = api.allocate_pinned(8), api.allocate(8), api.allocate(8), api.allocate_pinned(8)
    written(out, b"12345678")
    written(back, b"........")
    api.copy(device, out, 8, stream)
    api.copy(other, device, 8, stream)
    api.copy(back, other, 5, stream)
    assert ctypes.string_at(back, 8) == b"........"  # nothing has waited yet
    api.wait_for_stream(stream)
    assert ctypes.string_at(back, 8) == b"12345..."
    api.free(device)
    api.free(other)
    api.free_pinned(out)
    api.free_pinned(back)
    api.destroy_stream(stream)
    assert world.leaked() == []


def test_memory_of_somebody_else(api: CudaApi, world: Any) -> None:
    _, foreign = world.cuda.cudaMalloc(4)
    written(foreign, b"abcd")
    stream, pinned = api.create_stream(), api.allocate_pinned(4)
    api.copy(pinned, foreign, 4, stream)
    api.wait_for_stream(stream)
    assert ctypes.string_at(pinned, 4) == b"abcd"


def test_streams_wait_for_each_other(api: CudaApi) -> None:
    first, second, event = api.create_stream(), api.create_stream(), api.create_event()
    out, device, back = api.allocate_pinned(4), api.allocate(4), api.allocate_pinned(4)
    api.wait_for_event(event)  # never recorded: at once
    written(out, b"abcd")
    api.copy(device, out, 4, first)
    api.record(event, first)
    api.stream_waits(second, event)
    api.copy(back, device, 4, second)
    api.wait_for_stream(second)
    assert ctypes.string_at(back, 4) == b"abcd"
    later = api.create_event()
    api.record(later, first)
    api.wait_for_event(later)
    assert api.seconds_between(event, later) >= 0


def test_a_graph_repeats_what_was_captured(api: CudaApi, world: Any) -> None:
    stream, out, device = api.create_stream(), api.allocate_pinned(4), api.allocate(4)
    written(out, b"aaaa")
    written(device, b"----")
    graph = api.capture(stream, lambda: api.copy(device, out, 4, stream))
    api.wait_for_stream(stream)
    assert ctypes.string_at(device, 4) == b"----"  # a capture runs nothing
    for text in (b"bbbb", b"cccc"):
        written(out, text)
        api.launch(graph, stream)
        api.wait_for_stream(stream)
        assert ctypes.string_at(device, 4) == text
    api.destroy_graph(graph)
    assert world.cuda.streams.executables == world.cuda.streams.graphs == {}


def test_a_capture_that_fails_leaves_a_stream_that_works(api: CudaApi, world: Any) -> None:
    stream, out, device = api.create_stream(), api.allocate_pinned(4), api.allocate(4)

    def breaks() -> None:
        raise LookupError("inside")

    with pytest.raises(LookupError, match="inside"):
        api.capture(stream, breaks)
    with pytest.raises(EnvironmentFaultError, match="cudaErrorStreamCapture"):
        api.capture(stream, lambda: api.wait_for_stream(stream))
    written(out, b"abcd")
    api.copy(device, out, 4, stream)
    api.wait_for_stream(stream)
    assert ctypes.string_at(device, 4) == b"abcd"
    assert world.cuda.streams.graphs == {}


def test_out_of_memory(api: CudaApi) -> None:
    wanted = r"out of memory: 1048576\.0 MiB asked for, 144384\.0 MiB free"
    with pytest.raises(EnvironmentFaultError, match=wanted) as caught:
        api.allocate(1 << 40)
    assert caught.value.exit_code == 3
    assert api.free_bytes() == H200.memory


def test_errors_have_their_name_and_text(world: Any) -> None:
    api = cuda_api("cuda-python")
    with pytest.raises(EnvironmentFaultError, match=r"cudaStreamSynchronize failed: cudaErrorInvalidResourceHandle \("):
        api.wait_for_stream(12345)
    with pytest.raises(EnvironmentFaultError, match="cudaFree failed: cudaErrorInvalidValue"):
        api.free(12345)


@pytest.mark.parametrize("module", ["bindings", "cudart"])
def test_cuda_python_under_both_names(module: str) -> None:
    with tensorrt_standin.installed("8.6.0", gpu=H200, cuda_python=module):
        assert isinstance(cuda_api("auto"), CudaPython)


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UnknownNameError, match=r"'cupy'.*auto, cuda-python, torch"):
        cuda_api("cupy")
    with tensorrt_standin.installed("8.6.0", gpu=H200, cuda_python=None):
        with pytest.raises(MissingExtraError, match=r"'cuda-bindings' is not installed, and this torch .* has no CUDA"):
            cuda_api("auto")
        with pytest.raises(EnvironmentFaultError, match=r"this torch .* has no CUDA"):
            cuda_api("torch")
        monkeypatch.setitem(__import__("sys").modules, "torch", None)
        for memory, what in (
            ("auto", "neither cuda-python .* nor torch is installed"),
            ("torch", "torch is installed"),
        ):
            with pytest.raises(MissingExtraError, match=what):
                cuda_api(memory)


# -------------------------------------------------------------------------------------------------- the real packages


@pytest.mark.skipif(importlib.util.find_spec("cuda") is None, reason="cuda-bindings is not installed")
def test_the_real_cuda_python_takes_our_arguments() -> None:
    """Without a driver every call answers with an error code; a wrong name or argument would be another exception."""
    import cuda.bindings.runtime as runtime

    if int(runtime.cudaGetDeviceCount()[0]) == 0:
        pytest.skip("there is a GPU: handles that do not exist would crash")
    api = CudaPython(runtime)
    calls: list[Any] = [
        lambda: api.allocate(16),
        lambda: api.free(4096),
        lambda: api.allocate_pinned(16),
        lambda: api.free_pinned(4096),
        lambda: api.copy(4096, 8192, 16, 256),
        api.create_stream,
        lambda: api.destroy_stream(256),
        lambda: api.wait_for_stream(256),
        api.wait_for_device,
        api.create_event,
        lambda: api.destroy_event(256),
        lambda: api.record(256, 256),
        lambda: api.wait_for_event(256),
        lambda: api.stream_waits(256, 256),
        lambda: api.seconds_between(256, 512),
        lambda: api.capture(256, lambda: None),
        lambda: api.launch(256, 256),
        lambda: api.destroy_graph(256),
        api.free_bytes,
    ]
    for call in calls:
        with pytest.raises(EnvironmentFaultError, match=r"cuda\w+ failed: cudaError\w+ \("):
            call()
    for name in ("cudaGraphInstantiate", "cudaGraphDestroy", "cudaStreamEndCapture"):
        assert callable(getattr(runtime, name))


def test_the_real_torch_has_the_names() -> None:
    torch = pytest.importorskip("torch")
    for name in ("Stream", "ExternalStream", "Event", "CUDAGraph", "default_stream", "synchronize", "mem_get_info"):
        assert callable(getattr(torch.cuda, name)), name
    assert issubclass(torch.cuda.OutOfMemoryError, RuntimeError)
    assert "capture_error_mode" in inspect.signature(torch.cuda.CUDAGraph.capture_begin).parameters
    assert "enable_timing" in inspect.signature(torch.cuda.Event.__new__).parameters
    assert "stream_ptr" in inspect.signature(torch.cuda.ExternalStream.__new__).parameters
    for owner, names in (
        (torch.cuda.Stream, ("wait_event", "synchronize")),
        (torch.cuda.Event, ("record", "synchronize", "elapsed_time")),
        (torch.cuda.CUDAGraph, ("capture_end", "replay", "reset")),
        (torch.Tensor, ("data_ptr", "copy_")),
    ):
        assert all(hasattr(owner, name) for name in names)


# ----------------------------------------------------------------------------------------------------- a whole runner


def test_a_runner_over_torch(
    foundry: Foundry, exported_bundle: Bundle, llava_spec: ModelSpec, world: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = foundry.bundle_with_engine(exported_bundle.folder, "10.3.0")
    torch = Torch(world)
    monkeypatch.setattr("holov_export.runtime.runner_trt.cuda_api", lambda memory: TorchCuda(torch))
    with (
        OrtRunner(exported_bundle, provider="cpu", threads=1) as ort,
        TrtRunner(bundle, memory="torch", graph_limit=2) as runner,
    ):
        for seed in range(4):
            pixels = pixels_for(llava_spec, 2, seed)
            for budget in (5, 9):
                got, wanted = runner.run(pixels, budget), ort.run(pixels, budget)
                np.testing.assert_array_equal(got.tokens, wanted.tokens)
                np.testing.assert_array_equal(got.positions, wanted.positions)
        assert world.cuda.streams.launches > 0
        seen = runner.run_on_device(pixels, 5)
        seen.wait()
        shape, pointer = seen.tokens.shape, seen.tokens.pointer
        there = np.frombuffer(ctypes.string_at(pointer, seen.tokens.nbytes), np.float32).reshape(shape)
        np.testing.assert_array_equal(there, ort.run(pixels, 5).tokens)
        del seen
    assert world.leaked() == []
