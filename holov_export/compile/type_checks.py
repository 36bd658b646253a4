"""The questions behind the rules about element types and TopK."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from holov_export.compile.deciding_part import QUANTIZERS
from holov_export.compile.graph_view import GraphView, attribute
from holov_export.compile.readiness_checks import Check, Hit, Question

if TYPE_CHECKING:
    from onnx import NodeProto

#: element types of ONNX in the words of TensorRT's support matrices
_MATRIX_WORDS = {
    "FLOAT": "FP32",
    "DOUBLE": "FP32",
    "FLOAT16": "FP16",
    "BFLOAT16": "BF16",
    "FLOAT8E4M3FN": "FP8",
    "FLOAT4E2M1": "FP4",
}
#: which value of a node the matrices speak of: the first input, but for these
_TYPED_INPUT = {"Where": 1, "OneHot": 2, "If": None, "Loop": None, "Scan": None, "Shape": None, "Size": None}
_TYPED_OUTPUT = frozenset({"Constant", "ConstantOfShape", "EyeLike", "RandomNormal", "RandomUniform"})
_INT32_END = 2**31


def _typed_values(ask: Question) -> Iterator[tuple[str, str]]:
    """(value, element type) of every value of which it is known, once for each graph."""
    for view in ask.view.graphs():
        yield from view.types.items()


def _named(names: list[str]) -> dict[str, Any]:
    return {"count": len(names), "value": names[0]}


def not_a_tensor(ask: Question) -> Iterator[Hit]:
    for value in (*ask.model.graph.input, *ask.model.graph.output):
        kind = value.type.WhichOneof("value")
        if kind is not None and kind != "tensor_type":
            yield Hit(facts={"value": value.name})


def type_unsupported(ask: Question) -> Iterator[Hit]:
    found: dict[str, list[str]] = {}
    for name, kind in _typed_values(ask):
        found.setdefault(kind, []).append(name)
    for kind, names in sorted(found.items()):
        first = ask.book.types.get(kind)
        if first is None:
            yield Hit(facts={**_named(names), "type": kind, "when": "no version up to 11.1 has it"})
        elif not ask.book.type_exists(kind, ask.version):
            yield Hit(facts={**_named(names), "type": kind, "when": f"from {first} on"})


def type_double(ask: Question) -> Iterator[Hit]:
    names = [name for name, kind in _typed_values(ask) if kind == "DOUBLE"]
    if names:
        yield Hit(facts=_named(names))


def type_uint8_inside(ask: Question) -> Iterator[Hit]:
    for view, node in ask.standard_nodes():
        if node.op_type in ("Cast", "DequantizeLinear", "Identity", "QuantizeLinear"):
            continue
        for name in node.input:
            if name and view.type_of(name) == "UINT8":
                yield Hit(node, {"value": name})


def type_bfloat16(ask: Question) -> Iterator[Hit]:
    if any(kind == "BFLOAT16" for _, kind in _typed_values(ask)):
        yield Hit()


def type_undocumented(ask: Question) -> Iterator[Hit]:
    for view, node in ask.standard_nodes():
        taken = ask.book.types_of(node.op_type, ask.version)
        kind = _kind_of(view, node)
        word = _MATRIX_WORDS.get(kind, kind)
        if word == "INT64" and ask.version < (9,):
            word = "INT32"
        if taken and word and word not in taken and ask.book.type_exists(kind, ask.version):
            yield Hit(node, {"type": kind, "types": ", ".join(sorted(taken))})


def _kind_of(view: GraphView, node: NodeProto) -> str:
    """The element type that a support matrix speaks of, "" if unknown."""
    if node.op_type in _TYPED_OUTPUT:
        return view.type_of(node.output[0]) if node.output else ""
    index = _TYPED_INPUT.get(node.op_type, 0)
    if index is None or index >= len(node.input):
        return ""
    return view.type_of(node.input[index])


def int64_becomes_int32(ask: Question) -> Iterator[Hit]:
    names = [name for name, kind in _typed_values(ask) if kind == "INT64"]
    graph = ask.model.graph
    outside = [value.name for value in (*graph.input, *graph.output) if ask.view.types.get(value.name) == "INT64"]
    if names:
        yield Hit(facts={"count": len(names), "names": ", ".join(outside) or "none"})


def int64_constant_clamped(ask: Question) -> Iterator[Hit]:
    harmless = {name for _, node in ask.standard_nodes() if node.op_type == "Slice" for name in node.input[1:3]}
    reads = {name for _, node in ask.view.walk() for name in node.input if node.op_type != "Slice"}
    for view in ask.view.graphs():
        for name in view.constants:
            if view.types.get(name) != "INT64" or (name in harmless and name not in reads):
                continue
            past = [number for number in view.values_of(name) or [] if not -_INT32_END <= number < _INT32_END]
            if past:
                yield Hit(facts={"value": name, "number": past[0]})


def float32_stays(ask: Question) -> Iterator[Hit]:
    """Only for a graph with a matrix product or convolution that has float32 weights and no narrower ones."""
    heavy = {"MatMul", "Gemm", "Conv", "ConvTranspose"}
    if any(node.op_type in QUANTIZERS for _, node in ask.standard_nodes()):
        return  # another rule says it of quantised graphs
    kinds = {view.type_of(node.input[0]) for view, node in ask.standard_nodes() if node.op_type in heavy}
    if "FLOAT" in kinds and not kinds & {"FLOAT16", "BFLOAT16", "FLOAT8E4M3FN"}:
        yield Hit()


# -------------------------------------------------------------------------------------------------------------- TopK


def topk_limit(ask: Question) -> Iterator[Hit]:
    for view, node in _topks(ask):
        k = view.values_of(node.input[1]) if len(node.input) > 1 else [attribute(node, "k", 0)]
        if k and k[0] > ask.limit:
            yield Hit(node, {"k": k[0], "limit": ask.limit})


def topk_unbounded(ask: Question) -> Iterator[Hit]:
    for view, node in _topks(ask):
        shape = view.shape_of(node.input[0]) or ()
        axis = int(attribute(node, "axis", -1))
        length = shape[axis] if -len(shape) <= axis < len(shape) else None
        computed = len(node.input) > 1 and not view.is_constant(node.input[1])
        if computed and isinstance(length, int) and length > ask.limit:
            yield Hit(node, {"length": length, "limit": ask.limit})


def topk_of_request(ask: Question) -> Iterator[Hit]:
    """K is computed, and no length of the axis is fixed; the same words for all of them, so once for the graph."""
    for view, node in _topks(ask):
        shape = view.shape_of(node.input[0]) or ()
        axis = int(attribute(node, "axis", -1))
        length = shape[axis] if -len(shape) <= axis < len(shape) else None
        if len(node.input) > 1 and not view.is_constant(node.input[1]) and not isinstance(length, int):
            yield Hit(facts={"limit": ask.limit})


def topk_integer(ask: Question) -> Iterator[Hit]:
    for view, node in _topks(ask):
        kind = view.type_of(node.input[0])
        if kind in ("INT32", "INT64", "UINT8", "INT8"):
            yield Hit(node, {"type": kind})


def _topks(ask: Question) -> Iterator[tuple[GraphView, NodeProto]]:
    return ((view, node) for view, node in ask.standard_nodes() if node.op_type == "TopK")


TYPE_CHECKS: dict[str, Check] = {
    "not-a-tensor": not_a_tensor,
    "type-unsupported": type_unsupported,
    "type-double": type_double,
    "type-uint8-inside": type_uint8_inside,
    "type-bfloat16": type_bfloat16,
    "type-undocumented": type_undocumented,
    "int64-becomes-int32": int64_becomes_int32,
    "int64-constant-clamped": int64_constant_clamped,
    "float32-stays": float32_stays,
    "topk-limit": topk_limit,
    "topk-unbounded": topk_unbounded,
    "topk-of-request": topk_of_request,
    "topk-integer": topk_integer,
    "topk-integer-rounded": topk_integer,
}
