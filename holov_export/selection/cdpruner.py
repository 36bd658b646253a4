"""CDPruner without a question: greedy MAP of a determinantal point process over the tokens.

Source: arXiv 2506.10967; Theia-4869/CDPruner llava/model/llava_arch.py@9541616, with all relevances equal (the
published ones come from CLIP's text tower, which a LLaVA checkpoint does not have). The determinant of the kept tokens'
similarities grows most by the token of which the span of the kept ones leaves most; an incremental Cholesky factor
keeps account.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from holov_export.selection.greedy import GONE, first_state, next_token, selection_of
from holov_export.selection.reference import DPP_FLOOR
from holov_export.selection.rule import Selection, unit_rows

#: as Python's own number: torch.compile makes a tensor of the CPU of one of numpy's
FLOOR = float(DPP_FLOOR)


@torch.library.custom_op("holov_export::dpp_steps", mutates_args=())
def dpp_steps(similarity: Tensor, left: Tensor, state: Tensor, budget: Tensor) -> Tensor:
    """The greedy steps: the state after them (see `selection.greedy`).

    Args:
        similarity: float32 [B, N, N], symmetric.
        left: float32 [B, N], the diagonal of the kernel: what nothing taken leaves of each token.
        state: float32 [B, N], before the first step.
        budget: int64 [1], K, how many steps; at most N. The factor is [B, K, N].
    """
    steps, images = int(budget.item()), torch.arange(state.shape[0], device=state.device)
    factor, state = similarity.new_zeros(state.shape[0], steps, state.shape[1]), state.clone()
    for step in range(steps):
        best = next_token(torch.where(left > FLOOR, left, 0.0), state)
        state[images, best] = GONE - 1 - step
        explained = (factor[images, :, best][:, None] @ factor)[:, 0]
        length = left[images, best][:, None]
        rest = (similarity[images, best] - explained) / length.clamp_min(FLOOR).sqrt()
        factor[:, step] = torch.where(length > FLOOR, rest, 0.0)
        left = left - factor[:, step] ** 2
    return state


@dpp_steps.register_fake
def _(similarity: Tensor, left: Tensor, state: Tensor, budget: Tensor) -> Tensor:
    return torch.empty_like(state)


class CdprunerUnconditionalRule(nn.Module):
    """`cdpruner-unconditional`: the first `quota` tokens that the greedy steps take, in raster order."""

    def forward(
        self,
        saliency: Tensor,
        features: Tensor | None,
        quota: Tensor,
        budget: Tensor,
        crops: Tensor | None = None,
    ) -> Selection:
        assert features is not None  # the policy declares that it reads features
        return selection_of(self.steps(saliency, features, budget), quota)

    def steps(self, saliency: Tensor, features: Tensor, budget: Tensor) -> Tensor:
        """The state after `budget` steps: float32 [B, N]."""
        unit = unit_rows(features)
        left = torch.where(features.abs().amax(-1) > 0, 1.0, 0.0)
        return dpp_steps(unit @ unit.transpose(-1, -2), left, first_state(saliency), budget)
