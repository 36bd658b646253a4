"""Pictures and clips as rows of a packed graph, and back."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from family_checkpoints import write_family
from PIL import Image

from holov_export.export.checkpoint import spec_from_checkpoint
from holov_export.policies import policy_from_settings
from holov_export.runtime.packing import PackedInputs, packed_inputs, pictures_from_rows
from holov_export.runtime.preprocess import pixels_from_pictures
from holov_export.runtime.preprocess_video import joined_batches, pixels_from_videos
from holov_export.signature import CROPS, SOURCE, VIEW_ROWS, VIEW_SLOTS, WINDOW_ROWS, WINDOW_SLOTS
from holov_export.spec import CheckpointSource, DecoderPrecision, ExportPlan, ModelSpec, Precision, QwenVisionSpec
from holov_export.tensors import Int64Array, PixelBatch, VisualTokens


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> ModelSpec:
    folder = write_family(tmp_path_factory.mktemp("checkpoints") / "qwen", "qwen2_5_vl")
    return spec_from_checkpoint(folder, "qwen")


@pytest.fixture(scope="module")
def next_model(tmp_path_factory: pytest.TempPathFactory) -> ModelSpec:
    folder = write_family(tmp_path_factory.mktemp("checkpoints") / "next", "llava_next")
    return spec_from_checkpoint(folder, "next")


def plan_of(model: ModelSpec, method: str = "holov") -> ExportPlan:
    return ExportPlan(
        model=model,
        source=CheckpointSource(kind="local", name=model.name),
        policy=policy_from_settings(method),
        precision=Precision.FP32,
        decoder=DecoderPrecision.FP32,
    )


def array_of(packed: PackedInputs, name: str) -> Int64Array:
    return next(array.values for array in packed.arrays if array.name == name).astype(np.int64)


def mixed(model: ModelSpec, photographs: list[Image.Image]) -> PixelBatch:
    """Two pictures of unequal size and a clip of four frames."""
    pictures = pixels_from_pictures([photographs[0], photographs[1].crop((0, 0, 60, 300))], model)
    frames = [photographs[2].resize((90, 60)), *[photographs[3].resize((90, 60))] * 3]
    return joined_batches(pictures, pixels_from_videos([frames], model))


def test_the_inputs_are_those_of_the_signature(
    qwen: ModelSpec, next_model: ModelSpec, photographs: list[Image.Image]
) -> None:
    for model, batch in ((qwen, mixed(qwen, photographs)), (next_model, pixels_from_pictures(photographs, next_model))):
        plan = plan_of(model)
        packed = packed_inputs(batch.layouts, plan, np.full(len(batch), 5))
        names = [spec.name for spec in plan.signature[0]]
        assert [array.name for array in packed.arrays] == names[1:-2]
        sizes: dict[str, int] = {}
        given = {names[0]: batch.pixel_values, **{array.name: array.values for array in packed.arrays}}
        for spec in plan.signature[0][:-2]:
            values = given[spec.name]
            assert values.ndim == len(spec.shape)
            for size, axis in zip(values.shape, spec.shape, strict=True):
                assert size == (axis if isinstance(axis, int) else sizes.setdefault(axis, size)), (spec.name, axis)


def test_sources_of_later_pictures_count_on_and_none_is_taken_twice(
    qwen: ModelSpec, photographs: list[Image.Image]
) -> None:
    batch = mixed(qwen, photographs)
    packed = packed_inputs(batch.layouts, plan_of(qwen), np.full(3, 7), "clip")
    source = array_of(packed, SOURCE)
    assert source.shape == (3, max(layout.tokens for layout in batch.layouts))
    taken = source[source >= 0]
    assert sorted(taken) == list(range(sum(layout.tower_rows for layout in batch.layouts)))
    start = 0
    for row, layout in zip(source, batch.layouts, strict=True):
        np.testing.assert_array_equal(row[: layout.tokens], layout.source + start)
        assert (row[layout.tokens :] == -1).all()
        start += layout.tower_rows


def test_windows_and_views_hold_each_patch_once(qwen: ModelSpec, photographs: list[Image.Image]) -> None:
    batch = mixed(qwen, photographs)
    packed = packed_inputs(batch.layouts, plan_of(qwen), np.full(3, 7))
    assert isinstance(qwen.vision, QwenVisionSpec)
    patches = len(batch.pixel_values)
    for rows, slots in ((WINDOW_ROWS, WINDOW_SLOTS), (VIEW_ROWS, VIEW_SLOTS)):
        table, slot = array_of(packed, rows), array_of(packed, slots)
        np.testing.assert_array_equal(table.flatten()[slot], np.arange(patches))
        assert (table >= 0).sum() == patches
    assert array_of(packed, WINDOW_ROWS).shape[1] == qwen.vision.window_patches
    views = [region.tokens * 4 for layout in batch.layouts for region in layout.regions]
    np.testing.assert_array_equal((array_of(packed, VIEW_ROWS) >= 0).sum(1), views)


@pytest.mark.parametrize(("quota", "shares"), [(16, [8, 8]), (5, [2, 3]), (1, [1]), (400, None)])
def test_frames_share_the_quota_of_a_clip(
    qwen: ModelSpec, photographs: list[Image.Image], quota: int, shares: list[int] | None
) -> None:
    """A frame without a share is no row; more than there is means all."""
    clip = pixels_from_videos([[photographs[2].resize((90, 60))] * 4], qwen)
    tokens = clip.layouts[0].tokens
    packed = packed_inputs(clip.layouts, plan_of(qwen), np.array([quota]))
    wanted = [tokens // 2, tokens // 2] if shares is None else shares
    assert packed.quota.tolist() == wanted
    assert packed.budget == max(wanted)
    whole = packed_inputs(clip.layouts, plan_of(qwen), np.array([quota]), "clip")
    assert whole.quota.tolist() == [min(quota, tokens)]


def test_the_published_code_does_not_share_a_clip_out(qwen: ModelSpec, photographs: list[Image.Image]) -> None:
    clip = pixels_from_videos([[photographs[2].resize((90, 60))] * 4], qwen)
    assert len(packed_inputs(clip.layouts, plan_of(qwen, "holov-official"), np.array([8])).rows) == 1


def test_crops_of_a_tiled_picture_do_not_cross_its_regions(
    next_model: ModelSpec, photographs: list[Image.Image]
) -> None:
    """holov has crops for the whole view and for the mosaic; the published code cuts one run of all tokens."""
    batch = pixels_from_pictures([photographs[1]], next_model)
    whole, mosaic = batch.layouts[0].regions
    crops = array_of(packed_inputs(batch.layouts, plan_of(next_model), np.array([9])), CROPS)[0]
    assert not set(crops[: whole.tokens]) & set(crops[whole.tokens :])
    assert len(set(crops)) == 16
    official = array_of(packed_inputs(batch.layouts, plan_of(next_model, "holov-official"), np.array([9])), CROPS)[0]
    assert whole.tokens + mosaic.tokens == len(official)
    runs = np.array_split(np.arange(len(official)), 16)
    np.testing.assert_array_equal(official, np.repeat(np.arange(16), [len(run) for run in runs]))


def test_rows_become_pictures_again(qwen: ModelSpec, photographs: list[Image.Image]) -> None:
    """What each row keeps is put behind what the clip's earlier rows keep, at positions of the clip."""
    batch = mixed(qwen, photographs)
    packed = packed_inputs(batch.layouts, plan_of(qwen), np.array([3, 2, 5]))
    rows, longest = len(packed.rows), max(row.layout.tokens for row in packed.rows)
    assert rows == 4
    positions = np.full((rows, packed.budget), -1)
    tokens = np.zeros((rows, packed.budget, 2), dtype=np.float32)
    for index, count in enumerate(packed.quota):
        positions[index, :count] = np.arange(count) + index
        tokens[index, :count] = index + 1
    seen = VisualTokens(
        tokens, positions, packed.quota, np.arange(rows * longest, dtype=np.float32).reshape(rows, longest)
    )
    made = pictures_from_rows(seen, packed, batch.layouts)
    assert made.counts.tolist() == [3, 2, 5]
    frame = batch.layouts[2].regions[0].tokens
    assert made.positions.tolist() == [
        [0, 1, 2, -1, -1],
        [1, 2, -1, -1, -1],
        [2, 3, frame + 3, frame + 4, frame + 5],
    ]
    assert made.tokens[2, :, 0].tolist() == [3, 3, 4, 4, 4]
    assert not made.tokens[1, 2:].any()
    assert made.saliency is not None
    assert made.saliency.shape == (3, max(layout.tokens for layout in batch.layouts))
    np.testing.assert_array_equal(made.saliency[2, :frame], 2 * longest + np.arange(frame))
    np.testing.assert_array_equal(made.saliency[2, frame : 2 * frame], 3 * longest + np.arange(frame))
    for row, layout in zip(made.saliency, batch.layouts, strict=True):
        assert (row[layout.tokens :] == -1).all()


def test_a_part_of_a_batch_is_that_of_its_pictures(qwen: ModelSpec, photographs: list[Image.Image]) -> None:
    batch = mixed(qwen, photographs)
    parts = [batch.part(index, index + 1) for index in range(3)]
    np.testing.assert_array_equal(np.concatenate([part.pixel_values for part in parts]), batch.pixel_values)
    assert [len(part) for part in parts] == [1, 1, 1]
    assert [part.layouts[0] for part in parts] == list(batch.layouts)
    assert len(batch.part(1, 9)) == 2


def test_paths_are_not_needed(tmp_path: Path, next_model: ModelSpec, photographs: list[Image.Image]) -> None:
    """A file gives the same pixels and layout as the picture in memory."""
    photographs[1].save(tmp_path / "coffee.png")
    made, again = (pixels_from_pictures([one], next_model) for one in (tmp_path / "coffee.png", photographs[1]))
    np.testing.assert_array_equal(made.pixel_values, again.pixel_values)
    np.testing.assert_array_equal(made.layouts[0].source, again.layouts[0].source)
