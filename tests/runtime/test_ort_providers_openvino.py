"""The OpenVINO provider behind the runner, and 8-bit products on processors that add them inexactly.

The wheel with OpenVINO shares onnxruntime's import directory, so it is not here: a session on the CPU says that it is.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from runtime.engines import pixels_for

from holov_export.bundle import Bundle
from holov_export.errors import EnvironmentFaultError
from holov_export.runtime import ort_providers
from holov_export.runtime.openvino_graph import graph_for_openvino, openvino_options
from holov_export.runtime.ort_providers import CPU, OPENVINO, exact_bytes
from holov_export.runtime.runner_ort import OrtRunner
from holov_export.spec import ModelSpec

TRUE_SESSION = onnxruntime.InferenceSession


@dataclass
class Group:
    ep_name: str
    operators: tuple[str, ...]

    def get_nodes(self) -> list[Any]:
        return [type("Node", (), {"op_type": name})() for name in self.operators]


@dataclass
class Machine:
    """An ONNX Runtime with OpenVINO. `groups`: what a session says of its nodes; `active`: of its providers."""

    active: tuple[str, ...] = (OPENVINO, CPU)
    groups: tuple[Group, ...] = (Group(OPENVINO, ("MatMul", "Conv")), Group(CPU, ("Shape",)))
    asked: list[tuple[Any, list[Any], Any]] = field(default_factory=list)

    def session(self, graph: Any, options: Any, *, providers: list[Any], enable_fallback: int) -> Any:
        self.asked.append((graph, providers, options))
        made = TRUE_SESSION(graph, options, providers=[CPU], enable_fallback=enable_fallback)
        made.get_providers = lambda: list(self.active)  # type: ignore[method-assign]
        made.get_provider_graph_assignment_info = lambda: list(self.groups)
        return made


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    made = Machine()
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [OPENVINO, CPU])
    monkeypatch.setattr(onnxruntime, "InferenceSession", made.session)
    return made


# ------------------------------------------------------------------------------------------------------- the provider


def test_it_is_not_there(toy_bundle: Bundle) -> None:
    with pytest.raises(EnvironmentFaultError, match=r"has no OpenVINO; it has .*pip install onnxruntime-openvino"):
        OrtRunner(toy_bundle, provider="openvino")


def test_what_it_is_told(machine: Machine, exported_bundle: Bundle, llava_spec: ModelSpec) -> None:
    with OrtRunner(exported_bundle, provider="openvino", threads=3) as runner:
        got = runner.run(pixels_for(llava_spec, 2), 5, [5, 3])
    ((graph, providers, options),) = machine.asked
    assert providers == [(OPENVINO, {"device_type": "CPU", "precision": "FP32", "num_of_threads": "3"}), CPU]
    assert isinstance(graph, bytes)
    folder = options.get_session_config_entry("session.model_external_initializers_file_folder_path")
    assert Path(folder) == exported_bundle.folder
    with OrtRunner(exported_bundle, provider="cpu", threads=1) as plain:
        wanted = plain.run(pixels_for(llava_spec, 2), 5, [5, 3])
    np.testing.assert_array_equal(got.positions, wanted.positions)
    np.testing.assert_array_equal(got.counts, [5, 3])
    np.testing.assert_allclose(got.tokens, wanted.tokens, rtol=1e-5, atol=1e-6)


def test_threads_are_left_to_openvino() -> None:
    assert openvino_options(None) == {"device_type": "CPU", "precision": "FP32"}


@pytest.mark.parametrize(
    ("active", "groups", "message"),
    [
        ((CPU,), (), "fell back to the CPU: it could not load its OpenVINO libraries. Install onnxruntime-openvino"),
        (
            (OPENVINO, CPU),
            (Group(OPENVINO, ("Add",)), Group(CPU, ("MatMul",))),
            "leaves MatMul to the CPU: its OpenVINO",
        ),
        ((OPENVINO, CPU), (Group(CPU, ("Shape",)),), "gives no part of the graph to its OpenVINO"),
    ],
)
def test_no_silent_way_back(
    machine: Machine, toy_bundle: Bundle, active: tuple[str, ...], groups: tuple[Group, ...], message: str
) -> None:
    machine.active, machine.groups = active, groups
    with pytest.raises(EnvironmentFaultError, match=message) as caught:
        OrtRunner(toy_bundle, provider="openvino")
    assert "provider cpu" in str(caught.value)
    assert "cuda" not in str(caught.value).lower()


# ---------------------------------------------------------------------------------------------------------- its graph


def _clips(path: Path) -> Path:
    """Clips of integers and floats with one bound or two, in a graph and in the body of a loop."""
    bounds = {"low": np.int64(1), "high": np.int64(4), "half": np.float32(0.5)}
    body = helper.make_graph(
        [
            helper.make_node("Identity", ["on"], ["more"]),
            helper.make_node("Clip", ["i", "inner"], ["inside"], name="inside"),
        ],
        "body",
        [
            helper.make_tensor_value_info("number", TensorProto.INT64, []),
            helper.make_tensor_value_info("on", TensorProto.BOOL, []),
        ],
        [
            helper.make_tensor_value_info("more", TensorProto.BOOL, []),
            helper.make_tensor_value_info("inside", TensorProto.INT64, ["n"]),
        ],
        [numpy_helper.from_array(np.array(2, np.int64), "inner")],
    )
    nodes = [
        helper.make_node("Clip", ["i", "low"], ["a"], name="lower"),
        helper.make_node("Clip", ["i", "", "high"], ["b"], name="upper"),
        helper.make_node("Clip", ["i", "low", "high"], ["c"], name="both"),
        helper.make_node("Clip", ["f", "half"], ["d"], name="float"),
        helper.make_node("Loop", ["high", ""], ["e"], body=body, name="loop"),
    ]
    integers = [helper.make_tensor_value_info(name, TensorProto.INT64, None) for name in "abce"]
    graph = helper.make_graph(
        nodes,
        "clips",
        [
            helper.make_tensor_value_info("i", TensorProto.INT64, ["n"]),
            helper.make_tensor_value_info("f", TensorProto.FLOAT, ["n"]),
        ],
        [*integers, helper.make_tensor_value_info("d", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.array(value), name) for name, value in bounds.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), path)
    return path


def test_integers_with_one_bound(tmp_path: Path) -> None:
    path = _clips(tmp_path / "clips.onnx")
    written = graph_for_openvino(path)
    nodes = {node.name: node for node in onnx.load_from_string(written).graph.node}
    assert {name: (node.op_type, list(node.input)) for name, node in nodes.items()} == {
        "lower": ("Max", ["i", "low"]),
        "upper": ("Min", ["i", "high"]),
        "both": ("Clip", ["i", "low", "high"]),
        "float": ("Clip", ["f", "half"]),
        "loop": ("Loop", ["high", ""]),
    }
    assert [node.op_type for node in nodes["loop"].attribute[0].g.node] == ["Identity", "Max"]
    feed = {"i": np.array([-3, 0, 2, 9]), "f": np.array([-1, 0, 0.5, 2], np.float32)}
    results = [TRUE_SESSION(graph, providers=[CPU]).run(None, feed) for graph in (str(path), written)]
    for before, after in zip(*results, strict=True):
        np.testing.assert_array_equal(before, after)


def test_no_such_clip_is_left_in_a_true_graph(exported_bundle: Bundle) -> None:
    before = onnx.load(exported_bundle.vision, load_external_data=False).graph
    after = onnx.load_from_string(graph_for_openvino(exported_bundle.vision)).graph
    integers = {item.name for item in before.initializer if item.data_type == TensorProto.INT64}
    for graph, some in ((before, True), (after, False)):
        one_sided = [node for node in graph.node if node.op_type == "Clip" and len(node.input) == 2]
        assert any(node.input[1] in integers for node in one_sided) == some
    assert [node.name for node in before.node] == [node.name for node in after.node]


# ----------------------------------------------------------------------------------------------------- 8-bit products


@pytest.mark.parametrize(
    ("machine_name", "flags", "exact"),
    [
        ("x86_64", "flags : avx2 avx512_vnni", True),
        ("AMD64", "flags : avx2 avx_vnni", True),
        ("x86_64", "flags : avx2 fma", False),
        ("x86_64", None, False),
        ("aarch64", None, True),
    ],
)
def test_who_multiplies_bytes_exactly(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, machine_name: str, flags: str | None, exact: bool
) -> None:
    monkeypatch.setattr(ort_providers.platform, "machine", lambda: machine_name)
    if flags is not None:
        (tmp_path / "cpuinfo").write_text(flags)
    assert exact_bytes(tmp_path / "cpuinfo") == exact


@pytest.mark.parametrize("exact", [True, False])
def test_others_take_the_slower_way(toy_bundle: Bundle, monkeypatch: pytest.MonkeyPatch, exact: bool) -> None:
    monkeypatch.setattr(ort_providers, "exact_bytes", lambda: exact)
    asked = []

    def session(graph: Any, options: Any, **arguments: Any) -> Any:
        asked.append(options)
        return TRUE_SESSION(graph, options, **arguments)

    monkeypatch.setattr(onnxruntime, "InferenceSession", session)
    OrtRunner(toy_bundle, provider="cpu", threads=1).close()
    try:
        entry = asked[0].get_session_config_entry("session.x64quantprecision")
    except RuntimeError:
        entry = ""
    assert entry == ("" if exact else "1")
