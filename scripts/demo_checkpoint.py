"""The demo model's configuration, tokenizer and processor, and how they are written to a folder."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import TYPE_CHECKING

import demo_scenes as ds
from demo_training import CLIP_MEAN, CLIP_STD
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration

SPECIALS = ("<unk>", "<s>", "</s>", "<pad>", "<image>")
WORDS = (
    "user assistant : ? . , 0 1 2 3 4 5 6 7 8 9 yes no red green blue yellow white is there a an how many "
    "digits are what the leftmost rightmost topmost bottommost digit which color read from left to right"
)
PROMPT = "USER: <image>\n{question} ASSISTANT:"
CHAT_TEMPLATE = """{%- for message in messages -%}
{%- if message['role'] == 'assistant' -%}{{ ' ASSISTANT: ' }}{%- else -%}{{ 'USER: ' }}{%- endif -%}
{%- if message['content'] is string -%}{{ message['content'] }}
{%- else -%}
{%- for item in message['content'] if item['type'] == 'image' -%}{{ '<image>\\n' }}{%- endfor -%}
{%- for item in message['content'] if item['type'] == 'text' -%}{{ item['text'] }}{%- endfor -%}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ ' ASSISTANT:' }}{%- endif -%}
"""


def vocabulary() -> dict[str, int]:
    """Word to id; the specials come first."""
    return {word: index for index, word in enumerate((*SPECIALS, *WORDS.split()))}


def demo_tokenizer() -> Tokenizer:
    """Whole lowercase words, digits one by one, punctuation apart; `<s>` in front of every text."""
    words = vocabulary()
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.WhitespaceSplit(),
            pre_tokenizers.Punctuation("isolated"),
            pre_tokenizers.Digits(True),
        ]
    )
    tokenizer.add_special_tokens(list(SPECIALS))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", words["<s>"])]
    )
    return tokenizer


def demo_llava(seed: int = 0) -> LlavaForConditionalGeneration:
    """An untrained LlavaForConditionalGeneration of the demo's size, in float32."""
    import torch
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    words = vocabulary()
    ids = {"bos_token_id": words["<s>"], "eos_token_id": words["</s>"], "pad_token_id": words["<pad>"]}
    vision = CLIPVisionConfig(
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=6,
        num_attention_heads=4,
        image_size=ds.IMAGE_SIZE,
        patch_size=ds.PATCH,
        projection_dim=128,
        hidden_act="quick_gelu",
    )
    text = LlamaConfig(
        vocab_size=len(words),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=1024,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        **ids,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=words["<image>"],
        image_seq_length=ds.GRID**2,
        projector_hidden_act="gelu",
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
        **ids,
    )
    torch.manual_seed(seed)
    return LlavaForConditionalGeneration(config).float()


def write_processor(out: Path) -> None:
    """tokenizer.json and the configuration files of tokenizer, image processor, processor and template."""
    out.mkdir(parents=True, exist_ok=True)
    demo_tokenizer().save(str(out / "tokenizer.json"))
    specials = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    side = ds.IMAGE_SIZE
    image = {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": side},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": side, "width": side},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(CLIP_MEAN),
        "image_std": list(CLIP_STD),
    }
    processor = {
        "processor_class": "LlavaProcessor",
        "image_token": "<image>",
        "patch_size": ds.PATCH,
        "vision_feature_select_strategy": "default",
        "num_additional_image_tokens": 1,
    }
    files = {
        "special_tokens_map.json": {**specials, "additional_special_tokens": ["<image>"]},
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "processor_class": "LlavaProcessor",
            "model_max_length": 1024,
            "padding_side": "left",
            "clean_up_tokenization_spaces": False,
            **specials,
            "image_token": "<image>",
            "extra_special_tokens": {"image_token": "<image>"},
        },
        "preprocessor_config.json": {**image, "processor_class": "LlavaProcessor"},
        "processor_config.json": processor,
    }
    for name, content in files.items():
        (out / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    (out / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")


def write_checkpoint(llava: LlavaForConditionalGeneration, out: Path) -> int:
    """Writes the model in float16 and everything a processor needs; returns the bytes of the weights.
    Weights carry the names of the published LLaVA-1.5 checkpoints (`vision_tower.vision_model.`)."""
    from safetensors.torch import load_file, save_file
    from transformers import GenerationConfig

    write_processor(out)
    ids = vocabulary()
    half = copy.deepcopy(llava).half()
    half.generation_config = GenerationConfig(
        bos_token_id=ids["<s>"],
        eos_token_id=ids["</s>"],
        pad_token_id=ids["<pad>"],
        do_sample=False,
        max_new_tokens=8,
    )
    half.save_pretrained(out)
    weights = out / "model.safetensors"
    published = "vision_tower.vision_model."
    tensors = load_file(weights)
    if not any(name.startswith(published) for name in tensors):
        tensors = {name.replace("vision_tower.", published): tensor for name, tensor in tensors.items()}
    save_file(tensors, weights, metadata={"format": "pt"})
    weights.chmod(0o644)
    return weights.stat().st_size
