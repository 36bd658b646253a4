"""Fixtures of the compile tests: vision graphs exported for real, each once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from noisy import noisy_copy

from holov_export.export.onnx_from_graph import onnx_from_graph, save_vision
from holov_export.policies import policy_from_settings
from holov_export.spec import OPSETS, CheckpointSource, ExportPlan, ModelSpec, Precision
from holov_export.vision.clip import vision_from_checkpoint
from holov_export.vision.weights import SafetensorsReader

ExportedGraph = Callable[[str, Precision], Path]


@pytest.fixture(scope="session")
def exported_graph(
    llava_checkpoint: Path, llava_spec: ModelSpec, tmp_path_factory: pytest.TempPathFactory
) -> ExportedGraph:
    """(method, precision) -> folder with vision.onnx and vision.onnx.data, from a checkpoint of 64 patch tokens."""
    made: dict[tuple[str, Precision], Path] = {}
    checkpoint = noisy_copy(llava_checkpoint, tmp_path_factory.mktemp("compile") / "noisy")

    def export(method: str, precision: Precision) -> Path:
        if (method, precision) not in made:
            plan = ExportPlan(
                model=llava_spec,
                source=CheckpointSource(kind="local", name="tiny"),
                policy=policy_from_settings(method),
                precision=precision,
                decoder=None,
                opset=OPSETS[precision],
            )
            with SafetensorsReader(checkpoint) as reader:
                module = vision_from_checkpoint(llava_spec, plan.policy, reader, precision)
            folder = tmp_path_factory.mktemp("compile") / f"{method}-{precision.value}"
            folder.mkdir()
            save_vision(onnx_from_graph(module, plan), folder)
            made[method, precision] = folder
        return made[method, precision]

    return export
