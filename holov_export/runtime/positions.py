"""Positions of three numbers (M-RoPE): where each token of a prompt lies in time, height and width.

A word has three equal numbers. The tokens of a picture or clip count from its first position on, along each axis by
itself, and the word behind it goes on after the longer side of its grid. Pruning changes none of this: what is kept,
and every word behind it, stay where they are in the unpruned prompt.

Source: transformers 5.23 models/qwen2_5_vl/modeling_qwen2_5_vl.py, Qwen2_5_VLModel.get_rope_index.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np

from holov_export.errors import PromptError
from holov_export.tensors import ImageLayout, ImageRows, Int64Array


def mrope_positions(
    ids: Sequence[int], visual: Sequence[ImageRows], placeholders: Collection[int], *, tokens_per_second: int
) -> tuple[Int64Array, int]:
    """The positions of a prompt in which the rows of pictures and clips have replaced their placeholders.

    Args:
        ids: of the prompt's tokens, one placeholder for each picture or clip.
        visual: their rows, in the order of the placeholders. A row whose position is -1 gets that of the picture's last
            token, one whose position is the number of tokens that of the word before the picture.
        placeholders: ids of images and of videos.
        tokens_per_second: distance of the temporal positions of two frames that are one second apart.

    Returns:
        (int64 [3, S], the position of the first new token).

    Raises:
        PromptError: a picture or clip without its layout, or a position that it does not have.
    """
    pictures = iter(visual)
    blocks: list[Int64Array] = []
    start, highest = 0, -1
    for token in ids:
        if token not in placeholders:
            blocks.append(np.full((3, 1), start, dtype=np.int64))
            highest = max(highest, start)
            start += 1
            continue
        item = next(pictures)
        if item.layout is None:
            raise PromptError("this language model needs to be told where in a picture each of its rows lies.")
        grid = _grid_positions(item.layout, tokens_per_second) + start
        blocks.append(_kept_positions(grid, item.positions, before=start - 1))
        highest = max(highest, int(grid.max()))
        start += max(max(region.grid) for region in item.layout.regions)
    together = np.concatenate(blocks, axis=1) if blocks else np.zeros((3, 0), dtype=np.int64)
    return together, highest + 1


def _grid_positions(layout: ImageLayout, tokens_per_second: int) -> Int64Array:
    """int64 [3, N]: of all tokens of a picture that begins at 0.

    The times of a clip are rounded down from float32, as transformers does it.
    """
    interval = np.float32(1)
    if layout.kind == "video":  # the first frame's distance to the one before means nothing
        interval = np.float32(tokens_per_second) * np.float32(layout.regions[-1].seconds)
    times = (np.arange(len(layout.regions), dtype=np.float32) * interval).astype(np.int64)
    parts = []
    for time, region in zip(times, layout.regions, strict=True):
        rows, columns = np.indices(region.grid, dtype=np.int64).reshape(2, -1)
        parts.append(np.stack([np.full_like(rows, time), rows, columns]))
    return np.concatenate(parts, axis=1)


def _kept_positions(grid: Int64Array, positions: Int64Array, *, before: int) -> Int64Array:
    """int64 [3, count] out of [3, N] and the word before."""
    tokens = grid.shape[1]
    if len(positions) and not -1 <= int(positions.min()) <= int(positions.max()) <= tokens:
        raise PromptError(f"a row has a position outside 0..{tokens - 1}, the tokens of its picture.")
    known = np.concatenate([grid, np.full((3, 1), before), grid[:, -1:]], axis=1)  # N is the word, -1 the last token
    return known[:, positions]
