"""Graphs with switches: off is the float graph, on is the quantised one, and nothing that decides has a switch."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
import pytest
from checkpoints import TinyLlava
from float_graphs import FP8, INT8, OUTPUTS, Feed, feed_of, ranges_from_channels, ranges_of, run, write_toy, write_vivid
from onnx import TensorProto, helper
from PIL import Image

from holov_export.bundle import Bundle
from holov_export.errors import UsageError
from holov_export.export.onnx_from_graph import onnx_from_graph, save_vision
from holov_export.quantize.cpu import write_quantized_cpu
from holov_export.quantize.linears import Linear, linears_of, matches
from holov_export.quantize.probe_graph import MULTIPLICATIONS, SWITCHES, ProbeGraph, probe_from_graph
from holov_export.quantize.probe_groups import groups_of, patterns_of
from holov_export.quantize.probe_runner import ProbeRunner
from holov_export.quantize.qdq import write_quantized
from holov_export.quantize.ranges import ChannelRange, Ranges
from holov_export.runtime.preprocess import pixels_from_pictures
from holov_export.spec import Precision, Quantization, QuantizedType
from holov_export.vision.families import vision_from_plan
from holov_export.vision.weights import SafetensorsReader

Array = npt.NDArray[np.generic]
CPU = Quantization(type=QuantizedType.INT8, engine="cpu")
_SIZES = TinyLlava()


@dataclass(frozen=True)
class Float:
    """A float graph, its ranges and something to run it on."""

    graph: Path
    ranges: Ranges
    feed: Feed


@pytest.fixture(scope="module")
def tiny(exported_bundle: Bundle, photographs: list[Image.Image], tmp_path_factory: pytest.TempPathFactory) -> Float:
    """The tiny LLaVA's graph with drawn norms and biases, some channels loud; 40 of 64 tokens."""
    graph = write_vivid(exported_bundle.vision, tmp_path_factory.mktemp("float") / "vision.onnx", outliers=6)
    feed = feed_of(exported_bundle, photographs[:2], 40)
    return Float(graph, ranges_of(graph, [feed]), feed)


def _session(probe: ProbeGraph) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.add_session_config_entry(
        "session.model_external_initializers_file_folder_path", str(probe.folder.resolve())
    )
    # as the runner does: no integer products
    fusion = ["QDQSelectorActionTransformer"]
    content = probe.model.SerializeToString()
    return ort.InferenceSession(content, options, providers=["CPUExecutionProvider"], disabled_optimizers=fusion)


def _probed(probe: ProbeGraph, feed: Feed, on: Collection[str], names: tuple[str, ...] = OUTPUTS) -> list[Array]:
    switches = np.array([group.name in on for group in probe.groups])
    return list(_session(probe).run(list(names), {**feed, SWITCHES: switches}))


def _names(probe: ProbeGraph) -> list[str]:
    return [group.name for group in probe.groups]


def _saliency_distance(one: list[Array], other: list[Array]) -> float:
    return float(np.linalg.norm(one[3].astype(np.float64) - other[3]) / np.linalg.norm(other[3]))


def _token_distance(one: list[Array], other: list[Array]) -> float:
    """Of the rows of positions that both kept, relative L2."""
    pairs = []
    for image in range(len(one[1])):
        _, left, right = np.intersect1d(one[1][image], other[1][image], return_indices=True)
        pairs.append((one[0][image][left].astype(np.float64), other[0][image][right].astype(np.float64)))
    difference = sum(((left - right) ** 2).sum() for left, right in pairs)
    return float(np.sqrt(difference / sum((right**2).sum() for _, right in pairs)))


def _same_effect(probed: list[Array], quantized: list[Array], exact: list[Array], share: float) -> None:
    """Two quantised results differ by no more than a share of what quantising did.

    They are not equal: a value in the middle between two steps falls to either side, by its last bit.
    """
    np.testing.assert_array_equal(probed[2], quantized[2])
    effect = _token_distance(quantized, exact)
    assert effect > 1e-4, "something was rounded"
    assert _token_distance(probed, quantized) < share * effect
    assert _saliency_distance(probed, quantized) <= share * _saliency_distance(quantized, exact) + 1e-6


# --------------------------------------------------------------------------------------- the whole graph


@pytest.mark.parametrize("quantization", [INT8, FP8, CPU], ids=["int8", "fp8", "cpu"])
def test_all_off_is_the_float_graph_bit_for_bit(tiny: Float, quantization: Quantization) -> None:
    before = sorted(tiny.graph.parent.iterdir())
    ranges = None if quantization.engine == "cpu" else tiny.ranges
    probe = probe_from_graph(tiny.graph, quantization, ranges)
    for off, plain in zip(_probed(probe, tiny.feed, ()), run(tiny.graph, tiny.feed, optimised=True), strict=True):
        np.testing.assert_array_equal(off, plain)
    assert sorted(tiny.graph.parent.iterdir()) == before, "nothing is written"


@pytest.mark.parametrize("quantization", [INT8, FP8], ids=["int8", "fp8"])
@pytest.mark.parametrize("smoothing", [None, 0.5])
def test_all_on_is_the_quantised_graph(
    tiny: Float, tmp_path: Path, quantization: Quantization, smoothing: float | None
) -> None:
    wanted = quantization.model_copy(update={"smoothing": smoothing})
    write_quantized(tiny.graph, tmp_path / "q.onnx", wanted, tiny.ranges)
    probe = probe_from_graph(tiny.graph, wanted, tiny.ranges)
    on = _probed(probe, tiny.feed, _names(probe))
    quantized, exact = run(tmp_path / "q.onnx", tiny.feed), run(tiny.graph, tiny.feed)
    _same_effect(on, quantized, exact, 0.9)  # one value that falls to the other side makes many behind it fall
    assert _token_distance(on, exact) == pytest.approx(_token_distance(quantized, exact), rel=0.3)


@pytest.mark.parametrize("smoothing", [None, 0.5])
@pytest.mark.parametrize("name", ["layers.0.mlp", "layers.1.self_attn", "layers.2.self_attn", "multi_modal_projector"])
def test_one_group_on_is_a_graph_for_cpus_with_that_group_quantised(
    tiny: Float, tmp_path: Path, name: str, smoothing: float | None
) -> None:
    wanted = CPU.model_copy(update={"smoothing": smoothing})
    probe = probe_from_graph(tiny.graph, wanted, tiny.ranges)
    others = tuple(group for group in _names(probe) if group != name)
    alone = wanted.model_copy(update={"keep": others})
    write_quantized_cpu(tiny.graph, tmp_path / "q.onnx", alone, tiny.ranges)
    quantized, exact = run(tmp_path / "q.onnx", tiny.feed), run(tiny.graph, tiny.feed)
    _same_effect(_probed(probe, tiny.feed, {name}), quantized, exact, 0.1)


@pytest.mark.parametrize("smoothing", [None, 0.5])
@pytest.mark.parametrize("name", ["layers.0.mlp", "layers.1.self_attn", "layers.2.self_attn", "multi_modal_projector"])
def test_one_group_on_is_a_graph_with_that_group_quantised(
    tiny: Float, tmp_path: Path, name: str, smoothing: float | None
) -> None:
    wanted = INT8.model_copy(update={"smoothing": smoothing})
    probe = probe_from_graph(tiny.graph, wanted, tiny.ranges)
    others = tuple(group for group in _names(probe) if group != name)
    alone = wanted.model_copy(update={"keep": others})
    write_quantized(tiny.graph, tmp_path / "q.onnx", alone, tiny.ranges)
    quantized, exact = run(tmp_path / "q.onnx", tiny.feed), run(tiny.graph, tiny.feed)
    _same_effect(_probed(probe, tiny.feed, {name}), quantized, exact, 0.1)


def test_smoothing_changes_what_outliers_do(tiny: Float) -> None:
    plain = probe_from_graph(tiny.graph, INT8, tiny.ranges)
    smooth = probe_from_graph(tiny.graph, INT8.model_copy(update={"smoothing": 0.5}), tiny.ranges)
    exact = run(tiny.graph, tiny.feed)[3]
    errors = [np.abs(_probed(probe, tiny.feed, _names(probe))[3] - exact).mean() for probe in (plain, smooth)]
    assert errors[1] < errors[0]


@pytest.mark.slow
def test_half_precision_graphs_run(
    exported_bundle: Bundle, llava_checkpoint: Path, photographs: list[Image.Image], tmp_path: Path
) -> None:
    plan = exported_bundle.manifest.plan.model_copy(update={"precision": Precision.FP16})
    with SafetensorsReader(llava_checkpoint) as reader:
        save_vision(onnx_from_graph(vision_from_plan(plan, reader, Precision.FP16), plan), tmp_path)
    graph = tmp_path / "vision.onnx"
    half = replace(exported_bundle, manifest=exported_bundle.manifest.model_copy(update={"plan": plan}))
    feed = feed_of(half, photographs[:1], 20)
    ranges = ranges_of(graph, [feed])
    for quantization in (INT8, FP8):
        probe = probe_from_graph(graph, quantization, ranges)
        # not bit for bit: ONNX Runtime leaves out roundings to float16 where two of its float32 operators meet
        off, plain = _probed(probe, feed, ()), run(graph, feed, optimised=True)
        assert max(_token_distance(off, plain), _saliency_distance(off, plain)) < 5e-3
        on = _probed(probe, feed, _names(probe))
        assert on[0].dtype == np.float16
        assert 1e-4 < _token_distance(on, off) < 0.2


def test_runner_counts_multiplications(exported_bundle: Bundle, photographs: list[Image.Image], tiny: Float) -> None:
    plan, probe = exported_bundle.manifest.plan, probe_from_graph(tiny.graph, INT8, tiny.ranges)
    pixels = pixels_from_pictures(photographs[:2], plan.model)
    with ProbeRunner(probe, plan) as runner:
        counts = dict(
            zip((linear.name for linear in probe.linears), runner.multiplications(pixels, [9, 4]), strict=True)
        )
    width, mlp, tokens = _SIZES.vision_width, _SIZES.vision_mlp, 64
    assert counts["vision_tower.layers.0.mlp.fc1"] == 2 * (tokens + 1) * width * mlp
    assert counts["vision_tower.layers.2.mlp.fc1"] == 2 * 9 * width * mlp, "behind the choice: the budget's rows"
    assert counts["vision_tower.layers.2.self_attn.q_proj"] == 2 * (9 + 1) * width * width, "and the CLS row"


# --------------------------------------------------------------------------------------- one product


def _toy(folder: Path, dtype: int = TensorProto.FLOAT) -> tuple[Path, Ranges, Array, Array]:
    draw = np.random.default_rng(3)
    weight = draw.normal(0, 1, (4, 6)).astype(np.float32)
    nodes = [helper.make_node("MatMul", ["x", "part.lin.weight"], ["y"], name="product")]
    graph = write_toy(folder / "toy.onnx", nodes, {"part.lin.weight": weight}, dtype=dtype)
    values = draw.normal(0, 1, (5, 4)).astype(np.float32)
    values[0, 0] = -5.0
    ranges = ranges_from_channels({"x": ChannelRange(low=np.full(4, -4.0, np.float32), high=np.ones(4, np.float32))})
    return graph, ranges, values, weight


def _by_hand(values: Array, scales: Array | np.floating) -> Array:
    return np.clip(np.rint(values / scales), -127, 127) * scales


def test_rounds_as_one_would_by_hand(tmp_path: Path) -> None:
    graph, ranges, values, weight = _toy(tmp_path)
    probe = probe_from_graph(graph, INT8, ranges)
    assert _names(probe) == ["part"]
    (on,) = _probed(probe, {"x": values}, {"part"}, ("y",))
    activation = np.float32(4.0 / 127)
    rounded = np.clip(np.rint(values / activation), -128, 127) * activation
    wanted = rounded @ _by_hand(weight, np.abs(weight).max(0) / np.float32(127))
    np.testing.assert_allclose(on, wanted, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(_probed(probe, {"x": values}, (), ("y",))[0], values @ weight, rtol=1e-5, atol=1e-6)


def test_cpu_form_rounds_by_row(tmp_path: Path) -> None:
    """The product reads the graph's input, which need not lie around zero: 255 steps between the ends of each row."""
    graph, _, values, weight = _toy(tmp_path)
    (on,) = _probed(probe_from_graph(graph, CPU, None), {"x": values}, {"part"}, ("y",))
    low, high = np.minimum(values.min(1, keepdims=True), 0), np.maximum(values.max(1, keepdims=True), 0)
    scale = (high - low) / np.float32(255)
    zero = np.rint(-low / scale)
    rounded = (np.clip(np.rint(values / scale) + zero, 0, 255) - zero) * scale
    np.testing.assert_allclose(on, rounded @ _by_hand(weight, np.abs(weight).max(0) / np.float32(127)), atol=1e-5)


def test_cpu_form_leaves_outliers_of_a_norm_out(tmp_path: Path) -> None:
    draw, width = np.random.default_rng(5), 32
    gain = np.ones(width)
    gain[[3, 20]] = 40.0
    weights = {"gain": gain, "part.lin.weight": draw.normal(0, 1, (width, 6))}
    nodes = [
        helper.make_node("LayerNormalization", ["x", "gain"], ["n"], name="norm"),
        helper.make_node("MatMul", ["n", "part.lin.weight"], ["y"], name="product"),
    ]
    graph = write_toy(tmp_path / "toy.onnx", nodes, weights, inputs=(("x", ("rows", width)),))
    feed: Feed = {"x": draw.normal(0, 1, (7, width)).astype(np.float32)}
    probe = probe_from_graph(graph, CPU, None)
    (on,), (off,) = (_probed(probe, feed, names, ("y",)) for names in ({"part"}, ()))
    error = np.abs(on - off).max()
    assert 0 < error < 0.2
    write_quantized_cpu(graph, tmp_path / "q.onnx", CPU)
    (quantized,) = run(tmp_path / "q.onnx", feed, ("y",))
    np.testing.assert_allclose(on, quantized, atol=1e-4)
    with_outliers = np.abs(_rows_rounded(run(graph, feed, ("y",))[0], feed, weights) - off).max()
    assert with_outliers > 5 * error


def _rows_rounded(exact: Array, feed: Feed, weights: dict[str, Array]) -> Array:
    """The product of rows that are rounded with their outliers."""
    x = feed["x"].astype(np.float64)
    norm = (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + 1e-5) * weights["gain"]
    np.testing.assert_allclose(norm @ weights["part.lin.weight"], exact, atol=1e-3)
    scale = np.abs(norm).max(1, keepdims=True) / 127
    return np.rint(norm / scale) * scale @ weights["part.lin.weight"]


@pytest.mark.parametrize("quantization", [INT8, FP8], ids=["int8", "fp8"])
def test_half_precision_stays_half(tmp_path: Path, quantization: Quantization) -> None:
    graph, ranges, values, weight = _toy(tmp_path, TensorProto.FLOAT16)
    values = np.clip(values, -4, 1).astype(np.float16)
    probe = probe_from_graph(graph, quantization, ranges)
    (on,), (off,) = (_probed(probe, {"x": values}, names, ("y",)) for names in ({"part"}, ()))
    assert on.dtype == off.dtype == np.float16
    np.testing.assert_allclose(off, values.astype(np.float32) @ weight, atol=2e-2)
    np.testing.assert_allclose(on, off, atol=0.1 if quantization is not FP8 else 0.5)
    assert (on != off).any()


def test_large_values_do_not_overflow(tmp_path: Path) -> None:
    """Processors without VNNI add pairs of products up in 16 bits; a probe that is fused to such products is wrong."""
    weight, values = np.ones((4, 6), np.float32), np.full((5, 4), 2.0, np.float32)
    nodes = [helper.make_node("MatMul", ["x", "part.lin.weight"], ["y"], name="product")]
    graph = write_toy(tmp_path / "toy.onnx", nodes, {"part.lin.weight": weight})
    (on,) = _probed(probe_from_graph(graph, CPU, None), {"x": values}, {"part"}, ("y",))
    np.testing.assert_allclose(on, 8.0, rtol=1e-5)


def test_refuses_what_cannot_be_probed(tmp_path: Path) -> None:
    graph, ranges, _, _ = _toy(tmp_path)
    with pytest.raises(UsageError, match="no range of 'x'"):
        probe_from_graph(graph, INT8, Ranges(ranges.record.model_copy(update={"tensors": {}}), {}))
    with pytest.raises(UsageError, match="names no product"):
        probe_from_graph(graph, INT8.model_copy(update={"keep": ("nobody",)}), ranges)
    graph, ranges, _, _ = _toy(tmp_path, TensorProto.FLOAT16)
    with pytest.raises(UsageError, match="a CPU computes in float32"):
        probe_from_graph(graph, CPU, None)
    graph, ranges, _, _ = _toy(tmp_path, TensorProto.BFLOAT16)
    with pytest.raises(UsageError, match="bfloat16"):
        probe_from_graph(graph, INT8, ranges)


# --------------------------------------------------------------------------------------- groups


def test_nothing_that_decides_has_a_switch(tiny: Float) -> None:
    probe = probe_from_graph(tiny.graph, INT8, tiny.ranges)
    deciding = {linear.weight for linear in probe.linears if linear.deciding}
    assert len(deciding) == 2
    assert not deciding & {linear.weight for group in probe.groups for linear in group.linears}
    products = {node.name: node.op_type for node in probe.model.graph.node}
    for linear in probe.linears:
        assert {products[name] for name in linear.nodes} == ({"MatMul"} if linear.deciding else {"If"})
    assert probe.model.graph.output[-1].name == MULTIPLICATIONS


def test_kept_products_have_no_switch(tiny: Float) -> None:
    probe = probe_from_graph(tiny.graph, INT8.model_copy(update={"keep": ("layers.1", "fc2")}), tiny.ranges)
    assert [(group.name, len(group.linears)) for group in probe.groups] == [
        ("layers.0.self_attn", 4),
        ("layers.0.mlp", 1),
        ("layers.2.self_attn", 2),
        ("layers.2.mlp", 1),
        ("multi_modal_projector", 2),
    ]


def test_names_are_patterns_of_their_own_products(tiny: Float) -> None:
    linears = linears_of(onnx.load(tiny.graph, load_external_data=False))
    chosen = [linear for linear in linears if not linear.deciding]
    for whole_layers in (False, True):
        for group in groups_of(linears, chosen, whole_layers=whole_layers):
            named = [linear for linear in chosen if matches(group.name, linear)]
            assert tuple(named) == group.linears
    layers = [group.name for group in groups_of(linears, chosen, whole_layers=True)]
    assert layers == ["layers.0", "layers.1", "layers.2", "multi_modal_projector"]


def _linear(name: str) -> Linear:
    return Linear(f"{name}.weight", 4, 4, (name,), (f"{name}.x",), deciding=False)


def test_a_short_name_is_never_another_towers() -> None:
    names = (
        "a.layers.1.mlp.fc1",
        "b.layers.1.mlp.fc1",
        "b.layers.1.attn.q",
        "b.merger.mlp.0",
        "b.merger.mlp.2",
        "head",
    )
    linears = [_linear(name) for name in names]
    parts = [group.name for group in groups_of(linears, linears)]
    assert parts == ["a.layers.1.mlp", "b.layers.1.mlp", "attn", "merger.mlp", "head"]
    assert [group.name for group in groups_of(linears, linears, whole_layers=True)] == [
        "a.layers.1",
        "b.layers.1",
        "merger.mlp",
        "head",
    ]


def test_a_layer_that_is_kept_whole_is_named_once() -> None:
    linears = [_linear(f"layers.{place}.{part}.w") for place in range(3) for part in ("attn", "mlp")]
    groups = groups_of(linears, linears)
    kept = {"layers.0.attn", "layers.1.mlp", "layers.2.attn", "layers.2.mlp"}
    assert patterns_of(kept, groups, linears) == ("layers.0.attn", "layers.1.mlp", "layers.2")
    assert patterns_of((), groups, linears) == ()
