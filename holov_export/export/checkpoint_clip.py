"""LLaVA-1.5, LLaVA-NeXT and Video-LLaVA: a CLIP tower, and pictures that become squares.

Defaults of settings that a file does not name are those of transformers 5.23's processor classes: CLIPImageProcessor,
LlavaNextImageProcessor, VideoLlavaImageProcessor and VideoLlavaVideoProcessor have the same.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from holov_export.errors import CheckpointError, UnsupportedModelError
from holov_export.export.checkpoint_files import image_settings, video_settings
from holov_export.model_spec import FramesSpec, ImageSpec, TiledImageSpec, VisionSpec

#: Source: transformers 5.23 image_utils.py, OPENAI_CLIP_MEAN and OPENAI_CLIP_STD
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
FILTERS = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")  # Pillow's numbering
#: frames of a clip. Source: PKU-YuanGroup/Video-LLaVA, the number it was trained with; 8 x 257 is transformers' 2056
VIDEO_LLAVA_FRAMES = 8


def clip_vision(config: Any) -> VisionSpec:
    """The tower and the projector, from a LlavaConfig, LlavaNextConfig or VideoLlavaConfig.

    Raises:
        UnsupportedModelError: another tower, several feature layers, or features with the CLS token.
    """
    vision = config.vision_config
    if vision.model_type not in ("clip_vision_model", "clip"):
        raise UnsupportedModelError(f"the vision tower is '{vision.model_type}'; only CLIP is supported.")
    layer = config.vision_feature_layer
    if not isinstance(layer, int):
        raise UnsupportedModelError("several vision feature layers are concatenated; one is supported.")
    if config.vision_feature_select_strategy != "default":
        raise UnsupportedModelError("the CLS token is kept among the features ('full'); 'default' is supported.")
    # hidden_states[0] is the embedding, hidden_states[i] the output of layer i - 1
    state = layer if layer >= 0 else vision.num_hidden_layers + 1 + layer
    if state < 1:
        raise UnsupportedModelError("the features are the bare embeddings; there is no attention to select by.")
    return VisionSpec(
        image_size=vision.image_size,
        patch_size=vision.patch_size,
        channels=vision.num_channels,
        width=vision.hidden_size,
        layers=vision.num_hidden_layers,
        heads=vision.num_attention_heads,
        mlp_width=vision.intermediate_size,
        activation=vision.hidden_act,
        layer_norm_eps=vision.layer_norm_eps,
        feature_layer=state - 1,
        projector_activation=config.projector_hidden_act,
        projector_bias=config.multimodal_projector_bias,
    )


def square_image(folder: Path, vision: VisionSpec) -> ImageSpec:
    """LLaVA-1.5 and the pictures of Video-LLaVA.

    Raises:
        CheckpointError: there are no settings.
        UnsupportedModelError: pictures do not become squares of the tower's size.
    """
    return _square(image_settings(folder), vision, may_pad=True)


def tiled_image(folder: Path, config: Any, vision: VisionSpec) -> TiledImageSpec:
    """LLaVA-NeXT.

    Raises:
        CheckpointError: there are no settings, or config.json has other resolutions than they.
        UnsupportedModelError: tiles are not squares of the tower's size, or a resolution is no multiple of one.
    """
    settings = image_settings(folder)
    tile = _square(settings, vision, may_pad=False)  # `do_pad` is of the batch in this family
    given = config.image_grid_pinpoints
    pinpoints = tuple((int(height), int(width)) for height, width in settings.get("image_grid_pinpoints", given))
    side = vision.image_size
    odd = [f"{height} x {width}" for height, width in pinpoints if height % side or width % side or height * width < 1]
    if odd:
        raise UnsupportedModelError(
            f"image_grid_pinpoints has {', '.join(odd)}, which is no multiple of a tile of {side} x {side} pixels."
        )
    if set(pinpoints) != {(int(height), int(width)) for height, width in given}:
        raise CheckpointError("image_grid_pinpoints of config.json and of the image processor differ.")
    return TiledImageSpec(tile=tile, pinpoints=pinpoints)


def frames_of_video(folder: Path, config: Any, vision: VisionSpec) -> FramesSpec:
    """Video-LLaVA's clips: the video processor's settings, or the image processor's if it has none.

    Raises:
        as of `square_image`.
    """
    settings = video_settings(folder)
    image = _square(image_settings(folder) if settings is None else settings, vision, may_pad=False)
    frames, rest = divmod(config.video_seq_length, vision.tokens + 1)
    frames = VIDEO_LLAVA_FRAMES if rest or not frames else frames
    return FramesSpec(frames=(settings or {}).get("num_frames", frames), image=image, cls=True)


def _square(settings: dict[str, Any], vision: VisionSpec, *, may_pad: bool) -> ImageSpec:
    shortest, exact = _size(settings.get("size", {"shortest_edge": 224}))
    resize = settings.get("do_resize", True)
    crop = _crop(settings.get("crop_size", 224)) if settings.get("do_center_crop", True) else None
    side = vision.image_size
    made = crop or (exact if resize else None)
    if made != (side, side):
        what = f"{made[0]} x {made[1]} pixels" if made else "of no fixed size"
        raise UnsupportedModelError(f"pictures become {what}, but the tower reads {side} x {side} pixels.")
    mean, std, factor = normalisation(settings)
    return ImageSpec(
        pad_to_square=may_pad and bool(settings.get("do_pad", False)),
        shortest_edge=shortest if resize else None,
        resize_to=exact if resize else None,
        crop=crop,
        resample=FILTERS[int(settings.get("resample", 3))],  # type: ignore[arg-type]
        rescale_factor=factor,
        mean=mean,
        std=std,
    )


def normalisation(
    settings: dict[str, Any],
) -> tuple[tuple[float, float, float], tuple[float, float, float], float]:
    """(mean, std, rescale factor) of a processor; what is switched off does nothing."""
    factor = settings.get("rescale_factor", 1 / 255) if settings.get("do_rescale", True) else 1.0
    if not settings.get("do_normalize", True):
        return (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), factor
    red, green, blue = settings.get("image_mean", CLIP_MEAN)
    mean = (red, green, blue)
    red, green, blue = settings.get("image_std", CLIP_STD)
    return mean, (red, green, blue), factor


def _size(size: Any) -> tuple[int | None, tuple[int, int] | None]:
    """(shortest edge or None, (height, width) or None) of `size` in any of its forms."""
    if isinstance(size, int):
        return size, None
    if isinstance(size, list):
        return None, (size[0], size[1])
    if size.get("height") is not None:
        return None, (size["height"], size["width"])
    if size.get("shortest_edge") is None or size.get("longest_edge") is not None:
        raise UnsupportedModelError("pictures are resized by their longest edge; the shortest edge is supported.")
    return size["shortest_edge"], None


def _crop(size: Any) -> tuple[int, int]:
    """(height, width) of `crop_size` in any of its forms."""
    if isinstance(size, int):
        return size, size
    return (size[0], size[1]) if isinstance(size, list) else (size["height"], size["width"])
