"""Recipes, pictures on disk, and bundles of tiny graphs whose activations numpy can compute."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper
from PIL import Image
from toys import toy_graph, toy_signature, toy_weights

from holov_export.bundle import (
    SCHEMA,
    VISION,
    Bundle,
    Manifest,
    artifacts_in,
    graph_tensors,
    open_bundle,
    provenance,
    write_manifest,
)
from holov_export.policies import HolovPolicy
from holov_export.recipes import NamedPicture, PictureFile, Recipe
from holov_export.spec import CheckpointSource, ExportPlan, ModelSpec, Precision
from holov_export.storage import sha256_of


def recipe_of(**changes: Any) -> Recipe:
    """A recipe whose pictures the tests bring themselves."""
    seen, other = (PictureFile(file=f"{name}.png", licence="CC0") for name in ("seen", "other"))
    base = Recipe(name="mine", title="of a test", source="files", calibrate=(seen,), judge=(other,))
    return base.model_copy(update=changes)


def named(folder: Path, images: Sequence[Image.Image]) -> tuple[NamedPicture, ...]:
    """The images as files of a folder, "0.png" and so on."""
    folder.mkdir(parents=True, exist_ok=True)
    for index, image in enumerate(images):
        image.save(folder / f"{index}.png")
    paths = [folder / f"{index}.png" for index in range(len(images))]
    return tuple(NamedPicture(path.name, sha256_of(path), path) for path in paths)


def grey(value: int) -> Image.Image:
    return Image.new("RGB", (32, 32), (value, value, value))


def watched_toy(
    folder: Path, model: ModelSpec, *, first: tuple[str, ...] = (), missing: int = 0, precision: Precision | None = None
) -> Bundle:
    """A bundle of the toy graph (`toys.toy_graph`) with a second product behind its selection.

    The activations are "patches" (in front of the selection) and "kept" (behind it, [B, K, D]).

    Args:
        first: operators that the patches go through before the first product; the activation is then "patches_1" ...
        missing: so many rows fewer than asked for are real, at least one.
    """
    precision = precision or Precision.FP32
    graph = toy_graph(model, precision.dtype)
    nodes = {node.output[0]: node for node in graph.graph.node}
    name = "patches"
    at = list(graph.graph.node).index(nodes["features"])
    for number, operator in enumerate(first, start=1):
        inputs = [name, "nothing"] if operator == "Mul" else [name]
        graph.graph.node.insert(at, helper.make_node(operator, inputs, [f"patches_{number}"]))
        name, at = f"patches_{number}", at + 1
    nodes["features"].input[0] = name
    dtype = np.dtype(precision.dtype)
    second = np.eye(toy_weights(model).shape[1], dtype=dtype) * dtype.type(2)
    graph.graph.initializer.extend(
        [
            numpy_helper.from_array(second, "second"),
            numpy_helper.from_array(np.array(0, dtype), "nothing"),
            numpy_helper.from_array(np.array([missing], np.int64), "missing"),
        ]
    )
    nodes["visual_tokens"].input[0] = "doubled"
    graph.graph.node.insert(0, helper.make_node("Sub", ["quota", "missing"], ["fewer"]))
    graph.graph.node.insert(1, helper.make_node("Max", ["fewer", "one"], ["real"]))
    nodes["wanted"].input[0] = nodes["counts"].input[0] = "real"
    last = list(graph.graph.node).index(nodes["visual_tokens"])
    graph.graph.node.insert(last, helper.make_node("MatMul", ["kept", "second"], ["doubled"], name="second/MatMul"))
    return bundle_of(folder, graph, model, precision)


def bundle_of(folder: Path, graph: onnx.ModelProto, model: ModelSpec, precision: Precision) -> Bundle:
    """A bundle without anything but a vision graph."""
    folder.mkdir(parents=True)
    onnx.save(graph, str(folder / VISION))
    plan = ExportPlan(
        model=model,
        source=CheckpointSource(kind="local", name="tiny"),
        policy=HolovPolicy(),
        precision=precision,
        decoder=None,
    )
    inputs, outputs = (graph_tensors(side) for side in toy_signature(model, precision.dtype))
    manifest = Manifest(
        schema_version=SCHEMA,
        plan=plan,
        inputs=inputs,
        outputs=outputs,
        artifacts=artifacts_in(folder),
        provenance=provenance("test", {}),
    )
    write_manifest(folder, manifest)
    return open_bundle(folder)
