"""Two vision graphs on the same pictures: equal ones, spoiled ones, and pictures of unequal sizes."""

from __future__ import annotations

import shutil
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from changed_bundles import changed, noise, spoiled_rows
from family_bundles import family_bundle
from PIL import Image

from holov_export.bundle import Bundle
from holov_export.errors import ImageError
from holov_export.runtime.runner_ort import OrtRunner
from holov_export.verify.bundle_contents import bytes_by_kind, tensor_differences, weights_by_type
from holov_export.verify.paired_speed import paired_speed
from holov_export.verify.pictures import pixels_for
from holov_export.verify.vision_loss import PictureLoss, summary_of, tokens_of, vision_losses

Named = list[tuple[str, Image.Image]]


@pytest.fixture
def pictures(photographs: list[Image.Image]) -> Named:
    return [(f"photograph {number}", picture) for number, picture in enumerate(photographs[:3])]


def test_a_graph_loses_nothing_against_itself(exported_bundle: Bundle, pictures: Named) -> None:
    losses = vision_losses(exported_bundle, exported_bundle, pictures, threads=1)
    # a ninth, a third and all of 64 tokens
    assert [(loss.picture, loss.budget) for loss in losses] == [(n, k) for k in (7, 21, 64) for n, _ in pictures]
    for loss in losses:
        assert (loss.overlap, loss.differing, loss.count, loss.tokens) == (1.0, 0, loss.budget, 64)
        assert loss.cosine_min == pytest.approx(1.0, abs=1e-12) and loss.cosine_mean == pytest.approx(1.0, abs=1e-12)
        assert loss.saliency_error == 0.0 and loss.sound
    found = summary_of(losses)
    assert (found.overlap_min, found.overlap_mean, found.saliency_error) == (1.0, 1.0, 0.0)


def test_noise_is_seen_picture_by_picture(exported_bundle: Bundle, pictures: Named, tmp_path: Path) -> None:
    noisy = changed(exported_bundle, tmp_path / "noisy", noise(0.5))
    losses = vision_losses(exported_bundle, noisy, pictures, (21,), threads=1)
    assert all(loss.sound and loss.saliency_error and loss.saliency_error > 1e-3 for loss in losses)
    assert min(loss.overlap for loss in losses) < 1
    assert all(loss.cosine_min < loss.cosine_mean < 0.9999 for loss in losses)
    with OrtRunner(exported_bundle, provider="cpu") as left, OrtRunner(noisy, provider="cpu") as right:
        for loss, (_, picture) in zip(losses, pictures, strict=True):
            pixels = pixels_for(exported_bundle.manifest.plan, [picture])
            kept = [set(runner.run(pixels, 21).positions[0].tolist()) for runner in (left, right)]
            assert loss.overlap == len(kept[0] & kept[1]) / 21
            assert loss.differing == 21 - len(kept[0] & kept[1])
            maps = [runner.run(pixels, 21, saliency=True).saliency for runner in (left, right)]
            assert loss.saliency_error == pytest.approx(np.abs(maps[0] - maps[1]).max() / maps[0].max(), rel=1e-3)
    found = summary_of(losses)
    assert found.overlap_min == min(loss.overlap for loss in losses)
    assert found.overlap_mean == pytest.approx(sum(loss.overlap for loss in losses) / 3)


@pytest.mark.parametrize("before", [True, False])
def test_numbers_that_are_not_finite_are_not_sound(
    exported_bundle: Bundle, pictures: Named, tmp_path: Path, before: bool
) -> None:
    spoiled = changed(exported_bundle, tmp_path / "spoiled", spoiled_rows)
    pair = (spoiled, exported_bundle) if before else (exported_bundle, spoiled)
    losses = vision_losses(*pair, pictures[:1], (21,), threads=1)
    (loss,) = losses
    assert not loss.sound
    assert (loss.overlap, loss.cosine_min, loss.cosine_mean) == (1.0, None, None)
    assert PictureLoss.model_validate_json(loss.model_dump_json()) == loss
    assert summary_of(losses).cosine_min is None


def test_one_sound_picture_does_not_hide_the_other() -> None:
    good = PictureLoss(
        picture="a",
        tokens=64,
        budget=21,
        count=21,
        overlap=1.0,
        cosine_min=1.0,
        cosine_mean=1.0,
        saliency_error=0.0,
        sound=True,
    )
    bad = good.model_copy(update={"cosine_min": None, "cosine_mean": None, "sound": False})
    assert summary_of([good]).cosine_min == 1.0
    assert summary_of([good, bad]).cosine_min is None
    whole = good.model_copy(update={"budget": 64})
    assert summary_of([whole]).overlap_min is None


def test_budgets_are_numbers_or_shares_of_each_picture() -> None:
    assert [tokens_of(size, 576) for size in (Fraction(1, 9), Fraction(1, 3), Fraction(1), 100, 999)] == [
        64,
        192,
        576,
        100,
        576,
    ]
    assert tokens_of(Fraction(1, 9), 2) == 1


def test_equal_budgets_are_run_once(exported_bundle: Bundle, pictures: Named) -> None:
    losses = vision_losses(exported_bundle, exported_bundle, pictures[:1], (21, Fraction(1, 3), 21), threads=1)
    assert len(losses) == 1


def test_two_pictures_of_one_name_are_two(exported_bundle: Bundle, pictures: Named) -> None:
    named = [("same", picture) for _, picture in pictures]
    assert len(vision_losses(exported_bundle, exported_bundle, named, (21,), threads=1)) == 3


def test_no_picture(exported_bundle: Bundle) -> None:
    with pytest.raises(ImageError, match="no picture"):
        vision_losses(exported_bundle, exported_bundle, [])


@pytest.mark.slow
def test_pictures_of_unequal_sizes_have_their_own_budgets(photographs: list[Image.Image], tmp_path: Path) -> None:
    bundle = family_bundle(tmp_path, "qwen2_5_vl").bundle
    small = photographs[0].resize((60, 90))
    pictures = [("large", photographs[1].resize((160, 100))), ("small", small), ("third", photographs[2])]
    losses = vision_losses(bundle, bundle, pictures, (Fraction(1, 3), Fraction(1)), threads=1)
    assert len(losses) == 6
    for loss in losses:
        assert loss.overlap == 1.0 and loss.sound
        assert loss.budget in (round(loss.tokens / 3), loss.tokens)
    assert len({loss.tokens for loss in losses}) > 1


def test_both_are_timed_at_each_budget(exported_bundle: Bundle, pictures: Named) -> None:
    pixels = pixels_for(exported_bundle.manifest.plan, [pictures[0][1]])
    found = paired_speed(exported_bundle, exported_bundle, pixels, (7, 64), threads=1, rounds=3)
    assert ([item.budget for item in found.at], found.clock, found.rounds) == ([7, 64], "cpu", 3)
    for item in found.at:
        assert min(item.milliseconds) > 0
        assert item.ratio == pytest.approx(item.milliseconds[1] / item.milliseconds[0])
    assert paired_speed(exported_bundle, exported_bundle, pixels, (7,), threads=2, rounds=1).clock == "wall"


class TestContents:
    def test_equal_bundles(self, exported_bundle: Bundle, tmp_path: Path) -> None:
        copy = Bundle(Path(shutil.copytree(exported_bundle.folder, tmp_path / "copy")), exported_bundle.manifest)
        assert tensor_differences(exported_bundle, copy) == ()
        for item in weights_by_type(exported_bundle, copy):
            assert item.tensors[0] == item.tensors[1] > 0
            assert item.bytes[0] == item.bytes[1] > 0
        kinds = {item.kind: item.bytes for item in bytes_by_kind(exported_bundle, copy)}
        weights = exported_bundle.folder / exported_bundle.weights
        assert kinds["weights"] == (weights.stat().st_size,) * 2
        assert "decoder" not in kinds

    def test_weights_count_where_they_lie_does_not(self, exported_bundle: Bundle, tmp_path: Path) -> None:
        inside = changed(exported_bundle, tmp_path / "inside", lambda name, values: values)
        assert not (inside.folder / inside.weights).exists()
        for item in weights_by_type(exported_bundle, inside):
            assert item.bytes[0] == item.bytes[1]

    def test_another_type_is_a_difference_and_a_row(self, exported_bundle: Bundle, tmp_path: Path) -> None:
        half = changed(exported_bundle, tmp_path / "half", lambda name, values: values.astype("float16"))
        rows = {item.dtype: item for item in weights_by_type(exported_bundle, half)}
        assert rows["float16"].tensors[0] == 0 < rows["float16"].tensors[1]
        lost = rows["float32"].bytes[0] - rows["float32"].bytes[1]
        assert lost == 2 * rows["float16"].bytes[1] > 0
        first = exported_bundle.manifest.inputs[0]
        inputs = (first.model_copy(update={"dtype": "float16"}), *exported_bundle.manifest.inputs[1:])
        other = Bundle(exported_bundle.folder, exported_bundle.manifest.model_copy(update={"inputs": inputs}))
        (difference,) = tensor_differences(exported_bundle, other)
        assert (difference.name, difference.side) == ("pixel_values", "input")
        assert difference.before is not None and difference.after == difference.before.replace("float32", "float16")
        (missing,) = tensor_differences(
            exported_bundle,
            Bundle(exported_bundle.folder, exported_bundle.manifest.model_copy(update={"inputs": inputs[1:]})),
        )
        assert missing.after is None
