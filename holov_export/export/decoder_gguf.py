"""A checkpoint's language model as a GGUF file for llama.cpp, beside a bundle's manifest.

    decoders/llamacpp/  decoder.json  language.gguf

The file has no tokenizer: a bundle brings its own, and only the number of words is written. Weights of 4 bits are made
by llama.cpp's own quantizer out of a file of 16 bits, which needs as much disk again while it works.

LLaMA, Mistral and Qwen2.5-VL's language model are known; of the scaled rotary angles the types of `_SCALED`. Whatever
llama.cpp would compute in another way than transformers is refused.
"""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from holov_export.decoder_files import (
    DecoderFolder,
    DecoderRecord,
    atomic_decoder_folder,
    files_in,
    write_record,
)
from holov_export.errors import CheckFailedError, CheckpointError, UnknownNameError, UnsupportedModelError
from holov_export.export.decoder_int4 import refuse_quantized
from holov_export.export.decoder_language import model_config
from holov_export.export.decoder_weights import StoredTensor, language_tensors
from holov_export.export.gguf_tensors import (
    ROPE_FACTORS,
    GgufTensor,
    LanguageShape,
    data_from_tensor,
    gguf_tensors,
    rope_factors,
)
from holov_export.extras import require
from holov_export.spec import DecoderSpec, ModelSpec

FILE = "language.gguf"
#: how weights can be stored -> llama.cpp's number of it
#: Source: ggml-org/llama.cpp include/llama.h at 0c1e570 (enum llama_ftype)
WEIGHTS = {"f32": 0, "f16": 1, "bf16": 32, "q8_0": 7, "q4_0": 2, "q4_k_m": 15}
#: those that llama.cpp's quantizer makes
QUANTIZED = ("q4_0", "q4_k_m")
#: GGUF's name of each language model, by transformers' `model_type`. Qwen's is stored under the name of PaddleOCR's,
#: whose graph is the same: llama.cpp 0c1e570 does not read the epsilon of "qwen2vl" and norms with 0 instead, which
#: moved logits by 5e-3 and changed tokens.
ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2_5_vl_text": "paddleocr"}
#: rotary angles: type -> what its settings may be, beside rope_theta and mrope_section
_SCALED = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor", "original_max_position_embeddings", "beta_fast", "beta_slow"),
}
_OTHERWISE = "Choose another decoder: holov-export ask --decoder ort or hf."
_ALIGNMENT = 32
_FULL = 64 << 20
Tell = Callable[[str], None]


def gguf_from_checkpoint(
    checkpoint: Path, model: ModelSpec, folder: Path, weights: str, *, tell: Tell = lambda message: None
) -> DecoderFolder:
    """Write the decoder; one that is there already is replaced when the new one is whole.

    Args:
        checkpoint: a directory in safetensors.
        model: of the bundle.
        folder: of the decoder: `decoder_folder(bundle, "llamacpp")`.
        weights: one of `WEIGHTS`.
        tell: is told what is done.

    Raises:
        UnknownNameError: other weights.
        MissingExtraError: the package gguf is missing, or for weights of 4 bits llama-cpp-python.
        CheckpointError: the checkpoint is damaged or of another model.
        UnsupportedModelError: llama.cpp would run the language model in another way, or not at all.
        CheckFailedError: the quantizer failed; the message ends with what it said.
        StorageError: the disk is full, or the folder cannot be written.
    """
    if weights not in WEIGHTS:
        raise UnknownNameError(f"unknown weights '{weights}'.", hint=f"Known: {', '.join(WEIGHTS)}.")
    tool = f"gguf {version_of('gguf')}"
    if weights in QUANTIZED:
        tool += f", llama-cpp-python {version_of('llama_cpp')}"
    tensors = language_tensors(checkpoint)
    config = checked_config(checkpoint, model.decoder)
    shape = shape_of(config, model.decoder)
    kind = _source_kind(tensors) if weights in QUANTIZED else weights.upper()
    planned = gguf_tensors(tensors, shape, ARCHITECTURES[config.model_type], kind)
    with atomic_decoder_folder(folder) as work:
        whole = work / (f"language-{kind}.gguf" if weights in QUANTIZED else FILE)
        tell(f"writing {len(planned)} tensors as {kind}")
        _write_gguf(whole, planned, config, model, WEIGHTS[kind.lower()])
        commands: tuple[tuple[str, ...], ...] = ()
        if weights in QUANTIZED:
            tell(f"quantizing to {weights.upper()}")
            commands = (_quantize(whole, work / FILE, weights),)
            whole.unlink()
        tell("hashing")
        record = DecoderRecord(
            kind="llamacpp",
            model=model.name,
            width=shape.width,
            vocab_size=shape.vocab_size,
            weights=weights,
            main=FILE,
            commands=commands,
            files=files_in(work),
            tool=tool,
            created=datetime.now(timezone.utc).replace(microsecond=0).isoformat(),
        )
        write_record(work, record)
    return DecoderFolder(folder, record)


def version_of(module: str) -> str:
    """The version of a package that must be installed.

    Raises:
        MissingExtraError: it is not.
    """
    require(module)
    return version({"llama_cpp": "llama-cpp-python"}.get(module, module))


def checked_config(checkpoint: Path, spec: DecoderSpec) -> Any:
    """transformers' configuration of the language model, if llama.cpp computes what transformers does.

    Args:
        checkpoint: its weights need not be there.
        spec: of the bundle's language model.

    Raises:
        CheckpointError: config.json does not load, or is of another model than the bundle.
        UnsupportedModelError: says what differs.
    """
    whole = model_config(checkpoint)
    refuse_quantized(whole, checkpoint.name, "the writer of GGUF files")
    config = whole.get_text_config()
    if config.model_type not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise UnsupportedModelError(f"the language model is a '{config.model_type}'; known: {known}.", hint=_OTHERWISE)
    window = getattr(config, "sliding_window", None)
    if window is not None and window < config.max_position_embeddings:
        raise UnsupportedModelError(
            f"the language model attends to the last {window} tokens; llama.cpp's graph for it would attend to all.",
            hint=_OTHERWISE,
        )
    if config.hidden_act != "silu":
        raise UnsupportedModelError(f"the activation is '{config.hidden_act}', llama.cpp's is SiLU.", hint=_OTHERWISE)
    heads = config.num_attention_heads, config.num_key_value_heads
    ours = spec.width, spec.layers, (spec.heads, spec.kv_heads), spec.mlp_width
    theirs = config.hidden_size, config.num_hidden_layers, heads, config.intermediate_size
    if ours != theirs:
        raise CheckpointError(
            f"'{checkpoint.name}' is of another model: width, layers, heads and width of the MLP are {theirs}, those "
            f"of the bundle {ours}."
        )
    _check_rope(config.rope_parameters)
    return config


def _check_rope(rope: Mapping[str, Any]) -> None:
    """Refuse rotary angles that GGUF's metadata cannot say, or that llama.cpp reads in another way."""
    kind = rope.get("rope_type", "default")
    if kind not in _SCALED:
        raise UnsupportedModelError(
            f"the rotary angles are scaled by '{kind}'; known: {', '.join(_SCALED)}.", hint=_OTHERWISE
        )
    known = {"rope_type", "type", "rope_theta", "mrope_section", *_SCALED[kind]}
    more = sorted(key for key, value in rope.items() if key not in known and value is not None)
    if rope.get("truncate") is True or rope.get("partial_rotary_factor") == 1.0:  # what is done anyway
        more = [key for key in more if key not in ("truncate", "partial_rotary_factor")]
    if more:
        raise UnsupportedModelError(
            f"the rotary angles have the setting '{more[0]}', which a '{kind}' one of llama.cpp has not.",
            hint=_OTHERWISE,
        )


def shape_of(config: Any, spec: DecoderSpec) -> LanguageShape:
    """Sizes of the language model. `config`: transformers', see `checked_config`."""
    return LanguageShape(
        width=spec.width,
        layers=spec.layers,
        heads=spec.heads,
        kv_heads=spec.kv_heads,
        head_width=spec.head_width,
        mlp_width=spec.mlp_width,
        vocab_size=spec.vocab_size,
        pairs=ARCHITECTURES[config.model_type] == "llama",
    )


def _source_kind(tensors: Mapping[str, StoredTensor]) -> str:
    """What the quantizer is given: bfloat16 where all is stored so, which loses nothing, else float16."""
    return "BF16" if all(tensor.dtype == "BF16" for tensor in tensors.values()) else "F16"


def _write_gguf(path: Path, tensors: Sequence[GgufTensor], config: Any, model: ModelSpec, file_type: int) -> None:
    """Metadata by the package gguf, and behind it the tensors, block by block."""
    gguf = require("gguf")
    factors = rope_factors(config.rope_parameters, model.decoder.head_width)
    writer = gguf.GGUFWriter(None, ARCHITECTURES[config.model_type])
    _add_metadata(writer, config, model, file_type)
    if factors is not None:
        writer.add_tensor_info(ROPE_FACTORS, factors.shape, factors.dtype, factors.nbytes)
    for tensor in tensors:
        kind = gguf.GGMLQuantizationType[tensor.kind]
        writer.add_tensor_info(tensor.name, tensor.source.shape, np.dtype(np.float32), tensor.bytes, raw_dtype=kind)
    try:
        writer.write_header_to_file(path)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
    finally:
        writer.close()
    with path.open("ab") as stream:
        _pad(stream)
        if factors is not None:
            stream.write(factors.tobytes())
            _pad(stream)
        for tensor in tensors:
            begin = stream.tell()
            for block in data_from_tensor(tensor):
                stream.write(np.ascontiguousarray(block).data)
            if stream.tell() - begin != tensor.bytes:
                raise CheckFailedError(f"'{tensor.name}' became {stream.tell() - begin} bytes, not {tensor.bytes}.")
            _pad(stream)


def _pad(stream: Any) -> None:
    """Tensors begin at multiples of 32 bytes."""
    stream.write(bytes(-stream.tell() % _ALIGNMENT))


def _add_metadata(writer: Any, config: Any, model: ModelSpec, file_type: int) -> None:
    """Everything that llama.cpp reads of an architecture.

    Source of the keys: ggml-org/llama.cpp conversion/base.py and conversion/llama.py at 0c1e570.
    """
    gguf, spec = require("gguf"), model.decoder
    writer.add_type("model")
    writer.add_name(model.name)
    writer.add_file_type(file_type)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(spec.vocab_size)
    writer.add_tokenizer_model("no_vocab")
    writer.add_context_length(spec.context)
    writer.add_embedding_length(spec.width)
    writer.add_block_count(spec.layers)
    writer.add_feed_forward_length(spec.mlp_width)
    writer.add_head_count(spec.heads)
    writer.add_head_count_kv(spec.kv_heads)
    writer.add_key_length(spec.head_width)
    writer.add_value_length(spec.head_width)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(spec.head_width)
    rope = config.rope_parameters
    writer.add_rope_freq_base(rope["rope_theta"])
    if spec.mrope_sections:
        writer.add_rope_dimension_sections([*spec.mrope_sections, 0, 0, 0, 0][:4])
    kind = rope.get("rope_type", "default")
    if kind in ("linear", "yarn"):
        scaled = gguf.RopeScalingType.LINEAR if kind == "linear" else gguf.RopeScalingType.YARN
        writer.add_rope_scaling_type(scaled)
        writer.add_rope_scaling_factor(rope["factor"])
    if kind == "yarn":
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        writer.add_rope_scaling_yarn_beta_fast(float(rope.get("beta_fast") or 32))
        writer.add_rope_scaling_yarn_beta_slow(float(rope.get("beta_slow") or 1))


def _quantize(source: Path, target: Path, weights: str) -> tuple[str, ...]:
    """Run llama.cpp's quantizer in a process of its own: it prints, and an assertion of it ends the process.

    Returns:
        the command, without the folders.
    """
    line = ["-m", "holov_export.export.gguf_quantize", str(source), str(target), str(WEIGHTS[weights])]
    run = subprocess.run([sys.executable, *line], capture_output=True, text=True, errors="replace", check=False)
    if run.returncode != 0 or not target.is_file():
        if shutil.disk_usage(target.parent).free < _FULL:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        tail = "\n".join([part for part in (run.stdout + run.stderr).splitlines() if part.strip()][-12:])
        raise CheckFailedError(f"llama.cpp's quantizer failed (exit status {run.returncode}). It ended with:\n{tail}\n")
    return ("python", *line[:2], source.name, target.name, line[-1])
