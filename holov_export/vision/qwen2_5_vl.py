"""Qwen2.5-VL's vision transformer and merger, with the selection in its last block.

There is no CLS token. The saliency of a token is the attention that its patches receive in the last block, which sees
the whole view: mean over heads and over the view's queries, then over the token's patches. Rules that read no features
decide from it, and only the kept tokens' patches go through that block's output projection and MLP and the merger. The
others read the merger's rows (HIDDEN and PROJECTED are the same here, as in the published ports of SCOPE and DivPrune
to Qwen), so they decide behind it.

Shape words: B pictures, N tokens of the largest one, P patches of all views, R = P / patches of a token, K budget,
E width of the tower, D width of the language model.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from holov_export.policies import FeatureSource, HolovOfficialPolicy, NoSelection, SelectionPolicy
from holov_export.selection.official_qwen import OfficialQwenSelection
from holov_export.selection.packed import PackedSelection, rows_of_tokens
from holov_export.spec import ModelSpec, QwenVisionSpec
from holov_export.vision.module import VisionModule
from holov_export.vision.qwen_layers import Groups, PatchEmbedding, PatchMerger, QwenBlock, RotaryAngles, groups_of


class QwenTower(nn.Module):
    """Patches, blocks and merger, under the names that checkpoints have for them."""

    def __init__(self, spec: QwenVisionSpec, width: int) -> None:
        super().__init__()
        self.full_layers = spec.full_layers
        self.patch_embed = PatchEmbedding(spec)
        self.blocks = nn.ModuleList(QwenBlock(spec) for _ in range(spec.layers))
        self.merger = PatchMerger(spec, width)

    def before_last_block(self, patches: Tensor, windows: Groups, views: Groups) -> Tensor:
        """[P, values of a patch] -> [P, E], the last block's input."""
        x: Tensor = self.patch_embed(patches)
        for index, block in enumerate(list(self.blocks)[:-1]):  # a slice of a ModuleList would change the graph's names
            x = block(x, views if index in self.full_layers else windows)
        return x

    @property
    def last_block(self) -> QwenBlock:
        block = self.blocks[len(self.blocks) - 1]
        assert isinstance(block, QwenBlock)
        return block


class _Attended(NamedTuple):
    """The last block behind its attention: its input [P, E], what attention gave [slots, E], where each patch is in
    that, int64 [P], and the saliency float32 [R].
    """

    x: Tensor
    mixed: Tensor
    slots: Tensor
    saliency: Tensor


class QwenVision(VisionModule):
    """Patches and where they are in; visual tokens, positions, counts and saliency out (`signature.patches_signature`).

    `holov-official` has a position N_b, the picture's number of tokens, with a row of zeros: see
    `selection.official_qwen`.
    """

    def __init__(self, spec: ModelSpec, policy: SelectionPolicy) -> None:
        """Build the module.

        Raises:
            ValueError: the tower is another one, or the policy does not pack.
        """
        super().__init__()
        vision = spec.vision
        if not isinstance(vision, QwenVisionSpec):
            raise ValueError(f"the tower is a '{vision.architecture}'")
        self.unit = vision.unit
        self.plain = isinstance(policy, NoSelection)
        self.early = policy.features is FeatureSource.NONE and not self.plain
        self.visual = QwenTower(vision, spec.decoder.width)
        self.rotary = RotaryAngles(vision)
        most = max(spec.image_tokens, spec.video_tokens)
        self.selection: nn.Module = (
            OfficialQwenSelection(policy, most)
            if isinstance(policy, HolovOfficialPolicy)
            else PackedSelection(policy, most)
        )

    def forward(
        self,
        pixel_values: Tensor,
        places: Tensor,
        window_rows: Tensor,
        window_slots: Tensor,
        view_rows: Tensor,
        view_slots: Tensor,
        source: Tensor,
        crops: Tensor,
        budget: Tensor,
        quota: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        at = self.attended(pixel_values, places, window_rows, window_slots, view_rows, view_slots)
        if self.early:
            kept = self.selection(at.saliency, None, source, crops, budget, quota)
            patches = (kept.rows[..., None] * self.unit + torch.arange(self.unit, device=kept.rows.device)).flatten()
            tokens = self.behind(at, patches)
        else:
            rows = self.behind(at, None)
            kept = self.selection(at.saliency, rows.float(), source, crops, budget, quota)
            tokens = rows.index_select(0, kept.rows.flatten())
        tokens = tokens.unflatten(0, (kept.rows.shape[0], -1))
        own = (source >= 0).long().sum(-1, keepdim=True)
        real = ((kept.positions >= 0) & (kept.positions < own)).unsqueeze(-1)
        zero = torch.zeros((), dtype=tokens.dtype, device=tokens.device)
        return torch.where(real, tokens, zero), kept.positions, kept.counts, kept.saliency

    def attended(
        self,
        pixel_values: Tensor,
        places: Tensor,
        window_rows: Tensor,
        window_slots: Tensor,
        view_rows: Tensor,
        view_slots: Tensor,
    ) -> _Attended:
        """The tower up to and including the last block's attention; saliency is zero for the plain encoder."""
        cos, sin = self.rotary(places)
        windows = groups_of(window_rows, window_slots, cos, sin, pixel_values.dtype)
        views = groups_of(view_rows, view_slots, cos, sin, pixel_values.dtype)
        x = self.visual.before_last_block(pixel_values, windows, views)
        last = self.visual.last_block
        if self.plain:
            mixed = last.attn.mixed(last.norm1(x), views)
            of_patch = torch.zeros_like(view_slots, dtype=torch.float32)
        else:
            mixed, received = last.attn.mixed_and_received(last.norm1(x), views)
            of_patch = received.index_select(0, view_slots)
        return _Attended(x, mixed, view_slots, of_patch.reshape(-1, self.unit).mean(-1))

    def behind(self, at: _Attended, patches: Tensor | None) -> Tensor:
        """[tokens, D]: the rest of the tower for the tokens whose patches are given, int64 [tokens * unit]; for all."""
        x, slots = at.x, at.slots
        if patches is not None:
            x, slots = x.index_select(0, patches), slots.index_select(0, patches)
        hidden = self.visual.last_block.behind_attention(x, at.mixed.index_select(0, slots))
        rows: Tensor = self.visual.merger(hidden)
        return rows

    def features_of(
        self,
        pixel_values: Tensor,
        places: Tensor,
        window_rows: Tensor,
        window_slots: Tensor,
        view_rows: Tensor,
        view_slots: Tensor,
        source: Tensor,
        crops: Tensor,
    ) -> Tensor:
        """float32 [B, N, D]: what a rule reads of each token, zero where there is none; for comparisons."""
        at = self.attended(pixel_values, places, window_rows, window_slots, view_rows, view_slots)
        return rows_of_tokens(self.behind(at, None).float(), source)


def checkpoint_names(name: str) -> list[str]:
    """How transformers spells one of our parameter names: `visual.` in 4.x and on the hub, `model.visual.` in 5.x."""
    return [name, f"model.{name}"]


def shaped(name: str, tensor: Tensor) -> Tensor:
    """A stored tensor in our parameter's shape: the kernel [E, channels, frames, height, width] as [E, values]."""
    return tensor.flatten(1) if name == "visual.patch_embed.proj.weight" else tensor
