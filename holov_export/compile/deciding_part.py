"""The part of a vision graph that decides which tokens stay: float32 in every precision, and no Q/DQ node touches it.

Found in the graph alone, whoever wrote its Q/DQ nodes: backwards from the saliency, the positions, the counts and all
that is sorted, to the products with weights that the decision begins with (the query and key projections of the layer
that decides, say). It ends as well at norms and at the residual stream, which rules that read features read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from holov_export.compile.graph_view import GraphView, attribute
from holov_export.compile.rewrites import label_of
from holov_export.signature import COUNTS, POSITIONS, SALIENCY

if TYPE_CHECKING:
    from onnx import NodeProto

QUANTIZERS = ("QuantizeLinear", "DequantizeLinear")
#: operators that multiply by weights, which are their input 1
PRODUCTS = ("MatMul", "Gemm", "Conv")
#: axes that the weights have at least
_MATRIX = 2
#: what a layer begins with: nothing behind it is without another weight in between
_NORMS = ("LayerNormalization", "RMSNormalization")
#: a shape says nothing of the values that it is of
_SHAPES = ("Shape", "Size")
_FLOAT, _NARROW = 1, (10, 16)  # TensorProto.FLOAT; FLOAT16, BFLOAT16


@dataclass(frozen=True)
class DecidingPart:
    """Nodes by what `label_of` calls them, those of loop bodies included.

    Attributes:
        nodes: all of them, the products that the decision begins with included.
        wide: those behind the widening to float32: all of them in a graph without narrower floats.
        products: the products with weights among `nodes`. weights: names of their matrices.
    """

    nodes: Mapping[str, NodeProto]
    wide: frozenset[str]
    products: frozenset[str]
    weights: frozenset[str]


def deciding_part(view: GraphView, types: Mapping[str, int]) -> DecidingPart:
    """The deciding part of a vision graph; empty for a graph that has no such outputs.

    Args:
        view: of the whole model. types: value name -> TensorProto.DataType, as far as it is known.
    """
    wide = _Walk(types, through_widening=False)
    wide.run(view)
    every = _Walk(types, through_widening=True)
    every.run(view)
    return DecidingPart(every.nodes, frozenset(wide.nodes), frozenset(every.products), frozenset(every.weights))


def is_vision_graph(view: GraphView) -> bool:
    """Whether a graph has the outputs that this package gives its vision graphs."""
    return {POSITIONS, COUNTS} <= {value.name for value in view.graph.output}


def quantized_nodes(view: GraphView, part: DecidingPart) -> Iterator[NodeProto]:
    """Nodes of the deciding part that quantise, or that read what was quantised: there must be none."""
    dequantized = {name for _, node in view.walk() if node.op_type == "DequantizeLinear" for name in node.output}
    for node in part.nodes.values():
        read = node.input if node.op_type not in _SHAPES else ()
        if node.op_type in QUANTIZERS or any(name in dequantized for name in read):
            yield node


def weight_of(view: GraphView, node: NodeProto) -> str:
    """Name of the matrix that a product multiplies by, its Q/DQ nodes passed over; "" if it multiplies by none."""
    if node.op_type not in PRODUCTS:
        return ""
    name = node.input[1]
    for _ in QUANTIZERS:  # at most a Q and a DQ stand before a weight
        maker = view.makers.get(name)
        if maker is not None and maker.op_type in QUANTIZERS:
            name = maker.input[0]
    tensor = view.constants.get(name)
    return name if tensor is not None and len(tensor.dims) >= _MATRIX else ""


class _Walk:
    """One walk backwards over values, in and out of bodies.

    Attributes:
        nodes, products, weights: what was found, see `DecidingPart`.
    """

    def __init__(self, types: Mapping[str, int], *, through_widening: bool) -> None:
        self.nodes: dict[str, NodeProto] = {}
        self.products: set[str] = set()
        self.weights: set[str] = set()
        self._types, self._through_widening = types, through_widening
        self._todo: list[tuple[GraphView, str]] = []

    def run(self, view: GraphView) -> None:
        if not is_vision_graph(view):
            return
        self._todo = [(view, value.name) for value in view.graph.output if value.name in (SALIENCY, POSITIONS, COUNTS)]
        self._todo += [(inner, node.output[0]) for inner, node in view.walk() if node.op_type in ("TopK", "ArgMax")]
        seen = set[tuple[int, str]]()
        while self._todo:
            inner, name = self._todo.pop()
            home = inner.home_of(name)
            if home is None or (id(home), name) in seen:
                continue
            seen.add((id(home), name))
            maker = home.makers.get(name)
            if maker is not None:
                self._visit(home, maker, name)
            elif name in home.inputs:
                self._leave_body(home, name)

    def _visit(self, view: GraphView, node: NodeProto, name: str) -> None:
        weight = weight_of(view, node)
        if node.op_type in _NORMS or _is_residual(view, node):
            return
        self.nodes[label_of(node)] = node
        if weight:
            self.products.add(label_of(node))
            self.weights.add(weight)
        elif node.op_type in _SHAPES or (self._widens(node) and not self._through_widening):
            return
        elif view.bodies_of(node):
            self._enter_bodies(view, node, list(node.output).index(name))
        else:
            self._todo += [(view, item) for item in node.input if item]

    def _widens(self, node: NodeProto) -> bool:
        if node.op_type != "Cast" or attribute(node, "to") != _FLOAT:
            return False
        return self._types.get(node.input[0]) in _NARROW

    def _enter_bodies(self, view: GraphView, node: NodeProto, index: int) -> None:
        """From an output of a Loop, Scan or If to what its bodies make of it, and to what decides about their runs."""
        for body in view.bodies_of(node):
            outputs = [value.name for value in body.graph.output]
            self._todo.append((body, outputs[index + (node.op_type == "Loop")]))
        read = {"Loop": 2, "If": 1}.get(node.op_type, 0)
        self._todo += [(view, item) for item in node.input[:read] if item]

    def _leave_body(self, body: GraphView, name: str) -> None:
        """From an input of a body to what the node gives it, at first and after each run."""
        node, outer = body.owner, body.outer
        if node is None or outer is None:
            return
        index = [value.name for value in body.graph.input].index(name)
        if index < len(node.input) and node.input[index]:
            self._todo.append((outer, node.input[index]))
        outputs = [value.name for value in body.graph.output]
        carried = index - (node.op_type == "Loop")
        if 0 <= carried < len(outputs):
            self._todo.append((body, outputs[carried]))


def _is_residual(view: GraphView, node: NodeProto) -> bool:
    """A sum of an activation and what a product with weights, and its bias, gave."""
    if node.op_type != "Add" or any(item in view.constants or item not in view.makers for item in node.input):
        return False
    for item in node.input:
        made = view.makers[item]
        if made.op_type == "Add":  # of the bias
            made = next((view.makers[term] for term in made.input if term in view.makers), made)
        if weight_of(view, made):
            return True
    return False
