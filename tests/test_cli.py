"""The command line: what it prints where, and which exit code it ends with."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

import numpy as np
import pytest
from PIL import Image

from holov_export import catalog
from holov_export.bundle import Bundle, open_bundle
from holov_export.cli import cli, run
from holov_export.cli.console import progress
from holov_export.policies import POLICIES


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
    listed = json.loads(capsys.readouterr().out)
    assert [item["name"] for item in listed if item["exported"]] == list(POLICIES)
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


@pytest.mark.parametrize("name", ["bf[v2]", "b[/v2]", "[red]b", ":smile:", "b>", "b" * 240])
def test_a_folder_may_have_any_name(
    toy_bundle: Bundle, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / name
    shutil.copytree(toy_bundle.folder, folder)
    if "/" in name:
        assert folder.parent.name == "b["
    assert run(["inspect", str(folder)]) == 0
    assert capsys.readouterr().out.splitlines()[0].split() == ["bundle", str(folder)]
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    manifest["plan"]["model"]["name"] = name
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    assert run(["inspect", str(folder)]) == 0
    assert capsys.readouterr().out.splitlines()[1].startswith(f"model       {name} (local: ")


def test_progress_may_hold_brackets(capsys: pytest.CaptureFixture[str]) -> None:
    with progress() as tell:
        tell("compare on b[/v2] :smile:")
    assert "compare on b[/v2] :smile:" in capsys.readouterr().err


def python(code: str, **settings: object) -> subprocess.Popen[bytes]:
    path = os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])
    return subprocess.Popen(  # type: ignore[call-overload,no-any-return]
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path}, stderr=subprocess.PIPE, **settings
    )


@pytest.mark.parametrize(
    "arguments", [["inspect", "BUNDLE"], ["inspect", "BUNDLE", "--json"], ["models"], ["methods", "--json"], ["--help"]]
)
def test_a_reader_that_leaves_is_no_error(toy_bundle: Bundle, arguments: list[str]) -> None:
    arguments = [str(toy_bundle.folder) if item == "BUNDLE" else item for item in arguments]
    reading, writing = os.pipe()
    os.close(reading)
    with python(f"from holov_export.cli import main; main({arguments!r})", stdout=writing) as process:
        os.close(writing)
        _, error = process.communicate(timeout=120)
    assert (process.returncode, error) == (0, b"")


def test_progress_without_a_reader_does_not_end_the_work(tmp_path: Path) -> None:
    code = f"""
import sys
from pathlib import Path
from holov_export.cli.console import progress, say
sys.stdin.read()
with progress() as tell:
    for step in range(9):
        tell(f"step {{step}}")
say("done")
Path({str(tmp_path / "done")!r}).touch()
"""
    with python(code, stdin=subprocess.PIPE) as process:
        assert process.stderr and process.stdin
        process.stderr.close()
        process.stdin.close()
        assert process.wait(timeout=120) == 0
    assert (tmp_path / "done").exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
@pytest.mark.parametrize("arguments", [["models"], ["models", "--json"]])
def test_a_full_disk_behind_stdout(arguments: list[str]) -> None:
    with (
        Path("/dev/full").open("w") as full,
        python(f"from holov_export.cli import main; main({arguments!r})", stdout=full) as process,
    ):
        _, error = process.communicate(timeout=120)
    assert process.returncode == 3
    assert os.strerror(errno.ENOSPC).encode() in error
    assert b"Traceback" not in error
    assert b"Exception ignored" not in error


def test_a_file_that_may_not_be_read(
    monkeypatch: pytest.MonkeyPatch, toy_bundle: Bundle, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*arguments: object, **settings: object) -> NoReturn:
        raise PermissionError(errno.EACCES, "Permission denied", "/secret/model.safetensors")

    monkeypatch.setattr("holov_export.cli.look.open_bundle", refuse)
    assert run(["inspect", str(toy_bundle.folder)]) == 3
    assert capsys.readouterr().err == "holov-export: Permission denied: '/secret/model.safetensors'.\n"


@pytest.mark.parametrize(
    ("output", "words"),
    [
        ("kept", "does not end like a picture"),
        ("kept.xyz", "does not end like a picture"),
        ("kept.xbm", "does not end like a picture"),
        ("no/such/kept.png", "is not a folder"),
        ("folder.png", "is a folder"),
    ],
)
def test_show_refuses_an_output_before_anything_runs(
    photo: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    output: str,
    words: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.png").mkdir()
    monkeypatch.setattr("holov_export.cli.ask.read_manifest", lambda folder: pytest.fail("something ran"))
    assert run(["show", "bundle", str(photo), "-o", output]) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("suffix", [".png", ".JPG", ".webp"])
def test_show_writes_what_the_ending_says(toy_bundle: Bundle, photo: Path, tmp_path: Path, suffix: str) -> None:
    out = tmp_path / f"kept{suffix}"
    assert run(["show", str(toy_bundle.folder), str(photo), "--side", "64", "-o", str(out)]) == 0
    assert Image.open(out).format == {".png": "PNG", ".JPG": "JPEG", ".webp": "WEBP"}[suffix]


def test_the_home_folder_is_found(
    toy_bundle: Bundle,
    photo: Path,
    llava_checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copytree(toy_bundle.folder, tmp_path / "bundle")
    shutil.copy(photo, tmp_path / "photo.jpg")
    assert run(["inspect", "~/bundle"]) == 0
    assert run(["show", "~/bundle", "~/photo.jpg", "--side", "64", "--output=~/kept.png"]) == 0
    assert (tmp_path / "kept.png").is_file()
    capsys.readouterr()
    for option in (["--output=~/made"], ["-o", "~/made"]):
        assert run(["--model", str(llava_checkpoint), "--dry-run", "--json", *option]) == 0
        assert json.loads(capsys.readouterr().out)["output"] == str(tmp_path / "made")
    assert run(["ask", "~/bundle", "~/missing.jpg", "~/what is this?"]) == 2
    assert str(tmp_path / "missing.jpg") in capsys.readouterr().err
    assert run(["verify", "~/bundle", "--image", "~/missing.jpg"]) == 2
    assert str(tmp_path / "missing.jpg") in capsys.readouterr().err


def test_checkpoint_is_for_decoders_that_load_it(
    bundle: Path, photo: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        "holov_export.cli.decoder_options.checkpoint_of", lambda *arguments: pytest.fail("was resolved")
    )
    for arguments in (["--checkpoint", "llava-1.5-7b"], ["--decoder", "genai", "--checkpoint", "no-such"]):
        assert run(["ask", str(bundle), str(photo), "what?", *arguments]) == 2
        assert "--checkpoint is for --decoder hf or vllm or trtllm-api only" in capsys.readouterr().err


def test_hf_answers_from_the_exported_checkpoint_only(
    bundle: Path, photo: Path, llava_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["ask", str(bundle), str(photo), "what is shown?", "--max-new-tokens", "4", "--json"]
    assert run(arguments) == 0
    embedded = json.loads(capsys.readouterr().out)
    assert run([*arguments, "--decoder", "hf", "--checkpoint", str(llava_checkpoint)]) == 0
    assert json.loads(capsys.readouterr().out)["token_ids"] == embedded["token_ids"]
    assert run([*arguments, "--decoder", "hf"]) == 2
    assert "--checkpoint" in capsys.readouterr().err
    other = tmp_path / "other"
    shutil.copytree(llava_checkpoint, other)
    (other / "config.json").write_text((other / "config.json").read_text() + "\n")
    assert run([*arguments, "--decoder", "hf", "--checkpoint", str(other)]) == 2
    assert "not the checkpoint" in capsys.readouterr().err


def test_hf_finds_the_demo_checkpoint(photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--model", "demo", "--no-decoder", "--no-verify", "-o", str(tmp_path / "demo")]) == 0
    capsys.readouterr()
    assert run(["ask", str(tmp_path / "demo"), str(photo), "what?", "--decoder", "hf", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["visual_tokens"] == [16]


@pytest.mark.parametrize("command", ["ask", "show"])
def test_verify_size_reads_no_hashes(
    answering_bundle: Bundle, photo: Path, tmp_path: Path, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = [command, str(answering_bundle.folder), str(photo)]
    arguments += ["what?", "--max-new-tokens", "1"] if command == "ask" else ["-o", str(tmp_path / "kept.png")]
    assert run([*arguments, "--verify", "full"]) == 0
    monkeypatch.setattr("holov_export.bundle.sha256_of", lambda path: pytest.fail("a file was hashed"))
    assert run([*arguments, "--verify", "size"]) == 0
    assert run([*arguments, "--verify", "none"]) == 2


@pytest.mark.parametrize(
    ("command", "arguments", "words"),
    [
        ("ask", ["PHOTO", "what?", "--budget", "65"], "1..64"),
        ("ask", ["PHOTO", "what?", "--quota", "3", "--quota", "4"], "2 quotas for 1 image"),
        ("ask", ["PHOTO", "what?", "--budget", "4", "--quota", "5"], "quota of image 1"),
        ("ask", ["PHOTO", "missing.png", "what?"], "missing.png"),
        ("ask", ["PHOTO", "what?", "--top-p", "0"], "top_p"),
        ("show", ["PHOTO", "--budget", "0"], "1..64"),
        ("show", ["missing.png"], "missing.png"),
        ("show", ["PHOTO", "--methods", "holov,no-such"], "no-such"),
    ],
)
def test_a_wrong_request_is_refused_before_files_are_hashed(
    toy_bundle: Bundle,
    photo: Path,
    command: str,
    arguments: list[str],
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("holov_export.cli.ask.open_bundle", lambda *given, **settings: pytest.fail("it was opened"))
    arguments = [str(photo) if item == "PHOTO" else item for item in arguments]
    assert run([command, str(toy_bundle.folder), *arguments]) == 2
    assert words in capsys.readouterr().err


def test_every_command_and_option_has_help() -> None:
    for name, command in cli.commands.items():
        assert command.help, name
        for parameter in command.params:
            if parameter.param_type_name == "option":
                assert getattr(parameter, "help", None), (name, parameter.name)
