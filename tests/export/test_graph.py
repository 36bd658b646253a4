"""What an exported vision graph is: equal to torch, dynamic, free of data-dependent shapes, readable, portable."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from graphs import FORBIDDEN, ancestors_until, bodies, shape_values, sources_of
from noisy import noisy_copy
from onnx import TensorProto, helper

from holov_export.bundle import graph_tensors
from holov_export.errors import HolovExportError
from holov_export.export.onnx_from_graph import onnx_from_graph, save_vision
from holov_export.policies import POLICIES, FeatureSource, policy_from_settings
from holov_export.selection.reference import positions_of
from holov_export.spec import OPSETS, CheckpointSource, ExportPlan, ModelSpec, Precision
from holov_export.vision.clip import LlavaVision, vision_from_checkpoint
from holov_export.vision.loading import TORCH_DTYPES
from holov_export.vision.weights import SafetensorsReader

N = 64  # patch tokens of the tiny checkpoint
Arrays = list[np.ndarray]


@dataclass(frozen=True)
class Exported:
    """A torch module and the files that were written from it."""

    module: LlavaVision
    plan: ExportPlan
    folder: Path

    @property
    def path(self) -> Path:
        return self.folder / "vision.onnx"

    @property
    def model(self) -> onnx.ModelProto:
        return onnx.load(self.path, load_external_data=False)

    def torch(self, pixels: np.ndarray, budget: int, quota: list[int]) -> Arrays:
        dtype = TORCH_DTYPES[self.plan.precision]
        with torch.no_grad():
            out = self.module(torch.from_numpy(pixels).to(dtype), torch.tensor([budget]), torch.tensor(quota))
        return [value.float().numpy() if value.is_floating_point() else value.numpy() for value in out]

    def ort(self, pixels: np.ndarray, budget: int, quota: list[int]) -> Arrays:
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        session = ort.InferenceSession(self.path, options, providers=["CPUExecutionProvider"])
        feed = {
            "pixel_values": pixels.astype(np.float16 if self.plan.precision is Precision.FP16 else np.float32),
            "budget": np.array([budget], dtype=np.int64),
            "quota": np.array(quota, dtype=np.int64),
        }
        out: Arrays = session.run(None, feed)
        return out


Export = Callable[[str, Precision], Exported]


def plan_of(spec: ModelSpec, method: str, precision: Precision, opset: int | None = None) -> ExportPlan:
    return ExportPlan(
        model=spec,
        source=CheckpointSource(kind="local", name="tiny"),
        policy=policy_from_settings(method),
        precision=precision,
        decoder=None,
        opset=opset or OPSETS[precision],
    )


@pytest.fixture(scope="session")
def export(llava_checkpoint: Path, llava_spec: ModelSpec, tmp_path_factory: pytest.TempPathFactory) -> Export:
    """Exports each pair of method and precision once."""
    made: dict[tuple[str, Precision], Exported] = {}
    checkpoint = noisy_copy(llava_checkpoint, tmp_path_factory.mktemp("graphs") / "noisy")

    def exported(method: str, precision: Precision) -> Exported:
        if (method, precision) not in made:
            plan = plan_of(llava_spec, method, precision)
            with SafetensorsReader(checkpoint) as reader:
                module = vision_from_checkpoint(llava_spec, plan.policy, reader, precision)
            folder = tmp_path_factory.mktemp("graphs") / f"{method}-{precision.value}"
            folder.mkdir()
            save_vision(onnx_from_graph(module, plan), folder)
            made[method, precision] = Exported(module, plan, folder)
        return made[method, precision]

    return exported


@pytest.fixture(params=[*((method, Precision.FP32) for method in POLICIES), ("holov", Precision.FP16)], ids=str)
def graph(request: pytest.FixtureRequest, export: Export) -> Exported:
    """Every method in float32, and the default in float16."""
    return export(*request.param)


@pytest.fixture(params=POLICIES)
def fp32(request: pytest.FixtureRequest, export: Export) -> Exported:
    return export(request.param, Precision.FP32)


def pixels_of(batch: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((batch, 3, 56, 56)).astype(np.float32)


def check_equal(graph: Exported, batch: int, budget: int, quota: list[int]) -> Arrays:
    """ONNX Runtime's outputs, after comparing them with torch."""
    pixels = pixels_of(batch, seed=batch)
    ours, theirs = graph.torch(pixels, budget, quota), graph.ort(pixels, budget, quota)
    np.testing.assert_array_equal(theirs[1], ours[1], "positions")
    np.testing.assert_array_equal(theirs[2], ours[2], "counts")
    np.testing.assert_allclose(theirs[0], ours[0], rtol=0, atol=1e-5 * max(1.0, float(np.abs(ours[0]).max())))
    np.testing.assert_allclose(theirs[3], ours[3], rtol=1e-5, atol=1e-7)
    return theirs


@pytest.mark.parametrize(
    ("batch", "budget", "quota"),
    [
        (1, 1, [1]),
        (1, 16, [16]),
        (1, N, [N]),
        (3, 16, [16, 16, 16]),
        (3, 21, [21, 5, 1]),
        (5, 63, [1, 63, 40, 7, 64]),
        (2, N, [N, 9]),
    ],
)
def test_onnxruntime_is_torch(fp32: Exported, batch: int, budget: int, quota: list[int]) -> None:
    tokens, positions, counts, saliency = check_equal(fp32, batch, budget, quota)
    assert tokens.shape == (batch, budget, fp32.plan.model.decoder.width)
    assert counts.tolist() == [min(asked, budget) for asked in quota]
    assert not tokens[positions < 0].any()
    if fp32.plan.policy.features is FeatureSource.NONE:
        for image, count in enumerate(counts):
            expected = positions_of(fp32.plan.policy, saliency[image], int(count), (8, 8))
            assert positions[image, :count].tolist() == expected.tolist()


@pytest.mark.parametrize(("budget", "size"), [(0, 1), (-3, 1), (N + 1, N), (10**9, N)])
def test_budget_is_clamped_in_the_graph(fp32: Exported, budget: int, size: int) -> None:
    tokens, positions, counts, _ = check_equal(fp32, 2, budget, [budget, 3])
    assert tokens.shape[1] == positions.shape[1] == size
    assert counts.tolist() == [size, min(3, size)]


@pytest.mark.parametrize("quota", [0, -1, -(2**40), N, 2**40])
def test_quota_is_clamped_in_the_graph(fp32: Exported, quota: int) -> None:
    counts = check_equal(fp32, 2, 8, [quota, 8])[2]
    assert counts.tolist() == [min(max(quota, 1), 8), 8]


def test_fp16_keeps_what_fp32_keeps(export: Export) -> None:
    pixels = pixels_of(4)
    half, full = export("holov", Precision.FP16), export("holov", Precision.FP32)
    seen, expected = half.ort(pixels, 16, [16] * 4), full.ort(pixels, 16, [16] * 4)
    assert seen[0].dtype == np.float16
    overlaps = [len(set(a) & set(b)) / 16 for a, b in zip(seen[1].tolist(), expected[1].tolist(), strict=True)]
    assert min(overlaps) >= 0.9
    whole, other = half.ort(pixels, N, [N] * 4)[0], full.ort(pixels, N, [N] * 4)[0]
    assert float(np.abs(whole - other).max()) < 0.01 * float(np.abs(other).max())


def test_names_shapes_and_types_are_the_signature(graph: Exported) -> None:
    types = {TensorProto.FLOAT: "float32", TensorProto.FLOAT16: "float16", TensorProto.INT64: "int64"}
    inputs, outputs = graph.plan.signature
    for values, specs in ((graph.model.graph.input, inputs), (graph.model.graph.output, outputs)):
        assert [value.name for value in values] == [spec.name for spec in specs]
        for value, spec in zip(values, graph_tensors(specs), strict=True):
            axes = [axis.dim_param or axis.dim_value for axis in value.type.tensor_type.shape.dim]
            assert tuple(axes) == spec.shape
            assert types[value.type.tensor_type.elem_type] == spec.dtype


def test_no_shape_depends_on_data(graph: Exported) -> None:
    model = graph.model
    operators = {node.op_type for graph in (model.graph, *bodies(model)) for node in graph.node}
    assert not operators & FORBIDDEN
    greedy = ("scope", "divprune", "cdpruner-unconditional")
    assert ("Loop" in operators) == (graph.plan.policy.method in greedy)
    assert sources_of(model, shape_values(model)) == {"budget"}


def test_nothing_in_a_loop_changes_its_shape(export: Export) -> None:
    """Scope's steps: a trip count, no condition, nothing scanned out, and shapes inside from constants only."""
    model = export("scope", Precision.FP32).model
    (loop,) = [node for node in model.graph.node if node.op_type == "Loop"]
    (body,) = bodies(model)
    assert loop.input[1] == ""
    assert body.input[1].name not in {name for node in body.node for name in node.input}  # TensorRT would look for it
    assert len(loop.input) == len(body.input) == len(body.output) + 1 == len(loop.output) + 2
    floats = [TensorProto.FLOAT] * 2
    assert [value.type.tensor_type.elem_type for value in body.input[2:]] == floats
    assert [value.type.tensor_type.elem_type for value in body.output[1:]] == floats
    constants = {tensor.name for tensor in model.graph.initializer}
    assert set(shape_values(helper.make_model(body))) <= constants
    assert {node.op_type for node in body.node} == {
        "Add", "ArgMax", "Cast", "Constant", "Equal", "Gather", "Less", "Max", "Mul", "ReduceSum", "Relu", "Squeeze",
        "Sub", "Unsqueeze", "Where",
    }  # fmt: skip


def test_the_walk_sees_a_shape_that_depends_on_data() -> None:
    """Negative control of the test above: K from the picture's own values is found."""
    nodes = [
        helper.make_node("ReduceMax", ["scores"], ["top"], keepdims=0),
        helper.make_node("Cast", ["top"], ["whole"], to=TensorProto.INT64),
        helper.make_node("Reshape", ["whole", "one"], ["k"]),
        helper.make_node("TopK", ["scores", "k"], ["values", "places"]),
    ]
    scores = helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["n"])
    places = helper.make_tensor_value_info("places", TensorProto.INT64, ["k"])
    one = helper.make_tensor("one", TensorProto.INT64, [1], [1])
    model = helper.make_model(helper.make_graph(nodes, "bad", [scores], [places], initializer=[one]))
    assert sources_of(model, shape_values(model)) == {"scores"}


def test_only_onnx_operators(graph: Exported) -> None:
    model = graph.model
    assert [(item.domain, item.version) for item in model.opset_import] == [("", graph.plan.opset)]
    assert {node.domain for node in model.graph.node} == {""}
    assert not model.functions
    assert not [
        node.name for node in model.graph.node if node.op_type != "Loop" and any(a.g.node for a in node.attribute)
    ]


def test_no_dense_attention_of_the_feature_layer(export: Export) -> None:
    """Select early: of the feature layer's attention only one row and the kept rows exist, and no later layer."""
    model = export("holov", Precision.FP32).model
    layers = {match.group(1) for node in model.graph.node if (match := re.search(r"layers/(\d+)", node.name))}
    assert layers == {"0", "1", "2"}
    full = [node for node in ancestors_until(model, "positions", "Softmax") if node.op_type == "Softmax"]
    assert len(full) == 1
    softmaxes = [node for node in model.graph.node if node.op_type == "Softmax"]
    assert len(softmaxes) == 4, "two full layers, the CLS row, the kept rows"


@pytest.mark.parametrize("precision", [Precision.FP16, Precision.BF16])
@pytest.mark.parametrize("method", ["holov", pytest.param("holov-paper", marks=pytest.mark.slow)])
def test_what_decides_is_float32(export: Export, precision: Precision, method: str) -> None:
    model = export(method, precision).model
    typed = onnx.shape_inference.infer_shapes(model, strict_mode=True)
    known = [*typed.graph.value_info, *typed.graph.input, *typed.graph.output]
    types = {value.name: value.type.tensor_type.elem_type for value in known}
    types |= {tensor.name: tensor.data_type for tensor in typed.graph.initializer}
    half = {TensorProto.FLOAT16, TensorProto.BFLOAT16}
    deciding = [node for output in ("saliency", "counts") for node in ancestors_until(typed, output, "Softmax")]
    selecting = ancestors_until(typed, "positions", "Softmax")
    if method == "holov-paper":  # it reads features, which half-precision layers make
        selecting = [node for node in selecting if node.name.startswith("selection/")]
    deciding += selecting
    assert len(deciding) > 20
    for node in deciding:
        for name in node.output:
            assert types[name] not in half, f"{node.name} makes {name} in 16 bits"
    (softmax,) = {node.name: node for node in deciding if node.op_type == "Softmax"}.values()
    scores = ancestors_until(typed, softmax.input[0], "MatMul")
    assert all(types[name] not in half for node in scores for name in node.output)


def test_weights_have_the_plans_type(export: Export) -> None:
    for precision, expected in ((Precision.FP32, TensorProto.FLOAT), (Precision.FP16, TensorProto.FLOAT16)):
        model = export("holov", precision).model
        big = {tensor.data_type for tensor in model.graph.initializer if int(np.prod(tensor.dims)) > 4096}
        assert big - {TensorProto.INT64, TensorProto.BOOL} == {expected}


def test_bf16_is_valid_at_opset_22(export: Export) -> None:
    graph = export("holov", Precision.BF16)
    assert graph.plan.opset == 22
    assert [item.version for item in graph.model.opset_import] == [22]
    onnx.checker.check_model(str(graph.path), full_check=True)


def test_the_checker_is_content(graph: Exported) -> None:
    onnx.checker.check_model(str(graph.path), full_check=True)


def test_no_trace_of_this_machine(graph: Exported) -> None:
    content = graph.path.read_bytes()
    home = str(Path(__file__).parents[2])
    for trace in (home, str(Path.home()), "site-packages", ".py", "Traceback", "stack_trace", str(graph.folder.parent)):
        assert trace.encode() not in content, trace
    model = graph.model
    assert not model.doc_string
    assert not model.metadata_props
    assert not model.graph.doc_string
    assert model.producer_name == "holov-export"
    assert model.graph.name == f"llava-vision-{graph.plan.policy.method}"
    for item in (*model.graph.node, *model.graph.initializer, *model.graph.input, *model.graph.output):
        assert not item.doc_string
        assert not item.metadata_props


def test_names_are_readable(graph: Exported) -> None:
    model = graph.model
    nodes = [node.name for node in model.graph.node]
    assert len(set(nodes)) == len(nodes)
    for node in model.graph.node:
        assert re.fullmatch(rf"(\w+/)*{node.op_type}(_\d+)?", node.name), node.name
    values = [name for node in model.graph.node for name in node.output]
    initializers = [tensor.name for tensor in model.graph.initializer]
    for name in (*values, *initializers):
        assert not re.search(r"\b(val|node|view|mul|add|getitem|linear|arg|t|permute)(_\d+)?$", name), name
    parameters = {name for name, _ in graph.module.named_parameters()}
    for name in initializers:
        assert "#" in name or "." in name, name
    stored = {name.removesuffix(".transposed") for name in initializers}
    linears = {name for name in parameters if re.search(r"(proj|fc\d|linear_\d)\.(weight|bias)$", name)}
    assert linears <= stored, linears - stored
    assert not [node.name for node in model.graph.node if node.op_type == "Transpose" and node.input[0] in initializers]


def test_weights_are_outside(graph: Exported) -> None:
    assert sorted(path.name for path in graph.folder.iterdir()) == ["vision.onnx", "vision.onnx.data"]
    external = set()
    for tensor in graph.model.graph.initializer:
        if tensor.data_location == TensorProto.EXTERNAL:
            entries = {entry.key: entry.value for entry in tensor.external_data}
            assert entries["location"] == "vision.onnx.data"
            external.add(tensor.name)
        else:
            assert np.prod(tensor.dims) * 8 <= 2048, tensor.name
    parameters = {name for name, parameter in graph.module.named_parameters() if parameter.ndim > 1}
    assert len(external) >= len(parameters)
    assert graph.path.stat().st_size < 300_000


def test_no_weight_is_stored_twice(graph: Exported) -> None:
    stored = [graph_array(graph, tensor) for tensor in graph.model.graph.initializer if np.prod(tensor.dims) > 64]
    contents = [(array.shape, array.tobytes()) for array in stored if array.dtype in (np.float32, np.float16)]
    assert len(set(contents)) == len(contents)
    size = sum(parameter.numel() * parameter.element_size() for parameter in graph.module.parameters())
    assert sum(len(content) for _, content in contents) <= size


def graph_array(graph: Exported, tensor: onnx.TensorProto) -> np.ndarray:
    array: np.ndarray = onnx.numpy_helper.to_array(tensor, base_dir=str(graph.folder))
    return array


def test_two_exports_are_the_same_bytes(export: Export, llava_spec: ModelSpec, tmp_path: Path) -> None:
    first = export("holov", Precision.FP32)
    save_vision(onnx_from_graph(first.module, first.plan), tmp_path)
    for file in ("vision.onnx", "vision.onnx.data"):
        assert (tmp_path / file).read_bytes() == (first.folder / file).read_bytes(), file


def test_the_bundle_may_move(export: Export, tmp_path: Path) -> None:
    graph = export("holov", Precision.FP32)
    for file in graph.folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    moved = Exported(graph.module, graph.plan, tmp_path)
    check_equal(moved, 1, 4, [4])


def test_another_opset_than_planned_is_refused(export: Export, llava_spec: ModelSpec) -> None:
    module = export("holov", Precision.FP32).module
    plan = plan_of(llava_spec, "holov", Precision.FP32, opset=17)
    with pytest.raises((HolovExportError, ValueError)):
        onnx_from_graph(module, plan)


@pytest.mark.slow
@pytest.mark.parametrize("method", POLICIES)
@pytest.mark.parametrize("precision", [Precision.FP16, Precision.BF16])
def test_every_method_in_half_precision(export: Export, method: str, precision: Precision) -> None:
    graph = export(method, precision)
    onnx.checker.check_model(str(graph.path), full_check=True)
    if precision is Precision.FP16:
        tokens, positions, counts, _ = graph.ort(pixels_of(2), 16, [16, 9])
        assert tokens.shape[:2] == (2, 16)
        assert counts.tolist() == [16, 9]
        assert np.isfinite(tokens).all()
        assert ((positions >= 0).sum(1) <= counts).all()
