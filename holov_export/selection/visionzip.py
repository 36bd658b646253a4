"""VisionZip: dominant tokens by CLS attention, the CLS token among them; the rest is merged into contextual rows.

Source: arXiv 2412.04467; dvlab-research/VisionZip visionzip/clip_encoder.py@3151f6d. The rule says who is kept and into
whom the others go; the tower averages their rows.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from holov_export.policies import VisionzipPolicy
from holov_export.selection.rule import Selection, descending, ranks_by_sorting, unit_rows


class VisionzipRule(nn.Module):
    """`visionzip`: CLS token, dominant tokens in raster order, targets in raster order; with the others' targets."""

    def __init__(self, policy: VisionzipPolicy) -> None:
        super().__init__()
        self.contextual = policy.contextual

    def forward(
        self,
        saliency: Tensor,
        features: Tensor | None,
        quota: Tensor,
        budget: Tensor,
        crops: Tensor | None = None,
    ) -> Selection:
        assert features is not None  # the policy declares that it reads features
        tokens = saliency.shape[-1]
        place = torch.arange(tokens, device=saliency.device)[None]
        wanted = quota[:, None]
        contextual = torch.div(wanted * self.contextual, 32, rounding_mode="floor")
        patches = wanted - contextual - 1  # dominant ones beside the CLS token
        rest = tokens - patches
        step = torch.div(rest, contextual.clamp_min(1), rounding_mode="floor").clamp_min(1)

        dominant = ranks_by_sorting(saliency) < patches
        # dominant tokens first, then the others, both in raster order
        order = descending(torch.where(dominant, 2 * tokens - place, tokens - place).float())
        slot = place - 1  # the CLS token has the first one
        index = torch.where(slot < patches, slot, patches + (slot - patches) * step)
        positions = order.gather(1, index.clamp(0, tokens - 1))
        positions = torch.where(place == 0, tokens, torch.where(place < wanted, positions, -1))

        among_rest = descending(-order.float()) - patches
        number = torch.div(among_rest, step, rounding_mode="floor")
        target = (among_rest >= 0) & (number * step == among_rest) & (number < contextual)
        unit = unit_rows(features)
        likeness = torch.where(target[:, None], unit @ unit.transpose(-1, -2), -2.0)
        merges = ~(dominant | target) & (contextual > 0)
        return Selection(positions, quota, torch.where(merges, likeness.argmax(-1), -1))
