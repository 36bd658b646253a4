"""Pictures to patches in the order of the tower's windows (Qwen2.5-VL).

The numbers of a patch are channel, frame, row, column; `temporal` frames share a patch, and a picture is its frame as
often. Four patches (`merge` x `merge`) are a token and stay together.

Source: transformers 5.23 image_processing_pil_qwen2_vl.py (smart_resize, patchify) and vision_utils.py
(get_vision_window_index, get_vision_position_ids); tests compare bit by bit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt
from PIL import Image

from holov_export.errors import ImageError
from holov_export.runtime.picture_reader import MAX_PIXELS, ImageSource, image_from
from holov_export.runtime.preprocess_squares import FILTERS, normalisation_table, planes_from_pixels
from holov_export.spec import ModelSpec, PatchImageSpec, QwenVisionSpec
from holov_export.tensors import CropBox, ImageLayout, Int64Array, PixelBatch, Region

#: a picture whose sides differ by more is refused. Source: smart_resize
MAX_ASPECT_RATIO = 200


def patch_specs(model: ModelSpec) -> tuple[PatchImageSpec, QwenVisionSpec]:
    """The two parts of a model that reads patches; `ModelSpec` sees to it that they come together."""
    assert isinstance(model.image, PatchImageSpec) and isinstance(model.vision, QwenVisionSpec)
    return model.image, model.vision


def pixels_in_patches(
    images: Sequence[ImageSource], spec: PatchImageSpec, vision: QwenVisionSpec, *, max_pixels: int = MAX_PIXELS
) -> PixelBatch:
    """Preprocess pictures, each at a size of its own.

    Returns:
        float32 [P, values of a patch], and the layouts. The rows of the tower are the tokens.

    Raises:
        ImageError: a picture is refused (see `image_from`), its sides differ by more than 200 times, or there is none.
    """
    if len(images) == 0:
        raise ImageError("there is no image.")
    table = normalisation_table(spec)
    pixels, boxes, sizes, layouts = [], [], [], []
    for source in images:
        image = image_from(source, max_pixels=max_pixels)
        size = patch_size_of(image.size, spec, (spec.min_pixels, spec.max_pixels))
        rows, columns = size[1] // spec.token_pixels, size[0] // spec.token_pixels
        box = CropBox(0, 0, *image.size)
        order, _ = window_order(rows, columns, vision)
        frames = [resized_planes(image, size, spec, table)] * spec.temporal
        pixels.append(patches_from_frames(frames, spec, order))
        boxes.append(box)
        sizes.append(image.size)
        layouts.append(patch_layout("image", (Region((rows, columns), box),), vision))
    return PixelBatch(np.concatenate(pixels), tuple(boxes), tuple(sizes), tuple(layouts))


def patch_size_of(size: tuple[int, int], spec: PatchImageSpec, area: tuple[int, int]) -> tuple[int, int]:
    """(width, height) that a picture of `size` is resized to: multiples of a token's pixels, area between the bounds.

    Args:
        area: (smallest, largest) in pixels.

    Raises:
        ImageError: one side is more than 200 times the other.
    """
    width, height = size
    if max(size) / min(size) > MAX_ASPECT_RATIO:
        raise ImageError(
            f"the image is too thin: {width} x {height} pixels.",
            hint=f"This model takes sides that differ by {MAX_ASPECT_RATIO} times at most; cut it into pieces.",
        )
    unit = spec.token_pixels
    least, most = area
    across, down = round(width / unit) * unit, round(height / unit) * unit
    if across * down > most:
        shrink = math.sqrt(height * width / most)
        return max(unit, math.floor(width / shrink / unit) * unit), max(unit, math.floor(height / shrink / unit) * unit)
    if across * down < least:
        grow = math.sqrt(least / (height * width))
        return math.ceil(width * grow / unit) * unit, math.ceil(height * grow / unit) * unit
    return across, down


def resized_planes(
    image: Image.Image, size: tuple[int, int], spec: PatchImageSpec, table: npt.NDArray[np.float32]
) -> npt.NDArray[np.float32]:
    """float32 [3, H, W]: the picture at `size` (width, height), normalised."""
    return planes_from_pixels(np.asarray(image.resize(size, resample=FILTERS[spec.resample])), table)


def patches_from_frames(
    frames: Sequence[npt.NDArray[np.float32]], spec: PatchImageSpec, order: Int64Array
) -> npt.NDArray[np.float32]:
    """float32 [P, values of a patch] from `temporal` frames [3, H, W]; tokens in the given order."""
    stacked = np.stack(frames)
    count, channels, height, width = stacked.shape
    side, merge = spec.patch_size, spec.merge
    down, across = height // spec.token_pixels, width // spec.token_pixels
    split = stacked.reshape(count, channels, down, merge, side, across, merge, side)
    # (row and column of the token, of the patch in it, channel, frame, row and column in the patch)
    tokens = split.transpose(2, 5, 3, 6, 1, 0, 4, 7).reshape(down * across, merge * merge, -1)
    patches: npt.NDArray[np.float32] = tokens[order].reshape(down * across * merge * merge, -1)
    return patches


def window_order(rows: int, columns: int, vision: QwenVisionSpec) -> tuple[Int64Array, Int64Array]:
    """How the tokens of one view follow each other: window after window, raster order in each.

    Returns:
        (int64 [rows * columns], the raster numbers in that order; int64 [windows], patches of each window).
    """
    side = vision.window_size // (vision.patch_size * vision.merge)
    raster = np.arange(rows * columns, dtype=np.int64).reshape(rows, columns)
    windows = [
        raster[top : top + side, left : left + side].reshape(-1)
        for top in range(0, rows, side)
        for left in range(0, columns, side)
    ]
    return np.concatenate(windows), np.array([len(window) for window in windows], dtype=np.int64) * vision.unit


def patch_layout(kind: Literal["image", "video"], regions: tuple[Region, ...], vision: QwenVisionSpec) -> ImageLayout:
    """The layout of views that all have the same grid: a picture, or the pairs of frames of a clip."""
    rows, columns = regions[0].grid
    order, windows = window_order(rows, columns, vision)
    tokens, views, merge = rows * columns, len(regions), vision.merge
    slots = np.empty(tokens, dtype=np.int64)
    slots[order] = np.arange(tokens, dtype=np.int64)
    row, column = (np.repeat(part * merge, vision.unit) for part in (order // columns, order % columns))
    inner = np.tile(np.arange(vision.unit, dtype=np.int64), tokens)
    places = np.stack([row + inner // merge, column + inner % merge], axis=1)
    first = np.arange(views, dtype=np.int64)[:, None] * tokens
    return ImageLayout(
        kind=kind,
        rows=views * tokens * vision.unit,
        tower_rows=views * tokens,
        source=(first + slots).reshape(-1),
        regions=regions,
        places=np.tile(places, (views, 1)),
        windows=np.tile(windows, views),
    )
