"""INT8 weights as TensorRT 8 wants them: float32, with a QuantizeLinear before their DequantizeLinear.

TensorRT 9 and later read INT8 constants, TensorRT 8 has none: "invalid weights type of Int8".
Source: TensorRT 8 developer guide, chapter "Explicit Quantization", section "Quantized Weights"; NvInfer.h 8.6 and 9.0,
IConstantLayer::setWeights; github.com/NVIDIA/TensorRT issue 2163.

The graph is changed without reading a weight: what was INT8 becomes float32 in a file of its own, beside the other
one. `write_float_weights` writes that file. Rounding these floats with the scale gives the same 8 bits again.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt

from holov_export.compile.rewrites import attributes_of, label_of, refuse
from holov_export.extras import require

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, NodeProto, TensorProto

#: what the name of the new file ends with
_SUFFIX = ".float32"
#: tensors begin at a page. Source: onnx/onnx docs/ExternalData.md
_PAGE = 4096
#: elements that are converted at once
_CHUNK = 2**22


class _Span(NamedTuple):
    """Where a tensor lies in a weight file; `length` in bytes, 0 if it is not said."""

    location: str
    offset: int
    length: int


def store_weights_as_float(graph: GraphProto) -> None:
    """Give every DequantizeLinear of stored INT8 weights a QuantizeLinear and float32 weights.

    Raises:
        UsageError: INT8 weights that have two scales, or that are read by something else as well.
    """
    onnx = require("onnx")
    stored = {tensor.name: tensor for tensor in graph.initializer if tensor.data_type == onnx.TensorProto.INT8}
    readers = {name: [node for node in graph.node if name in node.input[:1]] for name in stored}
    quantized: dict[str, NodeProto] = {}
    nodes, offset = [], 0
    for node in graph.node:
        name = node.input[0] if node.input else ""
        if node.op_type == "DequantizeLinear" and name in stored:
            if name not in quantized:
                _refuse_other_readers(readers[name], node)
                made = _quantizer(node)
                offset = _widen(stored[name], _scale(graph, node), node, offset)
                quantized[name] = made
                nodes.append(made)
            node = _with_input(node, quantized[name].output[0])
        nodes.append(node)
    if quantized:
        copies = [type(node).FromString(node.SerializeToString()) for node in nodes]
        del graph.node[:]
        graph.node.extend(copies)
        notes = [item for item in graph.value_info if item.name not in quantized]  # they say INT8
        notes = [type(item).FromString(item.SerializeToString()) for item in notes]
        del graph.value_info[:]
        graph.value_info.extend(notes)


def float_bytes(model: ModelProto, lowered: ModelProto) -> int:
    """What the new weight files of a lowered graph take; 0 if there are none."""
    return sum(_span(tensor).length for tensor in _changed(model, lowered))


def write_float_weights(model: ModelProto, lowered: ModelProto, folder: Path, target: Path) -> None:
    """Write the new weight files of a lowered graph.

    Args:
        model: as it was, its weights in `folder`. lowered: what became of it. target: folder for the new files.

    Raises:
        OSError: a file cannot be read or written.
    """
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    readers = {node.input[0]: node for node in model.graph.node if node.op_type == "DequantizeLinear"}
    files: dict[str, BinaryIO] = {}
    try:
        for tensor in _changed(model, lowered):
            span, node = _span(tensor), readers[tensor.name]
            stream = files.get(span.location) or (target / span.location).open("wb")
            files[span.location] = stream
            stream.seek(span.offset)
            integers, scale = _array(tensors[tensor.name], folder), _array(tensors[node.input[1]], folder)
            for part in _widened(integers, scale, _axis(node)):
                stream.write(part.tobytes())
    finally:
        for stream in files.values():
            stream.close()


def _changed(model: ModelProto, lowered: ModelProto) -> Iterator[TensorProto]:
    """Initializers of a lowered graph that were INT8 and lie in a new file."""
    onnx = require("onnx")
    before = {tensor.name for tensor in model.graph.initializer if tensor.data_type == onnx.TensorProto.INT8}
    for tensor in lowered.graph.initializer:
        outside = tensor.data_location == onnx.TensorProto.EXTERNAL
        if tensor.name in before and tensor.data_type == onnx.TensorProto.FLOAT and outside:
            yield tensor


def _widened(integers: npt.NDArray[Any], scale: npt.NDArray[Any], axis: int) -> Iterator[npt.NDArray[np.float32]]:
    """Integers times scale, float32, some rows at a time."""
    shape = [1] * integers.ndim
    if scale.size > 1:
        shape[axis] = scale.size
    factors = np.broadcast_to(scale.astype(np.float32).reshape(shape), integers.shape)
    rows = max(1, _CHUNK // max(1, integers[:1].size))
    for first in range(0, len(integers), rows):
        yield integers[first : first + rows].astype(np.float32) * factors[first : first + rows]


def _widen(tensor: TensorProto, scale: TensorProto | None, node: NodeProto, offset: int) -> int:
    """Make an INT8 initializer a float32 one. Returns where the next tensor of the new file begins."""
    onnx = require("onnx")
    if tensor.data_location != onnx.TensorProto.EXTERNAL:
        if scale is None or scale.data_location == onnx.TensorProto.EXTERNAL:
            refuse(node, "its scale lies in another file than its weights", "Quantise the bundle again.")
        integers = onnx.numpy_helper.to_array(tensor)
        floats = np.concatenate(list(_widened(integers, onnx.numpy_helper.to_array(scale), _axis(node))))
        tensor.CopyFrom(onnx.numpy_helper.from_array(floats, tensor.name))
        return offset
    span, size = _span(tensor), 4 * int(np.prod(tensor.dims, dtype=np.int64))
    tensor.data_type = onnx.TensorProto.FLOAT
    if not span.location:  # a graph that is only looked at, whose weights were left out
        return offset
    del tensor.external_data[:]
    for key, value in (("location", span.location + _SUFFIX), ("offset", offset), ("length", size)):
        tensor.external_data.add(key=key, value=str(value))
    return offset + -(-size // _PAGE) * _PAGE


def _quantizer(node: NodeProto) -> NodeProto:
    """The QuantizeLinear that undoes a DequantizeLinear."""
    made = type(node)()
    made.CopyFrom(node)
    made.op_type, made.name = "QuantizeLinear", f"{label_of(node)}/QuantizeLinear"
    made.output[0] = f"{made.name}:0"
    return made


def _with_input(node: NodeProto, name: str) -> NodeProto:
    made = type(node)()
    made.CopyFrom(node)
    made.input[0] = name
    return made


def _refuse_other_readers(readers: list[NodeProto], node: NodeProto) -> None:
    for other in readers:
        if other.op_type != "DequantizeLinear" or list(other.input) != list(node.input):
            refuse(node, f"its INT8 weights are read by '{label_of(other)}' too", "Quantise the bundle again.")


def _scale(graph: GraphProto, node: NodeProto) -> TensorProto | None:
    return next((tensor for tensor in graph.initializer if tensor.name == node.input[1]), None)


def _axis(node: NodeProto) -> int:
    """Source: ONNX DequantizeLinear, attribute axis, default 1."""
    return int(attributes_of(node).get("axis", 1))


def _span(tensor: TensorProto) -> _Span:
    said = {entry.key: entry.value for entry in tensor.external_data}
    return _Span(said.get("location", ""), int(said.get("offset", 0)), int(said.get("length", 0)))


def _array(tensor: TensorProto, folder: Path) -> npt.NDArray[Any]:
    """The values of an initializer, inside or outside of the graph."""
    onnx = require("onnx")
    if tensor.data_location != onnx.TensorProto.EXTERNAL:
        inside: npt.NDArray[Any] = onnx.numpy_helper.to_array(tensor)
        return inside
    span, shape = _span(tensor), tuple(tensor.dims)
    dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
    return np.memmap(folder / span.location, dtype=dtype, mode="r", offset=span.offset, shape=shape)
