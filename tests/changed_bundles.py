"""Copies of exported bundles whose vision graph computes something else: what a bad quantisation would do."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper

from holov_export.bundle import MANIFEST, Bundle, artifacts_in, open_bundle, write_manifest
from holov_export.quantize.summary import QuantizedSummary
from holov_export.spec import ExportPlan, Quantization, QuantizedType

INT8 = Quantization(type=QuantizedType.INT8, recipe="smoke-8", recipe_sha256="0" * 64, algorithm="minmax")
WRITTEN = QuantizedSummary(
    quantized=("a", "b"),
    deciding=("c",),
    kept=("d",),
    opset=19,
    files=("vision.onnx",),
    bytes_before=2_000_000,
    bytes_after=500_000,
)
Change = Callable[[str, np.ndarray], np.ndarray]


def changed(bundle: Bundle, folder: Path, change: Change, **plan: object) -> Bundle:
    """A copy whose float matrices and biases are what `change` makes of them, and whose plan says so."""
    shutil.copytree(bundle.folder, folder)
    model = onnx.load(str(folder / bundle.graph))
    for item in model.graph.initializer:
        if item.data_type == onnx.TensorProto.FLOAT and "." in item.name:
            item.CopyFrom(numpy_helper.from_array(change(item.name, numpy_helper.to_array(item)), item.name))
    onnx.save(model, str(folder / bundle.graph))
    (folder / bundle.weights).unlink(missing_ok=True)
    return with_plan(Bundle(folder, bundle.manifest), **plan)


def with_plan(bundle: Bundle, **plan: object) -> Bundle:
    """The bundle, in its place, with another plan in its manifest."""
    (bundle.folder / MANIFEST).unlink()
    made = ExportPlan.model_validate({**dict(bundle.manifest.plan), **plan})
    artifacts = artifacts_in(bundle.folder)
    write_manifest(bundle.folder, bundle.manifest.model_copy(update={"plan": made, "artifacts": artifacts}))
    return open_bundle(bundle.folder)


def noise(share: float) -> Change:
    """Adds seeded noise of so much of each matrix's standard deviation."""
    dice = np.random.default_rng(0)

    def change(name: str, values: np.ndarray) -> np.ndarray:
        if values.ndim != 2:
            return values
        return (values + dice.standard_normal(values.shape) * values.std() * share).astype(values.dtype)

    return change


def spoiled_rows(name: str, values: np.ndarray) -> np.ndarray:
    """NaN in the last matrix: every row is spoiled, and what is kept stays the same."""
    return np.full_like(values, np.nan) if name.endswith("projector.linear_2.weight") else values
