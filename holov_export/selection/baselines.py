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

    def forward(
        self,
        saliency: Tensor,
        features: Tensor | None,
        quota: Tensor,
        budget: Tensor,
        crops: Tensor | None = None,
    ) -> Selection:
        return raster_order(saliency, quota)


class UniformRule(nn.Module):
    """`uniform`: the middle of each of `quota` equal parts of the raster, blind to the picture."""

    def forward(
        self,
        saliency: Tensor,
        features: Tensor | None,
        quota: Tensor,
        budget: Tensor,
        crops: Tensor | None = None,
    ) -> Selection:
        asked, index = quota[:, None], torch.arange(saliency.shape[-1], device=saliency.device)[None]
        if crops is None:
            tokens = saliency.shape[-1]
            middle = torch.div((2 * index + 1) * tokens, 2 * asked, rounding_mode="floor")
        else:
            middle = self.middles(index, (saliency >= 0).long().sum(-1, keepdim=True), asked)
        return Selection(torch.where(index < asked, middle, -1), quota)

    def middles(self, index: Tensor, tokens: Tensor, asked: Tensor) -> Tensor:
        """int64 [B, N]: the middle of each part of pictures of `tokens` [B, 1].

        ONNX divides whole numbers here as float32, which is off by one where the product passes 2^24: put right after.
        """
        product, parts = (2 * index + 1) * tokens, 2 * asked.clamp_min(1)  # a picture without tokens asks for none
        middle = torch.div(product, parts, rounding_mode="floor")
        rest = product - middle * parts
        return middle + (rest >= parts).long() - (rest < 0).long()


class FirstRule(nn.Module):
    """No rule: the first tokens, for comparisons."""

    def forward(
        self,
        saliency: Tensor,
        features: Tensor | None,
        quota: Tensor,
        budget: Tensor,
        crops: Tensor | None = None,
    ) -> Selection:
        index = torch.arange(saliency.shape[-1], device=saliency.device)[None]
        return Selection(torch.where(index < quota[:, None], index, -1), quota)


class RandomRule(nn.Module):
    """`random`: the first `quota` of a permutation drawn at export, in raster order.

    Smaller pictures than the largest keep the first `quota` that they have.
    """

    priority: Tensor

    def __init__(self, policy: RandomPolicy, tokens: int) -> None:
        super().__init__()
        priority = np.empty(tokens, dtype=np.float32)
        priority[random_order(policy, tokens)] = np.arange(tokens, 0, -1)
        self.register_buffer("priority", torch.from_numpy(priority)[None], persistent=False)

    def forward(
        self,
        saliency: Tensor,
        features: Tensor | None,
        quota: Tensor,
        budget: Tensor,
        crops: Tensor | None = None,
    ) -> Selection:
        if crops is None:
            return raster_order(self.priority.expand_as(saliency), quota)
        index = torch.arange(saliency.shape[-1], device=saliency.device)
        return raster_order(torch.where(saliency >= 0, self.priority.index_select(1, index), -1.0), quota)
