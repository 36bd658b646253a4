"""Smoothing: the float graph computes what it did, and the rounded one comes much nearer to it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from family_bundles import family_bundle
from float_graphs import INT8, Feed, feed_of, ranges_from_channels, ranges_of, run, write_toy, write_vivid
from onnx import helper, numpy_helper
from PIL import Image

from holov_export.bundle import Bundle
from holov_export.errors import UsageError
from holov_export.quantize.linears import linears_of, quantised_linears
from holov_export.quantize.placement import check_placement
from holov_export.quantize.qdq import write_quantized
from holov_export.quantize.ranges import ChannelRange, Ranges
from holov_export.quantize.smooth import smoothed


def _loaded(path: Path) -> onnx.ModelProto:
    return onnx.load(path, load_external_data=False)


def _smooth(
    source: Path, target: Path, ranges: Ranges, alpha: float = 0.5, keep: Sequence[str] = ()
) -> tuple[Ranges, tuple[str, ...]]:
    """Write the smoothed float graph."""
    proto, model = _loaded(source), ir.load(source)
    linears = linears_of(proto)
    result = smoothed(model, proto, linears, quantised_linears(linears, keep), ranges, alpha)
    ir.save(model, target, external_data=f"{target.name}.data")
    return result


@pytest.fixture(scope="module")
def loud(
    exported_bundle: Bundle, photographs: list[Image.Image], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Ranges, list[Feed]]:
    """The tiny LLaVA's graph with six channels of each norm 15 times louder; its ranges; other pictures."""
    graph = write_vivid(exported_bundle.vision, tmp_path_factory.mktemp("loud") / "vision.onnx")
    ranges = ranges_of(graph, [feed_of(exported_bundle, photographs[:2], 64)])
    return graph, ranges, [feed_of(exported_bundle, photographs[2:], budget) for budget in (5, 64)]


def test_float_graph_stays_the_same(loud: tuple[Path, Ranges, list[Feed]], tmp_path: Path) -> None:
    graph, ranges, feeds = loud
    for alpha in (0.3, 0.5, 0.8):
        _, names = _smooth(graph, tmp_path / "s.onnx", ranges, alpha)
        assert names
        for feed in feeds:
            before, after = run(graph, feed), run(tmp_path / "s.onnx", feed)
            np.testing.assert_array_equal(after[1], before[1])
            np.testing.assert_allclose(after[3], before[3], rtol=1e-5)
            np.testing.assert_allclose(after[0], before[0], rtol=1e-5, atol=1e-5 * np.abs(before[0]).max())


def test_smooths_what_can_be(loud: tuple[Path, Ranges, list[Feed]], tmp_path: Path) -> None:
    """Query, key, value, output and first MLP product of each layer; of the feature layer not what decides."""
    graph, ranges, _ = loud
    _, names = _smooth(graph, tmp_path / "s.onnx", ranges)
    linears = linears_of(_loaded(graph))
    ends = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1")
    assert set(names) == {linear.name for linear in linears if linear.name.endswith(ends) and not linear.deciding}
    assert len(names) == len(set(names))
    written = {item.name: item for item in _loaded(tmp_path / "s.onnx").graph.initializer}
    assert set(written) >= {linear.weight for linear in linears}
    read = {name for node in _loaded(tmp_path / "s.onnx").graph.node for name in node.input}
    assert set(written) <= read


def test_ranges_are_those_of_the_smoothed_graph(loud: tuple[Path, Ranges, list[Feed]], tmp_path: Path) -> None:
    graph, ranges, feeds = loud
    measured = ranges_of(graph, feeds)
    told, _ = _smooth(graph, tmp_path / "s.onnx", measured)
    found = ranges_of(tmp_path / "s.onnx", feeds)
    assert set(found.channels) == set(told.channels) == set(ranges.channels)
    changed = 0
    for name, item in found.channels.items():
        largest = max(abs(item.low).max(), abs(item.high).max())
        np.testing.assert_allclose(told.channels[name].low, item.low, atol=2e-5 * largest)
        np.testing.assert_allclose(told.channels[name].high, item.high, atol=2e-5 * largest)
        assert told.record.tensors[name].high == pytest.approx(float(item.high.max()), rel=1e-4, abs=1e-6)
        assert told.record.tensors[name].low == pytest.approx(float(item.low.min()), rel=1e-4, abs=1e-6)
        changed += told.record.tensors[name] != measured.record.tensors[name]
    assert changed >= 9


def test_rounding_loses_much_less(loud: tuple[Path, Ranges, list[Feed]], tmp_path: Path) -> None:
    graph, ranges, feeds = loud
    error = {}
    for alpha in (None, 0.5):
        quantization = INT8.model_copy(update={"smoothing": alpha})
        summary = write_quantized(graph, tmp_path / "q.onnx", quantization, ranges)
        assert bool(summary.smoothed) == (alpha is not None)
        assert check_placement(_loaded(tmp_path / "q.onnx"), quantization) == ()
        gaps = []
        for feed in feeds:
            before, after = run(graph, feed), run(tmp_path / "q.onnx", feed)
            gaps.append(np.linalg.norm(after[3] - before[3]) / np.linalg.norm(before[3]))
            if feed["budget"][0] == 64:  # all tokens, so the rows are of the same positions
                gaps.append(np.linalg.norm(after[0] - before[0]) / np.linalg.norm(before[0]))
        error[alpha] = max(gaps)
    print(error)
    assert error[0.5] < 0.6 * error[None]


def test_kept_products_are_compensated_and_have_no_say(loud: tuple[Path, Ranges, list[Feed]], tmp_path: Path) -> None:
    graph, ranges, feeds = loud
    keep = ("layers.0.self_attn.q_proj", "layers.1.mlp.fc1")
    told, names = _smooth(graph, tmp_path / "s.onnx", ranges, keep=keep)
    assert not any(name.endswith(keep) for name in names)
    before, after = run(graph, feeds[1]), run(tmp_path / "s.onnx", feeds[1])
    np.testing.assert_allclose(after[0], before[0], atol=1e-5 * np.abs(before[0]).max())
    linears = {linear.name: linear for linear in linears_of(_loaded(graph))}
    lone = linears["vision_tower.layers.1.mlp.fc1"].activations[0]
    assert told.record.tensors[lone] == ranges.record.tensors[lone]

    weights = {item.name: numpy_helper.to_array(item) for item in onnx.load(graph).graph.initializer}
    readers = [linears[f"vision_tower.layers.0.self_attn.{name}_proj"] for name in ("k", "v")]
    name = readers[0].activations[0]
    rows = np.max([np.abs(weights[linear.weight]).max(axis=1) for linear in readers], axis=0)
    inputs = np.maximum(np.abs(ranges.channels[name].low), np.abs(ranges.channels[name].high))
    # the value projection's columns were divided before, so its rows are only nearly what they were
    found = ranges.channels[name].high / told.channels[name].high
    wanted = np.sqrt(inputs / rows)
    assert np.median(np.abs(np.log2(found / wanted))) < 1


# --------------------------------------------------------------------------------------- small graphs

_WIDTH = 4
_RANGE = ChannelRange(low=np.array([-1, -8, 0, -1], dtype=np.float32), high=np.array([1, 8, 0, 2], dtype=np.float32))


def _norm(name: str = "n", source: str = "x") -> onnx.NodeProto:
    return helper.make_node("LayerNormalization", [source, "gain", "shift"], [name], name=f"{name}orm")


def _weights(**more: np.ndarray) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(1)
    plain = {
        "gain": np.array([1, 5, 0.5, 1.0]),
        "shift": np.array([0.1, 0, 0.3, -0.2]),
        "fc.weight": draw.normal(0, 1, (_WIDTH, 5)),
        "two.weight": draw.normal(0, 1, (_WIDTH, 3)),
    }
    return {**plain, **more}


def _fc(source: str = "n", result: str = "y", weight: str = "fc") -> onnx.NodeProto:
    return helper.make_node("MatMul", [source, f"{weight}.weight"], [result], name=weight)


_AXIS = np.array([0], dtype=np.int64)
_ONE = np.array([1], dtype=np.int64)
_LAST = np.array([2], dtype=np.int64)
_ALL = np.array([2**31], dtype=np.int64)
_FLAT = np.array([-1, _WIDTH], dtype=np.int64)
_TAKE = np.array([1, 0], dtype=np.int64)

#: nodes behind the norm of x [2, 3, 4] -> whether its input can be smoothed
_CASES: dict[str, tuple[list[onnx.NodeProto], bool]] = {
    "product": ([_norm(), _fc()], True),
    "two products": ([_norm(), _fc(), _fc("n", "z", "two")], True),
    "read by a residual": ([_norm(), _fc(), helper.make_node("Neg", ["n"], ["z"], name="neg")], False),
    "an output": ([_norm("z"), _fc("z")], False),
    "rows taken": (
        [
            _norm(),
            helper.make_node("Reshape", ["n", "flat"], ["f"], name="reshape"),
            helper.make_node("Gather", ["f", "take"], ["g"], axis=0, name="gather"),
            _fc("g"),
        ],
        True,
    ),
    "tokens sliced": (
        [_norm(), helper.make_node("Slice", ["n", "zero", "one", "one", "one"], ["g"], name="slice"), _fc("g")],
        True,
    ),
    "channels turned round": (
        [_norm(), helper.make_node("Gather", ["n", "turn"], ["g"], axis=2, name="gather"), _fc("g")],
        False,
    ),
    "channels cut and laid out": (
        [
            _norm(),
            helper.make_node("Slice", ["n", "zero", "two", "two", "one"], ["h"], name="slice"),
            helper.make_node("Reshape", ["h", "flat"], ["f"], name="reshape"),
            _fc("f"),
        ],
        False,
    ),
    "rows taken in halves": (
        [
            _norm(),
            helper.make_node("Reshape", ["n", "half"], ["h"], name="halve"),
            helper.make_node("Gather", ["h", "turn"], ["g"], axis=0, name="gather"),
            helper.make_node("Reshape", ["g", "flat"], ["f"], name="reshape"),
            _fc("f"),
        ],
        False,
    ),
    "read across": ([_norm(), helper.make_node("Transpose", ["n"], ["t"], perm=[0, 2, 1], name="t")], False),
    "not the product's first factor": (
        [
            _norm(),
            helper.make_node("MatMul", ["fc.weight", "n"], ["u"], name="u"),
            _fc("x", "y"),
        ],
        False,
    ),
    "weight shared with another input": (
        [_norm(), _fc(), helper.make_node("MatMul", ["x", "fc.weight"], ["z"], name="again")],
        False,
    ),
    "a gain after a norm": (
        [
            helper.make_node("Relu", ["x"], ["r"], name="relu"),
            helper.make_node("Mul", ["gain", "r"], ["n"], name="scale"),
            _fc(),
        ],
        True,
    ),
}


@pytest.mark.parametrize("case", _CASES)
def test_folds_only_what_is_plain(tmp_path: Path, case: str) -> None:
    nodes, folds = _CASES[case]
    results = [name for name in ("y", "z") if any(name in node.output for node in nodes)] or ["t"]
    used = {name for node in nodes for name in node.input}
    indices = {
        "flat": _FLAT,
        "take": _TAKE,
        "turn": np.array([3, 2, 1, 0], dtype=np.int64),
        "zero": _AXIS,
        "one": _ONE,
        "two": _LAST,
        "half": np.array([-1, 2], dtype=np.int64),
    }
    weights = {name: array for name, array in _weights(**indices).items() if name in used}
    if case == "not the product's first factor":
        nodes = [node for node in nodes if node.name != "u"] + [helper.make_node("Neg", ["n"], ["u"], name="u")]
    if case == "read across":
        nodes = [*nodes, _fc("x", "y")]
        weights["fc.weight"] = _weights()["fc.weight"]
        results = ["t", "y"]
    source = write_toy(tmp_path / "f.onnx", nodes, weights, inputs=(("x", (2, 3, _WIDTH)),), outputs=results)
    activations = {node.input[0] for node in nodes if node.op_type == "MatMul"}
    ranges = ranges_from_channels(dict.fromkeys(activations, _RANGE))
    told, names = _smooth(source, tmp_path / "s.onnx", ranges)
    assert bool(names) == folds
    x = np.random.default_rng(0).normal(0, 1, (2, 3, _WIDTH)).astype(np.float32)
    for a, b in zip(run(source, {"x": x}, results), run(tmp_path / "s.onnx", {"x": x}, results), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    changed = {name for name in activations if told.record.tensors[name] != ranges.record.tensors[name]}
    assert changed == (activations if folds else set())


@pytest.mark.parametrize(
    ("split", "together", "twice", "folds"),
    [
        ((2, 4, 2, 2), (0, 2, 1, 3), False, True),
        ((2, 4, 1, 4), (0, 2, 1, 3), False, True),
        ((2, 8, 1, 2), (0, 2, 1, 3), False, False),
        ((2, 4, 2, 2), (0, 2, 3, 1), False, False),
        ((2, 4, 2, 2), (0, 2, 1, 3), True, False),
    ],
    ids=["two heads", "one head", "tokens cut in two", "merged the other way", "values read twice"],
)
def test_folds_through_an_attention(
    tmp_path: Path, split: tuple[int, ...], together: tuple[int, ...], twice: bool, folds: bool
) -> None:
    """x [2, 4, 4] @ v, split into heads, mixed over tokens, merged, @ out."""
    _, tokens, heads, _ = split
    draw = np.random.default_rng(2)
    nodes = [
        helper.make_node("MatMul", ["x", "v.weight"], ["v"], name="v"),
        helper.make_node("Add", ["v", "v.bias"], ["vb"], name="add"),
        helper.make_node("Reshape", ["vb", "split"], ["vs"], name="split"),
        helper.make_node("Transpose", ["vs"], ["vt"], perm=[0, 2, 1, 3], name="apart"),
        helper.make_node("MatMul", ["shares", "vt"], ["m"], name="mix"),
        helper.make_node("Transpose", ["m"], ["mt"], perm=together, name="together"),
        helper.make_node("Reshape", ["mt", "merge"], ["r"], name="merge"),
        _fc("r"),
    ]
    results = ("y", "z") if twice else ("y",)
    if twice:
        nodes.append(helper.make_node("Neg", ["vb"], ["z"], name="neg"))
    weights = {
        "v.weight": draw.normal(0, 1, (_WIDTH, _WIDTH)),
        "v.bias": draw.normal(0, 1, _WIDTH),
        "fc.weight": draw.normal(0, 1, (_WIDTH, 5)),
        "split": np.array(split, dtype=np.int64),
        "merge": np.array([2, 4, _WIDTH], dtype=np.int64),
    }
    inputs = (("x", (2, 4, _WIDTH)), ("shares", (2, heads, tokens, tokens)))
    source = write_toy(tmp_path / "f.onnx", nodes, weights, inputs=inputs, outputs=results)
    _, names = _smooth(source, tmp_path / "s.onnx", ranges_from_channels({"x": _RANGE, "r": _RANGE}))
    assert names == (("fc",) if folds else ())
    feed = {name: draw.normal(0, 1, shape).astype(np.float32) for name, shape in inputs}
    for before, after in zip(run(source, feed, results), run(tmp_path / "s.onnx", feed, results), strict=True):
        np.testing.assert_allclose(after, before, rtol=1e-4, atol=1e-5)


def test_factors_are_equation_4(tmp_path: Path) -> None:
    source = write_toy(tmp_path / "f.onnx", [_norm(), _fc()], _weights(), inputs=(("x", (2, 3, _WIDTH)),))
    for alpha in (0.25, 0.5, 0.9):
        _smooth(source, tmp_path / "s.onnx", ranges_from_channels({"n": _RANGE}), alpha)
        before, after = (
            {item.name: numpy_helper.to_array(item) for item in onnx.load(path).graph.initializer}
            for path in (source, tmp_path / "s.onnx")
        )
        rows = np.abs(before["fc.weight"]).max(axis=1)
        wanted = np.array([1, 8, 1, 2]) ** alpha / rows ** (1 - alpha)
        wanted[2] = 1  # nothing was seen in that channel
        np.testing.assert_allclose(after["fc.weight"] / before["fc.weight"], wanted[:, None].repeat(5, 1), rtol=1e-5)
        np.testing.assert_allclose(after["norm#1.smoothed"], before["gain"] / wanted, rtol=1e-5)
        np.testing.assert_allclose(after["norm#2.smoothed"], before["shift"] / wanted, rtol=1e-5)


def test_missing_or_wrong_channels_are_named(tmp_path: Path) -> None:
    source = write_toy(tmp_path / "f.onnx", [_norm(), _fc()], _weights(), inputs=(("x", (2, 3, _WIDTH)),))
    ranges = ranges_from_channels({"n": _RANGE})
    with pytest.raises(UsageError, match="no channels of 'n'"):
        _smooth(source, tmp_path / "s.onnx", replace(ranges, channels={}))
    short = ChannelRange(low=_RANGE.low[:2], high=_RANGE.high[:2])
    lost = ChannelRange(low=_RANGE.low, high=np.full(4, np.nan, dtype=np.float32))
    for bad in (short, lost):
        with pytest.raises(UsageError, match="channels of 'n'"):
            _smooth(source, tmp_path / "s.onnx", replace(ranges, channels={"n": bad}))


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llava_next", "qwen2_5_vl", "video_llava"])
def test_families(tmp_path: Path, family: str, photographs: list[Image.Image]) -> None:
    bundle = family_bundle(tmp_path, family).bundle
    graph = write_vivid(bundle.vision, tmp_path / "vision.onnx")
    feeds = [feed_of(bundle, pictures, 8) for pictures in (photographs[:2], photographs[2:])]
    ranges = ranges_of(graph, feeds[:1])
    _, names = _smooth(graph, tmp_path / "s.onnx", ranges)
    ends = ("gate_proj", "up_proj", "down_proj", "qkv") if family == "qwen2_5_vl" else ("_proj", "fc1")
    linears = [linear for linear in linears_of(_loaded(graph)) if not linear.deciding]
    assert set(names) == {linear.name for linear in linears if linear.name.endswith(ends)}
    before, after = run(graph, feeds[1]), run(tmp_path / "s.onnx", feeds[1])
    np.testing.assert_array_equal(after[1], before[1])
    np.testing.assert_allclose(after[3], before[3], rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(after[0], before[0], atol=1e-5 * np.abs(before[0]).max())
    error = []
    for alpha in (None, 0.5):
        write_quantized(graph, tmp_path / "q.onnx", INT8.model_copy(update={"smoothing": alpha}), ranges)
        error.append(np.abs(run(tmp_path / "q.onnx", feeds[1])[3] - before[3]).max())
    assert error[1] < error[0]
