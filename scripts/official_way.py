"""How published HoloV uses a vision encoder, for benchmarks: eager attention with every attention map, then a loop.

The loop is a transcription of the algorithm, not of the code (obananas/HoloV llava/model/utils.py@1d2e65e describes it:
raster strips, similarity variance, quotas by floor, top-k by attention, zero rows for what a full strip cannot take).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

CROPS = 16
_EPSILON = 1e-6


def official_tokens(tower: Any, projector: Any, pixels: Tensor, budget: int, layer: int) -> Tensor:
    """[B, 3, H, W] -> [B, K, D] as the published LLaVA integration does it.

    Args:
        tower: a CLIPVisionModel with eager attention. projector: LLaVA's.
        pixels: of the pictures. budget: K. layer: 0-based feature layer.
    """
    out = tower(pixels, output_attentions=True, output_hidden_states=True)
    rows = projector(out.hidden_states[layer + 1][:, 1:])
    attention = out.attentions[layer][:, :, 0, 1:].mean(dim=1).float()
    return torch.stack([pruned_rows(image, row, budget) for image, row in zip(rows, attention, strict=True)])


def pruned_rows(rows: Tensor, attention: Tensor, budget: int, crops: int = CROPS) -> Tensor:
    """[N, D] rows of one picture and [N] attention -> [K, D]."""
    row_strips, attention_strips = rows.tensor_split(crops), attention.tensor_split(crops)
    scores = torch.stack([_strip_score(r, a) for r, a in zip(row_strips, attention_strips, strict=True) if len(r)])
    weights = scores / (scores.sum() + _EPSILON)
    quotas = torch.floor(weights * budget).long()
    missing = int(budget - quotas.sum())
    if missing > 0:
        quotas[torch.topk(weights, min(missing, len(weights))).indices] += 1
    kept = []
    for strip, strip_attention, quota in zip(row_strips, attention_strips, quotas.tolist(), strict=False):
        if quota >= len(strip):
            kept.append(strip)
        elif quota > 0:
            kept.append(strip[torch.topk(strip_attention, quota).indices])
    chosen = torch.cat(kept)[:budget]
    return torch.cat([chosen, chosen.new_zeros(budget - len(chosen), chosen.shape[1])])


def _strip_score(rows: Tensor, attention: Tensor) -> Tensor:
    if len(rows) == 1:
        return attention.mean()
    unit = rows / (rows.norm(dim=1, keepdim=True) + _EPSILON)
    similarity = (unit @ unit.T).fill_diagonal_(0.0)
    others = len(rows) - 1
    mean = similarity.sum(dim=1, keepdim=True) / others
    variance = (similarity - mean).square().sum(dim=1) / others
    scaled = attention * 1e3
    factor = scaled.abs().mean() / (variance.abs().mean() + _EPSILON)
    score: Tensor = (scaled + 0.09 * factor * variance).mean()
    return score
