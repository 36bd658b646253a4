"""How the N tokens of a grid, or of a picture of several grids, are divided into crops.

Plain numpy: the rules, the oracle, the runtime and the pictures share it.
"""

from __future__ import annotations

import numpy as np

from holov_export.policies import CropLayout, HolovOfficialPolicy, HolovPlusPolicy, HolovPolicy, SelectionPolicy
from holov_export.tensors import ImageLayout, Int64Array, Region


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


#: crops that a packed graph has room for, unless its policy asks for more: regions of a clip get one each up to here
MOST_CROPS = 64


def most_crops(policy: SelectionPolicy) -> int:
    """C of a packed graph: ids of crops are below it. The graph's work grows with it, so it is no number of tokens."""
    crops = policy.crops if isinstance(policy, HolovPolicy | HolovPlusPolicy | HolovOfficialPolicy) else 1
    return max(crops, MOST_CROPS)


def crops_of_layout(layout: ImageLayout, policy: SelectionPolicy, keep: int) -> Int64Array:
    """int64 [N]: the crop of each token of a picture or clip, 0, 1, ... without gaps, below `most_crops(policy)`.

    * holov, holov-plus: each region has its own crops, in proportion to its tokens and one at least; if there are more
      regions than crops, one each. Inside a region they are those of `crops_of_grid`.
    * holov-official: runs of the whole sequence, whatever its regions.
    * others: one crop.

    Args:
        layout: of the picture. policy: the rule.
        keep: tokens that will stay. No rule here asks for it; the published code for Qwen2.5-VL does, see
            `crops_of_official_qwen`.

    Source: obananas/HoloV llava/model/llava_arch.py@1d2e65e, one call over all tokens of LLaVA-NeXT (holov-official);
    the rest is this project's.
    """
    if isinstance(policy, HolovOfficialPolicy):
        return _runs(layout.tokens, policy.crops)
    if not isinstance(policy, HolovPolicy | HolovPlusPolicy):
        return np.zeros(layout.tokens, dtype=np.int64)
    # a thin picture of LLaVA-NeXT has no tokens of its tiles
    regions, most = tuple(region for region in layout.regions if region.tokens), most_crops(policy)
    if len(regions) > most:  # regions that follow each other share a crop
        return np.repeat(_runs(len(regions), most), [region.tokens for region in regions])
    parts, first = [], 0
    for region, crops in zip(regions, shares_of_regions(regions, policy.crops), strict=True):
        parts.append(_crops_of_region(region, crops, policy.layout) + first)
        first = int(parts[-1].max()) + 1
    return np.concatenate(parts)


def crops_of_official_qwen(tokens: int, keep: int) -> Int64Array:
    """int64 [tokens]: the crops of the published code for Qwen2.5-VL, whose number depends on how many tokens stay.

    max(1, int(1024/576 tokens / keep)) runs of the sequence; it is 16 where one of nine stays. More than `MOST_CROPS`
    (where less than 3% stays) or than tokens are not made: a packed graph has no room for them.

    Source: obananas/HoloV qwen-model-HoloV/modeling_qwen2_5_vl.py@1d2e65e.
    """
    return _runs(tokens, min(max(1, int((1024 / 576) * tokens / keep)), MOST_CROPS))


def shares_of_regions(regions: tuple[Region, ...], crops: int) -> tuple[int, ...]:
    """How many of the crops each region gets: by its tokens, one at least, the largest remainders rounded up.

    They sum to `crops`, or to the number of regions if that is more. Whole numbers only, so nothing hangs on rounding.
    """
    sizes = [region.tokens for region in regions]
    tokens, total = sum(sizes), max(crops, len(regions))
    shares = [max(1, total * size // tokens) for size in sizes]
    while (missing := total - sum(shares)) != 0:
        short = [total * size - share * tokens for size, share in zip(sizes, shares, strict=True)]
        if missing > 0:
            shares[short.index(max(short))] += 1
        else:
            spare = [index for index, share in enumerate(shares) if share > 1]
            shares[min(spare, key=lambda index: short[index])] -= 1
    return tuple(shares)


def crops_of_ids(ids: Int64Array) -> tuple[Int64Array, ...]:
    """The positions of each crop, by ascending id; negative ids have no crop."""
    return tuple(np.flatnonzero(ids == number).astype(np.int64) for number in np.unique(ids[ids >= 0]))


def _runs(tokens: int, crops: int) -> Int64Array:
    """int64 [tokens]: the number of the run that each is in; the first `tokens` % `crops` runs are one longer."""
    sizes = [len(part) for part in np.array_split(np.arange(tokens), crops)]
    return np.repeat(np.arange(crops, dtype=np.int64), sizes)


def _crops_of_region(region: Region, crops: int, layout: CropLayout) -> Int64Array:
    """int64 [tokens of the region]: 0, 1, ...; a CLS token in front is in the first crop."""
    rows, columns = region.grid
    found = np.zeros(rows * columns, dtype=np.int64)
    for number, members in enumerate(crops_of_grid(region.grid, crops, layout)):
        found[members] = number
    return np.concatenate([np.zeros(1, dtype=np.int64), found]) if region.cls else found
