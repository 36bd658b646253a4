"""Which tower a plan needs: the one place that knows the families.

A new family is a module with its tower and an entry in `FAMILIES`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from holov_export.policies import NoSelection
from holov_export.spec import ExportPlan, Precision
from holov_export.vision import clip
from holov_export.vision.clip import LlavaVision
from holov_export.vision.clip_packed import PackedClipVision
from holov_export.vision.examples import example_inputs
from holov_export.vision.loading import as_stored, module_from_checkpoint
from holov_export.vision.module import VisionModule
from holov_export.vision.plain import plain_vision
from holov_export.vision.weights import SafetensorsReader

__all__ = [
    "FAMILIES",
    "Family",
    "Part",
    "VisionModule",
    "checkpoint_names",
    "example_inputs",
    "newline_from_checkpoint",
    "plain_from_plan",
    "vision_from_plan",
]

Part = Literal["image", "video"]


@dataclass(frozen=True)
class Family:
    """How the vision modules of a family are made.

    Attributes:
        build: the module of a plan, its weights not read yet.
        names: from the name of one of the module's parameters, and the part, to how checkpoints may spell it.
        shaped: from the name of a parameter and the stored tensor to a view of it in the parameter's shape.
    """

    build: Callable[[ExportPlan], VisionModule]
    names: Callable[[str, Part], list[str]]
    shaped: Callable[[str, Tensor], Tensor] = as_stored


def vision_from_plan(plan: ExportPlan, reader: SafetensorsReader, precision: Precision | None = None) -> VisionModule:
    """The module of the plan's default graph, with the checkpoint's own weights in the plan's precision or another one.

    Raises:
        CheckpointError: a tensor is missing or of another shape.
        ValueError: the rule cannot decide for this family, or not inside its tower.
    """
    family = FAMILIES[plan.model.family]
    return module_from_checkpoint(
        lambda: family.build(plan),
        reader,
        precision or plan.precision,
        lambda name: family.names(name, plan.part),
        family.shaped,
    )


def plain_from_plan(plan: ExportPlan, reader: SafetensorsReader, precision: Precision | None = None) -> VisionModule:
    """The encoder without selection: all tokens, or the first `budget` of them.

    Raises:
        CheckpointError: a tensor is missing or of another shape.
    """
    return vision_from_plan(plan.model_copy(update={"policy": NoSelection(), "cuts": ()}), reader, precision)


def checkpoint_names(family: str, part: Part, name: str) -> list[str]:
    """How checkpoints of a family may spell the parameter `name` of its vision module."""
    return FAMILIES[family].names(name, part)


def newline_from_checkpoint(reader: SafetensorsReader) -> npt.NDArray[np.float32]:
    """float32 [D]: LLaVA-NeXT's embedding that follows each row of a picture.

    Raises:
        CheckpointError: the checkpoint has none.
    """
    newline: npt.NDArray[np.float32] = reader.read(["image_newline", "model.image_newline"]).to(torch.float32).numpy()
    return newline


def _clip(plan: ExportPlan) -> VisionModule:
    if plan.packed:
        _refuse_cuts(plan)
        return PackedClipVision(plan.model, plan.policy, plan.part)
    if isinstance(plan.policy, NoSelection):
        return plain_vision(plan.model)
    return LlavaVision(plan.model, plan.policy, plan.cuts)


def _qwen(plan: ExportPlan) -> VisionModule:
    from holov_export.vision.qwen2_5_vl import QwenVision

    _refuse_cuts(plan)
    return QwenVision(plan.model, plan.policy)


def _refuse_cuts(plan: ExportPlan) -> None:
    if plan.cuts:
        raise ValueError(f"'{plan.method}' cuts inside the tower; graphs of '{plan.model.family}' cut at its end only")


def _llava_names(name: str, part: Part) -> list[str]:
    return clip.checkpoint_names(name)


def _video_llava_names(name: str, part: Part) -> list[str]:
    return clip.checkpoint_names(name, f"{part}_tower")


def _qwen_names(name: str, part: Part) -> list[str]:
    from holov_export.vision.qwen2_5_vl import checkpoint_names as names

    return names(name)


def _qwen_shaped(name: str, tensor: Tensor) -> Tensor:
    from holov_export.vision.qwen2_5_vl import shaped

    return shaped(name, tensor)


FAMILIES = {
    "llava": Family(_clip, _llava_names),
    "llava_next": Family(_clip, _llava_names),
    "qwen2_5_vl": Family(_qwen, _qwen_names, _qwen_shaped),
    "video_llava": Family(_clip, _video_llava_names),
}
