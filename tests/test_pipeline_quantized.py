"""Quantising a bundle, and exporting one quantised: what is written, what is refused, what is left behind."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import onnx
import pytest
from own_recipes import LOOSE, STRICT, write_recipe
from PIL import Image

from holov_export.bundle import REPORTS, Bundle, open_bundle
from holov_export.cli import run
from holov_export.errors import BundleError, ImageError, LossError, UsageError
from holov_export.pipeline_quantized import PRECISION, RANGES, export_quantized, quantize_bundle
from holov_export.policies import HolovPolicy, policy_from_settings
from holov_export.quantize.precision_report import PrecisionReport
from holov_export.request import ExportRequest, GraphRequest, QuantizeRequest, quantization_from_request
from holov_export.runtime.preprocess import pixels_from_pictures
from holov_export.runtime.runner_ort import OrtRunner
from holov_export.spec import Precision, QuantizedType


def asked(tmp_path: Path, pictures: Path, limits: str = LOOSE, **settings: object) -> QuantizeRequest:
    own = write_recipe(tmp_path / "recipe", limits)
    wanted = {"type": QuantizedType.INT8, "recipe": own, "pictures": pictures, **settings}
    return QuantizeRequest(**wanted)  # type: ignore[arg-type]


@pytest.fixture
def source(exported_bundle: Bundle, tmp_path: Path) -> Bundle:
    """A copy, in which a calibration may leave its folder."""
    shutil.copytree(exported_bundle.folder, tmp_path / "source")
    return open_bundle(tmp_path / "source")


def operators(path: Path) -> set[str]:
    return {node.op_type for node in onnx.load(path, load_external_data=False).graph.node}


def test_a_quantised_bundle_is_a_bundle(source: Bundle, pictures: Path, tmp_path: Path) -> None:
    before = {item.path: item.sha256 for item in source.manifest.artifacts}
    made = quantize_bundle(source, asked(tmp_path, pictures), tmp_path / "out")
    opened = open_bundle(tmp_path / "out")
    plan = opened.manifest.plan
    assert plan.precision_name == "int8"
    assert plan.quantization is not None and plan.quantization.recipe == "own"
    assert plan.opset == 18
    assert {"QuantizeLinear", "DequantizeLinear"} <= operators(opened.vision)
    assert (opened.folder / "vision.onnx.data").stat().st_size < (source.folder / "vision.onnx.data").stat().st_size
    report = PrecisionReport.model_validate_json((opened.folder / REPORTS / PRECISION).read_text())
    assert report == made.reports[0]
    assert len(report.pictures) == 2
    assert (opened.folder / REPORTS / f"{RANGES}.json").is_file()
    assert {item.kind for item in opened.manifest.artifacts} == {"vision", "weights", "tokenizer", "report"}
    assert before == {item.path: item.sha256 for item in open_bundle(source.folder).manifest.artifacts}


def test_it_runs_at_every_budget(
    source: Bundle, pictures: Path, tmp_path: Path, photographs: list[Image.Image]
) -> None:
    made = quantize_bundle(source, asked(tmp_path, pictures), tmp_path / "out").bundle
    pixels = pixels_from_pictures(photographs[:2], made.manifest.plan.model)
    with OrtRunner(made, provider="cpu") as runner:
        for budget in (1, 7, runner.tokens):
            seen = runner.run(pixels, budget, [budget, max(1, budget // 2)])
            assert seen.tokens.shape[1] == budget
            assert seen.counts.tolist() == [budget, max(1, budget // 2)]


def test_ranges_of_a_calibration_are_used_again(source: Bundle, pictures: Path, tmp_path: Path) -> None:
    said: list[str] = []
    first = quantize_bundle(source, asked(tmp_path, pictures), tmp_path / "one")
    kept = source.folder / "calibration" / "own" / "ranges.json"
    stamp = kept.stat().st_mtime_ns
    second = quantize_bundle(source, asked(tmp_path, pictures), tmp_path / "two", tell=said.append)
    assert kept.stat().st_mtime_ns == stamp
    hashes = [{item.path: item.sha256 for item in made.bundle.manifest.artifacts} for made in (first, second)]
    assert hashes[0]["vision.onnx"] == hashes[1]["vision.onnx"]
    assert hashes[0]["vision.onnx.data"] == hashes[1]["vision.onnx.data"]


def test_a_loss_above_the_limits_is_refused_and_can_be_accepted(source: Bundle, pictures: Path, tmp_path: Path) -> None:
    heard: list[PrecisionReport] = []
    strict = asked(tmp_path, pictures, STRICT)
    with pytest.raises(LossError, match="lost more") as refused:
        quantize_bundle(source, strict, tmp_path / "out", hear=heard.append)
    assert not (tmp_path / "out").exists()
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    assert not heard[0].passed and heard[0].keep
    assert f"--keep {','.join(heard[0].keep)}" in refused.value.hint
    accepted = asked(tmp_path, pictures, STRICT, accept_loss=True)
    made = quantize_bundle(source, accepted, tmp_path / "out")
    assert made.reports[0].accepted_loss and not made.reports[0].passed


def test_auto_keeps_what_a_sweep_says(source: Bundle, pictures: Path, tmp_path: Path) -> None:
    limits = "overlap = 0.0\ncosine = 0.999999\nanswers = 0.0"
    auto = asked(tmp_path, pictures, limits, keep=("auto",), accept_loss=True)
    made = quantize_bundle(source, auto, tmp_path / "out")
    plain = quantize_bundle(source, asked(tmp_path, pictures), tmp_path / "plain")
    quantization = made.bundle.manifest.plan.quantization
    assert quantization is not None and quantization.keep
    assert "auto" not in quantization.keep
    assert len(made.reports[0].written.quantized) < len(plain.reports[0].written.quantized)
    cosines = [each.reports[0].summary.cosine_min for each in (made, plain)]
    assert cosines[0] is not None and cosines[1] is not None and cosines[0] > cosines[1]


def test_quantised_bundles_are_not_quantised_again(source: Bundle, pictures: Path, tmp_path: Path) -> None:
    made = quantize_bundle(source, asked(tmp_path, pictures), tmp_path / "out").bundle
    with pytest.raises(BundleError, match="quantised already"):
        quantize_bundle(made, asked(tmp_path, pictures), tmp_path / "again")


def test_a_layer_that_does_not_exist_is_named(source: Bundle, pictures: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"layers\.77"):
        quantize_bundle(source, asked(tmp_path, pictures, keep=("layers.77",)), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_pictures_are_looked_at_before_the_export(llava_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "none").mkdir()
    said: list[str] = []
    request = ExportRequest(
        str(llava_checkpoint),
        HolovPolicy(),
        Precision.FP32,
        None,
        tmp_path / "out",
        quantize=asked(tmp_path, tmp_path / "none"),
    )
    with pytest.raises((ImageError, UsageError)):
        export_quantized(request, tell=said.append)
    assert said == []


def test_an_export_in_one_step(llava_checkpoint: Path, pictures: Path, tmp_path: Path) -> None:
    request = ExportRequest(
        str(llava_checkpoint),
        HolovPolicy(),
        Precision.FP16,
        None,
        tmp_path / "out",
        also=(GraphRequest(policy_from_settings("cls-topk")),),
        quantize=asked(tmp_path, pictures),
    )
    made = export_quantized(request)
    opened = open_bundle(tmp_path / "out")
    assert made.parity is not None and made.parity.passed
    assert opened.manifest.plan.precision_name == "fp16-int8"
    assert opened.manifest.plan.opset == 19
    assert sorted(path.name for path in opened.folder.iterdir()) == [
        "manifest.json",
        "reports",
        "tokenizer.json",
        "vision-cls-topk.onnx",
        "vision.onnx",
        "vision.onnx.data",
    ]
    names = {path.name for path in (opened.folder / REPORTS).iterdir()}
    assert {"parity.json", "precision.json", "precision-cls-topk.json", "ranges-cls-topk.json"} <= names
    model = onnx.load(opened.folder / "vision-cls-topk.onnx", load_external_data=False)
    outside = [tensor.external_data for tensor in model.graph.initializer if tensor.external_data]
    assert {entry.value for entries in outside for entry in entries if entry.key == "location"} == {"vision.onnx.data"}


def test_a_cpu_graph_is_float32_around_its_products(tmp_path: Path) -> None:
    request = QuantizeRequest(QuantizedType.INT8, engine="cpu")
    assert quantization_from_request(request, Precision.FP32).recipe == ""
    for precision, kind in ((Precision.FP16, QuantizedType.INT8), (Precision.FP32, QuantizedType.FP8)):
        with pytest.raises(UsageError, match="for a CPU"):
            quantization_from_request(QuantizeRequest(kind, engine="cpu"), precision)


def test_the_command(source: Bundle, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["quantize", str(source.folder), "--pictures", str(pictures), "-o", str(tmp_path / "out"), "--json"]
    assert run([*words, "--recipe", write_recipe(tmp_path / "recipe")]) == 2  # neither --int8 nor --fp8
    capsys.readouterr()
    assert run([*words, "--int8", "--recipe", write_recipe(tmp_path / "recipe", STRICT)]) == 1
    refused = json.loads(capsys.readouterr().out)
    assert refused["bundle"] is None and refused["precision"][0]["passed"] is False
    assert run([*words, "--int8", "--recipe", write_recipe(tmp_path / "recipe")]) == 0
    done = json.loads(capsys.readouterr().out)
    assert done["bundle"] == str(tmp_path / "out") and done["precision"][0]["passed"] is True
    assert done["tensorrt"]["10.3"] is True
