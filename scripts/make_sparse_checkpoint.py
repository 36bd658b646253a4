#!/usr/bin/env python3
"""Writes a Hugging Face directory of a model's true size whose language model is a hole in the disk.

fp16 shards of 14 to 27 GB apparent size, the tensors spelled as on the hub. The vision towers and the projector hold
random values (0.6 to 1.4 GB); the language model's tensors are holes in sparse files, which read as zeros and take no
space. It shows what an export of the vision graphs costs, without a download and without that much disk.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors

#: as save_pretrained splits: a shard ends before it would pass this size
SHARD_BYTES = 5 * 10**9
BYTES = 2  # float16
CLIP_MEAN, CLIP_STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Model:
    """What to write.

    Attributes:
        model_class: of transformers. image: pixels of a square; 0 for a tower that takes pictures of any size.
        width, layers, heads, kv_heads, mlp, vocabulary: of the language model.
        specials: its special tokens by their ids.
    """

    model_class: str
    image: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    mlp: int
    vocabulary: int
    specials: tuple[tuple[str, int], ...]


_LLAMA_SPECIALS = (("<unk>", 0), ("<s>", 1), ("</s>", 2), ("<image>", 32000), ("<pad>", 32001))
_VIDEO_SPECIALS = (("<unk>", 0), ("<s>", 1), ("</s>", 2), ("<image>", 32000), ("<video>", 32001), ("<pad>", 32002))
_QWEN_SPECIALS = (
    ("<|endoftext|>", 151643),
    ("<|im_start|>", 151644),
    ("<|im_end|>", 151645),
    ("<|vision_start|>", 151652),
    ("<|vision_end|>", 151653),
    ("<|image_pad|>", 151655),
    ("<|video_pad|>", 151656),
)
#: Source: config.json of llava-hf/llava-1.5-7b-hf, llava-1.5-13b-hf and llava-v1.6-vicuna-7b-hf,
#: LanguageBind/Video-LLaVA-7B-hf and Qwen/Qwen2.5-VL-7B-Instruct
MODELS = {
    "llava-1.5-7b": Model("Llava", 336, 4096, 32, 32, 32, 11008, 32064, _LLAMA_SPECIALS),
    "llava-1.5-13b": Model("Llava", 336, 5120, 40, 40, 40, 13824, 32064, _LLAMA_SPECIALS),
    "llava-next-7b": Model("LlavaNext", 336, 4096, 32, 32, 32, 11008, 32064, _LLAMA_SPECIALS),
    "video-llava-7b": Model("VideoLlava", 224, 4096, 32, 32, 32, 11008, 32064, _VIDEO_SPECIALS),
    "qwen2.5-vl-7b": Model("Qwen2_5_VL", 0, 3584, 28, 28, 4, 18944, 152064, _QWEN_SPECIALS),
}
DEFAULT = "llava-1.5-7b"


def config_of(model: Model) -> Any:
    """transformers' configuration."""
    import transformers

    ids = dict(model.specials)
    text = {
        "hidden_size": model.width,
        "intermediate_size": model.mlp,
        "num_hidden_layers": model.layers,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.kv_heads,
        "vocab_size": model.vocabulary,
    }
    if model.image == 0:
        rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
        vision = {"hidden_size": 1280, "out_hidden_size": model.width, "intermediate_size": 3420}
        return transformers.Qwen2_5_VLConfig(
            text_config={**text, "max_position_embeddings": 128000, "rms_norm_eps": 1e-6, "rope_parameters": rope},
            vision_config={**vision, "depth": 32, "num_heads": 16, "tokens_per_second": 2},
            image_token_id=ids["<|image_pad|>"],
            video_token_id=ids["<|video_pad|>"],
            vision_start_token_id=ids["<|vision_start|>"],
            vision_end_token_id=ids["<|vision_end|>"],
        )
    tower = transformers.CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=model.image,
        patch_size=14,
        projection_dim=768,
    )
    ends = {"bos_token_id": ids["<s>"], "eos_token_id": ids["</s>"], "pad_token_id": ids["<pad>"]}
    llama = transformers.LlamaConfig(**text, **ends, max_position_embeddings=4096, rms_norm_eps=1e-5)
    further = {"video_token_index": ids["<video>"]} if "<video>" in ids else {}
    made = getattr(transformers, f"{model.model_class}Config")
    return made(vision_config=tower, text_config=llama, image_token_index=ids["<image>"], **further)


def tensors_of(model: Model) -> list[tuple[str, Shape]]:
    """Names, spelled as on the hub, and shapes of all tensors in the order of the model."""
    import torch
    import transformers

    with torch.device("meta"):
        made = getattr(transformers, f"{model.model_class}ForConditionalGeneration")(config_of(model))
    return [(hub_name(name, model), tuple(parameter.shape)) for name, parameter in made.named_parameters()]


def hub_name(name: str, model: Model) -> str:
    """From transformers 5's name of a parameter to that of 4.x, which the hub has."""
    if model.image == 0:
        return name.replace("model.language_model.", "model.").replace("model.visual.", "visual.")
    name = name.removeprefix("model.").replace("language_model.", "language_model.model.")
    return name.replace("lm_head", "language_model.lm_head").replace("_tower.", "_tower.vision_model.")


def is_language(name: str) -> bool:
    """The tensor belongs to the language model."""
    return name.startswith(("language_model.", "model.", "lm_head."))


def shards(model: Model) -> list[list[tuple[str, Shape]]]:
    """All tensors in the order of the model, divided by size."""
    parts: list[list[tuple[str, Shape]]] = [[]]
    filled = 0
    for name, shape in tensors_of(model):
        size = math.prod(shape) * BYTES
        if filled + size > SHARD_BYTES:
            parts.append([])
            filled = 0
        parts[-1].append((name, shape))
        filled += size
    return parts


def values_of(name: str, shape: Shape, dice: np.random.Generator) -> np.ndarray[Any, Any]:
    """Random float16 values of a sensible size: ones for norms, peaky attention, 0.02 otherwise."""
    if "norm" in name or "ln_q" in name:
        return np.full(shape, 1.0 if name.endswith("weight") else 0.0, dtype=np.float16)
    scale = 0.05 if any(part in name for part in ("q_proj.weight", "k_proj.weight", "qkv.weight")) else 0.02
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
            if not is_language(name):
                file.seek(start + header[name]["data_offsets"][0])
                file.write(values_of(name, shape, dice).tobytes())
        file.truncate(start + offset)
    return offset


def tokenizer(model: Model) -> Tokenizer:
    """A few words and the model's special tokens, each at its own id."""
    ids = {identity: name for name, identity in model.specials}
    free = [identity for identity in range(max(ids)) if identity not in ids]
    words = ["USER", "ASSISTANT", ":", "what", "is", "shown", "?"]
    words += [f"<unused_{place}>" for place in range(len(words), len(free))]
    vocabulary = {**dict(zip(words, free, strict=True)), **dict(model.specials)}
    unknown = ids.get(0, words[0])
    made = Tokenizer(models.WordLevel(vocabulary, unk_token=unknown))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.add_special_tokens([AddedToken(name, special=True, normalized=False) for name, _ in model.specials])
    assert all(made.token_to_id(name) == identity for name, identity in model.specials)
    if "<s>" in vocabulary:
        made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return made


def side_files(model: Model) -> dict[str, dict[str, Any]]:
    """File name -> JSON content."""
    config = config_of(model)
    architecture = f"{model.model_class}ForConditionalGeneration"
    ids = dict(model.specials)
    names = {"bos_token": "<s>", "eos_token": "</s>"} if "<s>" in ids else {"eos_token": "<|im_end|>"}
    end = ids[names["eos_token"]]
    starts = {"bos_token_id": ids["<s>"], "pad_token_id": ids["<pad>"]} if "<s>" in ids else {}
    return {
        "config.json": {**config.to_dict(), "architectures": [architecture], "dtype": "float16"},
        "preprocessor_config.json": preprocessor(model),
        "generation_config.json": {**starts, "eos_token_id": end},
        "tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast", **names},
    }


def preprocessor(model: Model) -> dict[str, Any]:
    """preprocessor_config.json."""
    shared = {"image_mean": CLIP_MEAN, "image_std": CLIP_STD, "do_convert_rgb": True, "resample": 3}
    shared |= {"do_resize": True, "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True}
    if model.image == 0:
        sizes = {"patch_size": 14, "merge_size": 2, "temporal_patch_size": 2}
        area = {"min_pixels": 3136, "max_pixels": 12845056}
        return {"image_processor_type": "Qwen2VLImageProcessor", **shared, **sizes, **area}
    square = {"height": model.image, "width": model.image}
    shared |= {"size": {"shortest_edge": model.image}, "do_center_crop": True, "crop_size": square}
    if model.model_class == "LlavaNext":
        # transformers' own default, which is what the hub's checkpoints have
        shared |= {"image_grid_pinpoints": config_of(model).image_grid_pinpoints, "aspect_ratio_setting": "anyres"}
    kind = "CLIP" if model.model_class == "Llava" else model.model_class
    return {"image_processor_type": f"{kind}ImageProcessor", **shared}


def write_checkpoint(folder: Path, seed: int = 0, name: str = DEFAULT) -> None:
    """The whole directory."""
    model = MODELS[name]
    folder.mkdir(parents=True)
    for file, content in side_files(model).items():
        (folder / file).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    tokenizer(model).save(str(folder / "tokenizer.json"))
    parts, dice = shards(model), np.random.default_rng(seed)
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
    parser.add_argument("--model", default=DEFAULT, choices=MODELS, help=f"whose sizes it has ({DEFAULT})")
    parser.add_argument("--seed", type=int, default=0, help="of the random values (0)")
    options = parser.parse_args()
    if options.out.exists():
        parser.error(f"{options.out} exists")
    write_checkpoint(options.out, options.seed, options.model)
    apparent, on_disk = sizes_of(options.out)
    print(f"{options.out}: {apparent / 1e9:.2f} GB apparent, {on_disk / 1e9:.2f} GB on disk")


if __name__ == "__main__":
    main()
