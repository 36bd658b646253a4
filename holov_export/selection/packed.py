"""Selection where pictures have unequal numbers of tokens: from the rows of a tower to those that stay.

A tower makes R rows of all views; `source` says which of them each token of each picture is. Tokens that do not exist
look to a rule like those that an earlier cut took away: saliency -1, features zero.

Shape words: B pictures, N tokens of the largest one, K budget, R rows of the tower, E width of the features.
"""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from holov_export.policies import FeatureSource, SelectionPolicy
from holov_export.selection.registry import packed_rule_from_policy
from holov_export.selection.rule import Selection


class Kept(NamedTuple):
    """What stays of each picture.

    Attributes:
        rows: int64 [B, K], rows of the tower; 0 where `positions` is -1.
        positions: int64 [B, K], indices of the N axis in output order; -1 past the count, and for the zero rows that
            `holov-official` makes before it.
        counts: int64 [B].
        saliency: float32 [B, N]; -1.0 where a picture has no token.
    """

    rows: Tensor
    positions: Tensor
    counts: Tensor
    saliency: Tensor


def rows_of_tokens(rows: Tensor, source: Tensor) -> Tensor:
    """[R, ..] and int64 [B, N] -> [B, N, ..]: the tower's row of each token, zero where there is none."""
    tokens = rows.index_select(0, source.clamp_min(0).flatten()).unflatten(0, source.shape)
    return torch.where((source >= 0).unsqueeze(-1), tokens, 0.0)


class PackedSelection(nn.Module):
    """A rule between the rows of a tower and the tokens of pictures."""

    def __init__(self, policy: SelectionPolicy, tokens: int) -> None:
        """Build the rule.

        Args:
            policy: one that `packs`, or `NoSelection`, which keeps the first tokens.
            tokens: N of the largest picture that there can be.

        Raises:
            ValueError: the policy does not pack.
        """
        super().__init__()
        self.reads = policy.features is not FeatureSource.NONE
        self.selection = packed_rule_from_policy(policy, tokens)

    def forward(
        self, saliency: Tensor, features: Tensor | None, source: Tensor, crops: Tensor, budget: Tensor, quota: Tensor
    ) -> Kept:
        """Decide.

        Args:
            saliency: float32 [R]. features: float32 [R, E]; None if the policy reads none.
            source: int64 [B, N], a row for each token, -1 where a picture has no more.
            crops: int64 [B, N], the crop of each token: 0 to `geometry.most_crops(policy)` - 1.
            budget: int64 [1]; clamped to 1..N, it is K.
            quota: int64 [B]; a picture keeps min(max(quota, 1), K, its tokens).
        """
        exists, row = source >= 0, source.clamp_min(0)
        of_token = torch.where(exists, saliency.index_select(0, row.flatten()).unflatten(0, source.shape), -1.0)
        read: Tensor | None = None
        if self.reads:
            assert features is not None  # the policy declares that it reads features
            read = rows_of_tokens(features, source)
        asked = budget.clamp(1, source.shape[1])
        wanted = torch.minimum(torch.minimum(quota.clamp_min(1), asked), exists.long().sum(-1))
        chosen = self.select(of_token, read, wanted, asked, torch.where(exists, crops, -1))
        rows = torch.where(chosen.positions >= 0, row.gather(1, chosen.positions.clamp_min(0)), 0)
        return Kept(rows, chosen.positions, chosen.counts, of_token)

    def select(
        self, saliency: Tensor, features: Tensor | None, quota: Tensor, budget: Tensor, crops: Tensor
    ) -> Selection:
        """The rule's decision, its positions cut to [B, K]."""
        size = cast(int, budget.item())
        torch._check(size >= 1)
        torch._check(size <= saliency.shape[1])
        chosen = self.selection(saliency, features, quota, budget, crops)
        return Selection(chosen.positions[:, :size], chosen.counts)
