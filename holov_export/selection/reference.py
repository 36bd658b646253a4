"""The oracle: every selection rule once more, for one picture, in plain numpy loops that follow the sources.

Nothing here is fast, nothing here is exported. The torch rules, the ONNX graphs and the engines are compared with it.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from holov_export.policies import (
    ClsTopkPolicy,
    CropLayout,
    HolovOfficialPolicy,
    HolovPaperPolicy,
    HolovPolicy,
    NoSelection,
    RandomPolicy,
    ScopePolicy,
    SelectionPolicy,
    UniformPolicy,
)
from holov_export.selection.geometry import crops_of_grid
from holov_export.tensors import Int64Array

Saliency = npt.NDArray[np.float32]
Features = npt.NDArray[np.float32]

#: attention scale, variance weight and epsilon of the published code
SCALE, ALPHA, EPSILON = np.float32(1e3), np.float32(0.09), np.float32(1e-6)


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
        saliency: float32 [N], CLS attention of the feature layer, mean over heads.
        quota: tokens wanted, 1..N.
        grid: (rows, columns).
        features: float32 [N, D], only for rules that read them.
    """
    count = len(saliency)
    if isinstance(policy, HolovPolicy):
        return _holov(policy, saliency, quota, grid)
    if isinstance(policy, HolovOfficialPolicy):
        return _holov_official(policy, saliency, quota, grid)
    if isinstance(policy, HolovPaperPolicy):
        if features is None:
            raise ValueError("holov-paper needs features")
        return _holov_paper(policy, saliency, features, quota, grid)
    if isinstance(policy, ScopePolicy):
        if features is None:
            raise ValueError("scope needs features")
        return np.sort(scope_order(policy, saliency, features, quota))
    if isinstance(policy, ClsTopkPolicy):
        return np.sort(_descending(saliency)[:quota])
    if isinstance(policy, UniformPolicy):
        return uniform_positions(count, quota)
    if isinstance(policy, NoSelection):
        return np.arange(quota, dtype=np.int64)
    return np.sort(random_order(policy, count)[:quota])


def random_order(policy: RandomPolicy, tokens: int) -> Int64Array:
    """The permutation whose first `quota` members are kept."""
    return np.random.default_rng(policy.seed).permutation(tokens).astype(np.int64)


def uniform_positions(tokens: int, quota: int) -> Int64Array:
    """The middle of each of `quota` equal parts of the raster: floor((2 i + 1) N / (2 q))."""
    return (2 * np.arange(quota, dtype=np.int64) + 1) * tokens // (2 * quota)


def official_quotas(saliency: Saliency, quota: int, crops: tuple[Int64Array, ...]) -> Int64Array:
    """Tokens that the published code allots to each crop; their sum is `quota`, a crop may get more than it has.

    The published score of a crop is mean(1e3 A + 0.09 V mean(1e3 A) / mean(V)) = 1.09e3 mean(A) for attention A and
    similarity variance V, so features do not influence it (mean(V) must be well above the published 1e-6, which only
    almost orthogonal tokens come near). A crop of one token is scored without the factor.
    Source: obananas/HoloV llava/model/utils.py@1d2e65e.
    """
    scores = np.array(
        [
            saliency[crop].mean(dtype=np.float32) * (SCALE * (1 + ALPHA) if len(crop) > 1 else np.float32(1))
            for crop in crops
        ],
        dtype=np.float32,
    )
    weights = scores / (scores.sum(dtype=np.float32) + EPSILON)
    allotted = np.floor(weights * np.float32(quota)).astype(np.int64)
    for crop in _descending(weights)[: quota - allotted.sum()]:
        allotted[crop] += 1
    return allotted


def _holov(policy: HolovPolicy, saliency: Saliency, quota: int, grid: tuple[int, int]) -> Int64Array:
    crops = crops_of_grid(grid, policy.crops, policy.layout)
    kept: list[int] = []
    for crop, share in zip(crops, official_quotas(saliency, quota, crops), strict=True):
        kept.extend(crop[_descending(saliency[crop])[:share]])
    chosen = set(kept)
    others = [position for position in _descending(saliency) if position not in chosen]
    kept.extend(others[: quota - len(kept)])
    return np.sort(np.array(kept, dtype=np.int64))


def _holov_official(policy: HolovOfficialPolicy, saliency: Saliency, quota: int, grid: tuple[int, int]) -> Int64Array:
    crops = crops_of_grid(grid, policy.crops, CropLayout.STRIPS)
    kept: list[int] = []
    for crop, share in zip(crops, official_quotas(saliency, quota, crops), strict=True):
        if share >= len(crop):
            kept.extend(crop)
        else:
            kept.extend(crop[_descending(saliency[crop])[:share]])
    return np.array(kept + [-1] * (quota - len(kept)), dtype=np.int64)


def _holov_paper(
    policy: HolovPaperPolicy, saliency: Saliency, features: Features, quota: int, grid: tuple[int, int]
) -> Int64Array:
    crops = crops_of_grid(grid, policy.crops, policy.layout)
    holistic = [_holistic_scores(saliency[crop], features[crop]) for crop in crops]
    means = np.array([scores.mean(dtype=np.float32) for scores in holistic], dtype=np.float32)
    weights = paper_weights(means, policy.tau)
    shares = paper_quotas(weights, quota, np.array([len(crop) for crop in crops], dtype=np.int64))
    kept = [crop[_descending(scores)[:share]] for crop, scores, share in zip(crops, holistic, shares, strict=True)]
    return np.sort(np.concatenate(kept))


def _holistic_scores(attention: Saliency, features: Features) -> Saliency:
    """Equations 1-3 for one crop: H = gamma V + A, gamma = mean|A| / mean|V|."""
    size = len(attention)
    if size == 1:
        return attention
    unit = features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), EPSILON)
    similarity = (unit @ unit.T) * (1 - np.eye(size, dtype=np.float32))
    mean = similarity.sum(axis=1, keepdims=True) / np.float32(size - 1)
    variance = ((similarity - mean) ** 2).sum(axis=1) / np.float32(size - 1)
    gamma = np.abs(attention).mean(dtype=np.float32) / max(float(np.abs(variance).mean(dtype=np.float32)), 1e-12)
    return (np.float32(gamma) * variance + attention).astype(np.float32)


def paper_weights(means: Saliency, tau: float) -> Saliency:
    """Equation 4: each crop's share of the mean scores to the power of tau.

    Relative to the largest mean, so that no tau underflows; all zero where nothing was attended to.
    """
    powers = (means / np.maximum(means.max(), np.float32(1e-30))) ** np.float32(tau)
    return powers / np.maximum(powers.sum(dtype=np.float32), np.float32(1))


def paper_quotas(weights: Saliency, quota: int, sizes: Int64Array) -> Int64Array:
    """Equation 4 with its two repairs; the result sums to `quota` and no crop gets more than it has.

    floor(w q); what exceeds a crop's size goes to the others in proportion to w (M - q); what is left after that goes
    to the crop with the highest weight, then to the next when it is full (the paper names only the first).
    Source: arXiv 2510.02912v2 section 3.
    """
    asked = np.floor(weights * np.float32(quota)).astype(np.int64)
    shares = np.minimum(asked, sizes)
    surplus = (asked - shares).sum()
    pull = weights * (sizes - shares).astype(np.float32)
    if surplus > 0 and pull.sum(dtype=np.float32) > 0:
        extra = np.floor(np.float32(surplus) * pull / pull.sum(dtype=np.float32)).astype(np.int64)
        shares = np.minimum(shares + extra, sizes)
    for crop in _descending(weights):
        shares[crop] += min(quota - shares.sum(), sizes[crop] - shares[crop])
    return shares


def scope_order(policy: ScopePolicy, saliency: Saliency, features: Features, quota: int) -> Int64Array:
    """The tokens in the order in which SCOPE's greedy steps take them.

    The published code divides by a norm of zero where a token is zero; here it is similar to nothing.
    Source: kinredon/SCOPE scope/clip_encoder.py; arXiv 2510.24214.
    """
    unit = features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), EPSILON)
    similarity = unit @ unit.T
    weights = saliency ** np.float32(policy.alpha)
    covered = np.zeros_like(saliency)
    order: list[int] = []
    for _ in range(quota):
        gain = np.maximum(similarity - covered[None, :], 0).sum(axis=1, dtype=np.float32) * weights
        gain[order] = -1
        order.append(int(gain.argmax()))
        covered = np.maximum(covered, similarity[order[-1]])
    return np.array(order, dtype=np.int64)


def _descending(values: Saliency) -> Int64Array:
    """Indices from the largest to the smallest value; the lower index first where values are equal."""
    return np.argsort(-values, kind="stable").astype(np.int64)
