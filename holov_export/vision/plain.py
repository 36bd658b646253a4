"""The vision encoder without any selection: what a pruned one is compared with."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from holov_export.policies import UniformPolicy
from holov_export.spec import ModelSpec, Precision
from holov_export.vision.clip import LlavaVision, vision_from_checkpoint
from holov_export.vision.weights import SafetensorsReader


class PlainVision(nn.Module):
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
        hidden = self.vision_tower.feature_layer(self.vision_tower.before_feature_layer(pixel_values))
        tokens = self.multi_modal_projector(hidden[:, 1 : size + 1])
        # always K; the quota takes part because some builders drop an input that nothing reads
        counts = torch.maximum(torch.minimum(quota, asked), asked)
        places = torch.arange(size, device=quota.device)
        positions = places[None].expand(pixel_values.shape[0], -1)
        saliency = torch.zeros(1, self.tokens, device=quota.device).expand(pixel_values.shape[0], -1)
        return tokens, positions, counts, saliency


def plain_from_checkpoint(spec: ModelSpec, reader: SafetensorsReader, precision: Precision) -> PlainVision:
    """The plain encoder with the checkpoint's own weights; see `clip.vision_from_checkpoint`."""
    # the rule is dropped, so the one without tensors of its own is taken
    return PlainVision(vision_from_checkpoint(spec, UniformPolicy(), reader, precision)).eval()
