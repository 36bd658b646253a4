"""Bundles around graphs that the compile tests have exported, for the tests that build engines from them."""

from __future__ import annotations

import shutil
from pathlib import Path

from holov_export.bundle import (
    SCHEMA,
    Bundle,
    GraphTensor,
    Manifest,
    artifacts_in,
    atomic_folder,
    open_bundle,
    provenance,
    write_manifest,
)
from holov_export.policies import policy_from_settings
from holov_export.signature import vision_signature
from holov_export.spec import OPSETS, CheckpointSource, ExportPlan, ModelSpec, Precision


def bundle_around(graph: Path, folder: Path, model: ModelSpec, precision: Precision, method: str = "holov") -> Bundle:
    """A bundle of the vision graph and weights in the folder `graph`, without a decoder or tokenizer."""
    plan = ExportPlan(
        model=model,
        source=CheckpointSource(kind="local", name="tiny"),
        policy=policy_from_settings(method),
        precision=precision,
        decoder=None,
        opset=OPSETS[precision],
    )
    inputs, outputs = vision_signature(
        image_size=model.vision.image_size,
        tokens=model.vision.tokens,
        width=model.decoder.width,
        dtype=precision.dtype,
    )
    with atomic_folder(folder) as work:
        for path in graph.iterdir():
            shutil.copy(path, work)
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
