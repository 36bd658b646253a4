"""`holov-official` for Qwen2.5-VL: what the published port does, with its two mistakes.

The port prunes the prompt between the position of the vision_start token and that of the last image token: the
candidates are vision_start and all image tokens but the last, which always stays. The saliency that it gives them is
that of the image tokens in the order of the tower's windows, one after another, whatever their places. Quotas, the
order and lost tokens are those of the published LLaVA code; the crops are `geometry.crops_of_official_qwen`.

A quota q keeps q - 1 candidates and the last image token. The position N_b, the picture's number of tokens, is the
vision_start token: its row is zero here, and the host puts the word there. -1 before the count is a zero row.

Source: obananas/HoloV qwen-model-HoloV/{utils,modeling_qwen2_5_vl}.py@1d2e65e.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from holov_export.policies import HolovOfficialPolicy
from holov_export.selection.packed import Kept
from holov_export.selection.registry import packed_rule_from_policy


class OfficialQwenSelection(nn.Module):
    """The rule, with the interface of `packed.PackedSelection`."""

    def __init__(self, policy: HolovOfficialPolicy, tokens: int) -> None:
        """Build the rule for pictures of `tokens` tokens at most."""
        super().__init__()
        self.selection = packed_rule_from_policy(policy, tokens)

    def forward(
        self, saliency: Tensor, features: Tensor | None, source: Tensor, crops: Tensor, budget: Tensor, quota: Tensor
    ) -> Kept:
        """See `PackedSelection.forward`. The tower's rows of a picture follow each other; crops are of candidates."""
        exists = source >= 0
        place = torch.arange(source.shape[1], device=source.device)
        own = exists.long().sum(-1, keepdim=True)
        asked = budget.clamp(1, source.shape[1])
        wanted = torch.minimum(torch.minimum(quota.clamp_min(1), asked)[:, None], own)
        of_token = torch.where(exists, _taken(saliency, source.clamp_min(0)), -1.0)
        first = torch.where(exists, source, saliency.shape[0]).amin(-1, keepdim=True)
        by_window = _taken(saliency, (first + place).clamp_max(saliency.shape[0] - 1))
        by_window = torch.where(exists, by_window, -1.0)
        chosen = self.selection(by_window, None, wanted[:, 0] - 1, asked, torch.where(exists, crops, -1))
        positions = torch.where(chosen.positions > 0, chosen.positions - 1, chosen.positions)
        positions = torch.where(chosen.positions == 0, own, positions)
        positions = torch.where(place == wanted - 1, own - 1, torch.where(place < wanted, positions, -1))
        size = cast(int, asked.item())
        torch._check(size >= 1)
        torch._check(size <= source.shape[1])
        positions = positions[:, :size]
        real = (positions >= 0) & (positions < own)
        rows = torch.where(real, source.gather(1, torch.where(real, positions, 0)), 0)
        return Kept(rows, positions, wanted[:, 0], of_token)


def _taken(values: Tensor, index: Tensor) -> Tensor:
    """[R] and int64 [B, N] -> [B, N]."""
    return values.index_select(0, index.flatten()).unflatten(0, index.shape)
