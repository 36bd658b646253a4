"""The questions behind the rules about shapes, control flow and the files of a model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from holov_export.compile.graph_view import Axis, GraphView, tensor_type
from holov_export.compile.readiness_checks import Check, Hit, Question
from holov_export.compile.shape_trace import shape_faults
from holov_export.extras import require

if TYPE_CHECKING:
    from onnx import NodeProto

#: operators whose number of outputs depends on values
_DATA_DEPENDENT = frozenset({"Compress", "NonMaxSuppression", "NonZero", "StringSplit", "Unique"})
#: trip counts that exporters write for "until the condition fails"
_ENDLESS = 2**31 - 1


def data_dependent_shape(ask: Question) -> Iterator[Hit]:
    yield from (Hit(node) for _, node in ask.standard_nodes() if node.op_type in _DATA_DEPENDENT)


def shape_from_data(ask: Question) -> Iterator[Hit]:
    for fault in shape_faults(ask.view, 2**63):
        yield Hit(fault.node, {"index": fault.index, "origin": fault.origin})


def shape_value_size(ask: Question) -> Iterator[Hit]:
    for fault in shape_faults(ask.view, ask.limit):
        if not fault.origin:
            facts = {"index": fault.index, "value": fault.value, "elements": fault.elements, "limit": ask.limit}
            yield Hit(fault.node, facts)


def rank_unsupported(ask: Question) -> Iterator[Hit]:
    for pattern in ask.book.rank:
        for view, node in ask.standard_nodes() if pattern.applies(ask.version) else ():
            if node.op_type != pattern.operator or pattern.index >= len(node.input):
                continue
            shape = view.shape_of(node.input[pattern.index])
            if shape is not None and len(shape) not in pattern.allowed:
                allowed = " or ".join(str(rank) for rank in pattern.allowed)
                yield Hit(node, {"index": pattern.index, "rank": len(shape), "allowed": allowed}, pattern.source)


def rank_limit(ask: Question) -> Iterator[Hit]:
    for view in ask.view.graphs():
        for name, shape in view.shapes.items():
            if len(shape) > ask.limit:
                yield Hit(view.makers.get(name), {"value": name, "rank": len(shape), "limit": ask.limit})


def axis_names_clash(ask: Question) -> Iterator[Hit]:
    """Compare the shapes that are noted in the graph with those that follow from its inputs."""
    onnx = require("onnx")
    noted = {value.name: tensor_type(value)[1] for value in ask.model.graph.value_info}
    if not noted:
        return
    bare = type(ask.model)()
    bare.CopyFrom(ask.model)
    bare.graph.ClearField("value_info")
    try:
        followed = onnx.shape_inference.infer_shapes(bare, data_prop=True).graph.value_info
    except (onnx.shape_inference.InferenceError, ValueError, RuntimeError):
        return
    for value in followed:
        ours, theirs = noted.get(value.name), tensor_type(value)[1]
        if ours is not None and theirs is not None and _clash(ours, theirs):
            yield Hit(ask.view.makers.get(value.name), {"value": value.name, "noted": ours, "inferred": theirs})
            return  # one shows the way; a graph that has one has hundreds


def _clash(noted: tuple[Axis, ...], followed: tuple[Axis, ...]) -> bool:
    """True if one axis has two names; names that inference makes up ("unk__3") say nothing."""
    if len(noted) != len(followed):
        return False
    return any(
        isinstance(ours, str) and isinstance(theirs, str) and not theirs.startswith("unk__") and ours != theirs
        for ours, theirs in zip(noted, followed, strict=True)
    )


# ------------------------------------------------------------------------------------------------------ control flow


def _loops(ask: Question) -> Iterator[tuple[GraphView, NodeProto, GraphView]]:
    """(graph, Loop, its body)."""
    for view, node in ask.standard_nodes():
        if node.op_type == "Loop":
            for body in view.bodies_of(node):
                yield view, node, body


def _trip_count(view: GraphView, node: NodeProto) -> int | str | None:
    """The number of iterations, "computed", or None if only the condition ends the loop."""
    if not node.input or not node.input[0]:
        return None
    values = view.values_of(node.input[0])
    if not values:
        return "computed"
    return None if values[0] >= _ENDLESS else int(values[0])


def loop_trip_count(ask: Question) -> Iterator[Hit]:
    yield from (Hit(node) for view, node, _ in _loops(ask) if _trip_count(view, node) is None)


def loop_unregistered_input(ask: Question) -> Iterator[Hit]:
    for view, node, body in _loops(ask):
        read = {name for _, inner in body.walk() for name in inner.input}
        names = [value.name for value in body.graph.input[:2]]
        given = (_trip_count(view, node) is not None, len(node.input) > 1 and bool(node.input[1]))
        words = (("iteration number", "a trip count below 2147483647"), ("condition", "a constant condition"))
        for name, is_given, (what, remedy) in zip(names, given, words, strict=False):
            if name in read and not is_given:
                yield Hit(node, {"value": name, "what": what, "remedy": remedy})


def loop_scan_length(ask: Question) -> Iterator[Hit]:
    for view, node, body in _loops(ask):
        count = len(body.graph.output) - 1 - max(0, len(node.input) - 2)
        if count > 0 and not isinstance(_trip_count(view, node), int):
            yield Hit(node, {"count": count})


def loop_carried_shape(ask: Question) -> Iterator[Hit]:
    for view, node, body in _loops(ask):
        for index, name in enumerate(node.input[2:]):
            if index + 1 >= len(body.graph.output) or index + 2 >= len(body.graph.input):
                break
            inside, leaving = body.graph.input[index + 2].name, body.graph.output[index + 1].name
            before = body.shape_of(inside) or view.shape_of(name)
            after = body.shape_of(leaving)
            grown = _grows(body, inside, leaving)
            if grown or (before is not None and after is not None and _differ(before, after)):
                yield Hit(node, {"value": inside, "before_body": before, "after_body": grown or after})


def _differ(before: tuple[Axis, ...], after: tuple[Axis, ...]) -> bool:
    if len(before) != len(after):
        return True
    pairs = zip(before, after, strict=True)
    return any(isinstance(a, int) and isinstance(b, int) and a != b for a, b in pairs)


def _grows(body: GraphView, inside: str, leaving: str) -> str:
    """Words for a carried value that is joined to something and carried on; "" if it is not."""
    maker = body.makers.get(leaving)
    return (
        "itself with more behind it (Concat)" if maker and maker.op_type == "Concat" and inside in maker.input else ""
    )


def if_output_names(ask: Question) -> Iterator[Hit]:
    for node, one, other in _branches(ask):
        for name in sorted({item.name for item in one.graph.output} & {item.name for item in other.graph.output}):
            yield Hit(node, {"value": name})


def if_output_rank(ask: Question) -> Iterator[Hit]:
    for node, one, other in _branches(ask):
        for index, (left, right) in enumerate(zip(one.graph.output, other.graph.output, strict=False)):
            shapes = one.shape_of(left.name), other.shape_of(right.name)
            if shapes[0] is not None and shapes[1] is not None and len(shapes[0]) != len(shapes[1]):
                yield Hit(node, {"index": index, "then_rank": len(shapes[0]), "else_rank": len(shapes[1])})


def _branches(ask: Question) -> Iterator[tuple[NodeProto, GraphView, GraphView]]:
    """(If, branch taken if true, branch taken if false)."""
    for view, node in ask.standard_nodes():
        bodies = view.bodies_of(node)
        if node.op_type == "If" and len(bodies) == 2:
            names = [item.name for item in node.attribute if item.HasField("g")]
            yield node, bodies[names.index("then_branch")], bodies[names.index("else_branch")]


# ------------------------------------------------------------------------------------------------------------- files


def external_locations(ask: Question) -> list[str]:
    """Names of the weight files that a model refers to."""
    external = require("onnx").TensorProto.EXTERNAL
    found = {
        entry.value
        for view in ask.view.graphs()
        for tensor in view.constants.values()
        if tensor.data_location == external
        for entry in tensor.external_data
        if entry.key == "location"
    }
    return sorted(found)


def external_data_link(ask: Question) -> Iterator[Hit]:
    for location in external_locations(ask):
        if ask.folder is not None and (ask.folder / location).is_symlink():
            yield Hit(facts={"location": location})


def external_data_outside(ask: Question) -> Iterator[Hit]:
    for location in external_locations(ask):
        if Path(location).is_absolute() or ".." in Path(location).parts:
            yield Hit(facts={"location": location})


SHAPE_CHECKS: dict[str, Check] = {
    "data-dependent-shape": data_dependent_shape,
    "shape-from-data": shape_from_data,
    "shape-value-size": shape_value_size,
    "rank-unsupported": rank_unsupported,
    "rank-limit": rank_limit,
    "axis-names-clash": axis_names_clash,
    "loop-trip-count": loop_trip_count,
    "loop-unregistered-input": loop_unregistered_input,
    "loop-scan-length": loop_scan_length,
    "loop-carried-shape": loop_carried_shape,
    "if-output-names": if_output_names,
    "if-output-rank": if_output_rank,
    "external-data-link": external_data_link,
    "external-data-outside": external_data_outside,
}
