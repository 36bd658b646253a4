"""Crops of pictures of unequal sizes: their ids are data, so the graph has no tables of them.

Shape words: B pictures, N tokens, C crops that there may be.
"""

from __future__ import annotations

import torch
from torch import Tensor

from holov_export.selection.rule import descending, ranks


class CropIds:
    """What `rule.CropTable` does for one fixed grid, for crops that a graph is given.

    Means are sums of C rows of N values, most of them zero; ranks come from stable sorts, whose keys are whole numbers
    below 2^24, so float32 holds them. All crops may have any tokens; empty ones have mean 0 and come last.

    Attributes:
        sizes: float32 [B, C], tokens of each crop.
    """

    sizes: Tensor

    def __init__(self, ids: Tensor, most: int) -> None:
        """Count.

        Args:
            ids: int64 [B, N], 0 to `most` - 1; -1 for tokens that do not exist.
            most: C.
        """
        number = torch.arange(most, device=ids.device)
        self._members = ids[:, None, :] == number[:, None]  # [B, C, N]
        self._index = ids.clamp_min(0)
        self._exists = ids >= 0
        self._key = torch.where(self._exists, ids, most).float()
        self.sizes = self._members.float().sum(-1)

    def mean(self, values: Tensor) -> Tensor:
        """[B, N] -> [B, C]: mean over each crop's own tokens."""
        return torch.where(self._members, values[:, None], 0.0).sum(-1) / self.sizes.clamp_min(1.0)

    def spread(self, of_crop: Tensor) -> Tensor:
        """[B, C] -> [B, N]: each token gets its crop's value; what does not exist gets any."""
        return of_crop.gather(1, self._index)

    def ranks_of_crops(self, of_crop: Tensor) -> Tensor:
        """[B, C], not negative -> int64 [B, C]: `rule.ranks`, empty crops last."""
        return ranks(torch.where(self.sizes > 0, of_crop, -1.0))

    def ranks_inside(self, values: Tensor) -> Tensor:
        """[B, N] -> int64 [B, N]: how many tokens of its crop come before each one (larger, or equal and earlier)."""
        return self.places(values) - self.starts()

    def places(self, values: Tensor | None) -> Tensor:
        """int64 [B, N]: each token's place crop after crop, inside a crop from the largest value to the smallest.

        Args:
            values: float32 [B, N]; None for the order that the tokens have.
        """
        if values is None:
            order = descending(-self._key)
        else:
            by_value = descending(values)
            order = by_value.gather(1, descending(-self._key.gather(1, by_value)))
        return descending(-order.float())

    def starts(self) -> Tensor:
        """int64 [B, N]: the place of the first token of each token's crop."""
        most = self.sizes.shape[1]
        earlier = torch.ones(most, most, dtype=torch.bool, device=self.sizes.device).tril(-1)
        before = torch.where(earlier, self.sizes[:, None], 0.0).sum(-1)
        return self.spread(before.long())
