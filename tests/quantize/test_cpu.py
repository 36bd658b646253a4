"""The form for ONNX Runtime's CPU provider: which nodes it has, what it computes, and that it opens and runs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from family_bundles import family_bundle
from PIL import Image

from holov_export.bundle import Bundle
from holov_export.errors import UsageError
from holov_export.quantize.cpu import write_quantized_cpu
from holov_export.quantize.linears import linears_of
from holov_export.runtime.runner_ort import OrtRunner
from holov_export.spec import Quantization, QuantizedType
from holov_export.verify.pictures import pixels_for
from holov_export.verify.vision_loss import summary_of, vision_losses

CPU = Quantization(type=QuantizedType.INT8, engine="cpu")


def quantized(bundle: Bundle, folder: Path, quantization: Quantization = CPU) -> Bundle:
    """The bundle's default graph in this form, as a bundle that has no more than that."""
    write_quantized_cpu(bundle.vision, folder / bundle.graph, quantization)
    plan = bundle.manifest.plan.model_copy(update={"quantization": quantization})
    return Bundle(folder, bundle.manifest.model_copy(update={"plan": plan}))


def product(rows: int, columns: int, x: np.ndarray, weight: np.ndarray, folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """(float, 8-bit) results of one product behind a norm-less input; the activation is the graph's input."""
    nodes = [
        onnx.helper.make_node("MatMul", ["x", "w.weight"], ["product"], name="w/MatMul"),
        onnx.helper.make_node("Identity", ["product"], ["y"], name="Identity"),
    ]
    value = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        nodes,
        "one",
        [value("x", onnx.TensorProto.FLOAT, ["batch", "tokens", rows])],
        [value("y", onnx.TensorProto.FLOAT, ["batch", "tokens", columns])],
        [onnx.numpy_helper.from_array(weight, "w.weight")],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=10)
    onnx.save(model, folder / "float.onnx")
    write_quantized_cpu(folder / "float.onnx", folder / "int8.onnx", CPU)
    names = ("float.onnx", "int8.onnx")
    sides = [ort.InferenceSession(folder / name, providers=["CPUExecutionProvider"]) for name in names]
    return tuple(side.run(None, {"x": x})[0] for side in sides)  # type: ignore[return-value]


def rounded_by_hand(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """What the 8-bit product should give, in float64: rows with a zero point of their own, columns symmetric."""
    scale = np.abs(weight).max(0) / 127
    columns = np.clip(np.rint(weight / scale), -127, 127) * scale
    high, low = np.maximum(x.max(-1, keepdims=True), 0), np.minimum(x.min(-1, keepdims=True), 0)
    step = np.maximum((high - low) / 255, 1e-12)
    zero = np.rint(-low / step)
    rows = (np.clip(np.rint(x / step) + zero, 0, 255) - zero) * step
    return rows.astype(np.float64) @ columns.astype(np.float64)


class TestOneProduct:
    def test_it_rounds_rows_and_columns(self, tmp_path: Path) -> None:
        dice = np.random.default_rng(0)
        x = dice.standard_normal((2, 5, 24)).astype(np.float32)
        x[0, 2] *= 300  # a loud token costs the others nothing
        weight = dice.standard_normal((24, 40)).astype(np.float32)
        exact, found = product(24, 40, x, weight, tmp_path)
        by_hand = rounded_by_hand(x, weight)
        # a value that lies between two steps may be rounded to either: compare with what one step of one factor does
        step = np.abs(x).max(-1, keepdims=True) / 127 * np.abs(weight).max()
        assert (np.abs(found - by_hand) <= 2 * step).all()
        assert np.abs(found - by_hand).mean() < 1e-3 * np.abs(by_hand).mean()
        errors = np.abs(found - exact).max(-1) / np.abs(exact).max(-1)
        assert errors.max() < 0.03

    @pytest.mark.parametrize("value", [0.0, 3.0, -3.0])
    def test_rows_without_a_range(self, value: float, tmp_path: Path) -> None:
        x = np.full((1, 3, 8), value, dtype=np.float32)
        exact, found = product(8, 4, x, np.linspace(-1, 1, 32, dtype=np.float32).reshape(8, 4), tmp_path)
        assert np.allclose(found, exact, atol=0.05)

    def test_columns_of_zeros(self, tmp_path: Path) -> None:
        weight = np.zeros((8, 4), dtype=np.float32)
        weight[:, 1] = 1
        _, found = product(8, 4, np.ones((1, 2, 8), dtype=np.float32), weight, tmp_path)
        assert np.allclose(found[..., 1], 8, atol=0.1)
        assert (found[..., [0, 2, 3]] == 0).all()


class TestGraph:
    def test_what_is_replaced(self, exported_bundle: Bundle, tmp_path: Path) -> None:
        before = onnx.load(exported_bundle.vision, load_external_data=False)
        written = write_quantized_cpu(exported_bundle.vision, tmp_path / "vision.onnx", CPU)
        after = onnx.load(tmp_path / "vision.onnx", load_external_data=False)
        linears = linears_of(before)
        wanted = [linear for linear in linears if not linear.deciding]
        assert written.quantized == tuple(linear.name for linear in wanted)
        assert written.deciding == tuple(linear.name for linear in linears if linear.deciding) != ()
        products = [node for node in after.graph.node if node.op_type == "MatMulIntegerToFloat"]
        assert len(products) == sum(len(linear.nodes) for linear in wanted)
        types = {tensor.name: tensor.data_type for tensor in after.graph.initializer}
        assert {types[node.input[1]] for node in products} == {onnx.TensorProto.INT8}
        assert {types[linear.weight] for linear in linears if linear.deciding} == {onnx.TensorProto.FLOAT}
        assert written.bytes_after < written.bytes_before
        read = {name for node in after.graph.node for name in node.input}
        assert [name for name in types if name not in read] == []  # ONNX Runtime warns of what nobody reads

    def test_kept_layers_stay(self, exported_bundle: Bundle, tmp_path: Path) -> None:
        kept = CPU.model_copy(update={"keep": ("layers.0",)})
        written = write_quantized_cpu(exported_bundle.vision, tmp_path / "vision.onnx", kept)
        assert written.kept and all(".layers.0." in name for name in written.kept)
        assert not any(".layers.0." in name for name in written.quantized)

    def test_it_runs_at_every_budget_and_loses_little(
        self, exported_bundle: Bundle, photographs: list[Image.Image], tmp_path: Path
    ) -> None:
        made = quantized(exported_bundle, tmp_path)
        pixels = pixels_for(made.manifest.plan, photographs[:2])
        with OrtRunner(made, provider="cpu") as runner:
            for budget in (1, 9, runner.tokens):
                assert runner.run(pixels, budget, [budget, 1]).counts.tolist() == [budget, 1]
        losses = vision_losses(exported_bundle, made, [(str(at), each) for at, each in enumerate(photographs)])
        summary = summary_of(losses)
        assert all(loss.sound for loss in losses)
        assert summary.cosine_min is not None and summary.cosine_min > 0.99
        assert 0 < (summary.saliency_error or 0) < 0.2

    def test_what_it_refuses(self, exported_bundle: Bundle, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match="in place"):
            write_quantized_cpu(exported_bundle.vision, exported_bundle.vision, CPU)
        model = onnx.load(exported_bundle.vision)
        broken = next(tensor for tensor in model.graph.initializer if tensor.name.endswith("fc1.weight"))
        values = onnx.numpy_helper.to_array(broken).copy()
        values[0, 0] = np.nan
        broken.CopyFrom(onnx.numpy_helper.from_array(values, broken.name))
        onnx.save(model, tmp_path / "broken.onnx")
        with pytest.raises(UsageError, match="not finite"):
            write_quantized_cpu(tmp_path / "broken.onnx", tmp_path / "out.onnx", CPU)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llava_next", "qwen2_5_vl", "video_llava"])
def test_every_family(family: str, photographs: list[Image.Image], tmp_path: Path) -> None:
    bundle = family_bundle(tmp_path, family).bundle
    for view in bundle.views:
        (tmp_path / view.part).mkdir()
        quantization = CPU
        written = write_quantized_cpu(view.vision, tmp_path / view.part / view.graph, quantization)
        assert written.quantized
        plan = view.manifest.plan.model_copy(update={"quantization": quantization})
        after = Bundle(
            tmp_path / view.part, view.manifest.model_copy(update={"plan": plan}), graphs=view.graphs, graph=view.graph
        )
        losses = vision_losses(view, after, [("a", photographs[0]), ("b", photographs[2])])
        summary = summary_of(losses)
        assert all(loss.sound for loss in losses)
        assert summary.cosine_mean is not None and summary.cosine_mean > 0.99
