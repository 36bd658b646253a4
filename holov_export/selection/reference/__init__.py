"""The oracle: every selection rule once more, for one picture, in plain numpy loops that follow the sources.

Nothing here is fast, nothing here is exported. The torch rules, the ONNX graphs and the engines are compared with it.
"""

from __future__ import annotations

import numpy as np

from holov_export.policies import (
    CdprunerUnconditionalPolicy,
    ClsTopkPolicy,
    CropLayout,
    DartPolicy,
    DivprunePolicy,
    HolovOfficialPolicy,
    HolovPaperPolicy,
    HolovPlusPolicy,
    HolovPolicy,
    NoSelection,
    RandomPolicy,
    ScopePolicy,
    SelectionPolicy,
    UniformPolicy,
    VisionzipPolicy,
)
from holov_export.selection.geometry import crops_of_grid, crops_of_ids
from holov_export.selection.reference.arrays import EPSILON, Features, Saliency, descending, unit_rows
from holov_export.selection.reference.baselines import random_order, uniform_positions
from holov_export.selection.reference.dart import dart_order
from holov_export.selection.reference.greedy import DPP_FLOOR, divprune_order, dpp_order, scope_order
from holov_export.selection.reference.holov import (
    ALPHA,
    SCALE,
    holov_official_positions,
    holov_paper_positions,
    holov_positions,
    official_quotas,
    paper_quotas,
    paper_weights,
)
from holov_export.selection.reference.holov_plus import holov_plus_positions
from holov_export.selection.reference.merging import contextual_rows, visionzip_rows
from holov_export.selection.reference.official_qwen import official_qwen_positions
from holov_export.tensors import Int64Array

__all__ = [
    "ALPHA",
    "DPP_FLOOR",
    "EPSILON",
    "SCALE",
    "Features",
    "Saliency",
    "contextual_rows",
    "dart_order",
    "divprune_order",
    "dpp_order",
    "merged_of",
    "official_quotas",
    "official_qwen_positions",
    "paper_quotas",
    "paper_weights",
    "positions_of",
    "random_order",
    "scope_order",
    "uniform_positions",
    "unit_rows",
]


def positions_of(
    policy: SelectionPolicy,
    saliency: Saliency,
    quota: int,
    grid: tuple[int, int] | None = None,
    features: Features | None = None,
    crops: Int64Array | None = None,
    tokens: int | None = None,
) -> Int64Array:
    """Kept positions of one picture in the order of the output rows, as long as its count; -1 is a zero row.

    Args:
        policy: the rule and its settings.
        saliency: float32 [N], CLS attention of the feature layer, mean over heads; negative for tokens that an earlier
            cut took away, which only rules that reselect know.
        quota: tokens wanted, 1..N.
        grid: (rows, columns), for rules with crops that are not given.
        features: float32 [N, D], what the policy says that it reads; only for rules that read any.
        crops: int64 [N], the crop of each token; None for those of the grid.
        tokens: of the largest picture, which `random` draws from; None for N.
    """
    if isinstance(policy, HolovPolicy):
        return holov_positions(saliency, quota, _crops(policy, grid, policy.layout, crops))
    if isinstance(policy, HolovOfficialPolicy):
        return holov_official_positions(saliency, quota, _crops(policy, grid, CropLayout.STRIPS, crops))
    if isinstance(policy, HolovPaperPolicy):
        parts = _crops(policy, grid, policy.layout, crops)
        return holov_paper_positions(policy, saliency, _needed(policy, features), quota, parts)
    if isinstance(policy, HolovPlusPolicy):
        parts = _crops(policy, grid, policy.layout, crops)
        return holov_plus_positions(saliency, _needed(policy, features), quota, parts)
    if isinstance(policy, ScopePolicy):
        return np.sort(scope_order(policy, saliency, _needed(policy, features), quota))
    if isinstance(policy, DivprunePolicy):
        return np.sort(divprune_order(saliency, _needed(policy, features), quota))
    if isinstance(policy, CdprunerUnconditionalPolicy):
        return np.sort(dpp_order(saliency, _needed(policy, features), quota))
    if isinstance(policy, DartPolicy):
        return np.sort(dart_order(policy, saliency, _needed(policy, features), quota))
    if isinstance(policy, VisionzipPolicy):
        return visionzip_rows(policy, saliency, _needed(policy, features), quota).positions
    if isinstance(policy, ClsTopkPolicy):
        return np.sort(descending(saliency)[:quota])
    if isinstance(policy, UniformPolicy):
        return uniform_positions(len(saliency), quota)
    if isinstance(policy, NoSelection):
        return np.arange(quota, dtype=np.int64)
    if isinstance(policy, RandomPolicy):
        order = random_order(policy, tokens or len(saliency))
        return np.sort(order[order < len(saliency)][:quota])
    raise ValueError(f"'{policy.method}' has no reference")


def merged_of(policy: SelectionPolicy, saliency: Saliency, quota: int, features: Features | None = None) -> Int64Array:
    """int64 [N]: the position of the kept token that each token of one picture is averaged into, -1 for none.

    Only rules that merge have one; the arguments are those of `positions_of`.
    """
    if isinstance(policy, VisionzipPolicy):
        return visionzip_rows(policy, saliency, _needed(policy, features), quota).merged
    raise ValueError(f"'{policy.method}' merges nothing")


def _crops(
    policy: HolovPolicy | HolovOfficialPolicy | HolovPaperPolicy | HolovPlusPolicy,
    grid: tuple[int, int] | None,
    layout: CropLayout,
    ids: Int64Array | None,
) -> tuple[Int64Array, ...]:
    if ids is not None:
        return crops_of_ids(ids)
    if grid is None:
        raise ValueError(f"{policy.method} needs a grid or crops")
    return crops_of_grid(grid, policy.crops, layout)


def _needed(policy: SelectionPolicy, features: Features | None) -> Features:
    if features is None:
        raise ValueError(f"{policy.method} needs features")
    return features
