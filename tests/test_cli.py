"""The command line: what it prints where, and which exit code it ends with."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from holov_export import catalog
from holov_export.bundle import Bundle, open_bundle
from holov_export.cli import cli, run
from holov_export.spec import POLICIES


@pytest.fixture(scope="module")
def bundle(llava_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle made by the command line itself, decoder included."""
    out = tmp_path_factory.mktemp("cli") / "bundle"
    assert run(["--model", str(llava_checkpoint), "-o", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def photo(tmp_path_factory: pytest.TempPathFactory, photographs: list[Image.Image]) -> Path:
    path = tmp_path_factory.mktemp("photo") / "chelsea.jpg"
    photographs[2].save(path)
    return path


def test_export_is_the_default_command(
    llava_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--model", str(llava_checkpoint), "--fp16", "--dry-run", "--json"]
    assert run(arguments) == 0
    implicit = json.loads(capsys.readouterr().out)
    assert run(["export", *arguments]) == 0
    assert implicit == json.loads(capsys.readouterr().out)
    assert implicit["plan"]["precision"] == "fp16"
    assert implicit["plan"]["policy"] == {"method": "holov", "crops": 16, "layout": "strips"}
    assert not list(tmp_path.iterdir())


def test_export_prints_parity_and_refuses_to_replace(
    llava_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "bundle"
    arguments = ["--model", str(llava_checkpoint), "-o", str(out), "--no-decoder"]
    assert run([*arguments, "--json"]) == 0
    captured = capsys.readouterr()
    result = json.loads(captured.out)
    assert result["parity"]["comparisons"]
    assert all(item["passed"] for item in result["parity"]["comparisons"])
    assert "export the vision graph" in captured.err
    before = (out / "manifest.json").read_bytes()
    assert run(arguments) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert (out / "manifest.json").read_bytes() == before
    assert run([*arguments, "--overwrite", "--method", "cls-topk"]) == 0
    assert open_bundle(out).manifest.plan.policy.method == "cls-topk"


def test_no_network_and_no_copy_names_the_way_out(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(catalog, "_cached", lambda reference, weights: None)
    monkeypatch.setattr(catalog, "_hub_answers", lambda endpoint: False)
    monkeypatch.chdir(tmp_path)
    assert run(["--model", "llava-1.5-7b", "--fp16"]) == 3
    error = capsys.readouterr().err
    assert "llava-hf/llava-1.5-7b-hf" in error
    assert "--model DIR" in error
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model", "no-such-model"], "unknown model"),
        (["--model", "./no/such/dir"], "not a directory"),
        (["--model", "demo", "--method", "no-such-rule"], "no-such-rule"),
        (["--model", "demo", "--set", "crops"], "KEY=VALUE"),
        (["--model", "demo", "--set", "crops=0"], "crops"),
        (["--model", "demo", "--set", "colour=red"], "It takes: crops, layout"),
        (["--model", "demo", "--no-decoder", "--decoder-precision", "int4"], "exclude"),
        (["no-such-command"], "no-such-command"),
        (["ask"], "Missing argument"),
    ],
)
def test_wrong_usage_ends_with_2(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(arguments) == 2
    captured = capsys.readouterr()
    assert words in captured.err
    assert "Traceback" not in captured.err
    assert not captured.out


def test_ask_streams_to_stdout_and_times_to_stderr(
    bundle: Path, photo: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["ask", str(bundle), str(photo), "what is shown?", "--budget", "7", "--max-new-tokens", "8"]
    assert run(arguments) == 0
    plain = capsys.readouterr()
    assert "7 visual tokens" in plain.err
    assert "TTFT" in plain.err
    assert run([*arguments, "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["text"] == plain.out.removesuffix("\n")
    assert answer["visual_tokens"] == [7]
    assert answer["new_tokens"] <= 8
    assert answer["milliseconds"]["ttft"] > 0


def test_ask_two_images_with_quotas(bundle: Path, photo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["ask", str(bundle), str(photo), str(photo), "what is shown?", "--budget", "9", "--json"]
    assert run([*arguments, "--quota", "9", "--quota", "4", "--max-new-tokens", "2"]) == 0
    assert json.loads(capsys.readouterr().out)["visual_tokens"] == [9, 4]


@pytest.mark.parametrize("budget", ["0", "-3", "65", "1000000000"])
def test_a_budget_out_of_range(bundle: Path, photo: Path, budget: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["ask", str(bundle), str(photo), "what?", "--budget", budget]) == 2
    assert "1..64" in capsys.readouterr().err


def test_bad_requests_to_ask(bundle: Path, photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "not-an-image.jpg"
    text.write_text("hello")
    truncated = tmp_path / "truncated.jpg"
    truncated.write_bytes(photo.read_bytes()[:2000])
    cases = [
        ([str(photo), "what?", "--budget", "8", "--quota", "9"], "quota"),
        ([str(photo), ""], "empty"),
        ([str(photo), "no placeholder", "--raw"], "placeholder"),
        ([str(photo), "<image> and <image>?"], "placeholder"),
        ([str(photo), "what? " * 400], "context"),
        ([str(text), "what?"], "image"),
        ([str(truncated), "what?"], "truncated"),
        ([str(tmp_path / "missing.png"), "what?"], "missing.png"),
    ]
    for arguments, words in cases:
        assert run(["ask", str(bundle), *arguments]) == 2, arguments
        captured = capsys.readouterr()
        assert words in captured.err, (arguments, captured.err)
        assert "Traceback" not in captured.err


def test_show_draws_the_rules_side_by_side(bundle: Path, photo: Path, tmp_path: Path) -> None:
    out = tmp_path / "kept.png"
    arguments = ["show", str(bundle), str(photo), "--budget", "16", "--side", "160", "-o", str(out)]
    assert run([*arguments, "--methods", "holov,cls-topk,uniform"]) == 0
    drawn = np.asarray(Image.open(out).convert("RGB"), dtype=np.int16)
    assert drawn.shape == (190, 4 * 160 + 3 * 12, 3)
    coloured = np.abs(drawn - drawn.mean(-1, keepdims=True)).max(-1) > 2
    for panel in (2, 3):  # without crop borders, only kept tokens have colour
        cells = coloured[30:, panel * 172 : panel * 172 + 160].reshape(8, 20, 8, 20)
        assert (cells.mean((1, 3)) > 0.5).sum() == 16
    assert run([*arguments, "--methods", "holov-paper"]) == 2


def test_inspect_verify_and_the_lists(bundle: Path, llava_checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["inspect", str(bundle), "--json"]) == 0
    manifest = json.loads(capsys.readouterr().out)
    assert {item["path"] for item in manifest["artifacts"]} >= {"vision.onnx", "tokenizer.json", "reports/parity.json"}
    assert str(llava_checkpoint) not in json.dumps(manifest)
    assert run(["verify", str(bundle), "--checkpoint", str(llava_checkpoint), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    pairs = {(item["left"], item["right"]) for item in report["comparisons"]}
    assert ("torch fp32", "transformers") in pairs
    assert ("onnxruntime", "reference") in pairs
    assert all(item["same_sets"] == item["pictures"] for item in report["comparisons"])
    assert run(["methods", "--json"]) == 0
    assert [item["name"] for item in json.loads(capsys.readouterr().out)] == list(POLICIES)
    assert run(["models", "--json"]) == 0
    assert {item["name"] for item in json.loads(capsys.readouterr().out)} == set(catalog.CATALOG)
    assert run(["doctor", "--json"]) == 0
    assert any(item["subject"] == "onnxruntime" for item in json.loads(capsys.readouterr().out))


def test_verify_refuses_another_checkpoint(
    bundle: Path, llava_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    shutil.copytree(llava_checkpoint, other)
    (other / "config.json").write_text((other / "config.json").read_text() + "\n")
    assert run(["verify", str(bundle), "--checkpoint", str(other)]) == 2
    assert "not the checkpoint" in capsys.readouterr().err


def test_a_tampered_bundle_ends_with_1(
    bundle: Path, photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(bundle, copy)
    weights = copy / "vision.onnx.data"
    data = bytearray(weights.read_bytes())
    data[100] ^= 1
    weights.write_bytes(data)
    assert run(["ask", str(copy), str(photo), "what?"]) == 1
    assert "vision.onnx.data" in capsys.readouterr().err


def test_a_folder_that_is_no_bundle(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["inspect", str(tmp_path)]) == 2
    assert "not a bundle" in capsys.readouterr().err


def test_an_internal_error_has_no_traceback(
    monkeypatch: pytest.MonkeyPatch, toy_bundle: Bundle, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(folder: Path) -> None:
        raise RuntimeError("boom")

    monkeypatch.setattr("holov_export.cli.look.open_bundle", broken)
    assert run(["inspect", str(toy_bundle.folder)]) == 1
    error = capsys.readouterr().err
    assert "internal error" in error
    assert "--debug" in error
    assert "Traceback" not in error
    with pytest.raises(RuntimeError):
        run(["inspect", str(toy_bundle.folder)], debug=True)


def test_every_command_and_option_has_help() -> None:
    for name, command in cli.commands.items():
        assert command.help, name
        for parameter in command.params:
            if parameter.param_type_name == "option":
                assert getattr(parameter, "help", None), (name, parameter.name)
