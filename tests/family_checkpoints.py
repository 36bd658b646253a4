"""Tiny random checkpoints of every family beside LLaVA-1.5: the true classes and the files that the hub's have.

`write_family(folder, "qwen2_5_vl", width=64)` writes one; the keywords are the fields of `FAMILIES[family]`. The sizes
of one checkpoint differ from each other, so that a transposed or swapped tensor cannot go unnoticed, heads are
multiples of 8 wide, and `vocab` is no Linear's width.

Names and values of the side files: llava-hf/llava-v1.6-vicuna-7b-hf@c916e6c, llava-hf/llava-v1.6-mistral-7b-hf@52320fb,
Qwen/Qwen2.5-VL-3B-Instruct@6628554, LanguageBind/Video-LLaVA-7B-hf@4cf9d8c, as far as they are published; only pixels
and token ids are smaller. Qwen2.5-VL publishes no video_preprocessor_config.json; its fields are those of transformers'
Qwen2VLVideoProcessor.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from checkpoints import _CORPUS, CLIP_MEAN, CLIP_STD, llama_tokenizer
from family_processors import processor_of
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    MistralConfig,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    VideoLlavaConfig,
    VideoLlavaForConditionalGeneration,
)

from holov_export.export.checkpoint_templates import (
    LLAVA_CHAT_TEMPLATE,
    MISTRAL_CHAT_TEMPLATE,
    QWEN_CHAT_TEMPLATE,
    VIDEO_LLAVA_CHAT_TEMPLATE,
)

__all__ = ["FAMILIES", "TinyNext", "TinyQwen", "TinyVideo", "processor_of", "write_family"]

#: names of the special tokens of Qwen2.5's tokenizer, in its order; ids follow the vocabulary
QWEN_SPECIALS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)


@dataclass(frozen=True)
class TinyNext:
    """LLaVA-NeXT; the defaults give 16 tokens of the whole picture and up to 64 of its tiles."""

    image_size: int = 56
    patch_size: int = 14
    vision_width: int = 72
    vision_layers: int = 4
    vision_heads: int = 3
    vision_mlp: int = 88
    feature_layer: int = -2
    width: int = 128
    layers: int = 3
    heads: int = 4
    kv_heads: int = 2
    mlp: int = 192
    vocab: int = 416
    context: int = 2304
    text: str = "llama"
    seed: int = 0


@dataclass(frozen=True)
class TinyVideo:
    """Video-LLaVA; the defaults give 16 tokens a picture and 8 x 17 a clip."""

    image_size: int = 56
    patch_size: int = 14
    vision_width: int = 72
    vision_layers: int = 4
    vision_heads: int = 3
    vision_mlp: int = 88
    feature_layer: int = -2
    frames: int = 8
    width: int = 160
    layers: int = 3
    heads: int = 5
    kv_heads: int = 5
    mlp: int = 224
    vocab: int = 416
    context: int = 2304
    seed: int = 0


@dataclass(frozen=True)
class TinyQwen:
    """Qwen2.5-VL; the defaults give 20 to 200 tokens a picture, 8 to 48 a pair of frames, windows of 2 x 2 tokens."""

    patch_size: int = 14
    merge: int = 2
    temporal: int = 2
    window: int = 56
    vision_width: int = 80
    vision_layers: int = 4
    vision_heads: int = 2
    vision_mlp: int = 104
    full_layers: tuple[int, ...] = (1, 3)
    tokens_per_second: int = 2
    min_tokens: int = 20
    max_tokens: int = 200
    min_frame_tokens: int = 8
    max_frame_tokens: int = 48
    min_frames: int = 4
    max_frames: int = 12
    fps: float = 2.0
    width: int = 128
    layers: int = 3
    heads: int = 4
    kv_heads: int = 2
    mlp: int = 192
    mrope_sections: tuple[int, int, int] = (4, 6, 6)
    tied: bool = True
    vocab: int = 448
    context: int = 2304
    seed: int = 0


FAMILIES = {
    "llava_next": TinyNext(),
    "llava_next_mistral": TinyNext(kv_heads=1, mlp=224, text="mistral"),
    "qwen2_5_vl": TinyQwen(),
    "video_llava": TinyVideo(),
}


def write_family(folder: Path, family: str, **sizes: Any) -> Path:
    """Write a checkpoint directory as on the hub: config, safetensors, tokenizer, chat template, preprocessor.

    Args:
        family: a key of `FAMILIES`. sizes: fields of its dataclass that shall be different.
    """
    tiny = replace(FAMILIES[family], **sizes)
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(tiny, TinyQwen):
        _write_qwen(folder, tiny)
    elif isinstance(tiny, TinyVideo):
        _write_video(folder, tiny)
    else:
        _write_next(folder, tiny)
    return folder


def _write_next(folder: Path, tiny: TinyNext) -> None:
    tokenizer = llama_tokenizer()
    ids = {name: tokenizer.token_to_id(name) for name in ("<image>", "<pad>")}
    shared: dict[str, Any] = {
        **_text_sizes(tiny),
        "num_key_value_heads": tiny.kv_heads,
        "rms_norm_eps": 1e-5,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": ids["<pad>"],
        "tie_word_embeddings": False,
    }
    text = MistralConfig(**shared, sliding_window=None) if tiny.text == "mistral" else LlamaConfig(**shared)
    side = tiny.image_size
    pinpoints = [[side, 2 * side], [2 * side, side], [2 * side, 2 * side], [3 * side, side], [side, 3 * side]]
    config = LlavaNextConfig(
        vision_config=_clip_config(tiny),
        text_config=text,
        image_token_index=ids["<image>"],
        vision_feature_layer=tiny.feature_layer,
        image_grid_pinpoints=pinpoints,
        image_seq_length=(side // tiny.patch_size) ** 2,
    )
    _save_model(LlavaNextForConditionalGeneration, config, folder, tiny.seed)
    _write_llama_tokenizer(folder, tokenizer, tiny.context, ("<image>",))
    _write_json(
        folder / "preprocessor_config.json",
        {
            **_clip_image_processor(side, "LlavaNextImageProcessor"),
            "aspect_ratio_setting": "anyres",
            "do_pad": True,
            "image_grid_pinpoints": pinpoints,
            "processor_class": "LlavaNextProcessor",
        },
    )
    _write_json(
        folder / "processor_config.json",
        {
            "image_token": "<image>",
            "num_additional_image_tokens": 1,
            "patch_size": tiny.patch_size,
            "processor_class": "LlavaNextProcessor",
            "vision_feature_select_strategy": "default",
        },
    )
    template = MISTRAL_CHAT_TEMPLATE if tiny.text == "mistral" else LLAVA_CHAT_TEMPLATE
    _write_json(folder / "chat_template.json", {"chat_template": template})


def _write_video(folder: Path, tiny: TinyVideo) -> None:
    tokenizer = llama_tokenizer()
    tokenizer.add_special_tokens([AddedToken("<video>", special=True, normalized=False)])
    ids = {name: tokenizer.token_to_id(name) for name in ("<image>", "<video>", "<pad>")}
    text = LlamaConfig(
        **_text_sizes(tiny),
        num_key_value_heads=tiny.kv_heads,
        rms_norm_eps=1e-5,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=ids["<pad>"],
    )
    tokens = (tiny.image_size // tiny.patch_size) ** 2
    config = VideoLlavaConfig(
        vision_config=_clip_config(tiny),
        text_config=text,
        image_token_index=ids["<image>"],
        video_token_index=ids["<video>"],
        vision_feature_layer=tiny.feature_layer,
        image_seq_length=tokens,
        video_seq_length=tiny.frames * (tokens + 1),
    )
    _save_model(VideoLlavaForConditionalGeneration, config, folder, tiny.seed)
    _write_llama_tokenizer(folder, tokenizer, tiny.context, ("<image>", "<video>"))
    processor = _clip_image_processor(tiny.image_size, "VideoLlavaImageProcessor")
    _write_json(folder / "preprocessor_config.json", {**processor, "processor_class": "VideoLlavaProcessor"})
    _write_json(
        folder / "processor_config.json",
        {
            "image_token": "<image>",
            "num_additional_image_tokens": 1,
            "patch_size": tiny.patch_size,
            "processor_class": "VideoLlavaProcessor",
            "video_token": "<video>",
            "vision_feature_select_strategy": "default",
        },
    )
    _write_json(folder / "chat_template.json", {"chat_template": VIDEO_LLAVA_CHAT_TEMPLATE})


def _write_qwen(folder: Path, tiny: TinyQwen) -> None:
    tokenizer = qwen_tokenizer()
    ids = {name: tokenizer.token_to_id(name) for name in QWEN_SPECIALS}
    config = Qwen2_5_VLConfig(
        text_config={
            **_text_sizes(tiny),
            "num_key_value_heads": tiny.kv_heads,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e6,
                "mrope_section": list(tiny.mrope_sections),
            },
            "bos_token_id": ids["<|endoftext|>"],
            "eos_token_id": ids["<|im_end|>"],
            "pad_token_id": ids["<|endoftext|>"],
            "tie_word_embeddings": tiny.tied,
        },
        vision_config={
            "depth": tiny.vision_layers,
            "hidden_size": tiny.vision_width,
            "intermediate_size": tiny.vision_mlp,
            "num_heads": tiny.vision_heads,
            "patch_size": tiny.patch_size,
            "spatial_merge_size": tiny.merge,
            "temporal_patch_size": tiny.temporal,
            "tokens_per_second": tiny.tokens_per_second,
            "window_size": tiny.window,
            "out_hidden_size": tiny.width,
            "fullatt_block_indexes": list(tiny.full_layers),
        },
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=tiny.tied,
    )
    _save_model(Qwen2_5_VLForConditionalGeneration, config, folder, tiny.seed)
    _write_json(
        folder / "generation_config.json",
        {
            "bos_token_id": ids["<|endoftext|>"],
            "pad_token_id": ids["<|endoftext|>"],
            "do_sample": True,
            "eos_token_id": [ids["<|im_end|>"], ids["<|endoftext|>"]],
            "repetition_penalty": 1.05,
            "temperature": 1e-6,
        },
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": None,
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
            "unk_token": None,
            "model_max_length": tiny.context,
            "clean_up_tokenization_spaces": False,
            "padding_side": "left",
        },
    )
    area = (tiny.patch_size * tiny.merge) ** 2
    patches = {
        "patch_size": tiny.patch_size,
        "temporal_patch_size": tiny.temporal,
        "merge_size": tiny.merge,
        "image_mean": CLIP_MEAN,
        "image_std": CLIP_STD,
        "processor_class": "Qwen2_5_VLProcessor",
    }
    _write_json(
        folder / "preprocessor_config.json",
        {
            "min_pixels": tiny.min_tokens * area,
            "max_pixels": tiny.max_tokens * area,
            **patches,
            "image_processor_type": "Qwen2VLImageProcessor",
        },
    )
    _write_json(
        folder / "video_preprocessor_config.json",
        {
            "size": {
                "shortest_edge": tiny.min_frame_tokens * area,
                "longest_edge": tiny.max_frame_tokens * area,
            },
            **patches,
            "fps": tiny.fps,
            "min_frames": tiny.min_frames,
            "max_frames": tiny.max_frames,
            "do_sample_frames": False,
            "video_processor_type": "Qwen2VLVideoProcessor",
        },
    )
    _write_json(folder / "chat_template.json", {"chat_template": QWEN_CHAT_TEMPLATE})


def qwen_tokenizer() -> Tokenizer:
    """A tokenizer built like Qwen2.5's: byte-level BPE without BOS; special tokens behind the vocabulary."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([_CORPUS], trainer)
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in QWEN_SPECIALS])
    return tokenizer


def _text_sizes(tiny: TinyNext | TinyVideo | TinyQwen) -> dict[str, Any]:
    return {
        "hidden_size": tiny.width,
        "intermediate_size": tiny.mlp,
        "num_hidden_layers": tiny.layers,
        "num_attention_heads": tiny.heads,
        "vocab_size": tiny.vocab,
        "max_position_embeddings": tiny.context,
    }


def _clip_config(tiny: TinyNext | TinyVideo) -> CLIPVisionConfig:
    return CLIPVisionConfig(
        hidden_size=tiny.vision_width,
        intermediate_size=tiny.vision_mlp,
        num_hidden_layers=tiny.vision_layers,
        num_attention_heads=tiny.vision_heads,
        image_size=tiny.image_size,
        patch_size=tiny.patch_size,
        projection_dim=tiny.vision_width // 2,
    )


def _clip_image_processor(side: int, name: str) -> dict[str, Any]:
    return {
        "crop_size": {"height": side, "width": side},
        "do_center_crop": True,
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": CLIP_MEAN,
        "image_processor_type": name,
        "image_std": CLIP_STD,
        "resample": 3,
        "rescale_factor": 1 / 255,
        "size": {"shortest_edge": side},
    }


def _save_model(model_class: type[PreTrainedModel], config: Any, folder: Path, seed: int) -> None:
    """Random weights, but attention is peaky and the next-token distribution far from flat."""
    torch.manual_seed(seed)
    model = model_class(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or "ln_q" in name:
                continue
            tower = any(part in name for part in ("vision_tower", "image_tower", "video_tower", "visual"))
            if tower and ("q_proj.weight" in name or "k_proj.weight" in name):
                parameter.mul_(3.0)  # random weights attend evenly to everything; trained ones do not
            elif tower and "qkv.weight" in name:
                parameter[: 2 * parameter.shape[1]].mul_(8.0)
            elif "lm_head" in name or (config.tie_word_embeddings and "embed_tokens" in name):
                parameter.mul_(12.0)
            elif "language_model" in name:
                parameter.mul_(4.0)
            elif "image_newline" in name:
                parameter.normal_(0.0, 0.02)  # the class makes it as long as a row is wide
    model.save_pretrained(folder)


def _write_llama_tokenizer(folder: Path, tokenizer: Tokenizer, context: int, extra: tuple[str, ...]) -> None:
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {f"{name.strip('<>')}_token": name for name in extra}
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "<s>",
            "eos_token": "</s>",
            "unk_token": "<unk>",
            "pad_token": "<pad>",
            **names,
            "extra_special_tokens": names,
            "model_max_length": context,
            "clean_up_tokenization_spaces": False,
            "padding_side": "left",
        },
    )


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
