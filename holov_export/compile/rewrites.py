"""How single operators are written in an older opset, or without an operator that TensorRT 8.5 lacks.

`REWRITES` holds the operators whose form changed after opset 17; `WIDENED` those whose later versions only gained
element types, attributes or inputs, so that a node that uses none of these is already one of opset 17.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from holov_export.errors import UsageError
from holov_export.extras import require

if TYPE_CHECKING:
    from onnx import GraphProto, NodeProto, TensorProto

#: operators changed between opset 18 and 24 by more element types, attributes or optional inputs only
# fmt: off
WIDENED = frozenset(
    {
        "Acos", "Acosh", "Asin", "Asinh", "Atan", "Atanh", "AveragePool", "Cast", "CastLike", "Constant",
        "ConstantOfShape", "Conv", "ConvTranspose", "Cos", "Cosh", "DequantizeLinear", "Dropout", "Elu", "Equal",
        "EyeLike", "Flatten", "GRU", "GlobalAveragePool", "GlobalLpPool", "GlobalMaxPool", "HardSigmoid",
        "HardSwish", "Identity", "If", "InstanceNormalization", "IsInf", "IsNaN", "LSTM", "Loop", "LpNormalization",
        "LpPool", "MaxPool", "Pad", "QuantizeLinear", "RNN", "RandomNormal", "RandomNormalLike", "RandomUniform",
        "RandomUniformLike", "Reshape", "Resize", "RoiAlign", "Round", "Scan", "ScatterElements", "ScatterND",
        "Selu", "Shape", "Sin", "Sinh", "Size", "Softplus", "Softsign", "Squeeze", "Tan", "ThresholdedRelu", "TopK",
        "Transpose", "Unsqueeze",
    }
)
# fmt: on
#: values that an attribute may have in opset 17 although a later one knows more, or means something else by them
#: (the pools of opset 22 count the last window of ceil_mode differently)
OLD_VALUES: dict[tuple[str, str], frozenset[str | int]] = {
    ("AveragePool", "ceil_mode"): frozenset({0}),
    ("MaxPool", "ceil_mode"): frozenset({0}),
    ("ScatterElements", "reduction"): frozenset({"none", "add", "mul"}),
    ("ScatterND", "reduction"): frozenset({"none", "add", "mul"}),
    ("Pad", "mode"): frozenset({"constant", "reflect", "edge"}),
    ("Resize", "coordinate_transformation_mode"): frozenset(
        {"half_pixel", "pytorch_half_pixel", "align_corners", "asymmetric", "tf_crop_and_resize"}
    ),
}


class GraphRewrite:
    """One graph, the main one or the body of a control-flow node, while nodes of it are replaced.

    Attributes:
        graph: is changed in place.
        types: value name -> TensorProto.DataType, as far as it could be inferred.
        ranks: value name -> number of axes, likewise.
        constants: value name -> tensor, of this graph and of those around it.
        taken: every name of the whole model; new ones are added.
    """

    def __init__(
        self,
        graph: GraphProto,
        types: dict[str, int],
        ranks: dict[str, int],
        constants: dict[str, TensorProto],
        taken: set[str],
    ) -> None:
        self.graph = graph
        self.types = types
        self.ranks = ranks
        self.constants = {**constants, **constants_of(graph)}
        self.taken = taken

    def node(self, parent: NodeProto, operator: str, inputs: Sequence[str], **attributes: Any) -> NodeProto:
        """A node named "PARENT/Operator" whose one output is named after it."""
        name = self._fresh(f"{label_of(parent)}/{operator}")
        make_node = require("onnx").helper.make_node
        made: NodeProto = make_node(operator, list(inputs), [self._fresh(f"{name}:0")], name=name, **attributes)
        return made

    def constant(self, parent: NodeProto, word: str, array: np.ndarray[Any, Any]) -> str:
        """Add an initializer named "PARENT#word" and return its name."""
        name = self._fresh(f"{label_of(parent)}#{word}")
        tensor = require("onnx").numpy_helper.from_array(array, name)
        self.graph.initializer.append(tensor)
        self.constants[name] = tensor
        return name

    def type_of(self, node: NodeProto, name: str) -> int:
        """TensorProto.DataType of a value.

        Raises:
            UsageError: it could not be inferred.
        """
        if name in self.constants:
            return self.constants[name].data_type
        if not self.types.get(name):
            refuse(node, f"the element type of its input '{name}' is unknown")
        return self.types[name]

    def integers(self, node: NodeProto, index: int) -> list[int] | None:
        """The values of a constant integer input, None if the node lacks that input.

        Raises:
            UsageError: the input is computed, or its values lie in another file.
        """
        onnx = require("onnx")
        if index >= len(node.input) or not node.input[index]:
            return None
        name = node.input[index]
        tensor = self.constants.get(name)
        if tensor is None:
            refuse(node, f"its input '{name}' is computed, and opset 17 needs it as a constant")
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            refuse(node, f"the values of its input '{name}' lie in the weight file, which is not read")
        return [int(value) for value in onnx.numpy_helper.to_array(tensor).reshape(-1)]

    def _fresh(self, wanted: str) -> str:
        name, count = wanted, 0
        while name in self.taken:
            count += 1
            name = f"{wanted}_{count}"
        self.taken.add(name)
        return name


Rewrite = Callable[[GraphRewrite, "NodeProto"], "list[NodeProto]"]


def label_of(node: NodeProto) -> str:
    """What messages call a node: its name, or its first output if it has none."""
    return node.name or next((name for name in node.output if name), node.op_type)


def refuse(node: NodeProto, reason: str, hint: str = "Export the model with opset 17.") -> NoReturn:
    """Raise UsageError saying why a node cannot be written as TensorRT 8 reads it."""
    raise UsageError(f"{node.op_type} '{label_of(node)}' cannot be lowered: {reason}.", hint=hint)


def constants_of(graph: GraphProto) -> dict[str, TensorProto]:
    """Initializers and outputs of Constant nodes that hold a tensor or a list of numbers."""
    onnx = require("onnx")
    found = {tensor.name: tensor for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type != "Constant" or node.domain not in ("", "ai.onnx"):
            continue
        for attribute in node.attribute:
            if attribute.name == "value":
                found[node.output[0]] = attribute.t
            elif attribute.name in ("value_int", "value_ints", "value_float", "value_floats"):
                dtype = np.int64 if "int" in attribute.name else np.float32
                value = np.asarray(onnx.helper.get_attribute_value(attribute), dtype)
                found[node.output[0]] = onnx.numpy_helper.from_array(value, node.output[0])
    return found


def attributes_of(node: NodeProto) -> dict[str, Any]:
    """Attribute name -> Python value; strings are decoded."""
    helper = require("onnx").helper
    values = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
    return {name: value.decode() if isinstance(value, bytes) else value for name, value in values.items()}


# ------------------------------------------------------------------------------------------- operators after opset 17


_PLAIN_REDUCTIONS = frozenset({"ReduceMax", "ReduceMean", "ReduceMin", "ReduceProd"})


def _reduce(rewrite: GraphRewrite, node: NodeProto) -> list[NodeProto]:
    """The axes of a reduction are an attribute before opset 18."""
    helper = require("onnx").helper
    attributes, axes = attributes_of(node), rewrite.integers(node, 1)
    if not axes and attributes.get("noop_with_empty_axes", 0):
        if node.op_type not in _PLAIN_REDUCTIONS:
            refuse(node, "'noop_with_empty_axes' leaves out the sum and keeps what is around it")
        identity = helper.make_node("Identity", node.input[:1], node.output, name=node.name)
        return [identity]
    kept = {"keepdims": attributes.get("keepdims", 1), **({"axes": axes} if axes else {})}
    return [helper.make_node(node.op_type, node.input[:1], node.output, name=node.name, **kept)]


def _split(rewrite: GraphRewrite, node: NodeProto) -> list[NodeProto]:
    """`num_outputs` may leave the last part smaller; opset 17 wants equal parts or their sizes."""
    attributes = attributes_of(node)
    if "num_outputs" not in attributes:
        return [node]
    refuse(node, "'num_outputs' says how many parts, opset 17 wants the size of each", "Split with explicit sizes.")


def _gelu(rewrite: GraphRewrite, node: NodeProto) -> list[NodeProto]:
    """0.5 x (1 + erf(x / sqrt 2)), or the tanh form. Source: onnx/onnx Gelu-20."""
    source = node.input[0]
    dtype = require("onnx").helper.tensor_dtype_to_np_dtype(rewrite.type_of(node, source))

    def constant(word: str, value: float) -> str:
        return rewrite.constant(node, word, np.asarray(value, dtype))

    def step(operator: str, *inputs: str) -> str:
        made = rewrite.node(node, operator, inputs)
        nodes.append(made)
        return str(made.output[0])

    nodes: list[NodeProto] = []
    if attributes_of(node).get("approximate", "none") == "tanh":
        cube = step("Mul", step("Mul", source, source), source)
        inner = step("Add", source, step("Mul", cube, constant("cubic", 0.044715)))
        bend = step("Tanh", step("Mul", inner, constant("slope", math.sqrt(2 / math.pi))))
    else:
        bend = step("Erf", step("Mul", source, constant("slope", math.sqrt(0.5))))
    half = step("Mul", source, constant("half", 0.5))
    step("Mul", half, step("Add", bend, constant("one", 1.0)))
    nodes[-1].output[0] = node.output[0]
    return nodes


def _mish(rewrite: GraphRewrite, node: NodeProto) -> list[NodeProto]:
    """x tanh(softplus(x)). Source: onnx/onnx Mish-18."""
    softplus = rewrite.node(node, "Softplus", node.input)
    tanh = rewrite.node(node, "Tanh", softplus.output)
    product = rewrite.node(node, "Mul", [node.input[0], tanh.output[0]])
    product.output[0] = node.output[0]
    return [softplus, tanh, product]


REWRITES: dict[str, Rewrite] = {
    **{
        f"Reduce{kind}": _reduce
        for kind in ("L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod", "SumSquare")
    },
    "Gelu": _gelu,
    "Mish": _mish,
    "Split": _split,
}


# ------------------------------------------------------------------------------------ operators that TensorRT 8.5 lacks


def decompose_layer_normalization(rewrite: GraphRewrite, node: NodeProto) -> list[NodeProto]:
    """(x - mean) / sqrt(mean((x - mean)^2) + epsilon), then scale and bias; the statistics in float32.

    As ONNX defines the operator with stash_type 1: the quotient goes back to the type of x before it is scaled.
    Source: onnx/onnx LayerNormalization-17.
    """
    onnx = require("onnx")
    attributes = attributes_of(node)
    if attributes.get("stash_type", 1) != onnx.TensorProto.FLOAT:
        refuse(node, f"its statistics have type {attributes['stash_type']} and not float32")
    if any(node.output[1:]):
        refuse(node, "its mean and deviation are read too", "Use only its first output.")
    axes, dtype = _normalized_axes(rewrite, node), rewrite.type_of(node, node.input[0])
    nodes: list[NodeProto] = []

    def step(operator: str, *inputs: str, **settings: Any) -> str:
        made = rewrite.node(node, operator, inputs, **settings)
        nodes.append(made)
        return str(made.output[0])

    wide = dtype == onnx.TensorProto.FLOAT
    x = node.input[0] if wide else step("Cast", node.input[0], to=onnx.TensorProto.FLOAT)
    deviation = step("Sub", x, step("ReduceMean", x, axes=axes, keepdims=1))
    variance = step("ReduceMean", step("Mul", deviation, deviation), axes=axes, keepdims=1)
    epsilon = rewrite.constant(node, "epsilon", np.asarray(attributes.get("epsilon", 1e-5), np.float32))
    y = step("Div", deviation, step("Sqrt", step("Add", variance, epsilon)))
    y = y if wide else step("Cast", y, to=dtype)
    y = step("Mul", y, node.input[1])
    if len(node.input) > 2 and node.input[2]:
        step("Add", y, node.input[2])
    nodes[-1].output[0] = node.output[0]
    return nodes


def _normalized_axes(rewrite: GraphRewrite, node: NodeProto) -> list[int]:
    """Negative axes from `axis` to the last."""
    axis = int(attributes_of(node).get("axis", -1))
    if axis >= 0:
        rank = rewrite.ranks.get(node.input[0])
        if rank is None:
            refuse(node, "its axis counts from the front and the rank of its input is unknown", "Use a negative axis.")
        axis -= rank
    return list(range(axis, 0))
