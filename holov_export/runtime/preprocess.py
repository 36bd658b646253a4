"""Pictures to pixels, for every family: what a picture becomes is the `kind` of the model's image part."""

from __future__ import annotations

from collections.abc import Sequence

from holov_export.runtime.picture_reader import FORMATS, MAX_PIXELS, ImageSource, image_from
from holov_export.runtime.preprocess_patches import patch_specs, pixels_in_patches
from holov_export.runtime.preprocess_squares import FILTERS, pixels_from_images
from holov_export.runtime.preprocess_tiles import pixels_in_tiles
from holov_export.spec import ImageSpec, ModelSpec, TiledImageSpec
from holov_export.tensors import PixelBatch

__all__ = [
    "FILTERS",
    "FORMATS",
    "MAX_PIXELS",
    "ImageSource",
    "image_from",
    "pixels_from_images",
    "pixels_from_pictures",
]


def pixels_from_pictures(
    images: Sequence[ImageSource], model: ModelSpec, *, max_pixels: int = MAX_PIXELS
) -> PixelBatch:
    """Preprocess pictures as the model's own image processor would.

    The processors with Pillow back ends are meant, and every bit is theirs. transformers takes those with torchvision
    back ends where torchvision is installed: their values differ by a level of 255, in LLaVA-NeXT by two, at one value
    in 250 (measured with torchvision 0.28 on three photographs).

    Args:
        max_pixels: refuse larger pictures, before anything is decoded.

    Returns:
        float32 [B, 3, H, W] for squares; else those of one picture after another, with a layout of each:
        [V, 3, H, W] for tiles, [P, values of a patch] for patches.

    Raises:
        ImageError: a picture is refused, or there is none.
    """
    if isinstance(model.image, ImageSpec):
        return pixels_from_images(images, model.image, max_pixels=max_pixels)
    if isinstance(model.image, TiledImageSpec):
        return pixels_in_tiles(images, model.image, model.clip, max_pixels=max_pixels)
    return pixels_in_patches(images, *patch_specs(model), max_pixels=max_pixels)
