"""HoloV in its three forms, as loops over the crops of one picture."""

from __future__ import annotations

import numpy as np

from holov_export.policies import HolovPaperPolicy
from holov_export.selection.reference.arrays import EPSILON, Features, Saliency, descending, unit_rows
from holov_export.tensors import Int64Array

#: attention scale and variance weight of the published code
SCALE, ALPHA = np.float32(1e3), np.float32(0.09)


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
    for crop in descending(weights)[: quota - allotted.sum()]:
        allotted[crop] += 1
    return allotted


def holov_positions(saliency: Saliency, quota: int, crops: tuple[Int64Array, ...]) -> Int64Array:
    """Official quotas; what a crop cannot hold goes to the most salient tokens of the others; raster order.

    Tokens of negative saliency are gone: they add nothing to a crop's mean, which is still over the whole crop, they
    fill no quota, and they come last when a surplus is handed out.
    """
    kept: list[int] = []
    for crop, share in zip(crops, official_quotas(np.maximum(saliency, 0), quota, crops), strict=True):
        left = crop[saliency[crop] >= 0]
        kept.extend(left[descending(saliency[left])[:share]])
    chosen = set(kept)
    others = [position for position in descending(saliency) if position not in chosen]
    kept.extend(others[: quota - len(kept)])
    return np.sort(np.array(kept, dtype=np.int64))


def holov_official_positions(saliency: Saliency, quota: int, crops: tuple[Int64Array, ...]) -> Int64Array:
    """Crop after crop, full ones in raster order; what does not fit becomes zero rows (-1) at the end."""
    kept: list[int] = []
    for crop, share in zip(crops, official_quotas(saliency, quota, crops), strict=True):
        if share >= len(crop):
            kept.extend(crop)
        else:
            kept.extend(crop[descending(saliency[crop])[:share]])
    return np.array(kept + [-1] * (quota - len(kept)), dtype=np.int64)


def holov_paper_positions(
    policy: HolovPaperPolicy, saliency: Saliency, features: Features, quota: int, crops: tuple[Int64Array, ...]
) -> Int64Array:
    """Equations 1-5: quotas by the mean of H, the top of H inside each crop; raster order."""
    holistic = [_holistic_scores(saliency[crop], features[crop]) for crop in crops]
    means = np.array([scores.mean(dtype=np.float32) for scores in holistic], dtype=np.float32)
    weights = paper_weights(means, policy.tau)
    shares = paper_quotas(weights, quota, np.array([len(crop) for crop in crops], dtype=np.int64))
    kept = [crop[descending(scores)[:share]] for crop, scores, share in zip(crops, holistic, shares, strict=True)]
    return np.sort(np.concatenate(kept))


def _holistic_scores(attention: Saliency, features: Features) -> Saliency:
    """Equations 1-3 for one crop: H = gamma V + A, gamma = mean|A| / mean|V|."""
    size = len(attention)
    if size == 1:
        return attention
    unit = unit_rows(features)
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
    for crop in descending(weights):
        shares[crop] += min(quota - shares.sum(), sizes[crop] - shares[crop])
    return shares
