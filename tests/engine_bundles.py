"""Bundles around graphs that the compile tests have exported, one of each family, and engines that nobody built."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from family_checkpoints import write_family

from holov_export.bundle import (
    ENGINES,
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
from holov_export.engine import ENGINE, BuiltWith, EngineRecord, ShapeProfile, write_record
from holov_export.engine import SCHEMA as ENGINE_SCHEMA
from holov_export.pipeline import export_bundle
from holov_export.policies import policy_from_settings
from holov_export.request import ExportRequest, GraphRequest
from holov_export.signature import vision_signature
from holov_export.spec import OPSETS, CheckpointSource, ExportPlan, ModelSpec, Precision
from holov_export.storage import sha256_of

PLAN = b"plan of TensorRT"
_FAMILIES: dict[tuple[str, Precision], Bundle] = {}


def family_bundle(family: str, precision: Precision, factory: pytest.TempPathFactory) -> Bundle:
    """A tiny checkpoint of one of `family_checkpoints.FAMILIES` exported for real, once a session; no decoder.

    LLaVA-NeXT's, which exports fastest, has a second graph.
    """
    if (family, precision) not in _FAMILIES:
        methods = ("holov", "scope") if family == "llava_next" else ("holov",)
        checkpoint = write_family(factory.mktemp("checkpoints") / family, family)
        first, *also = [GraphRequest(policy_from_settings(method), None) for method in methods]
        folder = factory.mktemp("families") / f"{family}-{precision.value}"
        request = ExportRequest(str(checkpoint), first.policy, precision, None, folder, verify=False, also=tuple(also))
        _FAMILIES[family, precision] = export_bundle(request)[0]
    return _FAMILIES[family, precision]


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


def put_engine(bundle: Bundle, target: str, graph: str, weights: str) -> None:
    """A folder with an engine's record and a plan that is none, built from a graph and weights of these hashes."""
    folder = bundle.folder / ENGINES / target
    folder.mkdir(parents=True)
    (folder / ENGINE).write_bytes(PLAN)
    built = BuiltWith(
        tensorrt="10.13.3", cuda="13.0", gpu="NVIDIA H200", sm=90, system="Linux x86_64", network="strongly-typed"
    )
    record = EngineRecord(
        schema_version=ENGINE_SCHEMA,
        target=target,
        precision=Precision.FP16,
        opset=18,
        profiles=(ShapeProfile(batch=(1, 4, 16), budget=(1, 7, 64)),),
        graph_sha256=graph,
        weights_sha256=weights,
        sha256=sha256_of(folder / ENGINE),
        bytes=len(PLAN),
        built_with=built,
        build_seconds=1.5,
        created="2026-01-01T00:00:00+00:00",
    )
    write_record(folder, record)
