"""The controls, as loops over one picture."""

from __future__ import annotations

import numpy as np

from holov_export.policies import RandomPolicy
from holov_export.tensors import Int64Array


def random_order(policy: RandomPolicy, tokens: int) -> Int64Array:
    """The permutation whose first `quota` members are kept."""
    return np.random.default_rng(policy.seed).permutation(tokens).astype(np.int64)


def uniform_positions(tokens: int, quota: int) -> Int64Array:
    """The middle of each of `quota` equal parts of the raster: floor((2 i + 1) N / (2 q))."""
    return (2 * np.arange(quota, dtype=np.int64) + 1) * tokens // (2 * quota)
