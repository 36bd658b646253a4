#!/usr/bin/env python3
"""Writes a llava-1.5-7b shaped Hugging Face directory whose language model is a hole in the disk.

Three fp16 shards of 14.1 GB apparent size, laid out as llava-hf/llava-1.5-7b-hf lays them out. The vision tower and the
projector hold random values (650 MB); the language model's tensors are holes in sparse files, which read as zeros and
take no space. It shows what an export of the vision graph costs, without a download and without 14 GB of disk.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors

VOCABULARY, IMAGE_TOKEN, PAD_TOKEN = 32064, 32000, 32001
WIDTH, LAYERS, MLP = 4096, 32, 11008
VISION_WIDTH, VISION_LAYERS, VISION_MLP, IMAGE, PATCH = 1024, 24, 4096, 336, 14
#: as save_pretrained splits: a shard ends before it would pass this size
SHARD_BYTES = 5 * 10**9
BYTES = 2  # float16

Shape = tuple[int, ...]


def vision_tensors() -> Iterator[tuple[str, Shape]]:
    """Names and shapes of the CLIP tower, spelled as on the hub."""
    front, tokens = "vision_tower.vision_model", (IMAGE // PATCH) ** 2 + 1
    yield f"{front}.embeddings.class_embedding", (VISION_WIDTH,)
    yield f"{front}.embeddings.patch_embedding.weight", (VISION_WIDTH, 3, PATCH, PATCH)
    yield f"{front}.embeddings.position_embedding.weight", (tokens, VISION_WIDTH)
    linears = [(f"self_attn.{name}_proj", VISION_WIDTH, VISION_WIDTH) for name in ("k", "v", "q", "out")]
    linears += [("mlp.fc1", VISION_MLP, VISION_WIDTH), ("mlp.fc2", VISION_WIDTH, VISION_MLP)]
    norms = [f"{front}.pre_layrnorm", f"{front}.post_layernorm"]
    for layer in range(VISION_LAYERS):
        place = f"{front}.encoder.layers.{layer}"
        norms += [f"{place}.layer_norm1", f"{place}.layer_norm2"]
        for name, out, into in linears:
            yield f"{place}.{name}.weight", (out, into)
            yield f"{place}.{name}.bias", (out,)
    for norm in norms:
        yield f"{norm}.weight", (VISION_WIDTH,)
        yield f"{norm}.bias", (VISION_WIDTH,)


def projector_tensors() -> Iterator[tuple[str, Shape]]:
    """Names and shapes of LLaVA's projector."""
    for name, into in (("linear_1", VISION_WIDTH), ("linear_2", WIDTH)):
        yield f"multi_modal_projector.{name}.weight", (WIDTH, into)
        yield f"multi_modal_projector.{name}.bias", (WIDTH,)


def language_tensors() -> Iterator[tuple[str, Shape]]:
    """Names and shapes of Vicuna-7B."""
    yield "language_model.model.embed_tokens.weight", (VOCABULARY, WIDTH)
    for layer in range(LAYERS):
        place = f"language_model.model.layers.{layer}"
        for name in ("q", "k", "v", "o"):
            yield f"{place}.self_attn.{name}_proj.weight", (WIDTH, WIDTH)
        yield f"{place}.mlp.gate_proj.weight", (MLP, WIDTH)
        yield f"{place}.mlp.up_proj.weight", (MLP, WIDTH)
        yield f"{place}.mlp.down_proj.weight", (WIDTH, MLP)
        yield f"{place}.input_layernorm.weight", (WIDTH,)
        yield f"{place}.post_attention_layernorm.weight", (WIDTH,)
    yield "language_model.model.norm.weight", (WIDTH,)
    yield "language_model.lm_head.weight", (VOCABULARY, WIDTH)


def shards() -> list[list[tuple[str, Shape]]]:
    """All tensors in the order of the model, divided by size."""
    parts: list[list[tuple[str, Shape]]] = [[]]
    filled = 0
    for name, shape in [*vision_tensors(), *projector_tensors(), *language_tensors()]:
        size = math.prod(shape) * BYTES
        if filled + size > SHARD_BYTES:
            parts.append([])
            filled = 0
        parts[-1].append((name, shape))
        filled += size
    return parts


def values_of(name: str, shape: Shape, dice: np.random.Generator) -> np.ndarray[Any, Any]:
    """Random float16 values of a sensible size: ones for norms, peaky attention, 0.02 otherwise."""
    if "norm" in name:
        return np.full(shape, 1.0 if name.endswith("weight") else 0.0, dtype=np.float16)
    scale = 0.05 if ("q_proj.weight" in name or "k_proj.weight" in name) else 0.02
    return (dice.standard_normal(shape, dtype=np.float32) * np.float32(scale)).astype(np.float16)


def write_shard(path: Path, tensors: list[tuple[str, Shape]], dice: np.random.Generator) -> int:
    """One safetensors file; what belongs to the language model stays a hole. Returns the tensors' bytes."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in tensors:
        end = offset + math.prod(shape) * BYTES
        header[name] = {"dtype": "F16", "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        start = file.tell()
        for name, shape in tensors:
            if not name.startswith("language_model."):
                file.seek(start + header[name]["data_offsets"][0])
                file.write(values_of(name, shape, dice).tobytes())
        file.truncate(start + offset)
    return offset


def tokenizer() -> Tokenizer:
    """A few words under LLaVA's special ids; <image> is 32000."""
    words = {"<unk>": 0, "<s>": 1, "</s>": 2, "USER": 3, "ASSISTANT": 4, ":": 5, "what": 6, "is": 7, "shown": 8, "?": 9}
    words |= {f"<unused_{index}>": index for index in range(len(words), IMAGE_TOKEN)}
    made = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in ("<unk>", "<s>", "</s>")])
    made.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in ("<image>", "<pad>")])
    assert (made.token_to_id("<image>"), made.token_to_id("<pad>")) == (IMAGE_TOKEN, PAD_TOKEN)
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return made


def side_files() -> dict[str, dict[str, Any]]:
    """File name -> JSON content."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

    vision = CLIPVisionConfig(
        hidden_size=VISION_WIDTH,
        intermediate_size=VISION_MLP,
        num_hidden_layers=VISION_LAYERS,
        num_attention_heads=16,
        image_size=IMAGE,
        patch_size=PATCH,
        projection_dim=768,
    )
    text = LlamaConfig(
        hidden_size=WIDTH,
        intermediate_size=MLP,
        num_hidden_layers=LAYERS,
        num_attention_heads=32,
        num_key_value_heads=32,
        vocab_size=VOCABULARY,
        max_position_embeddings=4096,
        rms_norm_eps=1e-5,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=PAD_TOKEN,
    )
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE_TOKEN)
    size = {"height": IMAGE, "width": IMAGE}
    preprocessor = {
        "image_processor_type": "CLIPImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": IMAGE},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": size,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "do_convert_rgb": True,
    }
    generation = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": PAD_TOKEN}
    return {
        "config.json": {**config.to_dict(), "architectures": ["LlavaForConditionalGeneration"], "dtype": "float16"},
        "preprocessor_config.json": preprocessor,
        "generation_config.json": generation,
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "<s>",
            "eos_token": "</s>",
        },
    }


def write_checkpoint(folder: Path, seed: int = 0) -> None:
    """The whole directory."""
    folder.mkdir(parents=True)
    for file, content in side_files().items():
        (folder / file).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    tokenizer().save(str(folder / "tokenizer.json"))
    parts, dice = shards(), np.random.default_rng(seed)
    weight_map, total = {}, 0
    for index, tensors in enumerate(parts):
        file = f"model-{index + 1:05d}-of-{len(parts):05d}.safetensors"
        total += write_shard(folder / file, tensors, dice)
        weight_map.update(dict.fromkeys((name for name, _ in tensors), file))
    index_file = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index_file, indent=2) + "\n", encoding="utf-8")


def sizes_of(folder: Path) -> tuple[int, int]:
    """(apparent bytes, bytes on disk) of the files of a directory."""
    stats = [path.stat() for path in folder.rglob("*") if path.is_file()]
    return sum(stat.st_size for stat in stats), sum(stat.st_blocks * 512 for stat in stats)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="directory to write; must not exist")
    parser.add_argument("--seed", type=int, default=0, help="of the random values (0)")
    options = parser.parse_args()
    if options.out.exists():
        parser.error(f"{options.out} exists")
    write_checkpoint(options.out, options.seed)
    apparent, on_disk = sizes_of(options.out)
    print(f"{options.out}: {apparent / 1e9:.2f} GB apparent, {on_disk / 1e9:.2f} GB on disk")


if __name__ == "__main__":
    main()
