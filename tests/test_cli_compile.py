"""`holov-export compile` and `--target` at export: what they print where, and which exit code they end with."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
import tensorrt_standin
from tensorrt_standin import FakeGpu

from holov_export.bundle import Bundle, open_bundle
from holov_export.cli import run
from holov_export.engine import engines_in
from holov_export.targets import target_from_name


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def bundle(llava_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """An fp16 bundle without a decoder, made by the command line itself."""
    folder = tmp_path_factory.mktemp("compile") / "my bundle"
    arguments = ["--model", str(llava_checkpoint), "--fp16", "--no-decoder", "--no-verify", "-o", str(folder)]
    assert run(arguments) == 0
    return open_bundle(folder)


# -------------------------------------------------------------------------------------------- dry runs


def test_a_dry_run_needs_no_gpu(bundle: Bundle, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["compile", str(bundle.folder), "--target", "jetson-agx-orin-64gb", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "strongly typed" in out
    assert "batch 1:1:1, budget 1:7:64" in out
    (line,) = [line for line in out.splitlines() if line.startswith("trtexec ")]
    assert f"--onnx={bundle.vision}" in shlex.split(line)  # the path has a space in it
    assert "--stronglyTyped" in shlex.split(line)
    assert not (bundle.folder / "engines").exists()


def test_a_dry_run_shows_every_kind_of_network(bundle: Bundle, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["compile", str(bundle.folder), "--target", "h200", "--dry-run"]) == 0
    found = capsys.readouterr()
    commands = [line for line in found.out.splitlines() if line.startswith(("trtexec", "holov-export"))]
    assert [shlex.split(line)[0] for line in commands] == ["holov-export", "trtexec", "trtexec", "trtexec"]
    assert "helper layers" in found.err


def test_a_dry_run_as_json(bundle: Bundle, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["compile", str(bundle.folder), "--target", "h200", "--dry-run", "--json"]
    assert run([*arguments, "--tensorrt", "10.13.3", "--batch", "1:4:16", "--budget", "1:64:576"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["engine"] == str(bundle.folder / "engines" / "h200")
    (made,) = found["plans"]
    assert made["plan"]["profiles"] == [{"batch": [1, 4, 16], "budget": [1, 64, 64], "axes": []}]
    assert made["commands"][0][0] == "trtexec"


def test_a_dry_run_has_to_know_the_target(bundle: Bundle, capsys: pytest.CaptureFixture[str]) -> None:
    with tensorrt_standin.installed("10.3.0", gpu=None):
        assert run(["compile", str(bundle.folder), "--dry-run"]) == 2
    assert "--target" in capsys.readouterr().err


# -------------------------------------------------------------------------------------------- builds


def test_a_build_prints_where_the_engine_is(bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with tensorrt_standin.installed("8.6.0", gpu=FakeGpu()):
        assert run(["compile", str(bundle.folder), "--target", "h200", "-o", str(tmp_path / "engines")]) == 0
    found = capsys.readouterr()
    assert str(tmp_path / "engines" / "h200") in found.out
    assert "TensorRT 8.6.0, NVIDIA H200 (sm_90), fp16-flag" in found.out
    assert "kept in float32" in found.err
    (engine,) = engines_in(tmp_path / "engines")
    assert engine.record.target == "h200"


def test_a_build_as_json(bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["compile", str(bundle.folder), "--target", "h200", "-o", str(tmp_path), "--json", "--no-layer-report"]
    with tensorrt_standin.installed("11.4.0", gpu=FakeGpu()):
        assert run([*arguments, "--profile", "batch=1,budget=7", "--profile", "batch=1:2:4,budget=1:7:64"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["engine"] == str(tmp_path / "h200")
    assert [item["batch"] for item in found["record"]["profiles"]] == [[1, 1, 1], [1, 2, 4]]


def test_auto_says_which_target_it_took(bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with tensorrt_standin.installed("10.3.0", gpu=FakeGpu(name="Orin", sm=87, memory=30 << 30, integrated=True)):
        assert run(["compile", str(bundle.folder), "-o", str(tmp_path), "--json"]) == 0
    found = capsys.readouterr()
    assert "target jetson-agx-orin-32gb: Orin (sm_87, 30 GiB), TensorRT 10.3.0" in found.err
    assert json.loads(found.out)["record"]["target"] == "jetson-agx-orin-32gb"


def test_a_board_of_one_s_own(bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from holov_export.assets import data_folder

    text = (data_folder("engines") / "h200.toml").read_text(encoding="utf-8")
    (tmp_path / "mine.toml").write_text(text.replace('name = "h200"', 'name = "mine"'), encoding="utf-8")
    with tensorrt_standin.installed("10.16.1", gpu=FakeGpu()):
        assert run(["compile", str(bundle.folder), "--target", str(tmp_path / "mine.toml"), "-o", str(tmp_path)]) == 0
    assert engines_in(tmp_path)[0].record.target == "mine"
    assert target_from_name("h200").name == "h200"


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--target", "h20"], 2, "h200"),
        (["--target", "jetson-agx-thor"], 2, "sm_110"),
        (["--target", "h200", "--batch", "4:2:1"], 2, "not hold"),
        (["--target", "h200", "--tensorrt", "10.3"], 2, "--dry-run"),
        (["--target", "h200", "--timing-cache", "a", "--no-timing-cache"], 2, "exclude"),
        (["--target", "h200", "--strip-weights"], 2, "stripped plans"),
    ],
)
def test_what_is_wrong_is_said(
    arguments: list[str], code: int, said: str, bundle: Bundle, capsys: pytest.CaptureFixture[str]
) -> None:
    with tensorrt_standin.installed("8.6.0", gpu=FakeGpu()):
        assert run(["compile", str(bundle.folder), *arguments]) == code
    assert said in capsys.readouterr().err
    assert not (bundle.folder / "engines").exists()


@pytest.mark.parametrize("target", ["auto", "h200"])
def test_without_a_gpu_the_exit_code_is_3(target: str, bundle: Bundle, capsys: pytest.CaptureFixture[str]) -> None:
    with tensorrt_standin.installed("10.3.0", gpu=None):
        assert run(["compile", str(bundle.folder), "--target", target]) == 3
    assert "no usable NVIDIA GPU" in capsys.readouterr().err


# -------------------------------------------------------------------------------------------- at export


def test_an_export_compiles_in_one_go(
    llava_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Takes some seconds: a real export."""
    folder = tmp_path / "bundle"
    arguments = ["--model", str(llava_checkpoint), "--fp16", "--no-decoder", "--no-verify", "-o", str(folder)]
    with tensorrt_standin.installed("10.3.0", gpu=FakeGpu()):
        assert run([*arguments, "--target", "h200", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["bundle"] == str(folder)
    assert found["engine"] == str(folder / "engines" / "h200")
    (engine,) = engines_in(folder / "engines")
    assert engine.record.precision.value == "fp16"


@pytest.mark.parametrize(("gpu", "code"), [(None, 3), (FakeGpu(name="NVIDIA L4", sm=89), 2)])
def test_an_engine_that_cannot_be_built_stops_the_export_before_it_begins(
    gpu: FakeGpu | None, code: int, llava_checkpoint: Path, tmp_path: Path
) -> None:
    arguments = ["--model", str(llava_checkpoint), "--fp16", "--no-decoder", "-o", str(tmp_path / "bundle")]
    with tensorrt_standin.installed("10.3.0", gpu=gpu):
        assert run([*arguments, "--target", "h200"]) == code
    assert list(tmp_path.iterdir()) == []


def test_a_dry_export_shows_both_plans(
    llava_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--model", str(llava_checkpoint), "--fp16", "--no-decoder", "-o", str(tmp_path / "bundle")]
    target = ["--target", "jetson-agx-orin-64gb", "--dry-run"]
    assert run([*arguments, *target]) == 0
    out = capsys.readouterr().out
    assert "selection float32" in out
    assert "trtexec --onnx=" in out
    assert run([*arguments, *target, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["plan"]["precision"] == "fp16"
    assert found["compile"]["plans"][0]["plan"]["network"] == "strongly-typed"
    assert list(tmp_path.iterdir()) == []
