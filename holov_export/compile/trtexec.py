"""The trtexec command that builds the same engine, for those who want NVIDIA's own tool or have no Python on the board.

Its options differ between versions. Source: samples/common/sampleOptions.cpp of github.com/NVIDIA/TensorRT at the tags
8.5.2, v8.6.1, v10.0.1, v10.3.0, v10.13.3, v10.16, v11.0 and v11.1. Nothing of this has been run yet.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from holov_export.compile.compilation import CompilePlan
from holov_export.compile.precision_pins import element_types, float32_nodes
from holov_export.compile.profile import sized, words
from holov_export.engine import AxisSizes, ShapeProfile
from holov_export.extras import require
from holov_export.signature import BUDGET

if TYPE_CHECKING:
    from onnx import ModelProto

_HARDWARE = {"ampere_plus": "ampere+", "same_compute_capability": "sameComputeCapability"}


@dataclass(frozen=True)
class Trtexec:
    """A command line, and what it does otherwise than `holov-export compile`."""

    arguments: tuple[str, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class LayerPins:
    """The values of --layerPrecisions and --layerOutputTypes: what TensorRT 8 keeps in float32."""

    precisions: str
    outputs: str


def pins_from_graph(model: ModelProto) -> LayerPins:
    """Every node that the graph computes in float32, by name; `model` may be without its weights."""
    types = element_types(model)
    onnx_types = require("onnx").TensorProto
    names = {onnx_types.FLOAT: "fp32", onnx_types.INT64: "int32", onnx_types.INT32: "int32"}
    nodes = float32_nodes(model, types)
    outputs = []
    for node in nodes:
        written = [types[name] for name in node.output]
        if onnx_types.FLOAT in written:
            outputs.append(f"{node.name}:{'+'.join(names[dtype] for dtype in written)}")
    return LayerPins(",".join(f"{node.name}:fp32" for node in nodes), ",".join(outputs))


def trtexec_from_plan(
    plan: CompilePlan, onnx_file: Path, *, pins: LayerPins | None = None, timing_cache: Path | None = None
) -> Trtexec:
    """The command for a plan.

    Args:
        onnx_file: what it reads: vision.onnx of the bundle, or the lowered one. Its weights lie beside it.
        pins: for an fp16 or int8 bundle on TensorRT 8.
        timing_cache: a file to read and write.
    """
    notes: list[str] = []
    arguments = ["trtexec", f"--onnx={onnx_file}", f"--saveEngine={plan.target}.engine"]
    arguments += _precision(plan, pins, notes)
    arguments += _profiles(plan, notes)
    arguments.append(f"--memPoolSize=workspace:{plan.workspace_mb}")
    if plan.optimization_level is not None:
        arguments.append(f"--builderOptimizationLevel={plan.optimization_level}")
    if not plan.tf32:
        arguments.append("--noTF32")
    if (8, 6) <= plan.version < (10,):
        arguments.append("--preview=+profileSharing0806")
    arguments += _flags(plan)
    if timing_cache is not None:
        arguments.append(f"--timingCacheFile={timing_cache}")
    arguments += ["--profilingVerbosity=detailed", "--exportLayerInfo=layers.json"]
    arguments.append("--skipInference" if plan.version >= (8, 6) else "--buildOnly")
    notes.append("it writes the bare engine; `ask` and `bench` need one that `holov-export compile` built and recorded")
    return Trtexec(tuple(arguments), tuple(notes))


def _precision(plan: CompilePlan, pins: LayerPins | None, notes: list[str]) -> list[str]:
    if plan.network == "strongly-typed":
        return ["--stronglyTyped"] if plan.version < (11,) else []
    if plan.network == "fp32":
        return []
    arguments = ["--int8"] if plan.network == "int8-flag" else []
    arguments += ["--fp16", f"--precisionConstraints={'prefer' if plan.prefer else 'obey'}"]
    if pins is not None:
        arguments += [f"--layerPrecisions={pins.precisions}", f"--layerOutputTypes={pins.outputs}"]
        notes.append("it pins layers by name only; helper layers that the parser leaves unnamed stay free")
    return arguments


def _profiles(plan: CompilePlan, notes: list[str]) -> list[str]:
    if len(plan.profiles) == 1:
        return _shapes(plan, plan.profiles[0])
    if plan.version < (10,):
        widest = max(plan.profiles, key=lambda item: item.batch[2])
        notes.append(f"it builds one profile: {words(widest)}")
        return _shapes(plan, widest)
    arguments = []
    for index, shape in enumerate(plan.profiles):
        arguments += [f"--profile={index}", *_shapes(plan, shape)]
    return arguments


def _shapes(plan: CompilePlan, shape: ShapeProfile) -> list[str]:
    """--minShapes and its sisters: shapes of the inputs, the value of the shape input budget."""
    names = ("--minShapes", "--optShapes", "--maxShapes")
    return [f"{name}={','.join(_inputs(plan, sizes))}" for name, sizes in zip(names, shape.corners, strict=True)]


def _inputs(plan: CompilePlan, sizes: AxisSizes) -> Sequence[str]:
    shaped = [item for item in plan.inputs if item.name != BUDGET]
    return (
        *(f"{item.name}:{'x'.join(map(str, sized(item.shape, sizes)))}" for item in shaped),
        f"{BUDGET}:{sizes.budget}",
    )


def _flags(plan: CompilePlan) -> list[str]:
    flags = plan.flags
    options = {
        "--versionCompatible": flags.version_compatible,
        "--allowWeightStreaming": flags.weight_streaming,
        "--stripWeights": flags.strip_plan,
        "--refit": flags.refit,
    }
    arguments = [name for name, asked in options.items() if asked]
    if flags.hardware_compatibility != "none":
        arguments.append(f"--hardwareCompatibilityLevel={_HARDWARE[flags.hardware_compatibility]}")
    return arguments
