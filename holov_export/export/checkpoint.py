"""From a Hugging Face directory to a ModelSpec: every number comes from the checkpoint's own files.

transformers' configuration classes know the defaults of config.json. Each family has one function here.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from holov_export.errors import CheckpointError, UnsupportedModelError
from holov_export.export.checkpoint_clip import clip_vision, frames_of_video, square_image, tiled_image
from holov_export.export.checkpoint_files import chat_template, read_json, special_token
from holov_export.export.checkpoint_qwen import frame_pairs, patch_image, qwen_vision
from holov_export.export.checkpoint_templates import (
    LLAVA_CHAT_TEMPLATE,
    MISTRAL_CHAT_TEMPLATE,
    QWEN_CHAT_TEMPLATE,
    VIDEO_LLAVA_CHAT_TEMPLATE,
)
from holov_export.extras import require
from holov_export.spec import DecoderSpec, ModelSpec, PromptSpec

__all__ = ["config_sha256", "known_families", "read_json", "spec_from_checkpoint"]


def spec_from_checkpoint(folder: Path, name: str) -> ModelSpec:
    """Read config.json, generation_config.json, the processors' settings, the tokenizer and the chat template.

    Raises:
        CheckpointError: a file is missing, does not parse or contradicts another.
        UnsupportedModelError: a family or layout that cannot be exported, with the reason.
    """
    config = read_json(folder, "config.json")
    family = config.get("model_type")
    if not isinstance(family, str) or family not in _FAMILIES:
        known = ", ".join(f"'{key}'" for key in _FAMILIES)
        raise UnsupportedModelError(
            f"'{name}' is a checkpoint of the family '{family}'; those of {known} can be exported.{_reason(family)}",
            hint="holov-export models lists what is supported.",
        )
    try:
        return _FAMILIES[family].read(folder, name, _parsed(config, name, _FAMILIES[family].config))
    except (ValidationError, LookupError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"the configuration of '{name}' is not usable: {error}") from error


def known_families() -> tuple[str, ...]:
    """The values of `model_type` in config.json that can be exported."""
    return tuple(_FAMILIES)


def config_sha256(folder: Path) -> str:
    """Hex sha256 of config.json."""
    return hashlib.sha256((folder / "config.json").read_bytes()).hexdigest()


def _reason(family: object) -> str:
    """What is known of families that are close to supported ones."""
    if family == "qwen2_vl":
        return " Qwen2-VL has another tower than Qwen2.5-VL."
    if isinstance(family, str) and family.startswith("qwen3"):
        return " Qwen3-VL feeds features of several layers to its language model."
    return ""


def _parsed(config: dict[str, Any], name: str, config_class: str) -> Any:
    """transformers' configuration, which knows the defaults."""
    transformers = require("transformers")
    try:
        return getattr(transformers, config_class).from_dict(config)
    except Exception as error:  # transformers' validation raises types of its own
        raise CheckpointError(f"config.json of '{name}' is refused by transformers: {error}") from error


def _llava(folder: Path, name: str, config: Any) -> ModelSpec:
    vision = clip_vision(config)
    return ModelSpec(
        family="llava",
        name=name,
        image=square_image(folder, vision),
        vision=vision,
        decoder=_decoder(folder, config),
        prompt=_prompt(folder, config, LLAVA_CHAT_TEMPLATE),
    )


def _llava_next(folder: Path, name: str, config: Any) -> ModelSpec:
    vision = clip_vision(config)
    mistral = config.text_config.model_type == "mistral"
    return ModelSpec(
        family="llava_next",
        name=name,
        image=tiled_image(folder, config, vision),
        vision=vision,
        decoder=_decoder(folder, config),
        prompt=_prompt(folder, config, MISTRAL_CHAT_TEMPLATE if mistral else LLAVA_CHAT_TEMPLATE),
    )


def _video_llava(folder: Path, name: str, config: Any) -> ModelSpec:
    vision = clip_vision(config)
    return ModelSpec(
        family="video_llava",
        name=name,
        image=square_image(folder, vision),
        video=frames_of_video(folder, config, vision),
        vision=vision,
        decoder=_decoder(folder, config),
        prompt=_prompt(folder, config, VIDEO_LLAVA_CHAT_TEMPLATE),
    )


def _qwen2_5_vl(folder: Path, name: str, config: Any) -> ModelSpec:
    vision = qwen_vision(config)
    return ModelSpec(
        family="qwen2_5_vl",
        name=name,
        image=patch_image(folder, vision),
        video=frame_pairs(folder, config, vision),
        vision=vision,
        decoder=_decoder(folder, config),
        prompt=_prompt(folder, config, QWEN_CHAT_TEMPLATE),
    )


@dataclass(frozen=True)
class _Family:
    """The name of transformers' configuration class, and what reads a checkpoint (folder, name, configuration)."""

    config: str
    read: Callable[[Path, str, Any], ModelSpec]


_FAMILIES = {
    "llava": _Family("LlavaConfig", _llava),
    "llava_next": _Family("LlavaNextConfig", _llava_next),
    "qwen2_5_vl": _Family("Qwen2_5_VLConfig", _qwen2_5_vl),
    "video_llava": _Family("VideoLlavaConfig", _video_llava),
}


def _decoder(folder: Path, config: Any) -> DecoderSpec:
    text = config.text_config
    generation: dict[str, Any] = {}
    if (folder / "generation_config.json").is_file():
        generation = read_json(folder, "generation_config.json")
    eos = generation.get("eos_token_id", text.eos_token_id)
    eos_ids = tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,)
    head_width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return DecoderSpec(
        architecture=text.model_type,
        width=text.hidden_size,
        layers=text.num_hidden_layers,
        heads=text.num_attention_heads,
        kv_heads=getattr(text, "num_key_value_heads", None) or text.num_attention_heads,
        head_width=head_width,
        mlp_width=text.intermediate_size,
        vocab_size=text.vocab_size,
        context=text.max_position_embeddings,
        image_token_id=config.image_token_id,
        bos_token_id=generation.get("bos_token_id", text.bos_token_id),
        eos_token_ids=eos_ids,
        pad_token_id=generation.get("pad_token_id", text.pad_token_id),
        video_token_id=getattr(config, "video_token_id", None),
        mrope_sections=_mrope_sections(text, head_width),
    )


def _mrope_sections(text: Any, head_width: int) -> tuple[int, ...]:
    """How many rotary frequencies turn by time, height and width; empty if positions are plain numbers."""
    rope = getattr(text, "rope_parameters", None) or {}
    sections = tuple(int(number) for number in rope.get("mrope_section") or ())
    if text.model_type == "qwen2_5_vl_text" and (len(sections) != 3 or 2 * sum(sections) != head_width):
        raise CheckpointError(
            f"mrope_section {list(sections)} does not divide the {head_width // 2} rotary frequencies."
        )
    return sections


def _prompt(folder: Path, config: Any, published: str) -> PromptSpec:
    video = getattr(config, "video_token_id", None)
    return PromptSpec(
        chat_template=chat_template(folder, published),
        image_placeholder=special_token(folder, config.image_token_id, "image"),
        video_placeholder="" if video is None else special_token(folder, video, "video"),
    )
