"""The vision encoder without any selection: what a pruned one is compared with."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from holov_export.policies import UniformPolicy
from holov_export.spec import ModelSpec
from holov_export.vision.clip import LlavaVision
from holov_export.vision.module import VisionModule


class PlainVision(VisionModule):
    """All N tokens through the feature layer, the first K of them through the projector; K = N is the plain encoder.

    Inputs and outputs are those of `signature.py`, so that whatever runs a pruned graph runs this one, at no cost of
    its own: the slice that drops CLS drops the rows past K as well, and saliency is zeros. Quotas are not honoured.
    """

    def __init__(self, vision: LlavaVision) -> None:
        super().__init__()
        self.tokens = vision.tokens
        self.vision_tower, self.multi_modal_projector = vision.vision_tower, vision.multi_modal_projector

    def forward(self, pixel_values: Tensor, budget: Tensor, quota: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        asked = budget.clamp(1, self.tokens)
        size = cast(int, asked.item())
        torch._check(size >= 1)
        torch._check(size <= self.tokens)
        torch._check(quota.shape[0] == pixel_values.shape[0])
        tokens = self.multi_modal_projector(self.hidden(pixel_values)[:, 1 : size + 1])
        # always K; the quota takes part because some builders drop an input that nothing reads
        counts = torch.maximum(torch.minimum(quota, asked), asked)
        places = torch.arange(size, device=quota.device)
        positions = places[None].expand(pixel_values.shape[0], -1)
        saliency = torch.zeros(1, self.tokens, device=quota.device).expand(pixel_values.shape[0], -1)
        return tokens, positions, counts, saliency

    def hidden(self, pixel_values: Tensor) -> Tensor:
        """[B, 3, H, W] -> [B, T, E], the feature layer's output."""
        return self.vision_tower.feature_layer(self.vision_tower.before_feature_layer(pixel_values))

    def features_of(self, pixel_values: Tensor) -> Tensor:
        """float32 [B, N, E]: the feature layer's rows, for comparisons."""
        return self.hidden(pixel_values)[:, 1:].float()


def plain_vision(spec: ModelSpec) -> PlainVision:
    """The plain encoder of a model, its weights random."""
    # the rule is dropped, so the one without tensors of its own is taken
    return PlainVision(LlavaVision(spec, UniformPolicy()))
