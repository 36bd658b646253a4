"""How the N tokens of a grid are divided into crops. Plain numpy: the rules, the oracle and the pictures share it."""

from __future__ import annotations

import numpy as np

from holov_export.policies import CropLayout
from holov_export.tensors import Int64Array


def crops_of_grid(grid: tuple[int, int], crops: int, layout: CropLayout) -> tuple[Int64Array, ...]:
    """Raster positions of each crop, ascending inside a crop. Empty crops are left out.

    Args:
        grid: (rows, columns) of tokens.
        crops: C, how many crops are wanted.
        layout: STRIPS cuts the raster order into C runs, the first N % C of them one longer (as the published code
            does); TILES cuts the grid into rectangles, as square as C allows.

    Source: obananas/HoloV llava/model/utils.py@1d2e65e (strips); arXiv 2510.02912 figure 7 (tiles).
    """
    rows, columns = grid
    raster = np.arange(rows * columns, dtype=np.int64)
    if layout is CropLayout.STRIPS:
        parts = np.array_split(raster, crops)
    else:
        down, across = tiles_of(crops, grid)
        square = raster.reshape(rows, columns)
        parts = [
            tile.reshape(-1) for band in np.array_split(square, down, 0) for tile in np.array_split(band, across, 1)
        ]
    return tuple(part for part in parts if part.size)


def tiles_of(crops: int, grid: tuple[int, int]) -> tuple[int, int]:
    """(tiles down, tiles across) with down * across = crops, the tiles as square as possible."""
    rows, columns = grid
    pairs = [(down, crops // down) for down in range(1, crops + 1) if crops % down == 0]
    return min(pairs, key=lambda pair: abs(rows / pair[0] - columns / pair[1]))
