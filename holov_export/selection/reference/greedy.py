"""The rules that take one token after another, as loops over one picture: SCOPE, DivPrune, the DPP of CDPruner.

Each returns the tokens in the order in which they are taken; the rules keep them in raster order. Tokens of negative
saliency are gone: they are taken only when no other is left.
"""

from __future__ import annotations

import numpy as np

from holov_export.policies import ScopePolicy
from holov_export.selection.reference.arrays import Features, Saliency, unit_rows
from holov_export.tensors import Int64Array

#: The share of a token's squared length that must lie outside the span of the tokens taken so far for the DPP to see
#: it. Ours: the published code has none and divides rounding errors by their own square root, or by a negative one's.
DPP_FLOOR = np.float32(1e-4)


def scope_order(policy: ScopePolicy, saliency: Saliency, features: Features, quota: int) -> Int64Array:
    """Greedy coverage: each step takes the largest A^alpha times the sum of max(similarity - covered, 0).

    The published code divides by a norm of zero where a token is zero; here it is similar to nothing.
    Source: kinredon/SCOPE scope/clip_encoder.py@6bf7306; arXiv 2510.24214.
    """
    unit = unit_rows(features)
    similarity = unit @ unit.T
    gone = saliency < 0
    weights = np.maximum(saliency, 0) ** np.float32(policy.alpha)
    covered = np.zeros_like(saliency)
    order: list[int] = []
    for _ in range(quota):
        gain = np.maximum(similarity - covered[None, :], 0).sum(axis=1, dtype=np.float32) * weights
        order.append(_best(gain, gone, order))
        covered = np.maximum(covered, similarity[order[-1]])
    return np.array(order, dtype=np.int64)


def divprune_order(saliency: Saliency, features: Features, quota: int) -> Int64Array:
    """Max-min diversity: first the token whose nearest other one is farthest, then the one farthest from all taken.

    Distance is 1 - cosine. The published code may take a token twice where all that is left equals one that it has;
    here a token is taken once.
    Source: vbdi/divprune LLaVA/llava/model/llava_arch.py@799e2d9, DivPrune; arXiv 2503.02175.
    """
    unit = unit_rows(features)
    similarity = unit @ unit.T
    gone = saliency < 0
    others = similarity.copy()
    np.fill_diagonal(others, -2)
    others[:, gone] = -2
    order = [_best(-others.max(axis=1), gone, [])]
    for _ in range(quota - 1):
        nearest = similarity[order].max(axis=0)
        order.append(_best(-nearest, gone, order))
    return np.array(order, dtype=np.int64)


def dpp_order(saliency: Saliency, features: Features, quota: int) -> Int64Array:
    """Greedy MAP of the determinantal point process whose kernel is the cosine similarity, by an incremental Cholesky.

    CDPruner's kernel is r_i S_ij r_j with a relevance r to the question; with all r equal the first step ties between
    all tokens, and the lowest position wins. What the taken tokens leave of a token (its squared distance to their
    span) decides; below `DPP_FLOOR` it counts as nothing, and such tokens follow in raster order.
    Source: Theia-4869/CDPruner llava/model/llava_arch.py@9541616, encode_images; arXiv 2506.10967.
    """
    unit = unit_rows(features)
    similarity = unit @ unit.T
    gone = saliency < 0
    left = np.where(np.abs(features).max(axis=1) > 0, 1, 0).astype(np.float32)
    factor = np.zeros((quota, len(saliency)), dtype=np.float32)
    order: list[int] = []
    for step in range(quota):
        best = _best(np.where(left > DPP_FLOOR, left, 0), gone, order)
        order.append(best)
        if left[best] > DPP_FLOOR:
            rest = similarity[best] - factor[:step, best] @ factor[:step]
            factor[step] = rest / np.sqrt(left[best])
            left -= factor[step] ** 2
    return np.array(order, dtype=np.int64)


def _best(score: Saliency, gone: np.ndarray, taken: list[int]) -> int:
    """The first of the highest scores among the tokens that are left; the first of those gone if there is none."""
    usable = score.copy()
    usable[gone] = -np.inf
    usable[taken] = -np.inf
    if usable.max() > -np.inf:
        return int(usable.argmax())
    return min(set(np.flatnonzero(gone).tolist()) - set(taken))
