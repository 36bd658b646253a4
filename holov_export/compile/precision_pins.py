"""TensorRT 8 with the FP16 flag: what the graph computes in float32 is pinned to float32.

That flag lets the builder run any layer in half precision, whatever types the graph has, and the selection in half
precision would keep other tokens. So each TensorRT layer is traced back to its ONNX node, and where that node touches
no float16 value, the layer's precision and its float outputs are pinned. OBEY_PRECISION_CONSTRAINTS makes the build
fail rather than ignore a pin. This includes integer nodes: TensorRT 8 casts the integers of TopK to floats on the way.

How layers are traced: onnx-tensorrt 8.6 names the last tensors of a node after its ONNX outputs and its main layer
after the node; helper layers, made before them, carry neither name and belong to the next layer that does.
Source: onnx/onnx-tensorrt ModelImporter.cpp and ImporterContext.cpp@8.6-GA.
Float32 constants are pinned like the layer that reads them: TensorRT 8 may halve them too, and a halved constant that
is fused with a pinned shuffle may be a contradiction that the builder cannot obey.
Source: NvInfer.h 8.6, IConstantLayer::setWeights; github.com/NVIDIA/TensorRT issues 2838 and 3224.
Outputs whose type the parser set are left alone: so it says that a Range counts integers.

A quantised graph for TensorRT 8 is float32 around its Q/DQ nodes; there `halvable` says what may be halved. Quantize
and Dequantize layers are never pinned: the one computes in float32 and the other in INT8, whatever the flags are.
Source: NvInfer.h 8.5 and 8.6, IQuantizeLayer and IDequantizeLayer.

None of this has run on a GPU yet, only against the stand-in of the tests.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from holov_export.compile.halvable import halvable_nodes, is_quantized
from holov_export.compile.lowering import all_nodes, inferred, subgraphs_of
from holov_export.compile.rewrites import label_of
from holov_export.errors import EngineError
from holov_export.extras import require

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, NodeProto

#: layers that hold no floats, or whose precision is given
_NEVER = ("SHAPE", "QUANTIZE", "DEQUANTIZE")
_CONSTANT = "CONSTANT"


@dataclass(frozen=True)
class Pins:
    """What was pinned: numbers of layers and of float outputs, and of layers whose node may run in half precision."""

    layers: int
    outputs: int
    free: int


def pin_float32(trt: Any, network: Any, model: ModelProto) -> Pins:
    """Pin every layer of a float32 node of `model` in a network that was parsed from it.

    Raises:
        EngineError: the graph has float32 nodes and none was found: the selection would run in half precision.
    """
    owners = _owners(model)
    pinned = outputs = free = computing = 0
    for layer, node in _traced(network, owners):
        if node is not None and label_of(node) in owners.free:
            free += 1
        elif touched := _pin(trt, layer):
            pinned += 1
            outputs += touched - 1
            computing += layer.type.name != _CONSTANT
    if not computing and float32_nodes(model, owners.types):
        raise EngineError(
            "no layer of the network could be traced to a float32 node of the graph, so the selection would run in "
            "half precision.",
            hint="Use TensorRT 10 or newer, or export with --fp32.",
        )
    return Pins(pinned, outputs, free)


def element_types(model: ModelProto) -> dict[str, int]:
    """TensorProto.DataType of every value, those of loop bodies included.

    Raises:
        EngineError: the type of a node's output cannot be told.
    """
    types, _ = inferred(model)
    _add_bodies(model, model.graph, types)
    for node in all_nodes(model.graph):
        for name in node.output:
            if name and not types.get(name):
                raise EngineError(
                    f"the element type of '{name}' ({node.op_type} '{node.name}') cannot be told, so nobody knows "
                    "whether it may run in half precision.",
                    hint="Use TensorRT 10 or newer, or export with --fp32.",
                )
    return types


def free_nodes(model: ModelProto, types: dict[str, int]) -> frozenset[str]:
    """What `label_of` calls the nodes, those of loop bodies included, that may run in half precision."""
    if is_quantized(model):
        return halvable_nodes(model, types)
    return frozenset(label_of(node) for node in all_nodes(model.graph) if touches_half(node, types))


def float32_nodes(model: ModelProto, types: dict[str, int]) -> list[NodeProto]:
    """Nodes, those of loop bodies included, that read or write float32 and may not run in half precision."""
    single, free = require("onnx").TensorProto.FLOAT, free_nodes(model, types)
    return [
        node
        for node in all_nodes(model.graph)
        if node.op_type not in ("Shape", "Size", "Constant", "Loop", "Scan", "If")
        and any(types.get(name) == single for name in (*node.input, *node.output))
        and label_of(node) not in free
    ]


def touches_half(node: NodeProto, types: dict[str, int]) -> bool:
    """Whether a node may run in half precision: it reads or writes float16. Widening to float32 may not."""
    half = int(require("onnx").TensorProto.FLOAT16)
    if node.op_type == "Cast":
        return types.get(node.output[0]) == half
    return any(types.get(name) == half for name in (*node.input, *node.output))


@dataclass(frozen=True)
class _Owners:
    """Nodes by what their TensorRT layers are called, the types of all values, and labels of what may be halved."""

    by_output: dict[str, NodeProto]
    by_name: dict[str, NodeProto]
    types: dict[str, int]
    free: frozenset[str]


def _owners(model: ModelProto) -> _Owners:
    nodes, types = list(all_nodes(model.graph)), element_types(model)
    return _Owners(
        by_output={name: node for node in nodes for name in node.output if name},
        by_name={node.name: node for node in nodes if node.name},
        types=types,
        free=free_nodes(model, types),
    )


def _traced(network: Any, owners: _Owners) -> Iterator[tuple[Any, NodeProto | None]]:
    """(layer, its ONNX node) in the order of the network; None for what comes after the last named layer."""
    waiting: list[Any] = []
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        waiting.append(layer)
        node = _owner(layer, owners)
        if node is not None:
            yield from ((item, node) for item in waiting)
            waiting = []
    yield from ((item, None) for item in waiting)


def _owner(layer: Any, owners: _Owners) -> NodeProto | None:
    for tensor in _outputs(layer).values():
        if tensor.name in owners.by_output:
            return owners.by_output[tensor.name]
    return owners.by_name.get(layer.name)


def _pin(trt: Any, layer: Any) -> int:
    """Pin a layer if it computes floats. Returns 0 if it does not, else 1 + the number of pinned outputs."""
    if layer.type.name in _NEVER:
        return 0
    single = trt.DataType.FLOAT
    floats = (single,) if layer.type.name == _CONSTANT else (single, trt.DataType.HALF)
    outputs = {
        index: tensor
        for index, tensor in _outputs(layer).items()
        if tensor.dtype in floats and not layer.output_type_is_set(index)
    }
    if any(tensor.is_shape_tensor for tensor in outputs.values()):
        return 0
    inputs = (layer.get_input(index) for index in range(layer.num_inputs))
    if not outputs and not any(tensor is not None and tensor.dtype in floats for tensor in inputs):
        return 0
    layer.precision = trt.DataType.FLOAT
    for index in outputs:
        layer.set_output_type(index, trt.DataType.FLOAT)
    return 1 + len(outputs)


def _outputs(layer: Any) -> dict[int, Any]:
    found = ((index, layer.get_output(index)) for index in range(layer.num_outputs))
    return {index: tensor for index, tensor in found if tensor is not None}


def _add_bodies(model: ModelProto, graph: GraphProto, types: dict[str, int]) -> None:
    """Infer the types of control-flow bodies: each becomes a model whose inputs are the outer values that it reads."""
    onnx = require("onnx")
    for node in graph.node:
        for body in subgraphs_of(node):
            alone = onnx.ModelProto()
            alone.CopyFrom(model)
            alone.graph.CopyFrom(body)
            own = {item.name for item in (*body.input, *body.initializer)} | {
                name for inner in body.node for name in inner.output
            }
            outer = {name for inner in all_nodes(body) for name in inner.input} - own
            for name in sorted(outer & set(types)):
                alone.graph.input.append(onnx.helper.make_tensor_value_info(name, types[name], None))
            found, _ = inferred(alone)
            types.update({name: found[name] for name in found if name not in types})
            _add_bodies(model, body, types)
