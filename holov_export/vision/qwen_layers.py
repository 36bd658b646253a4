"""The parts of Qwen2.5-VL's vision transformer, each of which can run for some of its rows only.

Linear layers and norms see the patches of all views as one list of rows, so nothing is padded there. Only attention
puts rows together in groups (windows or views), by tables of row numbers, and takes its result back.

Shape words: P patches of all views, G groups, L patches of the largest group, A heads, E width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from holov_export.spec import QwenVisionSpec
from holov_export.vision import clip_layers

#: added to the score of a key that is not there: its share of the softmax is 0, and float16 can hold it
_HIDDEN = -30000.0
#: queries that the last block's attention looks at in one step; a multiple of what matrix units are made for
BLOCK = 256


@torch.library.custom_op("holov_export::attend_and_receive", mutates_args=())
def attend_and_receive(
    queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor, shares: Tensor
) -> tuple[Tensor, Tensor]:
    """Attention, and how much of it each key gets, `BLOCK` queries at a time: there is no map of L x L.

    Args:
        queries, keys, values: float32 [G, A, L, E/A], queries scaled. mask: float32 [G, L], added to the keys' scores.
        shares: float32 [G, L], what each query's attention counts for.

    Returns:
        (float32 [G, L, E], heads side by side; float32 [G, L], sum over heads and queries of share times attention).
    """
    mixed, received = [], torch.zeros_like(mask)
    transposed = keys.transpose(-1, -2)
    for start in range(0, queries.shape[2], BLOCK):
        few = slice(start, start + BLOCK)
        attention = (queries[:, :, few] @ transposed + mask[:, None, None]).softmax(-1)
        received = received + (shares[:, None, None, few] @ attention).sum((1, 2))
        mixed.append(attention @ values)
    return torch.cat(mixed, dim=2).transpose(1, 2).flatten(2), received


@attend_and_receive.register_fake
def _(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor, shares: Tensor) -> tuple[Tensor, Tensor]:
    groups, heads, longest, width = queries.shape
    return queries.new_empty(groups, longest, heads * width), torch.empty_like(mask)


class Groups(NamedTuple):
    """Which patches see each other.

    Attributes:
        rows: int64 [G, L], the patches of each group; 0 where `real` is False.
        slots: int64 [P], where each patch is in `rows`, flattened.
        real: bool [G, L].
        mask: [G, 1, 1, L], to be added to attention scores.
        cos, sin: float32 [G, 1, L, E/A], of each patch's rotary angles; `sin` is negative in its first half.
    """

    rows: Tensor
    slots: Tensor
    real: Tensor
    mask: Tensor
    cos: Tensor
    sin: Tensor


class RotaryAngles(nn.Module):
    """Cosine and sine of each patch's angles: a quarter of a head turns by the row, a quarter by the column, twice.

    Source: transformers 5.23 modeling_qwen2_5_vl.py, Qwen2_5_VLVisionRotaryEmbedding.
    """

    frequencies: Tensor

    def __init__(self, spec: QwenVisionSpec) -> None:
        super().__init__()
        half = spec.width // spec.heads // 2
        powers = torch.arange(0, half, 2, dtype=torch.float32) / half
        self.register_buffer("frequencies", 1.0 / spec.theta**powers, persistent=False)

    def forward(self, places: Tensor) -> tuple[Tensor, Tensor]:
        """int64 [P, 2] -> (float32 [P, E/A], float32 [P, E/A] with the first half negative)."""
        angles = (places[:, :, None].float() * self.frequencies.float()).flatten(1)
        cos, sin = angles.cos(), angles.sin()
        return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)


def groups_of(rows: Tensor, slots: Tensor, cos: Tensor, sin: Tensor, dtype: torch.dtype) -> Groups:
    """The groups that int64 `rows` [G, L], -1 where a group has no more patches, describe.

    Args:
        slots: int64 [P]. cos, sin: float32 [P, E/A]. dtype: of attention scores.
    """
    real, rows = rows >= 0, rows.clamp_min(0)
    mask = torch.where(real, 0.0, _HIDDEN).to(dtype)[:, None, None]
    cos, sin = (table.index_select(0, rows.flatten()).unflatten(0, rows.shape) for table in (cos, sin))
    return Groups(rows, slots, real, mask, cos[:, None], sin[:, None])


def turned(heads: Tensor, groups: Groups) -> Tensor:
    """[G, A, L, E/A] turned by each patch's angles, in float32."""
    x = heads.float()
    half = x.shape[-1] // 2
    swapped = torch.cat([x[..., half:], x[..., :half]], dim=-1)
    return (x * groups.cos + swapped * groups.sin).to(heads.dtype)


class RmsNorm(nn.Module):
    """[.., E] -> [.., E], divided by the root of the mean square in float32."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(width))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        normed = wide / (wide.pow(2).mean(-1, keepdim=True) + self.eps).sqrt()
        return self.weight * normed.to(x.dtype)


class QwenAttention(nn.Module):
    """Projections of one block's attention, between rows and groups."""

    def __init__(self, spec: QwenVisionSpec) -> None:
        super().__init__()
        self.heads = spec.heads
        self.qkv = nn.Linear(spec.width, 3 * spec.width)
        self.proj = nn.Linear(spec.width, spec.width)

    def queries_keys_values(self, normed: Tensor, groups: Groups) -> tuple[Tensor, Tensor, Tensor]:
        """[P, E] -> three times [G, A, L, E/A], queries and keys turned."""
        grouped = F.embedding(groups.rows, self.qkv(normed))
        parts = grouped.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return turned(parts[0], groups), turned(parts[1], groups), parts[2]

    def mixed(self, normed: Tensor, groups: Groups) -> Tensor:
        """[P, E] -> [G * L, E]: the values that each patch attends to, before the output projection."""
        queries, keys, values = self.queries_keys_values(normed, groups)
        mixed = F.scaled_dot_product_attention(queries, keys, values, attn_mask=groups.mask)
        return mixed.transpose(1, 2).flatten(2).flatten(0, 1)

    def mixed_and_received(self, normed: Tensor, groups: Groups) -> tuple[Tensor, Tensor]:
        """(what `mixed` returns; float32 [G * L], the mean over heads and a group's queries of what each key gets)."""
        queries, keys, values = self.queries_keys_values(normed, groups)
        real = groups.real.float()
        shares = real / (real.sum(-1, keepdim=True).clamp_min(1.0) * self.heads)
        mask = groups.mask[:, 0, 0].float()
        scaled = queries.float() * queries.shape[-1] ** -0.5
        mixed, received = attend_and_receive(scaled, keys.float(), values.float(), mask, shares)
        return mixed.to(normed.dtype).flatten(0, 1), received.flatten()


class QwenMlp(nn.Module):
    """[.., E] -> [.., E], gated."""

    def __init__(self, spec: QwenVisionSpec) -> None:
        super().__init__()
        self.activation = spec.activation
        self.gate_proj = nn.Linear(spec.width, spec.mlp_width)
        self.up_proj = nn.Linear(spec.width, spec.mlp_width)
        self.down_proj = nn.Linear(spec.mlp_width, spec.width)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.gate_proj(x)
        gate = F.silu(gate) if self.activation == "silu" else clip_layers.activation(self.activation, gate)
        return self.down_proj(gate * self.up_proj(x))


class QwenBlock(nn.Module):
    """One pre-norm block; behind its attention it can run for some of its rows only."""

    def __init__(self, spec: QwenVisionSpec) -> None:
        super().__init__()
        self.norm1 = RmsNorm(spec.width, spec.norm_eps)
        self.norm2 = RmsNorm(spec.width, spec.norm_eps)
        self.attn = QwenAttention(spec)
        self.mlp = QwenMlp(spec)

    def forward(self, x: Tensor, groups: Groups) -> Tensor:
        """[P, E] -> [P, E]."""
        mixed = self.attn.mixed(self.norm1(x), groups)
        return self.behind_attention(x, mixed.index_select(0, groups.slots))

    def behind_attention(self, x: Tensor, mixed: Tensor) -> Tensor:
        """[.., E]: each row for itself, from the block's input and what its attention gave for the same rows."""
        x = x + self.attn.proj(mixed)
        return x + self.mlp(self.norm2(x))


class PatchEmbedding(nn.Module):
    """[P, values of a patch] -> [P, E]: a convolution whose kernel is the whole patch is a product."""

    def __init__(self, spec: QwenVisionSpec) -> None:
        super().__init__()
        self.proj = nn.Linear(spec.patch_values, spec.width, bias=False)

    def forward(self, patches: Tensor) -> Tensor:
        return self.proj(patches)


class PatchMerger(nn.Module):
    """[rows of whole units, E] -> [units, D]: the patches of a token side by side become the language model's row."""

    def __init__(self, spec: QwenVisionSpec, width: int) -> None:
        super().__init__()
        self.unit = spec.unit
        merged = spec.width * spec.unit
        self.ln_q = RmsNorm(spec.width, spec.norm_eps)
        self.mlp = nn.Sequential(nn.Linear(merged, merged), nn.GELU(), nn.Linear(merged, width))

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(self.ln_q(x).reshape(-1, self.unit * x.shape[-1]))
