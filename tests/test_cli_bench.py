"""`holov-export bench`: what it prints where, what it writes, what it refuses before it measures."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import tensorrt_standin
from PIL import Image
from tensorrt_standin import FakeGpu

from holov_export.bundle import Bundle
from holov_export.cli import cli, run
from holov_export.cli.bench import bench_command
from holov_export.compile.engine_from_onnx import engine_from_bundle
from holov_export.targets import target_from_name
from holov_export.verify.bench_report import report_from_file

QUICK = ["--repeats", "2", "--alone", "0", "--no-profile", "--threads", "1", "--provider", "cpu"]


@pytest.fixture(autouse=True, scope="module")
def registered() -> None:
    cli.add_command(bench_command)


@pytest.fixture
def folder(exported_bundle: Bundle) -> str:
    return str(exported_bundle.folder)


def test_tables_go_to_stdout_and_remarks_to_stderr(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["bench", folder, *QUICK, "--budgets", "64,7", "--batch", "1,2", "--concurrency", "1,2"]) == 0
    said = capsys.readouterr()
    rows = [line.split() for line in said.out.splitlines() if line.startswith("exported ")]
    assert [row[1:3] for row in rows] == [["1", "64"], ["1", "7"], ["2", "64"], ["2", "7"], ["1", "7"], ["1", "7"]]
    assert "2 interleaved rounds" in said.err and "2 interleaved rounds" not in said.out
    assert "no GPU times" in said.err


def test_json_alone_is_on_stdout(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["bench", folder, *QUICK, "--json", "--budgets", "7"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [(case["batch"], case["budget"]) for case in found["cases"]] == [(1, 7)]
    assert found["machine"]["cpu"]


def test_a_folder_that_cannot_be_written_is_refused_before_anything_runs(
    folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(**place: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("holov_export.cli.bench.tempfile.TemporaryFile", refuse)
    assert run(["bench", folder, *QUICK, "--budgets", "7", "-o", str(tmp_path / "results")]) == 3
    said = capsys.readouterr().err
    assert "Read-only file system" in said and "measure" not in said


def test_files_and_no_path_of_this_machine_in_them(
    folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "results"
    monkeypatch.setattr(sys, "argv", ["holov-export", "bench", folder, "-o", str(out)])
    assert run(["bench", folder, *QUICK, "--budgets", "64,7", "-o", str(out)]) == 0
    shown = capsys.readouterr().out
    assert sorted(path.name for path in out.iterdir()) == ["bench.json", "bench.md", "bench.png"]
    assert all(str(out / name) in shown for name in ("bench.json", "bench.md", "bench.png"))
    report = report_from_file(out / "bench.json")
    assert report.command == "holov-export bench exported -o results"
    for name in ("bench.json", "bench.md"):
        assert str(tmp_path) not in (out / name).read_text(encoding="utf-8")
    with Image.open(out / "bench.png") as picture:
        assert picture.width > 400


def test_several_bundles_are_measured_in_one_run(
    exported_bundle: Bundle, toy_bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = shutil.copytree(exported_bundle.folder, tmp_path / "copy")
    line = ["bench", str(exported_bundle.folder), "--compare", str(copy), *QUICK, "--budgets", "7", "--json"]
    assert run(line) == 0
    found = json.loads(capsys.readouterr().out)
    assert [item["label"] for item in found["contestants"]] == ["exported", "copy"]
    assert [(item["contestant"], item["baseline"], item["baseline_budget"]) for item in found["ratios"]] == [
        ("copy", "exported", 7)
    ]


def test_against_the_plain_encoder(folder: str, llava_checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["bench", folder, "--vs", "plain", "--checkpoint", str(llava_checkpoint), *QUICK, "--budgets", "7", "--json"]
    assert run(line) == 0
    found = json.loads(capsys.readouterr().out)
    assert [item["method"] for item in found["contestants"]] == ["holov", "none"]
    (ratio,) = found["ratios"]
    assert (ratio["budget"], ratio["baseline_budget"]) == (7, 64)
    assert ratio["latency"] > 0


def test_the_plain_encoder_needs_its_checkpoint(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["bench", folder, "--vs", "plain", *QUICK]) == 2
    assert "--checkpoint DIR" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--budgets", "65"], "1..64"),
        (["--budgets", "a,b"], "no list of whole numbers"),
        (["--batch", "0"], "below 1"),
        (["--engine", "onnx"], "unknown engine 'onnx'"),
        (["--target", "no-such-board"], "unknown target"),
        (["--checkpoint", "x"], "--checkpoint is for --vs only"),
        (["--seconds", "0"], "--seconds"),
    ],
)
def test_wrong_requests_are_usage_errors(
    folder: str, arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["bench", folder, *arguments]) == 2
    said = capsys.readouterr()
    assert words in said.err
    assert said.out == ""


def test_a_folder_that_is_no_bundle(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["bench", str(tmp_path)]) == 2
    assert "is not a bundle" in capsys.readouterr().err


def test_a_file_in_the_place_of_the_results(folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "taken").write_text("", encoding="utf-8")
    assert run(["bench", folder, "-o", str(tmp_path / "taken")]) == 3
    assert "is a file" in capsys.readouterr().err


def test_results_that_need_matplotlib_say_so_before_anything_runs(
    folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert run(["bench", folder, "-o", str(tmp_path / "out")]) == 3
    assert 'pip install "holov-export[bench]"' in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_tensorrt_without_a_gpu_is_refused(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    with tensorrt_standin.installed("8.6.0", gpu=None):
        assert run(["bench", folder, "--engine", "tensorrt", *QUICK]) == 3
    assert "no usable NVIDIA GPU" in capsys.readouterr().err


class TestWithAnEngine:
    @pytest.fixture
    def compiled(self, exported_bundle: Bundle, tmp_path: Path) -> Iterator[str]:
        copy = Bundle(Path(shutil.copytree(exported_bundle.folder, tmp_path / "compiled")), exported_bundle.manifest)
        with tensorrt_standin.installed("10.3.0", gpu=FakeGpu()):
            engine_from_bundle(copy, target_from_name("h200"))
            yield str(copy.folder)

    def test_both_engines_side_by_side(self, compiled: str, capsys: pytest.CaptureFixture[str]) -> None:
        line = ["bench", compiled, "--engine", "ort,tensorrt", "--target", "h200", *QUICK, "--budgets", "7", "--json"]
        assert run(line) == 0
        found = json.loads(capsys.readouterr().out)
        assert [item["label"] for item in found["contestants"]] == ["compiled, ort", "compiled, tensorrt"]
        ort, tensorrt = found["cases"]
        assert "gpu" not in ort and tensorrt["gpu"]["samples"] == 2
        assert ort["peak_share"] >= 0 and tensorrt["peak_share"] >= 0

    def test_the_plain_encoder_is_compiled_as_the_bundle_was(
        self, compiled: str, llava_checkpoint: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        line = ["bench", compiled, "--engine", "tensorrt", "--vs", "plain", "--checkpoint", str(llava_checkpoint)]
        assert run([*line, *QUICK, "--budgets", "7", "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert [item["method"] for item in found["contestants"]] == ["holov", "none"]
        (ratio,) = found["ratios"]
        assert (ratio["baseline_budget"], ratio["gpu"] > 0) == (64, True)

    def test_a_bundle_without_an_engine_names_the_command(
        self, compiled: str, folder: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert run(["bench", folder, "--engine", "tensorrt", "--target", "h200", *QUICK]) == 2
        assert "holov-export compile" in capsys.readouterr().err
