"""`holov-plus`: HoloV's strips and quotas, by scores in which features count. No loop.

Attention says where something is; novelty says whether it has been seen: 1 minus the largest cosine to a token of
higher attention, of centred features. A token's score is A^(1/4) times its novelty, once among the tokens of its strip
and once among all. Strips get quotas by the mean of the first score and fill them by it; what the floors leave over
goes to the best of the second score. The equations, and how they were found: docs/holov-plus.md.

Source of the novelty: the distance to the nearest point of higher density, Rodriguez and Laio, Science 344 (2014) 1492.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from holov_export.policies import HolovPlusPolicy
from holov_export.selection.crop_ids import CropIds
from holov_export.selection.geometry import crops_of_grid, most_crops
from holov_export.selection.reference import EPSILON
from holov_export.selection.reference.holov_plus import SMALLEST_SHARE
from holov_export.selection.rule import CropTable, Selection, ranks, ranks_by_sorting, raster_order

#: above every score, which is at most 1
_ABOVE = 2.0


class HolovPlusRule(nn.Module):
    """`holov-plus`; raster order."""

    def __init__(self, policy: HolovPlusPolicy, grid: tuple[int, int] | None) -> None:
        super().__init__()
        self.most = most_crops(policy)
        if grid is not None:
            self.table = CropTable(crops_of_grid(grid, policy.crops, policy.layout))

    def forward(
        self,
        saliency: Tensor,
        features: Tensor | None,
        quota: Tensor,
        budget: Tensor,
        crops: Tensor | None = None,
    ) -> Selection:
        assert features is not None  # the policy declares that it reads features
        unit = centred_rows(features, saliency)
        root, order = saliency.clamp_min(0).sqrt().sqrt(), ranks_by_sorting(saliency).float()
        if crops is not None:
            return self.packed(saliency, quota, crops, root, order, unit)
        table = self.table
        # filled-up places are like tokens that are gone: they come before nobody and score nothing
        last = float(saliency.shape[-1])
        inside = table.split(root, fill=0.0) * novelty(table.split(order, fill=last), table.split_rows(unit))
        shares = shares_of(inside.sum(-1) / table.sizes, quota)
        places = torch.where(table.split(saliency, fill=-1.0) >= 0, inside, -1.0)
        in_quota = (table.join(ranks(places)) < table.spread(shares)) & (saliency >= 0)
        whole = torch.where(saliency >= 0, root * novelty(order, unit), -1.0)
        return raster_order(torch.where(in_quota, _ABOVE, whole), quota)

    def packed(
        self, saliency: Tensor, quota: Tensor, ids: Tensor, root: Tensor, order: Tensor, unit: Tensor
    ) -> Selection:
        """The same for crops that are data, from one product of all pairs.

        Args:
            ids: int64 [B, N]. root: float32 [B, N], A^(1/4). order, unit: as of `novelty`.
        """
        crops, exists = CropIds(ids, self.most), saliency >= 0
        before = order[:, None, :] < order[:, :, None]
        likeness = torch.where(before, unit @ unit.transpose(-1, -2), 0.0)
        same = ids[:, None, :] == ids[:, :, None]
        inside = root * (1.0 - torch.where(same, likeness, 0.0).amax(-1).clamp(0.0, 1.0))
        shares = shares_of(crops.mean(inside), quota)
        in_quota = (crops.ranks_inside(torch.where(exists, inside, -1.0)) < crops.spread(shares)) & exists
        whole = torch.where(exists, root * (1.0 - likeness.amax(-1).clamp(0.0, 1.0)), -1.0)
        return raster_order(torch.where(in_quota, _ABOVE, whole), quota)


def shares_of(means: Tensor, quota: Tensor) -> Tensor:
    """int64 [B, C]: what each crop gets of the quotas [B] by its mean score [B, C]; floors."""
    weights = means / means.sum(-1, keepdim=True).clamp_min(1e-30)
    return torch.floor(weights * quota[:, None].float()).long()


def centred_rows(features: Tensor, saliency: Tensor) -> Tensor:
    """float32 [B, N, D]: what each token differs by from the mean of those that are there, at length one."""
    alive = (saliency >= 0).float()[..., None]
    mean = (features * alive).sum(1, keepdim=True) / alive.sum(1, keepdim=True).clamp_min(1.0)
    centred = (features - mean) * alive
    shortest = (float(SMALLEST_SHARE) * features.norm(dim=-1, keepdim=True)).clamp_min(float(EPSILON))
    return centred / torch.maximum(centred.norm(dim=-1, keepdim=True), shortest)


def novelty(order: Tensor, unit: Tensor) -> Tensor:
    """float32 [..., M]: 1 - the largest positive cosine to a token that comes before, in 0..1; 1 for the first.

    Args:
        order: float32 [..., M], 0 for the most salient token, 1 for the next.
        unit: float32 [..., M, D], rows of length one.
    """
    before = order[..., None, :] < order[..., :, None]
    nearest = torch.where(before, unit @ unit.transpose(-1, -2), 0.0).amax(-1)
    return 1.0 - nearest.clamp(0.0, 1.0)
