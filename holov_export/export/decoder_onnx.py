"""The decoder of a bundle, built from a checkpoint's language model by ONNX Runtime GenAI's builder.

    decoder/  genai_config.json  model.onnx(.data)  embedding.onnx(.data)  vision.onnx  tokenizer files

GenAI takes raw embeddings only from its vision-language pipeline, so the folder declares itself "phi3v" (the one with
one-dimensional RoPE and a run-time count of image rows). Its vision graph is a cast: the rows come from our graph.

Where positions are three numbers (Qwen2.5-VL) the folder has no genai_config.json: GenAI would work them out of the
picture's grid, which is wrong for pruned tokens. Plain ONNX Runtime runs these (`runtime/decoder_ort.py`), and their
graph computes the logits of the last token only.

Precisions, as seen with onnxruntime-genai 0.18 and onnxruntime 1.31 on a CPU: fp32 and int4 run. The builder's own fp16
graph for the CPU fails in a Cast while running, but its fp16 graph for CUDA runs on the CPU as well, so that one is
written for both. A bf16 graph has no CPU kernels. `PRECISIONS_OF_PROVIDER` says so; another pair is refused.
How int4 is rounded, `decoder_int4` says. Keys and values in int8 run on the CPU with all three.
"""

from __future__ import annotations

import errno
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from holov_export.errors import CheckFailedError, CheckpointError, EnvironmentFaultError, UsageError
from holov_export.export.decoder_int4 import builder_options, check_stored_int4, int4_settings, quantization_of
from holov_export.export.decoder_language import (
    check_language_model,
    check_placeholder,
    model_config,
    write_checkpoint,
)
from holov_export.export.decoder_weights import (
    EMBEDDING,
    StoredTensor,
    array_from_tensor,
    check_head_width,
    language_tensors,
)
from holov_export.extras import require
from holov_export.spec import DecoderPrecision, DecoderSpec, Int4Settings

__all__ = ["check_language_model", "check_precision", "decoder_from_checkpoint", "int4_settings"]

EMBEDDING_GRAPH = "embedding.onnx"
VISION_GRAPH = "vision.onnx"
CONFIG = "genai_config.json"
#: larger embedding tables go into a file beside the graph; protobuf ends at 2 GB
EXTERNAL_BYTES = 64 << 20
#: the first onnxruntime-genai whose builder has 8-bit keys and values
_CACHE_VERSION = (0, 16)
PRECISIONS_OF_PROVIDER = {
    "cpu": (DecoderPrecision.FP32, DecoderPrecision.FP16, DecoderPrecision.INT4),
    "cuda": tuple(DecoderPrecision),
}


def decoder_from_checkpoint(
    folder: Path,
    out: Path,
    spec: DecoderSpec,
    precision: DecoderPrecision,
    provider: str = "cpu",
    *,
    int4: Int4Settings | None = None,
    cache_scales: Path | None = None,
) -> None:
    """Fill `out` with the decoder of the checkpoint in `folder`.

    Args:
        folder: a checkpoint directory.
        out: the decoder folder; created if missing.
        spec: of the language model.
        precision: of the decoder's weights.
        provider: "cpu" or "cuda", what the graph is optimised for; a runtime may choose another.
        int4: how an int4 decoder is rounded; None for the usual way, or as a checkpoint in 4 bits is.
        cache_scales: the builder's file with a scale for each channel of keys and values, which are then stored in
            int8; None stores them in the type of the activations.

    Raises:
        UsageError: a precision that cannot run on the provider, or that a checkpoint in 4 bits cannot have.
        CheckpointError: the checkpoint lacks the language model or is damaged.
        UnsupportedModelError: another architecture, or one that the builder would get wrong.
        EnvironmentFaultError: this onnxruntime-genai is too old for the rounding, or for 8-bit keys and values.
        CheckFailedError: the builder failed; the message ends with the last lines of its output.
        OSError: the disk is full.
    """
    check_precision(precision, provider)
    settings = int4_settings(folder, precision, int4)
    rounding = () if settings is None else builder_options(settings, _genai_version())
    stored = () if cache_scales is None else cache_options(cache_scales, _genai_version())
    tensors = language_tensors(folder)
    _check_sizes(tensors, spec)
    if settings is not None:
        check_stored_int4(tensors, settings)
    out = out.resolve()  # the builder runs in another folder
    out.mkdir(parents=True, exist_ok=True)
    # beside the bundle and not in /tmp: a 7 B model needs 13 GB here, and /tmp is often memory
    with tempfile.TemporaryDirectory(prefix=".language-model-", dir=out.parent) as work:
        source = Path(work) / "checkpoint"
        write_checkpoint(folder, source, tensors, quantization_of(model_config(folder)))
        options = ("exclude_embeds=true", *rounding, *stored)
        if spec.mrope_sections:  # the logits of the last token alone: those of 2000 tokens would take 1.2 GB
            options += ("prune_lm_head=true",)
        _run_builder(source, out, precision, provider, options)
    if cache_scales is not None:
        _check_cache(out)
    dtype = _embeds_dtype(out)
    _write_vision_graph(out / VISION_GRAPH, spec.width, dtype)
    _write_embedding_graph(out / EMBEDDING_GRAPH, tensors[EMBEDDING], spec.image_token_id, dtype)
    if spec.mrope_sections:
        (out / CONFIG).unlink()
    else:
        _patch_config(out / CONFIG, spec, provider)


def check_precision(precision: DecoderPrecision, provider: str) -> None:
    """Refuse a pair that ONNX Runtime cannot run.

    Raises:
        UsageError: names the precisions of the provider.
    """
    if provider not in PRECISIONS_OF_PROVIDER:
        raise UsageError(f"unknown provider '{provider}'.", hint=f"Known: {', '.join(PRECISIONS_OF_PROVIDER)}.")
    possible = PRECISIONS_OF_PROVIDER[provider]
    if precision not in possible:
        raise UsageError(
            f"the embedded decoder cannot be {precision.value} on {provider}: ONNX Runtime has no kernels for it.",
            hint=f"Choose one of {', '.join(item.value for item in possible)}, or --decoder-provider cuda.",
        )


def cache_options(scales: Path, version: str) -> tuple[str, ...]:
    """`--extra_options` of GenAI's builder for 8-bit keys and values.

    Args:
        scales: see `decoder_from_checkpoint`. version: of onnxruntime-genai.

    Raises:
        EnvironmentFaultError: it is too old, and would leave them as they are without a word.
    """
    check_cache_version(version)
    return "kv_cache_quant_scheme=int8_per_channel", f"kv_cache_scale_file={scales.resolve()}"


def check_cache_version(version: str) -> None:
    """Refuse an onnxruntime-genai whose builder has no 8-bit keys and values.

    Raises:
        EnvironmentFaultError: with the version that has.
    """
    number = tuple(int(part) for part in re.findall(r"\d+", version)[:2])
    if number < _CACHE_VERSION:
        raise EnvironmentFaultError(
            f"onnxruntime-genai {version} builds no decoder with 8-bit keys and values.",
            hint=f"It takes {'.'.join(map(str, _CACHE_VERSION))} or newer. "
            "Run: pip install --upgrade onnxruntime-genai onnxruntime",
        )


def _check_cache(out: Path) -> None:
    """Every key and value that the graph takes must be int8.

    Raises:
        CheckFailedError: the builder wrote another type.
    """
    onnx = require("onnx")
    model = onnx.load(str(out / "model.onnx"), load_external_data=False)
    caches = [value for value in model.graph.input if value.name.startswith("past_key_values.")]
    others = [value.name for value in caches if value.type.tensor_type.elem_type != onnx.TensorProto.INT8]
    if not caches or others:
        raise CheckFailedError(
            "ONNX Runtime GenAI's builder was asked for 8-bit keys and values and wrote others"
            f"{': ' + others[0] if others else ''}."
        )


def _check_sizes(tensors: dict[str, StoredTensor], spec: DecoderSpec) -> None:
    vocab_size, width = tensors[EMBEDDING].shape
    if width != spec.width:
        raise CheckpointError(f"the token embedding is {width} wide, the model's specification says {spec.width}.")
    check_placeholder(spec, vocab_size)
    check_head_width(tensors, vocab_size)


def _genai_version() -> str:
    """Of onnxruntime-genai or onnxruntime-genai-cuda, whichever is installed."""
    return str(require("onnxruntime_genai").__version__)


def _run_builder(source: Path, out: Path, precision: DecoderPrecision, provider: str, options: Sequence[str]) -> None:
    """Run ONNX Runtime GenAI's model builder in a process of its own: it prints, and it holds the whole model.

    Source of the options: onnxruntime_genai 0.18 models/builder.py.
    """
    require("onnxruntime_genai")
    line = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", str(source), "-o", str(out)]
    flavour = "cuda" if precision is DecoderPrecision.FP16 else provider  # see the module's docstring
    line += ["-p", precision.value, "-e", flavour, "-c", str(source.parent / "cache"), "--extra_options", *options]
    offline = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    run = subprocess.run(
        line, cwd=source.parent, env=offline, capture_output=True, text=True, errors="replace", check=False
    )
    if run.returncode != 0 or not (out / "model.onnx").is_file():
        lines = [part for part in (run.stdout + run.stderr).splitlines() if part.strip()]
        if any(os.strerror(errno.ENOSPC) in line for line in lines):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        tail = "\n".join(lines[-12:])
        raise CheckFailedError(
            f"ONNX Runtime GenAI's builder failed (exit status {run.returncode}). It ended with:\n{tail}\n"
        )


def _embeds_dtype(out: Path) -> int:
    """onnx's number of the element type that the decoder's `inputs_embeds` has."""
    onnx = require("onnx")
    model = onnx.load(str(out / "model.onnx"), load_external_data=False)
    for value in model.graph.input:
        if value.name == "inputs_embeds":
            return int(value.type.tensor_type.elem_type)
    raise CheckFailedError("ONNX Runtime GenAI's builder wrote a decoder without the input 'inputs_embeds'.")


def _write_vision_graph(path: Path, width: int, dtype: int) -> None:
    """`pixel_values` float32 [rows, D] -> `image_features` in the decoder's type: the rows are made elsewhere."""
    onnx = require("onnx")
    helper, float32 = onnx.helper, onnx.TensorProto.FLOAT
    shape = ["num_image_tokens", width]
    graph = helper.make_graph(
        [helper.make_node("Cast", ["pixel_values"], ["image_features"], to=dtype)],
        "rows",
        [helper.make_tensor_value_info("pixel_values", float32, shape)],
        [helper.make_tensor_value_info("image_features", dtype, shape)],
    )
    _save(path, graph)


def _write_embedding_graph(path: Path, table: StoredTensor, image_token_id: int, dtype: int) -> None:
    """`input_ids`, `image_features` -> `inputs_embeds`: the rows take the places of the placeholders, in order.

    The Slice matters while decoding: there are no rows then, and without it a model that itself produces the
    placeholder would end in an error of ScatterND.
    """
    onnx = require("onnx")
    helper = onnx.helper
    values, stored = _stored_table(table, dtype)
    nodes = [
        helper.make_node("Gather", ["embed", "input_ids"], ["words_stored"]),
        helper.make_node("Cast", ["words_stored"], ["words"], to=dtype),
        helper.make_node("Equal", ["input_ids", "placeholder"], ["is_image"]),
        helper.make_node("NonZero", ["is_image"], ["places_2d"]),
        helper.make_node("Transpose", ["places_2d"], ["all_places"], perm=[1, 0]),
        helper.make_node("Shape", ["image_features"], ["rows"], start=0, end=1),
        helper.make_node("Slice", ["all_places", "zero", "rows"], ["places"]),
        helper.make_node("ScatterND", ["words", "places", "image_features"], ["inputs_embeds"]),
    ]
    width = table.shape[1]
    graph = helper.make_graph(
        nodes,
        "embedding",
        [
            helper.make_tensor_value_info("input_ids", onnx.TensorProto.INT64, ["batch_size", "sequence_length"]),
            helper.make_tensor_value_info("image_features", dtype, ["num_image_tokens", width]),
        ],
        [helper.make_tensor_value_info("inputs_embeds", dtype, ["batch_size", "sequence_length", width])],
        initializer=[
            _table_tensor(path, values, stored),
            helper.make_tensor("placeholder", onnx.TensorProto.INT64, [], [image_token_id]),
            helper.make_tensor("zero", onnx.TensorProto.INT64, [1], [0]),
        ],
    )
    _save(path, graph)


def _stored_table(table: StoredTensor, dtype: int) -> tuple[npt.NDArray[np.generic], int]:
    """The embedding table and onnx's number of the type it is stored in.

    A table of 16 bits stays as it is, also before a float32 decoder: the Cast after Gather is exact and the file is
    half as large (262 instead of 525 MB for LLaVA-1.5-7B). Only a float32 table is narrowed, to the decoder's float16.
    """
    onnx = require("onnx")
    types = {"F32": onnx.TensorProto.FLOAT, "F16": onnx.TensorProto.FLOAT16, "BF16": onnx.TensorProto.BFLOAT16}
    values = array_from_tensor(table)
    if table.dtype == "F32" and dtype == onnx.TensorProto.FLOAT16:
        return values.astype(np.float16), onnx.TensorProto.FLOAT16
    return values, types[table.dtype]


def _table_tensor(path: Path, values: npt.NDArray[np.generic], dtype: int) -> Any:
    """The initializer "embed": in the graph, or in a file beside it when it is large."""
    onnx = require("onnx")
    if values.nbytes <= EXTERNAL_BYTES:
        return onnx.helper.make_tensor("embed", dtype, list(values.shape), values.tobytes(), raw=True)
    data = path.with_name(f"{path.name}.data")
    values.tofile(data)
    tensor = onnx.TensorProto(name="embed", data_type=dtype, dims=values.shape)
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, value in (("location", data.name), ("offset", "0"), ("length", str(values.nbytes))):
        tensor.external_data.add(key=key, value=value)
    return tensor


def _save(path: Path, graph: Any) -> None:
    onnx = require("onnx")
    opset = onnx.helper.make_opsetid("", 17)
    model = onnx.helper.make_model(graph, opset_imports=[opset], ir_version=9, producer_name="holov-export")
    onnx.save(model, str(path))
    onnx.checker.check_model(str(path))


def _patch_config(path: Path, spec: DecoderSpec, provider: str) -> None:
    """Declare the vision-language pipeline and the model's own special tokens."""
    config = json.loads(path.read_text(encoding="utf-8"))
    model = config["model"]
    if provider == "cpu":
        model["decoder"]["session_options"]["provider_options"] = []
    model["type"] = "phi3v"
    model["context_length"] = spec.context
    model["vision"] = {
        "filename": VISION_GRAPH,
        "inputs": {"pixel_values": "pixel_values"},
        "outputs": {"image_features": "image_features"},
    }
    model["embedding"] = {
        "filename": EMBEDDING_GRAPH,
        "inputs": {"input_ids": "input_ids", "image_features": "image_features"},
        "outputs": {"inputs_embeds": "inputs_embeds"},
    }
    if spec.eos_token_ids:
        model["eos_token_id"] = list(spec.eos_token_ids)
    if spec.bos_token_id is not None:
        model["bos_token_id"] = spec.bos_token_id
    if spec.pad_token_id is not None:
        model["pad_token_id"] = spec.pad_token_id
    config["search"]["max_length"] = spec.context
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
