"""Which TensorRT layers are kept in float32, with networks built as onnx-tensorrt 8.6 builds them: with helper layers.

The stand-in makes one layer of each node; real parsers make more, and only the last ones carry the node's names.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum, auto
from pathlib import Path
from types import SimpleNamespace

import onnx
import pytest
from onnx import TensorProto, helper

from holov_export.compile.lowering import all_nodes, lowered_for
from holov_export.compile.precision_pins import element_types, float32_nodes, pin_float32
from holov_export.errors import EngineError
from holov_export.spec import Precision

ExportedGraph = Callable[[str, Precision], Path]


class Kind(Enum):
    FLOAT = auto()
    HALF = auto()
    INT32 = auto()
    BOOL = auto()


class Layer(Enum):
    CAST = auto()
    CONSTANT = auto()
    DEQUANTIZE = auto()
    ELEMENTWISE = auto()
    SHAPE = auto()
    SHUFFLE = auto()


TRT = SimpleNamespace(DataType=Kind)
KINDS = {
    TensorProto.FLOAT: Kind.FLOAT,
    TensorProto.FLOAT16: Kind.HALF,
    TensorProto.INT64: Kind.INT32,
    TensorProto.BOOL: Kind.BOOL,
}


@dataclass
class Tensor:
    name: str
    dtype: Kind
    is_shape_tensor: bool = False


@dataclass
class FakeLayer:
    name: str
    type: Layer
    inputs: list[Tensor | None]
    outputs: list[Tensor]
    precision: Kind | None = None
    output_types: dict[int, Kind] = field(default_factory=dict)

    @property
    def num_inputs(self) -> int:
        return len(self.inputs)

    @property
    def num_outputs(self) -> int:
        return len(self.outputs)

    def get_input(self, index: int) -> Tensor | None:
        return self.inputs[index]

    def get_output(self, index: int) -> Tensor:
        return self.outputs[index]

    def output_type_is_set(self, index: int) -> bool:
        return index in self.output_types

    def set_output_type(self, index: int, dtype: Kind) -> None:
        self.output_types[index] = dtype


@dataclass
class FakeNetwork:
    layers: list[FakeLayer]

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    def get_layer(self, index: int) -> FakeLayer:
        return self.layers[index]


def helper_layer(number: int, kind: Kind) -> FakeLayer:
    """A layer that the parser did not name, as TensorRT calls it."""
    name = f"(Unnamed Layer* {number}) [Shuffle]"
    return FakeLayer(name, Layer.SHUFFLE, [Tensor("in", kind)], [Tensor(f"{name}_output", kind)])


def network_from(model: onnx.ModelProto) -> FakeNetwork:
    """Each node: a constant, a helper of the type of its first input, and the layer that has the node's names."""
    types = element_types(model)
    layers: list[FakeLayer] = []
    for node in model.graph.node:
        read = [Tensor(name, KINDS[types[name]]) for name in node.input if name]
        written = [Tensor(name, KINDS[types[name]]) for name in node.output]
        kind = read[0].dtype if read else written[0].dtype
        layers.append(FakeLayer(f"{node.name} constant", Layer.CONSTANT, [], [Tensor("c", kind)]))
        layers.append(helper_layer(len(layers), kind))
        layers.append(
            FakeLayer(node.name, Layer.SHAPE if node.op_type == "Shape" else Layer.ELEMENTWISE, [*read], written)
        )
    return FakeNetwork(layers)


@pytest.fixture
def model(exported_graph: ExportedGraph) -> onnx.ModelProto:
    path = exported_graph("holov", Precision.FP16) / "vision.onnx"
    return lowered_for(onnx.load(str(path), load_external_data=False), "8.6.0")


def test_helper_layers_share_the_fate_of_their_node(model: onnx.ModelProto) -> None:
    network = network_from(model)
    pins = pin_float32(TRT, network, model)
    wanted = {node.name for node in float32_nodes(model, element_types(model))}
    for constant, before, main in zip(*[iter(network.layers)] * 3, strict=True):
        assert (constant.precision is Kind.FLOAT) == (main.name in wanted and constant.outputs[0].dtype is Kind.FLOAT)
        if main.name in wanted:
            assert main.precision is Kind.FLOAT, main.name
            if before.outputs[0].dtype in (Kind.FLOAT, Kind.HALF):
                assert before.precision is Kind.FLOAT, main.name
        else:
            assert main.precision is None, main.name
            assert before.precision is None, main.name
    assert pins.layers == sum(layer.precision is not None for layer in network.layers)
    assert pins.outputs == sum(len(layer.output_types) for layer in network.layers)


def test_only_float_outputs_get_a_type(model: onnx.ModelProto) -> None:
    network = network_from(model)
    pin_float32(TRT, network, model)
    for layer in network.layers:
        for index in layer.output_types:
            assert layer.outputs[index].dtype in (Kind.FLOAT, Kind.HALF)


def test_layers_are_found_by_their_own_name_when_outputs_were_renamed(model: onnx.ModelProto) -> None:
    """Graph outputs are reserved before the parse, so TensorRT numbers the tensors that come to be them."""
    network = network_from(model)
    for layer in network.layers:
        for tensor in layer.outputs:
            tensor.name += "_7"
    by_layer_name = pin_float32(TRT, network, model)
    assert by_layer_name == pin_float32(TRT, network_from(model), model)


def test_floats_of_an_integer_node_are_pinned() -> None:
    """TensorRT 8.6 runs an integer TopK through float casts, and half precision loses integers above 2048."""
    model = _model(
        [helper.make_node("TopK", ["x", "k"], ["values", "places"], name="top")],
        [("x", TensorProto.INT64)],
        [("values", TensorProto.INT64), ("places", TensorProto.INT64)],
        k=True,
    )
    cast = FakeLayer("cast in", Layer.CAST, [Tensor("x", Kind.INT32)], [Tensor("x as float", Kind.FLOAT)])
    main = FakeLayer(
        "top", Layer.ELEMENTWISE, [Tensor("x as float", Kind.FLOAT)], [Tensor("v", Kind.FLOAT), Tensor("i", Kind.INT32)]
    )
    pin_float32(TRT, FakeNetwork([cast, main]), model)
    assert cast.precision is Kind.FLOAT
    assert main.output_types == {0: Kind.FLOAT}


def test_a_constant_is_pinned_with_the_shuffle_that_spreads_it() -> None:
    """TensorRT fuses the two; halves of which one is pinned contradict each other (NVIDIA/TensorRT issue 2838)."""
    model = _model(
        [helper.make_node("Add", ["x", "x"], ["y"], name="add")], [("x", TensorProto.FLOAT)], [("y", TensorProto.FLOAT)]
    )
    constant = FakeLayer("epsilon", Layer.CONSTANT, [], [Tensor("e", Kind.FLOAT)])
    integers = FakeLayer("places", Layer.CONSTANT, [], [Tensor("p", Kind.INT32)])
    halves = FakeLayer("halves", Layer.CONSTANT, [], [Tensor("h", Kind.HALF)])
    main = FakeLayer("add", Layer.ELEMENTWISE, [Tensor("x", Kind.FLOAT)], [Tensor("y", Kind.FLOAT)])
    pin_float32(TRT, FakeNetwork([constant, helper_layer(1, Kind.FLOAT), integers, halves, main]), model)
    assert (constant.precision, constant.output_types) == (Kind.FLOAT, {0: Kind.FLOAT})
    assert (integers.precision, halves.precision) == (None, None)


def test_a_type_that_the_parser_set_stays() -> None:
    """It sets the output of a Range to int32, and the tensor may be a float one to TensorRT until the build."""
    model = _model(
        [helper.make_node("Add", ["x", "x"], ["y"], name="add")], [("x", TensorProto.FLOAT)], [("y", TensorProto.FLOAT)]
    )
    count = FakeLayer("range", Layer.ELEMENTWISE, [Tensor("size", Kind.INT32)], [Tensor("r", Kind.FLOAT)])
    count.set_output_type(0, Kind.INT32)
    main = FakeLayer("add", Layer.ELEMENTWISE, [Tensor("x", Kind.FLOAT)], [Tensor("y", Kind.FLOAT)])
    pin_float32(TRT, FakeNetwork([count, main]), model)
    assert (count.precision, count.output_types) == (None, {0: Kind.INT32})


def test_what_computes_shapes_is_left_alone() -> None:
    model = _model(
        [helper.make_node("Add", ["x", "x"], ["y"], name="add")], [("x", TensorProto.FLOAT)], [("y", TensorProto.FLOAT)]
    )
    shape = FakeLayer("sizes", Layer.ELEMENTWISE, [None], [Tensor("s", Kind.FLOAT, is_shape_tensor=True)])
    integers = FakeLayer("integers", Layer.ELEMENTWISE, [Tensor("i", Kind.INT32)], [Tensor("j", Kind.INT32)])
    main = FakeLayer("add", Layer.ELEMENTWISE, [Tensor("x", Kind.FLOAT)], [Tensor("y", Kind.FLOAT)])
    pins = pin_float32(TRT, FakeNetwork([shape, integers, main]), model)
    assert (pins.layers, shape.precision, integers.precision) == (1, None, None)


def test_layers_whose_precision_is_given_are_left_alone() -> None:
    """A Dequantize layer computes in INT8, also where somebody put it before a float32 node."""
    model = _model(
        [helper.make_node("Add", ["x", "x"], ["y"], name="add")], [("x", TensorProto.FLOAT)], [("y", TensorProto.FLOAT)]
    )
    up = FakeLayer("up", Layer.DEQUANTIZE, [Tensor("q", Kind.INT32)], [Tensor("u", Kind.FLOAT)])
    main = FakeLayer("add", Layer.ELEMENTWISE, [Tensor("u", Kind.FLOAT)], [Tensor("y", Kind.FLOAT)])
    pins = pin_float32(TRT, FakeNetwork([up, main]), model)
    assert (pins.layers, up.precision, up.output_types) == (1, None, {})


def test_layers_after_the_last_named_one_are_pinned() -> None:
    model = _model(
        [helper.make_node("Add", ["x", "x"], ["y"], name="add")],
        [("x", TensorProto.FLOAT16)],
        [("y", TensorProto.FLOAT16)],
    )
    main = FakeLayer("add", Layer.ELEMENTWISE, [Tensor("x", Kind.HALF)], [Tensor("y", Kind.HALF)])
    late = helper_layer(9, Kind.FLOAT)
    pins = pin_float32(TRT, FakeNetwork([main, late]), model)
    assert (pins.free, main.precision, late.precision) == (1, None, Kind.FLOAT)


def test_a_graph_without_float32_needs_no_pins() -> None:
    model = _model(
        [helper.make_node("Add", ["x", "x"], ["y"], name="add")],
        [("x", TensorProto.FLOAT16)],
        [("y", TensorProto.FLOAT16)],
    )
    main = FakeLayer("add", Layer.ELEMENTWISE, [Tensor("x", Kind.HALF)], [Tensor("y", Kind.HALF)])
    assert pin_float32(TRT, FakeNetwork([main]), model).layers == 0


def test_a_network_without_layers_of_a_float32_graph_is_refused(model: onnx.ModelProto) -> None:
    with pytest.raises(EngineError, match="half precision"):
        pin_float32(TRT, FakeNetwork([]), model)


def test_the_bodies_of_loops_are_kept_in_float32_too(exported_graph: ExportedGraph) -> None:
    path = exported_graph("scope", Precision.FP16) / "vision.onnx"
    model = lowered_for(onnx.load(str(path), load_external_data=False), "8.6.0")
    (loop,) = (node for node in model.graph.node if node.op_type == "Loop")
    body = next(attribute.g for attribute in loop.attribute if attribute.HasField("g"))
    kept = {node.name for node in float32_nodes(model, element_types(model))}
    assert {node.name for node in body.node if node.op_type in ("ArgMax", "Mul", "Max", "Where")} <= kept


def test_types_inside_of_loops_are_known() -> None:
    body = helper.make_graph(
        [
            helper.make_node("Cast", ["carried"], ["wide"], to=TensorProto.FLOAT, name="widen"),
            helper.make_node("Mul", ["wide", "outer"], ["product"], name="product"),
            helper.make_node("Cast", ["product"], ["next"], to=TensorProto.FLOAT16, name="narrow"),
            helper.make_node("Identity", ["go on"], ["again"], name="again"),
        ],
        "body",
        [_value("turn", TensorProto.INT64), _value("go on", TensorProto.BOOL), _value("carried", TensorProto.FLOAT16)],
        [_value("again", TensorProto.BOOL), _value("next", TensorProto.FLOAT16)],
    )
    model = _model(
        [
            helper.make_node("Cast", ["x"], ["outer"], to=TensorProto.FLOAT, name="outer"),
            helper.make_node("Loop", ["turns", "", "x"], ["y"], body=body, name="loop"),
        ],
        [("x", TensorProto.FLOAT16), ("turns", TensorProto.INT64)],
        [("y", TensorProto.FLOAT16)],
    )
    types = element_types(model)
    assert [types[name] for name in ("wide", "product", "next", "again")] == [
        TensorProto.FLOAT,
        TensorProto.FLOAT,
        TensorProto.FLOAT16,
        TensorProto.BOOL,
    ]
    assert {name for node in all_nodes(model.graph) for name in node.output} <= set(types)


def test_a_type_that_cannot_be_told_is_an_error() -> None:
    model = _model(
        [helper.make_node("Mystery", ["x"], ["y"], domain="somebody", name="mystery"),
         helper.make_node("Identity", ["y"], ["z"], name="out")],
        [("x", TensorProto.FLOAT)],
        [("z", TensorProto.FLOAT)],
    )  # fmt: skip
    with pytest.raises(EngineError, match=r"'y' \(Mystery 'mystery'\)"):
        element_types(model)


def _value(name: str, dtype: int) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, dtype, None)


def _model(
    nodes: list[onnx.NodeProto], inputs: list[tuple[str, int]], outputs: list[tuple[str, int]], *, k: bool = False
) -> onnx.ModelProto:
    weights = [helper.make_tensor("k", TensorProto.INT64, [1], [2])] if k else []
    graph = helper.make_graph(
        nodes, "g", [_value(*item) for item in inputs], [_value(*item) for item in outputs], weights
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17), helper.make_opsetid("somebody", 1)])
