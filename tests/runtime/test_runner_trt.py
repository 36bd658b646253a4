"""The TensorRT runner against stand-ins of five TensorRT versions: the numbers, the graphs, the threads, the memory.

A name, a signature or an order of calls that a version does not have fails these tests by construction.
"""

from __future__ import annotations

import ctypes
import gc
import warnings
from collections.abc import Iterator
from concurrent import futures
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import tensorrt_standin
from runtime.engines import H200, Foundry, pixels_for
from tensorrt_standin import VERSIONS

from holov_export.bundle import Bundle
from holov_export.errors import BudgetError, EngineError, EnvironmentFaultError, ImageError
from holov_export.runtime.lane import Feed
from holov_export.runtime.runner_ort import OrtRunner
from holov_export.runtime.runner_trt import TrtRunner
from holov_export.runtime.session import Session
from holov_export.spec import ModelSpec
from holov_export.tensors import PixelBatch, VisualTokens

VERSION = "10.3.0"  # for what does not differ between versions
#: (batch, budget, quota); with the profile's corners
RUNS = [(1, 1, None), (3, 64, [64, 1, 7]), (1, 64, None), (3, 1, None), (2, 9, [9, 4]), (1, 7, [3])]


@pytest.fixture
def trt() -> Iterator[Any]:
    with tensorrt_standin.installed(VERSION, gpu=H200):
        yield tensorrt_standin.current()


@pytest.fixture(scope="module")
def bundle(foundry: Foundry, exported_bundle: Bundle) -> Bundle:
    return foundry.bundle_with_engine(exported_bundle.folder, VERSION)


@pytest.fixture(scope="module")
def ort(exported_bundle: Bundle) -> Iterator[OrtRunner]:
    with OrtRunner(exported_bundle, provider="cpu", threads=1, saliency=True) as runner:
        yield runner


def same(got: VisualTokens, wanted: VisualTokens) -> None:
    """Equal to the bit and in type."""
    for name in ("tokens", "positions", "counts", "saliency"):
        mine, theirs = getattr(got, name), getattr(wanted, name)
        assert mine.dtype == theirs.dtype, name
        np.testing.assert_array_equal(mine, theirs, err_msg=name)


def array(pointer: int, shape: tuple[int, ...], dtype: Any) -> np.ndarray[Any, Any]:
    """A copy of the stand-in's device memory."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return np.frombuffer(ctypes.string_at(pointer, size), dtype).reshape(shape)


# ------------------------------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_results_are_those_of_onnx_runtime(
    foundry: Foundry,
    exported_bundle: Bundle,
    half_bundle: Bundle,
    llava_spec: ModelSpec,
    version: str,
    precision: str,
) -> None:
    """Each shape three times, with new pixels: a plain run, the run before a capture, a replayed CUDA graph."""
    source = exported_bundle if precision == "fp32" else half_bundle
    bundle = foundry.bundle_with_engine(source.folder, version)
    with OrtRunner(source, provider="cpu", threads=1, saliency=True) as ort:
        cases = [
            (pixels, budget, quota, ort.run(pixels, budget, quota))
            for seed in range(3)
            for batch, budget, quota in RUNS
            for pixels in [pixels_for(llava_spec, batch, seed)]
        ]
    with tensorrt_standin.installed(version, gpu=H200):
        world = tensorrt_standin.current()
        with TrtRunner(bundle, saliency=True) as runner:
            for pixels, budget, quota, wanted in cases:
                same(runner.run(pixels, budget, quota), wanted)
            assert world.cuda.streams.launches == len(RUNS)
            assert f"tensorrt {version} (NVIDIA H200, h200)" == runner.name
            assert runner.tokens == 64
        assert world.leaked() == []
        assert world.cuda.memory.free_bytes == H200.memory
        assert len(world.builds) == 0


@pytest.mark.parametrize("version", ["8.6.0", "11.4.0"])
def test_every_batch_and_budget_of_the_profile_runs(
    foundry: Foundry, exported_bundle: Bundle, ort: OrtRunner, llava_spec: ModelSpec, version: str
) -> None:
    bundle = foundry.bundle_with_engine(exported_bundle.folder, version)
    batches = [pixels_for(llava_spec, size) for size in (1, 2, 3)]
    with tensorrt_standin.installed(version, gpu=H200), TrtRunner(bundle, cuda_graphs=False, saliency=True) as runner:
        for pixels in batches:
            for budget in range(1, 65, 3):
                same(runner.run(pixels, budget), ort.run(pixels, budget))


def test_saliency_only_when_asked(trt: Any, bundle: Bundle, llava_spec: ModelSpec) -> None:
    with TrtRunner(bundle) as runner:
        pixels = pixels_for(llava_spec, 2)
        assert runner.run(pixels, 4).saliency is None
        saliency = runner.run(pixels, 4, saliency=True).saliency
        assert saliency is not None
        assert (saliency.dtype, saliency.shape) == (np.float32, (2, 64))


def test_results_are_copies(trt: Any, bundle: Bundle, ort: OrtRunner, llava_spec: ModelSpec) -> None:
    first, second = pixels_for(llava_spec, 1, 0), pixels_for(llava_spec, 1, 1)
    with TrtRunner(bundle, saliency=True) as runner:
        kept = runner.run(first, 8)
        runner.run(second, 8)
    same(kept, ort.run(first, 8))


# ---------------------------------------------------------------------------------------------------- CUDA graphs


def test_a_graph_is_made_when_a_shape_comes_again(trt: Any, bundle: Bundle, llava_spec: ModelSpec) -> None:
    pixels = pixels_for(llava_spec, 1)
    with TrtRunner(bundle) as runner:
        made = []
        for budget in (4, 5, 6, 4, 4, 5):
            runner.run(pixels, budget)
            made.append((len(trt.cuda.streams.executables), trt.cuda.streams.launches))
    assert made == [(0, 0), (0, 0), (0, 0), (1, 0), (1, 1), (2, 1)]
    assert trt.cuda.streams.graphs == {}


def test_the_graph_used_least_recently_goes(trt: Any, bundle: Bundle, ort: OrtRunner, llava_spec: ModelSpec) -> None:
    pixels = pixels_for(llava_spec, 2)
    with TrtRunner(bundle, graph_limit=2, saliency=True) as runner:
        for budget in (4, 4, 5, 5, 4, 6, 6):  # 5 goes for 6
            same(runner.run(pixels, budget), ort.run(pixels, budget))
        assert len(trt.cuda.streams.executables) == 2
        launched = trt.cuda.streams.launches
        for budget, replayed in ((4, 1), (6, 2), (5, 2), (5, 3)):
            same(runner.run(pixels, budget), ort.run(pixels, budget))
            assert trt.cuda.streams.launches == launched + replayed, budget
            assert len(trt.cuda.streams.executables) == 2


def test_without_cuda_graphs(trt: Any, bundle: Bundle, ort: OrtRunner, llava_spec: ModelSpec) -> None:
    pixels = pixels_for(llava_spec, 1)
    with TrtRunner(bundle, cuda_graphs=False, saliency=True) as runner:
        for _ in range(4):
            same(runner.run(pixels, 8), ort.run(pixels, 8))
    assert "cudaStreamBeginCapture" not in trt.cuda.calls


def test_a_capture_that_fails_is_said_once_and_done_without(
    trt: Any, bundle: Bundle, ort: OrtRunner, llava_spec: ModelSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    import cuda.bindings.runtime as runtime

    refused = (runtime.cudaError_t.cudaErrorStreamCaptureUnsupported,)
    monkeypatch.setattr(runtime, "cudaStreamBeginCapture", lambda stream, mode: refused)
    pixels = pixels_for(llava_spec, 1)
    with TrtRunner(bundle, saliency=True) as runner:
        runner.run(pixels, 8)
        with pytest.warns(RuntimeWarning, match="CUDA graphs are off.*cudaErrorStreamCaptureUnsupported"):
            same(runner.run(pixels, 8), ort.run(pixels, 8))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for budget in (8, 9, 9, 9):
                same(runner.run(pixels, budget), ort.run(pixels, budget))
        assert runner.name.endswith(", no CUDA graphs")
    assert trt.leaked() == []


# ------------------------------------------------------------------------------------------------ batches, profiles


@pytest.mark.parametrize("version", ["8.6.0", "11.4.0"])
def test_the_first_profile_that_holds_the_shape_is_used(
    foundry: Foundry, exported_bundle: Bundle, ort: OrtRunner, llava_spec: ModelSpec, version: str
) -> None:
    profiles = ("batch=1:1:1,budget=8:8:8", "batch=1:2:4,budget=1:16:64")
    bundle = foundry.bundle_with_engine(exported_bundle.folder, version, profiles=profiles)
    one, four = pixels_for(llava_spec, 1), pixels_for(llava_spec, 4)
    with tensorrt_standin.installed(version, gpu=H200):
        world = tensorrt_standin.current()
        with TrtRunner(bundle, saliency=True) as runner:
            for _ in range(3):
                for pixels, budget in ((one, 8), (one, 9), (four, 8), (four, 64)):
                    same(runner.run(pixels, budget), ort.run(pixels, budget))
        assert world.leaked() == []


@pytest.mark.parametrize(("batch", "parts"), [(4, [3, 1]), (7, [3, 3, 1]), (9, [3, 3, 3])])
def test_a_large_batch_is_run_in_parts(
    trt: Any, bundle: Bundle, ort: OrtRunner, llava_spec: ModelSpec, batch: int, parts: list[int]
) -> None:
    pixels, quota = pixels_for(llava_spec, batch), [1 + index % 5 for index in range(batch)]
    with TrtRunner(bundle, saliency=True) as runner:
        got = runner.run(pixels, 5, quota)
    at = 0
    for size in parts:
        rows = slice(at, at + size)
        part = PixelBatch(pixels.pixel_values[rows], (), ())
        mine = VisualTokens(got.tokens[rows], got.positions[rows], got.counts[rows], got.saliency[rows])
        same(mine, ort.run(part, 5, quota[rows]))
        at += size
    assert len(got) == at == batch


def test_parts_of_a_batch_fit_the_smallest_batch(
    foundry: Foundry, exported_bundle: Bundle, trt: Any, llava_spec: ModelSpec
) -> None:
    """7 images in parts of at most 4 and at least 3: 4 and 3. 9 would leave one; 3 and 3 and 3 do."""
    bundle = foundry.bundle_with_engine(exported_bundle.folder, VERSION, profiles=("batch=3:3:4,budget=1:7:64",))
    with TrtRunner(bundle) as runner:
        assert runner.run(pixels_for(llava_spec, 7), 4).counts.tolist() == [4] * 7
        assert runner.run(pixels_for(llava_spec, 9), 4).counts.tolist() == [4] * 9
        with pytest.raises(EngineError, match=r"no profile for 5 images at budget 4: batch 3\.\.4 at budget 1\.\.64"):
            runner.run(pixels_for(llava_spec, 5), 4)


def test_a_shape_outside_of_every_profile(
    foundry: Foundry, exported_bundle: Bundle, trt: Any, llava_spec: ModelSpec
) -> None:
    profiles = ("batch=1:1:1,budget=8:8:8", "batch=2:2:2,budget=4:16:32")
    bundle = foundry.bundle_with_engine(exported_bundle.folder, VERSION, profiles=profiles)
    with TrtRunner(bundle) as runner:
        wanted = r"batch 1\.\.1 at budget 8\.\.8; batch 2\.\.2 at budget 4\.\.32"
        with pytest.raises(EngineError, match=f"1 images at budget 9: {wanted}"):
            runner.run(pixels_for(llava_spec, 1), 9)
        with pytest.raises(BudgetError, match=r"1\.\.64"):
            runner.run(pixels_for(llava_spec, 1), 65)
        with pytest.raises(BudgetError, match="quota of image 2"):
            runner.run(pixels_for(llava_spec, 2), 8, [8, 9])
        with pytest.raises(ImageError, match=r"\(3, 28, 28\), the engine takes \(3, 56, 56\)"):
            runner.run(PixelBatch(np.zeros((1, 3, 28, 28), np.float32), (), ()), 8)
        assert runner.run(pixels_for(llava_spec, 1), 8).counts.tolist() == [8]


# -------------------------------------------------------------------------------------------------------- threads


def test_eight_threads_get_what_one_gets(trt: Any, bundle: Bundle, ort: OrtRunner, llava_spec: ModelSpec) -> None:
    cases = [(pixels_for(llava_spec, batch, seed), budget, quota) for seed in range(8) for batch, budget, quota in RUNS]
    wanted = [ort.run(*case) for case in cases]
    with TrtRunner(bundle, lanes=3, graph_limit=4, saliency=True) as runner:
        with ThreadPoolExecutor(8) as threads:
            got = list(threads.map(lambda case: runner.run(*case), cases))
        assert len(trt.cuda.streams.streams) - 1 <= 3
    for mine, theirs in zip(got, wanted, strict=True):
        same(mine, theirs)
    assert trt.leaked() == []


def test_captures_and_waits_for_the_device_do_not_meet(trt: Any, bundle: Bundle, llava_spec: ModelSpec) -> None:
    """CUDA spoils a capture when any thread waits for the whole device meanwhile."""
    pixels = pixels_for(llava_spec, 1)

    def work(runner: TrtRunner, first: int) -> None:
        for budget in range(first, first + 6):
            for _ in range(3):
                _ = runner.run_on_device(pixels, budget).tokens.__cuda_array_interface__

    with TrtRunner(bundle) as runner, ThreadPoolExecutor(4) as threads:
        for _ in threads.map(lambda first: work(runner, first), (1, 11, 21, 31)):
            pass
        assert trt.cuda.calls.count("cudaDeviceSynchronize") > 20
        assert trt.cuda.calls.count("cudaStreamBeginCapture") >= 20
        assert not runner.name.endswith("no CUDA graphs")


def test_times_are_of_the_thread_that_asks(trt: Any, bundle: Bundle, llava_spec: ModelSpec) -> None:
    with TrtRunner(bundle) as runner:
        assert runner.last_times is None
        runner.run(pixels_for(llava_spec, 4), 8)
        times = runner.last_times
        assert times is not None
        assert min(times.upload, times.compute, times.download) >= 0
        assert 0 < times.gpu <= times.host
        with ThreadPoolExecutor(1) as other:
            assert other.submit(lambda: runner.last_times).result() is None
        assert runner.device_memory.engine > 0
        held = runner.device_memory.lanes
        assert held == sum(block.size for block in trt.cuda.memory.alive() if block.kind == "device")


# ------------------------------------------------------------------------------------------------------ on the device


class Pixels:
    """Pixels on the stand-in's device, as torch or cupy would say it of theirs."""

    def __init__(self, world: Any, values: np.ndarray[Any, Any], **said: Any) -> None:
        _, self.pointer = world.cuda.cudaMalloc(values.nbytes)
        ctypes.memmove(self.pointer, np.ascontiguousarray(values).ctypes.data, values.nbytes)
        self.__cuda_array_interface__ = {
            "shape": values.shape,
            "typestr": values.dtype.str,
            "data": (self.pointer, False),
            "version": 3,
            "stream": None,
            **said,
        }


def test_tokens_stay_on_the_device(
    foundry: Foundry, exported_bundle: Bundle, ort: OrtRunner, llava_spec: ModelSpec
) -> None:
    pixels = pixels_for(llava_spec, 2)
    wanted = ort.run(pixels, 6, [6, 2])
    for version, integer in (("8.6.0", np.int32), ("11.4.0", np.int64)):
        bundle = foundry.bundle_with_engine(exported_bundle.folder, version)
        with tensorrt_standin.installed(version, gpu=H200), TrtRunner(bundle) as runner:
            calls = tensorrt_standin.current().cuda.calls
            seen = runner.run_on_device(pixels, 6, [6, 2])
            assert calls.count("cudaStreamSynchronize") == calls.count("cudaEventSynchronize") == 0
            seen.wait()
            assert len(seen) == 2
            assert seen.positions.dtype == integer
            for name in ("tokens", "positions", "counts", "saliency"):
                there = getattr(seen, name)
                np.testing.assert_array_equal(array(there.pointer, there.shape, there.dtype), getattr(wanted, name))


def test_the_cuda_array_interface_waits_for_the_values(
    trt: Any, bundle: Bundle, ort: OrtRunner, llava_spec: ModelSpec
) -> None:
    pixels = pixels_for(llava_spec, 2)
    with TrtRunner(bundle) as runner:
        tokens = runner.run_on_device(pixels, 6).tokens
        said = tokens.__cuda_array_interface__
        assert (said["shape"], said["typestr"], said["version"], said["stream"]) == ((2, 6, 96), "<f4", 3, None)
        assert said["strides"] is None
        np.testing.assert_array_equal(array(said["data"][0], said["shape"], np.float32), ort.run(pixels, 6).tokens)


def test_held_tokens_are_not_written_to(trt: Any, bundle: Bundle, ort: OrtRunner, llava_spec: ModelSpec) -> None:
    batches = [pixels_for(llava_spec, 2, seed) for seed in range(4)]
    with TrtRunner(bundle) as runner:
        for _ in range(3):
            runner.run(batches[3], 6)  # now there is a CUDA graph that writes to the first output buffers
        held = [runner.run_on_device(pixels, 6).tokens for pixels in batches]
        for _ in range(3):
            runner.run(batches[0], 9)
        for tokens, pixels in zip(held, batches, strict=True):
            tokens.owner.wait()
            np.testing.assert_array_equal(array(tokens.pointer, tokens.shape, tokens.dtype), ort.run(pixels, 6).tokens)
        addresses = {tokens.pointer for tokens in held}
        assert len(addresses) == 4
        del tokens, held
        again = runner.run_on_device(batches[1], 6)
        assert again.tokens.pointer in addresses


def test_a_reader_that_nobody_knows_makes_the_next_run_wait_for_the_device(
    trt: Any, bundle: Bundle, llava_spec: ModelSpec
) -> None:
    pixels = pixels_for(llava_spec, 1)
    with TrtRunner(bundle) as runner:
        seen = runner.run_on_device(pixels, 6)
        runner.run(pixels, 6)
        assert "cudaDeviceSynchronize" not in trt.cuda.calls
        _ = seen.tokens.__cuda_array_interface__
        del seen
        runner.run(pixels, 6)
        assert trt.cuda.calls.count("cudaDeviceSynchronize") == 1
        runner.run(pixels, 6)
        assert trt.cuda.calls.count("cudaDeviceSynchronize") == 1


def test_a_reader_that_names_its_stream_is_waited_for_on_the_device(
    trt: Any, bundle: Bundle, llava_spec: ModelSpec
) -> None:
    pixels = pixels_for(llava_spec, 1)
    reader = int(trt.cuda.cudaStreamCreateWithFlags(1)[1])
    copied = trt.cuda.cudaMalloc(6 * 96 * 4)[1]
    with TrtRunner(bundle) as runner:
        wanted = runner.run(pixels, 6).tokens
        seen = runner.run_on_device(pixels, 6)
        seen.tokens.__dlpack__(stream=reader)
        trt.cuda.cudaMemcpyAsync(copied, seen.tokens.pointer, seen.tokens.nbytes, _kind(trt, 3), reader)
        seen.read_on(reader)
        del seen
        runner.run_on_device(pixels_for(llava_spec, 1, 1), 6).wait()  # lazily: had it not waited, it would write first
        assert "cudaDeviceSynchronize" not in trt.cuda.calls
        trt.cuda.cudaStreamSynchronize(reader)
        np.testing.assert_array_equal(array(copied, (1, 6, 96), np.float32), wanted)
    trt.cuda.cudaFree(copied)
    trt.cuda.cudaStreamDestroy(reader)
    assert trt.leaked() == []


def _kind(world: Any, number: int) -> Any:
    import cuda.bindings.runtime as runtime

    return runtime.cudaMemcpyKind(number)


def test_pixels_on_the_device_come_after_their_writer(
    trt: Any, bundle: Bundle, ort: OrtRunner, llava_spec: ModelSpec
) -> None:
    """The writer's copy is still queued when the run is asked for; nothing goes through the host."""
    values, others = pixels_for(llava_spec, 2).pixel_values, pixels_for(llava_spec, 2, 1).pixel_values
    _, stream = trt.cuda.cudaStreamCreateWithFlags(1)
    staged = Pixels(trt, values)
    pixels = Pixels(trt, np.zeros_like(values), stream=int(stream))
    with TrtRunner(bundle, saliency=True) as runner:
        # the stand-in does its work when somebody waits, so each order of waiting shows another fault
        for result_first in (True, False, True, False):
            trt.cuda.cudaMemcpyAsync(pixels.pointer, staged.pointer, values.nbytes, _kind(trt, 3), stream)
            seen = runner.run_on_device(pixels, 6)
            overwriting = Pixels(trt, others)  # on the same stream, after the run has read
            trt.cuda.cudaMemcpyAsync(pixels.pointer, overwriting.pointer, values.nbytes, _kind(trt, 3), stream)
            if not result_first:
                trt.cuda.cudaStreamSynchronize(stream)
            seen.wait()
            trt.cuda.cudaStreamSynchronize(stream)
            there = seen.tokens
            got = array(there.pointer, there.shape, there.dtype)
            np.testing.assert_array_equal(got, ort.run(PixelBatch(values, (), ()), 6).tokens)
        same(runner.run(Pixels(trt, others), 6), ort.run(PixelBatch(others, (), ()), 6))
    assert "cudaDeviceSynchronize" not in trt.cuda.calls


def test_pixels_of_an_unknown_writer_are_waited_for(trt: Any, bundle: Bundle, llava_spec: ModelSpec) -> None:
    """torch gives version 2 of the interface, which has no stream; the caller may name it."""
    values = pixels_for(llava_spec, 1).pixel_values
    with TrtRunner(bundle) as runner:
        pixels = Pixels(trt, values, version=2)
        del pixels.__cuda_array_interface__["stream"]
        runner.run(pixels, 6)
        assert trt.cuda.calls.count("cudaDeviceSynchronize") == 1
        runner.run(pixels, 6, stream=0)
        assert trt.cuda.calls.count("cudaDeviceSynchronize") == 1


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"typestr": "<f2"}, "are float16, the engine takes float32"),
        ({"shape": (3, 56, 56)}, r"are \(3, 56, 56\), expected \[B, 3, H, W\]"),
        ({"strides": (4, 8, 12, 16)}, "not C-contiguous"),
        ({"mask": object()}, "masked"),
    ],
)
def test_pixels_on_the_device_that_do_not_fit(
    trt: Any, bundle: Bundle, llava_spec: ModelSpec, said: dict[str, Any], message: str
) -> None:
    pixels = Pixels(trt, pixels_for(llava_spec, 1).pixel_values, **said)
    with TrtRunner(bundle) as runner, pytest.raises(ImageError, match=message):
        runner.run(pixels, 6)


def test_too_many_images_for_one_run_on_the_device(trt: Any, bundle: Bundle, llava_spec: ModelSpec) -> None:
    pixels = pixels_for(llava_spec, 4)
    with TrtRunner(bundle) as runner:
        with pytest.raises(EngineError, match=r"4 images are more than the engine 'h200' takes at once: batch 1\.\.3"):
            runner.run_on_device(pixels, 6)
        with pytest.raises(EngineError, match="4 images on the device"):
            runner.run(Pixels(trt, pixels.pixel_values), 6)
        with pytest.raises(ImageError, match="ndarray are neither a PixelBatch nor on the GPU"):
            runner.run(pixels.pixel_values, 6)  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------------------ life


def test_closing_frees_everything_but_what_is_held(trt: Any, bundle: Bundle, llava_spec: ModelSpec) -> None:
    pixels = pixels_for(llava_spec, 1)
    runner = TrtRunner(bundle)
    for _ in range(3):
        runner.run(pixels, 4)
    seen = runner.run_on_device(pixels, 4)
    tokens = seen.tokens
    runner.close()
    runner.close()
    assert len(trt.leaked()) == 5  # four outputs and their event
    seen.wait()
    del seen, tokens
    gc.collect()
    assert trt.leaked() == []
    for call in (runner.run, runner.run_on_device):
        with pytest.raises(EnvironmentFaultError, match="the runner is closed"):
            call(pixels, 4)


def test_closing_waits_for_a_run_under_way(trt: Any, bundle: Bundle, llava_spec: ModelSpec) -> None:
    runner = TrtRunner(bundle)
    with ThreadPoolExecutor(1) as other:
        with runner._pool.lane() as lane:
            closing = other.submit(runner.close)
            with pytest.raises(futures.TimeoutError):
                closing.result(timeout=0.2)
            shape = runner._shapes(1, 4)[0]
            visual, _ = lane.run(Feed(pixels_for(llava_spec, 1).pixel_values, np.array([4])), shape, saliency=False)
            assert visual.counts.tolist() == [4]
        closing.result(timeout=10)
    assert trt.leaked() == []


def test_a_runner_survives_a_run_that_failed(
    trt: Any, bundle: Bundle, ort: OrtRunner, llava_spec: ModelSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    import cuda.bindings.runtime as runtime

    pixels = pixels_for(llava_spec, 1)
    with TrtRunner(bundle, saliency=True) as runner:
        runner.run(pixels, 4)
        with monkeypatch.context() as broken:
            failed = (runtime.cudaError_t.cudaErrorInvalidValue,)
            broken.setattr(runtime, "cudaMemcpyAsync", lambda *arguments: failed)
            with pytest.raises(EnvironmentFaultError, match=r"cudaMemcpyAsync failed: cudaErrorInvalidValue"):
                runner.run(pixels, 4)
        same(runner.run(pixels, 4), ort.run(pixels, 4))
    assert trt.leaked() == []


def test_older_cuda_python(foundry: Foundry, exported_bundle: Bundle, ort: OrtRunner, llava_spec: ModelSpec) -> None:
    bundle = foundry.bundle_with_engine(exported_bundle.folder, "8.6.0")
    with (
        tensorrt_standin.installed("8.6.0", gpu=H200, cuda_python="cudart"),
        TrtRunner(bundle, saliency=True) as runner,
    ):
        for _ in range(3):
            same(runner.run(pixels_for(llava_spec, 2), 5), ort.run(pixels_for(llava_spec, 2), 5))


# ---------------------------------------------------------------------------------------------------------- features


@pytest.mark.parametrize("version", VERSIONS[1:])
def test_an_engine_without_weights_gets_those_of_the_bundle(
    foundry: Foundry, exported_bundle: Bundle, ort: OrtRunner, llava_spec: ModelSpec, version: str
) -> None:
    bundle = foundry.bundle_with_engine(exported_bundle.folder, version, strip_plan=True)
    pixels = pixels_for(llava_spec, 2)
    with tensorrt_standin.installed(version, gpu=H200), TrtRunner(bundle, saliency=True) as runner:
        same(runner.run(pixels, 5), ort.run(pixels, 5))


@pytest.mark.parametrize("version", VERSIONS[1:])
def test_weights_are_streamed(
    foundry: Foundry, exported_bundle: Bundle, ort: OrtRunner, llava_spec: ModelSpec, version: str
) -> None:
    bundle = foundry.bundle_with_engine(exported_bundle.folder, version, weight_streaming=True)
    pixels = pixels_for(llava_spec, 2)
    with tensorrt_standin.installed(version, gpu=H200):
        with TrtRunner(bundle, saliency=True, weight_budget=1000) as runner:
            assert runner._loaded._engine.weight_streaming_budget_v2 == 1000
            same(runner.run(pixels, 5), ort.run(pixels, 5))
        with TrtRunner(bundle, saliency=True, weight_budget=1 << 40) as runner:  # more than there are
            loaded = runner._loaded._engine
            assert loaded.weight_streaming_budget_v2 == loaded.streamable_weights_size > 1000


def test_a_version_compatible_engine_runs_on_a_newer_tensorrt(
    foundry: Foundry, exported_bundle: Bundle, ort: OrtRunner, llava_spec: ModelSpec
) -> None:
    bundle = foundry.bundle_with_engine(exported_bundle.folder, "10.3.0", version_compatible=True)
    pixels = pixels_for(llava_spec, 2)
    for version in ("10.3.0", "10.16.1", "11.4.0"):
        with tensorrt_standin.installed(version, gpu=H200), TrtRunner(bundle, saliency=True) as runner:
            same(runner.run(pixels, 5), ort.run(pixels, 5))


# ------------------------------------------------------------------------------------------------------------ session


def test_a_session_sees_the_same(trt: Any, bundle: Bundle, photographs: list[Any]) -> None:
    with (
        Session.open(bundle, decoder="none", engine="tensorrt", target="h200") as mine,
        Session.open(bundle, decoder="none", provider="cpu", threads=1) as theirs,
    ):
        for picture in photographs[:2]:
            same(mine.see(picture, 9), theirs.see(picture, 9))


def test_bfloat16_is_rounded_to_the_nearest() -> None:
    import torch

    from holov_export.runtime.host_arrays import bfloat16_bits, float32_from_bits

    values = np.random.default_rng(0).standard_normal(4096).astype(np.float32)
    values[:4] = [0.0, -0.0, 1.00390625, 1.01171875]  # the last two lie in the middle
    wanted = torch.from_numpy(values).to(torch.bfloat16)
    np.testing.assert_array_equal(bfloat16_bits(values), wanted.view(torch.uint16).numpy())
    np.testing.assert_array_equal(float32_from_bits(bfloat16_bits(values)), wanted.float().numpy())
