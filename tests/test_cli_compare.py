"""`holov-export compare`: what it shows of two bundles, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from changed_bundles import changed, noise, spoiled_rows, with_plan
from evaluation_cases import write_picture, write_questions
from PIL import Image

from holov_export.bundle import Bundle
from holov_export.cli import cli, run
from holov_export.cli.compare import compare
from holov_export.evaluate.compare_bundles import BundleComparison
from holov_export.pipeline import export_bundle
from holov_export.policies import ClsTopkPolicy, HolovPolicy
from holov_export.request import ExportRequest
from holov_export.spec import DecoderPrecision, Precision

Captured = pytest.CaptureFixture[str]
QUICK = ["--repeats", "1", "--max-new-tokens", "4"]


@pytest.fixture(autouse=True, scope="module")
def registered() -> None:
    cli.add_command(compare)


@pytest.fixture(scope="module")
def folder(complete_bundle: Bundle) -> str:
    return str(complete_bundle.folder)


@pytest.fixture(scope="module")
def noisy(complete_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(changed(complete_bundle, tmp_path_factory.mktemp("compared") / "noisy", noise(0.5)).folder)


def compared(capsys: Captured, *line: str) -> BundleComparison:
    assert run(["compare", *line, *QUICK, "--json"]) == 0
    return BundleComparison.model_validate_json(capsys.readouterr().out)


def test_a_bundle_equals_itself(folder: str, capsys: Captured) -> None:
    found = compared(capsys, folder, folder)
    assert [side.name for side in found.sides] == ["complete (1)", "complete (2)"]
    assert (found.tensors, found.remarks) == ((), ())
    assert {loss.overlap for loss in found.losses} == {1.0}
    assert found.summary.cosine_min == pytest.approx(1.0, abs=1e-12)
    assert len(found.pictures) == 5 and len(found.losses) == 15
    assert found.answers is not None and found.speed is not None
    assert {item.loyalty.value for item in found.answers.at} == {1.0}
    assert [item.budget for item in found.answers.at] == [7, 21]
    assert [item.budget for item in found.speed.at] == [7, 21, 64]
    assert all(item.bytes[0] == item.bytes[1] > 0 for item in found.sizes)
    assert {item.kind for item in found.sizes} >= {"vision", "weights", "decoder", "tokenizer"}


def test_tables_on_stdout_progress_on_stderr(folder: str, noisy: str, capsys: Captured) -> None:
    assert run(["compare", folder, noisy, *QUICK]) == 0
    said = capsys.readouterr()
    lines = said.out.splitlines()
    assert lines[0].split() == ["A", "B"]
    assert any(line.split() == ["bundle", "complete", "noisy"] for line in lines)
    for words in ("kept tokens of 5 pictures, B against A", "answers to 5 questions", "CPU time, 1 thread", "B / A"):
        assert words in said.out
    assert "too few to say much" in said.out
    assert "what is in the image?" in said.out
    assert "before (fp32, holov)" in said.err and "before (fp32" not in said.out


def test_a_difference_is_shown_and_is_no_failure(folder: str, noisy: str, capsys: Captured) -> None:
    found = compared(capsys, folder, noisy, "--budgets", "21", "--no-answers")
    assert found.summary.overlap_min is not None and found.summary.overlap_min < 1
    assert found.summary.cosine_min is not None and found.summary.cosine_min < 0.999
    assert {loss.budget for loss in found.losses} == {21}
    assert (found.answers, found.no_answers) == (None, "it was not asked for")


def test_nan_is_shown_as_not_sound(folder: str, complete_bundle: Bundle, tmp_path: Path, capsys: Captured) -> None:
    spoiled = str(changed(complete_bundle, tmp_path / "spoiled", spoiled_rows).folder)
    assert run(["compare", folder, spoiled, *QUICK, "--no-answers"]) == 0
    assert capsys.readouterr().out.count("not sound") == 3


def test_the_users_pictures_and_questions(folder: str, noisy: str, tmp_path: Path, capsys: Captured) -> None:
    picture = str(write_picture(tmp_path / "one.png", 1))
    data = str(write_questions(tmp_path / "data", pictures=2, each=2))
    found = compared(capsys, folder, noisy, "--pictures", picture, "--data", data, "--budgets", "16")
    assert found.pictures == ("one.png",)
    assert found.answers is not None
    assert (found.answers.questions, found.answers.pictures, found.answers.metric) == (4, 2, "exact match")
    assert found.answers.at[0].before is not None
    asked = compared(capsys, folder, noisy, "--pictures", picture, "--question", "why?", "--budgets", "16")
    assert asked.answers is not None and asked.answers.metric == ""
    (pair,) = asked.answers.examples
    assert (pair.question, pair.picture, pair.right) == ("why?", "1: one.png", ())


def test_without_a_decoder_the_reason_is_told(
    folder: str, complete_bundle: Bundle, tmp_path: Path, capsys: Captured
) -> None:
    silent = changed(complete_bundle, tmp_path / "silent", lambda name, values: values, decoder=None)
    assert run(["compare", folder, str(silent.folder), *QUICK]) == 0
    assert "answers: not compared, 'silent' has no decoder" in capsys.readouterr().out


def test_other_rules_are_compared_and_said(
    folder: str, complete_bundle: Bundle, tmp_path: Path, capsys: Captured
) -> None:
    other = changed(complete_bundle, tmp_path / "topk", lambda name, values: values, policy=ClsTopkPolicy())
    found = compared(capsys, folder, str(other.folder), "--no-answers")
    assert found.remarks == ("the rules differ (holov, cls-topk), so they keep other tokens by intention",)
    crops = with_plan(other, policy=HolovPolicy(crops=4))
    assert run(["compare", folder, str(crops.folder), *QUICK, "--no-answers"]) == 0
    assert "the settings of holov differ" in capsys.readouterr().err


def test_other_models_and_token_counts_are_refused(
    folder: str, complete_bundle: Bundle, tmp_path: Path, capsys: Captured
) -> None:
    model = complete_bundle.manifest.plan.model
    same = changed(complete_bundle, tmp_path / "copy", lambda name, values: values)
    renamed = with_plan(same, model=model.model_copy(update={"name": "renamed"}))
    assert run(["compare", folder, str(renamed.folder), *QUICK, "--no-answers"]) == 0
    wider = model.decoder.model_copy(update={"layers": 99})
    other = with_plan(same, model=model.model_copy(update={"name": "other", "decoder": wider}))
    assert run(["compare", folder, str(other.folder), *QUICK]) == 2
    assert "different models (tiny-llava, other): decoder differ" in capsys.readouterr().err
    larger = with_plan(
        same, model=model.model_copy(update={"vision": model.vision.model_copy(update={"image_size": 112})})
    )
    assert run(["compare", folder, str(larger.folder), *QUICK]) == 2
    said = capsys.readouterr()
    assert "'complete' has 64 tokens of an image, 'copy' 256" in said.err and said.out == ""


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--budgets", "65"], "1..64"),
        (["--question", "a?", "--no-answers"], "exclude each other"),
        (["--method", "scope"], "no graph for 'scope'"),
        (["--part", "video"], "no vision graph for videos"),
        (["--draw", "kept.txt"], "no name of a picture"),
        (["--pictures", "no-such.png"], "no-such.png"),
        (["--data", "no-such.jsonl"], "no-such.jsonl"),
    ],
)
def test_wrong_requests(folder: str, arguments: list[str], words: str, capsys: Captured) -> None:
    assert run(["compare", folder, folder, *arguments]) == 2
    said = capsys.readouterr()
    assert words in said.err and said.out == ""


def test_a_folder_that_is_no_bundle(folder: str, tmp_path: Path, capsys: Captured) -> None:
    assert run(["compare", folder, str(tmp_path)]) == 2
    assert "is not a bundle" in capsys.readouterr().err


def test_what_both_keep_is_drawn(folder: str, noisy: str, tmp_path: Path, capsys: Captured) -> None:
    file = tmp_path / "kept.png"
    line = ["compare", folder, noisy, *QUICK, "--no-answers", "--budgets", "21", "--draw", str(file)]
    assert run(line) == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(file)
    with Image.open(file) as drawn:
        assert drawn.width > 2.5 * drawn.height  # the picture, A and B
    assert run([*line[:-1], str(tmp_path / "none" / "kept.png")]) == 3
    assert "cannot write" in capsys.readouterr().err


def test_json_names_everything(folder: str, capsys: Captured) -> None:
    assert run(["compare", folder, folder, *QUICK, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found) == set(BundleComparison.model_fields)
    assert found["speed"]["at"][0].keys() == {"budget", "milliseconds", "ratio"}
    assert str(folder) not in json.dumps(found)


@pytest.mark.slow
def test_the_demo_model_in_fp16_answers_as_in_fp32(tmp_path: Path, capsys: Captured) -> None:
    folders = []
    for precision, decoder in (
        (Precision.FP32, DecoderPrecision.FP32),
        (Precision.FP16, DecoderPrecision.FP16),
        (Precision.FP32, DecoderPrecision.INT4),
    ):
        folders.append(str(tmp_path / f"{precision.value}-{decoder.value}"))
        export_bundle(ExportRequest("demo", HolovPolicy(), precision, decoder, output=Path(folders[-1]), verify=False))
    plain, half, int4 = folders
    found = compared(capsys, plain, half)
    assert found.answers is not None and found.answers.data == "demo-scenes"
    assert {item.same for item in found.answers.at} == {3}
    assert found.summary.overlap_min is not None and found.summary.overlap_min >= 0.9375
    assert found.summary.cosine_min is not None and found.summary.cosine_min > 0.9999
    assert {item.name for item in found.tensors} == {"pixel_values", "visual_tokens"}
    (weights,) = [item.bytes for item in found.sizes if item.kind == "weights"]
    assert weights[1] < 0.51 * weights[0]
    other = compared(capsys, plain, int4)
    assert other.answers is not None and other.answers.decoders == ("fp32", "int4")
    assert {loss.overlap for loss in other.losses} == {1.0}
