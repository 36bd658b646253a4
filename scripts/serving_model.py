#!/usr/bin/env python3
"""Writes a random LLaVA checkpoint for loads on a CPU: "full" with LLaVA-1.5's 576 tokens an image, or "small".

The picture side of the full one has the geometry of CLIP ViT-L/14 at 336 px; its width and the language model's are a
fraction, but in the same proportion: a prompt of 576 rows costs the language model several times what the tower costs.
The small one, with 64 tokens, answers in milliseconds, each picture with other words: for counting mix-ups.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from demo_checkpoint import CHAT_TEMPLATE
from make_sparse_checkpoint import CLIP_MEAN, CLIP_STD
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

PATCH = 14
SPECIALS = ("<unk>", "<s>", "</s>", "<pad>", "<image>")
VOCABULARY = 2003


@dataclass(frozen=True)
class Sizes:
    """Of a model; `side` is in pixels, `tower` and `llama` are (width, width of the MLP, layers, heads)."""

    side: int
    tower: tuple[int, int, int, int]
    llama: tuple[int, int, int, int]

    @property
    def tokens(self) -> int:
        return (self.side // PATCH) ** 2


#: of the full one: a third of CLIP ViT-L's layers and a quarter of its width
SIZES = {
    "full": Sizes(336, (256, 1024, 8, 4), (512, 1376, 12, 8)),
    "small": Sizes(112, (64, 160, 3, 2), (128, 352, 2, 4)),
}


def config(sizes: Sizes) -> LlavaConfig:
    """transformers' configuration."""
    width, mlp, layers, heads = sizes.tower
    tower = CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        image_size=sizes.side,
        patch_size=PATCH,
        projection_dim=width // 2,
    )
    width, mlp, layers, heads = sizes.llama
    llama = LlamaConfig(
        hidden_size=width,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        vocab_size=VOCABULARY,
        max_position_embeddings=2048,
        rms_norm_eps=1e-5,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=3,
    )
    return LlavaConfig(
        vision_config=tower,
        text_config=llama,
        image_token_index=SPECIALS.index("<image>"),
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        image_seq_length=sizes.tokens,
    )


def tokenizer() -> Tokenizer:
    """A word of its own for every id, so that different answers read differently."""
    words = {word: index for index, word in enumerate(SPECIALS)}
    for name in ("USER", "ASSISTANT", ":", "what", "is", "this", "?"):
        words[name] = len(words)
    words |= {f"w{index}": index for index in range(len(words), VOCABULARY)}
    made = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in SPECIALS])
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return made


def write_checkpoint(folder: Path, size: str = "full", seed: int = 0) -> None:
    """The whole directory; the full one has 170 MB."""
    torch.manual_seed(seed)
    sizes = SIZES[size]
    model = LlavaForConditionalGeneration(config(sizes)).eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(8)  # or every next token is about as likely as the others
        model.model.multi_modal_projector.linear_2.weight.mul_(8)  # or the picture hardly counts
    model.save_pretrained(folder)
    tokenizer().save(str(folder / "tokenizer.json"))
    square = {"height": sizes.side, "width": sizes.side}
    files = {
        "preprocessor_config.json": {
            "image_processor_type": "CLIPImageProcessor",
            "size": {"shortest_edge": sizes.side},
            "crop_size": square,
            "do_center_crop": True,
            "do_convert_rgb": True,
            "do_normalize": True,
            "do_rescale": True,
            "do_resize": True,
            "image_mean": CLIP_MEAN,
            "image_std": CLIP_STD,
            "resample": 3,
            "rescale_factor": 1 / 255,
        },
        "generation_config.json": {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3},
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "<s>",
            "eos_token": "</s>",
            "chat_template": CHAT_TEMPLATE,
        },
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="directory to write; must not exist")
    parser.add_argument("--size", choices=SIZES, default="full", help="(full)")
    options = parser.parse_args()
    if options.out.exists():
        parser.error(f"{options.out} exists")
    write_checkpoint(options.out, options.size)


if __name__ == "__main__":
    main()
