"""Tiny checkpoints of families whose tower is a CLIP, what transformers makes of them, and tables for our graphs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from family_checkpoints import write_family
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlavaNextForConditionalGeneration, VideoLlavaForConditionalGeneration
from transformers.models.llava_next.modeling_llava_next import (
    get_anyres_image_grid_shape,
    image_size_to_num_patches,
    unpad_image,
)

from holov_export.policies import NoSelection, SelectionPolicy, policy_from_settings
from holov_export.spec import CheckpointSource, ExportPlan, ModelSpec, Precision
from holov_export.vision.families import Part

WEIGHTS = "model.safetensors"


def noisy_family(folder: Path, family: str) -> Path:
    """A checkpoint in which no two weights of towers and projector are alike."""
    write_family(folder, family)
    tensors = load_file(folder / WEIGHTS)
    dice = torch.Generator().manual_seed(1)
    for name in sorted(tensors):
        if "_tower" in name or "multi_modal_projector" in name:
            tensors[name] = tensors[name] + torch.randn(tensors[name].shape, generator=dice) * 0.05
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    return folder


def plan_of(
    spec: ModelSpec, method: str = "holov", part: Part = "image", precision: Precision = Precision.FP32
) -> ExportPlan:
    policy: SelectionPolicy = NoSelection() if method == "none" else policy_from_settings(method)
    source = CheckpointSource(kind="local", name="tiny")
    return ExportPlan(model=spec, source=source, policy=policy, precision=precision, decoder=None, part=part)


@dataclass(frozen=True)
class Theirs:
    """What transformers says of some pictures or clips, and what our graph is fed with for them.

    Attributes:
        pixels: [V, 3, H, W]. views: of each picture.
        source: of each picture, int64 [its tokens], rows among those of its own views.
        tokens: of each picture, [its tokens, D], in prompt order, without newlines.
        saliency: of each picture, [its tokens].
    """

    pixels: Tensor
    views: list[int]
    source: list[Tensor]
    tokens: list[Tensor]
    saliency: list[Tensor]
    rows_of_view: int

    def inputs(self, *pictures: int) -> tuple[Tensor, Tensor, Tensor]:
        """(pixel_values, source, crops) of some of the pictures; all of them if none is named."""
        chosen = pictures or tuple(range(len(self.views)))
        split = torch.split(self.pixels, self.views)
        longest = max(len(self.source[picture]) for picture in chosen)
        source = torch.full((len(chosen), longest), -1)
        first = 0
        for row, picture in enumerate(chosen):
            source[row, : len(self.source[picture])] = self.source[picture] + first
            first += self.views[picture] * self.rows_of_view
        crops = torch.where(source >= 0, torch.arange(longest) * 16 // longest, -1)
        return torch.cat([split[picture] for picture in chosen]), source, crops


def tiles_source(config: Any, size: tuple[int, int]) -> Tensor:
    """int64 [N]: the rows of a picture of (height, width) `size`: its base view, then the mosaic without padding."""
    side = config.vision_config.image_size // config.vision_config.patch_size
    down, across = get_anyres_image_grid_shape(size, config.image_grid_pinpoints, config.vision_config.image_size)
    tile = torch.arange(side * side).reshape(side, side)
    rows = [torch.cat([tile + (1 + y * across + x) * side * side for x in range(across)], dim=1) for y in range(down)]
    mosaic = unpad_image(torch.cat(rows, dim=0)[None], size)
    return torch.cat([tile.flatten(), mosaic.flatten()])


def next_model(folder: Path) -> Any:
    model: Any = LlavaNextForConditionalGeneration.from_pretrained(folder, attn_implementation="eager")
    return model.float().eval()


def next_theirs(folder: Path, sizes: list[tuple[int, int]]) -> Theirs:
    """LLaVA-NeXT on random pictures of these (height, width)."""
    model = next_model(folder)
    config, layer = model.config, model.config.vision_feature_layer
    side = config.vision_config.image_size
    views = [image_size_to_num_patches(size, config.image_grid_pinpoints, side) for size in sizes]
    pixels = torch.randn(sum(views), 3, side, side, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        out = model.model.vision_tower(pixels, output_attentions=True, output_hidden_states=True)
        rows = model.model.multi_modal_projector(out.hidden_states[layer][:, 1:])
        tokens, _ = model.model.pack_image_features(list(torch.split(rows, views)), sizes, "default")
    source = [tiles_source(config, size) for size in sizes]
    salient = torch.split(out.attentions[layer][:, :, 0, 1:].mean(1), views)
    saliency = [values.flatten()[rows] for values, rows in zip(salient, source, strict=True)]
    return Theirs(pixels, views, source, list(tokens), saliency, rows.shape[1])


def video_model(folder: Path) -> Any:
    model: Any = VideoLlavaForConditionalGeneration.from_pretrained(folder, attn_implementation="eager")
    return model.float().eval()


def video_theirs(folder: Path, frames: list[int]) -> Theirs:
    """Video-LLaVA on random clips of so many frames."""
    model = video_model(folder)
    layer, side = model.config.vision_feature_layer, model.config.vision_config.image_size
    pixels = torch.randn(sum(frames), 3, side, side, generator=torch.Generator().manual_seed(4))
    tokens = []
    with torch.no_grad():
        for clip in torch.split(pixels, frames):
            tokens.append(model.model.get_video_features(pixel_values_videos=clip[None]).pooler_output.flatten(0, 1))
        out = model.model.video_tower(pixels, output_attentions=True)
    saliency = [values.flatten() for values in torch.split(out.attentions[layer][:, :, 0].mean(1), frames)]
    source = [torch.arange(len(values)) for values in saliency]
    return Theirs(pixels, frames, source, tokens, saliency, out.last_hidden_state.shape[1])
