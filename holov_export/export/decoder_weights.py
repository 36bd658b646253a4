"""The language model inside a checkpoint, copied out of its safetensors shards into a checkpoint of its own.

A safetensors file is a JSON header and raw bytes, so tensors are renamed by writing another header and copying the
bytes: no tensor is ever decoded, a bfloat16 stays one, and memory stays at one copy buffer for a model of any size.

Source of the format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from holov_export.errors import CheckpointError, UnsupportedModelError
from holov_export.vision.weights import damaged_shard, shard_of_tensor, shard_path

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
NO_DECODER = "Export without the embedded decoder: --no-decoder"
_BLOCK = 1 << 24
_HEADER_LIMIT = 100_000_000
#: what transformers 4.x, 5.x and bare dumps put before the same tensors; the first match wins
_PREFIXES = (
    (re.compile(r"^language_model\.model\.(.+)$"), r"model.\1"),
    (re.compile(r"^language_model\.(lm_head\..+)$"), r"\1"),
    (re.compile(r"^model\.language_model\.lm_head\.(.+)$"), r"lm_head.\1"),
    (re.compile(r"^model\.language_model\.(?:model\.)?(.+)$"), r"model.\1"),
    (re.compile(r"^language_model\.(.+)$"), r"model.\1"),
    (re.compile(r"^(lm_head\..+)$"), r"\1"),
    (re.compile(r"^(model\.(?:embed_tokens|layers|norm)\..+)$"), r"\1"),
)


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies: its shard, safetensors' name of its element type, shape, and first and past-last byte."""

    shard: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def language_key(key: str) -> str | None:
    """The name that LlamaForCausalLM gives to a checkpoint's `key`; None if it is not of the language model."""
    for pattern, replacement in _PREFIXES:
        if pattern.match(key):
            return pattern.sub(replacement, key)
    return None


def language_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of the language model under LlamaForCausalLM's names, from the shards' headers.

    Raises:
        CheckpointError: no safetensors, a missing or damaged shard, two tensors of one name, or no embedding table.
    """
    wanted: dict[str, dict[str, str]] = {}
    for key, file in shard_of_tensor(folder).items():
        name = language_key(key)
        if name is not None and not name.endswith("rotary_emb.inv_freq"):
            wanted.setdefault(file, {})[key] = name
    tensors: dict[str, StoredTensor] = {}
    for file in sorted(wanted):
        stored = dict(_header(shard_path(folder, file)))
        for key, name in wanted[file].items():
            if key not in stored:
                raise damaged_shard(file, f"it has no tensor '{key}'")
            if name in tensors:
                raise CheckpointError(f"the checkpoint has several tensors for '{name}', one of them '{key}'.")
            tensors[name] = stored[key]
    if EMBEDDING not in tensors:
        raise CheckpointError(
            f"'{folder.name}' holds no language model: no tensor is called like {EMBEDDING}.",
            hint="Expected a vision-language checkpoint in safetensors.",
        )
    return tensors


def _header(shard: Path) -> Iterator[tuple[str, StoredTensor]]:
    """(name, tensor) of one file, checked against the file's length."""
    size = shard.stat().st_size
    with shard.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if not 2 <= length <= min(_HEADER_LIMIT, size):
            raise damaged_shard(shard.name, "it is no safetensors file")
        try:
            entries = json.loads(stream.read(length))
        except ValueError as error:
            raise damaged_shard(shard.name, f"header: {error}") from error
    if not isinstance(entries, dict):
        raise damaged_shard(shard.name, "its header is no JSON object")
    for key, entry in entries.items():
        if key == "__metadata__":
            continue
        try:
            begin, end = (8 + length + int(offset) for offset in entry["data_offsets"])
            tensor = StoredTensor(shard, str(entry["dtype"]), tuple(int(axis) for axis in entry["shape"]), begin, end)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise damaged_shard(shard.name, f"its header is wrong at '{key}'") from error
        if not 8 + length <= begin <= end <= size:
            raise damaged_shard(shard.name, f"'{key}' lies in the bytes {begin} to {end} of {size}")
        yield key, tensor


def write_language_model(tensors: Mapping[str, StoredTensor], out: Path) -> None:
    """Write `tensors` below `out` as one safetensors file for each shard they come from, and an index."""
    weight_map: dict[str, str] = {}
    shards = sorted({tensor.shard for tensor in tensors.values()})
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        part = {key: tensor for key, tensor in tensors.items() if tensor.shard == shard}
        _copy_tensors(part, shard, out / name)
        weight_map.update(dict.fromkeys(part, name))
    total = sum(tensor.end - tensor.begin for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")


def _copy_tensors(tensors: Mapping[str, StoredTensor], shard: Path, target: Path) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for key, tensor in tensors.items():
        length = tensor.end - tensor.begin
        header[key] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [offset, offset + length]}
        offset += length
    text = json.dumps(header).encode("utf-8")
    text += b" " * (-len(text) % 8)  # the format wants the data aligned
    with shard.open("rb") as source, target.open("wb") as sink:
        sink.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            source.seek(tensor.begin)
            remaining = tensor.end - tensor.begin
            while remaining:
                block = source.read(min(_BLOCK, remaining))
                if not block:
                    raise damaged_shard(shard.name, "it ends early")
                sink.write(block)
                remaining -= len(block)


def array_from_tensor(tensor: StoredTensor) -> npt.NDArray[np.generic]:
    """Read one tensor. numpy has no bfloat16: those come back as uint16 with the same bits.

    Raises:
        UnsupportedModelError: another element type than F32, F16, BF16.
    """
    types: dict[str, npt.DTypeLike] = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16}
    if tensor.dtype not in types:
        raise UnsupportedModelError(
            f"the token embedding is stored as {tensor.dtype}.", hint="Supported: F32, F16, BF16."
        )
    count = int(np.prod(tensor.shape))
    flat = np.fromfile(tensor.shard, dtype=types[tensor.dtype], count=count, offset=tensor.begin)
    if flat.size != count:
        raise damaged_shard(tensor.shard.name, "it ends early")
    return flat.reshape(tensor.shape)


def check_head_width(tensors: Mapping[str, StoredTensor], vocab_size: int) -> None:
    """Refuse a model in which another Linear is as wide as the vocabulary.

    Raises:
        UnsupportedModelError: names the tensor.
    """
    for key, tensor in tensors.items():
        if key not in (EMBEDDING, HEAD) and len(tensor.shape) == 2 and tensor.shape[0] == vocab_size:
            raise mistaken_head(key, vocab_size)


def mistaken_head(name: str, vocab_size: int) -> UnsupportedModelError:
    """The refusal of a model whose Linear `name` has as many outputs as the vocabulary has tokens.

    ONNX Runtime GenAI's builder takes any such Linear for the language model's head and builds, without a word, a graph
    whose logits come out of an early layer. Seen with onnxruntime-genai 0.18.
    """
    return UnsupportedModelError(
        f"'{name}' is as wide as the vocabulary ({vocab_size}): ONNX Runtime GenAI's builder would take it for the "
        "language model's head.",
        hint=NO_DECODER,
    )
