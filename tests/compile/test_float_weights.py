"""INT8 weights as float32 ones for TensorRT 8: rounded again, they are the same bits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from quantized_controls import ONE, ZERO, down, product, up

from holov_export.compile import float_weights
from holov_export.compile.graph_file import weight_files, write_lowered
from holov_export.compile.lowering import lowered_for
from holov_export.errors import UsageError

DRAWN = np.random.default_rng(0)
WEIGHTS = DRAWN.integers(-127, 128, (3, 3)).astype(np.int8)
SCALES = DRAWN.uniform(1e-4, 2, 3).astype(np.float32)
HELD = {"w": WEIGHTS, "scales": SCALES}


def constants_in(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    return {item.name: numpy_helper.to_array(item) for item in model.graph.initializer}


@pytest.mark.parametrize(("axis", "operator", "settings"), [(1, "MatMul", {}), (0, "Gemm", {"transB": 1})])
def test_scales_go_along_their_axis(axis: int, operator: str, settings: dict[str, int]) -> None:
    model = product(axis=axis, operator=operator, held=HELD, **settings)
    lowered = lowered_for(model, "8.6")
    floats = constants_in(lowered)["w"]
    along = SCALES if axis == 1 else SCALES[:, None]
    np.testing.assert_array_equal(floats, WEIGHTS.astype(np.float32) * along)
    np.testing.assert_array_equal(np.rint(floats / along), WEIGHTS)
    pair = [node for node in lowered.graph.node if "of w" in node.name]
    assert [node.op_type for node in pair] == ["QuantizeLinear", "DequantizeLinear"]
    assert all(onnx.helper.get_node_attr_value(node, "axis") == axis for node in pair)
    assert pair[1].input[0] == pair[0].output[0]


def test_one_scale_for_all() -> None:
    model = product(held={"w": WEIGHTS, "scales": np.float32(0.3), "zeros": ZERO})
    np.testing.assert_array_equal(constants_in(lowered_for(model, "8.6"))["w"], WEIGHTS * np.float32(0.3))


def test_activations_and_float_weights_stay() -> None:
    nodes = (down("x"), up("x.down"), down("f", "scale", "zero"), up("f.down", "scale", "zero"))
    model = product(nodes=nodes, held={**HELD, "f": np.ones((3, 3), np.float32)})
    lowered = lowered_for(model, "8.6")
    assert [node.name for node in lowered.graph.node][:4] == [node.name for node in model.graph.node][:4]
    assert constants_in(lowered)["f"].dtype == np.float32
    assert len(lowered.graph.node) == len(model.graph.node) + 1


def test_two_readers_of_one_weight_share_its_quantizer() -> None:
    model = product(held=HELD)
    second = up("w", "scales", "zeros", name="w.again", axis=1)
    second.name = "the/second"
    model.graph.node.insert(3, second)
    lowered = lowered_for(model, "8.6")
    ups = [node for node in lowered.graph.node if node.op_type == "DequantizeLinear" and "x.down" not in node.name]
    assert len(ups) == 2 and ups[0].input[0] == ups[1].input[0]
    assert sum(node.op_type == "QuantizeLinear" for node in lowered.graph.node) == 2


def test_a_weight_with_two_scales_is_refused() -> None:
    model = product(held=HELD)
    second = up("w", "scale", "zero", name="w.again")
    second.name = "the/second"
    model.graph.node.insert(3, second)
    with pytest.raises(UsageError, match="read by 'the/second' too"):
        lowered_for(model, "8.6")


def test_weights_outside_are_converted_a_piece_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(float_weights, "_CHUNK", 4)  # one row of three
    (tmp_path / "in").mkdir()
    model = product(held={**HELD, "scale": ONE})
    path = tmp_path / "in" / "vision.onnx"
    onnx.save_model(model, str(path), save_as_external_data=True, location="vision.onnx.data", size_threshold=0)
    written = write_lowered(path, "8.6", tmp_path / "out")
    assert weight_files(onnx.load(str(written), load_external_data=False)) == [
        "vision.onnx.data",
        "vision.onnx.data.float32",
    ]
    np.testing.assert_array_equal(constants_in(onnx.load(str(written)))["w"], WEIGHTS.astype(np.float32) * SCALES)
    again = write_lowered(written, "8.6", tmp_path / "again")  # what has been lowered is copied
    np.testing.assert_array_equal(constants_in(onnx.load(str(again)))["w"], WEIGHTS.astype(np.float32) * SCALES)


def test_a_file_that_is_there_already_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    path = tmp_path / "in" / "vision.onnx"
    onnx.save_model(
        product(held=HELD), str(path), save_as_external_data=True, location="vision.onnx.data", size_threshold=0
    )
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "vision.onnx.data.float32").write_bytes(b"mine")
    with pytest.raises(UsageError, match="is there already"):
        write_lowered(path, "8.6", tmp_path / "out")
    assert (tmp_path / "out" / "vision.onnx.data.float32").read_bytes() == b"mine"


def test_later_versions_keep_their_integers() -> None:
    model = product(held=HELD)
    assert lowered_for(model, "10.3").SerializeToString() == model.SerializeToString()
