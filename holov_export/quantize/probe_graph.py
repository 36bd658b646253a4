"""One graph for every mixture of precisions: what is quantised is an input, so that a sweep needs one session.

    quantized[g] --> If: true   x --Q/DQ--> MatMul <--DQ-- W rounded
                         false  x --------> MatMul <------ W

Only the branch that is asked for is computed. With all switches off the graph gives the numbers of the graph that it
was made from, bit for bit in float32. (A float16 graph is rounded more often than by ONNX Runtime's CPU provider alone,
which widens to float32 and leaves out what it can; so compare with the probe's own float results.) The arithmetic is
float in both branches: values are rounded as `quantize.qdq` or `quantize.cpu` round them, and the products of rounded
values are added up in the type of the graph.

The float weights stay in their file; the rounded ones, a quarter of them, are in the model itself. Nothing is written.

Smoothing divides a channel where the product reads it, in the true branch alone. That is the smoothed graph up to
rounding: there, the norm before divides, and columns that are multiplied have scales of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from holov_export.compile.graph_file import graph_from_file
from holov_export.compile.lowering import opset_of
from holov_export.errors import UsageError
from holov_export.extras import require
from holov_export.quantize.cpu import AROUND_ZERO
from holov_export.quantize.linears import Linear, linears_of, quantised_linears
from holov_export.quantize.outliers import Channels
from holov_export.quantize.probe_calibration import ProbeCalibration, probe_calibration
from holov_export.quantize.probe_groups import ProbeGroup, groups_of
from holov_export.quantize.probe_rounding import Branch, FixedScale, RowScales
from holov_export.quantize.ranges import Ranges
from holov_export.quantize.scales import rounded_values, scales_from_largest
from holov_export.spec import QUANTIZED_OPSET, Quantization, QuantizedType

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, NodeProto, TensorProto

#: further input, bool [groups]: which of them are quantised
SWITCHES = "quantized"
#: further output, int64 [products]: multiplications of each product of each linear, quantised or not
MULTIPLICATIONS = "multiplications"
_NONE: Channels = np.empty(0, np.int64)


@dataclass(frozen=True)
class ProbeGraph:
    """A graph with switches.

    Attributes:
        model: its float weights are in a file of `folder`.
        groups: what each switch is for. linears: all products with weights of the graph.
    """

    model: ModelProto
    folder: Path
    groups: tuple[ProbeGroup, ...]
    linears: tuple[Linear, ...]


@dataclass(frozen=True)
class _Activation:
    """What happens to an activation in a true branch: names of initializers, None for what does not.

    Attributes:
        how: its scales. smooth: what its channels are multiplied by before.
        places, mask: of channels that are multiplied in float and not rounded (`quantize.outliers`): their indices, and
            1 for every other channel.
    """

    how: FixedScale | RowScales
    smooth: str | None = None
    places: str | None = None
    mask: str | None = None


def probe_from_graph(
    source: Path, quantization: Quantization, ranges: Ranges | None, *, whole_layers: bool = False
) -> ProbeGraph:
    """The graph of a file with a switch for each group of products that `quantization` would quantise.

    Smoothing is that of a graph in which every group is quantised; where some are not, a real one may smooth a little
    differently, because products that stay in float have no say in it.

    Args:
        source: a float graph. quantization: with `keep`, which has no switch.
        ranges: of its activations. For engine "cpu", whose ranges are found at run time, only smoothing needs them.
        whole_layers: one switch a layer instead of one for each of its parts.

    Raises:
        UsageError: a bfloat16 graph, or one that is not float32 for engine "cpu"; no range of an activation; a pattern
            of `keep` that names nothing.
    """
    model = graph_from_file(source)
    linears = linears_of(model)
    chosen = quantised_linears(linears, quantization.keep)
    groups = tuple(groups_of(linears, chosen, whole_layers=whole_layers))
    work = _Work(
        model, source.parent, quantization, probe_calibration(source, model, linears, chosen, quantization, ranges)
    )
    _ready(model, work.dtype, quantization)
    for place, group in enumerate(groups):
        work.add_switch(place)
        for linear in group.linears:
            for activation in linear.activations:
                work.add_activation(activation)
            work.add_weight(linear)
    switches = {node: place for place, group in enumerate(groups) for item in group.linears for node in item.nodes}
    work.rewire({node: item for item in chosen for node in item.nodes}, switches)
    work.count(linears)
    return ProbeGraph(model, source.parent, groups, linears)


def _ready(model: ModelProto, dtype: int, quantization: Quantization) -> None:
    """Raise the opset where that is needed; drop what was inferred, because it does not fit any more.

    Raises:
        UsageError: a bfloat16 graph, or one that is not float32 for engine "cpu".
    """
    types = require("onnx").TensorProto
    if dtype == types.BFLOAT16:
        raise UsageError(
            "ONNX Runtime's CPU provider cannot run a bfloat16 graph.",
            hint="Measure the same model exported with --fp32 or --fp16, and use what it says here.",
        )
    if quantization.engine == "cpu" and dtype != types.FLOAT:
        raise UsageError("a CPU computes in float32.", hint="Measure a --fp32 bundle.")
    if quantization.type is QuantizedType.FP8 or dtype != types.FLOAT:
        for item in model.opset_import:
            if item.domain in ("", "ai.onnx"):
                item.version = max(opset_of(model), QUANTIZED_OPSET)
    del model.graph.value_info[:]


def _channel_axis(node: NodeProto) -> int:
    """The axis of a weight that its output channels lie on: 0 for Gemm with transB, else 1."""
    return 0 if any(item.name == "transB" and item.i for item in node.attribute) else 1


class _Work:
    """A graph that gets its switches. The activations of a product are added before its weight."""

    def __init__(
        self, model: ModelProto, folder: Path, quantization: Quantization, calibration: ProbeCalibration
    ) -> None:
        self._onnx = require("onnx")
        self._graph: GraphProto = model.graph
        self._folder = folder
        self._by_row = quantization.engine == "cpu"
        self._type = quantization.type
        self._calibration = calibration
        self._tensors: dict[str, TensorProto] = {item.name: item for item in model.graph.initializer}
        self._activations: dict[str, _Activation] = {}
        self._nodes: list[NodeProto] = []
        self._products = {node.name: node for node in model.graph.node}
        self._operators = {name: node.op_type for node in model.graph.node for name in node.output}
        linears = linears_of(model)
        self._widths = {name: linear.rows for linear in linears for name in linear.activations}
        self.dtype: int = self._tensors[linears[0].weight].data_type

    def add_switch(self, place: int) -> None:
        index = self._constant(f"{SWITCHES}.{place}.index", np.int64(place))
        self._nodes.append(self._onnx.helper.make_node("Gather", [SWITCHES, index], [f"{SWITCHES}.{place}"]))

    def add_weight(self, linear: Linear) -> None:
        """The rounded weight and its scales by output channel; the rows of outliers apart, and not rounded."""
        axis = _channel_axis(self._products[linear.nodes[0]])
        values = self._onnx.numpy_helper.to_array(self._tensors[linear.weight], str(self._folder)).astype(np.float32)
        smooth = self._calibration.factors.get(linear.activations[0])
        if smooth is not None:
            values = values / (smooth[:, None] if axis == 1 else smooth[None, :])
        channels = self._outliers(linear)
        if channels.size:
            few = values.take(channels, axis=1 - axis)
            self._constant(f"{linear.weight}.few", few if axis == 1 else few.T)
            values = values.copy()
            values[channels if axis == 1 else (slice(None), channels)] = 0
        kind = self._onnx.helper.tensor_dtype_to_np_dtype(self.dtype)
        scales = scales_from_largest(np.abs(values).max(axis=1 - axis), self._type, kind)
        rounded = rounded_values(values, scales if axis == 1 else scales[:, None], self._type)
        self._constant(f"{linear.weight}.rounded", rounded)
        self._constant(f"{linear.weight}.scale", scales)

    def _outliers(self, linear: Linear) -> Channels:
        """Of what all products with one weight read; none where these differ."""
        found = [self._calibration.outliers.get(name, _NONE) for name in linear.activations]
        return found[0] if all(np.array_equal(found[0], other) for other in found) else _NONE

    def add_activation(self, name: str) -> None:
        if name in self._activations:
            return
        kind, smooth = self._onnx.helper.tensor_dtype_to_np_dtype(self.dtype), self._calibration.factors.get(name)
        factors = None if smooth is None else self._constant(f"{name}.smooth", smooth.astype(kind))
        if not self._by_row:
            self._activations[name] = _Activation(self._fixed(name, kind), factors)
            return
        how = RowScales(around_zero=self._operators.get(name) in AROUND_ZERO)
        channels = self._calibration.outliers.get(name, _NONE)
        if not channels.size:
            self._activations[name] = _Activation(how, factors)
            return
        others = np.ones(self._widths[name], np.float32)
        others[channels] = 0
        places, mask = self._constant(f"{name}.places", channels), self._constant(f"{name}.mask", others)
        self._activations[name] = _Activation(how, factors, places, mask)

    def _fixed(self, name: str, kind: npt.DTypeLike) -> FixedScale:
        ranges = self._calibration.ranges
        found = None if ranges is None else ranges.record.tensors.get(name)
        if found is None:
            raise UsageError(f"the calibration has no range of '{name}'.", hint="Calibrate this graph again.")
        largest = max(abs(found.low), abs(found.high))
        scale = self._constant(f"{name}.scale", scales_from_largest(largest, self._type, kind))
        zero = self._constant(f"{self._type.value}.zero", rounded_values(np.zeros(1), np.ones(1), self._type)[0])
        return FixedScale(scale, zero)

    def rewire(self, linears: dict[str, Linear], switches: dict[str, int]) -> None:
        """Put an If in the place of each product; the switches' own nodes come first."""
        for node in self._graph.node:
            linear = linears.get(node.name)
            self._nodes.append(node if linear is None else self._either(node, linear, switches[node.name]))
        del self._graph.node[:]
        self._graph.node.extend(self._nodes)
        helper, groups = self._onnx.helper, len(set(switches.values()))
        kind = self._onnx.TensorProto.BOOL
        self._graph.input.append(helper.make_tensor_value_info(SWITCHES, kind, [groups]))

    def _either(self, node: NodeProto, linear: Linear, place: int) -> NodeProto:
        helper = self._onnx.helper
        return helper.make_node(  # type: ignore[no-any-return]
            "If",
            [f"{SWITCHES}.{place}"],
            [node.output[0]],
            name=node.name,
            then_branch=self._branch(self._rounded(node, linear), f"{node.output[0]}.rounded"),
            else_branch=self._branch([self._copy(node, [*node.input], "float")], f"{node.output[0]}.float"),
        )

    def _branch(self, nodes: list[NodeProto], output: str) -> GraphProto:
        helper = self._onnx.helper
        value = helper.make_tensor_value_info(output, self.dtype, None)
        return helper.make_graph(nodes, output, [], [value])  # type: ignore[no-any-return]

    def _copy(self, node: NodeProto, inputs: Sequence[str], ending: str) -> NodeProto:
        made = self._onnx.NodeProto()
        made.CopyFrom(node)
        del made.input[:]
        made.input.extend(inputs)
        made.name, made.output[0] = f"{node.name}/{ending}", f"{node.output[0]}.{ending}"
        return made  # type: ignore[no-any-return]

    def _rounded(self, node: NodeProto, linear: Linear) -> list[NodeProto]:
        """The product of the rounded activation and the rounded weight."""
        what, branch = self._activations[node.input[0]], Branch(self._onnx, node, self._constant)
        value = node.input[0]
        if what.smooth is not None:
            value = branch.add("Mul", [value, what.smooth], "smoothed")
        whole, apart = value, what.mask is not None and what.places is not None and self._outliers(linear).size > 0
        if apart:
            value = branch.add("Mul", [value, str(what.mask)], "others")
        value = branch.rounded(value, what.how)
        weight = [f"{linear.weight}.rounded", f"{linear.weight}.scale"]
        factor = branch.add("DequantizeLinear", weight, "weight", {"axis": _channel_axis(node)})
        branch.nodes.append(self._copy(node, [value, factor, *node.input[2:]], "most" if apart else "rounded"))
        if apart:
            few = branch.add("Gather", [whole, str(what.places)], "outliers", {"axis": -1})
            few = branch.add("MatMul", [few, f"{linear.weight}.few"], "few")
            branch.add("Add", [f"{node.output[0]}.most", few], "rounded")
        return branch.nodes

    def count(self, linears: Sequence[Linear]) -> None:
        """An output that says how many multiplications each product costs: elements that come out times rows."""
        helper, products = self._onnx.helper, {node.name: node for node in self._graph.node}
        one_axis = self._constant(f"{MULTIPLICATIONS}.axis", np.array([1], dtype=np.int64))
        nodes, parts = [], []
        for linear in linears:
            for name in linear.nodes:
                stem = f"{name}.{MULTIPLICATIONS}"
                rows = self._constant(f"{stem}.rows", np.int64(linear.rows))
                nodes += [
                    helper.make_node("Size", [products[name].output[0]], [f"{stem}.size"]),
                    helper.make_node("Mul", [f"{stem}.size", rows], [f"{stem}.all"]),
                    helper.make_node("Reshape", [f"{stem}.all", one_axis], [stem]),
                ]
                parts.append(stem)
        nodes.append(helper.make_node("Concat", parts, [MULTIPLICATIONS], axis=0))
        self._graph.node.extend(nodes)
        kind = self._onnx.TensorProto.INT64
        self._graph.output.append(helper.make_tensor_value_info(MULTIPLICATIONS, kind, [len(parts)]))

    def _constant(self, name: str, values: Any) -> str:
        """Add an initializer, once."""
        if name not in self._tensors:
            array = np.asarray(values)
            made = self._onnx.TensorProto(
                name=name,
                dims=array.shape,
                data_type=self._onnx.helper.np_dtype_to_tensor_dtype(array.dtype),
                raw_data=array.tobytes(),
            )
            self._graph.initializer.append(made)
            self._tensors[name] = made
        return name
