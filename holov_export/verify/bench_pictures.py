"""The pictures that a benchmark measures on."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image

from holov_export.spec import ExportPlan
from holov_export.tensors import PixelBatch
from holov_export.verify.bench_engines import Contestant
from holov_export.verify.pictures import default_pictures, pixels_for

#: pixels of the longer side of pictures whose size decides: 576 tokens of Qwen2.5-VL where they are square, as many as
#: LLaVA-1.5 has, and all five views of LLaVA-NeXT
USUAL_SIDE = 672


def pixels_of(contestant: Contestant, batch: int, pictures: Sequence[Image.Image] = ()) -> PixelBatch:
    """B pictures as the bundle's graph takes them, over and over.

    Args:
        pictures: () for the default ones. Where a picture's size decides how many tokens it has, these are made
            `USUAL_SIDE` long.
    """
    plan = contestant.bundle.manifest.plan
    chosen = list(pictures) or usual_pictures(plan)
    return pixels_for(plan, [chosen[index % len(chosen)] for index in range(batch)])


def usual_pictures(plan: ExportPlan) -> list[Image.Image]:
    pictures = [picture for _, picture in default_pictures()]
    if plan.model.image.kind == "square":
        return pictures
    scales = [USUAL_SIDE / max(picture.size) for picture in pictures]
    return [
        picture.resize((round(picture.width * scale), round(picture.height * scale)))
        for picture, scale in zip(pictures, scales, strict=True)
    ]


def largest_of(pixels: PixelBatch) -> int | None:
    """Tokens of the largest picture of a batch; None where all have the model's N."""
    return max((layout.tokens for layout in pixels.layouts), default=None)
