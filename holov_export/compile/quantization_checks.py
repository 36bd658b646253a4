"""The questions behind the rules about quantised graphs: Q/DQ nodes as TensorRT reads them, and where they may be."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from holov_export.compile.deciding_part import PRODUCTS, QUANTIZERS, deciding_part, is_vision_graph, quantized_nodes
from holov_export.compile.graph_view import GraphView, attribute, elements
from holov_export.compile.readiness_checks import Check, Hit, Question
from holov_export.compile.rewrites import label_of

if TYPE_CHECKING:
    from onnx import NodeProto

#: the rule about graphs that were quantised for another engine: the others about Q/DQ nodes say nothing new of them
FOR_CPU = "quantized-for-cpu"
_DOWN, _UP = QUANTIZERS
#: what keeps its floats: no kernel of 8 bits, or too much is lost
_FLOAT_OPERATORS = ("Softmax", "LogSoftmax")
_WEIGHTED = (*PRODUCTS, "ConvTranspose")
_BIAS = 2  # the input of Gemm and Conv


def _pairs(ask: Question) -> Iterator[tuple[GraphView, NodeProto]]:
    """(graph, node) of every QuantizeLinear and DequantizeLinear."""
    return ((view, node) for view, node in ask.standard_nodes() if node.op_type in QUANTIZERS)


def _maker(view: GraphView, name: str) -> NodeProto | None:
    home = view.home_of(name)
    return home.makers.get(name) if home is not None else None


def _dequantized(view: GraphView, name: str) -> bool:
    maker = _maker(view, name)
    return maker is not None and maker.op_type == _UP


def quantized_for_cpu(ask: Question) -> Iterator[Hit]:
    """Once for each operator: such a graph has one for each of its products."""
    found: dict[str, list[NodeProto]] = {}
    for _, node in ask.view.walk():
        if ask.book.is_integer_operator(node.domain, node.op_type):
            found.setdefault(node.op_type, []).append(node)
    for nodes in found.values():
        yield Hit(nodes[0], {"count": len(nodes)})


def zero_point(ask: Question) -> Iterator[Hit]:
    for view, node in _pairs(ask):
        if len(node.input) < 3 or not node.input[2]:
            continue
        name, values = node.input[2], view.values_of(node.input[2])
        if view.type_of(name) == "UINT8":
            yield Hit(node, {"value": name, "number": "UINT8"})
        elif values and any(values):
            yield Hit(node, {"value": name, "number": next(number for number in values if number)})


def zero_point_missing(ask: Question) -> Iterator[Hit]:
    for _, node in _pairs(ask):
        if len(node.input) > 2 and node.input[2]:
            continue
        if node.op_type == _DOWN and (ask.version < (9,) or not attribute(node, "output_dtype", 0)):
            yield Hit(node, {"why": "ONNX then rounds to UINT8, TensorRT to INT8"})
        elif ask.version < (9,):
            yield Hit(node, {"why": f"the parser of TensorRT {ask.tensorrt} wants three inputs"})


def scale_not_constant(ask: Question) -> Iterator[Hit]:
    for view, node in _pairs(ask):
        if not view.is_constant(node.input[1]):
            yield Hit(node, {"value": node.input[1]})


def scale_not_positive(ask: Question) -> Iterator[Hit]:
    for view, node in _pairs(ask):
        found = [number for number in view.values_of(node.input[1]) or [] if not number > 0]
        if found:
            yield Hit(node, {"value": node.input[1], "number": found[0]})


def activation_by_channel(ask: Question) -> Iterator[Hit]:
    for view, node in _pairs(ask):
        count = elements(view.shape_of(node.input[1]))
        if count is not None and count > 1 and not view.is_constant(node.input[0]):
            yield Hit(node, {"value": node.input[0], "count": count})


def scale_axis_missing(ask: Question) -> Iterator[Hit]:
    for view, node in _pairs(ask):
        count = elements(view.shape_of(node.input[1]))
        if count is not None and count > 1 and attribute(node, "axis") is None:
            yield Hit(node, {"count": count})


def scale_axis(ask: Question) -> Iterator[Hit]:
    """Scales of a weight lie along the output channels of the product that reads it."""
    for view, node in ask.standard_nodes():
        if node.op_type not in _WEIGHTED or not _dequantized(view, node.input[1]):
            continue
        made = _maker(view, node.input[1])
        shape = view.shape_of(made.input[0]) if made is not None else None
        if made is None or shape is None or not view.is_constant(made.input[0]):
            continue
        count, axis = elements(view.shape_of(made.input[1])), attribute(made, "axis")
        if count is None or count == 1 or axis is None:
            continue
        wanted = _channel_axis(node, len(shape))
        if axis % len(shape) != wanted:
            yield Hit(made, {"axis": axis, "wanted": wanted, "product": label_of(node)})


def _channel_axis(node: NodeProto, rank: int) -> int:
    """The axis of the weights that becomes the channels of the output."""
    if node.op_type == "MatMul":
        return rank - 1
    if node.op_type == "Gemm":
        return 0 if attribute(node, "transB", 0) else 1
    return 0 if node.op_type == "Conv" else 1


def bias_quantized(ask: Question) -> Iterator[Hit]:
    for view, node in _pairs(ask):
        if node.op_type == _UP and view.type_of(node.input[0]) == "INT32":
            yield Hit(node, {"value": node.input[0]})


def product_of_mixed(ask: Question) -> Iterator[Hit]:
    """A product with weights of which one factor is quantised and the other is not."""
    for view, node in ask.standard_nodes():
        if node.op_type not in PRODUCTS:
            continue
        rounded = [_dequantized(view, name) for name in node.input[:2]]
        if any(rounded) and not all(rounded):
            yield Hit(node, {"value": node.input[rounded.index(False)]})


def quantized_elsewhere(ask: Question) -> Iterator[Hit]:
    """In our own vision graphs: what reads quantised values and is no product with weights."""
    if not is_vision_graph(ask.view):
        return
    for view, node in ask.view.walk():
        for index, name in enumerate(node.input):
            allowed = node.op_type in PRODUCTS and index < _BIAS
            if name and not allowed and node.op_type not in QUANTIZERS and _dequantized(view, name):
                yield Hit(node, {"value": name})


def quantized_float_operator(ask: Question) -> Iterator[Hit]:
    if is_vision_graph(ask.view):
        return  # `quantized_elsewhere` is stricter
    for view, node in ask.standard_nodes():
        kept = node.op_type in _FLOAT_OPERATORS or node.op_type.endswith("Normalization")
        if kept and node.input and _dequantized(view, node.input[0]):
            yield Hit(node, {"value": node.input[0]})


def quantized_decision(ask: Question) -> Iterator[Hit]:
    for node in quantized_nodes(ask.view, deciding_part(ask.view, {})):
        yield Hit(node)


def type_fp8(ask: Question) -> Iterator[Hit]:
    if any(kind == "FLOAT8E4M3FN" for view in ask.view.graphs() for kind in view.types.values()):
        yield Hit()


def float32_between(ask: Question) -> Iterator[Hit]:
    """A quantised graph whose other floats are float32."""
    if any(view.type_of(node.output[0]) == "FLOAT" for view, node in _pairs(ask) if node.op_type == _UP):
        yield Hit()


QUANTIZATION_CHECKS: dict[str, Check] = {
    FOR_CPU: quantized_for_cpu,
    "zero-point": zero_point,
    "zero-point-missing": zero_point_missing,
    "scale-not-constant": scale_not_constant,
    "scale-not-positive": scale_not_positive,
    "activation-by-channel": activation_by_channel,
    "scale-axis-missing": scale_axis_missing,
    "scale-axis": scale_axis,
    "bias-quantized": bias_quantized,
    "product-of-mixed": product_of_mixed,
    "quantized-elsewhere": quantized_elsewhere,
    "quantized-float-operator": quantized_float_operator,
    "quantized-decision": quantized_decision,
    "type-fp8": type_fp8,
    "float32-between": float32_between,
}
