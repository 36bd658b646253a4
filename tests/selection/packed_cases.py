"""Pictures of unequal numbers of tokens, as a packed graph meets them, and what must come out for each."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from selection.cases import Floats, hangs_on_rounding, realistic

from holov_export.policies import FeatureSource, HolovOfficialPolicy, NoSelection, SelectionPolicy
from holov_export.selection.packed import Kept
from holov_export.selection.reference import positions_of
from holov_export.tensors import Int64Array

#: of the largest picture that the rules of the tests are built for
LARGEST = 5000


@dataclass(frozen=True)
class Packed:
    """Inputs of `PackedSelection`; the tower's rows of different pictures and views are shuffled."""

    saliency: Floats
    features: Floats
    source: Int64Array
    crops: Int64Array
    budget: int
    quota: Int64Array

    def tensors(self) -> tuple[torch.Tensor, ...]:
        """In the order of `PackedSelection.forward`."""
        arrays = (self.saliency, self.features, self.source, self.crops, np.array([self.budget]), self.quota)
        return tuple(torch.from_numpy(array) for array in arrays)

    def wanted(self, picture: int) -> int:
        """min(max(quota, 1), budget in 1..N, its tokens)."""
        longest = self.source.shape[1]
        budget = min(max(self.budget, 1), longest)
        return int(min(max(self.quota[picture], 1), budget, (self.source[picture] >= 0).sum()))

    def picture(self, index: int) -> tuple[Floats, Floats, Int64Array]:
        """(saliency [n], features [n, E], crops [n]) of one picture's own tokens."""
        there = self.source[index] >= 0
        rows = self.source[index][there]
        return self.saliency[rows], self.features[rows], self.crops[index][there]

    def alone(self, index: int) -> Packed:
        """One picture with no place for more tokens than it has, and what is kept of it as its quota."""
        there = self.source[index] >= 0
        source, crops = self.source[index][there][None], self.crops[index][there][None]
        quota = np.array([self.wanted(index)])
        return Packed(self.saliency, self.features, source, crops, int(quota[0]), quota)


def packed_inputs(
    sizes: list[int], seed: int, *, width: int = 12, spare: int = 0, crops: int = 5, exact: bool = False
) -> Packed:
    """Pictures of `sizes` tokens; the N axis is `spare` longer than the largest, the tower makes more rows than tokens.

    Args:
        sizes: tokens of each picture. seed: of everything. width: E. spare: see above.
        crops: ids are below it; a picture may lack some of them, and a crop's tokens need not be neighbours.
        exact: values on which float32 makes no error, and full of ties.
    """
    dice = np.random.default_rng(seed)
    total, longest = sum(sizes) + 7, max(sizes) + spare
    if exact:
        saliency = (dice.integers(0, 256, total) / 4096).astype(np.float32)
        features = np.zeros((total, width), dtype=np.float32)
        for row in features:
            row[dice.permutation(width)[: dice.choice([1, 4])]] = dice.choice([-1.0, 1.0])
    else:
        saliency = realistic(str(dice.choice(["flat", "usual", "peaky"])), 1, total, dice)[0]
        common = dice.uniform(0, 3) * dice.standard_normal((1, width))
        features = (dice.standard_normal((total, width)) + common).astype(np.float32)
    rows = dice.permutation(total).astype(np.int64)
    source, ids = np.full((2, len(sizes), longest), -1, dtype=np.int64)
    for index, size in enumerate(sizes):
        source[index, :size], rows = rows[:size], rows[size:]
        ids[index, :size] = dice.permutation(crops)[dice.integers(0, crops, size)]
        if index % 2:
            ids[index, :size] = np.sort(ids[index, :size])
    quota = dice.integers(0, longest + 3, len(sizes)).astype(np.int64)
    budget = int(dice.integers(0, longest + 3)) if seed % 2 else longest
    return Packed(saliency, features, source, ids, budget, quota)


def check_kept(policy: SelectionPolicy, given: Packed, kept: Kept, *, exact: bool = False) -> int:
    """Assert all that is promised, and that each picture's positions are the reference's; how many were compared."""
    rows, positions, counts, saliency = (tensor.numpy() for tensor in kept)
    compared, (pictures, longest) = 0, given.source.shape
    assert rows.shape == positions.shape == (pictures, min(max(given.budget, 1), longest))
    assert saliency.dtype == np.float32
    assert np.array_equal(saliency, np.where(given.source >= 0, given.saliency[given.source], np.float32(-1)))
    for index in range(pictures):
        own, features, crops = given.picture(index)
        wanted = given.wanted(index)
        assert counts[index] == wanted
        chosen = positions[index, :wanted]
        assert (positions[index, wanted:] == -1).all()
        real = chosen[chosen >= 0]
        assert len(set(real.tolist())) == len(real)
        assert (real < len(own)).all(), "only tokens that exist"
        assert np.array_equal(rows[index], np.where(positions[index] >= 0, given.source[index][positions[index]], 0))
        if not isinstance(policy, HolovOfficialPolicy):
            assert len(real) == wanted
            assert (np.diff(real) > 0).all(), "in the order of the prompt"
        reads = features if policy.features is not FeatureSource.NONE else None
        grid = (len(own), 1)
        if not exact and hangs_on_rounding(policy, own, wanted, grid, features, crops):
            continue
        compared += 1
        expected = positions_of(policy, own, wanted, None, reads, crops, LARGEST)
        assert chosen.tolist() == expected.tolist()
        if isinstance(policy, NoSelection):
            assert chosen.tolist() == list(range(wanted))
    return compared
