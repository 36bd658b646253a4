"""`check` and `lower` on the command line: what they print, and their exit codes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper
from toys import write_toy_bundle

from holov_export.bundle import Bundle, sha256_of
from holov_export.cli import cli, run
from holov_export.cli.check import check, lower
from holov_export.compile.readiness import VERSIONS
from holov_export.spec import ModelSpec, Precision


@pytest.fixture(autouse=True)
def _registered() -> None:
    for command in (check, lower):
        cli.add_command(command)


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    """An operator that TensorRT 8.5 has not and later ones have."""
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, (2, 3))
    y = helper.make_tensor_value_info("y", TensorProto.BOOL, (2, 3))
    graph = helper.make_graph([helper.make_node("IsInf", ["x"], ["y"], name="is/it")], "broken", [x], [y])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)]), tmp_path / "broken.onnx")
    return tmp_path / "broken.onnx"


def test_a_bundle_is_ready_everywhere(toy_bundle: Bundle, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["check", str(toy_bundle.folder)]) == 0
    text = capsys.readouterr().out
    rows = [line.split() for line in text.splitlines()[1 : len(VERSIONS) + 1]]
    assert tuple(row[0] for row in rows) == VERSIONS
    assert [row[1] for row in rows] == ["ready"] * len(VERSIONS)
    assert "after lowering to opset 17" in text
    assert "not that TensorRT has parsed" in text


def test_json_has_all_of_it(toy_bundle: Bundle, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["check", str(toy_bundle.vision), "--tensorrt", "8.6", "--tensorrt", "11.1", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["ready"] is True
    assert [version["tensorrt"] for version in report["versions"]] == ["8.6", "11.1"]
    assert [version["lowered_to"] for version in report["versions"]] == [17, None]
    assert {finding["rule"] for finding in report["versions"][0]["findings"]} == {"int64-becomes-int32"}


def test_errors_end_with_1_and_are_explained(broken: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["check", str(broken)]) == 1
    text = capsys.readouterr().out
    assert "8.5       not ready" in text
    for word in ("error  operator-unsupported  TensorRT 8.5", "IsInf", "from 8.6 on", "at is/it", "-> ", "https://"):
        assert word in text
    assert "not that TensorRT has parsed" not in text
    assert run(["check", str(broken), "--tensorrt", "8.6"]) == 0  # only what is asked for counts
    assert run(["check", str(broken), "--tensorrt", "8.5", "--json"]) == 1


def test_a_target_names_its_versions(broken: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["check", str(broken), "--target", "jetson-agx-orin-64gb-jetpack5", "--json"]) == 1
    asked = [version["tensorrt"] for version in json.loads(capsys.readouterr().out)["versions"]]
    assert asked
    assert all(version.startswith("8.5") for version in asked)
    assert run(["check", str(broken), "--target", "jetson-agx-orin-64gb"]) == 0


@pytest.mark.parametrize(
    "arguments",
    [
        ["--tensorrt", "8.4"],
        ["--tensorrt", "new"],
        ["--target", "no-such-board"],
        ["--target", "h200", "--tensorrt", "10.3"],
    ],
)
def test_wrong_usage_ends_with_2(broken: Path, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["check", str(broken), *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("holov-export: ")


def test_what_is_no_model_ends_with_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.onnx").write_text("hello")
    for path in (tmp_path, tmp_path / "text.onnx", tmp_path / "missing.onnx"):
        assert run(["check", str(path)]) == 2
        assert "Traceback" not in capsys.readouterr().err


def test_lower_writes_a_graph_for_trtexec(
    exported_bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "for-the-board"
    assert run(["lower", str(exported_bundle.folder), "--target", "jetson-agx-orin-64gb-jetpack5", "-o", str(out)]) == 0
    assert capsys.readouterr().out.strip() == str(out / "vision.onnx")
    onnx.checker.check_model(str(out / "vision.onnx"), full_check=True)
    model = onnx.load(out / "vision.onnx", load_external_data=False)
    assert [item.version for item in model.opset_import] == [17]
    assert "LayerNormalization" not in {node.op_type for node in model.graph.node}
    assert sha256_of(out / "vision.onnx.data") == sha256_of(exported_bundle.folder / "vision.onnx.data")
    assert run(["check", str(out / "vision.onnx"), "--tensorrt", "8.5"]) == 0


def test_lower_refuses(exported_bundle: Bundle, llava_spec: ModelSpec, llava_checkpoint: Path, tmp_path: Path) -> None:
    assert run(["lower", str(exported_bundle.folder), "-o", str(tmp_path / "a")]) == 2  # for which TensorRT?
    assert run(["lower", str(exported_bundle.folder), "--tensorrt", "8.6", "-o", str(exported_bundle.folder)]) == 2
    bf16 = write_toy_bundle(tmp_path / "bf16", llava_spec, llava_checkpoint, precision=Precision.BF16)
    assert run(["lower", str(bf16.folder), "--tensorrt", "8.6", "-o", str(tmp_path / "b")]) == 2
    assert not (tmp_path / "b").exists()
    shutil.copy(exported_bundle.vision, tmp_path / "alone.onnx")
    assert run(["lower", str(tmp_path / "alone.onnx"), "--tensorrt", "8.6", "-o", str(tmp_path / "c")]) == 2


def test_a_version_newer_than_the_rules_is_said_to_be_one(
    toy_bundle: Bundle, capsys: pytest.CaptureFixture[str]
) -> None:
    words = f"The rules know TensorRT up to {VERSIONS[-1]}; "
    assert run(["check", str(toy_bundle.folder), "--tensorrt", "11.9"]) == 0
    assert f"{words}11.9 is judged as that one." in capsys.readouterr().out
    assert run(["check", str(toy_bundle.folder), "--tensorrt", f"{VERSIONS[-1]}.2"]) == 0
    assert words not in capsys.readouterr().out
