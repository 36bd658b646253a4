"""INetworkDefinition and what is in it: tensors and layers, one layer for each ONNX node."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import onnx

from tensorrt_standin.facade import Core

if TYPE_CHECKING:
    from tensorrt_standin.builder import Builder
    from tensorrt_standin.world import World

_FLOATS = ("FLOAT", "HALF", "BF16", "FP8")
#: ONNX operator -> LayerType, where it is not ELEMENTWISE. A rough map: real parsers make several layers of one node.
_LAYER_TYPES = {
    "Cast": "CAST",
    "Concat": "CONCATENATION",
    "Constant": "CONSTANT",
    "Conv": "CONVOLUTION",
    "CumSum": "LOOP_OUTPUT",
    "DequantizeLinear": "DEQUANTIZE",
    "Einsum": "EINSUM",
    "Expand": "SLICE",
    "Flatten": "SHUFFLE",
    "Gather": "GATHER",
    "GatherElements": "GATHER",
    "GatherND": "GATHER",
    "Gemm": "MATRIX_MULTIPLY",
    "Identity": "IDENTITY",
    "LayerNormalization": "NORMALIZATION",
    "Loop": "LOOP_OUTPUT",
    "MatMul": "MATRIX_MULTIPLY",
    "NonZero": "NON_ZERO",
    "OneHot": "ONE_HOT",
    "QuantizeLinear": "QUANTIZE",
    "Range": "FILL",
    "Reshape": "SHUFFLE",
    "ScatterElements": "SCATTER",
    "ScatterND": "SCATTER",
    "Shape": "SHAPE",
    "Slice": "SLICE",
    "Softmax": "SOFTMAX",
    "Squeeze": "SHUFFLE",
    "TopK": "TOPK",
    "Transpose": "SHUFFLE",
    "Unsqueeze": "SHUFFLE",
    "Where": "SELECT",
}
_UNARY = ("Abs", "Ceil", "Cos", "Erf", "Exp", "Floor", "IsInf", "IsNaN", "Log", "Neg", "Not", "Round", "Sin", "Sqrt")


class ITensor(Core):
    """A value of the network."""

    writable: ClassVar[dict[str, str]] = {"name": "str", "allowed_formats": "int"}

    def __init__(
        self, world: World, network: INetworkDefinition, name: str, dtype: str, shape: tuple[int, ...]
    ) -> None:
        super().__init__(world)
        self.network, self.name, self._dtype, self._shape = network, name, dtype, shape
        self.is_shape = False
        self.dimension_names: dict[int, str] = {}
        self.allowed_formats = 1

    @property
    def dtype(self) -> Any:
        return self.world.enum("DataType", self._dtype)

    @dtype.setter
    def dtype(self, value: Any) -> None:
        if self.network.strongly_typed:
            self.network.complain("ITensor::setType is not supported in strongly typed network")
        self._dtype = value.name

    @property
    def shape(self) -> Any:
        return self.world.classes["Dims"](self._shape)

    @property
    def is_shape_tensor(self) -> bool:
        return self.is_shape

    @property
    def is_execution_tensor(self) -> bool:
        return not self.is_shape

    @property
    def is_network_input(self) -> bool:
        return self in self.network.inputs

    @property
    def is_network_output(self) -> bool:
        return self in self.network.outputs

    @property
    def location(self) -> Any:
        return self.world.enum("TensorLocation", "HOST" if self.is_shape else "DEVICE")

    def set_dimension_name(self, index: int, name: str) -> None:
        self.dimension_names[index] = name

    def get_dimension_name(self, index: int) -> str | None:
        return self.dimension_names.get(index)


class ILayer(Core):
    """One ONNX node, or the constant of one initializer."""

    writable: ClassVar[dict[str, str]] = {"name": "str", "metadata": "str"}

    def __init__(
        self, world: World, network: INetworkDefinition, node: onnx.NodeProto, inputs: list[Any], outputs: list[ITensor]
    ) -> None:
        super().__init__(world)
        self.network, self.node, self.inputs, self.outputs = network, node, inputs, outputs
        self.name = node.name or node.output[0]
        self.metadata = ""
        self._precision: str | None = None
        self.output_types: dict[int, str] = {}

    @property
    def type(self) -> Any:
        operator = self.node.op_type
        fallback = "UNARY" if operator in _UNARY else "REDUCE" if operator.startswith("Reduce") else "ELEMENTWISE"
        return self.world.enum("LayerType", _LAYER_TYPES.get(operator, fallback))

    @property
    def num_inputs(self) -> int:
        return len(self.inputs)

    @property
    def num_outputs(self) -> int:
        return len(self.outputs)

    def get_input(self, index: int) -> Any:
        return self.inputs[index] if 0 <= index < len(self.inputs) else None

    def get_output(self, index: int) -> Any:
        return self.outputs[index] if 0 <= index < len(self.outputs) else None

    @property
    def precision(self) -> Any:
        return self.world.enum("DataType", self._precision or "FLOAT")

    @precision.setter
    def precision(self, value: Any) -> None:
        if self.network.strongly_typed:
            self.network.complain("ILayer::setPrecision is not supported in strongly typed network")
        self._precision = value.name

    @property
    def precision_is_set(self) -> bool:
        return self._precision is not None

    def reset_precision(self) -> None:
        self._precision = None

    def set_output_type(self, index: int, dtype: Any) -> None:
        if self.network.strongly_typed:
            self.network.complain("ILayer::setOutputType is not supported in strongly typed network")
        self.output_types[index] = dtype.name

    def get_output_type(self, index: int) -> Any:
        return self.world.enum("DataType", self.output_types.get(index, self.outputs[index]._dtype))

    def output_type_is_set(self, index: int) -> bool:
        return index in self.output_types

    def reset_output_type(self, index: int) -> None:
        self.output_types.pop(index, None)

    def impossible(self) -> bool:
        """Whether what is pinned asks for floats where the node has none."""
        types = [tensor._dtype for tensor in (*self.inputs, *self.outputs) if tensor is not None]
        no_floats = not any(name in _FLOATS for name in types)
        if self._precision in _FLOATS and no_floats:
            return True
        return any(
            dtype in _FLOATS and self.outputs[place]._dtype not in _FLOATS for place, dtype in self.output_types.items()
        )


class INetworkDefinition(Core):
    """What the parser fills.

    Attributes:
        model: the ONNX model with its weights inside; None before a parse.
        flags: names of NetworkDefinitionCreationFlag.
        faults: what was asked of it that TensorRT refuses; a network with any cannot be built.
    """

    writable: ClassVar[dict[str, str]] = {"name": "str"}

    def __init__(self, world: World, builder: Builder, flags: set[str]) -> None:
        super().__init__(world)
        self._builder, self.flag_names = builder, flags
        self.name = "Unnamed Network 0"
        self.model: onnx.ModelProto | None = None
        self.inputs: list[ITensor] = []
        self.outputs: list[ITensor] = []
        self.layers: list[ILayer] = []
        self.faults: list[str] = []

    @property
    def strongly_typed(self) -> bool:
        """Always in TensorRT 11. Source: its header calls the flag deprecated and ignored."""
        return "STRONGLY_TYPED" in self.flag_names or not self.world.before("11.0.0")

    def complain(self, text: str) -> None:
        self.faults.append(text)
        self.world.log(self._builder.logger, "ERROR", f"Error Code 3: API Usage Error ({text})")

    @property
    def builder(self) -> Builder:
        return self._builder

    @property
    def flags(self) -> int:
        return sum(1 << int(self.world.enum("NetworkDefinitionCreationFlag", name)) for name in self.flag_names)

    def get_flag(self, flag: Any) -> bool:
        return flag.name in self.flag_names

    @property
    def has_implicit_batch_dimension(self) -> bool:
        return self.world.before("10.0.0") and "EXPLICIT_BATCH" not in self.flag_names

    @property
    def num_inputs(self) -> int:
        return len(self.inputs)

    @property
    def num_outputs(self) -> int:
        return len(self.outputs)

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    def get_input(self, index: int) -> Any:
        return self.inputs[index] if 0 <= index < len(self.inputs) else None

    def get_output(self, index: int) -> Any:
        return self.outputs[index] if 0 <= index < len(self.outputs) else None

    def get_layer(self, index: int) -> Any:
        return self.layers[index] if 0 <= index < len(self.layers) else None

    def pinned(self) -> dict[str, tuple[str | None, tuple[str, ...]]]:
        """Layer name -> (precision, output types) of every layer that somebody pinned."""
        return {
            layer.name: (layer._precision, tuple(layer.output_types.values()))
            for layer in self.layers
            if layer._precision or layer.output_types
        }
