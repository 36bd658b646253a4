"""Tiny checkpoints of each family, their decoders, and prompts about them, made once for all tests that ask."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from family_checkpoints import write_family
from family_oracle import Asked, Oracle
from layouts import clip_layout, grid_layout, layout_of, tiles_layout
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape, unpad_image

from holov_export.export.checkpoint import spec_from_checkpoint
from holov_export.export.decoder_onnx import decoder_from_checkpoint
from holov_export.runtime.stitch import PromptEncoder, prompt_encoder_from_tokenizer, stitch
from holov_export.spec import DecoderPrecision, ModelSpec
from holov_export.tensors import CropBox, FloatArray, ImageLayout, ImageRows, Region, StitchedPrompt

#: name -> (family, fields of its sizes)
NAMES: dict[str, tuple[str, dict[str, object]]] = {
    "llava_next": ("llava_next", {}),
    "llava_next_mistral": ("llava_next_mistral", {}),
    "qwen2_5_vl": ("qwen2_5_vl", {"tied": False}),
    "qwen2_5_vl_tied": ("qwen2_5_vl", {}),
    "video_llava": ("video_llava", {}),
}
QUESTION = "how many digits are there? answer in one word."
_SPACE = tempfile.TemporaryDirectory(prefix="decoder-families-")
_MERGE = 2


@cache
def checkpoint_of(name: str) -> Path:
    """A checkpoint directory whose layers say more than its embeddings, so that answers do not repeat one word.

    Qwen's biases are not zero here: one that is lost shall be missed.
    """
    family, sizes = NAMES[name]
    folder = write_family(Path(_SPACE.name) / name, family, **sizes)
    tensors = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(5)
    for key, tensor in tensors.items():
        if "visual" in key or "tower" in key:
            continue
        if key.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight", "up_proj.weight")):
            tensor.mul_(3.0)
        elif "layers" in key and key.endswith("bias"):
            tensor.normal_(0.0, 0.3, generator=generator)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@cache
def spec_of(name: str) -> ModelSpec:
    return spec_from_checkpoint(checkpoint_of(name), name)


@cache
def decoder_of(name: str, precision: DecoderPrecision = DecoderPrecision.FP32) -> Path:
    folder = Path(_SPACE.name) / f"{name}-{precision.value}"
    decoder_from_checkpoint(checkpoint_of(name), folder, spec_of(name).decoder, precision)
    return folder


@cache
def oracle_of(name: str) -> Oracle:
    torch.set_num_threads(1)
    return Oracle(checkpoint_of(name))


@cache
def encoder_of(name: str) -> PromptEncoder:
    return prompt_encoder_from_tokenizer(checkpoint_of(name) / "tokenizer.json", spec_of(name))


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """Soft noise."""
    dice = np.random.default_rng(seed)
    small = Image.fromarray(dice.integers(0, 256, (6, 6, 3), dtype=np.uint8))
    return small.resize((width, height), Image.Resampling.BICUBIC)


def clip(frames: int, width: int, height: int, seed: int = 0) -> npt.NDArray[np.uint8]:
    """uint8 [T, H, W, 3]"""
    return np.stack([np.asarray(picture(width, height, 100 * seed + index)) for index in range(frames)])


@dataclass(frozen=True)
class Scene:
    """A question about pictures and clips, and what transformers makes of them.

    Attributes:
        text: the rendered prompt.
        images, videos: all rows of each, without newlines.
        places: of each image and then of each clip: int64 [N], where its tokens are in transformers' prompt.
        newlines: of each image: int64, where its newlines are.
        newline: float [D], or None.
    """

    name: str
    text: str
    asked: Asked
    images: tuple[ImageRows, ...]
    videos: tuple[ImageRows, ...]
    places: tuple[npt.NDArray[np.int64], ...]
    newlines: tuple[npt.NDArray[np.int64], ...]
    newline: FloatArray | None

    def stitched(self, kept: Sequence[Sequence[int]] | None = None) -> StitchedPrompt:
        """The prompt with the kept tokens of each image and clip; None for all."""
        items = [*self.images, *self.videos]
        if kept is not None:
            items = [few(item, positions) for item, positions in zip(items, kept, strict=True)]
        images, videos = items[: len(self.images)], items[len(self.images) :]
        return stitch(encoder_of(self.name), self.text, images, videos, newline=self.newline, max_new_tokens=1)

    def gone(self, kept: Sequence[Sequence[int]]) -> npt.NDArray[np.int64]:
        """The places in transformers' prompt that are not in ours."""
        left: list[int] = []
        for index, (places, positions) in enumerate(zip(self.places, kept, strict=True)):
            left += np.delete(places, positions).tolist()
            if index < len(self.newlines) and len(self.newlines[index]):
                line = places[positions]
                ends = self.newlines[index]
                starts = np.append(places[0], ends[:-1])
                starts[0] = ends[0] - (ends[1] - ends[0]) if len(ends) > 1 else ends[0] - 10_000
                left += [
                    int(end)
                    for start, end in zip(starts, ends, strict=True)
                    if not np.any((line > start) & (line < end))
                ]
        return np.array(sorted(left), dtype=np.int64)


def few(item: ImageRows, positions: Sequence[int]) -> ImageRows:
    """Some of the rows of a picture that has all."""
    kept = np.asarray(positions, dtype=np.int64)
    return ImageRows(item.rows[kept], kept, item.layout)


def scene(
    name: str, images: Sequence[Image.Image] = (), videos: Sequence[npt.NDArray[np.uint8]] = (), words: str = QUESTION
) -> Scene:
    """Ask transformers."""
    oracle = oracle_of(name)
    asked = oracle.asked(words, images, videos)
    embeds = oracle._whole(asked.inputs)[0][0].numpy()
    layouts = [_image_layout(oracle, asked, index, image) for index, image in enumerate(images)]
    places, newlines = [], []
    for run, layout in zip(asked.images, layouts, strict=True):
        ends = run[_newline_mask(layout, len(run))]
        places.append(np.setdiff1d(run, ends))
        newlines.append(ends)
    of_videos = [_video_layout(oracle, asked, index, len(run)) for index, run in enumerate(asked.videos)]
    places += asked.videos
    rows = [
        ImageRows(embeds[run], np.arange(len(run), dtype=np.int64), layout)
        for run, layout in zip(places, [*layouts, *of_videos], strict=True)
    ]
    newline = None
    if oracle.family == "llava_next":
        newline = oracle.model.model.image_newline.detach().numpy()
    return Scene(
        name=name,
        text=oracle.text(words, len(images), len(videos)),
        asked=asked,
        images=tuple(rows[: len(images)]),
        videos=tuple(rows[len(images) :]),
        places=tuple(places),
        newlines=tuple(newlines),
        newline=newline,
    )


def _image_layout(oracle: Oracle, asked: Asked, index: int, image: Image.Image) -> ImageLayout:
    config = oracle.model.config
    if oracle.family == "qwen2_5_vl":
        _, rows, columns = asked.inputs["image_grid_thw"][index].tolist()
        return grid_layout(rows // _MERGE, columns // _MERGE)
    side = config.vision_config.image_size // config.vision_config.patch_size
    if oracle.family != "llava_next":
        return grid_layout(side, side)
    size = (image.height, image.width)
    down, across = get_anyres_image_grid_shape(size, config.image_grid_pinpoints, config.vision_config.image_size)
    mosaic = unpad_image(torch.zeros(1, down * side, across * side), torch.tensor(size))
    return tiles_layout((side, side), tuple(mosaic.shape[1:]))


def _newline_mask(layout: ImageLayout, length: int) -> npt.NDArray[np.bool_]:
    """bool [length], which tokens of transformers' run are newlines."""
    mask = np.zeros(length, dtype=bool)
    if len(layout.regions) == 2:
        base, (_, columns) = layout.regions[0].tokens, layout.regions[1].grid
        mask[base + columns :: columns + 1] = True
    assert length - mask.sum() == layout.tokens
    return mask


def _video_layout(oracle: Oracle, asked: Asked, index: int, tokens: int) -> ImageLayout:
    if oracle.family == "qwen2_5_vl":
        frames, rows, columns = asked.inputs["video_grid_thw"][index].tolist()
        seconds = float(asked.inputs["second_per_grid_ts"][index])
        return clip_layout(frames, rows // _MERGE, columns // _MERGE, seconds)
    side = oracle.model.config.vision_config.image_size // oracle.model.config.vision_config.patch_size
    frame = Region((side, side), CropBox(0.0, 0.0, 1.0, 1.0), cls=True)
    return layout_of([frame] * (tokens // frame.tokens), "video")
