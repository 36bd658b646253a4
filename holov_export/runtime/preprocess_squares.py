"""Pictures to squares of pixels: the arithmetic of Hugging Face's CLIP and LLaVA image processors.

Source: transformers 5.23 image_processing_backends.py (PilBackend) and image_transforms.py; tests compare bit by bit.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from PIL import Image

from holov_export.errors import ImageError
from holov_export.runtime.picture_reader import MAX_PIXELS, ImageSource, check_size, image_from
from holov_export.spec import ImageSpec, PatchImageSpec
from holov_export.tensors import CropBox, PixelBatch

FILTERS = {
    "nearest": Image.Resampling.NEAREST,
    "lanczos": Image.Resampling.LANCZOS,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "box": Image.Resampling.BOX,
    "hamming": Image.Resampling.HAMMING,
}
#: a resized picture above this is never made whole (a 1 x 9000 strip would be resized to 336 x 3,024,000)
_WHOLE_RESIZE_PIXELS = 64_000_000


def pixels_from_images(images: Sequence[ImageSource], spec: ImageSpec, *, max_pixels: int = MAX_PIXELS) -> PixelBatch:
    """Preprocess pictures as the model's own image processor would.

    Returns:
        float32 [B, 3, H, W] with the part of each upright original that it shows.

    Raises:
        ImageError: a picture is refused (see `image_from`), there is none, or they end up of different sizes.
    """
    if len(images) == 0:
        raise ImageError("there is no image.")
    table = normalisation_table(spec)
    planes, boxes, sizes = [], [], []
    for source in images:
        image = image_from(source, max_pixels=max_pixels)
        pixels, box = resized_and_cropped(image, spec, max_pixels)
        planes.append(planes_from_pixels(pixels, table))
        boxes.append(box)
        sizes.append(image.size)
    if len({plane.shape for plane in planes}) > 1:
        raise ImageError("the images have different sizes after preprocessing.", hint="Give them one at a time.")
    return PixelBatch(np.stack(planes), tuple(boxes), tuple(sizes))


def normalisation_table(spec: ImageSpec | PatchImageSpec) -> npt.NDArray[np.float32]:
    """[3, 256]: the normalised value of each level. Rounded where transformers rounds, so the bits are the same."""
    levels = (np.arange(256, dtype=np.float64) * spec.rescale_factor).astype(np.float32)
    mean, std = np.array(spec.mean, dtype=np.float32), np.array(spec.std, dtype=np.float32)
    table: npt.NDArray[np.float32] = (levels[None, :] - mean[:, None]) / std[:, None]
    return table


def planes_from_pixels(pixels: npt.NDArray[np.uint8], table: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """float32 [3, H, W], normalised, from uint8 [H, W, 3]."""
    return np.stack([table[channel][pixels[:, :, channel]] for channel in range(3)])


def resized_and_cropped(image: Image.Image, spec: ImageSpec, max_pixels: int) -> tuple[npt.NDArray[np.uint8], CropBox]:
    """uint8 [H, W, 3] and the part of `image` it shows."""
    pad_x = pad_y = 0
    if spec.pad_to_square and image.width != image.height:
        side = max(image.size)
        check_size(side, side, "the image padded to a square", max_pixels)
        pad_x, pad_y = (side - image.width) // 2, (side - image.height) // 2
        red, green, blue = (int(value * 255) for value in spec.mean)
        square = Image.new("RGB", (side, side), (red, green, blue))
        square.paste(image, (pad_x, pad_y))
        image = square
    width, height = _resized_size(image.width, image.height, spec)
    rows, columns = spec.crop or (height, width)
    # floor, also below zero: that is where transformers puts the padding of a picture smaller than the crop
    left, top = (width - columns) // 2, (height - rows) // 2
    pixels = _window(image, (width, height), (left, top, columns, rows), FILTERS[spec.resample])
    across, down = image.width / width, image.height / height
    box = CropBox(
        left * across - pad_x, top * down - pad_y, (left + columns) * across - pad_x, (top + rows) * down - pad_y
    )
    return pixels, box


def _resized_size(width: int, height: int, spec: ImageSpec) -> tuple[int, int]:
    """(width, height) after resizing. The longer side is truncated, not rounded, as in transformers."""
    if spec.resize_to is not None:
        return spec.resize_to[1], spec.resize_to[0]
    if spec.shortest_edge is None:
        return width, height
    short, long = min(width, height), max(width, height)
    other = int(spec.shortest_edge * long / short)
    return (spec.shortest_edge, other) if width <= height else (other, spec.shortest_edge)


def _window(
    image: Image.Image, size: tuple[int, int], window: tuple[int, int, int, int], resample: Image.Resampling
) -> npt.NDArray[np.uint8]:
    """uint8 [rows, columns, 3]: the window (left, top, columns, rows) of `image` resized to `size`, zero outside."""
    (width, height), (left, top, columns, rows) = size, window
    x0, y0, x1, y1 = max(left, 0), max(top, 0), min(left + columns, width), min(top + rows, height)
    if width * height <= _WHOLE_RESIZE_PIXELS:
        resized = image if image.size == size else image.resize(size, resample=resample)
        seen = np.asarray(resized)[y0:y1, x0:x1]
    else:  # the same samples, but Pillow keeps the box in float32: up to one level off
        across, down = image.width / width, image.height / height
        box = (x0 * across, y0 * down, min(x1 * across, image.width), min(y1 * down, image.height))
        seen = np.asarray(image.resize((x1 - x0, y1 - y0), resample=resample, box=box))
    pixels = np.zeros((rows, columns, 3), dtype=np.uint8)
    pixels[y0 - top : y1 - top, x0 - left : x1 - left] = seen
    return pixels
