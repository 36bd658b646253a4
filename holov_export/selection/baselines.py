"""The controls: `cls-topk`, `uniform`, `random`. A rule that does not beat them is not worth its name."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from holov_export.policies import RandomPolicy
from holov_export.selection.reference import random_order
from holov_export.selection.rule import Selection, raster_order


class ClsTopkRule(nn.Module):
    """`cls-topk`: the tokens with the highest CLS attention, in raster order."""

    def forward(self, saliency: Tensor, features: Tensor | None, quota: Tensor, budget: Tensor) -> Selection:
        return raster_order(saliency, quota)


class UniformRule(nn.Module):
    """`uniform`: the middle of each of `quota` equal parts of the raster, blind to the picture."""

    def forward(self, saliency: Tensor, features: Tensor | None, quota: Tensor, budget: Tensor) -> Selection:
        tokens = saliency.shape[-1]
        index = torch.arange(tokens, device=saliency.device)[None]
        asked = quota[:, None]
        middle = torch.div((2 * index + 1) * tokens, 2 * asked, rounding_mode="floor")
        return Selection(torch.where(index < asked, middle, -1), quota)


class RandomRule(nn.Module):
    """`random`: the first `quota` of a permutation drawn at export, in raster order."""

    priority: Tensor

    def __init__(self, policy: RandomPolicy, grid: tuple[int, int]) -> None:
        super().__init__()
        tokens = grid[0] * grid[1]
        priority = np.empty(tokens, dtype=np.float32)
        priority[random_order(policy, tokens)] = np.arange(tokens, 0, -1)
        self.register_buffer("priority", torch.from_numpy(priority)[None], persistent=False)

    def forward(self, saliency: Tensor, features: Tensor | None, quota: Tensor, budget: Tensor) -> Selection:
        return raster_order(self.priority.expand_as(saliency), quota)
