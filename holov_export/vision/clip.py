"""CLIP vision tower and LLaVA projector, with the selection in its middle, for pictures that are one square each.

"Select early": the CLS row of a layer's attention decides which tokens stay, and only those go through that layer's
query, output projection and MLP and through what follows. The layer is the feature layer unless `cuts` name an earlier
one (`spec.Cut`). Layers after the feature layer are not built.

Shape words: B images, N patch tokens, T = N + 1 with CLS, K budget, E tower width, D language-model width, A heads.
"""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from holov_export.policies import FeatureSource, SelectionPolicy
from holov_export.selection.registry import rule_from_policy
from holov_export.selection.rule import Selection
from holov_export.spec import Cut, ModelSpec, Precision, VisionSpec
from holov_export.vision.clip_layers import ClipEmbeddings, ClipLayer, activation, take_rows
from holov_export.vision.cutting import join_merged, real_rows_mask, row_index, spread
from holov_export.vision.loading import module_from_checkpoint
from holov_export.vision.module import VisionModule
from holov_export.vision.weights import SafetensorsReader


class LlavaProjector(nn.Module):
    """[.., E] -> [.., D]."""

    def __init__(self, spec: VisionSpec, width: int) -> None:
        super().__init__()
        self.activation = spec.projector_activation
        self.linear_1 = nn.Linear(spec.width, width, bias=spec.projector_bias)
        self.linear_2 = nn.Linear(width, width, bias=spec.projector_bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(activation(self.activation, self.linear_1(x)))


class ClipTower(nn.Module):
    """Embeddings and the layers up to and including the feature layer."""

    def __init__(self, spec: VisionSpec) -> None:
        super().__init__()
        self.embeddings = ClipEmbeddings(spec)
        self.pre_layernorm = nn.LayerNorm(spec.width, eps=spec.layer_norm_eps)
        self.layers = nn.ModuleList(ClipLayer(spec) for _ in range(spec.feature_layer + 1))

    def before_feature_layer(self, pixel_values: Tensor) -> Tensor:
        """[B, 3, H, W] -> [B, T, E], the feature layer's input."""
        return self.through(self.embedded(pixel_values), 0, len(self.layers) - 1)

    def embedded(self, pixel_values: Tensor) -> Tensor:
        """[B, 3, H, W] -> [B, T, E], the first layer's input."""
        return self.pre_layernorm(self.embeddings(pixel_values))

    def through(self, x: Tensor, first: int, end: int, mask: Tensor | None = None) -> Tensor:
        """[B, Q, E] through the layers `first` to `end` - 1."""
        for layer in list(self.layers)[first:end]:  # a slice of a ModuleList would change the names in the graph
            x = layer(x, mask)
        return x

    @property
    def feature_layer(self) -> ClipLayer:
        return self.layer(len(self.layers) - 1)

    def layer(self, index: int) -> ClipLayer:
        layer = self.layers[index]
        assert isinstance(layer, ClipLayer)
        return layer


class _Rows(NamedTuple):
    """What is left behind a cut: rows [B, Q, E] (CLS in front except behind the feature layer), their positions [B, K],
    counts [B], and the saliency [B, N] that decided.
    """

    x: Tensor
    positions: Tensor
    counts: Tensor
    saliency: Tensor

    @property
    def mask(self) -> Tensor:
        """What hides the rows that pad a small quota, see `cutting.real_rows_mask`."""
        return real_rows_mask(self.positions, self.x.dtype)


class LlavaVision(VisionModule):
    """Pixels, budget and quota in; visual tokens, positions, counts and saliency out (see `signature.py`).

    With several cuts the saliency is that of the first, which sees all tokens.
    """

    def __init__(self, spec: ModelSpec, policy: SelectionPolicy, cuts: tuple[Cut, ...] = ()) -> None:
        super().__init__()
        vision = spec.clip
        self.tokens = vision.tokens
        self.features = policy.features
        self.keeps_cls = policy.keeps_cls
        self.cuts = cuts or (Cut(layer=vision.feature_layer),)
        self.vision_tower = ClipTower(vision)
        self.multi_modal_projector = LlavaProjector(vision, spec.decoder.width)
        self.selection = rule_from_policy(policy, vision.grid)

    def forward(self, pixel_values: Tensor, budget: Tensor, quota: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        asked = budget.clamp(1, self.tokens)
        wanted = torch.minimum(quota.clamp_min(1), asked)
        tower, last = self.vision_tower, self.cuts[-1].layer
        x, done = tower.embedded(pixel_values), 0
        before: _Rows | None = None
        saliency: Tensor | None = None
        for cut in self.cuts[:-1]:
            assert cut.keep is not None  # spec.check_cuts
            x = tower.through(x, done, cut.layer, None if before is None else before.mask)
            before = self.cut(cut.layer, x, before, wanted.clamp_min(cut.keep), asked.clamp_min(cut.keep))
            x, done = before.x, cut.layer + 1
            saliency = before.saliency if saliency is None else saliency
        x = tower.through(x, done, last, None if before is None else before.mask)
        rows = self.cut(last, x, before, wanted, asked)
        saliency = rows.saliency if saliency is None else saliency
        real = (rows.positions >= 0).unsqueeze(-1)
        x = rows.x
        if last + 1 < len(tower.layers):
            x = tower.through(x, last + 1, len(tower.layers), rows.mask)[:, 1:]
        tokens = x if self.features is FeatureSource.PROJECTED else self.multi_modal_projector(x)
        zero = torch.zeros((), dtype=tokens.dtype)
        return torch.where(real, tokens, zero), rows.positions, rows.counts, saliency

    def cut(self, index: int, x: Tensor, before: _Rows | None, quota: Tensor, budget: Tensor) -> _Rows:
        """Decide by a layer's attention and run the layer for what stays.

        Args:
            index: of the layer. x: [B, Q, E], its input. before: what an earlier cut left; None if all N are there.
            quota: int64 [B]. budget: int64 [1], the number of rows that come out.
        """
        layer = self.vision_tower.layer(index)
        places, mask = (None, None) if before is None else (before.positions, before.mask)
        normed, keys, values = layer.keys_and_values(x)
        saliency, hidden, features = layer.saliency(normed, keys, mask), None, None
        if self.features is not FeatureSource.NONE:
            hidden = layer.rows(x, normed, keys, values, mask)
            features = self.read(hidden, keys)
        if places is not None:
            saliency, features = spread(saliency, features, places, self.tokens)
        chosen = self.select(saliency, None if features is None else features.float(), quota, budget)
        behind = index + 1 < len(self.vision_tower.layers)
        # with a mask CLS comes along even if nobody needs it: a single row could not be told from a broadcast axis
        with_cls = behind or mask is not None
        at = row_index(chosen.positions, places, self.tokens, with_cls=with_cls, keeps_cls=self.keeps_cls)
        if hidden is None:
            rows = layer.rows(take_rows(x, at), take_rows(normed, at), keys, values, mask)
        elif self.features is FeatureSource.PROJECTED:
            assert features is not None  # read above
            rows = take_rows(features, at - 1)
        else:
            rows = take_rows(hidden, at)
        if with_cls and not behind:
            rows = rows[:, 1:]
        if chosen.merged is not None:
            assert hidden is not None  # a rule that merges reads features
            rows = join_merged(rows, hidden[:, 1:], chosen.positions, chosen.merged)
        return _Rows(rows, chosen.positions, chosen.counts, saliency)

    def read(self, hidden: Tensor, keys: Tensor) -> Tensor:
        """[B, Q - 1, ..]: what the rule reads of each patch, from a layer's output [B, Q, E] and its split keys."""
        if self.features is FeatureSource.KEYS:
            return keys.float().mean(1)[:, 1:]
        patches = hidden[:, 1:]
        return self.multi_modal_projector(patches) if self.features is FeatureSource.PROJECTED else patches

    def features_of(self, pixel_values: Tensor) -> Tensor:
        """float32 [B, N, ..]: what the rule reads at its first cut; for comparisons."""
        first = self.cuts[0].layer
        x = self.vision_tower.through(self.vision_tower.embedded(pixel_values), 0, first)
        layer = self.vision_tower.layer(first)
        normed, keys, values = layer.keys_and_values(x)
        return self.read(layer.rows(x, normed, keys, values), keys).float()

    def select(self, saliency: Tensor, features: Tensor | None, quota: Tensor, budget: Tensor) -> Selection:
        """The rule's decision, its positions cut to [B, K]."""
        size = cast(int, budget.item())
        torch._check(size >= 1)
        torch._check(size <= self.tokens)
        chosen = self.selection(saliency, features, quota, budget)
        return Selection(chosen.positions[:, :size], chosen.counts, chosen.merged)


def vision_from_checkpoint(
    spec: ModelSpec,
    policy: SelectionPolicy,
    reader: SafetensorsReader,
    precision: Precision,
    cuts: tuple[Cut, ...] = (),
) -> LlavaVision:
    """LLaVA-1.5's module with the checkpoint's own weights in `precision`; for any family: `families.vision_from_plan`.

    Raises:
        CheckpointError: a tensor is missing or of another shape.
    """
    return module_from_checkpoint(lambda: LlavaVision(spec, policy, cuts), reader, precision, checkpoint_names)


def checkpoint_names(name: str, tower: str = "vision_tower") -> list[str]:
    """How transformers has spelled one of our parameter names over its versions.

    4.x: vision_tower.vision_model.encoder.layers..., 5.x: model.vision_tower... or vision_tower.encoder.layers...

    Args:
        name: of a parameter of `LlavaVision` or `PackedClipVision`.
        tower: what the checkpoint calls the tower.
    """
    name = name.replace("position_embedding", "position_embedding.weight").replace("pre_layernorm", "pre_layrnorm")
    if not name.startswith("vision_tower."):
        return [name, f"model.{name}"]
    rest = name.removeprefix("vision_tower.")
    if rest.startswith("layers."):
        rest = f"encoder.{rest}"
    return [f"{front}{tower}.{inner}{rest}" for front in ("", "model.") for inner in ("vision_model.", "")]
