"""Q/DQ nodes as parsers and builders take them.

Sources: QuantDequantLinearHelper in builtin_op_importers.cpp of onnx/onnx-tensorrt at 8.6-GA and in onnxOpImporters.cpp
at 10.1-GA; IQuantizeLayer, IDequantizeLayer and IConstantLayer in NvInfer.h of release/8.6, 9.0 and 10.3; issue 2163 of
NVIDIA/TensorRT (INT8 constants in 8.x); TensorRT developer guide, "Explicit Quantization" (the INT8 flag of 8.x).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

from tensorrt_standin.api import older

if TYPE_CHECKING:
    from tensorrt_standin.network import INetworkDefinition

DOWN, UP = "QuantizeLinear", "DequantizeLinear"
_EIGHT_BITS = (TensorProto.INT8, TensorProto.FLOAT8E4M3FN)
#: Source: TensorRT support matrix, "Hardware and Precision"
_SM_OF_FP8 = 89


def node_faults(model: onnx.ModelProto, node: onnx.NodeProto, version: str) -> Iterator[str]:
    """What the parser of a version says of a Q/DQ node of the main graph; the weights are inside."""
    old = older(version, "9.0.0")
    constants = {item.name: item for item in model.graph.initializer}
    makers = {name: item for item in model.graph.node for name in item.output}
    scale = constants.get(node.input[1])
    if old and len(node.input) < 3:
        yield "This version of TensorRT requires 3 inputs for the INT8 QuantizeLinear/DequantizeLinear operator."
    if len(node.input) > 2:
        zero = constants.get(node.input[2])
        if zero is None or zero.data_type not in _EIGHT_BITS or numpy_helper.to_array(zero).astype(np.float32).any():
            yield "TensorRT only supports symmetric quantization. The zero point must be all zeros."
    if scale is None:
        yield "the scale is no build-time constant"
        return
    values = numpy_helper.to_array(scale).astype(np.float32)
    if old and scale.data_type != TensorProto.FLOAT:
        yield "the scale is read as float32"
    if not (values > 0).all():
        yield "Scale coefficients must all be positive"
    yield from _data_faults(node, constants, makers, values.size, old=old)


def _data_faults(
    node: onnx.NodeProto,
    constants: dict[str, TensorProto],
    makers: dict[str, onnx.NodeProto],
    scales: int,
    *,
    old: bool,
) -> Iterator[str]:
    """What is wrong with what is quantised or dequantised."""
    data = constants.get(node.input[0])
    maker = makers.get(node.input[0])
    behind = data is None and maker is not None and maker.op_type == DOWN
    root = constants.get(maker.input[0]) if behind else data
    if node.op_type == UP and data is not None and data.data_type not in _EIGHT_BITS:
        yield "only activation types allowed as input to this layer"
    if node.op_type == UP and data is not None and data.data_type == TensorProto.INT8 and old:
        yield f"{data.name}: invalid weights type of Int8"
    if scales == 1:
        return
    if root is None:
        yield "activations cannot be quantized per-channel"
        return
    axis = next((item.i for item in node.attribute if item.name == "axis"), 0)  # ONNX has 1
    if root.dims[axis] != scales:
        yield "The number of scales is not equal to the number of output channels."


def build_fault(network: INetworkDefinition, flags: set[str], sm: int) -> str:
    """Why a network with Q/DQ layers cannot be built; "" if it can."""
    layers = [layer for layer in network.layers if layer.node.op_type in (DOWN, UP)]
    types = {tensor._dtype for layer in layers for tensor in (*layer.inputs, *layer.outputs) if tensor is not None}
    if "FP8" in types and sm < _SM_OF_FP8:
        return f"FP8 is not supported on compute capability {sm // 10}.{sm % 10}"
    for kind in ("INT8", "FP8"):
        if layers and kind in types and not network.strongly_typed and kind not in flags:
            return f"a network with Q/DQ layers of {kind} must be built with the {kind} flag"
    for layer in layers:
        if layer.precision_is_set or layer.output_types:
            return f"{layer.name}: Quantize and Dequantize layers have a precision of their own"
    return ""
