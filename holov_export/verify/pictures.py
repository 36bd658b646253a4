"""Pictures to compare back ends on when the user names none: the demo scenes and two drawn ones."""

from __future__ import annotations

import numpy as np
from PIL import Image

from holov_export.assets import data_folder


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
