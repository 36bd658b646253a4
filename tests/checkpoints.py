"""A factory of tiny random LLaVA checkpoints: the true classes, the true file layout, sizes of a few hundred kilobytes.

All sizes differ from each other, so that a transposed or swapped tensor cannot go unnoticed, and `vocab_size` is no
Linear's width, because ONNX Runtime GenAI's builder takes any Linear of that width for the language model's head.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

#: the chat template of llava-hf/llava-1.5-7b-hf
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}{% endif %}"
    "{# Render all images first #}{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>\n' }}{% endfor %}{# Render all text next #}{% if message['role'] != 'assistant' %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' '}}"
    "{% endfor %}{% else %}{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{% generation %}{{ content['text'] + ' '}}{% endgeneration %}{% endfor %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
CLIP_MEAN = [0.48145466, 0.4578275, 0.40821073]
CLIP_STD = [0.26862954, 0.26130258, 0.27577711]
_CORPUS = (
    "USER: ASSISTANT: what is shown in this picture and how many digits are there? the red one is left of the "
    "blue one, below it there is a yellow seven. answer in one word. describe the image in detail. naïve café, "
    "straße, 7 + 5 = 12."
)


@dataclass(frozen=True)
class TinyLlava:
    """Sizes of a tiny checkpoint; the defaults give 64 patch tokens."""

    image_size: int = 56
    patch_size: int = 7
    vision_width: int = 48
    vision_layers: int = 4
    vision_heads: int = 4
    vision_mlp: int = 80
    feature_layer: int = -2
    width: int = 96
    layers: int = 3
    heads: int = 6
    kv_heads: int = 2
    mlp: int = 160
    vocab: int = 416
    context: int = 512
    tied: bool = False
    byte_level: bool = False
    seed: int = 0


def config_from_sizes(sizes: TinyLlava, image_token_id: int) -> LlavaConfig:
    """The LlavaConfig of these sizes."""
    vision = CLIPVisionConfig(
        hidden_size=sizes.vision_width,
        intermediate_size=sizes.vision_mlp,
        num_hidden_layers=sizes.vision_layers,
        num_attention_heads=sizes.vision_heads,
        image_size=sizes.image_size,
        patch_size=sizes.patch_size,
        projection_dim=sizes.vision_width // 2,
    )
    text = LlamaConfig(
        hidden_size=sizes.width,
        intermediate_size=sizes.mlp,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.kv_heads,
        vocab_size=sizes.vocab,
        max_position_embeddings=sizes.context,
        tie_word_embeddings=sizes.tied,
        rms_norm_eps=1e-5,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=4,
    )
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=image_token_id,
        vision_feature_layer=sizes.feature_layer,
        vision_feature_select_strategy="default",
        projector_hidden_act="gelu",
        image_seq_length=(sizes.image_size // sizes.patch_size) ** 2,
        tie_word_embeddings=sizes.tied,
    )


def llama_tokenizer() -> Tokenizer:
    """A tokenizer built like Llama's: SentencePiece BPE with byte fallback, BOS from the post-processor."""
    specials = ["<unk>", "<s>", "</s>", "<image>", "<pad>"]
    normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trained = Tokenizer(models.BPE())
    trained.normalizer = normalizer
    trained.train_from_iterator(_CORPUS.split(". "), trainers.BpeTrainer(vocab_size=128, show_progress=False))
    learnt = json.loads(trained.to_str())["model"]
    pieces = sorted(learnt["vocab"], key=learnt["vocab"].get)
    names = [*specials, *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    vocabulary = {piece: index for index, piece in enumerate(dict.fromkeys(names))}
    merges = [tuple(pair) for pair in learnt["merges"]]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizer
    strip = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(strip)
    return _with_specials(tokenizer, specials)


def byte_level_tokenizer() -> Tokenizer:
    """A tokenizer built like GPT-2's: byte-level BPE."""
    specials = ["<unk>", "<s>", "</s>", "<image>", "<pad>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([_CORPUS], trainer)
    return _with_specials(tokenizer, specials)


def _with_specials(tokenizer: Tokenizer, specials: list[str]) -> Tokenizer:
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in specials])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return tokenizer


def model_from_sizes(sizes: TinyLlava, image_token_id: int) -> LlavaForConditionalGeneration:
    """A random model whose CLS attention is peaky and whose next-token distribution is far from flat."""
    torch.manual_seed(sizes.seed)
    model = LlavaForConditionalGeneration(config_from_sizes(sizes, image_token_id)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                continue
            if "vision_tower" in name and (".q_proj.weight" in name or ".k_proj.weight" in name):
                parameter.mul_(3.0)  # random weights attend evenly to everything; a trained CLS token does not
            elif "language_model" in name or "lm_head" in name:
                parameter.mul_(4.0)
    return model


def write_checkpoint(folder: Path, sizes: TinyLlava | None = None) -> Path:
    """Write a checkpoint directory as on the hub: config, safetensors, tokenizer, chat template, preprocessor."""
    sizes = sizes or TinyLlava()
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = byte_level_tokenizer() if sizes.byte_level else llama_tokenizer()
    image_token_id = tokenizer.token_to_id("<image>")
    assert tokenizer.get_vocab_size() <= sizes.vocab, tokenizer.get_vocab_size()
    model_from_sizes(sizes, image_token_id).save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    side = {"height": sizes.image_size, "width": sizes.image_size}
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "<s>",
            "eos_token": "</s>",
            "unk_token": "<unk>",
            "pad_token": "<pad>",
            "image_token": "<image>",
            "extra_special_tokens": {"image_token": "<image>"},
            "model_max_length": sizes.context,
            "clean_up_tokenization_spaces": False,
            "padding_side": "left",
        },
    )
    _write_json(
        folder / "preprocessor_config.json",
        {
            "image_processor_type": "CLIPImageProcessor",
            "do_resize": True,
            "size": {"shortest_edge": sizes.image_size},
            "resample": 3,
            "do_center_crop": True,
            "crop_size": side,
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": CLIP_MEAN,
            "image_std": CLIP_STD,
            "do_convert_rgb": True,
        },
    )
    _write_json(
        folder / "processor_config.json",
        {
            "processor_class": "LlavaProcessor",
            "image_token": "<image>",
            "num_additional_image_tokens": 1,
            "patch_size": sizes.patch_size,
            "vision_feature_select_strategy": "default",
        },
    )
    _write_json(folder / "chat_template.json", {"chat_template": CHAT_TEMPLATE})
    return folder


def _write_json(path: Path, content: dict[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
