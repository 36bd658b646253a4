"""OnnxParser: an ONNX file becomes a network, or errors that name the node.

Source of which operators there are: operators.tsv (docs/operators.md of onnx/onnx-tensorrt at 8.6-EA and 10.1; the
first version of Attention and its companions from the documentation of 10.14 and 10.15); of the opsets: the same
pages (8.6 up to 17, 10.1 9 to 20) and those of 10.16 and 11.1 (9 to 24). For 10.13.3 no page was at hand: 22, the
opset before Attention, is unverified. Real parsers do not all refuse a newer opset; the stand-in does, because what
they make of it is not documented.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx
from onnx.external_data_helper import load_external_data_for_model

from tensorrt_standin.api import older, table
from tensorrt_standin.facade import Core
from tensorrt_standin.network import ILayer, INetworkDefinition, ITensor
from tensorrt_standin.quantization import DOWN, UP, node_faults
from tensorrt_standin.shapes import all_nodes, shape_tensors

if TYPE_CHECKING:
    from tensorrt_standin.world import World

_OPSETS = {"8.6.0": 17, "10.3.0": 20, "10.13.3": 22, "10.16.1": 24, "11.4.0": 24}
_TYPES = {
    "FLOAT": "FLOAT",
    "DOUBLE": "FLOAT",  # cast, in every version
    "FLOAT16": "HALF",
    "BFLOAT16": "BF16",
    "INT8": "INT8",
    "UINT8": "UINT8",
    "INT32": "INT32",
    "INT64": "INT64",
    "BOOL": "BOOL",
    "FLOAT8E4M3FN": "FP8",
}
#: Source: docs/Changelog.md of onnx/onnx-tensorrt, 9.0
_YOUNG = ("BFLOAT16", "FLOAT8E4M3FN")
#: k of TopK. Source: NvInfer.h, ITopKLayer::setK
_TOPK_LIMIT = 3840


@dataclass
class Fault:
    """One parser error before it has an object."""

    code: str
    text: str
    node: int = -1
    name: str = ""
    operator: str = ""


class ParserError(Core):
    """IParserError."""

    def __init__(self, world: World, fault: Fault) -> None:
        super().__init__(world)
        self.fault = fault

    def code(self) -> Any:
        return self.world.enum("ErrorCode", self.fault.code)

    def desc(self) -> str:
        return self.fault.text

    def file(self) -> str:
        return "ModelImporter.cpp"

    def line(self) -> int:
        return 0

    def func(self) -> str:
        return "parseNode"

    def node(self) -> int:
        return self.fault.node

    def node_name(self) -> str:
        return self.fault.name

    def node_operator(self) -> str:
        return self.fault.operator

    def local_function_stack(self) -> list[str]:
        return []

    def local_function_stack_size(self) -> int:
        return 0

    def __str__(self) -> str:
        return f"In node {self.fault.node} ({self.func()}): {self.fault.code}: {self.fault.text}"


class OnnxParser(Core):
    """Fills one network. `path` is the ONNX file itself; weights outside of it lie beside it."""

    def __init__(self, world: World, network: INetworkDefinition, logger: Any) -> None:
        super().__init__(world)
        self.network, self.logger = network, logger
        self.errors: list[Fault] = []
        self.flag_names: set[str] = set()

    @property
    def num_errors(self) -> int:
        return len(self.errors)

    def get_error(self, index: int) -> Any:
        return ParserError(self.world, self.errors[index]) if 0 <= index < len(self.errors) else None

    def clear_errors(self) -> None:
        self.errors.clear()

    def set_flag(self, flag: Any) -> None:
        self.flag_names.add(flag.name)

    def clear_flag(self, flag: Any) -> None:
        self.flag_names.discard(flag.name)

    def get_flag(self, flag: Any) -> bool:
        return flag.name in self.flag_names

    def set_builder_config(self, builder_config: Any) -> bool:
        return True

    def supports_operator(self, op_name: str) -> bool:
        return supports(self.world.version, op_name)

    def get_used_vc_plugin_libraries(self) -> list[str]:
        return []

    def parse_from_file(self, model: str) -> bool:
        path = Path(model if isinstance(model, str) else model.decode())
        if not path.is_file():
            return self._refuse(Fault("MODEL_DESERIALIZE_FAILED", f"Failed to open file: {path}"))
        return self.parse(path.read_bytes(), str(path))

    def parse(self, model: Any, path: str | None = None) -> bool:
        try:
            proto = onnx.load_model_from_string(bytes(memoryview(model)))
        except Exception:
            return self._refuse(Fault("MODEL_DESERIALIZE_FAILED", "Failed to parse the ONNX model."))
        try:
            load_external_data_for_model(proto, str(Path(path or ".").parent))
        except Exception as error:
            return self._refuse(Fault("INVALID_GRAPH", f"Failed to open file: {error}"))
        faults = list(_faults(proto, self.world.version))
        if faults:
            return self._refuse(*faults)
        if self.world.before("10.0.0") and "EXPLICIT_BATCH" not in self.network.flag_names:
            text = "the parser only supports networks with an explicit batch dimension"
            return self._refuse(Fault("INVALID_VALUE", text))
        if self.network.model is not None:
            return self._refuse(Fault("INVALID_GRAPH", "the network already holds a model"))
        fill_network(self.network, proto)
        return True

    def supports_model(self, model: Any, path: str | None = None) -> Any:
        faults = list(_faults(onnx.load_model_from_string(bytes(memoryview(model))), self.world.version))
        return (not faults, [])

    def supports_model_v2(self, model: Any, path: str | None = None) -> bool:
        return bool(self.supports_model(model, path)[0])

    def _refuse(self, *faults: Fault) -> bool:
        self.errors += faults
        for fault in faults:
            self.world.log(self.logger, "ERROR", f"ModelImporter.cpp: {fault.code}: {fault.text} {fault.name}".strip())
        return False


def supports(version: str, operator: str) -> bool:
    """Whether that version's parser knows the operator."""
    first = _first_versions().get(operator, "-")
    return first != "-" and not older(version, first)


def _first_versions() -> dict[str, str]:
    return {row["operator"]: row["first"] for row in table("operators.tsv")}


def _faults(model: onnx.ModelProto, version: str) -> Iterator[Fault]:
    known = _first_versions()
    for opset in model.opset_import:
        if opset.domain in ("", "ai.onnx") and not 7 <= opset.version <= _OPSETS[version]:
            yield Fault("UNSUPPORTED_GRAPH", f"opset {opset.version} is above {_OPSETS[version]}")
    for place, node in _placed_nodes(model.graph):
        first = known.get(node.op_type, "-")
        if node.domain not in ("", "ai.onnx") or first == "-" or older(version, first):
            text = f"No importer registered for op: {node.op_type}. Attempting to import as plugin failed."
            yield Fault("UNSUPPORTED_NODE", text, place, node.name, node.op_type)
    for item in (*model.graph.input, *model.graph.initializer):
        code = item.data_type if isinstance(item, onnx.TensorProto) else item.type.tensor_type.elem_type
        name = onnx.TensorProto.DataType.Name(code)
        if name not in _TYPES or (name in _YOUNG and older(version, "9.0.0")):
            yield Fault("UNSUPPORTED_NODE", f"Found unsupported datatype ({name}) when importing {item.name}")
    for place, node in enumerate(model.graph.node):
        if node.op_type in (DOWN, UP):
            for text in node_faults(model, node, version):
                yield Fault("INVALID_NODE", text, place, node.name, node.op_type)
    constants = {item.name: item for item in model.graph.initializer}
    for place, node in _placed_nodes(model.graph):
        if node.op_type == "TopK" and node.input[1] in constants:
            k = int(onnx.numpy_helper.to_array(constants[node.input[1]]).reshape(-1)[0])
            if k > _TOPK_LIMIT:
                yield Fault("UNSUPPORTED_NODE", f"K = {k} exceeds {_TOPK_LIMIT}", place, node.name, "TopK")


def _placed_nodes(graph: onnx.GraphProto) -> Iterator[tuple[int, onnx.NodeProto]]:
    """Every node with the place of the node of the main graph that holds it."""
    for place, node in enumerate(graph.node):
        yield place, node
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from ((place, inner) for inner in all_nodes(attribute.g))


def fill_network(network: INetworkDefinition, model: onnx.ModelProto) -> None:
    """Tensors and layers of a model that the parser accepted."""
    world = network.world
    network.model = model
    graph = model.graph
    types, shapes = _types_and_shapes(model, native_int64=not world.before("9.0.0"))
    tensors: dict[str, ITensor] = {}

    def tensor(name: str) -> ITensor:
        if name not in tensors:
            tensors[name] = ITensor(world, network, name, types.get(name, "FLOAT"), shapes.get(name, ()))
        return tensors[name]

    constants = {item.name for item in graph.initializer}
    for item in graph.input:
        if item.name not in constants:
            network.inputs.append(tensor(item.name))
    for item in graph.initializer:
        node = onnx.helper.make_node("Constant", [], [item.name], name=item.name)
        network.layers.append(ILayer(world, network, node, [], [tensor(item.name)]))
    for node in all_nodes(graph):
        inputs = [tensor(name) if name else None for name in node.input]
        network.layers.append(ILayer(world, network, node, inputs, [tensor(name) for name in node.output if name]))
    for item in graph.output:
        network.outputs.append(tensor(item.name))
    for name in shape_tensors(graph):
        if name in tensors:
            tensors[name].is_shape = True


def _types_and_shapes(
    model: onnx.ModelProto, *, native_int64: bool
) -> tuple[dict[str, str], dict[str, tuple[int, ...]]]:
    """TensorRT's type and dimensions (-1: dynamic) of every value that ONNX's shape inference knows."""
    graph = onnx.shape_inference.infer_shapes(_without_weights(model)).graph
    types, shapes = {}, {}
    for item in (*graph.input, *graph.output, *graph.value_info):
        tensor = item.type.tensor_type
        types[item.name] = _trt_type(tensor.elem_type, native_int64)
        shapes[item.name] = tuple(dim.dim_value if dim.HasField("dim_value") else -1 for dim in tensor.shape.dim)
    for item in model.graph.initializer:
        types[item.name] = _trt_type(item.data_type, native_int64)
        shapes[item.name] = tuple(item.dims)
    return types, shapes


def _without_weights(model: onnx.ModelProto) -> onnx.ModelProto:
    """Shape inference copies the model through bytes; large weights need not come along."""
    light = onnx.ModelProto()
    light.CopyFrom(model)
    for item in light.graph.initializer:
        if len(item.raw_data) > 1 << 16:
            item.raw_data = b""
            item.data_location = onnx.TensorProto.EXTERNAL
            item.external_data.add(key="location", value="elsewhere")
    return light


def _trt_type(code: int, native_int64: bool) -> str:
    name = onnx.TensorProto.DataType.Name(code)
    if name == "INT64" and not native_int64:
        return "INT32"  # onnx-tensorrt 8.x casts, and clamps constants
    return _TYPES.get(name, "FLOAT")
