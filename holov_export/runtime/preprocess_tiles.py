"""Pictures to tiles (LLaVA-NeXT): each made small to a square, then tile by tile at one of several resolutions.

Source: transformers 5.23 image_processing_pil_llava_next.py, image_processing_utils.py (select_best_resolution,
get_patch_output_size) and modeling_llava_next.py (pack_image_features, unpad_image); tests compare bit by bit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image

from holov_export.errors import ImageError
from holov_export.runtime.picture_reader import MAX_PIXELS, ImageSource, image_from
from holov_export.runtime.preprocess_squares import (
    FILTERS,
    normalisation_table,
    planes_from_pixels,
    resized_and_cropped,
)
from holov_export.spec import ImageSpec, TiledImageSpec, VisionSpec
from holov_export.tensors import CropBox, ImageLayout, Int64Array, PixelBatch, Region


def pixels_in_tiles(
    images: Sequence[ImageSource], spec: TiledImageSpec, vision: VisionSpec, *, max_pixels: int = MAX_PIXELS
) -> PixelBatch:
    """Preprocess pictures: of each the whole one first, then its tiles row by row.

    The tokens of a picture are those of the whole one, then the mosaic of its tiles without the rows or columns that
    show padding alone. So thin a picture (1 x 500) leaves no column of the mosaic; its region has tokens of the grid
    (rows, 0), and a newline for each row, as in transformers.

    Returns:
        float32 [V, 3, H, W], and the layouts. The rows of the tower are V times N of a tile, without CLS.

    Raises:
        ImageError: a picture is refused (see `image_from`), or there is none.
    """
    if len(images) == 0:
        raise ImageError("there is no image.")
    table = normalisation_table(spec.tile)
    planes, boxes, sizes, layouts = [], [], [], []
    for source in images:
        image = image_from(source, max_pixels=max_pixels)
        target = _resolution(image.size, spec.pinpoints)
        views = _views(image, target, spec)
        planes += [planes_from_pixels(resized_and_cropped(view, spec.tile, max_pixels)[0], table) for view in views]
        boxes.append(CropBox(0, 0, *image.size))
        sizes.append(image.size)
        layouts.append(_layout(image.size, target, len(views), vision))
    return PixelBatch(np.stack(planes), tuple(boxes), tuple(sizes), tuple(layouts))


def _resolution(size: tuple[int, int], pinpoints: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """(height, width) of the canvas that a picture of `size` (width, height) is laid on.

    The one that shows most of its pixels; of several the smallest, of equal ones the first.
    """
    width, height = size
    best, most, least = pinpoints[0], 0, math.inf
    for rows, columns in pinpoints:
        scale = min(columns / width, rows / height)
        shown = min(int(width * scale) * int(height * scale), width * height)
        wasted = rows * columns - shown
        if shown > most or (shown == most and wasted < least):
            best, most, least = (rows, columns), shown, wasted
    return best


def _scaled(size: tuple[int, int], target: tuple[int, int]) -> tuple[int, int]:
    """(width, height) of the picture on its canvas (height, width)."""
    (width, height), (rows, columns) = size, target
    across, down = columns / width, rows / height
    if across < down:
        return columns, min(math.ceil(height * across), rows)
    return min(math.ceil(width * down), columns), rows


def _views(image: Image.Image, target: tuple[int, int], spec: TiledImageSpec) -> list[Image.Image]:
    """The whole picture pressed into a square, and the tiles of its canvas, which is black around it."""
    resample = FILTERS[spec.tile.resample]
    rows, columns = target
    height, width = _whole_size(spec.tile)
    side = spec.tile.crop[0] if spec.tile.crop is not None else height
    scaled = image.resize(_scaled(image.size, target), resample=resample)
    canvas = Image.new("RGB", (columns, rows))
    canvas.paste(scaled, ((columns - scaled.width) // 2, (rows - scaled.height) // 2))
    tiles = [
        canvas.crop((left, top, left + side, top + side))
        for top in range(0, rows, side)
        for left in range(0, columns, side)
    ]
    return [image.resize((width, height), resample=resample), *tiles]


def _whole_size(tile: ImageSpec) -> tuple[int, int]:
    """(height, width) that a whole picture is pressed into, whatever its aspect ratio."""
    if tile.resize_to is not None:
        return tile.resize_to
    if tile.shortest_edge is None:
        raise ImageError("the model does not say how large a tile is.", hint="Export the bundle again.")
    return tile.shortest_edge, tile.shortest_edge


def _layout(size: tuple[int, int], target: tuple[int, int], views: int, vision: VisionSpec) -> ImageLayout:
    rows, columns = vision.grid
    down, across = target[0] // vision.image_size, target[1] // vision.image_size
    top, left, height, width = _unpadded(size, (down * rows, across * columns))
    mosaic = _mosaic_rows(vision, down, across)[top : top + height, left : left + width]
    box = _mosaic_box(size, target, (top, left, height, width), vision.patch_size)
    return ImageLayout(
        kind="image",
        rows=views,
        tower_rows=views * vision.tokens,
        source=np.concatenate([np.arange(vision.tokens, dtype=np.int64), mosaic.reshape(-1)]),
        regions=(Region(vision.grid, CropBox(0, 0, *size)), Region((height, width), box, newlines=True)),
        places=np.zeros((0, 2), dtype=np.int64),
        windows=np.zeros(0, dtype=np.int64),
    )


def _mosaic_rows(vision: VisionSpec, down: int, across: int) -> Int64Array:
    """int64 [rows, columns] of the mosaic of `down` x `across` tiles: the row of the tower of each token."""
    rows, columns = vision.grid
    row = np.arange(down * rows, dtype=np.int64)[:, None]
    column = np.arange(across * columns, dtype=np.int64)[None]
    tile = 1 + row // rows * across + column // columns  # tile 0 is the whole picture
    found: Int64Array = tile * vision.tokens + row % rows * columns + column % columns
    return found


def _unpadded(size: tuple[int, int], grid: tuple[int, int]) -> tuple[int, int, int, int]:
    """(top, left, rows, columns) of the mosaic's tokens that stay: as many are taken off at both ends."""
    (width, height), (rows, columns) = size, grid
    if width / height > columns / rows:
        off = (rows - int(round(height * (columns / width), 7))) // 2
        return off, 0, rows - 2 * off, columns
    off = (columns - int(round(width * (rows / height), 7))) // 2
    return 0, off, rows, columns - 2 * off


def _mosaic_box(size: tuple[int, int], target: tuple[int, int], kept: tuple[int, int, int, int], patch: int) -> CropBox:
    """What the kept tokens (top, left, rows, columns) show of a picture of `size` (width, height)."""
    wide, tall = _scaled(size, target)
    across, down = size[0] / wide, size[1] / tall
    x, y = kept[1] * patch - (target[1] - wide) // 2, kept[0] * patch - (target[0] - tall) // 2
    return CropBox(x * across, y * down, (x + kept[3] * patch) * across, (y + kept[2] * patch) * down)
