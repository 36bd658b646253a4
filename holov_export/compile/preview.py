"""What `compile --dry-run` shows: plan and equal trtexec command, for every kind of network in a target's range.

Needs neither a GPU nor TensorRT.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from holov_export.bundle import VISION
from holov_export.compile.compilation import HALVED, CompileOptions, CompilePlan, branches_of, plan_from_target
from holov_export.compile.graph_file import graph_from_file
from holov_export.compile.lowering import lowered_for
from holov_export.compile.trtexec import pins_from_graph, trtexec_from_plan
from holov_export.errors import EngineError
from holov_export.spec import ExportPlan
from holov_export.targets import EngineTarget

if TYPE_CHECKING:
    from onnx import ModelProto


@dataclass(frozen=True)
class Preview:
    """One TensorRT version's plan, or why there is none.

    Attributes:
        commands: what to type instead: `holov-export lower` where the graph must be rewritten first, then trtexec.
        notes: what that does otherwise than `holov-export compile`.
    """

    tensorrt: str
    plan: CompilePlan | None
    commands: tuple[tuple[str, ...], ...] = ()
    notes: tuple[str, ...] = ()
    refusal: str = ""


def previews(
    export: ExportPlan,
    bundle: Path,
    target: EngineTarget,
    options: CompileOptions,
    tensorrt: str | None = None,
    graph: str = VISION,
) -> tuple[Preview, ...]:
    """The previews of a bundle, exported or not yet.

    Args:
        bundle: its folder; where it has no graph yet, trtexec's float32 layers cannot be named.
        graph: file name of the graph in it.
        tensorrt: only this version; None for the lowest of each kind of network in the target's range.

    Raises:
        EngineError: no version can build it; that of the first. BudgetError: a profile that cannot be.
    """
    versions = (tensorrt,) if tensorrt else branches_of(target)
    made, refusals = [], []
    for version in versions:
        try:
            plan = plan_from_target(export, target, options, version)
        except EngineError as error:
            refusals.append(error)
            made.append(Preview(version, None, refusal=str(error)))
            continue
        made.append(_preview(plan, bundle, options, graph))
    if len(refusals) == len(versions):
        raise refusals[0]
    return tuple(made)


def _preview(plan: CompilePlan, bundle: Path, options: CompileOptions, graph: str) -> Preview:
    commands = []
    folder = bundle
    if plan.lowered:
        of_graph = Path(graph).stem.removeprefix(Path(VISION).stem)  # two graphs may bring the same weights
        folder = Path(f"{bundle.name}{of_graph}-trt{plan.tensorrt}")
        source = bundle if graph == VISION else bundle / graph
        commands.append(("holov-export", "lower", str(source), "--tensorrt", plan.tensorrt, "-o", str(folder)))
    pins, notes = None, []
    if plan.network in HALVED:
        lowered = _graph(bundle / graph, plan)
        if lowered is None:
            notes.append("--layerPrecisions and --layerOutputTypes are missing: they name nodes of the exported graph")
        else:
            pins = pins_from_graph(lowered)
    cache = (options.timing_cache or Path(f"{plan.target}.cache")) if options.use_timing_cache else None
    made = trtexec_from_plan(plan, folder / graph, pins=pins, timing_cache=cache)
    return Preview(plan.tensorrt, plan, (*commands, made.arguments), (*notes, *made.notes))


def _graph(graph: Path, plan: CompilePlan) -> ModelProto | None:
    """The lowered graph, None if it has not been exported yet."""
    return lowered_for(graph_from_file(graph), plan.tensorrt) if graph.is_file() else None
