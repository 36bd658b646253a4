"""`inspect` of a bundle with engines, `doctor`, and tables on a narrow terminal."""

from __future__ import annotations

import json
import platform
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from engine_bundles import PLAN, put_engine
from rich.console import Console

from holov_export import doctor
from holov_export.bundle import ENGINES, Bundle
from holov_export.cli import run
from holov_export.cli.console import OUT, table
from holov_export.engine import ENGINE, RECORD
from holov_export.runtime.engine_choice import graph_hashes
from holov_export.targets import target_names


@pytest.fixture
def bundle(toy_bundle: Bundle, tmp_path: Path) -> Bundle:
    """A bundle with an engine `h200` of its own graph, made by hand."""
    copy = Bundle(tmp_path / "bundle", toy_bundle.manifest)
    shutil.copytree(toy_bundle.folder, copy.folder)
    put_engine(copy, "h200", *graph_hashes(copy))
    return copy


class TestInspectEngines:
    def test_what_built_it_is_shown(self, bundle: Bundle, capsys: pytest.CaptureFixture[str]) -> None:
        assert run(["inspect", str(bundle.folder)]) == 0
        text = capsys.readouterr().out
        for piece in ("TensorRT 10.13.3, NVIDIA H200 (sm_90)", "batch 1:4:16, budget 1:7:64", "vision.onnx"):
            assert piece in text
        assert f"{bundle.folder / ENGINES / 'h200'}  16 B" in text

    def test_json(self, bundle: Bundle, toy_bundle: Bundle, capsys: pytest.CaptureFixture[str]) -> None:
        assert run(["inspect", str(bundle.folder), "--json"]) == 0
        (found,) = json.loads(capsys.readouterr().out)["engines"]
        assert found["record"]["built_with"]["gpu"] == "NVIDIA H200"
        assert found["fault"] is None
        assert run(["inspect", str(toy_bundle.folder), "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["engines"] == []

    def test_an_engine_of_another_graph_is_said_to_be_one(
        self, bundle: Bundle, capsys: pytest.CaptureFixture[str]
    ) -> None:
        put_engine(bundle, "l4", "0" * 64, "")
        assert run(["inspect", str(bundle.folder)]) == 0
        assert capsys.readouterr().out.count("built from another graph") == 1

    @pytest.mark.parametrize(
        ("content", "said"), [(PLAN[::-1], "differs from its sha256"), (b"", "has 0 bytes"), (None, "is missing")]
    )
    def test_a_damaged_one_is_listed_and_ends_with_1(
        self, bundle: Bundle, content: bytes | None, said: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        plan = bundle.folder / ENGINES / "h200" / ENGINE
        plan.unlink()
        if content is not None:
            plan.write_bytes(content)
        assert run(["inspect", str(bundle.folder), "--json"]) == 1
        found = capsys.readouterr()
        assert said in json.loads(found.out)["engines"][0]["fault"]
        assert said in found.err
        assert "h200" in found.err

    def test_a_record_that_does_not_parse_is_named(self, bundle: Bundle, capsys: pytest.CaptureFixture[str]) -> None:
        path = bundle.folder / ENGINES / "h200" / RECORD
        path.write_text("{")
        assert run(["inspect", str(bundle.folder)]) == 1
        assert str(path) in capsys.readouterr().err


class TestDoctor:
    @staticmethod
    def advice(module: str) -> str:
        (found,) = [item for item in doctor.examine() if item.subject == module]
        assert found.state == "missing"
        return found.advice

    @pytest.fixture(autouse=True)
    def nothing_installed(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setattr(doctor, "is_installed", lambda module: False)
        monkeypatch.setattr(doctor, "_RELEASE_OF_JETSON", tmp_path / "nowhere")

    def test_an_extra_that_would_not_bring_the_package_is_not_advised(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(sys, "version_info", (3, 10, 13))
        monkeypatch.setattr(platform, "machine", lambda: "x86_64")
        assert self.advice("onnxruntime_genai") == "It needs Python 3.11 or newer."
        monkeypatch.setattr(sys, "version_info", (3, 11, 0))
        assert self.advice("onnxruntime_genai") == 'pip install "holov-export[cpu]"'

    def test_tensorrt_comes_with_jetpack(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        assert self.advice("tensorrt") == 'pip install "holov-export[tensorrt]"'
        (tmp_path / "nv_tegra_release").write_text("# R36 (release), REVISION: 4.3\n")
        monkeypatch.setattr(doctor, "_RELEASE_OF_JETSON", tmp_path / "nv_tegra_release")
        assert "python3-libnvinfer" in self.advice("tensorrt")
        assert "pip" not in self.advice("tensorrt")


class TestNarrowTerminals:
    def test_long_words_are_broken_and_not_cut(self, capsys: pytest.CaptureFixture[str]) -> None:
        made = table("name", "throughput of images>")
        made.add_row("a-name-of-more-than-twenty-letters", "17.5")
        Console(width=20).print(made)
        shown = capsys.readouterr().out
        assert "…" not in shown
        left = "".join(line.split("  ")[0].strip() for line in shown.splitlines()[1:])
        assert "a-name-of-more-than-twenty-letters" in left.replace(" ", "")

    def test_targets_fit_into_80_columns(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr(OUT, "width", 80)
        assert run(["targets"]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert [line.split()[0] for line in lines] == ["name", *target_names()]
        assert max(map(len, lines)) <= 80


def test_an_export_that_could_not_be_checked_does_not_begin(
    llava_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def without(module: str) -> list[Any]:
        monkeypatch.setattr("holov_export.pipeline.is_installed", lambda name: name != module)
        monkeypatch.setitem(sys.modules, module, None)
        arguments = ["--model", str(llava_checkpoint), "-o", str(tmp_path / "bundle")]
        return [run(arguments), capsys.readouterr().err]

    for module in ("onnxruntime", "onnxruntime_genai"):
        code, said = without(module)
        assert code == 3
        assert f"'{module}' is not installed" in said
        assert "export the vision graph" not in said
    assert not (tmp_path / "bundle").exists()
