"""The int8 form for ONNX Runtime's CPU provider: what is replaced, the numbers in it, and what it computes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from family_bundles import family_bundle
from float_graphs import Feed, feed_of, ranges_of, run, write_toy, write_vivid
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from holov_export.bundle import Bundle
from holov_export.errors import UsageError
from holov_export.export.onnx_from_graph import save_beside
from holov_export.quantize.cpu import write_quantized_cpu
from holov_export.quantize.linears import linears_of
from holov_export.quantize.outliers import outlier_channels
from holov_export.runtime.runner_ort import OrtRunner
from holov_export.spec import Quantization, QuantizedType

CPU = Quantization(type=QuantizedType.INT8, engine="cpu")
Floats = npt.NDArray[np.float32]


@pytest.fixture(scope="module")
def vivid(exported_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny LLaVA's graph with drawn norms and biases, without outliers."""
    return write_vivid(exported_bundle.vision, tmp_path_factory.mktemp("float") / "vision.onnx", outliers=1)


@pytest.fixture(scope="module")
def rounded(vivid: Path) -> Path:
    """The same in int8."""
    write_quantized_cpu(vivid, vivid.with_name("int8.onnx"), CPU)
    return vivid.with_name("int8.onnx")


@pytest.fixture
def feeds(exported_bundle: Bundle, photographs: list[Image.Image]) -> list[Feed]:
    return [feed_of(exported_bundle, photographs, budget) for budget in (1, 5, 40, 64)]


def _loaded(path: Path) -> onnx.ModelProto:
    return onnx.load(path, load_external_data=False)


def _operators(path: Path) -> list[str]:
    return [node.op_type for node in _loaded(path).graph.node]


def _drawn(*shape: int, seed: int = 0) -> Floats:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


# --------------------------------------------------------------------------------------- the whole graph


def test_what_is_replaced(vivid: Path, tmp_path: Path) -> None:
    quantization = CPU.model_copy(update={"keep": ("layers.0.mlp", "linear_2")})
    summary = write_quantized_cpu(vivid, tmp_path / "q.onnx", quantization)
    onnx.checker.check_model(str(tmp_path / "q.onnx"), full_check=True)
    source, model = _loaded(vivid), _loaded(tmp_path / "q.onnx")
    linears = linears_of(source)

    assert [name.rsplit(".", 1)[1] for name in summary.deciding] == ["k_proj", "q_proj"]
    kept = ("layers.0.mlp.fc1", "layers.0.mlp.fc2", "multi_modal_projector.linear_2")
    assert tuple(name.removeprefix("vision_tower.") for name in summary.kept) == kept
    assert {*summary.quantized, *summary.deciding, *summary.kept} == {linear.name for linear in linears}
    assert (summary.opset, summary.files) == (18, ("q.onnx", "q.onnx.data"))
    assert {item.domain: item.version for item in model.opset_import} == {"": 18, "com.microsoft": 1}

    # float products with weights are those that stay, as they were
    floats = {*summary.deciding, *summary.kept}
    before = {
        node.name: node for linear in linears if linear.name in floats for node in _products(source, linear.nodes)
    }
    after = {node.name: node for linear in linears_of(model) for node in _products(model, linear.nodes)}
    assert {name: list(node.input) for name, node in after.items()} == {
        name: list(node.input) for name, node in before.items()
    }
    types = {item.name: item.data_type for item in model.graph.initializer}
    for linear in linears:
        wanted = TensorProto.FLOAT if linear.name in floats else TensorProto.INT8
        assert types[linear.weight] == wanted
    assert sum(node.op_type == "MatMulIntegerToFloat" for node in model.graph.node) == len(summary.quantized)
    # query, key and value of a layer read the same rounded rows
    activations = {name for linear in linears if linear.name in summary.quantized for name in linear.activations}
    assert sum(node.op_type == "QuantizeLinear" for node in model.graph.node) == len(activations)


def _products(model: onnx.ModelProto, names: tuple[str, ...]) -> list[onnx.NodeProto]:
    return [node for node in model.graph.node if node.name in names]


def test_nothing_else_is_touched(vivid: Path, rounded: Path) -> None:
    """Everything that is not a product with weights is there, in its order, and reads the same types."""
    replaced = {name for linear in linears_of(_loaded(vivid)) if not linear.deciding for name in linear.nodes}
    before = [node.name for node in _loaded(vivid).graph.node if node.name not in replaced]
    names = set(before)
    assert [node.name for node in _loaded(rounded).graph.node if node.name in names] == before


def test_every_budget_of_held_out_pictures(vivid: Path, rounded: Path, feeds: list[Feed]) -> None:
    for feed in feeds:
        before, after = run(vivid, feed), run(rounded, feed, optimised=True)
        assert [item.shape for item in after] == [item.shape for item in before]
        assert (after[2] == before[2]).all()
        for image, kept in enumerate(before[1]):
            common = sorted(set(kept.tolist()) & set(after[1][image].tolist()))
            assert len(common) >= 0.75 * len(kept)
            one, other = (result[0][image][np.isin(result[1][image], common)] for result in (before, after))
            cosine = (one * other).sum(-1) / np.linalg.norm(one, axis=-1) / np.linalg.norm(other, axis=-1)
            assert cosine.min() > 0.999
        error = np.abs(after[3] - before[3]).sum(-1) / before[3].sum(-1)
        assert error.max() < 0.01


def test_a_batch_is_its_pictures(rounded: Path, feeds: list[Feed]) -> None:
    """Every row has its own scale, so a picture does not change what another one gets."""
    together = run(rounded, feeds[2], optimised=True)
    for image in range(len(feeds[2]["pixel_values"])):
        part = slice(image, image + 1)
        alone: Feed = {**feeds[2], "pixel_values": feeds[2]["pixel_values"][part], "quota": feeds[2]["quota"][part]}
        for whole, single in zip(together, run(rounded, alone, optimised=True), strict=True):
            np.testing.assert_allclose(whole[part], single, rtol=1e-4, atol=1e-5)


def test_fusions_change_nothing(rounded: Path, feeds: list[Feed]) -> None:
    for plain, fused in zip(run(rounded, feeds[2]), run(rounded, feeds[2], optimised=True), strict=True):
        np.testing.assert_allclose(plain, fused, atol=5e-3)  # a quotient that is half-way may go either way


@pytest.mark.parametrize("fill", [0.0, 1e30])
def test_pictures_without_contrast(rounded: Path, feeds: list[Feed], fill: float) -> None:
    feed: Feed = {**feeds[1], "pixel_values": np.full_like(feeds[1]["pixel_values"], fill)}
    tokens, positions, counts, saliency = run(rounded, feed, optimised=True)
    assert np.isfinite(tokens).all()
    assert np.isfinite(saliency).all()
    assert (counts == 5).all()
    assert (positions >= 0).all()


def test_what_is_not_a_number_is_not_hidden(rounded: Path, feeds: list[Feed]) -> None:
    pixels = feeds[1]["pixel_values"].copy()
    pixels[0, 0, 0, 0] = np.nan
    assert np.isnan(run(rounded, {**feeds[1], "pixel_values": pixels}, optimised=True)[3][0]).any()


def test_opens_as_a_bundle(exported_bundle: Bundle, feeds: list[Feed], tmp_path: Path) -> None:
    summary = write_quantized_cpu(exported_bundle.vision, tmp_path / exported_bundle.vision.name, CPU)
    assert 0.25 < summary.bytes_after / summary.bytes_before < 0.5
    plan = exported_bundle.manifest.plan.model_copy(update={"quantization": CPU})
    bundle = Bundle(tmp_path, exported_bundle.manifest.model_copy(update={"plan": plan}))
    with OrtRunner(bundle, provider="cpu", threads=1) as runner:
        session = runner._session
        tokens = session.run(["visual_tokens"], feeds[1])[0]
    assert tokens.shape == (len(feeds[1]["pixel_values"]), 5, plan.model.decoder.width)


def test_a_further_graph_reads_the_same_weights(exported_bundle: Bundle, tmp_path: Path, feeds: list[Feed]) -> None:
    import onnx_ir as ir

    source = tmp_path / "float"
    source.mkdir()
    for path in exported_bundle.folder.glob(f"{exported_bundle.graph}*"):
        (source / path.name).write_bytes(path.read_bytes())
    save_beside(ir.load(source / "vision.onnx"), source, "vision-other.onnx")
    first, second = tmp_path / "vision.onnx", tmp_path / "vision-other.onnx"
    write_quantized_cpu(source / "vision.onnx", first, CPU)
    summary = write_quantized_cpu(source / "vision-other.onnx", second, CPU, share=first)
    assert summary.files == ("vision-other.onnx",)
    assert abs(second.stat().st_size - first.stat().st_size) < 4000  # no weights of its own
    for one, other in zip(run(first, feeds[1]), run(second, feeds[1]), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.slow
def test_qwen(tmp_path: Path, photographs: list[Image.Image]) -> None:
    """RMS norms, a gated MLP, Gemms and inputs of two axes."""
    bundle = family_bundle(tmp_path, "qwen2_5_vl").bundle
    source = write_vivid(bundle.vision, tmp_path / "vision.onnx", outliers=1)
    summary = write_quantized_cpu(source, tmp_path / "q.onnx", CPU)
    assert any("gate_proj" in name for name in summary.quantized)
    assert "Gemm" not in [node.op_type for node in _loaded(tmp_path / "q.onnx").graph.node if "Few" in node.name]
    feed = feed_of(bundle, photographs[:2], 8)
    before, after = run(source, feed), run(tmp_path / "q.onnx", feed, optimised=True)
    assert (after[2] == before[2]).all()
    assert np.abs(after[3] - before[3]).max() < 0.02


# --------------------------------------------------------------------------------------- single products


def _norm(gain: Floats) -> tuple[onnx.NodeProto, dict[str, Floats]]:
    node = helper.make_node("LayerNormalization", ["x", "gain", "shift"], ["n"], name="norm", axis=-1)
    return node, {"gain": gain, "shift": np.zeros_like(gain)}


def _product(path: Path, weight: Floats, gain: Floats | None = None) -> Path:
    """x or norm(x) times a weight, all that the graph computes."""
    nodes, weights = [], {"proj.weight": weight}
    if gain is not None:
        norm, more = _norm(gain)
        nodes.append(norm)
        weights.update(more)
    nodes.append(helper.make_node("MatMul", ["x" if gain is None else "n", "proj.weight"], ["y"], name="proj/MatMul"))
    shape = ("batch", "tokens", len(weight))
    return write_toy(path, nodes, weights, inputs=[("x", shape)])


def _rounded_weight(weight: Floats) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    scale = np.abs(weight).max(axis=0) / 127
    return np.rint(weight / scale).astype(np.float64), scale.astype(np.float64)


def _int8(path: Path, x: Floats) -> Floats:
    target = path.with_name("q.onnx")
    write_quantized_cpu(path, target, CPU)
    return run(target, {"x": x}, ["y"])[0].astype(np.float32)


def test_rows_around_zero(tmp_path: Path) -> None:
    """Behind a norm: the largest magnitude of a row is 127 steps."""
    x, weight, gain = _drawn(2, 3, 64), _drawn(64, 16, seed=1), np.ones(64, np.float32)
    x[1, 2] *= 100
    n = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    scale = np.abs(n).max(-1, keepdims=True) / 127
    rows, (columns, of_columns) = np.rint(n / scale).astype(np.float64), _rounded_weight(weight)
    wanted = rows @ columns * scale * of_columns
    np.testing.assert_allclose(_int8(_product(tmp_path / "f.onnx", weight, gain), x), wanted, rtol=1e-4, atol=2e-2)


@pytest.mark.parametrize("shift", [0.0, 5.0, -5.0])
def test_rows_with_a_zero_point(tmp_path: Path, shift: float) -> None:
    """Elsewhere 255 steps go from the smallest value to the largest, and always include zero."""
    x, weight = np.abs(_drawn(2, 3, 64)) + np.float32(shift), _drawn(64, 16, seed=1)
    x[0, 0] = 0
    low, high = np.minimum(x.min(-1, keepdims=True), 0), np.maximum(x.max(-1, keepdims=True), 0)
    scale = np.maximum((high - low) / 255, 1e-12)
    zero = np.rint(-low / scale)
    rows = np.clip(np.rint(x / scale) + zero, 0, 255) - zero
    columns, of_columns = _rounded_weight(weight)
    wanted = rows.astype(np.float64) @ columns * scale * of_columns
    got = _int8(_product(tmp_path / "f.onnx", weight), x)
    step = float(scale.max() * np.abs(weight).max())  # a quotient that is half-way may go either way
    np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=2 * step)
    assert np.abs(got[0, 0]).max() == 0
    error = np.linalg.norm(got - x @ weight) / np.linalg.norm(x @ weight)
    assert error < 0.012


def test_a_loud_row_does_not_round_the_others(tmp_path: Path) -> None:
    x, weight = _drawn(1, 8, 64), _drawn(64, 16, seed=1)
    path = _product(tmp_path / "f.onnx", weight)
    quiet = _int8(path, x)[:, 1:]
    x[0, 0] *= 1000
    np.testing.assert_array_equal(_int8(path, x)[:, 1:], quiet)


def test_outliers_are_multiplied_in_float(tmp_path: Path) -> None:
    """Four channels of a norm are fifty times the others; without them it is a product like any other."""
    x, weight, gain = _drawn(1, 8, 128), _drawn(128, 16, seed=1), np.ones(128, np.float32)
    gain[[3, 40, 77, 127]] = 50
    path = _product(tmp_path / "f.onnx", weight, gain)
    exact, got = run(path, {"x": x}, ["y"])[0], _int8(path, x)
    n = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    rest = np.linalg.norm((n * (gain == 1)) @ weight)
    assert np.linalg.norm(got - exact) / rest < 0.02
    values = {item.name: numpy_helper.to_array(item) for item in onnx.load(tmp_path / "q.onnx").graph.initializer}
    np.testing.assert_array_equal(values["proj.weight.outliers"], weight[[3, 40, 77, 127]])
    assert not values["proj.weight"][[3, 40, 77, 127]].any()
    assert np.abs(values["proj.weight"]).max(axis=0).min() == 127


@pytest.mark.parametrize(("loud", "found"), [(0, 0), (8, 8), (9, 0)])
def test_which_channels_are_outliers(tmp_path: Path, loud: int, found: int) -> None:
    import onnx_ir as ir

    gain = np.full(128, -0.5, np.float32)
    gain[:loud] = 2.5
    graph = ir.load(_product(tmp_path / "f.onnx", _drawn(128, 8), gain)).graph
    (product,) = [node for node in graph if node.op_type == "MatMul"]
    assert outlier_channels(product.inputs[0]).tolist() == list(range(found))  # type: ignore[arg-type]
    assert outlier_channels(graph.inputs[0]).size == 0


def test_a_weight_that_is_stored_transposed(tmp_path: Path) -> None:
    x, weight, bias = _drawn(5, 64), _drawn(16, 64, seed=1), _drawn(16, seed=2)
    node = helper.make_node("Gemm", ["x", "proj.weight", "bias"], ["y"], name="proj/Gemm", transB=1)
    path = write_toy(tmp_path / "f.onnx", [node], {"proj.weight": weight, "bias": bias}, inputs=[("x", ("rows", 64))])
    wanted = x @ weight.T + bias
    assert np.linalg.norm(_int8(path, x) - wanted) / np.linalg.norm(wanted) < 0.02
    assert "Gemm" not in _operators(tmp_path / "q.onnx")


# --------------------------------------------------------------------------------------- refusals


def test_half_precision_is_refused(tmp_path: Path) -> None:
    node = helper.make_node("MatMul", ["x", "proj.weight"], ["y"], name="proj/MatMul")
    path = write_toy(tmp_path / "f.onnx", [node], {"proj.weight": _drawn(4, 4)}, dtype=TensorProto.FLOAT16)
    with pytest.raises(UsageError, match=r"proj\.weight.*a CPU computes in float32") as caught:
        write_quantized_cpu(path, tmp_path / "q.onnx", CPU)
    assert caught.value.exit_code == 2
    assert not (tmp_path / "q.onnx").exists()


@pytest.mark.parametrize("place", [0, 3])
def test_weights_that_are_not_finite(tmp_path: Path, place: int) -> None:
    weight, gain = _drawn(128, 8), np.ones(128, np.float32)
    gain[3] = 50
    weight[place, 0] = np.inf
    path = _product(tmp_path / "f.onnx", weight, gain)
    with pytest.raises(UsageError, match=r"'proj\.weight' holds a value that is not finite"):
        write_quantized_cpu(path, tmp_path / "q.onnx", CPU)


def test_not_in_place_and_not_what_is_not_there(vivid: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be quantised in place"):
        write_quantized_cpu(vivid, vivid, CPU)
    with pytest.raises(UsageError, match=r"'layers\.9' names no product"):
        write_quantized_cpu(vivid, tmp_path / "q.onnx", CPU.model_copy(update={"keep": ("layers.9",)}))


def test_smoothing_needs_ranges(exported_bundle: Bundle, tmp_path: Path, feeds: list[Feed]) -> None:
    """With ranges the outliers of a norm move into the weights, and nothing is left to do in float."""
    source = write_vivid(exported_bundle.vision, tmp_path / "vision.onnx")
    smooth = CPU.model_copy(update={"smoothing": 0.5})
    summary = write_quantized_cpu(source, tmp_path / "q.onnx", smooth, ranges_of(source, feeds[3:]))
    assert len(summary.smoothed) > len(summary.quantized) / 2
    before = run(source, feeds[1])
    errors = []
    for name, quantization in (("q.onnx", smooth), ("plain.onnx", CPU)):
        if name == "plain.onnx":
            write_quantized_cpu(source, tmp_path / name, quantization)
        after = run(tmp_path / name, feeds[1], optimised=True)
        errors.append(float(np.abs(after[3] - before[3]).sum() / before[3].sum()))
    assert errors[0] < errors[1]
