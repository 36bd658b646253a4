"""`verify --checkpoint`: our modules and graphs against transformers' own towers, where pictures are unequal."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from family_bundles import family_bundle, family_plan
from family_checkpoints import write_family
from PIL import Image

from holov_export.cli import run
from holov_export.runtime.preprocess import pixels_from_pictures
from holov_export.runtime.preprocess_video import joined_batches, pixels_from_videos
from holov_export.spec import ExportPlan
from holov_export.tensors import PixelBatch, VisualTokens
from holov_export.verify.backends import as_looked_at, gathered, tokens_from_reference, tokens_from_torch
from holov_export.verify.parity import TOLERANCES, Comparison, compare
from holov_export.verify.pictures import pixels_for
from holov_export.verify.transformers_vision import transformers_vision
from holov_export.vision.families import vision_from_plan
from holov_export.vision.weights import SafetensorsReader

#: families and the part that their second tower is for
GRAPHS = [("llava_next", "image"), ("qwen2_5_vl", "image"), ("video_llava", "image"), ("video_llava", "video")]
#: rules of each kind: early, greedy and late, blind, published
METHODS = ["holov", "scope", "divprune", "random", "holov-official"]


@pytest.fixture(scope="module", params=GRAPHS, ids=lambda pair: "-".join(pair))
def given(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ExportPlan]:
    """A checkpoint and the plan of one of its graphs."""
    family, part = request.param
    folder = write_family(tmp_path_factory.mktemp("checkpoints") / family, family)
    return folder, family_plan(folder, part=part)


@pytest.fixture(scope="module")
def pictures(photographs: list[Image.Image]) -> list[Image.Image]:
    """Of different shapes: square, wide and tall."""
    astronaut, coffee, chelsea, _ = photographs
    return [astronaut, coffee.resize((210, 140)), chelsea.crop((100, 0, 200, 300))]


def ours(plan: ExportPlan, checkpoint: Path, pixels: PixelBatch, quota: Sequence[int]) -> VisualTokens:
    with SafetensorsReader(checkpoint) as reader:
        module = vision_from_plan(plan, reader)
    return tokens_from_torch(module, plan, pixels, max(quota), list(quota))


def theirs(plan: ExportPlan, checkpoint: Path, pixels: PixelBatch) -> VisualTokens:
    tower = transformers_vision(checkpoint, plan)
    try:
        return tower.run(pixels)
    finally:
        tower.close()


def compared(left: VisualTokens, right: VisualTokens, plan: ExportPlan, budget: int) -> Comparison:
    names = ("torch fp32", "transformers")
    return compare(left, right, names=names, budget=budget, tolerance=TOLERANCES[plan.precision])


def test_all_tokens_are_those_of_transformers(
    given: tuple[Path, ExportPlan], pictures: list[Image.Image], tmp_path: Path
) -> None:
    checkpoint, plan = given
    pixels = pixels_for(plan, pictures)
    tokens = max((layout.tokens for layout in pixels.layouts), default=plan.tokens)
    whole = ours(plan, checkpoint, pixels, [tokens] * len(pictures))
    right = theirs(plan, checkpoint, pixels)
    found = compared(whole, right, plan, tokens)
    assert found.passed
    assert found.overlap == 1.0 and found.same_order == len(pictures)
    assert found.token_error <= 1e-5
    assert found.saliency_error is not None and found.saliency_error <= 1e-5
    # other weights are found out
    other = write_family(tmp_path / "other", plan.model.family, seed=5)
    assert not compared(whole, theirs(plan, other, pixels), plan, tokens).passed


@pytest.mark.parametrize("method", METHODS)
def test_pruned_tokens_are_those_that_the_reference_chooses_from_transformers_saliency(
    given: tuple[Path, ExportPlan], pictures: list[Image.Image], method: str
) -> None:
    checkpoint, plan = given
    plan = family_plan(checkpoint, method, part=plan.part)
    pixels, quota = pixels_for(plan, pictures), [9, 5, 1]
    pruned = ours(plan, checkpoint, pixels, quota)
    right = as_looked_at(plan, pixels, theirs(plan, checkpoint, pixels), quota)
    kept = pruned
    if method not in ("scope", "divprune"):  # they read features, which transformers' tower does not give
        kept = tokens_from_reference(plan, pixels, right, max(quota), quota)
    found = compared(pruned, gathered(right, kept), plan, max(quota))
    assert found.passed, found
    assert [int(count) for count in pruned.counts] == quota


def test_pictures_and_clips_in_one_batch(pictures: list[Image.Image], tmp_path: Path) -> None:
    """Qwen2.5-VL: one tower sees both."""
    checkpoint = write_family(tmp_path / "qwen", "qwen2_5_vl")
    plan = family_plan(checkpoint)
    clips = [[picture.rotate(angle) for angle in (0, 30, 60, 90)] for picture in pictures[1:]]
    pixels = joined_batches(pixels_from_pictures(pictures[:1], plan.model), pixels_from_videos(clips, plan.model))
    quota = [layout.tokens for layout in pixels.layouts]
    assert len({len(layout.regions) for layout in pixels.layouts}) > 1
    found = compared(ours(plan, checkpoint, pixels, quota), theirs(plan, checkpoint, pixels), plan, max(quota))
    # a clip's frames are rows of their own, and all of them are kept here
    assert found.passed and found.overlap == 1.0


def test_the_saliency_of_frames_that_keep_nothing_is_not_compared(pictures: list[Image.Image], tmp_path: Path) -> None:
    checkpoint = write_family(tmp_path / "video", "video_llava")
    plan = family_plan(checkpoint, part="video")
    pixels = pixels_for(plan, pictures[:1])
    full = theirs(plan, checkpoint, pixels)
    assert full.saliency is not None and (full.saliency >= 0).all()
    looked = as_looked_at(plan, pixels, full, [3])
    assert looked.saliency is not None
    of_frame = looked.saliency.reshape(8, -1)
    assert sorted((of_frame >= 0).all(1).tolist()) == [False] * 5 + [True] * 3
    assert np.array_equal(of_frame >= 0, (of_frame >= 0).all(1, keepdims=True) & np.ones_like(of_frame, bool))


def test_verify_compares_both_towers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = family_bundle(tmp_path, "video_llava")
    assert run(["verify", str(made.bundle.folder), "--checkpoint", str(made.checkpoint), "--json"]) == 0
    images = json.loads(capsys.readouterr().out)
    (clips,) = images.pop("also")
    for report in (images, clips):
        pairs = {(item["left"], item["right"]) for item in report["comparisons"]}
        assert ("torch fp32", "transformers") in pairs and ("onnxruntime", "torch fp32") in pairs
        assert all(item["passed"] for item in report["comparisons"])
    largest = [max(item["budget"] for item in report["comparisons"]) for report in (images, clips)]
    assert largest == [16, 8 * 17]
