"""vision.onnx --ranges--> the same graph with Q/DQ nodes around its products with weights, as TensorRT wants it.

What is quantised: the products that `quantised_linears` names, both factors, and nothing else. No bias, Softmax, norm,
GELU, product of activations, patch embedding or output is, nor what decides which tokens stay.

    x --QuantizeLinear--> int8 --DequantizeLinear--> MatMul <--DequantizeLinear-- int8 weight
    x --------------------------------------------> whoever else reads it, in the graph's own type

- An activation has one scale, a weight one for each output channel. All zero points are zero: TensorRT reads no others.
- Weights are stored rounded, a quarter of float32, with a DequantizeLinear and no QuantizeLinear. TensorRT 8 takes none
  stored so; `compile.lowering` writes floats for it.
- An activation has one pair of nodes, however many products read it; what it gives is read by quantised products only.
- Scales have the type of the activation, so what is not quantised needs no cast: float16 and bfloat16 scales, and
  8-bit floats, came with opset 19. A float32 graph with int8 stays at its opset, which TensorRT 8 reads.

Source: TensorRT developer guide, "Working with Quantized Types", explicit quantisation and "Q/DQ Layer-Placement
Recommendations" (quantise all inputs of weighted operators, not their outputs, no bias); onnx/onnx-tensorrt, importers
of QuantizeLinear and DequantizeLinear (zero points must be zero; an axis for scales by channel).

ONNX Runtime's own quantiser (onnxruntime.quantization, 1.31.1) does not place the nodes here. It redirects every reader
of a tensor to the DequantizeLinear, so that gathers, deciding products and residual sums read rounded values; it takes
the scales of 8-bit floats from a standard deviation, whatever the ranges are; it refuses bfloat16; it holds the model
several times and writes files beside the source. For the nodes that both place it gives the same scales, zero points
and int8 weights, bit for bit, which a test holds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from holov_export.compile.graph_file import graph_from_file
from holov_export.errors import UsageError
from holov_export.extras import require
from holov_export.quantize.linears import Linear, linears_of, quantised_linears
from holov_export.quantize.ranges import Ranges, TensorRange
from holov_export.quantize.scales import rounded_values, scales_from_largest
from holov_export.quantize.smooth import smoothed
from holov_export.quantize.summary import QuantizedSummary
from holov_export.quantize.weights import bytes_of, save_with_weights
from holov_export.spec import QUANTIZED_OPSET, Quantization, QuantizedType

if TYPE_CHECKING:
    import onnx_ir as ir

#: operators that opset 19 changed in no other way than by types that it added, and an attribute of Cast for 8-bit
#: floats. Source: onnx/onnx docs/Changelog.md, version 19
_SAME_IN_19 = frozenset({"Cast", "CastLike", "Constant", "ConstantOfShape", "Equal", "Identity"}) | frozenset(
    {"If", "Loop", "Reshape", "Scan", "Shape", "Size"}
)


def write_quantized(
    source: Path, target: Path, quantization: Quantization, ranges: Ranges, *, share: Path | None = None
) -> QuantizedSummary:
    """Write the quantised form of a vision graph, with its weights in `<target>.data`.

    No more than one weight matrix is in memory at a time.

    Args:
        source: the float graph; its weight file lies beside it.
        target: in an existing folder; another file than `source`.
        ranges: of the activations that the products read, from a calibration of this graph.
        share: a graph in the folder of `target`. Tensors that its weight file holds are read from there; what is left
            goes into the graph itself, and into `<target>.data` only if it is large.

    Raises:
        UsageError: no range of an activation, or one that is not finite; a pattern of `quantization.keep` that names
            nothing; a graph that is quantised already, or whose operators opset 19 changed.
    """
    if source.resolve() == target.resolve():
        raise UsageError(f"'{source}' cannot be quantised in place.", hint="Name another file.")
    onnx_ir = require("onnx_ir")
    proto = graph_from_file(source)
    linears = linears_of(proto)
    model = onnx_ir.load(source)
    _refuse_quantized(model)
    chosen = quantised_linears(linears, quantization.keep)
    names: tuple[str, ...] = ()
    before = bytes_of(model)
    if quantization.smoothing is not None:
        ranges, names = smoothed(model, proto, linears, chosen, ranges, quantization.smoothing)
    placement = _Placement(model, quantization.type)
    placement.place(chosen, ranges)
    _raise_opset(model, _opset_for(model, placement.dtype, quantization.type))
    after = bytes_of(model)
    files = save_with_weights(model, target, share)
    return QuantizedSummary(
        quantized=tuple(linear.name for linear in chosen),
        deciding=tuple(linear.name for linear in linears if linear.deciding),
        kept=tuple(linear.name for linear in linears if not linear.deciding and linear not in chosen),
        smoothed=names,
        opset=model.opset_imports[""],
        files=files,
        bytes_before=before,
        bytes_after=after,
    )


@dataclass
class _Placement:
    """A graph in work.

    Attributes:
        dtype: of the activations and of the scales. zeros: number of channels, or () -> the zero point of that shape.
    """

    model: ir.Model
    type: QuantizedType
    dtype: ir.DataType = field(init=False)
    zeros: dict[tuple[int, ...], ir.Value] = field(default_factory=dict)

    def place(self, linears: Sequence[Linear], ranges: Ranges) -> None:
        """Put the nodes around the products of all `linears`, which share the type of their weights."""
        nodes = {node.name: node for node in self.model.graph}
        self.dtype = _common_dtype(self.model, linears)
        readers: dict[str, list[ir.Node]] = {}
        for linear in linears:
            products = [nodes[name] for name in linear.nodes]
            self._quantize_weight(linear, products)
            for product, activation in zip(products, linear.activations, strict=True):
                readers.setdefault(activation, []).append(product)
        order = {id(node): place for place, node in enumerate(self.model.graph)}
        for name, products in readers.items():
            largest = _largest(name, ranges.record.tensors.get(name))
            self._quantize_activation(sorted(products, key=lambda node: order[id(node)]), largest)

    def _quantize_activation(self, products: Sequence[ir.Node], largest: float) -> None:
        onnx_ir = require("onnx_ir")
        value = products[0].inputs[0]
        assert value is not None
        scale = self._initializer(f"{value.name}.scale", scales_from_largest(largest, self.type, self.dtype.numpy()))
        inputs = [scale, self._zero(())]
        down = onnx_ir.node("QuantizeLinear", [value, *inputs], name=f"{value.name}/QuantizeLinear")
        up = onnx_ir.node("DequantizeLinear", [down.outputs[0], *inputs], name=f"{value.name}/DequantizeLinear")
        down.outputs[0].name, up.outputs[0].name = f"{value.name}.quantized", f"{value.name}.dequantized"
        self.model.graph.insert_before(products[0], [down, up])
        for product in products:
            product.replace_input_with(0, up.outputs[0])

    def _quantize_weight(self, linear: Linear, products: Sequence[ir.Node]) -> None:
        onnx_ir = require("onnx_ir")
        weight = self.model.graph.initializers[linear.weight]
        axis = _channel_axis(products)
        tensor = weight.const_value
        assert tensor is not None
        largest = np.abs(tensor.numpy().astype(np.float32)).max(axis=1 - axis)
        if not np.isfinite(largest).all():
            raise UsageError(f"the weight '{linear.weight}' holds a value that is not finite.")
        scales = scales_from_largest(largest, self.type, self.dtype.numpy())
        kind, shape = _stored(self.type), onnx_ir.Shape(tensor.shape.numpy())
        along = scales if axis == 1 else scales[:, None]

        def evaluate() -> ir.TensorProtocol:
            values = rounded_values(tensor.numpy(), along, self.type)
            stored: ir.TensorProtocol = onnx_ir.Tensor(values, dtype=kind, shape=shape, name=linear.weight)
            return stored

        weight.const_value = onnx_ir.LazyTensor(evaluate, dtype=kind, shape=shape, name=linear.weight)
        weight.type = onnx_ir.TensorType(kind)
        scale = self._initializer(f"{linear.weight}.scale", scales)
        up = onnx_ir.node(
            "DequantizeLinear",
            [weight, scale, self._zero(scales.shape)],
            {"axis": axis},
            name=f"{linear.name.replace('.', '/')}/DequantizeLinear",
        )
        up.outputs[0].name = f"{linear.weight}.dequantized"
        self.model.graph.insert_before(products[0], up)
        for product in products:
            product.replace_input_with(1, up.outputs[0])

    def _zero(self, shape: tuple[int, ...]) -> ir.Value:
        """The zero point of that shape; its type also says what QuantizeLinear rounds to."""
        if shape not in self.zeros:
            kind = _stored(self.type)
            name = f"{self.type.value}.zero" + "".join(f".{size}" for size in shape)
            self.zeros[shape] = self._initializer(name, np.zeros(shape, dtype=kind.numpy()))
        return self.zeros[shape]

    def _initializer(self, name: str, values: Any) -> ir.Value:
        onnx_ir = require("onnx_ir")
        tensor = onnx_ir.Tensor(values, name=name)
        value = onnx_ir.Value(name=name, shape=tensor.shape, type=onnx_ir.TensorType(tensor.dtype), const_value=tensor)
        self.model.graph.register_initializer(value)
        return value  # type: ignore[no-any-return]


def _stored(of: QuantizedType) -> ir.DataType:
    types = require("onnx_ir").DataType
    return types.INT8 if of is QuantizedType.INT8 else types.FLOAT8E4M3FN  # type: ignore[no-any-return]


def _channel_axis(products: Sequence[ir.Node]) -> int:
    """The axis of a weight that its output channels lie on: 0 for Gemm with transB, else 1."""
    axes = {0 if "transB" in node.attributes and node.attributes["transB"].as_int() else 1 for node in products}
    if len(axes) > 1:
        raise UsageError(f"'{products[0].name}' and '{products[1].name}' multiply one weight from two sides.")
    return axes.pop()


def _common_dtype(model: ir.Model, linears: Sequence[Linear]) -> ir.DataType:
    dtypes = {model.graph.initializers[linear.weight].dtype for linear in linears}
    if len(dtypes) > 1 or None in dtypes:
        raise UsageError(f"the weights are of several types: {', '.join(sorted(str(dtype) for dtype in dtypes))}.")
    return dtypes.pop()  # type: ignore[return-value]


def _largest(name: str, found: TensorRange | None) -> float:
    """The largest magnitude that an activation is taken to have."""
    if found is None:
        raise UsageError(f"the calibration has no range of '{name}'.", hint="Calibrate this graph again.")
    if not (math.isfinite(found.low) and math.isfinite(found.high)):
        raise UsageError(f"the range of '{name}' is not finite: {found.low} to {found.high}.")
    return max(abs(found.low), abs(found.high))


def _refuse_quantized(model: ir.Model) -> None:
    for node in model.graph.all_nodes():
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            raise UsageError(f"the graph is quantised already ('{node.name}').", hint="Quantise the float bundle.")


def _opset_for(model: ir.Model, dtype: ir.DataType, to: QuantizedType) -> int:
    now = model.opset_imports[""]
    plain = to is QuantizedType.INT8 and dtype == require("onnx_ir").DataType.FLOAT
    return now if plain else max(now, QUANTIZED_OPSET)


def _raise_opset(model: ir.Model, opset: int) -> None:
    """Let the model say that it is of `opset`.

    Raises:
        UsageError: an operator of the graph means something else there.
    """
    now, defs = model.opset_imports[""], require("onnx").defs
    for node in model.graph.all_nodes() if opset > now else ():
        if node.domain or node.op_type in _SAME_IN_19 or node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            continue
        if defs.get_schema(node.op_type, opset, "").since_version > now:
            raise UsageError(f"opset {opset} changed {node.op_type} ('{node.name}'), so the graph cannot be raised.")
    model.opset_imports[""] = opset
