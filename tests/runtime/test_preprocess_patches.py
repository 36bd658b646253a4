"""Patches, their order and their places against transformers' own Qwen2.5-VL."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from skimage import data
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil, smart_resize
from transformers.vision_utils import get_vision_cu_seqlens, get_vision_position_ids, get_vision_window_index

from holov_export.errors import ImageError
from holov_export.runtime.preprocess import pixels_from_pictures
from holov_export.runtime.preprocess_patches import patch_layout, patch_size_of
from holov_export.spec import DecoderSpec, FramePairsSpec, ModelSpec, PatchImageSpec, PromptSpec, QwenVisionSpec
from holov_export.tensors import CropBox, Region

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
#: (width, height)
SIZES = [
    (512, 512),
    (600, 400),
    (400, 600),
    (451, 300),
    (57, 55),
    (7, 5),
    (1, 1),
    (1, 40),
    (199, 1),
    (30, 3000),
    (2999, 2111),
]


def model_of(
    window: int = 112, tokens: tuple[int, int] = (4, 1280), frame_tokens: tuple[int, int] = (8, 48)
) -> ModelSpec:
    """Qwen2.5-VL's patches and windows (or smaller windows), with few tokens."""
    area = 28 * 28
    return ModelSpec(
        family="qwen2_5_vl",
        name="tiny",
        image=PatchImageSpec(
            patch_size=14,
            merge=2,
            temporal=2,
            min_pixels=tokens[0] * area,
            max_pixels=tokens[1] * area,
            mean=MEAN,
            std=STD,
        ),
        video=FramePairsSpec(
            fps=2.0,
            min_frames=4,
            max_frames=12,
            min_pixels=frame_tokens[0] * area,
            max_pixels=frame_tokens[1] * area,
            total_pixels=12 * frame_tokens[1] * area,
            tokens_per_second=2,
        ),
        vision=QwenVisionSpec(
            patch_size=14,
            temporal_patch_size=2,
            merge=2,
            window_size=window,
            width=80,
            layers=4,
            heads=2,
            mlp_width=104,
            activation="silu",
            full_layers=(1, 3),
            norm_eps=1e-6,
            theta=10000.0,
        ),
        decoder=DecoderSpec(
            architecture="qwen2_5_vl",
            width=128,
            layers=3,
            heads=4,
            kv_heads=2,
            head_width=32,
            mlp_width=192,
            vocab_size=448,
            context=2304,
            image_token_id=430,
            bos_token_id=None,
            eos_token_ids=(2,),
            pad_token_id=0,
            video_token_id=431,
            mrope_sections=(4, 6, 6),
        ),
        prompt=PromptSpec(chat_template="{{ messages }}"),
    )


def photograph(name: str) -> Image.Image:
    return Image.fromarray(getattr(data, name)())


def processed(image: Image.Image, model: ModelSpec) -> tuple[np.ndarray, torch.Tensor]:
    """(patches in transformers' order, grid [1, 3])."""
    assert isinstance(model.image, PatchImageSpec)
    size = {"shortest_edge": model.image.min_pixels, "longest_edge": model.image.max_pixels}
    made = Qwen2VLImageProcessorPil(size=size)(image, return_tensors="np")
    return np.asarray(made["pixel_values"]), torch.tensor(made["image_grid_thw"])


def windows_of(grid: torch.Tensor, window: int) -> tuple[np.ndarray, np.ndarray]:
    """(tokens in the order of the windows, patches of each window) as the tower of transformers has them."""
    index, ends = get_vision_window_index(grid, spatial_merge_size=2, window_size=window, patch_size=14)
    return index.numpy(), np.diff(ends.numpy())


def in_windows(patches: np.ndarray, index: np.ndarray) -> np.ndarray:
    return patches.reshape(-1, 4, patches.shape[1])[index].reshape(patches.shape)


@pytest.mark.parametrize("name", ["astronaut", "coffee", "chelsea", "rocket"])
def test_photographs_are_bit_equal_to_transformers(name: str) -> None:
    model, image = model_of(), photograph(name)
    batch = pixels_from_pictures([image], model)
    patches, grid = processed(image, model)
    index, _ = windows_of(grid, 112)
    np.testing.assert_array_equal(batch.pixel_values, in_windows(patches, index))
    assert batch.pixel_values.dtype == np.float32
    assert batch.pixel_values.shape[1] == 3 * 2 * 14 * 14


@pytest.mark.parametrize("window", [56, 112])
@pytest.mark.parametrize("size", SIZES)
def test_any_size_is_equal_to_transformers(size: tuple[int, int], window: int) -> None:
    model, image = model_of(window), photograph("coffee").resize(size)
    batch = pixels_from_pictures([image], model)
    (layout,) = batch.layouts
    patches, grid = processed(image, model)
    index, windows = windows_of(grid, window)
    np.testing.assert_array_equal(batch.pixel_values, in_windows(patches, index))
    np.testing.assert_array_equal(layout.source, np.argsort(index))
    np.testing.assert_array_equal(layout.windows, windows)
    places = get_vision_position_ids(grid, 2).numpy()
    np.testing.assert_array_equal(layout.places, in_windows(places, index))
    assert layout.regions == (Region((int(grid[0, 1]) // 2, int(grid[0, 2]) // 2), CropBox(0, 0, *size)),)
    assert (layout.kind, layout.rows, layout.tower_rows) == ("image", len(patches), len(patches) // 4)
    assert (batch.sizes, batch.boxes) == ((size,), (CropBox(0, 0, *size),))


def test_source_puts_tokens_into_raster_order() -> None:
    """The mean colour of each token's patches is that of its place in the picture."""
    model = model_of(window=56)
    rows, columns = 5, 7
    colours = np.random.default_rng(0).integers(0, 256, (rows, columns, 3)).astype(np.uint8)
    image = Image.fromarray(np.repeat(np.repeat(colours, 28, 0), 28, 1))
    batch = pixels_from_pictures([image], model)
    seen = batch.pixel_values.reshape(rows * columns, 4, 3, -1).mean((1, 3))[batch.layouts[0].source]
    wanted = ((colours.reshape(-1, 3) / 255 - MEAN) / STD).astype(np.float32)
    np.testing.assert_allclose(seen, wanted, atol=1e-5)
    assert not np.array_equal(batch.layouts[0].source, np.arange(rows * columns))


@pytest.mark.parametrize("window", [56, 84, 112])
@pytest.mark.parametrize("grid", [(1, 2, 2), (3, 8, 8), (2, 10, 14), (4, 6, 18), (1, 34, 4)])
def test_windows_of_clips(grid: tuple[int, int, int], window: int) -> None:
    """The pairs of a clip follow each other, each with windows of its own; views are what transformers calls frames."""
    vision = model_of(window).vision
    views, down, across = grid
    region = Region((down // 2, across // 2), CropBox(0, 0, 1, 1))
    layout = patch_layout("video", (region,) * views, vision)  # type: ignore[arg-type]
    index, windows = windows_of(torch.tensor([grid]), window)
    np.testing.assert_array_equal(layout.source, np.argsort(index))
    np.testing.assert_array_equal(layout.windows, windows)
    places = get_vision_position_ids(torch.tensor([grid]), 2).numpy()
    np.testing.assert_array_equal(layout.places, in_windows(places, index))
    frames = np.diff(get_vision_cu_seqlens(torch.tensor([grid])).numpy())
    assert frames.tolist() == [region.tokens * 4 for region in layout.regions]


def test_sizes_are_those_of_transformers() -> None:
    spec = model_of().image
    assert isinstance(spec, PatchImageSpec)
    rng = np.random.default_rng(1)
    for width, height in np.exp(rng.uniform(0, 9, (3000, 2))).astype(int).tolist():
        low = int(rng.integers(1, 300)) * 784
        high = low * int(rng.integers(2, 9))
        if max(width, height) / min(width, height) > 200:
            with pytest.raises(ImageError, match="too thin"):
                patch_size_of((width, height), spec, (low, high))
            with pytest.raises(ValueError, match="aspect ratio"):
                smart_resize(height, width, 28, low, high)
        else:
            wanted = smart_resize(height, width, 28, low, high)[::-1]
            assert patch_size_of((width, height), spec, (low, high)) == wanted


def test_batch_equals_singles() -> None:
    images = [photograph(name) for name in ("astronaut", "coffee", "chelsea")]
    model = model_of(tokens=(4, 60))
    batch = pixels_from_pictures(images, model)
    assert len(batch) == 3
    assert len({layout.tokens for layout in batch.layouts}) > 1
    for index, image in enumerate(images):
        single, part = pixels_from_pictures([image], model), batch.part(index, index + 1)
        np.testing.assert_array_equal(part.pixel_values, single.pixel_values)
        np.testing.assert_array_equal(part.layouts[0].source, single.layouts[0].source)


def test_no_picture_has_more_tokens_than_the_model_says() -> None:
    model = model_of(tokens=(4, 60))
    counts = [
        pixels_from_pictures([photograph("coffee").resize((side, 448))], model).layouts[0].tokens
        for side in (30, 100, 448, 600, 3000)
    ]
    assert max(counts) <= model.image_tokens == 60
    assert max(counts) > 45


def test_refusals() -> None:
    model = model_of()
    with pytest.raises(ImageError, match="there is no image"):
        pixels_from_pictures([], model)
    with pytest.raises(ImageError, match=r"too thin: 1 x 201 pixels.*200 times") as caught:
        pixels_from_pictures([Image.new("RGB", (1, 201))], model)
    assert caught.value.hint
    assert len(pixels_from_pictures([Image.new("RGB", (1, 200))], model)) == 1
    with pytest.raises(ImageError, match="more than 1,000"):
        pixels_from_pictures([photograph("coffee")], model, max_pixels=1000)
