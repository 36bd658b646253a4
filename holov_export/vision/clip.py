"""CLIP vision tower and LLaVA projector, with the selection in its middle.

"Select early": the CLS row of the feature layer's attention decides which tokens stay, and only those go through that
layer's query, output projection and MLP and through the projector. Layers after the feature layer are not built.

Shape words: B images, N patch tokens, T = N + 1 with CLS, K budget, E tower width, D language-model width, A heads.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import sys
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from holov_export.errors import CheckpointError
from holov_export.policies import FeatureSource, SelectionPolicy
from holov_export.selection.registry import rule_from_policy
from holov_export.spec import ModelSpec, Precision, VisionSpec
from holov_export.vision.weights import SafetensorsReader

TORCH_DTYPES = {Precision.FP32: torch.float32, Precision.FP16: torch.float16, Precision.BF16: torch.bfloat16}


def activation(name: str, x: Tensor) -> Tensor:
    """transformers' activation of that name."""
    if name == "quick_gelu":
        return x * torch.sigmoid(1.702 * x)
    return F.gelu(x, approximate="tanh" if name == "gelu_pytorch_tanh" else "none")


class ClipEmbeddings(nn.Module):
    """[B, 3, H, W] -> [B, T, E]: patches, CLS in front, positions added."""

    def __init__(self, spec: VisionSpec) -> None:
        super().__init__()
        self.patch_embedding = nn.Conv2d(spec.channels, spec.width, spec.patch_size, spec.patch_size, bias=False)
        self.class_embedding = nn.Parameter(torch.empty(spec.width))
        self.position_embedding = nn.Parameter(torch.empty(spec.tokens + 1, spec.width))

    def forward(self, pixel_values: Tensor) -> Tensor:
        patches = self.patch_embedding(pixel_values).flatten(2).transpose(1, 2)
        cls = self.class_embedding.expand(patches.shape[0], 1, -1)
        return torch.cat([cls, patches], dim=1) + self.position_embedding


class ClipAttention(nn.Module):
    """Projections of one layer's attention. Heads are split off by `heads_of`: [B, T, E] -> [B, A, T, E/A]."""

    def __init__(self, spec: VisionSpec) -> None:
        super().__init__()
        self.heads = spec.heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(spec.width, spec.width) for _ in range(4))

    def heads_of(self, rows: Tensor) -> Tensor:
        return rows.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def attend(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Attention of [B, Q, E] queries over split keys and values; the output projection included."""
        mixed = F.scaled_dot_product_attention(self.heads_of(queries), keys, values)
        return self.out_proj(mixed.transpose(1, 2).flatten(2))


class ClipMlp(nn.Module):
    """[.., E] -> [.., E]."""

    def __init__(self, spec: VisionSpec) -> None:
        super().__init__()
        self.activation = spec.activation
        self.fc1 = nn.Linear(spec.width, spec.mlp_width)
        self.fc2 = nn.Linear(spec.mlp_width, spec.width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(activation(self.activation, self.fc1(x)))


class ClipLayer(nn.Module):
    """One pre-norm encoder layer that can also run for some of its rows only."""

    def __init__(self, spec: VisionSpec) -> None:
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(spec.width, eps=spec.layer_norm_eps)
        self.self_attn = ClipAttention(spec)
        self.layer_norm2 = nn.LayerNorm(spec.width, eps=spec.layer_norm_eps)
        self.mlp = ClipMlp(spec)

    def forward(self, x: Tensor) -> Tensor:
        normed, keys, values = self.keys_and_values(x)
        return self.rows(x, normed, keys, values)

    def keys_and_values(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """([B, T, E] normed input, [B, A, T, E/A] keys, values)."""
        normed, attn = self.layer_norm1(x), self.self_attn
        return normed, attn.heads_of(attn.k_proj(normed)), attn.heads_of(attn.v_proj(normed))

    def rows(self, x: Tensor, normed: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """The layer's output for some rows: x and normed are [B, Q, E]."""
        x = x + self.self_attn.attend(self.self_attn.q_proj(normed), keys, values)
        return x + self.mlp(self.layer_norm2(x))

    def saliency(self, normed: Tensor, keys: Tensor) -> Tensor:
        """float32 [B, N]: the CLS row of the attention, mean over heads, CLS column dropped; no dense map."""
        attn = self.self_attn
        query = attn.heads_of(attn.q_proj(normed[:, :1])).float()
        scores = query @ keys.float().transpose(-1, -2) * (query.shape[-1] ** -0.5)
        return scores.softmax(-1).mean(1)[:, 0, 1:]


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
        x = self.pre_layernorm(self.embeddings(pixel_values))
        for layer in list(self.layers)[:-1]:  # a slice of a ModuleList would change the names in the graph
            x = layer(x)
        return x

    @property
    def feature_layer(self) -> ClipLayer:
        layer = self.layers[-1]
        assert isinstance(layer, ClipLayer)
        return layer


def take_rows(rows: Tensor, index: Tensor) -> Tensor:
    """[B, T, E] and [B, K] -> [B, K, E], by one Gather over the flattened batch."""
    batch, length = rows.shape[0], rows.shape[1]
    start = torch.arange(batch, device=rows.device)[:, None] * length
    taken = rows.flatten(0, 1).index_select(0, (index + start).flatten())
    return taken.unflatten(0, (batch, -1))


class LlavaVision(nn.Module):
    """Pixels, budget and quota in; visual tokens, positions, counts and saliency out (see `signature.py`)."""

    def __init__(self, spec: ModelSpec, policy: SelectionPolicy) -> None:
        super().__init__()
        self.tokens = spec.vision.tokens
        self.features = policy.features
        self.vision_tower = ClipTower(spec.vision)
        self.multi_modal_projector = LlavaProjector(spec.vision, spec.decoder.width)
        self.selection = rule_from_policy(policy, spec.vision.grid)

    def forward(self, pixel_values: Tensor, budget: Tensor, quota: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        asked = budget.clamp(1, self.tokens)
        wanted = torch.minimum(quota.clamp_min(1), asked)
        size = cast(int, asked.item())
        torch._check(size >= 1)
        torch._check(size <= self.tokens)

        x = self.vision_tower.before_feature_layer(pixel_values)
        layer = self.vision_tower.feature_layer
        normed, keys, values = layer.keys_and_values(x)
        saliency = layer.saliency(normed, keys)
        if self.features is FeatureSource.NONE:
            positions, counts = self.select(saliency, None, wanted, asked, size)
            index = positions.clamp_min(0) + 1
            hidden = layer.rows(take_rows(x, index), take_rows(normed, index), keys, values)
            tokens = self.multi_modal_projector(hidden)
        else:
            hidden = layer.rows(x, normed, keys, values)[:, 1:]
            if self.features is FeatureSource.PROJECTED:
                hidden = self.multi_modal_projector(hidden)
            positions, counts = self.select(saliency, hidden.float(), wanted, asked, size)
            tokens = take_rows(hidden, positions.clamp_min(0))
            if self.features is FeatureSource.HIDDEN:
                tokens = self.multi_modal_projector(tokens)
        real = (positions >= 0).unsqueeze(-1)
        return torch.where(real, tokens, torch.zeros((), dtype=tokens.dtype)), positions, counts, saliency

    def hidden(self, pixel_values: Tensor) -> Tensor:
        """[B, N, E]: all patch rows of the feature layer, before the projector; for comparisons."""
        x = self.vision_tower.before_feature_layer(pixel_values)
        return self.vision_tower.feature_layer(x)[:, 1:]

    def select(
        self, saliency: Tensor, features: Tensor | None, quota: Tensor, budget: Tensor, size: int
    ) -> tuple[Tensor, Tensor]:
        """(positions int64 [B, K], counts int64 [B])."""
        positions, counts = self.selection(saliency, features, quota, budget)
        return positions[:, :size], counts


def vision_from_checkpoint(
    spec: ModelSpec, policy: SelectionPolicy, reader: SafetensorsReader, precision: Precision
) -> LlavaVision:
    """The module with the checkpoint's own weights in `precision`; reads only the tensors that it needs.

    Raises:
        CheckpointError: a tensor is missing or of another shape.
    """
    module = LlavaVision(spec, policy).eval().requires_grad_(False)
    with torch.device("meta"):
        module.vision_tower = ClipTower(spec.vision)
        module.multi_modal_projector = LlavaProjector(spec.vision, spec.decoder.width)
    state = {}
    for name, parameter in module.named_parameters():
        tensor = reader.read(checkpoint_names(name))
        if tensor.shape != parameter.shape:
            raise CheckpointError(
                f"tensor '{name}' has shape {tuple(tensor.shape)}, config.json says {tuple(parameter.shape)}."
            )
        state[name] = tensor.to(TORCH_DTYPES[precision])
    module.load_state_dict(state, assign=True, strict=True)
    return module.requires_grad_(False)


def forget_weights(module: nn.Module) -> None:
    """Give the memory of a module's weights back to the operating system; the module is of no use afterwards.

    Dropping the module is not enough: the exporter keeps its parameters alive, and the C library keeps freed blocks of
    this size for itself.
    """
    for parameter in module.parameters():
        parameter.data = torch.empty(0, dtype=parameter.dtype)
    gc.collect()
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):  # a C library without malloc_trim
            ctypes.CDLL(None).malloc_trim(0)


def checkpoint_names(name: str) -> list[str]:
    """How transformers has spelled one of our parameter names over its versions.

    4.x: vision_tower.vision_model.encoder.layers..., 5.x: model.vision_tower... or vision_tower.encoder.layers...
    """
    name = name.replace("position_embedding", "position_embedding.weight").replace("pre_layernorm", "pre_layrnorm")
    if not name.startswith("vision_tower."):
        return [name, f"model.{name}"]
    rest = name.removeprefix("vision_tower.")
    if rest.startswith("layers."):
        rest = f"encoder.{rest}"
    return [f"{front}vision_tower.{inner}{rest}" for front in ("", "model.") for inner in ("vision_model.", "")]
