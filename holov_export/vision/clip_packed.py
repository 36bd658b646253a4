"""CLIP tower and projector for pictures and clips of several views each, with the selection in its middle.

The tower sees the views of all pictures one after another and makes flat rows of them: the tiles of LLaVA-NeXT, the
frames of Video-LLaVA. The CLS row of a view's attention in the feature layer says how salient its tokens are; the
selection decides for each picture among the tokens of all its views. What follows a view's attention works row by row,
so the second half of the feature layer and the projector run for what stays only, unless the rule reads their output.

Shape words: V views, T tokens of a view with CLS, R rows of all views, B pictures, N tokens of the largest picture,
K budget, E tower width, D language-model width.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from holov_export.policies import FeatureSource, SelectionPolicy
from holov_export.selection.packed import PackedSelection, rows_of_tokens
from holov_export.spec import FramesSpec, ModelSpec
from holov_export.vision.clip import ClipTower, LlavaProjector
from holov_export.vision.module import VisionModule


class PackedClipVision(VisionModule):
    """Views, tables, budget and quota in; tokens, positions, counts and saliency out, see `signature.views_signature`.

    Pictures keep their CLS tokens in the tower; the frames of clips have them among their tokens where the model says
    so (`FramesSpec.cls`), in front of their patches. The saliency of a CLS token is what it attends to itself.

    Args:
        part: "image" for the tiles of pictures, "video" for the frames of clips.

    Raises:
        ValueError: the tower is no CLIP, or the rule cannot decide where pictures have unequal numbers of tokens.
    """

    def __init__(self, spec: ModelSpec, policy: SelectionPolicy, part: Literal["image", "video"] = "image") -> None:
        super().__init__()
        vision, video = spec.clip, part == "video"
        if not policy.packs or policy.features is FeatureSource.KEYS:
            raise ValueError(f"'{policy.method}' needs pictures of equal numbers of tokens")
        self.with_cls = video and isinstance(spec.video, FramesSpec) and spec.video.cls
        self.features = policy.features
        self.vision_tower = ClipTower(vision)
        self.multi_modal_projector = LlavaProjector(vision, spec.decoder.width)
        self.selection = PackedSelection(policy, spec.video_tokens if video else spec.image_tokens)

    def forward(
        self, pixel_values: Tensor, source: Tensor, crops: Tensor, budget: Tensor, quota: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        attended, saliency = self.attended(pixel_values)
        rows, features = attended, None
        if self.features is not FeatureSource.NONE:
            rows = self.read(attended)
            features = rows.float()
        kept = self.selection(saliency, features, source, crops, budget, quota)
        tokens = rows.index_select(0, kept.rows.flatten()).unflatten(0, (kept.rows.shape[0], -1))
        if self.features is FeatureSource.NONE:
            tokens = self.vision_tower.feature_layer.behind_attention(tokens)
        if self.features is not FeatureSource.PROJECTED:
            tokens = self.multi_modal_projector(tokens)
        real = (kept.positions >= 0).unsqueeze(-1)
        tokens = torch.where(real, tokens, torch.zeros((), dtype=tokens.dtype))
        return tokens, kept.positions, kept.counts, kept.saliency

    def attended(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """[V, 3, H, W] -> ([R, E] behind the feature layer's attention, float32 [R] saliency)."""
        layer = self.vision_tower.feature_layer
        x = self.vision_tower.before_feature_layer(pixel_values)
        normed, keys, values = layer.keys_and_values(x)
        saliency = layer.saliency(normed, keys, with_cls=self.with_cls)
        if not self.with_cls:
            x, normed = x[:, 1:], normed[:, 1:]
        return layer.attended(x, normed, keys, values).flatten(0, 1), saliency.flatten()

    def read(self, attended: Tensor) -> Tensor:
        """[R, E] -> [R, ..]: what the rule reads; the feature layer's rows if it reads none."""
        hidden = self.vision_tower.feature_layer.behind_attention(attended)
        return self.multi_modal_projector(hidden) if self.features is FeatureSource.PROJECTED else hidden

    def features_of(self, pixel_values: Tensor, source: Tensor, crops: Tensor) -> Tensor:
        """float32 [B, N, ..]: what the rule reads of each token, zero where there is none; for comparisons."""
        return rows_of_tokens(self.read(self.attended(pixel_values)[0]).float(), source)
