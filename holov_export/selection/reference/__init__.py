"""The oracle: every selection rule once more, for one picture, in plain numpy loops that follow the sources.

Nothing here is fast, nothing here is exported. The torch rules, the ONNX graphs and the engines are compared with it.
"""

from __future__ import annotations

import numpy as np

from holov_export.policies import (
    CdprunerUnconditionalPolicy,
    ClsTopkPolicy,
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
    grid: tuple[int, int],
    features: Features | None = None,
) -> Int64Array:
    """Kept positions of one picture in the order of the output rows, as long as its count; -1 is a zero row.

    Args:
        policy: the rule and its settings.
        saliency: float32 [N], CLS attention of the feature layer, mean over heads; negative for tokens that an earlier
            cut took away, which only rules that reselect know.
        quota: tokens wanted, 1..N.
        grid: (rows, columns).
        features: float32 [N, D], what the policy says that it reads; only for rules that read any.
    """
    if isinstance(policy, HolovPolicy):
        return holov_positions(policy, saliency, quota, grid)
    if isinstance(policy, HolovOfficialPolicy):
        return holov_official_positions(policy, saliency, quota, grid)
    if isinstance(policy, HolovPaperPolicy):
        return holov_paper_positions(policy, saliency, _needed(policy, features), quota, grid)
    if isinstance(policy, HolovPlusPolicy):
        return holov_plus_positions(policy, saliency, _needed(policy, features), quota, grid)
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
        return np.sort(random_order(policy, len(saliency))[:quota])
    raise ValueError(f"'{policy.method}' has no reference")


def merged_of(policy: SelectionPolicy, saliency: Saliency, quota: int, features: Features | None = None) -> Int64Array:
    """int64 [N]: the position of the kept token that each token of one picture is averaged into, -1 for none.

    Only rules that merge have one; the arguments are those of `positions_of`.
    """
    if isinstance(policy, VisionzipPolicy):
        return visionzip_rows(policy, saliency, _needed(policy, features), quota).merged
    raise ValueError(f"'{policy.method}' merges nothing")


def _needed(policy: SelectionPolicy, features: Features | None) -> Features:
    if features is None:
        raise ValueError(f"{policy.method} needs features")
    return features
