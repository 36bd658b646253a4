"""Moves outliers of activations into the weights before both are rounded; the float graph computes what it did.

A channel that is a hundred times larger than the others takes the scale of its whole tensor. It is divided by s in the
norm or in the columns of the product before it, and the rows of the products that read it are multiplied by s.

    s_j = max|X_j|^alpha / max|W_j|^(1 - alpha)    for channel j

Source: Xiao et al., SmoothQuant, arXiv 2211.10438, equation 4. W are the rows of all quantised products that read the
channel; products that stay in float, deciding ones as well, are compensated and have no say in s.

Folded are the inputs of query, key, value and first MLP product (into the norm's weight and bias), of the output
projection (into the columns of the value projection: attention mixes tokens, not channels), and of a gated MLP's last
product (into the half that is not gated). Not folded: what follows a GELU, the residual stream, packed projections.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from holov_export.compile.lowering import inferred
from holov_export.errors import UsageError
from holov_export.extras import require
from holov_export.quantize.channels import Channels, Gain, Origin
from holov_export.quantize.linears import Linear
from holov_export.quantize.ranges import ChannelRange, Ranges, TensorRange

if TYPE_CHECKING:
    import onnx_ir as ir
    from onnx import ModelProto

Factors = npt.NDArray[np.float32]
#: bounds of s and 1/s, so that a nearly dead channel does not send a float16 weight out of its range
_MOST = 1024.0


def smoothed(
    model: ir.Model,
    proto: ModelProto,
    linears: Sequence[Linear],
    chosen: Sequence[Linear],
    ranges: Ranges,
    alpha: float,
) -> tuple[Ranges, tuple[str, ...]]:
    """Smooth a float graph in place. Weights stay lazy: each is computed when it is written.

    Args:
        proto: the same graph without its weights. linears: all of it. chosen: those that will be quantised.

    Returns:
        (ranges of the smoothed graph: of a smoothed activation from those of its channels, whatever the algorithm was;
        names of the linears whose input was smoothed).

    Raises:
        UsageError: the ranges of an activation's channels are missing, of another width or not finite.
    """
    work = _Smoothing(model, {linear.weight for linear in chosen}, ranges, alpha)
    channels = Channels(model, tuple(linears), inferred(proto)[1])
    for linear in chosen:  # before the gains: these change columns, and rows of products whose input is no norm's
        origin = channels.origin_of(linear)
        if origin is not None:
            work.fold_into_columns(origin, linear)
    for gain in channels.gains():
        work.fold_into_gain(gain)
    record = ranges.record.model_copy(update={"tensors": work.tensors})
    return Ranges(record=record, channels=work.channels), tuple(work.names)


class _Smoothing:
    """A graph in work, and the ranges as they have become."""

    def __init__(self, model: ir.Model, chosen: set[str], ranges: Ranges, alpha: float) -> None:
        self._graph = model.graph
        self._chosen = chosen
        self._alpha = alpha
        self.tensors = dict(ranges.record.tensors)
        self.channels = dict(ranges.channels)
        self.names: list[str] = []

    def fold_into_gain(self, gain: Gain) -> None:
        readers = [linear for linear in gain.readers if linear.weight in self._chosen]
        if not readers:
            return
        wanted = self._factors(readers, gain.activations)
        weight = gain.node.inputs[gain.factor]
        assert weight is not None
        before = _array(weight)
        after = self._replaced(gain.node, gain.factor, before / wanted)
        # what the norm's weight really became in its type: the products make up for its rounding too
        usable = (before != 0) & (after != 0)
        factors = np.where(usable, before / np.where(usable, after, 1), wanted).astype(np.float32)
        if gain.offset is not None:
            offset = gain.node.inputs[gain.offset]
            assert offset is not None
            self._replaced(gain.node, gain.offset, _array(offset) / factors)
        for linear in gain.readers:
            self._scale_weight(linear, factors, rows=True)
        self._divide_ranges(gain.activations, factors)
        self.names += [linear.name for linear in readers]

    def fold_into_columns(self, origin: Origin, linear: Linear) -> None:
        factors = self._factors([linear], linear.activations)
        self._scale_weight(origin.linear, np.reciprocal(factors), rows=False)
        if origin.bias is not None:
            node, place = origin.bias
            value = node.inputs[place]
            assert value is not None
            self._replaced(node, place, _array(value) / factors)
        self._scale_weight(linear, factors, rows=True)
        self._divide_ranges(linear.activations, factors)
        self.names.append(linear.name)

    def _factors(self, readers: Sequence[Linear], activations: Sequence[str]) -> Factors:
        """s of every channel, float32 [width]; 1 where the activation or the weights are nothing but zero."""
        known = [self._channels_of(name, readers[0].rows) for name in activations if name in self.channels]
        if not known:
            raise UsageError(f"the calibration has no channels of '{activations[0]}'.", hint="Calibrate again.")
        inputs = np.max([np.maximum(np.abs(item.low), np.abs(item.high)) for item in known], axis=0)
        weights = np.max([self._rows(linear) for linear in readers], axis=0)
        live = (inputs > 0) & (weights > 0)
        alpha = self._alpha
        factors = np.where(live, inputs, 1) ** alpha / np.where(live, weights, 1) ** (1 - alpha)
        return np.clip(factors, 1 / _MOST, _MOST).astype(np.float32)

    def _channels_of(self, name: str, width: int) -> ChannelRange:
        found = self.channels[name]
        both = (np.asarray(found.low), np.asarray(found.high))
        if any(side.shape != (width,) or not np.isfinite(side).all() for side in both):
            raise UsageError(
                f"the channels of '{name}' have no finite ranges, or are not {width}.", hint="Calibrate again."
            )
        return found

    def _rows(self, linear: Linear) -> Factors:
        values = np.abs(_array(self._graph.initializers[linear.weight]))
        return values.max(axis=1 - self._row_axis(linear))  # type: ignore[no-any-return]

    def _row_axis(self, linear: Linear) -> int:
        """The axis of the stored weight that the input channels lie on."""
        shape = self._graph.initializers[linear.weight].shape
        node = next(node for node in self._graph if node.name == linear.nodes[0])
        assert shape is not None
        return 1 if "transB" in node.attributes and node.attributes["transB"].as_int() else 0

    def _scale_weight(self, linear: Linear, factors: Factors, *, rows: bool) -> None:
        onnx_ir = require("onnx_ir")
        value = self._graph.initializers[linear.weight]
        tensor, axis = value.const_value, self._row_axis(linear)
        assert tensor is not None
        along = factors[:, None] if (axis == 0) == rows else factors[None, :]

        def evaluate() -> ir.TensorProtocol:
            values = (tensor.numpy().astype(np.float32) * along).astype(tensor.dtype.numpy())
            stored: ir.TensorProtocol = onnx_ir.Tensor(values, dtype=tensor.dtype, name=value.name)
            return stored

        shape = onnx_ir.Shape(tensor.shape.numpy())
        value.const_value = onnx_ir.LazyTensor(evaluate, dtype=tensor.dtype, shape=shape, name=value.name)

    def _replaced(self, node: ir.Node, place: int, values: Factors) -> Factors:
        """Give a node a constant of its own; what others share stays. Returns the constant as its type holds it."""
        onnx_ir = require("onnx_ir")
        old = node.inputs[place]
        assert old is not None
        assert old.dtype is not None
        stored = values.astype(old.dtype.numpy())
        name = f"{node.name}#{place}.smoothed"
        tensor = onnx_ir.Tensor(stored, dtype=old.dtype, name=name)
        new = onnx_ir.Value(name=name, shape=tensor.shape, type=onnx_ir.TensorType(old.dtype), const_value=tensor)
        self._graph.register_initializer(new)
        node.replace_input_with(place, new)
        if not old.uses():
            del self._graph.initializers[str(old.name)]
        return stored.astype(np.float32)

    def _divide_ranges(self, activations: Sequence[str], factors: Factors) -> None:
        for name in activations:
            if name not in self.channels:  # only products that stay in float read it
                continue
            old = self.channels[name]
            new = replace(old, low=old.low / factors, high=old.high / factors)
            self.channels[name] = new
            self.tensors[name] = TensorRange(low=float(new.low.min()), high=float(new.high.max()))


def _array(value: ir.Value) -> Any:
    assert value.const_value is not None
    return value.const_value.numpy().astype(np.float32)
