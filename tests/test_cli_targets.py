"""`targets` and `estimate` on the command line: what they print where, and what they refuse."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import click
import pytest

from holov_export.bundle import Bundle
from holov_export.catalog import CATALOG
from holov_export.cli.targets import estimate_command, targets
from holov_export.errors import BudgetError, UnknownNameError, UsageError
from holov_export.targets import target_names

ENGINES = Path(__file__).resolve().parent.parent / "engines"
ORIN = "jetson-agx-orin-64gb"


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]) -> Any:
    """Run a command and return its stdout."""

    def run(command: click.Command, *arguments: str | Path) -> str:
        command.main([str(item) for item in arguments], standalone_mode=False)
        return capsys.readouterr().out

    return run


class TestTargets:
    def test_the_table_has_every_target(self, said: Any) -> None:
        lines = said(targets).splitlines()
        assert [line.split()[0] for line in lines[1:]] == list(target_names())
        (row,) = [line for line in lines if line.startswith(f"{ORIN} ")]
        assert row.split() == [ORIN, "87", "64", "204.8", "42.6", "10.3"]

    def test_json_has_every_field(self, said: Any) -> None:
        found = json.loads(said(targets, "--json"))
        assert [item["name"] for item in found] == list(target_names())
        assert json.loads(said(targets, ORIN, "--json")) == next(item for item in found if item["name"] == ORIN)
        assert found[0]["sources"][0].keys() == {"what", "url", "document", "checked", "date"}

    def test_one_target_with_its_sources(self, said: Any) -> None:
        text = said(targets, "jetson-orin-nano-8gb")
        for piece in ("8.7 (sm_87), 8 multiprocessors", "6.2, Python 3.10", "MAXN_SUPER, 25W, 15W", "1:1/9:all"):
            assert piece in text
        assert "read 2026-11-21: https://" in text
        assert "unverified 2026-11-21: " in text
        assert "shared by CPU and GPU" in text

    def test_notes_are_shown(self, said: Any) -> None:
        assert "this package needs 3.10" in said(targets, f"{ORIN}-jetpack5")

    def test_a_graphics_card_has_no_jetpack(self, said: Any) -> None:
        lines = said(targets, "h200").splitlines()
        assert next(line for line in lines if line.startswith("JetPack")).split() == ["JetPack", "-"]

    def test_a_file_of_ones_own(self, said: Any, tmp_path: Path) -> None:
        text = (ENGINES / f"{ORIN}.toml").read_text(encoding="utf-8")
        text = text.replace(f'name = "{ORIN}"', 'name = "mine"') + "\n[flags]\nrefit = true\n"
        (tmp_path / "b.toml").write_text(text, encoding="utf-8")
        shown = said(targets, tmp_path / "b.toml")
        assert shown.startswith("mine ")
        assert "refit=True" in shown

    def test_an_unknown_name(self, said: Any) -> None:
        with pytest.raises(UnknownNameError, match="unknown target 'h20'"):
            said(targets, "h20")


class TestEstimate:
    def test_llava_needs_no_files(self, said: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setenv("HF_HOME", str(tmp_path))
        text = said(estimate_command, "llava-1.5-7b", "--target", ORIN, "--budget", "100")
        assert text.startswith("llava-1.5-7b on NVIDIA Jetson AGX Orin 64GB: an estimate, not a measurement\n")
        rows = [line.split() for line in text.splitlines() if line.endswith("fits")]
        assert [row[:2] for row in rows] == [["576", "100%"], ["192", "33%"], ["100", "17%"], ["64", "11%"]]
        assert "fits: " in text
        assert "- nothing of this was measured on the target" in text
        assert "vision fp16, decoder fp16, batch 1, 32 text tokens, room for 4096" in text

    def test_the_catalogue_and_the_shapes_agree(self, said: Any) -> None:
        found = json.loads(said(estimate_command, "llava-1.5-7b", "--target", "h200", "--json"))
        assert found["rows"][0]["budget"] == CATALOG["llava-1.5-7b"].tokens

    def test_json_says_the_same(self, said: Any) -> None:
        line = ("llava-1.5-7b", "--target", "jetson-orin-nano-8gb", "--decoder-precision", "int4")
        found = json.loads(said(estimate_command, *line, "--json"))
        assert found["fits"] is False
        text = said(estimate_command, *line)
        assert f"it would with --context {found['context_that_fits']}" in text
        assert text.count("TOO MUCH") == 3
        first = found["rows"][0]
        assert f"{first['prefill_ms']:.1f}" in text
        assert first["memory_bytes"] == sum(first["memory"].values())
        fitting = said(estimate_command, *line, "--context", str(found["context_that_fits"]))
        assert "TOO MUCH" not in fitting

    def test_what_no_context_would_save(self, said: Any) -> None:
        line = ("llava-1.5-7b", "--target", "jetson-orin-nano-8gb")
        text = said(estimate_command, *line)
        assert "whatever the context; try --decoder-precision int4\n" in text
        assert "whatever the context; try --decoder-precision int4, a smaller --batch" in said(
            estimate_command, *line, "--batch", "64"
        )
        assert "whatever the context; try a smaller --batch" in said(
            estimate_command, *line, "--batch", "64", "--decoder-precision", "int4"
        )

    def test_batch_and_text_count(self, said: Any) -> None:
        line = ("llava-1.5-7b", "--target", ORIN, "--json")
        one = json.loads(said(estimate_command, *line))
        more = json.loads(said(estimate_command, *line, "--batch", "8", "--text-tokens", "500"))
        assert more["rows"][0]["prefill_ms"] > 8 * one["rows"][0]["prefill_ms"]
        assert more["rows"][0]["decode_tokens_per_s"] > one["rows"][0]["decode_tokens_per_s"]
        assert more["rows"][0]["memory"]["kv_cache"] == 8 * one["rows"][0]["memory"]["kv_cache"]

    def test_a_bundle_brings_shape_and_precisions(self, said: Any, toy_bundle: Bundle) -> None:
        plan = toy_bundle.manifest.plan
        found = json.loads(said(estimate_command, toy_bundle.folder, "--target", ORIN, "--text-tokens", "4", "--json"))
        assert found["model"] == plan.model.name
        assert found["precision"] == plan.precision.value
        assert found["rows"][0]["budget"] == plan.model.vision.tokens
        assert found["context"] == plan.model.decoder.context
        other = said(estimate_command, toy_bundle.folder, "--target", ORIN, "--precision", "int8", "--json")
        assert json.loads(other)["precision"] == "int8"

    def test_a_checkpoint_directory(self, said: Any, llava_checkpoint: Path, tmp_path: Path) -> None:
        folder = tmp_path / "configuration-only"
        folder.mkdir()
        for path in llava_checkpoint.iterdir():
            if path.suffix != ".safetensors":
                shutil.copy(path, folder)
        found = json.loads(said(estimate_command, folder, "--target", ORIN, "--json"))
        assert found["model"] == "configuration-only"
        assert found["rows"][0]["budget"] == 64

    def test_the_demo_model(self, said: Any) -> None:
        assert "demo on " in said(estimate_command, "demo", "--target", ORIN)

    @pytest.mark.parametrize(
        ("arguments", "error", "problem"),
        [
            (("llava-1.5-7b", "--target", "h20"), UnknownNameError, "unknown target"),
            (("llava-9", "--target", ORIN), UnknownNameError, "unknown model 'llava-9'"),
            (("", "--target", ORIN), UnknownNameError, "unknown model ''"),
            (("a" * 5000, "--target", ORIN), UnknownNameError, "unknown model 'aaa"),
            (("llava-1.5-7b", "--target", ORIN, "--precision", "fp8"), UsageError, "cannot be fp8"),
            (("llava-1.5-7b", "--target", ORIN, "--budget", "577"), BudgetError, "outside 1..576"),
            (("llava-1.5-7b", "--target", ORIN, "--context", "100"), UsageError, "exceeds the context"),
        ],
    )
    def test_what_is_refused_ends_with_2(
        self, said: Any, arguments: tuple[str, ...], error: type[UsageError], problem: str
    ) -> None:
        with pytest.raises(error, match=problem) as caught:
            said(estimate_command, *arguments)
        assert caught.value.exit_code == 2

    @pytest.mark.parametrize("option", [("--batch", "0"), ("--precision", "fp4"), ("--context", "no")])
    def test_values_that_click_refuses(self, said: Any, option: tuple[str, str]) -> None:
        with pytest.raises(click.UsageError):
            said(estimate_command, "llava-1.5-7b", "--target", ORIN, *option)
