"""What the stand-ins make of Q/DQ nodes, version by version."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import pytest
import tensorrt_standin
from onnx import helper, numpy_helper
from tensorrt_standin import VERSIONS, FakeGpu
from tensorrt_standin.trial import H200, Parsed, Run, expected, inputs, small_model

OLD = {"8.6.0"}
TYPED = set(VERSIONS) - OLD


def quantized_model(
    *,
    kind: Any = np.int8,
    stored: bool = False,
    zero: Any = 0,
    scale: Any = 0.1,
    axis: int | None = 1,
    per_channel: bool = False,
    opset: int = 17,
) -> onnx.ModelProto:
    """The small model with Q/DQ nodes around its product.

    Args:
        stored: the weights are stored in 8 bits, with a DequantizeLinear only. zero, scale: of x. axis: of the weights.
        per_channel: x has a scale for each channel.
    """
    made = small_model(opset)
    constants = {item.name: item for item in made.graph.initializer}
    weights = numpy_helper.to_array(constants["weights"])
    scales = np.abs(weights).max(axis=0) / 127
    shape = (3,) if per_channel else ()
    arrays = {
        "x.scale": np.full(shape, scale, np.float32),
        "x.zero": np.full(shape, zero, kind),
        "w.scale": scales.astype(np.float32),
        "w.zero": np.zeros(16, kind),
    }
    if stored:
        constants["weights"].CopyFrom(numpy_helper.from_array(np.rint(weights / scales).astype(kind), "weights"))
    made.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in arrays.items())
    by_channel = {} if axis is None else {"axis": axis}
    of_x = {"axis": 2} if per_channel else {}
    node = helper.make_node
    pairs = [
        node("QuantizeLinear", ["x", "x.scale", "x.zero"], ["x.q"], name="x down", **of_x),
        node("DequantizeLinear", ["x.q", "x.scale", "x.zero"], ["x.dq"], name="x up", **of_x),
        node("QuantizeLinear", ["weights", "w.scale", "w.zero"], ["w.q"], name="w down", **by_channel),
        node(
            "DequantizeLinear",
            ["weights" if stored else "w.q", "w.scale", "w.zero"],
            ["w.dq"],
            name="w up",
            **by_channel,
        ),
    ]
    if stored:
        del pairs[2]
    product = made.graph.node[0]
    product.input[:] = ["x.dq", "w.dq"]
    rest = [onnx.NodeProto.FromString(item.SerializeToString()) for item in made.graph.node]
    del made.graph.node[:]
    made.graph.node.extend([*pairs, *rest])
    if kind is not np.int8:
        made.ir_version = 9
    return made


def flagged(trt: ModuleType, version: str, model: onnx.ModelProto) -> Parsed:
    parsed = Parsed(trt, model)
    if version in OLD and parsed.ok:
        parsed.config.set_flag(trt.BuilderFlag.INT8)
    return parsed


@pytest.mark.parametrize("version", VERSIONS)
def test_a_quantised_engine_computes_what_its_graph_does(version: str) -> None:
    x, quota = inputs(2)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(quantized_model().SerializeToString(), options)
    wanted = session.run(["y"], {"x": x, "quota": quota, "budget": np.array([3])})[0]
    with tensorrt_standin.installed(version, gpu=H200) as trt:
        run = Run(flagged(trt, version, quantized_model()).engine())
        run.shape(2, 3)
        run.put(x, quota)
        assert run.enqueue()
        found = run.get()
        run.call("cudaStreamSynchronize", run.stream)
        run.close()
    np.testing.assert_allclose(found["y"], wanted, atol=1e-6)
    assert np.abs(wanted - expected(x, quota, 3)[0]).max() > 1e-3  # and rounding shows


def test_tensorrt_8_wants_its_int8_flag() -> None:
    with tensorrt_standin.installed("8.6.0", gpu=H200) as trt:
        parsed = Parsed(trt, quantized_model())
        parsed.add_profile()
        assert parsed.plan() is None
        assert "INT8 flag" in tensorrt_standin.current().messages[-1][1]
        parsed.config.set_flag(trt.BuilderFlag.INT8)
        assert parsed.plan() is not None


@pytest.mark.parametrize("version", sorted(TYPED - {"11.4.0"}))
def test_a_strongly_typed_network_refuses_the_flag(version: str) -> None:
    with tensorrt_standin.installed(version, gpu=H200) as trt:
        parsed = Parsed(trt, quantized_model())
        parsed.add_profile()
        parsed.config.set_flag(trt.BuilderFlag.INT8)
        assert parsed.plan() is None


def test_eleven_has_no_such_flag() -> None:
    with tensorrt_standin.installed("11.4.0", gpu=H200) as trt:
        for name in ("INT8", "FP8", "FP16"):
            assert not hasattr(trt.BuilderFlag, name)


@pytest.mark.parametrize("version", VERSIONS)
def test_stored_weights_are_read_from_nine_on(version: str) -> None:
    with tensorrt_standin.installed(version, gpu=H200) as trt:
        parsed = Parsed(trt, quantized_model(stored=True))
        assert parsed.ok == (version in TYPED)
        if not parsed.ok:
            assert "invalid weights type of Int8" in parsed.parser.get_error(0).desc()


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"zero": 3}, "symmetric"),
        ({"kind": np.uint8}, "symmetric"),
        ({"scale": 0.0}, "positive"),
        ({"axis": None}, "number of scales"),
        ({"per_channel": True}, "per-channel"),
    ],
)
def test_what_parsers_refuse(version: str, wrong: dict[str, Any], said: str) -> None:
    with tensorrt_standin.installed(version, gpu=H200) as trt:
        parsed = Parsed(trt, quantized_model(**wrong))
        assert not parsed.ok
        assert said in " ".join(parsed.parser.get_error(index).desc() for index in range(parsed.parser.num_errors))


@pytest.mark.parametrize("sm", [87, 89, 90])
def test_eight_bit_floats_need_ada(sm: int) -> None:
    model = quantized_model(kind=ml_dtypes.float8_e4m3fn, stored=True, opset=19)
    with tensorrt_standin.installed("10.3.0", gpu=FakeGpu(sm=sm)) as trt:
        parsed = Parsed(trt, model)
        assert parsed.ok
        parsed.add_profile()
        assert (parsed.plan() is None) == (sm < 89)
    with tensorrt_standin.installed("8.6.0", gpu=FakeGpu(sm=sm)) as trt:
        assert not Parsed(trt, model).ok


def test_layers_with_a_precision_of_their_own_take_no_pins() -> None:
    with tensorrt_standin.installed("8.6.0", gpu=H200) as trt:
        parsed = flagged(trt, "8.6.0", quantized_model())
        parsed.add_profile()
        layers = [parsed.network.get_layer(index) for index in range(parsed.network.num_layers)]
        (up,) = [layer for layer in layers if layer.name == "x up"]
        assert up.type == trt.LayerType.DEQUANTIZE
        up.precision = trt.DataType.FLOAT
        assert parsed.plan() is None
        up.reset_precision()
        assert parsed.plan() is not None
