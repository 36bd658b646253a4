"""Where the channels of an activation come from and go to, found by walking the graph, not by names.

A channel is a place on the last axis. Smoothing divides an activation by one number a channel, which is allowed only
where everything that reads it is a product that can be multiplied by the same number, or hands the channels on as they
are. What is not plainly so is None here, and stays as it was.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from holov_export.quantize.linears import Linear

if TYPE_CHECKING:
    import onnx_ir as ir

#: [batch, tokens, heads, channels of a head] <-> [batch, heads, tokens, channels of a head]
_HEADS = (0, 2, 1, 3)
_NORMS = ("LayerNormalization", "RMSNormalization")


@dataclass(frozen=True)
class Gain:
    """A node that multiplies every channel by a number of its own, and may add one: a norm, or the end of one.

    Attributes:
        node: the norm, or the Mul. factor, offset: places of the two among its inputs; None for no offset.
        width: number of channels.
        readers: the linears that read what it gives, each once. activations: the tensors that they read.
    """

    node: ir.Node
    factor: int
    offset: int | None
    width: int
    readers: tuple[Linear, ...]
    activations: tuple[str, ...]


@dataclass(frozen=True)
class Origin:
    """A product whose output channels are the input channels of another one, scaled alike.

    Attributes:
        linear: the product. node: its MatMul or Gemm. bias: node and place of its bias; None if it has none.
    """

    linear: Linear
    node: ir.Node
    bias: tuple[ir.Node, int] | None


class Channels:
    """Walks over one graph."""

    def __init__(self, model: ir.Model, linears: tuple[Linear, ...], ranks: Mapping[str, int]) -> None:
        """Prepare.

        Args:
            linears: all of the graph. ranks: of the values, as far as they are known.
        """
        self._graph = model.graph
        self._ranks = ranks
        self._linears = {name: linear for linear in linears for name in linear.nodes}

    def gains(self) -> list[Gain]:
        """All gains whose every reader is a product with weights."""
        return [gain for node in self._graph if (gain := self._gain(node)) is not None]

    def _gain(self, node: ir.Node) -> Gain | None:
        place = self._factor_of(node)
        factor = None if place is None else self._constant_vector(node.inputs[place])
        if place is None or factor is None:
            return None
        offset = 2 if node.op_type == "LayerNormalization" and len(node.inputs) > 2 and node.inputs[2] else None
        if offset is not None and self._constant_vector(node.inputs[offset]) != factor:
            return None
        products = self._products_behind(node.outputs[0], factor)
        if not products:
            return None
        readers = {linear.weight: linear for linear, _ in products}
        reached = {product.name for _, product in products}
        if any(not reached.issuperset(linear.nodes) for linear in readers.values()):
            return None  # one of the weights multiplies something else as well
        names = dict.fromkeys(str(product.inputs[0].name) for _, product in products if product.inputs[0])
        return Gain(node, place, offset, factor, tuple(readers.values()), tuple(names))

    def _factor_of(self, node: ir.Node) -> int | None:
        """The place of the factors among the inputs of a norm or a Mul."""
        if node.op_type in _NORMS:
            last = "axis" not in node.attributes or node.attributes["axis"].as_int() == -1
            return 1 if last and len(node.outputs) == 1 else None
        if node.op_type == "Mul":
            return next((at for at in (0, 1) if self._constant_vector(node.inputs[at]) is not None), None)
        return None

    def _constant_vector(self, value: ir.Value | None) -> int | None:
        """The length of an initializer of rank 1 with more than one number."""
        if value is None or value.name not in self._graph.initializers or value.const_value is None:
            return None
        shape = value.const_value.shape.numpy()
        return shape[0] if len(shape) == 1 and shape[0] > 1 else None

    def _products_behind(self, value: ir.Value, width: int) -> list[tuple[Linear, ir.Node]] | None:
        """All that read a value through nodes that keep its channels; None if anything else reads it."""
        found, todo = [], [value]
        while todo:
            at = todo.pop()
            if at.is_graph_output():
                return None
            for node, place in at.uses():
                linear = self._linears.get(str(node.name)) if node.graph is self._graph else None
                if linear is not None and place == 0 and linear.rows == width:
                    found.append((linear, node))
                elif node.graph is self._graph and place == 0 and self._keeps(node, width):
                    todo += node.outputs
                else:
                    return None
        return found

    def _keeps(self, node: ir.Node, width: int) -> bool:
        """Whether a node moves rows only, given that its first input has `width` channels."""
        last = self._ranks.get(str(node.inputs[0].name), 0) - 1 if node.inputs[0] is not None else -1
        if node.op_type in ("Identity", "Cast"):
            return True
        if node.op_type == "Reshape":
            return _tail(node.inputs[1], 1) == [width]
        if last < 1:
            return False
        if node.op_type == "Gather":
            axis = node.attributes["axis"].as_int() if "axis" in node.attributes else 0
            return axis not in (-1, last)
        if node.op_type == "Slice" and len(node.inputs) > 3:
            axes = _numbers(node.inputs[3])
            return axes is not None and not {-1, last}.intersection(axes)
        return False

    def origin_of(self, linear: Linear) -> Origin | None:
        """The product whose channels a linear reads: the values of an attention, or the ungated half of an MLP."""
        if len(linear.nodes) > 1:
            return None
        node = next(node for node in self._graph if node.name == linear.nodes[0])
        value = node.inputs[0]
        while value is not None and self._read_once(value):
            maker = value.producer()
            if maker is None:
                return None
            if maker.op_type == "Mul":
                found = [self._product_of(item, linear.rows) for item in maker.inputs]
                return next((origin for origin in found if origin is not None), None)
            if maker.op_type == "Reshape" and (origin := self._through_attention(maker, linear.rows)) is not None:
                return origin
            if not self._keeps(maker, linear.rows):
                return None
            value = maker.inputs[0]
        return None

    def _through_attention(self, merge: ir.Node, width: int) -> Origin | None:
        """Reshape(Transpose(weights @ Transpose(Reshape(product)))): each channel is mixed over tokens only."""
        swap = _maker(merge.inputs[0], "Transpose")
        mix = None if swap is None or not self._swaps_heads(swap) else _maker(swap.inputs[0], "MatMul")
        back = None if mix is None or mix.inputs[1] is None else _maker(mix.inputs[1], "Transpose")
        if swap is None or mix is None or back is None or not self._swaps_heads(back):
            return None
        split = _maker(back.inputs[0], "Reshape")
        between = (merge.inputs[0], swap.inputs[0], mix.inputs[1], back.inputs[0])
        if split is None or not all(value is not None and self._read_once(value) for value in between):
            return None
        heads = _tail(split.inputs[1], 2)
        if heads is None or min(heads) < 1 or heads[0] * heads[1] != width:
            return None
        return self._product_of(split.inputs[0], width)

    def _swaps_heads(self, node: ir.Node) -> bool:
        return "perm" in node.attributes and tuple(node.attributes["perm"].as_ints()) == _HEADS

    def _product_of(self, value: ir.Value | None, columns: int) -> Origin | None:
        """The product that makes a value, with its bias behind it or without."""
        if value is None or not self._read_once(value):
            return None
        node = value.producer()
        bias: tuple[ir.Node, int] | None = None
        if node is not None and node.op_type == "Add":
            place = next((at for at in (0, 1) if self._constant_vector(node.inputs[at]) == columns), None)
            inner = None if place is None else node.inputs[1 - place]
            if place is None or inner is None or not self._read_once(inner):
                return None
            bias = (node, place)
            node = inner.producer()
        linear = None if node is None else self._linears.get(str(node.name))
        if node is None or linear is None or linear.columns != columns or len(linear.nodes) > 1:
            return None
        if node.op_type == "Gemm" and len(node.inputs) > 2 and node.inputs[2] is not None:
            bias = (node, 2)
            if self._constant_vector(node.inputs[2]) != columns:
                return None
        return Origin(linear, node, bias)

    def _read_once(self, value: ir.Value) -> bool:
        return len(value.uses()) == 1 and not value.is_graph_output()


def _maker(value: ir.Value | None, op_type: str) -> ir.Node | None:
    node = None if value is None else value.producer()
    return node if node is not None and node.op_type == op_type else None


def _numbers(value: ir.Value | None) -> list[int] | None:
    """The numbers of a constant."""
    tensor = None if value is None else value.const_value
    return None if tensor is None else [int(number) for number in tensor.numpy().reshape(-1)]


def _tail(shape: ir.Value | None, count: int) -> list[int] | None:
    """The last numbers of a target shape, which is a constant, or a Concat that ends with one."""
    node = None if shape is None else shape.producer()
    if node is not None and node.op_type == "Concat":
        shape = node.inputs[-1]
    numbers = _numbers(shape)
    return numbers[-count:] if numbers is not None and len(numbers) >= count else None
