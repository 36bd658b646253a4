"""Qwen2.5-VL: its tower, and pictures and clips that become sequences of patches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from holov_export.errors import CheckpointError, UnsupportedModelError
from holov_export.export.checkpoint_clip import FILTERS, normalisation
from holov_export.export.checkpoint_files import image_settings, video_settings
from holov_export.model_spec import FramePairsSpec, PatchImageSpec, QwenVisionSpec

#: Source: transformers 5.23 models/qwen2_5_vl/modeling_qwen2_5_vl.py, the same in all norms of the tower
NORM_EPS = 1e-6
#: smallest and largest area of a picture. Source: transformers 5.23 Qwen2VLImageProcessor
IMAGE_PIXELS = (56 * 56, 28 * 28 * 1280)
#: smallest and largest area of a frame. Source: transformers 5.23 Qwen2VLVideoProcessor, as in qwen-vl-utils
FRAME_PIXELS = (128 * 28 * 28, 768 * 28 * 28)
#: Source: transformers 5.23 Qwen2VLVideoProcessor
MIN_FRAMES, MAX_FRAMES, MAX_VIDEO_TOKENS = 4, 768, 128000
#: part of those tokens that a clip may have. Source: the same, `resize`
VIDEO_SHARE = 0.9
#: frames a second. Source: qwen-vl-utils, the package that Qwen's model card reads clips with; transformers has none
FPS = 2.0


def qwen_vision(config: Any) -> QwenVisionSpec:
    """The tower, from a Qwen2_5_VLConfig.

    Raises:
        CheckpointError: its rows are not as wide as the language model.
        UnsupportedModelError: patches are no squares, or the last layer attends to windows.
    """
    vision, width = config.vision_config, config.text_config.hidden_size
    if vision.out_hidden_size != width:
        raise CheckpointError(f"the tower's rows are {vision.out_hidden_size} wide, the language model's {width}.")
    if not isinstance(vision.patch_size, int) or not isinstance(vision.temporal_patch_size, int):
        raise UnsupportedModelError("the tower's patches are no squares.")
    if vision.depth - 1 not in vision.fullatt_block_indexes:
        raise UnsupportedModelError(
            "the tower's last layer attends to windows; tokens are selected by one that sees the whole picture."
        )
    return QwenVisionSpec(
        patch_size=vision.patch_size,
        temporal_patch_size=vision.temporal_patch_size,
        channels=vision.in_channels,
        merge=vision.spatial_merge_size,
        window_size=vision.window_size,
        width=vision.hidden_size,
        layers=vision.depth,
        heads=vision.num_heads,
        mlp_width=vision.intermediate_size,
        activation=vision.hidden_act,
        full_layers=tuple(vision.fullatt_block_indexes),
        norm_eps=NORM_EPS,
        theta=vision.rope_parameters["rope_theta"],
    )


def patch_image(folder: Path, vision: QwenVisionSpec) -> PatchImageSpec:
    """How pictures become patches.

    Raises:
        CheckpointError: there are no settings, or they contradict the tower.
        UnsupportedModelError: pictures are not resized.
    """
    settings = image_settings(folder)
    _check_patches(settings, vision)
    least, most = _pixels(settings, IMAGE_PIXELS)
    mean, std, factor = normalisation(settings)
    return PatchImageSpec(
        patch_size=vision.patch_size,
        merge=vision.merge,
        temporal=vision.temporal_patch_size,
        min_pixels=least,
        max_pixels=most,
        resample=FILTERS[int(settings.get("resample", 3))],  # type: ignore[arg-type]
        rescale_factor=factor,
        mean=mean,
        std=std,
    )


def frame_pairs(folder: Path, config: Any, vision: QwenVisionSpec) -> FramePairsSpec:
    """How clips are sampled and scaled.

    The published checkpoints have no settings for videos. Then they are the defaults above, not those of pictures,
    which transformers takes instead: a frame would have up to 16384 tokens.

    Raises:
        CheckpointError: the settings contradict the tower.
        UnsupportedModelError: frames are not resized.
    """
    settings = video_settings(folder) or {}
    _check_patches(settings, vision)
    least, most = _pixels(settings, FRAME_PIXELS)
    frames = settings.get("max_frames", MAX_FRAMES)
    total = int(
        settings.get("max_video_tokens", MAX_VIDEO_TOKENS) * (vision.patch_size * vision.merge) ** 2 * VIDEO_SHARE
    )
    uncapped = settings.get("cap_pixels_per_frame") is False
    return FramePairsSpec(
        fps=settings.get("fps", FPS),
        min_frames=settings.get("min_frames", MIN_FRAMES),
        max_frames=frames,
        min_pixels=least,
        max_pixels=most,
        total_pixels=most * frames if uncapped else total * vision.temporal_patch_size,
        tokens_per_second=config.vision_config.tokens_per_second,
    )


def _check_patches(settings: dict[str, Any], vision: QwenVisionSpec) -> None:
    if not settings.get("do_resize", True):
        raise UnsupportedModelError("pictures are not resized (do_resize); only whole patches can be read.")
    ours = {
        "patch_size": vision.patch_size,
        "merge_size": vision.merge,
        "temporal_patch_size": vision.temporal_patch_size,
    }
    for name, value in ours.items():
        if settings.get(name, value) != value:
            raise CheckpointError(f"{name} of the processor is {settings[name]}, of the tower {value}.")


def _pixels(settings: dict[str, Any], default: tuple[int, int]) -> tuple[int, int]:
    """(smallest, largest) area; `min_pixels` and `max_pixels` come before `size`, as in transformers."""
    size = settings.get("size", {"shortest_edge": default[0], "longest_edge": default[1]})
    least = settings.get("min_pixels", size.get("shortest_edge"))
    most = settings.get("max_pixels", size.get("longest_edge"))
    if least is None or most is None or least > most:
        raise CheckpointError(f"the processor's size says no smallest and largest area: {size}.")
    return int(least), int(most)
