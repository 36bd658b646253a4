"""The pictures that engines are compared on: both interpreters make the same ones of the package's own data."""

from __future__ import annotations

import math

from PIL import Image

from holov_export.bundle import Bundle
from holov_export.runtime.preprocess_video import pixels_from_videos
from holov_export.tensors import PixelBatch
from holov_export.verify.pictures import default_pictures, pixels_for

#: pixels of a picture where its size decides its tokens: 1225 of Qwen2.5-VL, below the 1280 of an engine
AREA = 980**2
#: (width, height) of what is tried besides: thin, tiny, and each way up
SIZES = ((980, 980), (1500, 90), (90, 1500), (60, 45), (1200, 700), (700, 1200))
#: frames of a clip: what Video-LLaVA sees
FRAMES = 8


def pictures(count: int, *, large: bool = False) -> list[Image.Image]:
    """`count` different pictures: the default ones, then turned ones; `large` ones have AREA pixels."""
    known = [picture for _, picture in default_pictures()]
    made = [known[index % len(known)].rotate(90 * (index // len(known)), expand=True) for index in range(count)]
    return [_of_area(picture) for picture in made] if large else made


def pixels_of(bundle: Bundle, count: int) -> PixelBatch:
    """`count` pictures, or clips of them, as the bundle's graph sees them; of packed graphs all about as large."""
    if not bundle.manifest.plan.packed:
        return pixels_for(bundle.manifest.plan, pictures(count))
    return _batch(bundle, pictures(count, large=True))


def odd_pixels(bundle: Bundle) -> PixelBatch:
    """Pictures of all shapes for a packed graph; clips are all alike."""
    known = pictures(len(SIZES))
    return _batch(bundle, [picture.resize(size) for picture, size in zip(known, SIZES, strict=True)])


def _batch(bundle: Bundle, made: list[Image.Image]) -> PixelBatch:
    plan = bundle.manifest.plan
    if plan.part == "image":
        return pixels_for(plan, made)
    return pixels_from_videos([[picture.rotate(5 * step) for step in range(FRAMES)] for picture in made], plan.model)


def _of_area(picture: Image.Image) -> Image.Image:
    scale = math.sqrt(AREA / (picture.width * picture.height))
    return picture.resize((round(picture.width * scale), round(picture.height * scale)))
