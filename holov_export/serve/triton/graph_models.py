"""`holov_vision_graph`: the vision graph itself as a model of Triton's own ONNX Runtime or TensorRT back end.

Pixels in, for models of square pictures; whoever calls it preprocesses. Not run here: the server that the checks start
has neither back end.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from holov_export.bundle import Bundle, GraphTensor
from holov_export.engine import Engine, check_plan
from holov_export.errors import EngineError, UnsupportedModelError
from holov_export.runtime.engine_choice import engines_of
from holov_export.serve.triton.config_text import ModelConfig, TensorConfig
from holov_export.signature import BUDGET

NAME = "holov_vision_graph"


def graph_config(
    bundle: Bundle, backend: Literal["onnxruntime", "tensorrt"], *, instances: int, gpu: bool
) -> ModelConfig:
    """Its configuration: inputs and outputs of the graph under their own names, the batch an axis like the others.

    Triton's own batching is off: `budget` has no axis for it.

    Raises:
        UnsupportedModelError: the graph is packed, or its pixels are bfloat16.
    """
    plan = bundle.manifest.plan
    if plan.packed:
        raise UnsupportedModelError(
            f"the graph of '{plan.model.name}' takes pictures in packed parts, which no client makes by hand.",
            hint="Use --layout holov.",
        )
    if plan.precision.dtype == "bfloat16":
        raise UnsupportedModelError(
            "clients have no bfloat16 pixels for this graph.", hint="Use --layout holov, or export with --fp16."
        )
    return ModelConfig(
        name=NAME,
        backend=backend,
        inputs=_tensors(bundle.manifest.inputs, shapes=(BUDGET,) if backend == "tensorrt" else ()),
        outputs=_tensors(bundle.manifest.outputs, shapes=()),
        instances=instances,
        device="gpu" if gpu or backend == "tensorrt" else "cpu",
        file="vision.engine" if backend == "tensorrt" else bundle.graph,
    )


def _tensors(tensors: Sequence[GraphTensor], shapes: Sequence[str]) -> tuple[TensorConfig, ...]:
    return tuple(
        TensorConfig(
            item.name,
            item.dtype,
            tuple(size if isinstance(size, int) else -1 for size in item.shape),
            shape_tensor=item.name in shapes,
        )
        for item in tensors
    )


def copy_graph(bundle: Bundle, folder: Path) -> None:
    """Put the graph and its weights into the folder of the model's version.

    Copies, not links: ONNX Runtime refuses weights that lie elsewhere.
    """
    shutil.copyfile(bundle.vision, folder / bundle.graph)
    weights = bundle.folder / bundle.weights
    if weights.is_file():
        shutil.copyfile(weights, folder / bundle.weights)


def chosen_engine(bundle: Bundle, target: str | None) -> Engine:
    """The bundle's engine of that target, or its only one; whether it fits the server's GPU shows there.

    Raises:
        EngineError: there is none, or several and none was named.
        IntegrityError: it was changed.
    """
    engines = engines_of(bundle)
    found = [item for item in engines if target in (None, item.record.target, item.folder.name)]
    if len(found) != 1:
        names = ", ".join(item.record.target for item in engines) or "none"
        raise EngineError(
            f"the bundle '{bundle.folder.name}' has these engines: {names}.",
            hint="Name one with --target." if found else f"Build one: holov-export compile {bundle.folder}",
        )
    check_plan(found[0])
    return found[0]
