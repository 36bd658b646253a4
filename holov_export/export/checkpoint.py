"""From a Hugging Face LLaVA directory to a ModelSpec: every number comes from the checkpoint's own files."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from holov_export.errors import CheckpointError, UnsupportedModelError
from holov_export.extras import require
from holov_export.spec import DecoderSpec, ImageSpec, ModelSpec, PromptSpec, VisionSpec

#: the template that llava-hf publishes for LLaVA-1.5, for checkpoints that come without one
LLAVA_CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}{% endif %}"
    "{# Render all images first #}{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>\n' }}{% endfor %}{# Render all text next #}{% if message['role'] != 'assistant' %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' '}}"
    "{% endfor %}{% else %}{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{% generation %}{{ content['text'] + ' '}}{% endgeneration %}{% endfor %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
_FILTERS = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")  # Pillow's numbering


def spec_from_checkpoint(folder: Path, name: str) -> ModelSpec:
    """Read config.json, preprocessor_config.json, generation_config.json and the chat template.

    Raises:
        CheckpointError: a file is missing or does not parse.
        UnsupportedModelError: not a LLaVA-1.5 shaped checkpoint, with the reason.
    """
    config = read_json(folder, "config.json")
    family = config.get("model_type")
    if family != "llava":
        raise UnsupportedModelError(
            f"'{name}' is a checkpoint of the family '{family}'; only LLaVA-1.5 ('llava') can be exported.",
            hint="holov-export models lists what is supported.",
        )
    try:
        parsed = _parsed(config, name)
        return ModelSpec(
            family="llava",
            name=name,
            image=_image_spec(folder),
            vision=_vision_spec(parsed),
            decoder=_decoder_spec(folder, parsed),
            prompt=_prompt_spec(folder, parsed),
        )
    except (ValidationError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"the configuration of '{name}' is not usable: {error}") from error


def _parsed(config: dict[str, Any], name: str) -> Any:
    """transformers' LlavaConfig, which knows the defaults."""
    transformers = require("transformers")
    try:
        return transformers.LlavaConfig.from_dict(config)
    except Exception as error:  # transformers' validation raises types of its own
        raise CheckpointError(f"config.json of '{name}' is refused by transformers: {error}") from error


def config_sha256(folder: Path) -> str:
    """Hex sha256 of config.json."""
    return hashlib.sha256((folder / "config.json").read_bytes()).hexdigest()


def read_json(folder: Path, file: str) -> dict[str, Any]:
    """A JSON object of the checkpoint.

    Raises:
        CheckpointError: missing or not a JSON object.
    """
    path = folder / file
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            f"the checkpoint has no {file}.", hint="A Hugging Face model directory is expected."
        ) from None
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{file} of the checkpoint does not parse ({error}).") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{file} of the checkpoint is not a JSON object.")
    return value


def _vision_spec(config: Any) -> VisionSpec:
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


def _decoder_spec(folder: Path, config: Any) -> DecoderSpec:
    text = config.text_config
    generation: dict[str, Any] = {}
    if (folder / "generation_config.json").is_file():
        generation = read_json(folder, "generation_config.json")
    eos = generation.get("eos_token_id", text.eos_token_id)
    eos_ids = tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,)
    return DecoderSpec(
        architecture=text.model_type,
        width=text.hidden_size,
        layers=text.num_hidden_layers,
        heads=text.num_attention_heads,
        kv_heads=getattr(text, "num_key_value_heads", None) or text.num_attention_heads,
        head_width=getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads,
        mlp_width=text.intermediate_size,
        vocab_size=text.vocab_size,
        context=text.max_position_embeddings,
        image_token_id=config.image_token_index,
        bos_token_id=generation.get("bos_token_id", text.bos_token_id),
        eos_token_ids=eos_ids,
        pad_token_id=generation.get("pad_token_id", text.pad_token_id),
    )


def _image_spec(folder: Path) -> ImageSpec:
    raw = read_json(folder, "preprocessor_config.json") if (folder / "preprocessor_config.json").is_file() else {}
    if not raw:
        raw = read_json(folder, "processor_config.json").get("image_processor", {})
    size = raw.get("size", {"shortest_edge": 224})
    size = {"shortest_edge": size} if isinstance(size, int) else size
    exact = (size["height"], size["width"]) if "height" in size else None
    crop = raw.get("crop_size", {"height": 224, "width": 224})
    crop = {"height": crop, "width": crop} if isinstance(crop, int) else crop
    resize = raw.get("do_resize", True)
    normalize = raw.get("do_normalize", True)
    return ImageSpec(
        pad_to_square=bool(raw.get("do_pad", False)),
        shortest_edge=size.get("shortest_edge") if resize and exact is None else None,
        resize_to=exact if resize else None,
        crop=(crop["height"], crop["width"]) if raw.get("do_center_crop", True) else None,
        resample=_FILTERS[int(raw.get("resample", 3))],  # type: ignore[arg-type]
        rescale_factor=raw.get("rescale_factor", 1 / 255) if raw.get("do_rescale", True) else 1.0,
        mean=tuple(raw["image_mean"]) if normalize else (0.0, 0.0, 0.0),
        std=tuple(raw["image_std"]) if normalize else (1.0, 1.0, 1.0),
    )


def _prompt_spec(folder: Path, config: Any) -> PromptSpec:
    return PromptSpec(chat_template=_chat_template(folder), image_placeholder=_placeholder(folder, config))


def _chat_template(folder: Path) -> str:
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    for file in ("chat_template.json", "processor_config.json", "tokenizer_config.json"):
        if (folder / file).is_file():
            template = read_json(folder, file).get("chat_template")
            if isinstance(template, str):
                return template
    return LLAVA_CHAT_TEMPLATE


def _placeholder(folder: Path, config: Any) -> str:
    """The text of the image token, from the tokenizer: it must be one special token with the configured id."""
    tokenizer = read_json(folder, "tokenizer.json")
    for token in tokenizer.get("added_tokens", []):
        if token["id"] == config.image_token_index:
            return str(token["content"])
    raise CheckpointError(f"tokenizer.json has no special token with the image token's id {config.image_token_index}.")
