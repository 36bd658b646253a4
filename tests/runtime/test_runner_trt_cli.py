"""`ask` and `show` with a compiled engine: the same answer and the same picture as ONNX Runtime's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tensorrt_standin
from PIL import Image, ImageChops
from runtime.engines import H200, Foundry
from tensorrt_standin import VERSIONS

from holov_export.bundle import Bundle
from holov_export.cli import run


@pytest.fixture(scope="module")
def photo(tmp_path_factory: pytest.TempPathFactory, photographs: list[Image.Image]) -> Path:
    path = tmp_path_factory.mktemp("photo") / "chelsea.png"
    photographs[2].save(path)
    return path


def answer(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    assert run([*arguments, "--max-new-tokens", "12", "--threads", "1", "--provider", "cpu", "--json"]) == 0
    said: dict[str, Any] = json.loads(capsys.readouterr().out)
    del said["milliseconds"]
    return said


@pytest.mark.parametrize("version", [VERSIONS[0], VERSIONS[-1]])
def test_answers_are_equal(
    foundry: Foundry, complete_bundle: Bundle, photo: Path, capsys: pytest.CaptureFixture[str], version: str
) -> None:
    folder = str(foundry.bundle_with_engine(complete_bundle.folder, version).folder)
    question = ["ask", folder, str(photo), "what is this?", "--budget", "9"]
    wanted = answer(question, capsys)
    assert len(wanted["token_ids"]) > 3
    with tensorrt_standin.installed(version, gpu=H200):
        world = tensorrt_standin.current()
        assert answer([*question, "--engine", "tensorrt"], capsys) == wanted
        assert answer([*question, "--engine", "tensorrt", "--target", "h200"], capsys) == wanted
        assert world.cuda.calls.count("cudaStreamCreateWithFlags") == 2
        assert world.leaked() == []


def test_pictures_are_equal(foundry: Foundry, exported_bundle: Bundle, photo: Path, tmp_path: Path) -> None:
    folder = str(foundry.bundle_with_engine(exported_bundle.folder, "10.3.0").folder)
    drawn = [tmp_path / "ort.png", tmp_path / "tensorrt.png"]
    arguments = ["show", folder, str(photo), "--budget", "9", "-o"]
    assert run([*arguments, str(drawn[0]), "--provider", "cpu"]) == 0
    with tensorrt_standin.installed("10.3.0", gpu=H200):
        assert run([*arguments, str(drawn[1]), "--engine", "tensorrt"]) == 0
        assert tensorrt_standin.current().leaked() == []
    mine, theirs = (Image.open(path) for path in drawn)
    assert ImageChops.difference(mine, theirs).getbbox() is None


@pytest.mark.parametrize("command", ["ask", "show"])
def test_wrong_use(
    exported_bundle: Bundle, photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    arguments = [command, str(exported_bundle.folder), str(photo)]
    arguments += ["what?"] if command == "ask" else ["-o", str(tmp_path / "kept.png")]
    for more, code, message in (
        (["--target", "h200"], 2, "--target is for --engine tensorrt only"),
        (["--engine", "tflite"], 2, "'tflite' is not one of 'ort', 'tensorrt'"),
        (["--engine", "tensorrt"], 2, "has no engine. Build one: holov-export compile"),
    ):
        with tensorrt_standin.installed("10.3.0", gpu=H200):
            assert run([*arguments, *more]) == code
        captured = capsys.readouterr()
        assert captured.out == ""
        assert message in " ".join(captured.err.split())
    with tensorrt_standin.installed("10.3.0", gpu=None):
        assert run([*arguments, "--engine", "tensorrt"]) == 3
    assert "no usable NVIDIA GPU" in capsys.readouterr().err
