"""DART on embeddings: pivots, and the tokens that are least like them. No loop: the number of pivots is fixed.

Source: arXiv 2502.11494; NVIDIA/TensorRT-Edge-LLM 0.11 cpp/runtime/preprocess/dartPruner.cpp. `policies.DartPolicy`
says what is different here.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from holov_export.policies import DartPolicy
from holov_export.selection.rule import Selection, descending, ranks_by_sorting, raster_order, unit_rows


class DartRule(nn.Module):
    """`dart`: the pivots, and for each of them its share of the tokens least similar to it; raster order."""

    def __init__(self, policy: DartPolicy) -> None:
        super().__init__()
        self.pivots = policy.pivots

    def forward(
        self,
        saliency: Tensor,
        features: Tensor | None,
        quota: Tensor,
        budget: Tensor,
        crops: Tensor | None = None,
    ) -> Selection:
        assert features is not None  # the policy declares that it reads features
        batch, tokens = saliency.shape
        pivots = min(self.pivots, tokens) if crops is None else self.pivots
        gone = saliency < 0
        unit = unit_rows(features)
        order = descending(torch.where(gone, -1.0, features.abs().sum(-1)))
        if crops is None:
            order = order[:, :pivots]
        else:  # the axis may be shorter than that; pivots past the quota are not used
            order = order.index_select(1, torch.arange(pivots, device=order.device).clamp_max(tokens - 1))
        start = torch.arange(batch, device=order.device)[:, None] * tokens
        rows = unit.flatten(0, 1).index_select(0, (order + start).flatten()).unflatten(0, (batch, pivots))
        likeness = rows @ unit.transpose(-1, -2)  # [B, P, N]
        used = quota.clamp_max(pivots)[:, None]
        place = torch.arange(tokens, device=order.device)
        wanted = torch.arange(pivots, device=order.device)[:, None] < used[:, None]  # [B, P, 1]
        kept = ((order[..., None] == place) & wanted).any(1)
        for number in range(pivots):
            pivots_left = (used - number).clamp_min(1)
            missing = quota[:, None] - kept.long().sum(-1, keepdim=True)
            share = torch.div(missing + pivots_left - 1, pivots_left, rounding_mode="floor")
            worth = torch.where(kept | gone, -2.0, -likeness[:, number])
            kept = kept | ((ranks_by_sorting(worth) < share) & (number < used))
        return raster_order(kept.float(), quota)
