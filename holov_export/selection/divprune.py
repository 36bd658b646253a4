"""DivPrune: greedy max-min diversity of the tokens, by cosine distance. Saliency plays no part.

Source: arXiv 2503.02175; vbdi/divprune LLaVA/llava/model/llava_arch.py@799e2d9. First the token whose nearest other one
is farthest; then, step after step, the one whose nearest kept one is farthest. Distances are compared as similarities,
because 1 - cosine rounds. A step looks at one row of the similarities: N numbers.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from holov_export.selection.greedy import GONE, first_state, next_token, selection_of
from holov_export.selection.rule import Selection, unit_rows


@torch.library.custom_op("holov_export::divprune_steps", mutates_args=())
def divprune_steps(similarity: Tensor, state: Tensor, budget: Tensor) -> Tensor:
    """The greedy steps: the state after them (see `selection.greedy`).

    Args:
        similarity: float32 [B, N, N], symmetric. state: float32 [B, N], before the first step.
        budget: int64 [1], how many steps; at most N.
    """
    itself = torch.eye(state.shape[1], dtype=torch.bool, device=state.device)
    others = torch.where(itself | (state < 0)[:, None], GONE, similarity)
    score, state = -others.amax(-1), state.clone()
    nearest = torch.full_like(score, GONE)
    images = torch.arange(state.shape[0], device=state.device)
    for step in range(1, int(budget.item()) + 1):
        best = next_token(score, state)
        state[images, best] = GONE - step
        nearest = torch.maximum(nearest, similarity[images, best])
        score = -nearest
    return state


@divprune_steps.register_fake
def _(similarity: Tensor, state: Tensor, budget: Tensor) -> Tensor:
    return torch.empty_like(state)


class DivpruneRule(nn.Module):
    """`divprune`: the first `quota` tokens that the greedy steps take, in raster order."""

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
        return divprune_steps(unit @ unit.transpose(-1, -2), first_state(saliency), budget)
