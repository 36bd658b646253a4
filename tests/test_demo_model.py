"""The model that ships with the package: it loads as the architecture it claims to be, and it answers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from holov_export import Session
from holov_export.assets import data_folder
from holov_export.pipeline import export_bundle
from holov_export.policies import HolovPolicy
from holov_export.request import ExportRequest
from holov_export.spec import DecoderPrecision, Precision
from holov_export.tensors import SamplingSettings

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"
GREEDY = SamplingSettings(max_new_tokens=16)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("demo") / "bundle"
    _, report = export_bundle(ExportRequest("demo", HolovPolicy(), Precision.FP32, DecoderPrecision.FP32, out))
    assert report is not None
    assert {(item.left, item.right) for item in report.comparisons} == {
        ("onnxruntime", "reference"),
        ("onnxruntime", "torch fp32"),
    }
    assert all(item.same_sets == item.pictures for item in report.comparisons)
    return out


def share_right(bundle: Path, folder: Path, scenes: int, budgets: tuple[int, ...]) -> tuple[int, dict[int, float]]:
    """(questions, budget -> share answered right) on freshly drawn held-out scenes."""
    command = [sys.executable, str(SCRIPTS / "demo_scenes.py"), str(folder), "--scenes", str(scenes), "--seed", "7"]
    subprocess.run(command, check=True, capture_output=True)
    rows = [json.loads(line) for line in (folder / "data.jsonl").read_text().splitlines()]
    right = dict.fromkeys(budgets, 0)
    with Session.open(bundle, provider="cpu") as session:
        for row in rows:
            for budget in budgets:
                answer = session.ask(folder / row["image"], row["question"], budget=budget, sampling=GREEDY)
                right[budget] += answer.text.strip() in row["answers"]
    return len(rows), {budget: count / len(rows) for budget, count in right.items()}


def test_it_is_small_and_true_to_its_architecture() -> None:
    folder = data_folder("demo-model")
    assert (folder / "model.safetensors").stat().st_size <= 12_000_000
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["LlavaForConditionalGeneration"]
    assert config["vision_feature_layer"] == -2
    assert "licen" in (folder / "README.md").read_text().lower()


def test_the_shipped_scenes_are_answered_with_a_ninth_of_the_tokens(bundle: Path) -> None:
    scenes = data_folder("demo-scenes")
    questions = json.loads((scenes / "questions.json").read_text())
    assert len(questions) == 3
    with Session.open(bundle, provider="cpu") as session:
        for budget in (144, 16):
            for item in questions:
                answer = session.ask(scenes / item["image"], item["question"], budget=budget, sampling=GREEDY)
                assert answer.text.strip() == item["answer"], (budget, item)
                assert answer.visual_tokens == (budget,)
                assert answer.finish_reason == "stop"


@pytest.mark.parametrize(
    ("precision", "decoder"),
    [(Precision.FP32, DecoderPrecision.INT4), (Precision.FP16, DecoderPrecision.FP16)],
    ids=["fp32-int4", "fp16-fp16"],
)
def test_it_answers_in_other_precisions(tmp_path: Path, precision: Precision, decoder: DecoderPrecision) -> None:
    out = tmp_path / "bundle"
    _, report = export_bundle(ExportRequest("demo", HolovPolicy(), precision, decoder, out))
    assert report is not None and report.passed
    scenes = data_folder("demo-scenes")
    questions = json.loads((scenes / "questions.json").read_text())
    with Session.open(out, provider="cpu") as session:
        for item in questions:
            answer = session.ask(scenes / item["image"], item["question"], budget=144, sampling=GREEDY)
            assert answer.text.strip() == item["answer"], item
            assert answer.finish_reason == "stop"
    count, right = share_right(out, tmp_path / "scenes", scenes=4, budgets=(144,))
    assert count >= 25
    assert right[144] >= 0.85


def test_a_few_held_out_questions(bundle: Path, tmp_path: Path) -> None:
    questions, right = share_right(bundle, tmp_path, scenes=12, budgets=(144, 16))
    assert questions >= 80
    assert right[144] >= 0.9
    assert right[16] >= 0.7


@pytest.mark.slow
def test_a_thousand_held_out_questions(bundle: Path, tmp_path: Path) -> None:
    questions, right = share_right(bundle, tmp_path, scenes=120, budgets=(144,))
    assert questions >= 1000
    assert right[144] >= 0.95
