"""Tiles and their layout against transformers' own LLaVA-NeXT."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from skimage import data
from transformers import CLIPVisionConfig, LlavaNextConfig, LlavaNextModel
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

from holov_export.errors import ImageError
from holov_export.runtime.preprocess import pixels_from_pictures
from holov_export.spec import DecoderSpec, ImageSpec, ModelSpec, PromptSpec, TiledImageSpec, VisionSpec
from holov_export.tensors import CropBox, PixelBatch

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
#: of llava-v1.6 with tiles of 56 pixels instead of 336
SIDE, PATCH = 56, 14
PINPOINTS = ((56, 112), (112, 56), (112, 112), (168, 56), (56, 168))
#: (width, height)
SIZES = [(512, 512), (600, 400), (400, 600), (100, 300), (300, 100), (451, 300), (57, 55), (7, 5), (1, 1), (3000, 2111)]
THIN = [(1, 40), (40, 1), (1, 500), (500, 1), (2, 301)]


def model_of(side: int = SIDE, pinpoints: tuple[tuple[int, int], ...] = PINPOINTS) -> ModelSpec:
    return ModelSpec(
        family="llava_next",
        name="tiny",
        image=TiledImageSpec(
            tile=ImageSpec(shortest_edge=side, crop=(side, side), mean=MEAN, std=STD), pinpoints=pinpoints
        ),
        vision=VisionSpec(
            image_size=side,
            patch_size=PATCH,
            width=72,
            layers=4,
            heads=3,
            mlp_width=88,
            activation="quick_gelu",
            layer_norm_eps=1e-5,
            feature_layer=2,
            projector_activation="gelu",
            projector_bias=True,
        ),
        decoder=DecoderSpec(
            architecture="llama",
            width=128,
            layers=3,
            heads=4,
            kv_heads=2,
            head_width=32,
            mlp_width=192,
            vocab_size=416,
            context=2304,
            image_token_id=400,
            bos_token_id=1,
            eos_token_ids=(2,),
            pad_token_id=0,
        ),
        prompt=PromptSpec(chat_template="{{ messages }}"),
    )


def photograph(name: str) -> Image.Image:
    return Image.fromarray(getattr(data, name)())


def processed(image: Image.Image, side: int = SIDE, pinpoints: tuple[tuple[int, int], ...] = PINPOINTS) -> np.ndarray:
    processor = LlavaNextImageProcessorPil(
        size={"shortest_edge": side},
        crop_size={"height": side, "width": side},
        image_grid_pinpoints=[list(pair) for pair in pinpoints],
    )
    return np.asarray(processor(image, return_tensors="np")["pixel_values"])[0]


def packed(size: tuple[int, int], views: int) -> list[int]:
    """The rows of the tower in transformers' order, -1 for the newline, of a picture of `size` (width, height)."""
    config = LlavaNextConfig(
        vision_config=CLIPVisionConfig(image_size=SIDE, patch_size=PATCH),
        image_grid_pinpoints=[list(pair) for pair in PINPOINTS],
    )
    tokens = (SIDE // PATCH) ** 2
    rows = torch.arange(views * tokens, dtype=torch.float32).reshape(views, tokens, 1)
    features, _ = LlavaNextModel.pack_image_features(
        SimpleNamespace(config=config),
        [rows],
        torch.tensor([[size[1], size[0]]]),
        "default",
        torch.tensor([-1.0]),
    )
    return [int(value) for value in features[0][:, 0]]


def in_prompt(batch: PixelBatch, image: int = 0) -> list[int]:
    """The same from a layout: its tokens with a -1 behind each row of a region with newlines."""
    layout = batch.layouts[image]
    assert sum(region.tokens for region in layout.regions) == layout.tokens
    rows, start = [], 0
    for region in layout.regions:
        for _ in range(region.grid[0]):
            rows += layout.source[start : start + region.grid[1]].tolist() + [-1] * region.newlines
            start += region.grid[1]
    return rows


@pytest.mark.parametrize("name", ["astronaut", "coffee", "chelsea"])
def test_photographs_at_true_size_are_bit_equal_to_transformers(name: str) -> None:
    pinpoints = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))
    image = photograph(name)
    pixels = pixels_from_pictures([image], model_of(336, pinpoints)).pixel_values
    np.testing.assert_array_equal(pixels, processed(image, 336, pinpoints))
    assert pixels.dtype == np.float32


@pytest.mark.parametrize("size", [*SIZES, *THIN])
def test_any_size_is_bit_equal_to_transformers(size: tuple[int, int]) -> None:
    image = photograph("coffee").resize(size)
    batch = pixels_from_pictures([image], model_of())
    np.testing.assert_array_equal(batch.pixel_values, processed(image))
    assert batch.sizes == (size,)
    assert batch.boxes == (CropBox(0, 0, *size),)
    (layout,) = batch.layouts
    assert (layout.kind, layout.rows, layout.tower_rows) == ("image", *batch.pixel_values.shape[:1], layout.rows * 16)


@pytest.mark.parametrize("size", [*SIZES, *THIN])
def test_the_order_of_tokens_is_that_of_transformers(size: tuple[int, int]) -> None:
    batch = pixels_from_pictures([photograph("coffee").resize(size)], model_of())
    assert in_prompt(batch) == packed(size, batch.layouts[0].rows)


def test_the_order_of_many_random_sizes() -> None:
    rng = np.random.default_rng(0)
    model = model_of()
    unequal = 0
    for width, height in rng.integers(2, 260, (150, 2)).tolist():
        batch = pixels_from_pictures([np.zeros((height, width, 3), np.uint8)], model)
        assert in_prompt(batch) == packed((width, height), batch.layouts[0].rows), (width, height)
        unequal += batch.layouts[0].tokens % 16 != 0
    assert unequal > 20, "padding must be taken off"


def test_so_thin_a_picture_has_newlines_and_no_tokens_in_its_mosaic() -> None:
    batch = pixels_from_pictures([Image.new("RGB", (1, 4000), (200, 100, 50))], model_of())
    (layout,) = batch.layouts
    assert [region.grid for region in layout.regions] == [(4, 4), (4, 0)]
    assert layout.tokens == 16
    assert in_prompt(batch) == packed((1, 4000), layout.rows) == [*range(16), -1, -1, -1, -1]


def test_batch_equals_singles() -> None:
    images = [photograph(name) for name in ("astronaut", "coffee", "chelsea")]
    batch = pixels_from_pictures(images, model_of())
    assert len(batch) == 3
    assert len({layout.tokens for layout in batch.layouts}) > 1
    for index, image in enumerate(images):
        single, part = pixels_from_pictures([image], model_of()), batch.part(index, index + 1)
        np.testing.assert_array_equal(part.pixel_values, single.pixel_values)
        np.testing.assert_array_equal(part.layouts[0].source, single.layouts[0].source)
        assert part.layouts[0].regions == single.layouts[0].regions


def test_largest_picture_has_the_tokens_that_the_model_says() -> None:
    model = model_of()
    batch = pixels_from_pictures([photograph("astronaut")], model)
    assert batch.layouts[0].tokens == model.image_tokens == 16 + 64


def test_boxes_show_where_the_tokens_are() -> None:
    """A picture that is black but for one rectangle: the tokens that see it lie in it by their boxes."""
    pixels = np.zeros((400, 600, 3), np.uint8)
    pixels[110:330, 90:400] = 255
    model = model_of()
    batch = pixels_from_pictures([pixels], model)
    (layout,) = batch.layouts
    bright = batch.pixel_values.mean(1).reshape(-1, 4, PATCH, 4, PATCH).mean((2, 4)).reshape(-1) > -0.8  # black is -1.5
    start = 0
    for region in layout.regions:
        rows, columns = region.grid
        seen = bright[layout.source[start : start + region.tokens]].reshape(rows, columns)
        start += region.tokens
        assert seen.any()
        x = region.box.left + (np.arange(columns) + 0.5) * (region.box.right - region.box.left) / columns
        y = region.box.top + (np.arange(rows) + 0.5) * (region.box.bottom - region.box.top) / rows
        half_x, half_y = (
            (region.box.right - region.box.left) / columns / 2,
            (region.box.bottom - region.box.top) / rows / 2,
        )
        inside = ((y > 110) & (y < 330))[:, None] & ((x > 90) & (x < 400))[None]
        near = ((y > 110 - half_y) & (y < 330 + half_y))[:, None] & ((x > 90 - half_x) & (x < 400 + half_x))[None]
        assert inside.any() and not near.all()
        assert not (inside & ~seen).any()
        assert not (seen & ~near).any()
    mosaic = layout.regions[1]
    assert (mosaic.box.left, mosaic.box.right) == (0, 600)
    assert mosaic.box.top <= 0
    assert mosaic.box.bottom >= 400


def test_other_tile_sizes_than_the_crop() -> None:
    """A processor that scales its tiles: 64 pixels to 60, then the middle 56."""
    spec = ImageSpec(shortest_edge=60, crop=(SIDE, SIDE), mean=MEAN, std=STD)
    model = model_of()
    image = photograph("chelsea")
    changed = model.model_copy(update={"image": TiledImageSpec(tile=spec, pinpoints=PINPOINTS)})
    processor = LlavaNextImageProcessorPil(
        size={"shortest_edge": 60},
        crop_size={"height": SIDE, "width": SIDE},
        image_grid_pinpoints=[list(pair) for pair in PINPOINTS],
    )
    wanted = np.asarray(processor(image, return_tensors="np")["pixel_values"])[0]
    np.testing.assert_array_equal(pixels_from_pictures([image], changed).pixel_values, wanted)


def test_refusals() -> None:
    model = model_of()
    with pytest.raises(ImageError, match="there is no image"):
        pixels_from_pictures([], model)
    with pytest.raises(ImageError, match="more than 1,000"):
        pixels_from_pictures([photograph("coffee")], model, max_pixels=1000)
    spec = TiledImageSpec(tile=ImageSpec(mean=MEAN, std=STD), pinpoints=PINPOINTS)
    with pytest.raises(ImageError, match="does not say how large a tile is"):
        pixels_from_pictures([photograph("coffee")], model.model_copy(update={"image": spec}))
