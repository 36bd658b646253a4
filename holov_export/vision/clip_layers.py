"""The parts of a CLIP vision tower, each of which can run for some of its rows only.

Shape words: B images, N patch tokens, T = N + 1 with CLS, E tower width, A heads.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from holov_export.spec import VisionSpec


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

    def attend(self, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attention of [B, Q, E] queries over split keys and values; the output projection included.

        `mask` is added to the scores; it broadcasts to [B, A, Q, T].
        """
        mixed = F.scaled_dot_product_attention(self.heads_of(queries), keys, values, attn_mask=mask)
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

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        normed, keys, values = self.keys_and_values(x)
        return self.rows(x, normed, keys, values, mask)

    def keys_and_values(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """([B, T, E] normed input, [B, A, T, E/A] keys, values)."""
        normed, attn = self.layer_norm1(x), self.self_attn
        return normed, attn.heads_of(attn.k_proj(normed)), attn.heads_of(attn.v_proj(normed))

    def rows(self, x: Tensor, normed: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None = None) -> Tensor:
        """The layer's output for some rows: x and normed are [B, Q, E]."""
        return self.behind_attention(self.attended(x, normed, keys, values, mask))

    def attended(self, x: Tensor, normed: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None = None) -> Tensor:
        """[B, Q, E]: the first half of the layer, in which rows see each other."""
        return x + self.self_attn.attend(self.self_attn.q_proj(normed), keys, values, mask)

    def behind_attention(self, x: Tensor) -> Tensor:
        """[.., E] -> [.., E]: the second half, each row for itself."""
        return x + self.mlp(self.layer_norm2(x))

    def saliency(self, normed: Tensor, keys: Tensor, mask: Tensor | None = None, *, with_cls: bool = False) -> Tensor:
        """float32 [B, N], [B, T] with CLS: the CLS row of the attention, mean over heads; no dense map."""
        attn = self.self_attn
        query = attn.heads_of(attn.q_proj(normed[:, :1])).float()
        scores = query @ keys.float().transpose(-1, -2) * (query.shape[-1] ** -0.5)
        if mask is not None:
            scores = scores + mask.float()
        return scores.softmax(-1).mean(1)[:, 0, 0 if with_cls else 1 :]


def take_rows(rows: Tensor, index: Tensor) -> Tensor:
    """[B, T, E] and [B, K] -> [B, K, E], by one Gather over the flattened batch."""
    batch, length = rows.shape[0], rows.shape[1]
    start = torch.arange(batch, device=rows.device)[:, None] * length
    taken = rows.flatten(0, 1).index_select(0, (index + start).flatten())
    return taken.unflatten(0, (batch, -1))
