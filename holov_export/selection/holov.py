"""HoloV in its three forms: `holov` (repaired), `holov-official` (the published code), `holov-paper` (the equations).

Sources: arXiv 2510.02912v2; obananas/HoloV llava/model/utils.py@1d2e65e. In the published code the diversity term
cancels out of the crop scores (see `reference.official_quotas`), so the first two read no features and the graph can
select before the last layer has been computed for all tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from holov_export.policies import CropLayout, HolovOfficialPolicy, HolovPaperPolicy, HolovPolicy
from holov_export.selection.crop_ids import CropIds
from holov_export.selection.geometry import crops_of_grid, most_crops
from holov_export.selection.reference import ALPHA, EPSILON, SCALE
from holov_export.selection.rule import Crops, CropTable, Selection, descending, ranks, raster_order

#: above every attention value, which is a probability
_ABOVE = 2.0
#: as Python's own number: torch.compile makes a tensor of the CPU of one of numpy's
_EPSILON = float(EPSILON)


def official_quotas(crops: Crops, factor: Tensor, saliency: Tensor, quota: Tensor) -> Tensor:
    """Quota of each crop by its mean CLS attention: floor of the share, then +1 to the crops with the top weights.

    Args:
        crops: of the pictures. factor: what `factors` says of their sizes.
        saliency: float32 [B, N]. quota: int64 [B].

    Returns:
        int64 [B, C], summing to `quota`; may exceed a crop's size.
    """
    scores = crops.mean(saliency.clamp_min(0)) * factor
    weights = scores / (scores.sum(-1, keepdim=True) + _EPSILON)
    allotted = torch.floor(weights * quota[:, None].float()).long()
    left = quota - allotted.sum(-1)
    return allotted + (crops.ranks_of_crops(weights) < left[:, None]).long()


def factors(sizes: Tensor) -> Tensor:
    """What the published code multiplies the mean attention of crops of these sizes by."""
    return torch.where(sizes > 1, float(SCALE * (1 + ALPHA)), 1.0)


class OfficialQuotas(nn.Module):
    """`official_quotas` of the crops of one grid."""

    factor: Tensor

    def __init__(self, table: CropTable) -> None:
        super().__init__()
        self.table = table
        self.register_buffer("factor", factors(table.sizes), persistent=False)

    def forward(self, saliency: Tensor, quota: Tensor) -> Tensor:
        """(float32 [B, N], int64 [B]) -> int64 [B, C]."""
        return official_quotas(self.table, self.factor, saliency, quota)


class HolovRule(nn.Module):
    """`holov`: official quotas; the surplus of a full crop goes to the most salient tokens left; raster order.

    What an earlier cut took away has a negative saliency: it adds nothing to its crop's mean and fills no quota.
    """

    def __init__(self, policy: HolovPolicy, grid: tuple[int, int] | None) -> None:
        super().__init__()
        self.most = most_crops(policy)
        if grid is not None:
            self.table = CropTable(crops_of_grid(grid, policy.crops, policy.layout))
            self.quotas = OfficialQuotas(self.table)

    def forward(
        self,
        saliency: Tensor,
        features: Tensor | None,
        quota: Tensor,
        budget: Tensor,
        crops: Tensor | None = None,
    ) -> Selection:
        parts: Crops = self.table if crops is None else CropIds(crops, self.most)
        rank = parts.ranks_inside(saliency)
        if crops is None:
            allotted = self.quotas(saliency, quota)
        else:
            allotted = official_quotas(parts, factors(parts.sizes), saliency, quota)
        in_quota = (rank < parts.spread(allotted)) & (saliency >= 0)
        return raster_order(torch.where(in_quota, _ABOVE, saliency), quota)


class HolovOfficialRule(nn.Module):
    """`holov-official`: crop after crop, most attended first; full crops in raster order; lost tokens as zero rows."""

    rank_in_raster: Tensor
    crop_start: Tensor

    def __init__(self, policy: HolovOfficialPolicy, grid: tuple[int, int] | None) -> None:
        super().__init__()
        self.most = most_crops(policy)
        if grid is None:
            return
        crops = crops_of_grid(grid, policy.crops, CropLayout.STRIPS)
        self.table = CropTable(crops)
        self.quotas = OfficialQuotas(self.table)
        places, longest = self.table.shape
        raster = torch.arange(longest).expand(1, places, longest)
        start = (torch.arange(places) * longest)[None]
        self.register_buffer("rank_in_raster", self.table.join(raster), persistent=False)
        self.register_buffer("crop_start", self.table.spread(start), persistent=False)

    def forward(
        self,
        saliency: Tensor,
        features: Tensor | None,
        quota: Tensor,
        budget: Tensor,
        crops: Tensor | None = None,
    ) -> Selection:
        if crops is not None:
            return self.packed(saliency, quota, CropIds(crops, self.most))
        tokens = saliency.shape[-1]
        allotted = self.quotas(saliency, quota)
        rank = self.table.join(ranks(self.table.split(saliency, fill=-1.0)))
        whole = self.table.spread((allotted.float() >= self.table.sizes).long()) > 0
        in_quota = rank < self.table.spread(allotted)
        place = self.crop_start + torch.where(whole, self.rank_in_raster, rank)
        last = float(self.table.shape[0] * self.table.shape[1])
        order = descending(torch.where(in_quota, last - place.float(), -1.0))
        kept = in_quota.long().sum(-1, keepdim=True)
        return Selection(torch.where(torch.arange(tokens, device=saliency.device) < kept, order, -1), quota)

    def packed(self, saliency: Tensor, quota: Tensor, crops: CropIds) -> Selection:
        """The same for crops that are data."""
        tokens = saliency.shape[-1]
        allotted = official_quotas(crops, factors(crops.sizes), saliency, quota)
        share, place = crops.spread(allotted), crops.places(saliency)
        in_quota = (place - crops.starts() < share) & (saliency >= 0)
        whole = share.float() >= crops.spread(crops.sizes)
        place = torch.where(whole, crops.places(None), place)
        order = descending(torch.where(in_quota, tokens - place, -1).float())
        kept = in_quota.long().sum(-1, keepdim=True)
        return Selection(torch.where(torch.arange(tokens, device=saliency.device) < kept, order, -1), quota)


class HolovPaperRule(nn.Module):
    """`holov-paper`: equations 1-5, top-q of each crop by H = gamma V + A; raster order."""

    def __init__(self, policy: HolovPaperPolicy, grid: tuple[int, int]) -> None:
        super().__init__()
        self.table = CropTable(crops_of_grid(grid, policy.crops, policy.layout))
        self.tau = policy.tau

    def forward(
        self,
        saliency: Tensor,
        features: Tensor | None,
        quota: Tensor,
        budget: Tensor,
        crops: Tensor | None = None,
    ) -> Selection:
        assert features is not None  # the policy declares that it reads features
        holistic = self.table.join(self._holistic(saliency, features))
        shares = self._shares(self._weights(self.table.mean(holistic)), quota)
        rank = self.table.join(ranks(self.table.split(holistic, fill=-1.0)))
        in_quota = rank < self.table.spread(shares)
        return raster_order(in_quota.float(), quota)

    def _holistic(self, saliency: Tensor, features: Tensor) -> Tensor:
        """Equations 1-3: float32 [B, C, M]."""
        rows = self.table.split_rows(features)
        unit = rows / rows.norm(dim=-1, keepdim=True).clamp_min(_EPSILON)
        longest = self.table.shape[1]
        pairs = self.table.filled[:, :, None] & self.table.filled[:, None, :]
        off_diagonal = pairs & ~torch.eye(longest, dtype=torch.bool, device=rows.device)
        similarity = torch.where(off_diagonal, unit @ unit.transpose(-1, -2), 0.0)
        others = (self.table.sizes - 1).clamp_min(1.0)[:, None]
        mean = similarity.sum(-1) / others
        deviation = torch.where(pairs, (similarity - mean[..., None]) ** 2, 0.0)
        variance = deviation.sum(-1) / others
        attention = self.table.split(saliency, fill=0.0)
        size = self.table.sizes
        gamma = (attention.sum(-1) / size) / (variance.sum(-1) / size).clamp_min(1e-12)
        return gamma[..., None] * variance + attention

    def _weights(self, means: Tensor) -> Tensor:
        """Equation 4, see `reference.paper_weights`: float32 [B, C]."""
        powers = (means / means.amax(-1, keepdim=True).clamp_min(1e-30)) ** self.tau
        return powers / powers.sum(-1, keepdim=True).clamp_min(1.0)

    def _shares(self, weights: Tensor, quota: Tensor) -> Tensor:
        """Equation 4 and its repairs, see `reference.paper_quotas`: int64 [B, C]."""
        sizes, wanted = self.table.sizes, quota[:, None].float()
        asked = torch.floor(weights * wanted)
        shares = torch.minimum(asked, sizes)
        surplus = (asked - shares).sum(-1, keepdim=True)
        pull = weights * (sizes - shares)
        extra = torch.floor(surplus * pull / pull.sum(-1, keepdim=True).clamp_min(1e-12))
        shares = torch.minimum(shares + extra, sizes)
        room, left = sizes - shares, wanted - shares.sum(-1, keepdim=True)
        rank = ranks(weights)
        before = (rank[:, None, :] < rank[:, :, None]).float()
        room_before = (before * room[:, None, :]).sum(-1)
        return (shares + torch.minimum((left - room_before).clamp_min(0.0), room)).long()
