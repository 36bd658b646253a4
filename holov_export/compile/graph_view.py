"""A graph as checks read it: who makes each value, of which type and shape, and what is constant.

Built once for a model; bodies of Loop, If and Scan see the values of the graphs around them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from holov_export.compile.rewrites import attributes_of, constants_of
from holov_export.extras import require

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto

#: one axis: its length, its symbolic name, or None if nothing is known
Axis = int | str | None
STANDARD_DOMAINS = ("", "ai.onnx")


@dataclass
class GraphView:
    """One graph of a model.

    Attributes:
        graph: the main graph or the body of a node. nodes: its nodes.
        types: value name -> name of the element type ("FLOAT16"), as far as it is known.
        shapes: value name -> axes, likewise.
        makers: value name -> node, of this graph.
        constants: value name -> tensor, of this graph.
        inputs: names of this graph's inputs that are not initializers.
        outer: the graph around this one.
        owner: the node that this graph is a body of.
        bodies: id of a node -> its bodies.
        computed: names that are known not to be constant.
    """

    graph: GraphProto
    nodes: list[NodeProto] = field(default_factory=list)
    types: dict[str, str] = field(default_factory=dict)
    shapes: dict[str, tuple[Axis, ...]] = field(default_factory=dict)
    makers: dict[str, NodeProto] = field(default_factory=dict)
    constants: dict[str, TensorProto] = field(default_factory=dict)
    inputs: frozenset[str] = frozenset()
    outer: GraphView | None = None
    owner: NodeProto | None = None
    bodies: dict[int, list[GraphView]] = field(default_factory=dict)
    computed: set[str] = field(default_factory=set)

    def home_of(self, name: str) -> GraphView | None:
        """The graph, this one or one around it, that a name belongs to."""
        view: GraphView | None = self
        while view is not None and not (name in view.makers or name in view.constants or name in view.inputs):
            view = view.outer
        return view

    def type_of(self, name: str) -> str:
        """Element type, "" if unknown."""
        home = self.home_of(name)
        return home.types.get(name, "") if home else ""

    def shape_of(self, name: str) -> tuple[Axis, ...] | None:
        home = self.home_of(name)
        return home.shapes.get(name) if home else None

    def constant(self, name: str) -> TensorProto | None:
        home = self.home_of(name)
        return home.constants.get(name) if home else None

    def values_of(self, name: str) -> list[Any] | None:
        """The numbers of a constant whose values lie in the graph itself, else None."""
        onnx = require("onnx")
        tensor = self.constant(name)
        if tensor is None or tensor.data_location == onnx.TensorProto.EXTERNAL:
            return None
        try:
            return list(onnx.numpy_helper.to_array(tensor).reshape(-1).tolist())
        except (ValueError, TypeError):  # a tensor without its data
            return None

    def is_constant(self, name: str) -> bool:
        """True if a value is an initializer, a Constant, or computed from such alone."""
        waiting: list[tuple[GraphView, str]] = [(self, name)]
        seen: set[tuple[int, str]] = set()
        while waiting:
            view, item = waiting.pop()
            home = view.home_of(item)
            if home is None or item in home.computed:
                return False
            if item in home.constants or (id(home), item) in seen:
                continue
            seen.add((id(home), item))
            maker = home.makers.get(item)
            read = [value for value in maker.input if value] if maker is not None else []
            if not read and (maker is None or maker.op_type != "Constant"):
                self._remember(name)
                return False
            waiting.extend((home, value) for value in read)
        return True

    def _remember(self, name: str) -> None:
        home = self.home_of(name)
        if home is not None:
            home.computed.add(name)

    def walk(self) -> Iterator[tuple[GraphView, NodeProto]]:
        """(graph, node) of this graph and of every body in it."""
        for node in self.nodes:
            yield self, node
            for body in self.bodies_of(node):
                yield from body.walk()

    def graphs(self) -> Iterator[GraphView]:
        yield self
        for bodies in self.bodies.values():
            for body in bodies:
                yield from body.graphs()

    def bodies_of(self, node: NodeProto) -> list[GraphView]:
        """Views of a node's bodies, in the order of its attributes."""
        return self.bodies.get(id(node), [])


def view_of(model: ModelProto) -> GraphView:
    """The main graph of a model, with what ONNX can infer of types and shapes without the weights."""
    onnx = require("onnx")
    with contextlib.suppress(onnx.shape_inference.InferenceError, ValueError, RuntimeError):
        # an invalid graph is checked with what it says of itself
        model = onnx.shape_inference.infer_shapes(model, data_prop=True)
    return _view(model.graph, None, None)


def _view(graph: GraphProto, outer: GraphView | None, owner: NodeProto | None) -> GraphView:
    onnx = require("onnx")
    view = GraphView(graph=graph, nodes=list(graph.node), outer=outer, owner=owner)
    view.constants = constants_of(graph)
    view.inputs = frozenset(value.name for value in graph.input) - frozenset(view.constants)
    for value in (*graph.value_info, *graph.input, *graph.output):
        kind, shape = tensor_type(value)
        if kind:
            view.types[value.name] = kind
        if shape is not None:
            view.shapes[value.name] = shape
    for name, tensor in view.constants.items():
        view.types[name] = _type_name(onnx, tensor.data_type)
        view.shapes[name] = tuple(tensor.dims)
    for node in view.nodes:
        view.makers.update({name: node for name in node.output if name})
        inner = [item.g for item in node.attribute if item.HasField("g")]
        inner += [body for item in node.attribute for body in item.graphs]
        if inner:
            view.bodies[id(node)] = [_view(body, view, node) for body in inner]
    return view


def tensor_type(value: ValueInfoProto) -> tuple[str, tuple[Axis, ...] | None]:
    """(name of the element type or "", axes or None) of a declared value."""
    if not value.type.HasField("tensor_type"):
        return "", None
    described = value.type.tensor_type
    kind = _type_name(require("onnx"), described.elem_type)
    if not described.HasField("shape"):
        return kind, None
    return kind, tuple(_axis(axis) for axis in described.shape.dim)


def _axis(axis: Any) -> Axis:
    if axis.HasField("dim_value"):
        return int(axis.dim_value)
    return str(axis.dim_param) or None


def _type_name(onnx: Any, number: int) -> str:
    """FLOAT16 for 10; empty for 0."""
    if number == 0:
        return ""
    try:
        return str(onnx.TensorProto.DataType.Name(number))
    except ValueError:  # a type newer than the installed onnx
        return f"TYPE{number}"


def attribute(node: NodeProto, name: str, default: Any = None) -> Any:
    """One attribute of a node."""
    return attributes_of(node).get(name, default)


def elements(shape: tuple[Axis, ...] | None) -> int | None:
    """Number of elements, None if an axis is not fixed."""
    if shape is None:
        return None
    count = 1
    for axis in shape:
        if not isinstance(axis, int):
            return None
        count *= axis
    return count
