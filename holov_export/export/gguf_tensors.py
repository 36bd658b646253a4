"""The tensors of a language model as a GGUF file stores them: names, order of rows, element types, bytes.

They are read, converted and handed over some rows at a time, so that a model of any size needs little memory.

Source of names, shapes and types: ggml-org/llama.cpp src/models/llama.cpp, src/models/ernie4-5.cpp and
conversion/llama.py at 0c1e570.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from holov_export.errors import CheckpointError, UnsupportedModelError
from holov_export.export.decoder_weights import EMBEDDING, HEAD, StoredTensor, array_from_tensor
from holov_export.extras import require
from holov_export.tensors import FloatArray

#: float32 values of a block that is converted at once; 64 MB
_BLOCK = 1 << 24
_STORED = {"F32": 4, "F16": 2, "BF16": 2}
#: element type -> (values, bytes) of its blocks
#: Source: ggml-org/llama.cpp ggml/src/ggml-common.h at 0c1e570 (QK8_0)
BLOCKS = {"F32": (1, 4), "F16": (1, 2), "BF16": (1, 2), "Q8_0": (32, 34)}
ROPE_FACTORS = "rope_freqs.weight"


@dataclass(frozen=True)
class LanguageShape:
    """Sizes of a language model, as its tensors must have them.

    Attributes:
        pairs: rotary angles turn neighbouring numbers (llama.cpp's LLaMA) and not the halves of a head (transformers).
    """

    width: int
    layers: int
    heads: int
    kv_heads: int
    head_width: int
    mlp_width: int
    vocab_size: int
    pairs: bool


@dataclass(frozen=True)
class GgufTensor:
    """One tensor of the file.

    Attributes:
        key: the name that LlamaForCausalLM gives to it.
        name, kind: GGUF's name, and its name of the element type.
        source: where it lies in the checkpoint.
        heads: of a tensor whose rows are put into another order within each of so many heads; 0 for none.
    """

    key: str
    name: str
    kind: str
    source: StoredTensor
    heads: int = 0

    @property
    def bytes(self) -> int:
        values, size = BLOCKS[self.kind]
        return math.prod(self.source.shape) // values * size


def gguf_tensors(tensors: Mapping[str, StoredTensor], shape: LanguageShape, arch: str, kind: str) -> list[GgufTensor]:
    """What the file holds, in the order of the checkpoint's layers.

    Args:
        tensors: see `decoder_weights.language_tensors`.
        shape: of the language model.
        arch: GGUF's name of the architecture, a value of `decoder_gguf.ARCHITECTURES`.
        kind: element type of the matrices, a key of `BLOCKS`. Vectors are float32; so llama.cpp wants them.

    Raises:
        CheckpointError: a tensor is missing or of another shape than the configuration says.
        UnsupportedModelError: one that llama.cpp's architecture does not have, or another element type than F32, F16,
            BF16.
    """
    gguf = require("gguf")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[arch.upper()], shape.layers)
    expected = _expected_shapes(shape)
    missing = sorted(key for key in expected if key not in tensors and not _optional(key))
    if missing:
        raise CheckpointError(f"the language model lacks '{missing[0]}'.", hint="Download the checkpoint again.")
    found = []
    for key, tensor in sorted(tensors.items(), key=lambda item: _order(item[0])):
        name = names.get_name(key, try_suffixes=(".weight", ".bias"))
        if key not in expected or name is None:
            raise UnsupportedModelError(f"the language model has a tensor '{key}', llama.cpp's '{arch}' has none.")
        if tensor.shape != expected[key]:
            raise CheckpointError(f"'{key}' has the shape {tensor.shape}, config.json says {expected[key]}.")
        if tensor.dtype not in _STORED:
            raise UnsupportedModelError(f"'{key}' is stored as {tensor.dtype}.", hint="Supported: F32, F16, BF16.")
        found.append(GgufTensor(key, name, _kind(tensor, kind), tensor, _heads(key, shape)))
    return found


def _expected_shapes(shape: LanguageShape) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor that such a language model can have, under LlamaForCausalLM's names."""
    width, mlp = shape.width, shape.mlp_width
    queries, keys = shape.heads * shape.head_width, shape.kv_heads * shape.head_width
    linears = {
        "self_attn.q_proj": (queries, width),
        "self_attn.k_proj": (keys, width),
        "self_attn.v_proj": (keys, width),
        "self_attn.o_proj": (width, queries),
        "mlp.gate_proj": (mlp, width),
        "mlp.up_proj": (mlp, width),
        "mlp.down_proj": (width, mlp),
    }
    expected: dict[str, tuple[int, ...]] = {EMBEDDING: (shape.vocab_size, width), HEAD: (shape.vocab_size, width)}
    expected["model.norm.weight"] = (width,)
    for layer in range(shape.layers):
        before = f"model.layers.{layer}."
        for norm in ("input_layernorm", "post_attention_layernorm"):
            expected[f"{before}{norm}.weight"] = (width,)
        for linear, size in linears.items():
            expected[f"{before}{linear}.weight"] = size
            # the graph for Qwen reads those of queries, keys and values only
            if shape.pairs or linear in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"):
                expected[f"{before}{linear}.bias"] = size[:1]
    return expected


def _optional(key: str) -> bool:
    """Biases, and a head of its own: without one the embedding table is the head."""
    return key == HEAD or key.endswith(".bias")


def _order(key: str) -> tuple[int, str]:
    parts = key.split(".")
    return (int(parts[2]) if parts[:2] == ["model", "layers"] else -1, key)


def _kind(tensor: StoredTensor, kind: str) -> str:
    if len(tensor.shape) == 1:
        return "F32"
    return kind if tensor.shape[-1] % BLOCKS[kind][0] == 0 else "F16"  # llama.cpp's quantizer falls back to it as well


def _heads(key: str, shape: LanguageShape) -> int:
    if shape.pairs and ".self_attn.q_proj." in key:
        return shape.heads
    return shape.kv_heads if shape.pairs and ".self_attn.k_proj." in key else 0


def data_from_tensor(tensor: GgufTensor) -> Iterator[npt.NDArray[np.generic]]:
    """The tensor's data as it goes into the file, some rows at a time.

    Raises:
        CheckpointError: the shard ends early.
        UnsupportedModelError: a value that the element type cannot hold.
    """
    for part in _parts(tensor):
        stored = array_from_tensor(part)
        if part.dtype == tensor.kind == "BF16":
            yield stored
            continue
        values = stored.astype(np.uint32) << 16 if part.dtype == "BF16" else stored
        floats: FloatArray = values.view(np.float32) if part.dtype == "BF16" else values.astype(np.float32)
        if tensor.heads:
            floats = as_pairs(floats, tensor.heads)
        yield _converted(floats, tensor)


def _parts(tensor: GgufTensor) -> Iterator[StoredTensor]:
    """The tensor in the checkpoint in blocks of rows; whole where its rows change places."""
    source = tensor.source
    row = math.prod(source.shape[1:])
    rows = source.shape[0] if tensor.heads or len(source.shape) == 1 else max(1, _BLOCK // row)
    size = _STORED[source.dtype] * row
    for first in range(0, source.shape[0], rows):
        last = min(first + rows, source.shape[0])
        begin, end = source.begin + first * size, source.begin + last * size
        yield replace(source, shape=(last - first, *source.shape[1:]), begin=begin, end=end)


def as_pairs(values: FloatArray, heads: int) -> FloatArray:
    """Rows [heads * 2 * half, ...] with the two numbers of each rotary pair next to each other."""
    split = values.reshape(heads, 2, len(values) // heads // 2, *values.shape[1:])
    return split.swapaxes(1, 2).reshape(values.shape)


def _converted(values: FloatArray, tensor: GgufTensor) -> npt.NDArray[np.generic]:
    """float32 values in the tensor's element type."""
    if tensor.kind == "F32":
        return np.ascontiguousarray(values)
    if tensor.kind == "F16":
        with np.errstate(over="ignore"):
            halves = values.astype(np.float16)
        if not np.isfinite(halves).all():
            raise UnsupportedModelError(
                f"'{tensor.key}' has values that float16 cannot hold.", hint="Choose the weights bf16 or f32."
            )
        return halves
    gguf = require("gguf")
    quantized: npt.NDArray[np.generic] = gguf.quants.quantize(values, gguf.GGMLQuantizationType[tensor.kind])
    return quantized


def rope_factors(rope: Mapping[str, Any], head_width: int) -> npt.NDArray[np.float32] | None:
    """float32 [head_width / 2]: what llama.cpp divides each rotary frequency by; None where it divides none.

    Llama 3 slows its low frequencies down by a factor, leaves its high ones, and blends between.

    Source: transformers 5.23 modeling_rope_utils.py, _compute_llama3_parameters.
    """
    if rope["rope_type"] != "llama3":
        return None
    frequencies = 1.0 / rope["rope_theta"] ** (np.arange(0, head_width, 2, dtype=np.float64) / head_width)
    turns = frequencies * rope["original_max_position_embeddings"] / (2 * math.pi)
    low, high, factor = rope["low_freq_factor"], rope["high_freq_factor"], rope["factor"]
    blend = np.clip((turns - low) / (high - low), 0.0, 1.0)
    factors: npt.NDArray[np.float32] = (1.0 / ((1 - blend) / factor + blend)).astype(np.float32)
    return factors
