"""What every selection rule is, and the few tensor operations that they share.

Shape words: B images, N tokens, K budget, C crops, M tokens of the largest crop. All arithmetic is float32; sorting is
stable, so equal scores keep the lower position, which is also what ONNX TopK and TensorRT do.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from holov_export.selection.reference import EPSILON
from holov_export.tensors import Int64Array

#: as Python's own number: torch.compile makes a tensor of the CPU of one of numpy's
_SHORTEST = float(EPSILON)


class Selection(NamedTuple):
    """What a rule decided.

    Attributes:
        positions: int64 [B, N]; the first `counts` entries are the kept tokens in output order, the rest is -1. A -1
            before `counts` is a zero row; N is the CLS token, for rules that keep it. The caller slices to K.
        counts: int64 [B].
        merged: int64 [B, N], only of rules that merge: the position of the kept token that each token is averaged
            into, -1 for none. The kept token's row becomes its own plus the mean of those.
    """

    positions: Tensor
    counts: Tensor
    merged: Tensor | None = None


class Rule(Protocol):
    """A torch module that decides which tokens stay. Static control flow only: it is exported."""

    def __call__(
        self,
        saliency: Tensor,
        features: Tensor | None,
        quota: Tensor,
        budget: Tensor,
        crops: Tensor | None = None,
    ) -> Selection:
        """Decide.

        Args:
            saliency: float32 [B, N]. Only rules that `reselect` (see `policies`) meet tokens that an earlier cut took
                away, and only those that `pack` meet tokens that do not exist: theirs is negative, and their features
                are zero.
            features: float32 [B, N, D], or None if the policy reads none.
            quota: int64 [B], 1..K, at most as many as there are tokens left.
            budget: int64 [1], K. A shape value: the only thing that a loop may take its trip count from.
            crops: int64 [B, N], the crop of each token of pictures of unequal sizes, see `crop_ids`; None where all
                have the one grid that the rule was made for.
        """
        ...


def descending(values: Tensor) -> Tensor:
    """int64 [..., N]: indices from the largest to the smallest value along the last axis."""
    return torch.sort(values, dim=-1, descending=True, stable=True).indices


def ranks_by_sorting(values: Tensor) -> Tensor:
    """int64 [..., N]: what `ranks` returns, by sorting twice, which is cheaper where the axis is long."""
    return descending(-descending(values).float())


def unit_rows(features: Tensor) -> Tensor:
    """float32 [B, N, D]: each row divided by its length; a row of zeros stays zero."""
    return features / features.norm(dim=-1, keepdim=True).clamp_min(_SHORTEST)


def raster_order(priority: Tensor, quota: Tensor) -> Selection:
    """Keep the `quota` tokens of highest priority, in ascending position.

    Args:
        priority: float32 [B, N]. quota: int64 [B].
    """
    tokens = priority.shape[-1]
    wanted = torch.arange(tokens, device=priority.device)[None] < quota[:, None]
    key = torch.where(wanted, tokens - descending(priority), 0).float()
    sorted_key = torch.sort(key, dim=-1, descending=True).values.long()
    return Selection(torch.where(sorted_key > 0, tokens - sorted_key, -1), quota)


def ranks(values: Tensor) -> Tensor:
    """int64 [..., M]: how many entries of the last axis come before each one (larger, or equal and earlier).

    Counting pairs instead of sorting twice: M is small, and comparisons give the same answer everywhere.
    """
    size = values.shape[-1]
    earlier = torch.ones(size, size, dtype=torch.bool, device=values.device).tril(-1)
    mine, theirs = values[..., :, None], values[..., None, :]
    before = (theirs > mine) | ((theirs == mine) & earlier)
    return before.long().sum(-1)


class Crops(Protocol):
    """How tokens are divided into crops: fixed for a grid (`CropTable`), or data (`crop_ids.CropIds`)."""

    #: float32 [C] or [B, C], tokens of each crop
    sizes: Tensor

    def mean(self, values: Tensor) -> Tensor:
        """[B, N] -> [B, C]: mean over each crop's own tokens."""
        ...

    def spread(self, of_crop: Tensor) -> Tensor:
        """[B, C] -> [B, N]: each token gets its crop's value."""
        ...

    def ranks_of_crops(self, of_crop: Tensor) -> Tensor:
        """[B, C], not negative -> int64 [B, C]: their `ranks`."""
        ...

    def ranks_inside(self, values: Tensor) -> Tensor:
        """[B, N] -> int64 [B, N]: each token's rank among those of its crop."""
        ...


class CropTable(torch.nn.Module):
    """Moves [B, N] values to [B, C, M] crops and back. Crops shorter than M are filled up.

    Attributes (buffers, not saved with weights):
        sizes: float32 [C]. filled: bool [C, M], True where a crop has a token.
    """

    sizes: Tensor
    filled: Tensor
    _members: Tensor
    _cells: Tensor
    _crop_of: Tensor

    def __init__(self, crops: tuple[Int64Array, ...]) -> None:
        super().__init__()
        longest = max(len(crop) for crop in crops)
        tokens = sum(len(crop) for crop in crops)
        members = np.zeros((len(crops), longest), dtype=np.int64)
        filled = np.zeros((len(crops), longest), dtype=bool)
        cells = np.zeros(tokens, dtype=np.int64)
        for index, crop in enumerate(crops):
            members[index, : len(crop)] = crop
            filled[index, : len(crop)] = True
            cells[crop] = index * longest + np.arange(len(crop))
        self.register_buffer("sizes", torch.tensor([float(len(crop)) for crop in crops]), persistent=False)
        self.register_buffer("filled", torch.from_numpy(filled), persistent=False)
        self.register_buffer("_members", torch.from_numpy(members.reshape(-1)), persistent=False)
        self.register_buffer("_cells", torch.from_numpy(cells), persistent=False)
        self.register_buffer("_crop_of", torch.from_numpy(cells // longest), persistent=False)
        self.shape = (len(crops), longest)

    def split(self, values: Tensor, *, fill: float) -> Tensor:
        """[B, N] -> [B, C, M], `fill` where a crop has no token."""
        crops = values.index_select(1, self._members).unflatten(1, self.shape)
        return torch.where(self.filled, crops, fill)

    def split_rows(self, rows: Tensor) -> Tensor:
        """[B, N, D] -> [B, C, M, D]; the filling repeats token 0."""
        return rows.index_select(1, self._members).unflatten(1, self.shape)

    def join(self, crops: Tensor) -> Tensor:
        """[B, C, M] -> [B, N]."""
        return crops.flatten(1).index_select(1, self._cells)

    def spread(self, of_crop: Tensor) -> Tensor:
        """[B, C] -> [B, N]: each token gets its crop's value."""
        return of_crop.index_select(1, self._crop_of)

    def mean(self, values: Tensor) -> Tensor:
        """[B, N] -> [B, C]: mean over each crop's own tokens."""
        return self.split(values, fill=0.0).sum(-1) / self.sizes

    def ranks_of_crops(self, of_crop: Tensor) -> Tensor:
        """[B, C] -> int64 [B, C]: their `ranks`."""
        return ranks(of_crop)

    def ranks_inside(self, values: Tensor) -> Tensor:
        """[B, N] -> int64 [B, N]: each token's rank among those of its crop."""
        return self.join(ranks(self.split(values, fill=-1.0)))
