"""VisionZip, the rule that merges, as loops over one picture."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from holov_export.policies import VisionzipPolicy
from holov_export.selection.reference.arrays import Features, Saliency, descending, unit_rows
from holov_export.tensors import Int64Array


@dataclass(frozen=True)
class VisionzipRows:
    """What VisionZip makes of one picture.

    Attributes:
        positions: int64 [quota]: N (the CLS token), the other dominant tokens in raster order, the targets in raster
            order.
        merged: int64 [N]: the target that each token is averaged into, -1 for dominant tokens and targets.
    """

    positions: Int64Array
    merged: Int64Array


def contextual_rows(policy: VisionzipPolicy, quota: int) -> int:
    """How many of `quota` rows are contextual: 10 of 64, 20 of 128, 30 of 192, 50 of 320 at the published share."""
    return quota * policy.contextual // 32


def visionzip_rows(policy: VisionzipPolicy, saliency: Saliency, keys: Features, quota: int) -> VisionzipRows:
    """Dominant tokens by CLS attention, the CLS token among them; the rest is merged into evenly spaced targets.

    Targets are every step-th of the tokens that are not dominant. Each other one goes to the target whose key is
    nearest by cosine; where no row is contextual, nothing is merged.
    Source: dvlab-research/VisionZip visionzip/clip_encoder.py@3151f6d; main.py for the CLS token in the count.
    """
    tokens = len(saliency)
    contextual = contextual_rows(policy, quota)
    dominant = np.sort(descending(saliency)[: quota - contextual - 1])
    rest = np.setdiff1d(np.arange(tokens), dominant)
    step = max(1, len(rest) // max(contextual, 1))
    targets = rest[::step][:contextual]
    merged = np.full(tokens, -1, dtype=np.int64)
    if contextual:
        unit = unit_rows(keys)
        for token in np.setdiff1d(rest, targets):
            merged[token] = targets[int((unit[targets] @ unit[token]).argmax())]
    return VisionzipRows(np.concatenate([[tokens], dominant, targets]).astype(np.int64), merged)
