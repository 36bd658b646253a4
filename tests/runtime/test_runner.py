"""Budgets, quotas and the ONNX Runtime runner over a toy graph with the true signature."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from toys import toy_tokens, write_toy_bundle

from holov_export.bundle import Bundle
from holov_export.errors import BudgetError, EnvironmentFaultError, ImageError, UnknownNameError
from holov_export.runtime.preprocess import pixels_from_images
from holov_export.runtime.runner import Runner, a_ninth, checked_budget, chosen_budget, quota_array
from holov_export.runtime.runner_ort import OrtRunner
from holov_export.spec import ModelSpec, Precision
from holov_export.tensors import PixelBatch


@pytest.fixture(scope="module")
def runner(toy_bundle: Bundle) -> Runner:
    return OrtRunner(toy_bundle, provider="cpu", threads=1)


@pytest.fixture(scope="module")
def pixels(photographs: list[Image.Image], llava_spec: ModelSpec) -> PixelBatch:
    return pixels_from_images(photographs[:3], llava_spec.image)


@pytest.mark.parametrize(("tokens", "budget"), [(576, 64), (144, 16), (64, 7), (4, 1), (1, 1)])
def test_a_ninth_is_a_ninth(tokens: int, budget: int) -> None:
    assert a_ninth(tokens) == budget


@pytest.mark.parametrize("quota", [[3, 11, 5], (3, 11, 5), np.array([3, 11, 5]), np.array([3, 11, 5], np.uint8)])
def test_the_budget_is_the_largest_quota(quota: object) -> None:
    assert chosen_budget(None, quota, 64, 7) == 11  # type: ignore[arg-type]
    assert chosen_budget(20, quota, 64, 7) == 20  # type: ignore[arg-type]
    assert quota_array(quota, 20, 3).tolist() == [3, 11, 5]  # type: ignore[arg-type]


def test_the_budget_without_a_quota() -> None:
    for none in (None, [], np.array([], np.int64)):
        assert chosen_budget(None, none, 64, 7) == 7  # type: ignore[arg-type]
    with pytest.raises(BudgetError, match=r"the budget is 65, it must be in 1\.\.64"):
        chosen_budget(None, [3, 65], 64, 7)


@pytest.mark.parametrize("quota", [5, np.int64(5), np.array(5), ["a"], [3, None], np.array([[3], [4]]), [1.5]])
def test_quotas_that_are_none(quota: object) -> None:
    for budget in (None, 8):
        with pytest.raises(BudgetError, match="must be"):
            quota_array(quota, chosen_budget(budget, quota, 64, 7), 1)  # type: ignore[arg-type]


@pytest.mark.parametrize("budget", [0, -1, 65, 10**9])
def test_budget_outside_its_range(runner: Runner, pixels: PixelBatch, budget: int) -> None:
    with pytest.raises(BudgetError, match=rf"the budget is {budget}, it must be in 1\.\.64"):
        runner.run(pixels, budget)


@pytest.mark.parametrize("budget", [1.5, "8", True, None])
def test_budget_is_an_integer(budget: object) -> None:
    with pytest.raises(BudgetError, match="must be an integer"):
        checked_budget(budget, 64)  # type: ignore[arg-type]
    assert checked_budget(np.int32(5), 64) == 5  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("quota", "message"),
    [
        ([1, 2], "2 quotas for 3 images"),
        ([], "0 quotas for 3 images"),
        ([1, 0, 2], r"the quota of image 2 is 0, it must be in 1\.\.8"),
        ([1, 2, 9], r"the quota of image 3 is 9, it must be in 1\.\.8"),
        ([1, 2, 2.0], "the quota of image 3 is 2.0, it must be an integer"),
    ],
)
def test_quota_outside_its_range(quota: list[int], message: str) -> None:
    with pytest.raises(BudgetError, match=message):
        quota_array(quota, 8, 3)


BUDGETS_AND_QUOTAS = st.integers(1, 64).flatmap(
    lambda budget: st.tuples(st.just(budget), st.lists(st.integers(1, budget), min_size=3, max_size=3))
)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(budget_and_quota=BUDGETS_AND_QUOTAS)
def test_outputs_follow_the_signature(
    runner: Runner, pixels: PixelBatch, llava_spec: ModelSpec, budget_and_quota: tuple[int, list[int]]
) -> None:
    budget, quota = budget_and_quota
    visual = runner.run(pixels, budget, quota)
    features = toy_tokens(pixels.pixel_values, llava_spec)
    assert visual.tokens.shape == (3, budget, llava_spec.decoder.width)
    assert visual.counts.tolist() == quota
    for image, count in enumerate(quota):
        np.testing.assert_allclose(visual.rows(image), features[image, :count], atol=1e-5)
        assert not visual.tokens[image, count:].any()
        assert visual.positions[image].tolist() == [*range(count), *([-1] * (budget - count))]


def test_no_quota_means_the_budget_for_each(runner: Runner, pixels: PixelBatch) -> None:
    assert runner.run(pixels, 5).counts.tolist() == [5, 5, 5]


def test_saliency_only_when_asked(toy_bundle: Bundle, runner: Runner, pixels: PixelBatch) -> None:
    assert runner.run(pixels, 4).saliency is None
    saliency = runner.run(pixels, 4, saliency=True).saliency
    assert saliency is not None
    assert saliency.shape == (3, 64)
    assert saliency.dtype == np.float32
    with OrtRunner(toy_bundle, provider="cpu", threads=1, saliency=True) as asking:
        assert asking.run(pixels, 4).saliency is not None
        assert asking.run(pixels, 4, saliency=False).saliency is None


def test_fp16_bundle(tmp_path: Path, llava_spec: ModelSpec, llava_checkpoint: Path, pixels: PixelBatch) -> None:
    bundle = write_toy_bundle(tmp_path / "fp16", llava_spec, llava_checkpoint, precision=Precision.FP16)
    with OrtRunner(bundle, provider="cpu", threads=1) as half:
        visual = half.run(pixels, 6, [6, 3, 1])
    assert visual.tokens.dtype == np.float16
    wanted = toy_tokens(pixels.pixel_values, llava_spec)[0, :6]
    np.testing.assert_allclose(visual.rows(0), wanted, atol=0.02)


def test_bf16_is_refused_with_a_way_out(tmp_path: Path, llava_spec: ModelSpec, llava_checkpoint: Path) -> None:
    bundle = write_toy_bundle(tmp_path / "bf16", llava_spec, llava_checkpoint, precision=Precision.BF16)
    with pytest.raises(EnvironmentFaultError, match=r"bfloat16.*TensorRT") as caught:
        OrtRunner(bundle, provider="cpu")
    assert caught.value.exit_code == 3


def test_pixels_of_another_size(runner: Runner) -> None:
    small = PixelBatch(np.zeros((1, 3, 28, 28), np.float32), (), ())
    with pytest.raises(ImageError, match=r"\(3, 28, 28\), the graph takes \(3, 56, 56\)"):
        runner.run(small, 4)


def test_session_is_reused(toy_bundle: Bundle, pixels: PixelBatch, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    true = onnxruntime.InferenceSession
    monkeypatch.setattr(onnxruntime, "InferenceSession", lambda *a, **k: made.append(1) or true(*a, **k))
    with OrtRunner(toy_bundle, provider="auto", threads=1) as fresh:
        fresh.run(pixels, 4)
        fresh.run(pixels, 9)
    assert made == [1]
    with pytest.raises(EnvironmentFaultError, match="closed"):
        fresh.run(pixels, 4)


def test_unknown_provider(toy_bundle: Bundle) -> None:
    with pytest.raises(UnknownNameError, match=r"'tpu'.*auto, cpu, openvino, cuda, tensorrt"):
        OrtRunner(toy_bundle, provider="tpu")


def test_cuda_that_is_not_there(toy_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(EnvironmentFaultError, match="has no CUDA; it has CPUExecutionProvider") as caught:
        OrtRunner(toy_bundle, provider="cuda")
    assert caught.value.exit_code == 3
    assert OrtRunner(toy_bundle, provider="auto", threads=1).name.endswith("(cpu)")


def test_silent_fallback_to_the_cpu_is_an_error(toy_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    true = onnxruntime.InferenceSession
    monkeypatch.setattr(
        onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"]
    )
    monkeypatch.setattr(
        onnxruntime, "InferenceSession", lambda path, options, providers, **_: true(path, options, [providers[-1]])
    )
    with pytest.raises(EnvironmentFaultError, match="fell back to the CPU"):
        OrtRunner(toy_bundle, provider="cuda")
    assert OrtRunner(toy_bundle, provider="auto").name.endswith("(cpu)")


def test_graph_that_does_not_load(tmp_path: Path, llava_spec: ModelSpec, llava_checkpoint: Path) -> None:
    bundle = write_toy_bundle(tmp_path / "broken", llava_spec, llava_checkpoint)
    bundle.vision.write_bytes(b"no graph")
    with pytest.raises(EnvironmentFaultError, match=r"cannot load vision\.onnx"):
        OrtRunner(bundle, provider="cpu")
