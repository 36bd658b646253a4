"""Pictures to compare back ends on when the user names none: the demo scenes and two drawn ones."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image

from holov_export.assets import data_folder
from holov_export.runtime.preprocess import pixels_from_pictures
from holov_export.runtime.preprocess_video import pixels_from_videos
from holov_export.spec import ExportPlan
from holov_export.tensors import PixelBatch


def default_pictures() -> list[tuple[str, Image.Image]]:
    """(name, RGB picture): every demo scene, a wide gradient and seeded noise, so that shapes and contents differ."""
    pictures = [
        (path.name, Image.open(path).convert("RGB")) for path in sorted(data_folder("demo-scenes").glob("*.png"))
    ]
    down, across = np.mgrid[0:240, 0:360].astype(np.float32)
    waves = np.stack([across / 360, down / 240, np.sin(across / 17) * np.cos(down / 11) / 2 + 0.5], axis=-1)
    noise = np.random.default_rng(0).integers(0, 256, (300, 200, 3), dtype=np.uint8)
    pictures.append(("drawn waves", Image.fromarray((waves * 255).astype(np.uint8))))
    pictures.append(("drawn noise", Image.fromarray(noise)))
    return pictures


def pixels_for(plan: ExportPlan, pictures: Sequence[Image.Image]) -> PixelBatch:
    """The pictures, or clips that are made of them, as the plan's graph takes them."""
    if plan.part == "image":
        return pixels_from_pictures(pictures, plan.model)
    return pixels_from_videos([clip_of(picture) for picture in pictures], plan.model)


def clip_of(picture: Image.Image) -> list[Image.Image]:
    """Two frames: the picture, and the same turned."""
    return [picture, picture.rotate(90)]
