"""The graph as TensorRT 8.5 and 8.6 read it: same answers, valid, weights untouched, nothing dropped in silence."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto

from holov_export.bundle import sha256_of
from holov_export.compile.graph_file import graph_from_file, weight_files, write_lowered
from holov_export.compile.lowering import all_nodes, lowered_for, opset_of
from holov_export.compile.rewrites import WIDENED
from holov_export.errors import UsageError
from holov_export.policies import POLICIES
from holov_export.spec import Precision

N = 64  # patch tokens of the tiny checkpoint
#: (budget, quotas): one token, some, all, and more than there are
BUDGETS = ((1, [1, 1]), (21, [21, 5]), (N, [N, 9]), (N + 7, [N, N]))
#: every method in both precisions; an export takes four seconds, so most are slow
GRAPHS = [
    pytest.param(
        method,
        precision,
        id=f"{method}-{precision.value}",
        marks=[] if method == "holov" else pytest.mark.slow,
    )
    for method in POLICIES
    for precision in (Precision.FP32, Precision.FP16)
]
#: |difference| allowed to LayerNormalization in parts: a float32 sum in another order, and the same in a fp16 graph,
#: where a last bit of float32 may become a last bit of float16 (2^-10) and grows over the layers
TOLERANCE = {Precision.FP32: 1e-6, Precision.FP16: 1e-3}
#: share of kept tokens that must be the same: such a last bit of float16 may decide between two nearly equal tokens
OVERLAP = {Precision.FP32: 1.0, Precision.FP16: 0.9}


def outputs_of(path: Path, budget: int, quota: list[int]) -> list[np.ndarray]:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    kind = np.float16 if session.get_inputs()[0].type == "tensor(float16)" else np.float32
    pixels = np.random.default_rng(0).standard_normal((len(quota), 3, 56, 56)).astype(kind)
    found: list[np.ndarray] = session.run(
        None, {"pixel_values": pixels, "budget": np.array([budget]), "quota": np.array(quota)}
    )
    return found


def lowered_beside(folder: Path, tensorrt: str) -> Path:
    """Write the lowered graph next to the weights of the original."""
    model = graph_from_file(folder / "vision.onnx")
    path = folder / f"lowered-{tensorrt}.onnx"
    path.write_bytes(lowered_for(model, tensorrt).SerializeToString())
    return path


@pytest.mark.parametrize(("method", "precision"), GRAPHS)
def test_opset_17_answers_bit_for_bit(exported_graph, method: str, precision: Precision) -> None:  # type: ignore[no-untyped-def]
    folder = exported_graph(method, precision)
    before = sha256_of(folder / "vision.onnx.data")
    lowered = lowered_beside(folder, "8.6")
    onnx.checker.check_model(str(lowered), full_check=True)
    for budget, quota in BUDGETS:
        ours, theirs = outputs_of(lowered, budget, quota), outputs_of(folder / "vision.onnx", budget, quota)
        for left, right in zip(ours, theirs, strict=True):
            assert left.dtype == right.dtype
            np.testing.assert_array_equal(left, right)
    assert sha256_of(folder / "vision.onnx.data") == before


@pytest.mark.parametrize(("method", "precision"), GRAPHS)
def test_layer_norm_in_parts_keeps_the_same_tokens(exported_graph, method: str, precision: Precision) -> None:  # type: ignore[no-untyped-def]
    folder = exported_graph(method, precision)
    lowered = lowered_beside(folder, "8.5")
    onnx.checker.check_model(str(lowered), full_check=True)
    model = graph_from_file(lowered)
    assert not [node for node in all_nodes(model.graph) if node.op_type == "LayerNormalization"]
    for budget, quota in BUDGETS:
        ours, theirs = outputs_of(lowered, budget, quota), outputs_of(folder / "vision.onnx", budget, quota)
        np.testing.assert_array_equal(ours[2], theirs[2], "counts")
        assert_close(ours[3], theirs[3], TOLERANCE[precision])
        for image, count in enumerate(ours[2]):
            mine, other = ours[1][image, :count].tolist(), theirs[1][image, :count].tolist()
            both = sorted({*mine} & {*other} - {-1})
            assert len(both) >= OVERLAP[precision] * len({*other} - {-1})
            rows = [(ours[0][image, mine.index(place)], theirs[0][image, other.index(place)]) for place in both]
            for left, right in rows:
                assert_close(left, right, TOLERANCE[precision])


def assert_close(left: np.ndarray, right: np.ndarray, tolerance: float) -> None:
    """Compare in float32, relative to the largest value of the right one or 1."""
    wide = right.astype(np.float32)
    np.testing.assert_allclose(left.astype(np.float32), wide, rtol=0, atol=tolerance * max(1.0, np.abs(wide).max()))


def test_statistics_of_a_half_precision_graph_stay_float32(exported_graph) -> None:  # type: ignore[no-untyped-def]
    model = graph_from_file(exported_graph("holov", Precision.FP16) / "vision.onnx")
    typed = onnx.shape_inference.infer_shapes(lowered_for(model, "8.5"), strict_mode=True)
    types = {value.name: value.type.tensor_type.elem_type for value in typed.graph.value_info}
    means = [node for node in typed.graph.node if "LayerNormalization/ReduceMean" in node.name]
    assert len(means) == 2 * sum(node.op_type == "LayerNormalization" for node in model.graph.node)
    assert {types[node.output[0]] for node in means} == {TensorProto.FLOAT}


@pytest.mark.parametrize("tensorrt", ["8.5", "8.5.2", "8.6", "8.6.2.3"])
def test_what_lowering_leaves_and_what_it_changes(exported_graph, tensorrt: str) -> None:  # type: ignore[no-untyped-def]
    model = graph_from_file(exported_graph("holov", Precision.FP32) / "vision.onnx")
    before = model.SerializeToString()
    lowered = lowered_for(model, tensorrt)
    assert model.SerializeToString() == before
    assert (opset_of(lowered), lowered.ir_version) == (17, 8)
    assert lowered_for(lowered, tensorrt).SerializeToString() == lowered.SerializeToString()
    assert list(lowered.graph.input) == list(model.graph.input)
    assert list(lowered.graph.output) == list(model.graph.output)
    assert weight_files(lowered) == weight_files(model) == ["vision.onnx.data"]
    outside = {tensor.name: tensor for tensor in model.graph.initializer if tensor.external_data}
    assert {tensor.name for tensor in lowered.graph.initializer if tensor.external_data} == set(outside)
    for tensor in lowered.graph.initializer:
        if tensor.name in outside:
            assert tensor.external_data == outside[tensor.name].external_data
    names = [node.name for node in lowered.graph.node]
    assert len(set(names)) == len(names)
    read = {name for node in all_nodes(lowered.graph) for name in node.input}
    assert {tensor.name for tensor in lowered.graph.initializer} <= read


@pytest.mark.parametrize("tensorrt", ["9.3", "10.3", "10.13.3", "11.4"])
def test_later_versions_get_the_graph_as_it_is(exported_graph, tensorrt: str) -> None:  # type: ignore[no-untyped-def]
    model = graph_from_file(exported_graph("holov", Precision.FP16) / "vision.onnx")
    lowered = lowered_for(model, tensorrt)
    assert lowered.SerializeToString() == model.SerializeToString()
    lowered.graph.name = "another"
    assert model.graph.name != "another"


@pytest.mark.parametrize("text", ["8.4", "7.1.3", "new", ""])
def test_versions_that_are_none(text: str) -> None:
    with pytest.raises(UsageError):
        lowered_for(model_of([onnx.helper.make_node("Relu", ["x"], ["y"])], 18), text)


# ------------------------------------------------------------------------------------------------------ small graphs


def model_of(
    nodes: list[onnx.NodeProto],
    opset: int,
    shape: tuple[int | str, ...] = (2, 3, 4),
    kind: int = TensorProto.FLOAT,
    constants: dict[str, np.ndarray] | None = None,
) -> onnx.ModelProto:
    """x -> nodes -> y."""
    inputs = [onnx.helper.make_tensor_value_info("x", kind, shape)]
    outputs = [onnx.helper.make_tensor_value_info("y", kind, None)]
    held = [onnx.numpy_helper.from_array(array, name) for name, array in (constants or {}).items()]
    graph = onnx.helper.make_graph(nodes, "small", inputs, outputs, held)
    opsets = [onnx.helper.make_opsetid("", opset), onnx.helper.make_opsetid("own", 1)]
    model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10)
    model.graph.output[0].CopyFrom(onnx.shape_inference.infer_shapes(model).graph.output[0])
    return model


def run(model: onnx.ModelProto, x: np.ndarray) -> np.ndarray:
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    found: np.ndarray = session.run(None, {"x": x})[0]
    return found


def values(shape: tuple[int, ...] = (2, 3, 4), kind: type = np.float32) -> np.ndarray:
    return (np.random.default_rng(1).standard_normal(shape) + 2).astype(kind)


KINDS = ("L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod", "SumSquare")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "settings", [{}, {"keepdims": 0}, {"noop_with_empty_axes": 1}, {"axes": [1]}, {"axes": [-1, 0]}]
)
def test_reductions(kind: str, settings: dict[str, object]) -> None:
    settings = dict(settings)
    axes = settings.pop("axes", None)
    constants = {"axes": np.array(axes, np.int64)} if axes else {}
    node = onnx.helper.make_node(f"Reduce{kind}", ["x", *constants], ["y"], name="reduce", **settings)
    model = model_of([node], 18, constants=constants)
    if "noop_with_empty_axes" in settings and kind not in ("Max", "Mean", "Min", "Prod"):
        with pytest.raises(UsageError, match="noop_with_empty_axes"):
            lowered_for(model, "8.6")
        return
    lowered = lowered_for(model, "8.6")
    onnx.checker.check_model(lowered, full_check=True)
    assert not lowered.graph.initializer
    x = np.abs(values())
    np.testing.assert_array_equal(run(lowered, x), run(model, x))


@pytest.mark.parametrize("form", ["none", "tanh"])
@pytest.mark.parametrize("kind", [np.float32, np.float16])
def test_gelu(form: str, kind: type) -> None:
    node = onnx.helper.make_node("Gelu", ["x"], ["y"], name="gelu", approximate=form)
    number = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(kind))
    model = model_of([node], 20, kind=number)
    lowered = lowered_for(model, "8.6")
    onnx.checker.check_model(lowered, full_check=True)
    x = values(kind=kind) * 2 - 4
    tolerance = 1e-6 if kind is np.float32 else 4e-3
    np.testing.assert_allclose(run(lowered, x), run(model, x), rtol=tolerance, atol=tolerance)


def test_mish() -> None:
    model = model_of([onnx.helper.make_node("Mish", ["x"], ["y"])], 18)
    lowered = lowered_for(model, "8.6")
    assert [node.op_type for node in lowered.graph.node] == ["Softplus", "Tanh", "Mul"]
    x = values()
    np.testing.assert_allclose(run(lowered, x), x * np.tanh(np.log1p(np.exp(x))), rtol=1e-6)


@pytest.mark.parametrize(("axis", "scale_shape"), [(-1, (4,)), (2, (4,)), (1, (3, 4)), (-2, (3, 4)), (0, (2, 3, 4))])
@pytest.mark.parametrize("bias", [True, False])
def test_layer_normalization_in_parts(axis: int, scale_shape: tuple[int, ...], bias: bool) -> None:
    constants = {"scale": values(scale_shape)} | ({"bias": values(scale_shape)} if bias else {})
    node = onnx.helper.make_node("LayerNormalization", ["x", *constants], ["y"], axis=axis, epsilon=1e-3)
    model = model_of([node], 17, constants=constants)
    lowered = lowered_for(model, "8.5")
    onnx.checker.check_model(lowered, full_check=True)
    assert "LayerNormalization" not in [node.op_type for node in lowered.graph.node]
    np.testing.assert_allclose(run(lowered, values()), run(model, values()), rtol=1e-5, atol=1e-6)
    assert "LayerNormalization" in [node.op_type for node in lowered_for(model, "8.6").graph.node]


def test_layer_normalization_without_a_known_rank() -> None:
    node = onnx.helper.make_node("LayerNormalization", ["x", "scale"], ["y"], name="norm", axis=1)
    model = model_of([node], 17, constants={"scale": values((4,))})
    model.graph.input[0].type.tensor_type.ClearField("shape")
    with pytest.raises(UsageError, match=r"LayerNormalization 'norm'.*rank"):
        lowered_for(model, "8.5")


def test_bodies_are_lowered_too() -> None:
    """A reduction inside an If: the axes are a constant of the graph around it."""
    helper = onnx.helper
    branches = []
    for label, kind in (("then", "ReduceMean"), ("else", "ReduceMax")):
        node = helper.make_node(kind, ["x", "axes"], [f"{label}_out"], keepdims=1)
        out = helper.make_tensor_value_info(f"{label}_out", TensorProto.FLOAT, (2, 1, 4))
        branches.append(helper.make_graph([node], label, [], [out]))
    nodes = [
        helper.make_node("Constant", [], ["yes"], value=onnx.numpy_helper.from_array(np.array(True), "yes")),
        helper.make_node("If", ["yes"], ["y"], then_branch=branches[0], else_branch=branches[1]),
    ]
    model = model_of(nodes, 18, constants={"axes": np.array([1], np.int64)})
    lowered = lowered_for(model, "8.6")
    onnx.checker.check_model(lowered, full_check=True)
    inner = [node for node in all_nodes(lowered.graph) if node.op_type.startswith("Reduce")]
    assert [len(node.input) for node in inner] == [1, 1]
    np.testing.assert_array_equal(run(lowered, values()), run(model, values()))


def test_attributes_that_say_nothing_are_dropped() -> None:
    constants = {"roi": np.zeros(0, np.float32), "scales": np.array([1, 1, 2, 2], np.float32)}
    node = onnx.helper.make_node(
        "Resize", ["x", "roi", "scales"], ["y"], mode="linear", antialias=0, keep_aspect_ratio_policy="stretch"
    )
    model = model_of([node], 18, (1, 2, 3, 4), constants=constants)
    lowered = lowered_for(model, "8.6")
    onnx.checker.check_model(lowered, full_check=True)
    assert [item.name for item in lowered.graph.node[0].attribute] == ["mode"]
    x = values((1, 2, 3, 4))
    np.testing.assert_array_equal(run(lowered, x), run(model, x))


INDEX = np.zeros((1, 3, 4), np.int64)


@pytest.mark.parametrize(
    ("operator", "inputs", "settings", "opset", "constants", "reason"),
    [
        ("Col2Im", ["x", "a", "b"], {}, 18, {"a": np.array([2, 2]), "b": np.array([1, 1])}, "opset 18"),
        ("GroupNormalization", ["x", "a", "a"], {"num_groups": 1}, 21, {"a": values((3,))}, "opset 21"),
        ("Resize", ["x", "", "a"], {"antialias": 1}, 18, {"a": np.ones(3, np.float32)}, "antialias"),
        ("ScatterElements", ["x", "a", "x"], {"reduction": "max"}, 18, {"a": INDEX}, "'max'"),
        ("Pad", ["x", "a", "", "b"], {}, 18, {"a": np.array([1, 1]), "b": np.array([0])}, "4 inputs"),
        ("Pad", ["x", "a"], {"mode": "wrap"}, 19, {"a": np.zeros(6, np.int64)}, "'wrap'"),
        ("Split", ["x"], {"num_outputs": 1, "axis": 1}, 18, {}, "num_outputs"),
        ("ReduceMean", ["x", "x"], {}, 18, {}, "computed"),
        ("AveragePool", ["x"], {"kernel_shape": [2], "ceil_mode": 1}, 22, {}, "ceil_mode"),
    ],
)
def test_what_cannot_be_lowered_is_named(
    operator: str,
    inputs: list[str],
    settings: dict[str, object],
    opset: int,
    constants: dict[str, np.ndarray],
    reason: str,
) -> None:
    node = onnx.helper.make_node(operator, inputs, ["y"], name="the/node", **settings)
    with pytest.raises(UsageError, match=f"{operator} 'the/node' .*{reason}"):
        lowered_for(model_of([node], opset, constants=constants), "8.6")


@pytest.mark.parametrize(
    ("outputs", "settings", "reason"), [(["y", "mean"], {}, "mean"), (["y"], {"stash_type": 16}, "float32")]
)
def test_layer_normalizations_that_have_no_parts(outputs: list[str], settings: dict[str, int], reason: str) -> None:
    node = onnx.helper.make_node("LayerNormalization", ["x", "a"], outputs, name="norm", **settings)
    with pytest.raises(UsageError, match=f"LayerNormalization 'norm' .*{reason}"):
        lowered_for(model_of([node], 17, constants={"a": values((4,))}), "8.5")


def test_axes_in_the_weight_file_are_not_read() -> None:
    node = onnx.helper.make_node("ReduceMean", ["x", "axes"], ["y"], name="mean")
    model = model_of([node], 18, constants={"axes": np.array([1], np.int64)})
    onnx.external_data_helper.set_external_data(model.graph.initializer[0], "weights.data")
    model.graph.initializer[0].ClearField("raw_data")
    with pytest.raises(UsageError, match="weight file"):
        lowered_for(model, "8.6")


def test_bfloat16_has_no_way_back() -> None:
    model = model_of([onnx.helper.make_node("Relu", ["x"], ["y"])], 22, kind=TensorProto.BFLOAT16)
    with pytest.raises(UsageError, match=r"'x' is bfloat16.*8\.6") as caught:
        lowered_for(model, "8.6")
    assert "--fp16" in caught.value.hint
    assert lowered_for(model, "10.3").SerializeToString() == model.SerializeToString()


def test_functions_are_refused() -> None:
    model = model_of([onnx.helper.make_node("Twice", ["x"], ["y"], domain="own")], 18)
    double = onnx.helper.make_node("Add", ["a", "a"], ["b"])
    model.functions.append(
        onnx.helper.make_function("own", "Twice", ["a"], ["b"], [double], [onnx.helper.make_opsetid("", 18)])
    )
    with pytest.raises(UsageError, match="Twice"):
        lowered_for(model, "8.6")


def test_metadata_of_later_ir_versions_goes() -> None:
    model = model_of([onnx.helper.make_node("Relu", ["x"], ["y"])], 18)
    model.graph.node[0].metadata_props.add(key="a", value="b")
    lowered = lowered_for(model, "8.6")
    assert not lowered.graph.node[0].metadata_props
    assert model.graph.node[0].metadata_props


@pytest.mark.parametrize("operator", sorted(WIDENED))
def test_widened_operators_only_gained(operator: str) -> None:
    """Their inputs and outputs up to opset 24 begin with those of opset 17, and no attribute was lost."""
    new, old = (onnx.defs.get_schema(operator, opset, "") for opset in (24, 17))
    assert [item.name for item in new.inputs][: len(old.inputs)] == [item.name for item in old.inputs]
    assert len(new.outputs) == len(old.outputs)
    assert set(old.attributes) <= set(new.attributes)
    for name, attribute in old.attributes.items():
        assert new.attributes[name].default_value == attribute.default_value


# ------------------------------------------------------------------------------------------------------------- files


def test_write_lowered_brings_the_weights(exported_graph, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    folder = exported_graph("holov", Precision.FP16)
    written = write_lowered(folder / "vision.onnx", "8.5", tmp_path / "out")
    assert written == tmp_path / "out" / "vision.onnx"
    weights = tmp_path / "out" / "vision.onnx.data"
    assert not weights.is_symlink()
    assert weights.stat().st_nlink == 1
    assert sha256_of(weights) == sha256_of(folder / "vision.onnx.data")
    onnx.checker.check_model(str(written), full_check=True)
    assert outputs_of(written, 9, [9, 3])[2].tolist() == [9, 3]
    with pytest.raises(UsageError, match="there already"):
        write_lowered(folder / "vision.onnx", "8.5", tmp_path / "out")
    with pytest.raises(UsageError, match="there already"):
        write_lowered(folder / "vision.onnx", "8.5", folder)


def test_write_lowered_without_the_weights(exported_graph, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    shutil.copy(exported_graph("holov", Precision.FP16) / "vision.onnx", tmp_path)
    with pytest.raises(UsageError, match=r"vision.onnx.data' is missing"):
        write_lowered(tmp_path / "vision.onnx", "8.6", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_weight_file_outside_is_not_followed(tmp_path: Path) -> None:
    node = onnx.helper.make_node("Add", ["x", "w"], ["y"])
    model = model_of([node], 17, constants={"w": values((4,))})
    onnx.external_data_helper.set_external_data(model.graph.initializer[0], "../secret")
    model.graph.initializer[0].ClearField("raw_data")
    (tmp_path / "in").mkdir()
    (tmp_path / "secret").write_bytes(b"0" * 16)
    (tmp_path / "in" / "model.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(UsageError, match="outside"):
        write_lowered(tmp_path / "in" / "model.onnx", "8.6", tmp_path / "out")
