"""SCOPE: greedy, each step takes the token that covers most of what is not covered yet, weighted by its saliency.

Source: arXiv 2510.24214; kinredon/SCOPE scope/clip_encoder.py. With C(u) the best similarity of token u to a kept one,
a step takes argmax over v of A(v)^alpha * sum over u of max(sim(u, v) - C(u), 0).

The steps are a loop whose trip count is the budget. torch cannot export such a loop, so it is an operator of its own
(`holov_export::scope_steps`) that the exporter translates to ONNX Loop; see `export/translations.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from holov_export.policies import ScopePolicy
from holov_export.selection.reference import EPSILON
from holov_export.selection.rule import raster_order


@torch.library.custom_op("holov_export::scope_steps", mutates_args=())
def scope_steps(similarity: Tensor, weights: Tensor, budget: Tensor) -> Tensor:
    """The greedy steps: float32 [B, N], 1 for the token that the first step takes, 2 for the second, 0 for none.

    Args:
        similarity: float32 [B, N, N], symmetric. weights: float32 [B, N], not negative.
        budget: int64 [1], how many steps; at most N.
    """
    covered = torch.zeros_like(weights)
    taken = torch.zeros_like(weights)
    images = torch.arange(weights.shape[0], device=weights.device)
    for step in range(1, int(budget.item()) + 1):
        gain = (similarity - covered[:, None]).clamp_min(0).sum(-1) * weights
        score = torch.where(taken > 0, -1.0, gain)
        best = _first_largest(score)
        taken[images, best] = float(step)
        covered = torch.maximum(covered, similarity[images, best])
    return taken


@scope_steps.register_fake
def _(similarity: Tensor, weights: Tensor, budget: Tensor) -> Tensor:
    return torch.empty_like(weights)


def _first_largest(values: Tensor) -> Tensor:
    """int64 [B]: index of the largest value, the lower one of equals (torch.argmax promises no order)."""
    index = torch.arange(values.shape[-1], device=values.device)
    largest = values == values.amax(-1, keepdim=True)
    return torch.where(largest, index, values.shape[-1]).amin(-1)


class ScopeRule(nn.Module):
    """`scope`: the first `quota` tokens that the greedy steps take, in raster order.

    The steps of a smaller quota are the first steps of a larger one, so a batch runs `budget` steps once and each
    picture keeps as many as its own quota says.
    """

    def __init__(self, policy: ScopePolicy) -> None:
        super().__init__()
        self.alpha = policy.alpha

    def forward(
        self, saliency: Tensor, features: Tensor | None, quota: Tensor, budget: Tensor
    ) -> tuple[Tensor, Tensor]:
        assert features is not None  # the policy declares that it reads features
        unit = features / features.norm(dim=-1, keepdim=True).clamp_min(float(EPSILON))
        weights = saliency if self.alpha == 1 else saliency.clamp_min(0) ** self.alpha
        taken = scope_steps(unit @ unit.transpose(-1, -2), weights, budget)
        last = float(saliency.shape[-1] + 1)
        return raster_order(torch.where(taken > 0, last - taken, 0.0), quota)
