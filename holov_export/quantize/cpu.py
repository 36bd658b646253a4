"""vision.onnx --> the same graph with 8-bit products for ONNX Runtime's CPU provider. Scales are found at run time.

A product with weights becomes

    x --QuantizeLinear, a scale for each row--> uint8 --MatMulIntegerToFloat(int8 weight)--> times the scale of the row

- Every row of an activation (a token) has a scale of its own, and so has every output channel of a weight. With one
  scale for all tokens, as DynamicQuantizeLinear finds it, the loudest token would round all others.
- uint8 times int8 is the product that processors are fast in (VNNI), so rows are shifted: zero is 128. What an
  activation function gives is almost nowhere far below zero; its rows have a zero point of their own, and what that
  adds to the product is taken off again with the column sums of the weight.
- Channels that a norm makes much larger than the others (`outliers`) are left out of the rows and of their scales. They
  are multiplied in float32: a product of a few columns.
- Everything else stays float32: norms, softmax, products of activations, what decides, the selection.

com.microsoft.MatMulIntegerToFloat is ONNX Runtime's own operator, so TensorRT does not read these graphs; `qdq` writes
those that it does.

Source: onnxruntime docs/ContribOperators.md, MatMulIntegerToFloat; scales by token: Yao et al., ZeroQuant, arXiv
2206.01861.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from holov_export.compile.graph_file import graph_from_file
from holov_export.errors import UsageError
from holov_export.extras import require
from holov_export.quantize.linears import Linear, linears_of, quantised_linears
from holov_export.quantize.outliers import Channels, outlier_channels
from holov_export.quantize.ranges import Ranges
from holov_export.quantize.scales import rounded_values, scales_from_largest
from holov_export.quantize.smooth import smoothed
from holov_export.quantize.summary import QuantizedSummary
from holov_export.quantize.weights import bytes_of, save_with_weights
from holov_export.spec import Quantization, QuantizedType

if TYPE_CHECKING:
    import onnx_ir as ir

_DOMAIN = "com.microsoft"
#: of a row that is all zero
SMALLEST_SCALE = 1e-12
#: what gives values that lie around zero; other rows get a zero point of their own
AROUND_ZERO = ("LayerNormalization", "RMSNormalization", "Reshape", "Transpose")


def write_quantized_cpu(
    source: Path, target: Path, quantization: Quantization, ranges: Ranges | None = None, *, share: Path | None = None
) -> QuantizedSummary:
    """Write the form of a vision graph that ONNX Runtime is fast in on a CPU, with its weights in `<target>.data`.

    Args:
        source: the float32 graph; its weight file lies beside it.
        target: in an existing folder; another file than `source`.
        ranges: of the activations, which only smoothing needs.
        share: a graph in the folder of `target` whose weight file is read for what is equal.

    Raises:
        UsageError: weights that are not float32 or not finite, a pattern of `quantization.keep` that names nothing, or
            `target` is `source`.
    """
    if source.resolve() == target.resolve():
        raise UsageError(f"'{source}' cannot be quantised in place.", hint="Name another file.")
    ir = require("onnx_ir")
    proto = graph_from_file(source)
    linears = linears_of(proto)
    chosen = quantised_linears(linears, quantization.keep)
    model = ir.load(source)
    before = bytes_of(model)
    names: tuple[str, ...] = ()
    if quantization.smoothing is not None and ranges is not None:
        _, names = smoothed(model, proto, linears, chosen, ranges, quantization.smoothing)
    writing = _Writing(model, {str(node.name): node for node in model.graph})
    for linear in chosen:
        writing.replace(linear)
    model.opset_imports[_DOMAIN] = 1
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


@dataclass(frozen=True)
class _Rows:
    """A rounded activation: uint8 [.., rows], the scale of each row [.., 1], and what its zero point takes off.

    Attributes:
        offset: scale times zero point [.., 1]; None where zero is 128 in every row.
        outliers: the channels that are left out, float32 [.., outliers]; None if there are none.
    """

    rounded: ir.Value
    scale: ir.Value
    offset: ir.Value | None
    outliers: ir.Value | None


@dataclass(frozen=True)
class _Weight:
    """A rounded weight: int8 [rows, columns], scales [columns], and what its columns add up to, scaled, [columns].

    Attributes:
        channels: of the input, which are multiplied in float32; their rows of `rounded` are zero.
        outliers: those rows, float32 [channels, columns].
    """

    name: str
    rounded: ir.Value
    scale: ir.Value
    sums: npt.NDArray[np.float32]
    channels: Channels
    outliers: npt.NDArray[np.float32]


@dataclass
class _Writing:
    """A graph in work: its nodes by name, and what was made for activations that several products read."""

    model: ir.Model
    nodes: dict[str, ir.Node]
    rows: dict[tuple[str, bool], _Rows] = field(default_factory=dict)

    def replace(self, linear: Linear) -> None:
        """Put 8-bit products in the place of those with one weight."""
        ir = require("onnx_ir")
        transposed = {_transposed(self.nodes[name]) for name in linear.nodes}
        if len(transposed) > 1:
            raise UsageError(f"products multiply '{linear.weight}' from two sides.")
        weight = self._weight(linear, transposed.pop(), self._channels(linear))
        for name in linear.nodes:
            node = self.nodes[name]
            product = self._product(node, linear, weight)
            old = node.outputs[0]
            product.type, product.shape = old.type, old.shape
            ir.convenience.replace_all_uses_with(old, product, replace_graph_outputs=True)
            old.name, product.name = None, old.name
            self.model.graph.remove(node, safe=True)

    def _product(self, node: ir.Node, linear: Linear, weight: _Weight) -> ir.Value:
        activation = node.inputs[0]
        assert activation is not None
        key = str(activation.name), bool(weight.channels.size)
        if key not in self.rows:
            self.rows[key] = self._rounded(node, activation, linear.rows, weight.channels)
        rows = self.rows[key]
        zero = self._constant("cpu.zero.0" if rows.offset else "cpu.zero.128", np.uint8(0 if rows.offset else 128))
        name = str(node.name)
        inputs = [rows.rounded, weight.rounded, self._constant("cpu.one", np.float32(1)), weight.scale, zero]
        made = self._node(node, "MatMulIntegerToFloat", inputs, f"{name}/Int8", domain=_DOMAIN)
        made = self._node(node, "Mul", [made, rows.scale], f"{name}/Scaled")
        if rows.offset is not None:
            sums = self._constant(f"{weight.name}.sums", weight.sums)
            taken = self._node(node, "Mul", [rows.offset, sums], f"{name}/Offset")
            made = self._node(node, "Sub", [made, taken], f"{name}/Shifted")
        if rows.outliers is not None:
            some = [rows.outliers, self._constant(f"{weight.name}.outliers", weight.outliers)]
            made = self._node(node, "Add", [made, self._node(node, "MatMul", some, f"{name}/Few")], f"{name}/Whole")
        if len(node.inputs) > 2 and node.inputs[2] is not None:  # of a Gemm
            made = self._node(node, "Add", [made, node.inputs[2]], f"{name}/Biased")
        return made

    def _channels(self, linear: Linear) -> Channels:
        """The outliers of what all products with one weight read; none where these differ."""
        inputs = [self.nodes[name].inputs[0] for name in linear.nodes]
        found = [outlier_channels(value) for value in inputs if value is not None]
        return found[0] if all(np.array_equal(found[0], other) for other in found) else found[0][:0]

    def _rounded(self, node: ir.Node, x: ir.Value, width: int, channels: Channels) -> _Rows:
        """Round the rows of an activation in front of the first product that reads it."""
        name, outliers, producer = f"{x.name}/rows", None, x.producer()
        if channels.size:
            places = self._constant(f"{name}/Places", channels)
            outliers = self._node(node, "Gather", [x, places], f"{name}/Outliers", {"axis": -1})
            others = np.ones(width, np.float32)
            others[channels] = 0
            x = self._node(node, "Mul", [x, self._constant(f"{name}/Mask", others)], f"{name}/Others")
        axis, flat_axis = self._constant("cpu.last", np.array([-1], np.int64)), np.array([-1, width], np.int64)
        flat = self._node(node, "Reshape", [x, self._constant(f"cpu.flat.{width}", flat_axis)], f"{name}/Flat")
        shape = self._node(node, "Shape", [x], f"{name}/Shape")
        around_zero = producer is not None and producer.op_type in AROUND_ZERO
        scale, zero = (self._symmetric if around_zero else self._affine)(node, x, name, axis)
        flat_scale = self._node(node, "Reshape", [scale, axis], f"{name}/Scales")
        points = self._node(node, "Reshape", [zero, axis], f"{name}/Zeros") if zero is not None else None
        if points is None:
            of_rows = self._node(node, "Shape", [flat_scale], f"{name}/Rows")
            of_zero = self._constant("cpu.zero.row", np.array([128], np.uint8))
            points = self._node(node, "Expand", [of_zero, of_rows], f"{name}/Zeros")
        else:
            points = self._node(node, "Cast", [points], f"{name}/ZerosUint8", {"to": _uint8()})
        rounded = self._node(node, "QuantizeLinear", [flat, flat_scale, points], f"{name}/Quantize", {"axis": 0})
        rounded = self._node(node, "Reshape", [rounded, shape], f"{name}/Rounded")
        offset = None if zero is None else self._node(node, "Mul", [scale, zero], f"{name}/Offset")
        return _Rows(rounded, scale, offset, outliers)

    def _symmetric(self, node: ir.Node, x: ir.Value, name: str, axis: ir.Value) -> tuple[ir.Value, None]:
        """(scale of each row, None): the largest magnitude is 127 steps away from 128."""
        largest = self._node(node, "ReduceMax", [self._node(node, "Abs", [x], f"{name}/Abs"), axis], f"{name}/Largest")
        return self._positive(node, largest, 127, name), None

    def _affine(self, node: ir.Node, x: ir.Value, name: str, axis: ir.Value) -> tuple[ir.Value, ir.Value]:
        """(scale of each row, its zero point as a float): 255 steps from the smallest value to the largest, with 0."""
        none = self._constant("cpu.none", np.float32(0))
        high = self._node(node, "Max", [self._node(node, "ReduceMax", [x, axis], f"{name}/High"), none], f"{name}/Top")
        low = self._node(node, "Min", [self._node(node, "ReduceMin", [x, axis], f"{name}/Low"), none], f"{name}/Bottom")
        span = self._node(node, "Sub", [high, low], f"{name}/Span")
        scale = self._positive(node, span, 255, name)
        steps = self._node(node, "Div", [low, scale], f"{name}/Steps")
        negative = self._node(node, "Neg", [steps], f"{name}/Negative")
        return scale, self._node(node, "Round", [negative], f"{name}/Zero")

    def _positive(self, node: ir.Node, span: ir.Value, steps: int, name: str) -> ir.Value:
        step = self._constant(f"cpu.step.{steps}", np.float32(1 / steps))
        scale = self._node(node, "Mul", [span, step], f"{name}/Step")
        return self._node(
            node, "Max", [scale, self._constant("cpu.smallest", np.float32(SMALLEST_SCALE))], f"{name}/Scale"
        )

    def _weight(self, linear: Linear, transposed: bool, channels: Channels) -> _Weight:
        """The weight's value with its numbers rounded, [rows, columns] even if it is stored the other way round."""
        ir = require("onnx_ir")
        value = self.model.graph.initializers[linear.weight]
        tensor = value.const_value
        assert tensor is not None
        if tensor.dtype != ir.DataType.FLOAT:
            raise UsageError(
                f"'{linear.weight}' is {tensor.dtype}; a CPU computes in float32.", hint="Quantise a --fp32 bundle."
            )
        whole = tensor.numpy().T if transposed else tensor.numpy()
        few, values = whole[channels], _without(whole, channels)
        largest = np.abs(values).max(axis=0)
        if not (np.isfinite(largest).all() and np.isfinite(few).all()):
            raise UsageError(f"the weight '{linear.weight}' holds a value that is not finite.")
        scales = scales_from_largest(largest, QuantizedType.INT8, np.float32)
        rounded = rounded_values(values, scales, QuantizedType.INT8)
        sums = rounded.sum(axis=0, dtype=np.int64).astype(np.float32) * scales
        shape = ir.Shape([linear.rows, linear.columns])

        def evaluate() -> Any:
            stored = tensor.numpy().T if transposed else tensor.numpy()
            again = np.ascontiguousarray(rounded_values(_without(stored, channels), scales, QuantizedType.INT8))
            return ir.Tensor(again, dtype=ir.DataType.INT8, shape=shape, name=linear.weight)

        value.const_value = ir.LazyTensor(evaluate, dtype=ir.DataType.INT8, shape=shape, name=linear.weight)
        value.type, value.shape = ir.TensorType(ir.DataType.INT8), shape
        scale = self._constant(f"{linear.weight}.scale", scales)
        return _Weight(linear.weight, value, scale, sums, channels, np.ascontiguousarray(few))

    def _constant(self, name: str, values: Any) -> ir.Value:
        """An initializer, made once."""
        ir, held = require("onnx_ir"), self.model.graph.initializers
        if name not in held:
            tensor = ir.Tensor(np.asarray(values), name=name)
            value = ir.Value(name=name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
            self.model.graph.register_initializer(value)
        return held[name]

    def _node(
        self,
        place: ir.Node,
        operator: str,
        inputs: list[ir.Value],
        name: str,
        attributes: dict[str, int] | None = None,
        domain: str = "",
    ) -> ir.Value:
        """The output of a new node in front of `place`."""
        ir = require("onnx_ir")
        made = ir.node(operator, inputs, attributes or {}, domain=domain, name=name)
        made.outputs[0].name = f"{name}:0"
        self.model.graph.insert_before(place, made)
        return made.outputs[0]  # type: ignore[no-any-return]


def _without(weight: npt.NDArray[np.float32], channels: Channels) -> npt.NDArray[np.float32]:
    """A weight [rows, columns] whose rows `channels` are zero."""
    if not channels.size:
        return weight
    cut = weight.copy()
    cut[channels] = 0
    return cut


def _transposed(node: ir.Node) -> bool:
    return "transB" in node.attributes and bool(node.attributes["transB"].as_int())


def _uint8() -> int:
    return int(require("onnx_ir").DataType.UINT8)
