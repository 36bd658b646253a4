"""What decides is float32 in every precision of every family, and no rounded value reaches it: a walk over the graphs.

The islands of a half-precision graph: everything from the widening of the query and keys that decide to the saliency,
positions and counts. Before it only the projections themselves, their bias and what moves values are narrow.
"""

from __future__ import annotations

import re
from pathlib import Path

import onnx
import pytest
from engine_bundles import family_bundle
from onnx import TensorProto, helper
from quantized_graphs import FP8, INT8, quantized

import holov_export
from holov_export.bundle import Bundle
from holov_export.compile.deciding_part import (
    QUANTIZERS,
    DecidingPart,
    deciding_part,
    is_vision_graph,
    quantized_nodes,
)
from holov_export.compile.graph_view import view_of
from holov_export.compile.precision_pins import element_types
from holov_export.compile.readiness import readiness_of
from holov_export.pipeline import export_bundle
from holov_export.policies import POLICIES, policy_from_settings
from holov_export.quantize.linears import linears_of
from holov_export.request import ExportRequest, GraphRequest
from holov_export.signature import SALIENCY
from holov_export.spec import Precision, QuantizedType

FAMILIES = ("llava", "llava_next", "qwen2_5_vl", "video_llava")
NARROW = (TensorProto.FLOAT16, TensorProto.BFLOAT16)
SMALL = (*NARROW, TensorProto.INT8, TensorProto.UINT8, TensorProto.FLOAT8E4M3FN)
#: what may be narrow before the widening: products with weights, their bias, moving values, rotary embeddings
BEFORE = {"Add", "Cast", "Concat", "Gather", "Gemm", "MatMul", "Mul", "Reshape", "Shape", "Slice", "Squeeze"}
BEFORE |= {"Transpose", "Unsqueeze", "Cos", "Sin", "Neg", "Clip", "Where", "Expand"}
#: what decides and must therefore be behind it
BEHIND = {"ArgMax", "Div", "Floor", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceSum", "Softmax", "TopK"}

PRECISIONS: list[tuple[Precision, QuantizedType | None]] = [
    (Precision.FP32, None),
    (Precision.FP16, None),
    (Precision.BF16, None),
    (Precision.FP32, INT8),
    (Precision.FP16, INT8),
    (Precision.FP16, FP8),
]
#: an export takes some seconds: the float16 graphs of two families here, of the others and the rest in the slow tests
EVERY = [
    pytest.param(
        family,
        precision,
        kind,
        id=f"{family}-{precision.value}{f'-{kind.value}' if kind else ''}",
        marks=[] if precision is Precision.FP16 and family in ("llava", "qwen2_5_vl") else pytest.mark.slow,
    )
    for family in FAMILIES
    for precision, kind in PRECISIONS
]

_LLAVA: dict[Precision, Bundle] = {}


def bundle_of(family: str, precision: Precision, llava_checkpoint: Path, factory: pytest.TempPathFactory) -> Bundle:
    if family != "llava":
        return family_bundle(family, precision, factory)
    if precision not in _LLAVA:
        folder = factory.mktemp("islands") / precision.value
        request = ExportRequest(
            str(llava_checkpoint), policy_from_settings("holov"), precision, None, folder, verify=False
        )
        _LLAVA[precision] = export_bundle(request)[0]
    return _LLAVA[precision]


def graphs_of(bundle: Bundle, kind: QuantizedType | None) -> list[onnx.ModelProto]:
    """The vision graphs of a bundle; quantised ones with the products that decide left alone."""
    models = [onnx.load(str(view.vision)) for view in bundle.views]
    return models if kind is None else [quantized(model, kind) for model in models]


def part_of(model: onnx.ModelProto) -> DecidingPart:
    return deciding_part(view_of(model), element_types(model))


def faults(model: onnx.ModelProto) -> list[str]:
    """What is not float32 that should be, and what was rounded before it decides."""
    types, view = element_types(model), view_of(model)
    part = deciding_part(view, types)
    wide = {item for name in part.wide for item in part.nodes[name].output if types.get(item) == TensorProto.FLOAT}
    found = [f"{node.name} is quantised" for node in quantized_nodes(view, part)]
    for name, node in part.nodes.items():
        if name not in part.wide:
            if node.op_type not in BEFORE or (node.op_type == "MatMul" and name not in part.products):
                found.append(f"{name} ({node.op_type}) is narrow")
            found += [f"{name} narrows {item}" for item in node.input if item in wide]
            continue
        read = node.input if node.op_type not in ("Cast", "Shape") else ()
        found += [f"{name} reads {item}" for item in read if types.get(item) in SMALL]
        found += [f"{name} writes {item}" for item in node.output if types.get(item) in SMALL]
    saliency = next((value for value in model.graph.output if value.name == SALIENCY), None)
    if saliency is None or saliency.type.tensor_type.elem_type != TensorProto.FLOAT:
        found.append("the saliency is no float32 output")
    return found


# ------------------------------------------------------------------------------------------------------- every graph


@pytest.mark.parametrize(("family", "precision", "kind"), EVERY)
def test_what_decides_is_float32_and_unrounded(
    family: str,
    precision: Precision,
    kind: QuantizedType | None,
    llava_checkpoint: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    models = graphs_of(bundle_of(family, precision, llava_checkpoint, tmp_path_factory), kind)
    assert len(models) == {"video_llava": 2, "llava_next": 2}.get(family, 1)
    for model in models:
        part = part_of(model)
        assert faults(model) == []
        behind = {node.op_type for name, node in part.nodes.items() if name in part.wide}
        assert {"Softmax", "TopK"} <= behind and len(part.wide) > 50
        assert part.products and all("attn" in name for name in part.products)
        assert kind or part.weights == {linear.weight for linear in linears_of(model) if linear.deciding}
        narrow = precision is not Precision.FP32
        assert (len(part.wide) < len(part.nodes)) == narrow
        pairs = [node for node in model.graph.node if node.op_type in QUANTIZERS]
        assert bool(pairs) == (kind is not None)


@pytest.mark.slow
@pytest.mark.parametrize("precision", [Precision.FP16, Precision.BF16])
def test_every_rule_decides_in_float32(precision: Precision, llava_checkpoint: Path, tmp_path: Path) -> None:
    first, *also = [GraphRequest(policy_from_settings(method), None) for method in POLICIES]
    request = ExportRequest(
        str(llava_checkpoint), first.policy, precision, None, tmp_path / "all", verify=False, also=tuple(also)
    )
    bundle = export_bundle(request)[0]
    for view, model in zip(bundle.views, graphs_of(bundle, None), strict=True):
        assert faults(model) == [], view.method
        assert part_of(model).weights == {linear.weight for linear in linears_of(model) if linear.deciding}


# -------------------------------------------------------------------------------------------------- negative controls


@pytest.fixture
def half(llava_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> onnx.ModelProto:
    """A float16 graph of this test's own."""
    return graphs_of(bundle_of("llava", Precision.FP16, llava_checkpoint, tmp_path_factory), None)[0]


def rounded_trip(model: onnx.ModelProto, value: str) -> onnx.ModelProto:
    """Everyone who reads `value` reads what is left of it after float16."""
    casts = [
        helper.make_node("Cast", [value], [f"{value}/half"], name=f"{value}/narrow", to=TensorProto.FLOAT16),
        helper.make_node("Cast", [f"{value}/half"], [f"{value}/wide"], name=f"{value}/widen", to=TensorProto.FLOAT),
    ]
    return spliced(model, value, casts, f"{value}/wide")


def spliced(model: onnx.ModelProto, value: str, added: list[onnx.NodeProto], instead: str) -> onnx.ModelProto:
    nodes = []
    for node in model.graph.node:
        copy = onnx.NodeProto.FromString(node.SerializeToString())
        copy.input[:] = [instead if name == value else name for name in copy.input]
        nodes.append(copy)
        if value in copy.output:
            nodes += added
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    return model


def output_of(model: onnx.ModelProto, operator: str) -> str:
    """The output of the deciding part's first node of an operator."""
    part = part_of(model)
    return next(node.output[0] for node in model.graph.node if node.op_type == operator and node.name in part.nodes)


@pytest.mark.parametrize("operator", ["Softmax", "ReduceMean", "Where", "Div"])
def test_a_halved_decision_is_caught(operator: str, half: onnx.ModelProto) -> None:
    assert faults(half) == []
    assert faults(rounded_trip(half, output_of(half, operator))) != []


def test_a_softmax_in_half_precision_is_caught(half: onnx.ModelProto) -> None:
    softmax = output_of(half, "Softmax")
    node = next(item for item in half.graph.node if softmax in item.output)
    trip = rounded_trip(half, node.input[0])
    assert any("Softmax" in text or "MatMul" in text or "Mul" in text for text in faults(trip))


def test_a_rounded_saliency_is_caught(half: onnx.ModelProto) -> None:
    scale, zero = "saliency/scale", "saliency/zero"
    half.graph.initializer.extend(
        [helper.make_tensor(scale, TensorProto.FLOAT, [], [0.1]), helper.make_tensor(zero, TensorProto.INT8, [], [0])]
    )
    pair = [
        helper.make_node("QuantizeLinear", [SALIENCY, scale, zero], ["saliency/q"], name="saliency/down"),
        helper.make_node("DequantizeLinear", ["saliency/q", scale, zero], ["saliency/dq"], name="saliency/up"),
    ]
    model = spliced(half, SALIENCY, pair, "saliency/dq")
    assert any("is quantised" in text for text in faults(model))
    report = readiness_of(model, ["10.3"]).of("10.3")
    assert "quantized-decision" in {item.rule for item in report.findings if item.severity == "error"}


@pytest.mark.parametrize("family", ["llava", pytest.param("qwen2_5_vl", marks=pytest.mark.slow)])
def test_a_quantised_query_is_caught(
    family: str, llava_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    model = graphs_of(bundle_of(family, Precision.FP16, llava_checkpoint, tmp_path_factory), None)[0]
    products = part_of(model).products
    one = next(name for name in sorted(products, reverse=True))  # the query's, or Qwen's one product for all three
    broken = quantized(model, INT8, wanted=lambda node: node.name == one)
    assert [text for text in faults(broken) if one in text] == [f"{one} is quantised"]
    report = readiness_of(broken, ["10.3"]).of("10.3")
    assert "quantized-decision" in {item.rule for item in report.findings if item.severity == "error"}


def test_other_graphs_have_no_deciding_part() -> None:
    node = helper.make_node("TopK", ["x", "k"], ["y", "i"], name="top")
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [4]) for name in ("x", "y")]
    graph = helper.make_graph(
        [node], "g", values[:1], values[1:], [helper.make_tensor("k", TensorProto.INT64, [1], [2])]
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)])
    assert not is_vision_graph(view_of(model))
    assert not deciding_part(view_of(model), {}).nodes


# ------------------------------------------------------------------------------------------------------ how it is made


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_halving_adds_few_casts(family: str, llava_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """A CLIP tower gets two; Qwen's norms and rotary embeddings widen in its source. No node is doubled around them."""
    counts = {}
    for precision in (Precision.FP32, Precision.FP16):
        model = graphs_of(bundle_of(family, precision, llava_checkpoint, tmp_path_factory), None)[0]
        counts[precision] = sum(node.op_type == "Cast" for node in model.graph.node)
        assert len({node.name for node in model.graph.node}) == len(model.graph.node)
        onnx.checker.check_model(model)
    blocks = 4  # of the tiny Qwen; each has two norms, and queries and keys that are rotated
    allowed = 2 if family != "qwen2_5_vl" else 2 + 12 * blocks
    assert counts[Precision.FP16] - counts[Precision.FP32] <= allowed


def test_no_converter_with_a_list_of_blocked_nodes_is_used() -> None:
    """They wrote invalid graphs: see ADR 0005."""
    words = re.compile(r"onnxconverter_common|transformers\.float16|convert_float_to_float16|node_block_list|autocast")
    sources = sorted(Path(holov_export.__file__).parent.rglob("*.py"))
    assert len(sources) > 100
    assert [path.name for path in sources if words.search(path.read_text(encoding="utf-8"))] == []
