"""The products of a vision graph with weights: what can be quantised, and what decides and therefore cannot."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from holov_export.compile.lowering import all_nodes, subgraphs_of
from holov_export.errors import UsageError
from holov_export.signature import PIXEL_VALUES, SALIENCY

if TYPE_CHECKING:
    from collections.abc import Container, Sequence

    from onnx import ModelProto, NodeProto

#: names that a message shows before "and N more"
_SHOWN = 4
#: what a layer begins with: nothing behind it is without another weight in between
_NORMS = ("LayerNormalization", "RMSNormalization")


@dataclass(frozen=True)
class Linear:
    """A weight matrix and the MatMul or Gemm nodes that multiply by it.

    Attributes:
        weight: name of the initializer, "vision_tower.layers.3.mlp.fc1.weight"; stored [rows, columns], the product
            is x @ W; [columns, rows] for a Gemm with transB.
        rows, columns: widths of the input and of the output.
        nodes: names of the nodes. activations: the tensor that each of them multiplies, same order.
        deciding: the saliency comes from it without another weight in between (the query and key projections of a
            layer that decides): never quantised.
    """

    weight: str
    rows: int
    columns: int
    nodes: tuple[str, ...]
    activations: tuple[str, ...]
    deciding: bool

    @property
    def name(self) -> str:
        """The weight's name without ".weight": what people call it."""
        return self.weight.removesuffix(".weight")


def linears_of(model: ModelProto) -> tuple[Linear, ...]:
    """Every MatMul or Gemm with a matrix among the initializers as its second factor, in the order of the graph.

    Products in the bodies of loops have no weights and are left out, as is the embedding of patches (Qwen2.5-VL has a
    Gemm for it), which reads the pixels.

    Args:
        model: best loaded without its weights.
    """
    shapes = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer if len(tensor.dims) == 2}
    products: dict[str, list[NodeProto]] = {}
    for node in model.graph.node:
        if _is_product(node, shapes) and node.input[0] != PIXEL_VALUES:
            products.setdefault(node.input[1], []).append(node)
    deciding = _deciding(model, set(shapes))
    return tuple(
        Linear(
            weight=weight,
            rows=shapes[weight][1 if _transposed(nodes[0]) else 0],
            columns=shapes[weight][0 if _transposed(nodes[0]) else 1],
            nodes=tuple(node.name for node in nodes),
            activations=tuple(node.input[0] for node in nodes),
            deciding=weight in deciding,
        )
        for weight, nodes in products.items()
    )


def _is_product(node: NodeProto, weights: Container[str]) -> bool:
    """A MatMul, or a Gemm that does no more than one and a bias."""
    if len(node.input) < 2 or node.input[1] not in weights:
        return False
    plain = {"alpha": 1.0, "beta": 1.0, "transA": 0}
    scaled = any(plain.get(item.name, item.f or item.i) != (item.f or item.i) for item in node.attribute)
    return node.op_type == "MatMul" or (node.op_type == "Gemm" and not scaled)


def _transposed(node: NodeProto) -> bool:
    return any(item.name == "transB" and item.i for item in node.attribute)


def _deciding(model: ModelProto, weights: set[str]) -> set[str]:
    """The weights whose products reach the saliency, or the choice of tokens, with no other weight in between.

    Every decision sorts, so the walk begins at the saliency and at whatever a TopK sorts. It ends at products with
    weights, at norms and at the residual stream, which rules that read features read and every layer has written to.
    """
    producers = {name: node for node in model.graph.node for name in node.output if name}
    todo = [SALIENCY, *(node.input[0] for node in all_nodes(model.graph) if node.op_type == "TopK")]
    seen, found = set[str](), set[str]()
    while todo:
        name = todo.pop()
        node = producers.get(name)
        if node is None or name in seen or node.op_type in _NORMS:
            continue
        seen.add(name)
        if _is_product(node, weights):
            found.add(node.input[1])
        elif not _is_residual(node, producers, weights):
            bodies = (inner for body in subgraphs_of(node) for inner in all_nodes(body))
            todo += [item for inner in (node, *bodies) for item in inner.input if item]
    return found


def _is_residual(node: NodeProto, producers: dict[str, NodeProto], weights: set[str]) -> bool:
    """A sum of an activation and what a product with weights, and its bias, gave."""
    if node.op_type != "Add" or not all(item in producers for item in node.input):
        return False
    for item in node.input:
        made = producers[item]
        if made.op_type == "Add":  # of the bias
            made = next((producers[term] for term in made.input if term in producers), made)
        if _is_product(made, weights):
            return True
    return False


def matches(pattern: str, linear: Linear) -> bool:
    """Whether a pattern names a linear: its dotted parts stand side by side in the name.

    "layers.3" and "mlp.fc2" and "multi_modal_projector" do; "ayers.3" does not, nor "layers.3" of layer 30.
    """
    return f".{pattern.strip('.')}." in f".{linear.name}."


def quantised_linears(linears: Sequence[Linear], keep: Sequence[str]) -> tuple[Linear, ...]:
    """Those that are quantised: neither deciding nor named by a pattern of `keep`.

    Raises:
        UsageError: a pattern names nothing, or nothing is left to quantise.
    """
    for pattern in keep:
        if not pattern.strip(".") or not any(matches(pattern, linear) for linear in linears):
            names = [linear.name for linear in linears]
            more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
            raise UsageError(
                f"'{pattern}' names no product of the graph.", hint=f"There are {', '.join(names[:_SHOWN])}{more}."
            )
    left = [
        linear for linear in linears if not linear.deciding and not any(matches(pattern, linear) for pattern in keep)
    ]
    if not left:
        raise UsageError("nothing is left to quantise: every product is kept.", hint="Keep fewer layers.")
    return tuple(left)
