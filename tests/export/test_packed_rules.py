"""`PackedSelection` as an ONNX graph with no fixed sizes, in ONNX Runtime, against torch and the reference."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from graphs import FORBIDDEN, bodies, shape_values, sources_of
from selection.packed_cases import LARGEST, Packed, check_kept, packed_inputs

from holov_export.compile.readiness import readiness_of
from holov_export.export.onnx_from_graph import quiet_exporter
from holov_export.export.passes import clean
from holov_export.export.translations import translation_table
from holov_export.policies import POLICIES, NoSelection, SelectionPolicy, policy_from_settings
from holov_export.selection.packed import Kept, PackedSelection
from holov_export.selection.reference import uniform_positions
from holov_export.spec import OPSETS, Precision

#: several exports; scripts/test-slow runs them
pytestmark = pytest.mark.slow

METHODS = [method for method, policy in POLICIES.items() if policy.packs] + ["none"]
GREEDY = ["scope", "divprune", "cdpruner-unconditional"]
NAMES = ["saliency", "features", "source", "crops", "budget", "quota"]
OUTPUTS = ["rows", "positions", "counts", "token_saliency"]
WIDTH = 12


@dataclass(frozen=True)
class Graph:
    """An exported rule, its session and the module that it comes from."""

    policy: SelectionPolicy
    module: PackedSelection
    model: onnx.ModelProto
    session: ort.InferenceSession

    def run(self, given: Packed) -> Kept:
        feed = {name: tensor.numpy() for name, tensor in zip(NAMES, given.tensors(), strict=True)}
        return Kept(*(torch.from_numpy(cast(np.ndarray, array)) for array in self.session.run(None, feed)))


Export = Callable[[str], Graph]


@pytest.fixture(scope="module")
def export() -> Export:
    """Exports each rule once, from two pictures of 5 and 7 tokens."""
    made: dict[str, Graph] = {}

    def exported(method: str) -> Graph:
        if method not in made:
            policy = NoSelection() if method == "none" else policy_from_settings(method)
            module = PackedSelection(policy, LARGEST).eval()
            model = ir.serde.serialize_model(onnx_from_packed(module))
            options = ort.SessionOptions()
            options.intra_op_num_threads = 1
            session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
            made[method] = Graph(policy, module, model, session)
        return made[method]

    return exported


def onnx_from_packed(module: PackedSelection) -> ir.Model:
    axis, opset = torch.export.Dim.DYNAMIC, OPSETS[Precision.FP32]
    given = packed_inputs([5, 7], 0, width=WIDTH, crops=3)
    with quiet_exporter():
        program = torch.onnx.export(
            module,
            given.tensors(),
            dynamo=True,
            opset_version=opset,
            input_names=NAMES,
            output_names=OUTPUTS,
            dynamic_shapes={
                "saliency": {0: axis},
                "features": {0: axis},
                "source": {0: axis, 1: axis},
                "crops": {0: axis, 1: axis},
                "budget": None,
                "quota": {0: axis},
            },
            custom_translation_table=translation_table(opset),
            optimize=True,
            verbose=False,
        )
    assert program is not None
    clean(program.model, {})
    return program.model


@pytest.mark.parametrize("method", METHODS)
def test_other_sizes_than_exported(export: Export, method: str) -> None:
    """Batches of 1 to 6, N from 1 to 95, any budget: ONNX Runtime is torch, and both are the reference."""
    graph, compared, pictures, same = export(method), 0, 0, 0
    for seed in range(30):
        dice = np.random.default_rng(seed)
        sizes = [int(size) for size in dice.integers(1, 4 if seed % 6 == 0 else 90, 1 + seed % 6)]
        given = packed_inputs(sizes, seed, width=WIDTH, spare=seed % 5, crops=1 + seed % 17)
        found = graph.run(given)
        with torch.no_grad():
            expected = graph.module(*given.tensors())
        compared += check_kept(graph.policy, given, found)
        same += sum(torch.equal(mine, theirs) for mine, theirs in zip(found.rows, expected.rows, strict=True))
        pictures += len(sizes)
        assert all(mine.dtype == theirs.dtype for mine, theirs in zip(found, expected, strict=True))
    assert compared >= 0.6 * pictures
    assert same >= 0.9 * pictures


@pytest.mark.parametrize("method", [method for method in METHODS if method != "holov-plus"])
def test_exact_inputs(export: Export, method: str) -> None:
    """Ties everywhere; `holov-plus` subtracts a mean, after which ties are not exact any more."""
    graph, compared = export(method), 0
    exact = method not in ("holov", "holov-official", "scope", "cdpruner-unconditional")
    for seed in range(10):
        given = packed_inputs([13, 60, 2], seed, width=WIDTH, exact=True, spare=1)
        compared += check_kept(graph.policy, given, graph.run(given), exact=exact)
    assert compared >= 10


@pytest.mark.parametrize(("sizes", "budget"), [([2880, 1404], 320), ([3000, 5000, 576], 64)], ids=str)
@pytest.mark.parametrize("method", [method for method in METHODS if method not in GREEDY])
def test_true_sizes(export: Export, method: str, sizes: list[int], budget: int) -> None:
    """As large as LLaVA-NeXT's pictures and Qwen2.5-VL's."""
    if method == "holov-plus":
        sizes = sizes[:1]  # N x N pairs
    graph = export(method)
    given = packed_inputs(sizes, 3, width=WIDTH, crops=16)
    given = Packed(given.saliency, given.features, given.source, given.crops, budget, np.full(len(sizes), budget))
    check_kept(graph.policy, given, graph.run(given))


def test_uniform_counts_past_what_float32_can() -> None:
    """(2 i + 1) N passes 2^24 where N is 5000; the graph is exact all the same."""
    module = PackedSelection(policy_from_settings("uniform"), LARGEST).eval()
    model = ir.serde.serialize_model(onnx_from_packed(module))
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    given = packed_inputs([5000], 0, width=WIDTH)
    feed = {name: tensor.numpy() for name, tensor in zip(NAMES, given.tensors(), strict=True)}
    for asked in (1, 2, 7, 320, 2999, 3841, 4096, 4999, 5000):
        feed["budget"] = feed["quota"] = np.array([asked])
        positions = cast(np.ndarray, session.run(["positions"], feed)[0])
        assert positions[0].tolist() == uniform_positions(5000, asked).tolist()


@pytest.mark.parametrize("method", METHODS)
def test_shapes_hang_on_the_budget_alone(export: Export, method: str) -> None:
    """No shape depends on data, and TensorRT takes the graph from 8.6 on: before, TopK's K has to be a constant."""
    model = export(method).model
    operators = {node.op_type for graph in (model.graph, *bodies(model)) for node in graph.node}
    assert not operators & FORBIDDEN
    assert ("Loop" in operators) == (method in GREEDY)
    assert sources_of(model, shape_values(model)) <= {"budget"}
    for version in readiness_of(model).versions:
        rules = {(finding.rule, finding.operator) for finding in version.findings if finding.severity != "note"}
        assert rules <= ({("input-not-constant", "TopK")} if version.tensorrt == "8.5" else set())
    large = {"random": LARGEST}.get(method, 64 * 64)
    assert max((np.prod(tensor.dims) for tensor in model.graph.initializer), default=0) <= large
