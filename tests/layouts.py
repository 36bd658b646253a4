"""Layouts of pictures and clips as the decoders' tests need them: grids of tokens, nothing of their pixels."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from holov_export.tensors import CropBox, ImageLayout, ImageRows, Region

_BOX = CropBox(0.0, 0.0, 1.0, 1.0)


def layout_of(regions: Sequence[Region], kind: str = "image") -> ImageLayout:
    """A layout of these regions."""
    tokens = sum(region.tokens for region in regions)
    empty = np.zeros(0, np.int64)
    return ImageLayout(
        kind="video" if kind == "video" else "image",
        rows=tokens,
        tower_rows=tokens,
        source=np.arange(tokens, dtype=np.int64),
        regions=tuple(regions),
        places=np.zeros((0, 2), np.int64),
        windows=empty,
    )


def grid_layout(rows: int, columns: int) -> ImageLayout:
    """A picture of one rectangle."""
    return layout_of([Region((rows, columns), _BOX)])


def clip_layout(frames: int, rows: int, columns: int, seconds: float) -> ImageLayout:
    """A clip whose frames are `seconds` apart; the distance of the first one to nothing is 0."""
    regions = [
        Region((rows, columns), _BOX, frame=2 * index, seconds=seconds if index else 0.0) for index in range(frames)
    ]
    return layout_of(regions, "video")


def tiles_layout(base: tuple[int, int], mosaic: tuple[int, int]) -> ImageLayout:
    """LLaVA-NeXT: the whole picture, then its tiles with newlines."""
    return layout_of([Region(base, _BOX), Region(mosaic, _BOX, newlines=True)])


def kept_rows(layout: ImageLayout, rows: np.ndarray, positions: Sequence[int] | np.ndarray) -> ImageRows:
    """The rows [N, D] of a picture at some positions."""
    kept = np.asarray(positions, dtype=np.int64)
    return ImageRows(rows[kept], kept, layout)


def all_rows(layout: ImageLayout, rows: np.ndarray) -> ImageRows:
    """All rows of a picture."""
    assert len(rows) == layout.tokens
    return ImageRows(rows, np.arange(layout.tokens, dtype=np.int64), layout)
