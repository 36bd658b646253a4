"""Negative controls of the readiness check: for each rule a small graph that it must find, and where."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

#: TensorRT versions that every control is asked for
ASKED = ("8.5", "8.6", "8.6.2", "9.3", "10.3", "10.8", "10.13", "10.16", "11.1")
ALL = ASKED
TENSORRT_8 = ("8.5", "8.6", "8.6.2")
FROM_9 = ("9.3", "10.3", "10.8", "10.13", "10.16", "11.1")
BEFORE_10_8 = ("8.5", "8.6", "8.6.2", "9.3", "10.3")
BEFORE_10_12 = (*BEFORE_10_8, "10.8")

Shape = Sequence[int | str] | None
FLOAT, INT32, INT64, BOOL = TensorProto.FLOAT, TensorProto.INT32, TensorProto.INT64, TensorProto.BOOL


@dataclass(frozen=True)
class Control:
    """A graph, the rule that must find something in it, and the versions of `ASKED` where it must."""

    rule: str
    build: Callable[[], onnx.ModelProto]
    fires: tuple[str, ...]
    name: str = ""


def value(name: str, kind: int = FLOAT, shape: Shape = (2, 3)) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, shape)


def constant(name: str, array: Any) -> onnx.TensorProto:
    return numpy_helper.from_array(np.asarray(array), name)


def node(operator: str, inputs: Sequence[str], outputs: Sequence[str], **settings: Any) -> onnx.NodeProto:
    return helper.make_node(operator, inputs, outputs, name=f"the/{operator}", **settings)


def model(
    nodes: Sequence[onnx.NodeProto],
    inputs: Sequence[onnx.ValueInfoProto] | None = None,
    outputs: Sequence[onnx.ValueInfoProto] | None = None,
    constants: Sequence[onnx.TensorProto] = (),
    *,
    opset: int = 17,
    notes: Sequence[onnx.ValueInfoProto] = (),
) -> onnx.ModelProto:
    """A model; x float [2, 3] -> y unless said otherwise."""
    graph = helper.make_graph(
        nodes, "broken", inputs or [value("x")], outputs or [value("y", shape=None)], constants, value_info=notes
    )
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid("own", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8)


def one(operator: str, *inputs: str, opset: int = 17, constants: dict[str, Any] | None = None, **settings: Any) -> Any:
    """A builder of a model of one node that reads x and constants."""
    held = [constant(name, array) for name, array in (constants or {}).items()]
    return lambda: model([node(operator, inputs, ["y"], **settings)], constants=held, opset=opset)


def one_of_kind(operator: str, kind: int, shape: Shape = (2, 3), **settings: Any) -> Any:
    """A builder of a model of one node that reads x of an element type."""
    return lambda: model(
        [node(operator, ["x"], ["y"], **settings)], [value("x", kind, shape)], [value("y", kind, shape)]
    )


# ------------------------------------------------------------------------------------------------------ larger graphs


def external(location: str) -> onnx.ModelProto:
    weight = constant("w", np.zeros((3, 3), np.float32))
    onnx.external_data_helper.set_external_data(weight, location)
    weight.ClearField("raw_data")
    return model([node("MatMul", ["x", "w"], ["y"])], constants=[weight])


def local_function() -> onnx.ModelProto:
    made = model([node("Twice", ["x"], ["y"], domain="own")])
    inner = helper.make_node("Add", ["a", "a"], ["b"])
    made.functions.append(helper.make_function("own", "Twice", ["a"], ["b"], [inner], [helper.make_opsetid("", 17)]))
    return made


def sequence_output() -> onnx.ModelProto:
    kind = helper.make_sequence_type_proto(helper.make_tensor_type_proto(FLOAT, None))
    return model([node("SequenceConstruct", ["x"], ["y"])], outputs=[helper.make_value_info("y", kind)])


def topk(k: Any, kind: int = FLOAT, length: int | str = 5000) -> onnx.ModelProto:
    """The largest k of x; k is a constant, or "budget" for an input."""
    inputs = [value("x", kind, (1, length))] + ([value("budget", INT64, (1,))] if k == "budget" else [])
    held = [] if k == "budget" else [constant("k", np.array([k]))]
    name = "budget" if k == "budget" else "k"
    outputs = [value("y", kind, None), value("places", INT64, None)]
    return model([node("TopK", ["x", name], ["y", "places"])], inputs, outputs, held)


def k_from_scores(operator: str = "ReduceMax") -> onnx.ModelProto:
    """K is computed from the scores themselves."""
    nodes = [
        node(operator, ["x"], ["best"], **({"keepdims": 0} if operator == "ReduceMax" else {"axis": -1})),
        node("Cast", ["best"], ["whole"], to=INT64),
        node("Reshape", ["whole", "flat"], ["k"]),
        node("Slice", ["x", "zero", "k", "one"], ["y"]),
    ]
    held = [constant(name, np.array([number])) for name, number in (("flat", -1), ("zero", 0), ("one", 1))]
    return model(nodes, constants=held)


def k_from_input(kind: int, shape: Shape) -> onnx.ModelProto:
    """The shape of y is an input."""
    nodes = [node("Cast", ["size"], ["whole"], to=INT64), node("Expand", ["x", "whole"], ["y"])]
    return model(nodes, [value("x", shape=(1,)), value("size", kind, shape)])


def large_shape_value() -> onnx.ModelProto:
    """A hundred numbers of which the largest becomes a length."""
    nodes = [
        node("ReduceMax", ["numbers"], ["length"], keepdims=1),
        node("Expand", ["x", "length"], ["y"]),
    ]
    return model(nodes, [value("x", shape=(1,)), value("numbers", INT64, (100,))])


def clashing_names() -> onnx.ModelProto:
    nodes = [node("Relu", ["x"], ["z"]), node("Sigmoid", ["z"], ["y"])]
    notes = [value("z", shape=("s0", 3))]
    return model(nodes, [value("x", shape=("batch", 3))], [value("y", shape=("batch", 3))], notes=notes)


def loop(
    *,
    trips: Any = 3,
    going: str = "yes",
    counts: bool = False,
    scans: bool = False,
    grows: bool = False,
    computed: bool = False,
    body_shape: Shape = (2, 3),
) -> onnx.ModelProto:
    """A Loop that adds one to what it carries; `grows` appends instead."""
    step = node("Concat", ["carried", "carried"], ["carried_out"], axis=0) if grows else None
    step = step or node("Add", ["carried", "carried"], ["carried_out"])
    if body_shape != (2, 3):
        step = node("ReduceSum", ["carried", "axes"], ["carried_out"], keepdims=0)
    inner = [step, node("Identity", ["going"], ["going_out"])]
    if counts:
        inner.append(node("Neg", ["turn"], ["unused"]))
    outputs = [value("going_out", BOOL, ()), value("carried_out", shape=None if grows else body_shape)]
    if scans:
        inner.append(node("Identity", ["carried"], ["scanned"]))
        outputs.append(value("scanned", shape=None))
    body = helper.make_graph(
        inner,
        "body",
        [value("turn", INT64, ()), value("going", BOOL, ()), value("carried", shape=None if grows else (2, 3))],
        outputs,
    )
    held = [constant("yes", np.array(True)), constant("axes", np.array([0]))]
    inputs = [value("x")]
    if computed:
        inputs.append(value("trips", INT64, ()))
    elif trips is not None:
        held.append(constant("trips", np.array(trips, np.int64)))
    first = "trips" if computed or trips is not None else ""
    results = [value("y", shape=None)] + ([value("rows", shape=None)] if scans else [])
    outer = node("Loop", [first, going, "x"], ["y", "rows"][: len(results)], body=body)
    return model([outer], inputs, results, held)


def branches(left: Sequence[str], right: Sequence[str], *, ranks: tuple[int, int] = (2, 2)) -> onnx.ModelProto:
    made = []
    for label, names, rank in (("then", left, ranks[0]), ("else", right, ranks[1])):
        operator = "Relu" if rank == 2 else "Flatten"
        inner = [helper.make_node(operator, ["x"], [name], name=f"{label}/{operator}") for name in names]
        if rank == 1:
            inner = [helper.make_node("ReduceMax", ["x"], [name], axes=[0], keepdims=0) for name in names]
        made.append(helper.make_graph(inner, label, [], [value(name, shape=None) for name in names]))
    outer = node("If", ["yes"], ["y"], then_branch=made[0], else_branch=made[1])
    return model([outer], constants=[constant("yes", np.array(True))])


def quantised(zero: Any) -> onnx.ModelProto:
    nodes = [
        node("QuantizeLinear", ["x", "scale", "zero"], ["q"]),
        node("DequantizeLinear", ["q", "scale", "zero"], ["y"]),
    ]
    return model(nodes, constants=[constant("scale", np.float32(0.1)), constant("zero", zero)])


def uint8_arithmetic() -> onnx.ModelProto:
    nodes = [node("Mul", ["x", "x"], ["z"]), node("Cast", ["z"], ["y"], to=FLOAT)]
    return model(nodes, [value("x", TensorProto.UINT8)])


def half_float_widths() -> onnx.ModelProto:
    """bfloat16, in the opset where a cast and a relu have it."""
    return model([node("Relu", ["x"], ["y"])], [value("x", TensorProto.BFLOAT16)], [value("y", TensorProto.BFLOAT16)])


def many_axes() -> onnx.ModelProto:
    nine = (1,) * 9
    return model([node("Relu", ["x"], ["y"])], [value("x", shape=nine)], [value("y", shape=nine)])


BIG = np.array([2**40, 0])
SIX = np.zeros(4, np.int64)

CONTROLS: tuple[Control, ...] = (
    Control("external-data-outside", lambda: external("../weights.data"), ALL),
    Control("cannot-lower", one("GridSample", "x", "x", opset=20), TENSORRT_8, "form"),
    Control("cannot-lower", one("Split", "x", opset=18, num_outputs=2), TENSORRT_8, "split"),
    Control("opset-too-old", one("Relu", "x", opset=6), ALL, "6"),
    Control("opset-too-old", one("Relu", "x", opset=8), ("10.3", "10.8", "10.13", "10.16", "11.1"), "8"),
    Control("opset-above-range", one("Relu", "x", opset=21), ("9.3", "10.3", "10.8", "10.13"), "21"),
    Control("opset-above-range", one("Relu", "x", opset=20), ("9.3",), "20"),
    Control("opset-above-range", one("Relu", "x", opset=25), FROM_9, "25"),
    Control(
        "operator-form",
        one("GroupNormalization", "x", "w", "w", opset=21, constants={"w": np.ones(3, np.float32)}, num_groups=1),
        ("9.3", "10.3", "10.8"),
    ),
    Control("operator-unsupported", one("Unique", "x"), ALL, "never"),
    Control("operator-unsupported", one("NotAnOperator", "x"), ALL, "unknown"),
    Control("operator-unsupported", one("IsInf", "x"), ("8.5",), "since 8.6"),
    Control("operator-unsupported", one("HannWindow", "x"), (*TENSORRT_8, "9.3", "10.3"), "since 10.4"),
    Control("custom-operator", one("Anything", "x", domain="own"), ALL),
    Control("local-functions", local_function, TENSORRT_8),
    Control("not-a-tensor", sequence_output, ALL),
    Control("type-unsupported", half_float_widths, TENSORRT_8, "bfloat16"),
    Control("type-unsupported", one_of_kind("Relu", TensorProto.FLOAT8E4M3FN), TENSORRT_8, "fp8"),
    Control("type-unsupported", one_of_kind("Identity", TensorProto.INT4), (*TENSORRT_8, "9.3"), "int4"),
    Control("type-unsupported", one_of_kind("Identity", TensorProto.FLOAT4E2M1), BEFORE_10_8, "fp4"),
    Control("type-unsupported", one_of_kind("Identity", TensorProto.UINT16), ALL, "uint16"),
    Control("type-unsupported", one_of_kind("Identity", TensorProto.STRING), ALL, "string"),
    Control("type-double", one_of_kind("Relu", TensorProto.DOUBLE), ALL),
    Control("type-uint8-inside", uint8_arithmetic, ALL),
    Control("type-bfloat16", half_float_widths, FROM_9),
    Control("type-undocumented", one_of_kind("Erf", INT32), ALL, "never"),
    Control("type-undocumented", one_of_kind("ArgMax", INT32), ("8.5",), "before 8.6"),
    Control("int64-becomes-int32", one_of_kind("Add", INT64), TENSORRT_8),
    Control(
        "int64-constant-clamped",
        lambda: model(
            [node("Add", ["x", "n"], ["y"])], [value("x", INT64, (2,))], [value("y", INT64, (2,))], [constant("n", BIG)]
        ),
        TENSORRT_8,
    ),
    Control("zero-point", lambda: quantised(np.int8(3)), ALL, "shifted"),
    Control("zero-point", lambda: quantised(np.uint8(0)), ALL, "unsigned"),
    Control("float32-stays", one("MatMul", "x", "w", constants={"w": np.ones((3, 3), np.float32)}), ("11.1",)),
    Control("topk-limit", lambda: topk(3841), ALL),
    Control("topk-unbounded", lambda: topk("budget"), ALL),
    Control("topk-of-request", lambda: topk("budget", length="tokens"), ALL[1:]),
    Control("topk-integer", lambda: topk(3, INT32), ("8.5",)),
    Control("topk-integer-rounded", lambda: topk(3, INT32), ("8.6", "8.6.2")),
    Control("einsum-form", one("Einsum", "x", equation="...i->...i"), BEFORE_10_12, "ellipsis"),
    Control("einsum-form", one("Einsum", "x", equation="ii->i"), BEFORE_10_12, "diagonal"),
    Control(
        "scatternd-form",
        one("ScatterND", "x", "i", "x", opset=18, constants={"i": np.zeros((2, 1), np.int64)}),
        ("9.3", "10.3", "10.8"),
    ),
    Control("cumsum-loop", one("CumSum", "x", "axis", constants={"axis": np.array(1)}), BEFORE_10_8),
    Control(
        "data-dependent-shape", lambda: model([node("NonZero", ["x"], ["y"])], outputs=[value("y", INT64, None)]), ALL
    ),
    Control("shape-from-data", k_from_scores, ALL, "maximum of the scores"),
    Control("shape-from-data", lambda: k_from_scores("Softmax"), ALL, "softmax"),
    Control("shape-from-data", lambda: k_from_input(FLOAT, (1,)), ALL, "float input"),
    Control("shape-from-data", lambda: k_from_input(INT64, ("n",)), ALL, "input of any length"),
    Control("shape-value-size", large_shape_value, ALL),
    Control("axis-names-clash", clashing_names, ALL),
    Control("loop-trip-count", lambda: loop(trips=None), ALL, "none"),
    Control("loop-trip-count", lambda: loop(trips=2**63 - 1), ALL, "endless"),
    Control("loop-unregistered-input", lambda: loop(going=""), ALL, "condition"),
    Control("loop-unregistered-input", lambda: loop(trips=2**63 - 1, counts=True), ALL, "iteration number"),
    Control("loop-scan-length", lambda: loop(scans=True, computed=True), ALL),
    Control("loop-carried-shape", lambda: loop(grows=True), ALL, "grows"),
    Control("loop-carried-shape", lambda: loop(body_shape=(3,)), ALL, "loses an axis"),
    Control("if-output-names", lambda: branches(["same"], ["same"]), ALL),
    Control("if-output-rank", lambda: branches(["one"], ["other"], ranks=(2, 1)), ALL),
    Control("rank-limit", many_axes, ALL),
)
