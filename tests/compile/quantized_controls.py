"""Negative controls of the rules about quantised graphs: each wrong in one way; `sound` is wrong in none."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import ml_dtypes
import numpy as np
import onnx
from broken_graphs import ALL, FLOAT, FROM_9, INT32, INT64, TENSORRT_8, Control, constant, model, value
from onnx import helper

ONE, THREE = np.float32(0.1), np.full(3, 0.1, np.float32)
ZERO, ZEROS = np.int8(0), np.zeros(3, np.int8)
WEIGHTS = np.ones((3, 3), np.int8)


def up(source: str, scale: str = "scale", zero: str = "zero", name: str = "", **settings: Any) -> onnx.NodeProto:
    made = name or f"{source}.up"
    inputs = [source, scale, zero] if zero else [source, scale]
    return helper.make_node("DequantizeLinear", inputs, [made], name=f"the/up of {source}", **settings)


def down(source: str, scale: str = "scale", zero: str = "zero", **settings: Any) -> onnx.NodeProto:
    inputs = [source, scale, zero] if zero else [source, scale]
    return helper.make_node("QuantizeLinear", inputs, [f"{source}.down"], name=f"the/down of {source}", **settings)


def product(
    *,
    nodes: Sequence[onnx.NodeProto] = (),
    operator: str = "MatMul",
    factors: tuple[str, str] = ("x.down.up", "w.up"),
    axis: int | None = 1,
    held: dict[str, Any] | None = None,
    opset: int = 18,
    **settings: Any,
) -> onnx.ModelProto:
    """x [2, 3] is quantised and multiplied by stored INT8 weights with a scale for each output channel.

    Args:
        nodes: instead of the Q/DQ nodes of x. factors: of the product. axis: of the scales of the weights.
        held: constants instead of these. settings: attributes of the product.
    """
    constants: dict[str, Any] = {"scale": ONE, "zero": ZERO, "scales": THREE, "zeros": ZEROS, "w": WEIGHTS}
    constants |= held or {}
    by_channel = {} if axis is None else {"axis": axis}
    made = [*(nodes or (down("x"), up("x.down"))), up("w", "scales", "zeros", **by_channel)]
    made.append(helper.make_node(operator, [name for name in factors if name], ["y"], name="the/product", **settings))
    read = {name for item in made for name in item.input}
    return model(made, constants=[constant(n, a) for n, a in constants.items() if n in read], opset=opset)


def sound() -> onnx.ModelProto:
    return product()


def eight_bit_floats() -> onnx.ModelProto:
    kind = ml_dtypes.float8_e4m3fn
    held = {"zero": np.zeros((), kind), "zeros": np.zeros(3, kind), "w": WEIGHTS.astype(kind)}
    return product(held=held, opset=19)


def scale_from_data() -> onnx.ModelProto:
    top = helper.make_node("ReduceMax", ["x"], ["top"], name="the/top", keepdims=0)
    return product(nodes=(top, down("x", "top"), up("x.down", "top")))


def float_weights(**settings: Any) -> onnx.ModelProto:
    """The weights are float32, with a QuantizeLinear and a DequantizeLinear."""
    nodes = (down("x"), up("x.down"), down("w", "scales", "zeros", **settings), up("w.down", "scales", "zeros", axis=1))
    held = {"w": WEIGHTS.astype(np.float32)}
    made = product(nodes=nodes, factors=("x.down.up", "w.down.up"), held=held)
    del made.graph.node[4]  # the DequantizeLinear of stored weights
    return made


def bias_of_integers() -> onnx.ModelProto:
    nodes = (down("x"), up("x.down"), up("b", "scales", "", axis=0))
    made = product(nodes=nodes, held={"b": np.ones(3, np.int32)})
    made.graph.node[-1].output[0] = "p"
    made.graph.node.append(helper.make_node("Add", ["p", "b.up"], ["y"], name="the/bias"))
    return made


def vision(*, of_saliency: bool = False, of_norm: bool = False, of_product: bool = False) -> onnx.ModelProto:
    """A vision graph of this package in a few nodes: x decides through a product `p`, `t` are the tokens."""
    nodes = [
        helper.make_node("MatMul", ["x", "k"], ["p"], name="the/key"),
        helper.make_node("Softmax", ["p"], ["saliency"], name="the/softmax"),
        helper.make_node("TopK", ["saliency", "two"], ["top", "positions"], name="the/top"),
        helper.make_node("LayerNormalization", ["x", "g"], ["n"], name="the/norm"),
        down("n"),
        up("n.down"),
        up("w", "scales", "zeros", axis=1),
        helper.make_node("MatMul", ["n.down.up", "w.up"], ["visual_tokens"], name="the/tokens"),
        helper.make_node("Shape", ["x"], ["counts"], name="the/counts", start=0, end=1),
    ]
    if of_saliency:
        nodes[1].output[0] = "s"
        nodes[2:2] = [down("s"), up("s.down", name="saliency")]
    if of_norm:
        nodes[3].input[0] = "x.down.up"
        nodes[3:3] = [down("x"), up("x.down")]
    if of_product:
        nodes[0].input[0] = "x.down.up"
        nodes[0:0] = [down("x"), up("x.down")]
    held = {
        "k": np.eye(3, dtype=np.float32), "g": np.ones(3, np.float32), "two": np.array([2]),
        "scale": ONE, "zero": ZERO, "scales": THREE, "zeros": ZEROS, "w": WEIGHTS,
    }  # fmt: skip
    outputs = [value("visual_tokens", FLOAT), value("saliency", FLOAT)]
    outputs += [value("positions", INT64, (2, 2)), value("counts", INT64, (1,))]
    return model(nodes, outputs=outputs, constants=[constant(name, array) for name, array in held.items()])


def of_engine(operator: str, domain: str) -> Callable[[], onnx.ModelProto]:
    return lambda: model(
        [helper.make_node(operator, ["x"], ["y"], name="the/integer", domain=domain)],
        outputs=[value("y", INT32, None)],
    )


QUANTIZED_CONTROLS: tuple[Control, ...] = (
    Control("quantized-for-cpu", of_engine("DynamicQuantizeLinear", ""), ALL, "onnx"),
    Control("quantized-for-cpu", of_engine("DynamicQuantizeMatMul", "com.microsoft"), ALL, "microsoft"),
    Control("zero-point", lambda: product(held={"zero": np.uint8(0)}), ALL, "of a product"),
    Control("zero-point-missing", lambda: product(nodes=(down("x", zero=""), up("x.down"))), ALL, "down"),
    Control("zero-point-missing", lambda: product(nodes=(down("x"), up("x.down", zero=""))), TENSORRT_8, "up"),
    Control("scale-not-constant", scale_from_data, ALL),
    Control("scale-not-positive", lambda: product(held={"scale": np.float32(0)}), ALL, "zero"),
    Control("scale-not-positive", lambda: product(held={"scales": -THREE}), ALL, "below"),
    Control("scale-not-positive", lambda: product(held={"scale": np.float32(np.nan)}), ALL, "nan"),
    Control(
        "activation-by-channel",
        lambda: product(nodes=(down("x", "scales", "zeros", axis=1), up("x.down", "scales", "zeros", axis=1))),
        ALL,
    ),
    Control("scale-axis-missing", lambda: product(axis=None), ALL),
    Control("scale-axis", lambda: product(axis=0), ALL, "MatMul"),
    Control("scale-axis", lambda: product(axis=1, operator="Gemm", transB=1), ALL, "Gemm"),
    Control("bias-quantized", bias_of_integers, ALL),
    Control("product-of-mixed", lambda: product(factors=("x", "w.up")), ALL),
    Control("quantized-elsewhere", lambda: vision(of_norm=True), ALL),
    Control("quantized-decision", lambda: vision(of_saliency=True), ALL, "saliency"),
    Control("quantized-decision", lambda: vision(of_product=True), ALL, "product"),
    Control(
        "quantized-float-operator",
        lambda: product(nodes=(down("x"), up("x.down")), operator="Softmax", factors=("x.down.up", "")),
        ALL,
    ),
    Control("type-fp8", eight_bit_floats, FROM_9),
    Control("float32-between", sound, FROM_9),
)
