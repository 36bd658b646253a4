"""Checks where the Q/DQ nodes of a graph are, without knowing who put them there.

The rules are those of `qdq`. Values that lie in the weight file are not read: give the graph without its weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from holov_export.compile.lowering import all_nodes, opset_of
from holov_export.extras import require
from holov_export.quantize.linears import linears_of, quantised_linears
from holov_export.spec import QUANTIZED_OPSET, Quantization, QuantizedType

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto, TensorProto

_DOWN, _UP = "QuantizeLinear", "DequantizeLinear"
_PRODUCTS = ("MatMul", "Gemm")


def check_placement(model: ModelProto, quantization: Quantization) -> tuple[str, ...]:
    """What is wrong with the Q/DQ nodes of a graph for TensorRT, a sentence each; empty if nothing is.

    Args:
        model: of a graph as a bundle has it, quantised with `quantization`; not one that was lowered for TensorRT 8.

    Raises:
        UsageError: a pattern of `quantization.keep` names nothing.
    """
    graph = _Graph(model, quantization.type)
    found = [*graph.nodes_in_bodies()]
    for node in model.graph.node:
        if node.op_type == _DOWN:
            found += graph.faults_of_down(node)
        elif node.op_type == _UP:
            found += graph.faults_of_up(node)
        else:
            found += graph.faults_of_reader(node)
    found += graph.faults_of_choice(quantization)
    found += graph.faults_of_opset()
    return tuple(dict.fromkeys(found))


class _Graph:
    """Lookups over one model."""

    def __init__(self, model: ModelProto, kind: QuantizedType) -> None:
        types = require("onnx").TensorProto
        self._model = model
        self._nodes = list(model.graph.node)
        self._kind = types.INT8 if kind is QuantizedType.INT8 else types.FLOAT8E4M3FN
        self._weights: dict[str, TensorProto] = {item.name: item for item in model.graph.initializer}
        self._makers = {name: node for node in self._nodes for name in node.output if name}
        self._outputs = {item.name for item in model.graph.output}
        self._readers: dict[str, list[NodeProto]] = {}
        for node in all_nodes(model.graph):
            for name in node.input:
                self._readers.setdefault(name, []).append(node)

    def nodes_in_bodies(self) -> Iterator[str]:
        outer = {id(node) for node in self._nodes}
        for node in all_nodes(self._model.graph):
            if node.op_type in (_DOWN, _UP) and id(node) not in outer:
                yield f"'{node.name}' is in the body of a loop."

    def faults_of_down(self, node: NodeProto) -> Iterator[str]:
        """Of a QuantizeLinear: an activation, read by one DequantizeLinear with the same scale."""
        if node.input[0] in self._weights:
            yield f"'{node.name}' rounds a weight at run time; it should be stored rounded."
        readers = self._readers.get(node.output[0], [])
        if len(readers) != 1 or readers[0].op_type != _UP or list(readers[0].input[1:]) != list(node.input[1:]):
            yield f"'{node.name}' is not read by one {_UP} with its scale."
        if sum(other.op_type == _DOWN for other in self._readers.get(node.input[0], [])) > 1:
            yield f"'{node.input[0]}' is quantised more than once."
        yield from self._faults_of_scale(node, ())

    def faults_of_up(self, node: NodeProto) -> Iterator[str]:
        """Of a DequantizeLinear: made of a rounded activation or weight, read by products only, on its own side."""
        name, weight = node.output[0], self._weights.get(node.input[0])
        maker = self._makers.get(node.input[0])
        if weight is None and (maker is None or maker.op_type != _DOWN):
            yield f"'{node.name}' reads neither a {_DOWN} nor a weight."
        if name in self._outputs:
            yield f"'{node.name}' gives an output of the graph."
        side = 0 if weight is None else 1
        readers = self._readers.get(name, [])
        for reader in readers:
            places = [at for at, item in enumerate(reader.input) if item == name]
            if reader.op_type not in _PRODUCTS or places != [side]:
                yield f"'{node.name}' is read by '{reader.name}' ({reader.op_type}), which must read floats."
        if weight is None or not readers:
            return
        if weight.data_type != self._kind or len(weight.dims) != 2:
            yield f"'{weight.name}' is no matrix of {self._kind_name()}."
            return
        axis = 0 if _attribute(readers[0], "transB") else 1
        if (_attribute(node, "axis", 1) % 2) != axis:
            yield f"'{node.name}' has scales along the axis of the input channels."
        yield from self._faults_of_scale(node, (weight.dims[axis],))

    def _faults_of_scale(self, node: NodeProto, shape: tuple[int, ...]) -> Iterator[str]:
        onnx = require("onnx")
        scale = self._weights.get(node.input[1])
        zero = self._weights.get(node.input[2]) if len(node.input) > 2 else None
        if scale is None or tuple(scale.dims) != shape:
            yield f"'{node.name}' has no constant scale of shape {list(shape)}."
        elif scale.data_location != onnx.TensorProto.EXTERNAL:
            values = onnx.numpy_helper.to_array(scale).astype(np.float64)
            if not (np.isfinite(values).all() and (values > 0).all()):
                yield f"'{node.name}' has a scale that is not above zero, or not finite."
        if zero is None or zero.data_type != self._kind or tuple(zero.dims) != shape:
            yield f"'{node.name}' has no zero point of {self._kind_name()} of shape {list(shape)}."
        elif zero.data_location != onnx.TensorProto.EXTERNAL and np.any(
            onnx.numpy_helper.to_array(zero).astype(np.float64)
        ):
            yield f"'{node.name}' has a zero point that is not zero."

    def faults_of_reader(self, node: NodeProto) -> Iterator[str]:
        """Of any other node: both factors of a product are rounded, or none."""
        rounded = [self._comes_from_up(name) for name in node.input]
        if node.op_type in _PRODUCTS and rounded[0] != rounded[1]:
            yield f"'{node.name}' has one rounded factor."
        if node.op_type not in _PRODUCTS and any(name in self._weights for name in node.input):
            kinds = {self._weights[name].data_type for name in node.input if name in self._weights}
            if self._kind in kinds:
                yield f"'{node.name}' ({node.op_type}) reads {self._kind_name()} without a {_UP}."

    def _comes_from_up(self, name: str) -> bool:
        maker = self._makers.get(name)
        return maker is not None and maker.op_type == _UP

    def faults_of_choice(self, quantization: Quantization) -> Iterator[str]:
        """The products that are quantised are those that should be."""
        plain = self._without_pairs()
        linears = linears_of(plain)
        wanted = {linear.weight for linear in quantised_linears(linears, quantization.keep)}
        nodes = {node.name: node for node in self._nodes}
        for linear in linears:
            for name in linear.nodes:
                rounded = self._comes_from_up(nodes[name].input[1])
                if rounded and linear.deciding:
                    yield f"'{name}' decides which tokens stay, and is quantised."
                elif rounded and linear.weight not in wanted:
                    yield f"'{name}' is to be kept, and is quantised."
                elif not rounded and linear.weight in wanted:
                    yield f"'{name}' is not quantised."

    def _without_pairs(self) -> ModelProto:
        """The graph with every rounded value replaced by what it was rounded from."""
        plain = type(self._model)()
        plain.CopyFrom(self._model)
        origin: dict[str, str] = {}
        for node in self._nodes:
            if node.op_type in (_DOWN, _UP):
                origin[node.output[0]] = origin.get(node.input[0], node.input[0])
        kept = [node for node in plain.graph.node if node.op_type not in (_DOWN, _UP)]
        copies = [type(node).FromString(node.SerializeToString()) for node in kept]
        for node in copies:
            node.input[:] = [origin.get(name, name) for name in node.input]
        del plain.graph.node[:]
        plain.graph.node.extend(copies)
        return plain

    def faults_of_opset(self) -> Iterator[str]:
        types, opset = require("onnx").TensorProto, opset_of(self._model)
        scales = {self._weights[node.input[1]].data_type for node in self._nodes if self._has_scale(node)}
        if len(scales) > 1:
            yield f"the scales are of {len(scales)} types."
        if opset < QUANTIZED_OPSET and (scales - {types.FLOAT} or self._kind != types.INT8):
            yield f"opset {opset} has neither 8-bit floats nor scales that are not float32."

    def _has_scale(self, node: NodeProto) -> bool:
        return node.op_type in (_DOWN, _UP) and node.input[1] in self._weights

    def _kind_name(self) -> str:
        return str(require("onnx").TensorProto.DataType.Name(self._kind).lower())


def _attribute(node: NodeProto, name: str, default: int = 0) -> int:
    return next((int(item.i) for item in node.attribute if item.name == name), default)
