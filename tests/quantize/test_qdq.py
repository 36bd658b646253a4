"""Q/DQ graphs: where the nodes are, which numbers they hold, and what ONNX Runtime computes with them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnxruntime as ort
import pytest
from family_bundles import family_bundle
from float_graphs import FP8, INT8, Feed, feed_of, ranges_from_channels, ranges_of, run, write_toy, write_vivid
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.quant_utils import compute_scale_zp, quantize_nparray
from PIL import Image

from holov_export.bundle import Bundle
from holov_export.errors import UsageError
from holov_export.export.onnx_from_graph import write_widened
from holov_export.quantize.linears import linears_of, quantised_linears
from holov_export.quantize.placement import check_placement
from holov_export.quantize.qdq import write_quantized
from holov_export.quantize.ranges import ChannelRange, Ranges, TensorRange
from holov_export.quantize.scales import rounded_values, scales_from_largest
from holov_export.spec import Quantization, QuantizedType

_TYPES = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16, "bfloat16": TensorProto.BFLOAT16}


@dataclass(frozen=True)
class Float:
    """A float graph, its ranges, and pictures that the ranges are not from."""

    graph: Path
    ranges: Ranges
    judge: tuple[Feed, ...]


@pytest.fixture(scope="module")
def tiny(exported_bundle: Bundle, photographs: list[Image.Image], tmp_path_factory: pytest.TempPathFactory) -> Float:
    """The tiny LLaVA's graph with drawn norms and biases, without outliers; budgets 5 and 40 of 64."""
    graph = write_vivid(exported_bundle.vision, tmp_path_factory.mktemp("float") / "vision.onnx", outliers=1)
    calibrate = [feed_of(exported_bundle, photographs[:2], 64)]
    judge = tuple(feed_of(exported_bundle, photographs[2:], budget) for budget in (5, 40))
    return Float(graph, ranges_of(graph, calibrate), judge)


def _loaded(path: Path) -> onnx.ModelProto:
    return onnx.load(path, load_external_data=False)


def _values(path: Path) -> dict[str, np.ndarray]:
    return {item.name: numpy_helper.to_array(item) for item in onnx.load(path).graph.initializer}


def _cosine(one: np.ndarray, other: np.ndarray) -> float:
    """The smallest cosine between rows of two arrays [B, K, D]."""
    a, b = one.astype(np.float64), other.astype(np.float64)
    norms = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    return float(((a * b).sum(-1)[norms > 0] / norms[norms > 0]).min())


# --------------------------------------------------------------------------------------- the whole graph


@pytest.mark.parametrize("quantization", [INT8, FP8], ids=["int8", "fp8"])
def test_places_the_nodes(tiny: Float, tmp_path: Path, quantization: Quantization) -> None:
    target = tmp_path / "q.onnx"
    summary = write_quantized(tiny.graph, target, quantization, tiny.ranges)
    onnx.checker.check_model(str(target), full_check=True)
    model, source = _loaded(target), _loaded(tiny.graph)
    assert check_placement(model, quantization) == ()

    linears = linears_of(source)
    assert summary.quantized == tuple(linear.name for linear in linears if not linear.deciding)
    assert [name.rsplit(".", 1)[1] for name in summary.deciding] == ["k_proj", "q_proj"]
    assert summary.kept == summary.smoothed == ()
    assert summary.opset == (18 if quantization is INT8 else 19)
    assert summary.files == ("q.onnx", "q.onnx.data")

    # nothing but the new nodes is new, and nothing is gone
    added = [node for node in model.graph.node if node.op_type in ("QuantizeLinear", "DequantizeLinear")]
    rest = [node for node in model.graph.node if node not in added]
    assert [node.name for node in rest] == [node.name for node in source.graph.node]
    activations = {name for linear in linears if not linear.deciding for name in linear.activations}
    assert sum(node.op_type == "QuantizeLinear" for node in added) == len(activations)
    assert sum(node.op_type == "DequantizeLinear" for node in added) == len(activations) + len(summary.quantized)
    assert [item.name for item in model.graph.output] == [item.name for item in source.graph.output]


@pytest.mark.parametrize(("quantization", "cosine"), [(INT8, 0.999), (FP8, 0.99)], ids=["int8", "fp8"])
def test_computes_nearly_the_same(tiny: Float, tmp_path: Path, quantization: Quantization, cosine: float) -> None:
    write_quantized(tiny.graph, tmp_path / "q.onnx", quantization, tiny.ranges)
    for feed in tiny.judge:
        before, after = run(tiny.graph, feed), run(tmp_path / "q.onnx", feed)
        assert after[0].shape == before[0].shape
        assert (after[2] == before[2]).all()
        for kept, other in zip(before[1], after[1], strict=True):
            assert len(set(kept.tolist()) & set(other.tolist())) >= 0.8 * len(kept)
        same = (before[1] == after[1]).all(axis=1)
        if same.any():
            assert _cosine(before[0][same], after[0][same]) > cosine


def test_int8_weights_are_a_quarter(tiny: Float, tmp_path: Path) -> None:
    summary = write_quantized(tiny.graph, tmp_path / "q.onnx", INT8, tiny.ranges)
    linears = linears_of(_loaded(tiny.graph))
    saved = sum(3 * linear.rows * linear.columns for linear in linears if not linear.deciding)
    added = summary.bytes_after - (summary.bytes_before - saved)
    assert 0 < added < 0.1 * saved
    weights = _values(tmp_path / "q.onnx")
    assert all(weights[linear.weight].dtype == (np.float32 if linear.deciding else np.int8) for linear in linears)


def test_keeps_what_is_named(tiny: Float, tmp_path: Path) -> None:
    kept = INT8.model_copy(update={"keep": ("layers.0", "linear_2")})
    summary = write_quantized(tiny.graph, tmp_path / "q.onnx", kept, tiny.ranges)
    assert {name.split(".")[2] for name in summary.kept if "layers" in name} == {"0"}
    assert "multi_modal_projector.linear_2" in summary.kept
    model = _loaded(tmp_path / "q.onnx")
    assert check_placement(model, kept) == ()
    assert any("is not quantised" in fault for fault in check_placement(model, INT8))
    with pytest.raises(UsageError, match="names no product"):
        write_quantized(tiny.graph, tmp_path / "r.onnx", INT8.model_copy(update={"keep": ("layers.9",)}), tiny.ranges)


def test_same_as_onnxruntimes_quantiser(tiny: Float, tmp_path: Path) -> None:
    """With the feature layer's value projection kept, both put their nodes in the same places."""
    feature = next(linear.name for linear in linears_of(_loaded(tiny.graph)) if linear.deciding).rsplit(".", 1)[0]
    ours, theirs = tmp_path / "ours.onnx", tmp_path / "theirs.onnx"
    quantization = INT8.model_copy(update={"keep": (f"{feature}.v_proj",)})
    write_quantized(tiny.graph, ours, quantization, tiny.ranges)
    linears = quantised_linears(linears_of(_loaded(tiny.graph)), quantization.keep)
    tensors = tiny.ranges.record.tensors
    one_feed = iter(tiny.judge[:1])

    class Reader(CalibrationDataReader):
        def get_next(self) -> Feed | None:
            return next(one_feed, None)

    quantize_static(
        str(tiny.graph),
        str(theirs),
        Reader(),
        quant_format=QuantFormat.QDQ,
        op_types_to_quantize=["MatMul"],
        nodes_to_quantize=[name for linear in linears for name in linear.nodes],
        per_channel=True,
        activation_type=QuantType.QInt8,
        weight_type=QuantType.QInt8,
        extra_options={
            "ActivationSymmetric": True,
            "WeightSymmetric": True,
            "OpTypesToExcludeOutputQuantization": ["MatMul"],
            "TensorQuantOverrides": {
                name: [{"rmin": np.float32(tensors[name].low), "rmax": np.float32(tensors[name].high)}]
                for linear in linears
                for name in linear.activations
            },
        },
    )
    mine, other = _values(ours), _values(theirs)
    for linear in linears:
        weight = linear.weight
        np.testing.assert_array_equal(mine[weight], other[f"{weight}_quantized"])
        np.testing.assert_array_equal(mine[f"{weight}.scale"], other[f"{weight}_scale"])
        assert not other[f"{weight}_zero_point"].any()
        for name in linear.activations:
            assert mine[f"{name}.scale"] == other[f"{name}_scale"]
            assert mine[f"{name}.scale"].dtype == other[f"{name}_scale"].dtype == np.float32
            assert other[f"{name}_zero_point"] == mine["int8.zero"] == 0
    for feed in tiny.judge:
        for a, b in zip(run(ours, feed), run(theirs, feed), strict=True):
            np.testing.assert_array_equal(a, b)


def test_a_further_graph_reads_the_first_ones_weights(tiny: Float, tmp_path: Path) -> None:
    write_quantized(tiny.graph, tmp_path / "first.onnx", INT8, tiny.ranges)
    written = (tmp_path / "first.onnx.data").read_bytes()
    wider = TensorRange(low=-9.0, high=9.0)
    tensors = dict.fromkeys(tiny.ranges.record.tensors, wider)
    ranges = replace(tiny.ranges, record=tiny.ranges.record.model_copy(update={"tensors": tensors}))
    summary = write_quantized(tiny.graph, tmp_path / "second.onnx", INT8, ranges, share=tmp_path / "first.onnx")
    write_quantized(tiny.graph, tmp_path / "alone.onnx", INT8, ranges)

    assert summary.files == ("second.onnx",)
    assert not (tmp_path / "second.onnx.data").exists()
    assert (tmp_path / "first.onnx.data").read_bytes() == written
    model = _loaded(tmp_path / "second.onnx")
    places = {
        entry.value for item in model.graph.initializer for entry in item.external_data if entry.key == "location"
    }
    assert places == {"first.onnx.data"}
    for a, b in zip(
        run(tmp_path / "second.onnx", tiny.judge[0]), run(tmp_path / "alone.onnx", tiny.judge[0]), strict=True
    ):
        np.testing.assert_array_equal(a, b)


def test_weights_that_differ_get_a_file_if_they_are_large(
    tiny: Float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_quantized(tiny.graph, tmp_path / "first.onnx", INT8, tiny.ranges)
    share = tmp_path / "first.onnx"
    few = write_quantized(tiny.graph, tmp_path / "few.onnx", FP8, tiny.ranges, share=share)
    assert few.files == ("few.onnx",)
    monkeypatch.setattr("holov_export.quantize.weights._OWN", 1000)
    many = write_quantized(tiny.graph, tmp_path / "many.onnx", FP8, tiny.ranges, share=share)
    assert many.files == ("many.onnx", "many.onnx.data")
    for a, b in zip(run(tmp_path / "few.onnx", tiny.judge[0]), run(tmp_path / "many.onnx", tiny.judge[0]), strict=True):
        np.testing.assert_array_equal(a, b)
    onnx.checker.check_model(str(tmp_path / "many.onnx"), full_check=True)


def test_basic_optimisation_keeps_the_meaning(tiny: Float, tmp_path: Path) -> None:
    """Above this level ONNX Runtime fuses int8 products its own way, and makes invalid graphs of 8-bit floats."""
    for quantization in (INT8, FP8):
        target = tmp_path / f"{quantization.type.value}.onnx"
        write_quantized(tiny.graph, target, quantization, tiny.ranges)
        options = ort.SessionOptions()
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
        session = ort.InferenceSession(str(target), options, providers=["CPUExecutionProvider"])
        for a, b in zip(session.run(["visual_tokens"], tiny.judge[0]), run(target, tiny.judge[0]), strict=False):
            np.testing.assert_array_equal(a, b)


# --------------------------------------------------------------------------------------- one product


def _product(
    target: Path, weight: np.ndarray, *, dtype: str = "float32", gemm: bool = False, opset: int = 18
) -> tuple[Path, Ranges]:
    """y = x @ W, with a reader of x beside it; x is within -2..1."""
    attributes = {"transB": 1} if gemm else {}
    nodes = [
        helper.make_node("Identity", ["x"], ["kept"], name="first"),
        helper.make_node("Gemm" if gemm else "MatMul", ["kept", "fc.weight"], ["y"], name="fc", **attributes),
        helper.make_node("Neg", ["kept"], ["other"], name="other"),
    ]
    path = write_toy(target, nodes, {"fc.weight": weight}, outputs=("y", "other"), dtype=_TYPES[dtype], opset=opset)
    low = np.array([-2, 0, 0, 0], dtype=np.float32)
    return path, ranges_from_channels({"kept": ChannelRange(low=low, high=np.ones(4, dtype=np.float32))})


@pytest.mark.parametrize("quantization", [INT8, FP8], ids=["int8", "fp8"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_meaning_is_rounding_both_factors(tmp_path: Path, quantization: Quantization, dtype: str) -> None:
    draw = np.random.default_rng(3)
    weight = draw.normal(0, 0.1, (4, 6))
    weight[:, 2] = 0
    weight[:, 3] *= 1e-4  # below what ONNX Runtime's quantiser can scale in float16
    source, ranges = _product(tmp_path / "f.onnx", weight, dtype=dtype)
    summary = write_quantized(source, tmp_path / "q.onnx", quantization, ranges)
    assert summary.opset == (18 if quantization is INT8 and dtype == "float32" else 19)
    x = draw.uniform(-2.5, 1, (5, 4)).astype(dtype)
    y, other = run(tmp_path / "q.onnx", {"x": x}, ("y", "other"))
    assert (other == -x).all()

    stored = _values(tmp_path / "q.onnx")
    scale = stored["kept.scale"]
    assert scale.dtype == x.dtype
    assert float(scale) == np.dtype(dtype).type(2 / (127 if quantization is INT8 else 448))
    largest, kind = (127, np.int8) if quantization is INT8 else (448, ml_dtypes.float8_e4m3fn)

    def rounded(values: np.ndarray) -> np.ndarray:
        return np.rint(values).astype(kind) if quantization is INT8 else values.astype(kind)

    low = -128 if quantization is INT8 else -largest
    inputs = rounded(np.clip(x.astype(np.float32) / np.float32(scale), low, largest)).astype(np.float32)
    scales = stored["fc.weight.scale"].astype(np.float32)
    assert stored["fc.weight"].dtype == kind
    exact = weight.astype(dtype).astype(np.float32)
    assert np.abs(stored["fc.weight"].astype(np.float32) * scales - exact).max() <= scales.max() * 16
    np.testing.assert_array_equal(stored["fc.weight"], rounded(np.clip(exact / scales, -largest, largest)))
    wanted = (inputs * np.float32(scale)) @ (stored["fc.weight"].astype(np.float32) * scales)
    np.testing.assert_allclose(y.astype(np.float32), wanted, rtol=1e-5 if dtype == "float32" else 2e-3, atol=1e-6)

    assert scales[2] == 1
    assert not stored["fc.weight"][:, 2].astype(np.float32).any()
    small = np.abs(exact[:, 3]).max()
    assert np.abs(stored["fc.weight"][:, 3].astype(np.float32) * scales[3] - exact[:, 3]).max() < 0.2 * small


def test_bfloat16_stays_at_its_opset(tmp_path: Path) -> None:
    source, ranges = _product(tmp_path / "f.onnx", np.eye(4, 6), dtype="bfloat16", opset=22)
    for quantization in (INT8, FP8):
        summary = write_quantized(source, tmp_path / "q.onnx", quantization, ranges)
        assert summary.opset == 22
        onnx.checker.check_model(str(tmp_path / "q.onnx"), full_check=True)
        stored = {item.name: item.data_type for item in _loaded(tmp_path / "q.onnx").graph.initializer}
        assert stored["kept.scale"] == stored["fc.weight.scale"] == TensorProto.BFLOAT16
        wide = tmp_path / "wide"
        wide.mkdir(exist_ok=True)
        x = np.array([[1, -2, 0.5, 0]], dtype=np.float32)
        y = run(write_widened(tmp_path / "q.onnx", wide), {"x": x}, ("y",))[0]
        np.testing.assert_allclose(y, x @ np.eye(4, 6), atol=0.05)


def test_a_silent_activation_gets_a_scale(tmp_path: Path) -> None:
    source, _ = _product(tmp_path / "f.onnx", np.eye(4, 6))
    nothing = np.zeros(4, dtype=np.float32)
    ranges = ranges_from_channels({"kept": ChannelRange(low=nothing, high=nothing)})
    write_quantized(source, tmp_path / "q.onnx", INT8, ranges)
    assert _values(tmp_path / "q.onnx")["kept.scale"] == 1


def test_scales_are_onnxruntimes() -> None:
    draw = np.random.default_rng(0)
    smallest = {np.float32: 1e-30, np.float16: 0.008}
    for dtype, least in smallest.items():
        weight = (draw.normal(0, 1, (64, 200)) * np.geomspace(least * 2, 50, 200)).astype(dtype)
        weight[:, 7] = 0
        largest = np.abs(weight.astype(np.float32)).max(axis=0)
        scales = scales_from_largest(largest, QuantizedType.INT8, dtype)
        values = rounded_values(weight, scales, QuantizedType.INT8)
        assert scales.dtype == dtype
        for at in range(200):
            column = weight[:, at]
            ends = (np.array(column.min(), dtype=dtype), np.array(column.max(), dtype=dtype))
            zero, scale = compute_scale_zp(*ends, np.array(-127, np.int8), np.array(127, np.int8), symmetric=True)
            assert scale == scales[at]
            np.testing.assert_array_equal(values[:, at], quantize_nparray(TensorProto.INT8, column, scale, zero))


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("kind", list(QuantizedType))
def test_scales_never_cut_off_what_is_small(dtype: type, kind: QuantizedType) -> None:
    largest = np.geomspace(1e-9, 6e4, 300).astype(np.float32)
    scales = scales_from_largest(largest, kind, dtype).astype(np.float64)
    assert np.isfinite(scales).all()
    assert (scales > 0).all()
    most = 127.0 if kind is QuantizedType.INT8 else 448.0
    assert (largest / scales <= most * 1.005).all()
    kept = rounded_values(largest[None], scales_from_largest(largest, kind, dtype), kind).astype(np.float64) * scales
    usual = largest > 1e-4
    np.testing.assert_allclose(kept[0][usual], largest[usual], rtol=0.07)


# --------------------------------------------------------------------------------------- refusals


def test_refuses_what_it_cannot_do(tmp_path: Path) -> None:
    source, ranges = _product(tmp_path / "f.onnx", np.eye(4, 6))
    target = tmp_path / "q.onnx"
    with pytest.raises(UsageError, match="in place"):
        write_quantized(source, source, INT8, ranges)
    with pytest.raises(UsageError, match="no range of 'kept'"):
        write_quantized(source, target, INT8, ranges_from_channels({}))
    for bad in (float("nan"), float("inf")):
        record = ranges.record.model_copy(update={"tensors": {"kept": TensorRange(low=-1, high=1)}})
        record.tensors["kept"] = TensorRange.model_construct(low=0.0, high=bad)
        with pytest.raises(UsageError, match="not finite"):
            write_quantized(source, target, INT8, replace(ranges, record=record))
    assert not target.exists()
    write_quantized(source, target, INT8, ranges)
    with pytest.raises(UsageError, match="quantised already"):
        write_quantized(target, tmp_path / "r.onnx", INT8, ranges)
    broken, _ = _product(tmp_path / "n.onnx", np.full((4, 6), np.nan))
    with pytest.raises(UsageError, match=r"weight 'fc\.weight' holds"):
        write_quantized(broken, tmp_path / "r.onnx", INT8, ranges)


def test_refuses_an_operator_that_opset_19_changed(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Pad", ["x", "pads"], ["padded"], name="pad"),
        helper.make_node("MatMul", ["padded", "fc.weight"], ["y"], name="fc"),
    ]
    source = write_toy(
        tmp_path / "f.onnx", nodes, {"fc.weight": np.eye(4, 6), "pads": np.array([0, 0, 1, 0])}, external=False
    )
    one = np.ones(4, dtype=np.float32)
    ranges = ranges_from_channels({"padded": ChannelRange(low=-one, high=one)})
    assert write_quantized(source, tmp_path / "q.onnx", INT8, ranges).opset == 18
    with pytest.raises(UsageError, match="changed Pad"):
        write_quantized(source, tmp_path / "q.onnx", FP8, ranges)


def test_the_table_of_operators_is_onnxs() -> None:
    """Every operator that is said to be the same in opset 19 has the inputs, outputs and attributes of 18."""
    from holov_export.quantize.qdq import _SAME_IN_19

    for name in _SAME_IN_19:
        old, new = (onnx.defs.get_schema(name, opset, "") for opset in (18, 19))
        assert [item.name for item in old.inputs] == [item.name for item in new.inputs]
        assert [item.name for item in old.outputs] == [item.name for item in new.outputs]
        assert set(new.attributes) - set(old.attributes) <= {"saturate"}
        assert set(old.attributes) <= set(new.attributes)


# --------------------------------------------------------------------------------------- the checker


def _node(model: onnx.ModelProto, op_type: str, place: int = 0) -> onnx.NodeProto:
    return [node for node in model.graph.node if node.op_type == op_type][place]


def _feed_other(model: onnx.ModelProto) -> None:
    next(node for node in model.graph.node if node.name == "other").input[0] = "kept.dequantized"


def _one_factor(model: onnx.ModelProto) -> None:
    next(node for node in model.graph.node if node.name == "fc").input[0] = "kept"


def _give_out(model: onnx.ModelProto) -> None:
    model.graph.output.append(onnx.ValueInfoProto(name="kept.dequantized"))


def _shift(model: onnx.ModelProto) -> None:
    zero = next(item for item in model.graph.initializer if item.name == "int8.zero")
    zero.CopyFrom(numpy_helper.from_array(np.array(3, dtype=np.int8), "int8.zero"))


def _unsigned(model: onnx.ModelProto) -> None:
    zero = next(item for item in model.graph.initializer if item.name == "int8.zero")
    zero.CopyFrom(numpy_helper.from_array(np.array(0, dtype=np.uint8), "int8.zero"))


def _no_scale(model: onnx.ModelProto) -> None:
    scale = next(item for item in model.graph.initializer if item.name == "kept.scale")
    scale.CopyFrom(numpy_helper.from_array(np.array(0, dtype=np.float32), "kept.scale"))


def _half_scale(model: onnx.ModelProto) -> None:
    scale = next(item for item in model.graph.initializer if item.name == "kept.scale")
    scale.CopyFrom(numpy_helper.from_array(np.array(1, dtype=np.float16), "kept.scale"))


def _along_rows(model: onnx.ModelProto) -> None:
    _node(model, "DequantizeLinear").attribute[0].i = 0


def _twice(model: onnx.ModelProto) -> None:
    pair = [_node(model, "QuantizeLinear"), _node(model, "DequantizeLinear", 1)]
    copies = [type(node).FromString(node.SerializeToString()) for node in pair]
    for node in copies:
        node.name += "2"
        node.output[0] += "2"
    copies[1].input[0] = copies[0].output[0]
    model.graph.node.extend(copies)


def _round_weight(model: onnx.ModelProto) -> None:
    _node(model, "QuantizeLinear").input[0] = "fc.weight"


def _read_rounded(model: onnx.ModelProto) -> None:
    next(node for node in model.graph.node if node.name == "other").input[0] = "fc.weight"


_MUTATIONS: list[tuple[Callable[[onnx.ModelProto], None], str]] = [
    (_feed_other, "must read floats"),
    (_one_factor, "one rounded factor"),
    (_give_out, "gives an output"),
    (_shift, "zero point that is not zero"),
    (_unsigned, "no zero point of int8"),
    (_no_scale, "not above zero"),
    (_half_scale, "neither 8-bit floats"),
    (_along_rows, "along the axis of the input channels"),
    (_twice, "quantised more than once"),
    (_round_weight, "stored rounded"),
    (_read_rounded, "reads int8 without"),
]


@pytest.mark.parametrize(("mutate", "fault"), _MUTATIONS, ids=[item[0].__name__.strip("_") for item in _MUTATIONS])
def test_checker_sees_a_wrong_graph(tmp_path: Path, mutate: Callable[[onnx.ModelProto], None], fault: str) -> None:
    source, ranges = _product(tmp_path / "f.onnx", np.eye(4, 6))
    write_quantized(source, tmp_path / "q.onnx", INT8, ranges)
    model = _loaded(tmp_path / "q.onnx")
    assert check_placement(model, INT8) == ()
    mutate(model)
    faults = check_placement(model, INT8)
    assert any(fault in sentence for sentence in faults), faults


def test_checker_sees_a_deciding_product(tiny: Float, tmp_path: Path) -> None:
    write_quantized(tiny.graph, tmp_path / "q.onnx", INT8, tiny.ranges)
    model = _loaded(tmp_path / "q.onnx")
    key = next(linear for linear in linears_of(_loaded(tiny.graph)) if linear.deciding and "k_proj" in linear.weight)
    node = next(node for node in model.graph.node if node.name == key.nodes[0])
    pattern = next(node for node in model.graph.node if node.op_type == "DequantizeLinear" and "v_proj" in node.name)
    up = type(node).FromString(pattern.SerializeToString())
    up.name, up.output[0] = "k_proj/DequantizeLinear", "k_proj.dequantized"
    weight = next(item for item in model.graph.initializer if item.name == key.weight)
    weight.data_type = TensorProto.INT8
    up.input[0] = key.weight
    model.graph.node.insert(list(model.graph.node).index(node), up)
    node = next(node for node in model.graph.node if node.name == key.nodes[0])
    node.input[0], node.input[1] = f"{key.activations[0]}.dequantized", up.output[0]
    assert check_placement(model, INT8) == (f"'{key.nodes[0]}' decides which tokens stay, and is quantised.",)


def test_checker_sees_a_float_graph_and_another_type(tiny: Float, tmp_path: Path) -> None:
    write_quantized(tiny.graph, tmp_path / "q.onnx", INT8, tiny.ranges)
    missing = check_placement(_loaded(tiny.graph), INT8)
    assert len(missing) == sum(len(item.nodes) for item in linears_of(_loaded(tiny.graph)) if not item.deciding)
    assert all(fault.endswith("is not quantised.") for fault in missing)
    assert any("float8e4m3fn" in fault for fault in check_placement(_loaded(tmp_path / "q.onnx"), FP8))


# --------------------------------------------------------------------------------------- more graphs, large ones


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llava_next", "qwen2_5_vl", "video_llava"])
def test_families(tmp_path: Path, family: str, photographs: list[Image.Image]) -> None:
    bundle = family_bundle(tmp_path, family).bundle
    feeds = [feed_of(bundle, photographs[:2], 8)]
    ranges = ranges_of(bundle.vision, feeds)
    for quantization in (INT8, FP8):
        summary = write_quantized(bundle.vision, tmp_path / "q.onnx", quantization, ranges)
        assert summary.deciding
        assert len(summary.quantized) > len(summary.deciding)
        assert check_placement(_loaded(tmp_path / "q.onnx"), quantization) == ()
        before, after = run(bundle.vision, feeds[0]), run(tmp_path / "q.onnx", feeds[0])
        same = (before[1] == after[1]).all(axis=1)
        assert same.any()
        assert _cosine(before[0][same], after[0][same]) > 0.99


_LARGE = """
import resource, sys
from pathlib import Path
from holov_export.quantize.qdq import write_quantized
from float_graphs import INT8, ranges_from_channels
from holov_export.quantize.ranges import ChannelRange
import numpy as np
one = np.ones(8192, dtype=np.float32)
channels = {name: ChannelRange(low=-one, high=one) for name in ("x", *(f"y{at}" for at in range(1, 9)))}
write_quantized(Path(sys.argv[1]), Path(sys.argv[2]), INT8, ranges_from_channels(channels))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


@pytest.mark.slow
def test_more_weights_than_a_protobuf_holds(tmp_path: Path) -> None:
    """Nine matrices of 268 MB: 2.4 GB of weights, and less memory than twice that."""
    size, count = 8192, 9
    data = tmp_path / "f.onnx.data"
    with data.open("wb") as file:
        file.truncate(count * size * size * 4)  # zeros that take no disk
        for at in range(count):
            file.seek(at * size * size * 4)
            file.write(np.linspace(-1, 1, size, dtype=np.float32).tobytes())
    names = ["x", *(f"y{at}" for at in range(1, count + 1))]
    nodes = [
        helper.make_node("MatMul", [names[at], f"fc{at}.weight"], [names[at + 1]], name=f"fc{at}")
        for at in range(count)
    ]
    graph = helper.make_graph(
        nodes,
        "large",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ("rows", size))],
        [helper.make_tensor_value_info(names[-1], TensorProto.FLOAT, ("rows", size))],
    )
    for at in range(count):
        tensor = graph.initializer.add(
            name=f"fc{at}.weight",
            data_type=TensorProto.FLOAT,
            dims=[size, size],
            data_location=TensorProto.EXTERNAL,
        )
        entries = {"location": data.name, "offset": at * size * size * 4, "length": size * size * 4}
        for key, value in entries.items():
            tensor.external_data.add(key=key, value=str(value))
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    (tmp_path / "f.onnx").write_bytes(model.SerializeToString())

    command = [sys.executable, "-c", _LARGE, str(tmp_path / "f.onnx"), str(tmp_path / "q.onnx")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parent)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 2 * count * size * size * 4
    assert abs((tmp_path / "q.onnx.data").stat().st_size / (count * size * size) - 1) < 0.01
    x = np.zeros((1, size), dtype=np.float32)
    x[0, 0] = 1
    quantised = _loaded(tmp_path / "q.onnx")
    quantised.graph.output.append(onnx.ValueInfoProto(name="y1"))
    (tmp_path / "first.onnx").write_bytes(quantised.SerializeToString())
    y = run(tmp_path / "first.onnx", {"x": x}, ("y1",))[0]
    np.testing.assert_allclose(y, np.linspace(-1, 1, size)[None], atol=0.01)
