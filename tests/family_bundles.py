"""Bundles of tiny checkpoints of each family, exported for real and not verified."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from family_checkpoints import write_family

from holov_export.bundle import Bundle
from holov_export.export.checkpoint import config_sha256, spec_from_checkpoint
from holov_export.pipeline import export_bundle
from holov_export.policies import HolovPolicy, policy_from_settings
from holov_export.request import ExportRequest, GraphRequest
from holov_export.spec import CheckpointSource, DecoderPrecision, ExportPlan, Precision


@dataclass(frozen=True)
class FamilyBundle:
    """A bundle and the directory of the checkpoint that it was made of."""

    bundle: Bundle
    checkpoint: Path


def family_bundle(folder: Path, family: str, *, decoder: bool = False, also: tuple[str, ...] = ()) -> FamilyBundle:
    """float32, HoloV, and the graphs of further rules."""
    checkpoint = write_family(folder / "checkpoint", family)
    request = ExportRequest(
        model=str(checkpoint),
        policy=HolovPolicy(),
        precision=Precision.FP32,
        decoder=DecoderPrecision.FP32 if decoder else None,
        output=folder / family,
        verify=False,
        also=tuple(GraphRequest(policy=policy_from_settings(method)) for method in also),
    )
    return FamilyBundle(export_bundle(request)[0], checkpoint)


def family_plan(checkpoint: Path, method: str = "holov", **changes: Any) -> ExportPlan:
    """The plan of a checkpoint that nothing is exported from."""
    plan = ExportPlan(
        model=spec_from_checkpoint(checkpoint, checkpoint.name),
        source=CheckpointSource(kind="local", name=checkpoint.name, config_sha256=config_sha256(checkpoint)),
        policy=policy_from_settings(method),
        precision=Precision.FP32,
        decoder=None,
    )
    return plan.model_copy(update=changes)
