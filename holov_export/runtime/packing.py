"""Pictures of unequal size become the inputs of a packed graph, and what the graph keeps becomes pictures again.

The graph decides for each row of its batch alone. A picture is one row. A clip is one row as well, or one for each of
its frames, which then get equal quotas; so that is decided here and not in the graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from holov_export.selection.geometry import crops_of_layout, crops_of_official_qwen
from holov_export.signature import (
    CROPS,
    PLACES,
    SOURCE,
    VIEW_ROWS,
    VIEW_SLOTS,
    WINDOW_ROWS,
    WINDOW_SLOTS,
)
from holov_export.spec import ExportPlan, QwenVisionSpec
from holov_export.tensors import ImageLayout, Int64Array, VisualTokens

#: how the quota of a clip is spent: the same number of tokens in each frame, or wherever the rule finds them
Spread = Literal["frames", "clip"]
SPREADS: tuple[Spread, ...] = ("frames", "clip")


@dataclass(frozen=True)
class NamedArray:
    """One input of a graph."""

    name: str
    values: npt.NDArray[np.generic]


@dataclass(frozen=True)
class GraphRow:
    """A row of the graph's batch: some tokens of one picture.

    Attributes:
        image: index in the batch of pictures. start: its first token among that picture's.
        layout: of the row's own tokens; `source` counts from the first row of the picture.
        quota: tokens wanted, 1..N of the row.
    """

    image: int
    start: int
    layout: ImageLayout
    quota: int


@dataclass(frozen=True)
class PackedInputs:
    """What a packed graph is fed, besides the pixels.

    Attributes:
        arrays: the further inputs, without budget and quota.
        rows: what each row of the graph's batch is.
    """

    arrays: tuple[NamedArray, ...]
    rows: tuple[GraphRow, ...]

    @property
    def quota(self) -> Int64Array:
        """int64 [rows]"""
        return np.array([row.quota for row in self.rows], dtype=np.int64)

    @property
    def budget(self) -> int:
        return int(self.quota.max())

    @property
    def crops(self) -> tuple[Int64Array, ...]:
        """int64 [tokens of the row] of each row: the crop of each token."""
        (table,) = (array.values for array in self.arrays if array.name == CROPS)
        return tuple(ids[: row.layout.tokens].astype(np.int64) for ids, row in zip(table, self.rows, strict=True))


def packed_inputs(
    layouts: Sequence[ImageLayout], plan: ExportPlan, quota: Int64Array, spread: Spread = "frames"
) -> PackedInputs:
    """The inputs of the graph of `plan` for pictures and clips.

    Args:
        layouts: of the pictures, in the order of their pixels.
        quota: int64 [B], tokens wanted of each picture; more than it has means all.
        spread: of clips.
    """
    spread = spread if plan.policy.spreads else "clip"
    rows = tuple(
        row
        for image, layout in enumerate(layouts)
        for row in _rows_of(image, layout, min(int(quota[image]), layout.tokens), spread)
    )
    arrays = [*_patch_arrays(layouts, plan.model.vision)] if isinstance(plan.model.vision, QwenVisionSpec) else []
    first = np.cumsum([0, *(layout.tower_rows for layout in layouts)])
    source = _padded([row.layout.source + first[row.image] for row in rows])
    crops = _padded([_crops(row, plan) for row in rows])
    return PackedInputs((*arrays, NamedArray(SOURCE, source), NamedArray(CROPS, crops)), rows)


def _crops(row: GraphRow, plan: ExportPlan) -> Int64Array:
    if plan.start_counts:  # what is pruned is the word before the picture and all tokens but the last, which stays
        return crops_of_official_qwen(row.layout.tokens, max(1, row.quota - 1))
    return crops_of_layout(row.layout, plan.policy, row.quota)


def _rows_of(image: int, layout: ImageLayout, quota: int, spread: Spread) -> list[GraphRow]:
    """One row, or one for each region of a clip that gets a token; the quotas add up to `quota`."""
    if layout.kind == "image" or spread == "clip" or len(layout.regions) == 1:
        return [GraphRow(image, 0, layout, quota)]
    rows, start, count = [], 0, len(layout.regions)
    for index, region in enumerate(layout.regions):
        share = (index + 1) * quota // count - index * quota // count
        if share:
            few = slice(start, start + region.tokens)
            part = ImageLayout(
                kind=layout.kind,
                rows=layout.rows,
                tower_rows=layout.tower_rows,
                source=layout.source[few],
                regions=(region,),
                places=layout.places,
                windows=layout.windows,
            )
            rows.append(GraphRow(image, start, part, share))
        start += region.tokens
    return rows


def _patch_arrays(layouts: Sequence[ImageLayout], vision: QwenVisionSpec) -> list[NamedArray]:
    """How the patches of all pictures come together in windows and in views; see `signature.patches_signature`."""
    windows = np.concatenate([layout.windows for layout in layouts])
    views = np.array([_view_patches(region.tokens, vision) for layout in layouts for region in layout.regions])
    window_rows, window_slots = _groups(windows, vision.window_patches)
    view_rows, view_slots = _groups(views, int(views.max()))
    return [
        NamedArray(PLACES, np.concatenate([layout.places for layout in layouts])),
        NamedArray(WINDOW_ROWS, window_rows),
        NamedArray(WINDOW_SLOTS, window_slots),
        NamedArray(VIEW_ROWS, view_rows),
        NamedArray(VIEW_SLOTS, view_slots),
    ]


def _view_patches(tokens: int, vision: QwenVisionSpec) -> int:
    return tokens * vision.unit


def _groups(sizes: npt.NDArray[np.integer], width: int) -> tuple[Int64Array, Int64Array]:
    """(int64 [groups, width], -1 where a group has fewer; int64 [sum of sizes], each member's place in it)."""
    column = np.arange(width, dtype=np.int64)
    filled = column < sizes[:, None]
    table = np.full(filled.shape, -1, dtype=np.int64)
    table[filled] = np.arange(int(sizes.sum()), dtype=np.int64)
    return table, np.flatnonzero(filled).astype(np.int64)


def _padded(rows: Sequence[Int64Array]) -> Int64Array:
    """int64 [rows, longest], -1 behind the end of each."""
    made = np.full((len(rows), max(len(row) for row in rows)), -1, dtype=np.int64)
    for index, row in enumerate(rows):
        made[index, : len(row)] = row
    return made


def pictures_from_rows(seen: VisualTokens, packed: PackedInputs, layouts: Sequence[ImageLayout]) -> VisualTokens:
    """What the graph returned for its rows, put together for each picture.

    Returns:
        tokens [B, K, D] with K the largest count, positions among each picture's own tokens, saliency [B, N] (-1 behind
        a picture's last token) if the graph gave any. A position that is none of the row's own tokens stays what it is.
    """
    kept: list[list[int]] = [[] for _ in layouts]
    for index, row in enumerate(packed.rows):
        kept[row.image].append(index)
    counts = np.array([sum(int(seen.counts[index]) for index in rows) for rows in kept], dtype=np.int64)
    tokens = np.zeros((len(layouts), int(counts.max()), seen.tokens.shape[2]), dtype=seen.tokens.dtype)
    positions = np.full(tokens.shape[:2], -1, dtype=np.int64)
    saliency = None if seen.saliency is None else np.full((len(layouts), _longest(layouts)), -1.0, dtype=np.float32)
    for image, rows in enumerate(kept):
        at = 0
        for index in rows:
            row, count = packed.rows[index], int(seen.counts[index])
            tokens[image, at : at + count] = seen.tokens[index, :count]
            found = seen.positions[index, :count]
            positions[image, at : at + count] = np.where(found >= 0, found + row.start, -1)
            if saliency is not None and seen.saliency is not None:
                few = slice(row.start, row.start + row.layout.tokens)
                saliency[image, few] = seen.saliency[index, : row.layout.tokens]
            at += count
    return VisualTokens(tokens, positions, counts, saliency)


def _longest(layouts: Sequence[ImageLayout]) -> int:
    return max(layout.tokens for layout in layouts)
