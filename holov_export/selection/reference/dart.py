"""DART on embeddings, as loops over one picture."""

from __future__ import annotations

import numpy as np

from holov_export.policies import DartPolicy
from holov_export.selection.reference.arrays import Features, Saliency, descending, unit_rows
from holov_export.tensors import Int64Array


def dart_order(policy: DartPolicy, saliency: Saliency, features: Features, quota: int) -> Int64Array:
    """Pivots, the tokens of the largest L1 norm; then for each pivot the tokens that are least similar to it.

    Each pivot brings an equal share of what is still wanted, rounded up. Tokens of negative saliency are gone: they are
    no pivots and come last everywhere.
    Source: NVIDIA/TensorRT-Edge-LLM cpp/runtime/preprocess/dartPruner.cpp, growSpanGreedily; arXiv 2502.11494.
    """
    gone = saliency < 0
    length = np.abs(features).sum(axis=1, dtype=np.float32)
    pivots = descending(np.where(gone, np.float32(-1), length))[: min(policy.pivots, quota)].tolist()
    unit = unit_rows(features)
    kept = list(pivots)
    for number, pivot in enumerate(pivots):
        share = -(-(quota - len(kept)) // (len(pivots) - number))
        likeness = np.where(gone, np.float32(2), unit @ unit[pivot])
        candidates = [token for token in descending(-likeness).tolist() if token not in set(kept)]
        kept.extend(candidates[:share])
    return np.array(kept, dtype=np.int64)
