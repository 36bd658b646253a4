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
from holov_export.spec import (
    CheckpointSource,
    DecoderPrecision,
    ExportPlan,
    FramesSpec,
    PatchImageSpec,
    Precision,
    TiledImageSpec,
)


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


#: published sizes: CLIP ViT-L/14 up to layer 22 of 24, Qwen2.5-VL-7B
_CLIP = {"width": 1024, "layers": 24, "heads": 16, "mlp_width": 4096, "feature_layer": 22}
_QWEN = {"width": 1280, "layers": 32, "heads": 16, "mlp_width": 3420, "full_layers": (7, 15, 23, 31)}


def true_size(plan: ExportPlan) -> ExportPlan:
    """The plan of a tiny checkpoint with the vision sizes, and the width of the language model, of a published one."""
    model = plan.model
    decoder = model.decoder.model_copy(update={"width": 3584 if model.family == "qwen2_5_vl" else 4096})
    changes: dict[str, Any] = {"decoder": decoder}
    if isinstance(model.image, PatchImageSpec):
        changes["vision"] = model.vision.model_copy(update={**_QWEN, "window_size": 112})
        changes["image"] = model.image.model_copy(update={"max_pixels": 16384 * 28 * 28})
        return plan.model_copy(update={"model": model.model_copy(update=changes)})
    side = 336 if isinstance(model.image, TiledImageSpec) else 224
    square = {"shortest_edge": side, "crop": (side, side)}
    changes["vision"] = model.vision.model_copy(update={**_CLIP, "image_size": side})
    if isinstance(model.image, TiledImageSpec):
        shapes = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))
        tile = model.image.tile.model_copy(update=square)
        changes["image"] = model.image.model_copy(update={"tile": tile, "pinpoints": shapes})
    else:
        changes["image"] = model.image.model_copy(update=square)
    if isinstance(model.video, FramesSpec):
        frame = model.video.image.model_copy(update=square)
        changes["video"] = model.video.model_copy(update={"image": frame})
    return plan.model_copy(update={"model": model.model_copy(update=changes)})
