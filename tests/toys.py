"""Small stand-ins: a vision graph with the true signature that keeps the first tokens, and a decoder that recites."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from holov_export.bundle import (
    DECODER,
    SCHEMA,
    TOKENIZER,
    VISION,
    Bundle,
    GraphTensor,
    Manifest,
    artifacts_in,
    atomic_folder,
    open_bundle,
    provenance,
    write_manifest,
)
from holov_export.policies import HolovPolicy
from holov_export.signature import TensorSpec, vision_signature
from holov_export.spec import CheckpointSource, DecoderPrecision, ExportPlan, ModelSpec, Precision
from holov_export.tensors import SamplingSettings, StitchedPrompt

_TYPES = {
    "float32": TensorProto.FLOAT,
    "float16": TensorProto.FLOAT16,
    "bfloat16": TensorProto.BFLOAT16,
    "int64": TensorProto.INT64,
}


def toy_weights(model: ModelSpec) -> np.ndarray:
    """[patch pixels, D]: the toy graph's projection."""
    pixels = 3 * model.vision.patch_size**2
    return np.random.default_rng(0).standard_normal((pixels, model.decoder.width)).astype(np.float32) * 0.05


def toy_tokens(pixels: np.ndarray, model: ModelSpec) -> np.ndarray:
    """[B, N, D]: what the toy graph computes before it selects."""
    rows, columns = model.vision.grid
    side = model.vision.patch_size
    patches = pixels.reshape(-1, 3, rows, side, columns, side).transpose(0, 2, 4, 1, 3, 5)
    return patches.reshape(len(pixels), rows * columns, 3 * side * side) @ toy_weights(model)


def toy_graph(model: ModelSpec, dtype: str) -> onnx.ModelProto:
    """Project the patches, keep the first `quota` of them."""
    vision = model.vision
    (rows, columns), side, tokens = vision.grid, vision.patch_size, vision.tokens
    weights = toy_weights(model).astype("float16" if dtype == "float16" else "float32")

    def constant(name: str, value: object) -> onnx.TensorProto:
        return numpy_helper.from_array(np.asarray(value), name)

    node = helper.make_node
    nodes = [
        node("Reshape", ["pixel_values", "grid"], ["tiles"]),
        node("Transpose", ["tiles"], ["moved"], perm=[0, 2, 4, 1, 3, 5]),
        node("Reshape", ["moved", "flat"], ["patches"]),
        node("MatMul", ["patches", "weights"], ["features"]),
        node("Max", ["budget", "one"], ["at_least_one"]),
        node("Min", ["at_least_one", "all"], ["k"]),
        node("Slice", ["features", "zero", "k", "one"], ["kept"]),  # the fourth input names the axis
        node("Squeeze", ["k", "zero"], ["k_scalar"]),
        node("Range", ["nought", "k_scalar", "unit"], ["places"]),
        node("Unsqueeze", ["quota", "one"], ["wanted"]),
        node("Less", ["places", "wanted"], ["mask"]),
        node("Where", ["mask", "places", "minus"], ["positions"]),
        node("Unsqueeze", ["mask", "two"], ["mask_3d"]),
        node("Cast", ["mask_3d"], ["mask_float"], to=_TYPES[dtype]),
        node("Mul", ["kept", "mask_float"], ["visual_tokens"]),
        node("Min", ["quota", "k"], ["counts"]),
        node("ReduceL1", ["features", "two"], ["magnitude"], keepdims=0),
        node("Cast", ["magnitude"], ["saliency"], to=TensorProto.FLOAT),
    ]
    initializers = [
        constant("grid", np.array([-1, 3, rows, side, columns, side], np.int64)),
        constant("flat", np.array([-1, tokens, 3 * side * side], np.int64)),
        constant("weights", weights),
        constant("one", np.array([1], np.int64)),
        constant("two", np.array([2], np.int64)),
        constant("zero", np.array([0], np.int64)),
        constant("all", np.array([tokens], np.int64)),
        constant("nought", np.int64(0)),
        constant("unit", np.int64(1)),
        constant("minus", np.int64(-1)),
    ]
    inputs, outputs = toy_signature(model, dtype)
    graph = helper.make_graph(
        nodes, "toy", [_value(item) for item in inputs], [_value(item) for item in outputs], initializers
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


def toy_signature(model: ModelSpec, dtype: str) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    vision = model.vision
    return vision_signature(image_size=vision.image_size, tokens=vision.tokens, width=model.decoder.width, dtype=dtype)


def _value(item: TensorSpec) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(item.name, _TYPES[item.dtype], list(item.shape))


def write_toy_bundle(
    folder: Path,
    model: ModelSpec,
    checkpoint: Path,
    *,
    precision: Precision = Precision.FP32,
    decoder: Path | None = None,
    decoder_precision: DecoderPrecision = DecoderPrecision.FP32,
) -> Bundle:
    """A real bundle around the toy graph; `decoder` is a GenAI folder to copy into it, of that precision."""
    plan = ExportPlan(
        model=model,
        source=CheckpointSource(kind="local", name=checkpoint.name),
        policy=HolovPolicy(),
        precision=precision,
        decoder=decoder_precision if decoder else None,
    )
    with atomic_folder(folder) as work:
        onnx.save(toy_graph(model, precision.dtype), str(work / VISION))
        shutil.copy(checkpoint / TOKENIZER, work / TOKENIZER)
        if decoder is not None:
            shutil.copytree(decoder, work / DECODER)
        inputs, outputs = toy_signature(model, precision.dtype)
        manifest = Manifest(
            schema_version=SCHEMA,
            plan=plan,
            inputs=tuple(GraphTensor(name=item.name, dtype=item.dtype, shape=item.shape) for item in inputs),
            outputs=tuple(GraphTensor(name=item.name, dtype=item.dtype, shape=item.shape) for item in outputs),
            artifacts=artifacts_in(work),
            provenance=provenance("test", {}),
        )
        write_manifest(work, manifest)
    return open_bundle(folder)


class RecitingDecoder:
    """A decoder that gives the same ids to every prompt and remembers what it was asked."""

    name = "reciting"
    lanes = 4

    def __init__(self, ids: list[int]) -> None:
        self.ids = ids
        self.prompts: list[StitchedPrompt] = []
        self.samplings: list[SamplingSettings] = []
        self.given = 0
        self.closed = False

    def stream(self, prompt: StitchedPrompt, sampling: SamplingSettings) -> Iterator[int]:
        self.prompts.append(prompt)
        self.samplings.append(sampling)
        for token in self.ids[: sampling.max_new_tokens]:
            self.given += 1
            yield token

    def close(self) -> None:
        self.closed = True
