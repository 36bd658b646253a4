"""SCOPE: greedy, each step takes the token that covers most of what is not covered yet, weighted by its saliency.

Source: arXiv 2510.24214; kinredon/SCOPE scope/clip_encoder.py@6bf7306. With C(u) the best similarity of token u to a
kept one, a step takes argmax over v of A(v)^alpha * sum over u of max(sim(u, v) - C(u), 0).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from holov_export.policies import ScopePolicy
from holov_export.selection.greedy import GONE, first_state, next_token, selection_of
from holov_export.selection.rule import Selection, unit_rows


@torch.library.custom_op("holov_export::scope_steps", mutates_args=())
def scope_steps(similarity: Tensor, weights: Tensor, state: Tensor, budget: Tensor) -> Tensor:
    """The greedy steps: the state after them (see `selection.greedy`).

    Args:
        similarity: float32 [B, N, N], symmetric. weights: float32 [B, N], not negative where a token is left.
        state: float32 [B, N], before the first step.
        budget: int64 [1], how many steps; at most N.
    """
    covered, state = torch.zeros_like(weights), state.clone()
    images = torch.arange(weights.shape[0], device=weights.device)
    for step in range(1, int(budget.item()) + 1):
        gain = (similarity - covered[:, None]).clamp_min(0).sum(-1) * weights
        best = next_token(gain, state)
        state[images, best] = GONE - step
        covered = torch.maximum(covered, similarity[images, best])
    return state


@scope_steps.register_fake
def _(similarity: Tensor, weights: Tensor, state: Tensor, budget: Tensor) -> Tensor:
    return torch.empty_like(weights)


class ScopeRule(nn.Module):
    """`scope`: the first `quota` tokens that the greedy steps take, in raster order."""

    def __init__(self, policy: ScopePolicy) -> None:
        super().__init__()
        self.alpha = policy.alpha

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
        weights = saliency if self.alpha == 1 else saliency.clamp_min(0) ** self.alpha
        return scope_steps(unit @ unit.transpose(-1, -2), weights, first_state(saliency), budget)
