"""`holov-export compile --decoder`: what is printed, what is written, what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from holov_export.bundle import Bundle
from holov_export.cli import run
from holov_export.decoder_files import decoder_folder, read_decoder, verify_decoder

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def without_examples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRTLLM_EXAMPLES", raising=False)


def compiled(bundle: Bundle, checkpoint: Path, *arguments: str) -> int:
    return run(["compile", str(bundle.folder), "--checkpoint", str(checkpoint), *arguments])


@pytest.mark.usefixtures("without_examples")
class TestTrtllm:
    def test_a_dry_run_prints_sizes_and_commands(
        self, exported_bundle: Bundle, llava_checkpoint: Path, capsys: Capture
    ) -> None:
        asked = ["--batch", "4", "--images", "2", "--budget", "9", "--text-tokens", "100", "--max-new-tokens", "20"]
        assert compiled(exported_bundle, llava_checkpoint, "--decoder", "trtllm", "--dry-run", *asked) == 0
        out = capsys.readouterr().out
        assert "--max_batch_size 4" in out
        assert "--max_multimodal_len 72" in out  # 4 requests of 2 images of 9 tokens
        assert "--max_input_len 118" in out
        assert "--max_seq_len 138" in out
        assert "convert_checkpoint.py" in out
        assert not decoder_folder(exported_bundle.folder, "trtllm").exists()

    def test_it_is_json_for_programs(self, exported_bundle: Bundle, llava_checkpoint: Path, capsys: Capture) -> None:
        asked = ["--text-tokens", "100", "--max-new-tokens", "20", "--tensor-parallel", "2"]
        assert compiled(exported_bundle, llava_checkpoint, "--decoder=trtllm", "--dry-run", "--json", *asked) == 0
        plan = json.loads(capsys.readouterr().out)["plan"]
        assert plan["sizes"]["budget"] == 7  # a ninth of 64
        assert plan["commands"][0][-2:] == ["--tp_size", "2"]

    def test_without_tensorrt_llm_it_says_what_is_missing(
        self, exported_bundle: Bundle, llava_checkpoint: Path, capsys: Capture
    ) -> None:
        asked = ["--text-tokens", "100", "--max-new-tokens", "20"]
        assert compiled(exported_bundle, llava_checkpoint, "--decoder", "trtllm", *asked) == 3
        error = capsys.readouterr().err
        assert "trtllm-build" in error  # the commands, for a container that has it
        assert "was not found" in error


def test_a_gguf_file_lies_beside_the_manifest(exported_bundle: Bundle, llava_checkpoint: Path, capsys: Capture) -> None:
    assert compiled(exported_bundle, llava_checkpoint, "--decoder", "llamacpp") == 0
    folder = decoder_folder(exported_bundle.folder, "llamacpp")
    assert str(folder) in capsys.readouterr().out
    decoder = read_decoder(folder, "llamacpp")
    verify_decoder(decoder)
    assert decoder.main.read_bytes()[:4] == b"GGUF"
    spec = exported_bundle.manifest.plan.model.decoder
    assert (decoder.record.width, decoder.record.vocab_size) == (spec.width, spec.vocab_size)
    assert decoder.record.weights == "f16"


@pytest.mark.parametrize(
    ("arguments", "code", "why"),
    [
        (["--decoder", "sglang"], 2, "'sglang' is not one of"),
        (["--decoder", "llamacpp", "--dry-run"], 2, "--dry-run is for --decoder trtllm only"),
        (["--decoder", "llamacpp", "--weights", "q3"], 2, "q3"),
        (["--decoder", "trtllm", "--weights", "q4_0", "--text-tokens", "9", "--dry-run"], 2, "unknown weights 'q4_0'"),
        (["--decoder", "trtllm", "--budget", "65", "--dry-run"], 2, "65"),
        (["--decoder", "llamacpp", "--target", "l4"], 2, "--kv-cache and --target are for --decoder trtllm only"),
        (["--decoder", "llamacpp", "--kv-cache", "int8"], 2, "--kv-cache and --target are for --decoder trtllm only"),
        (["--decoder", "llamacpp", "--workspace", "9"], 2, "No such option"),
        (["--decoder", "trtllm", "--target", "orin", "--text-tokens", "9", "--dry-run"], 2, "unknown target 'orin'"),
        (
            [
                "--decoder",
                "trtllm",
                "--weights",
                "fp8",
                "--target",
                "jetson-agx-orin-64gb",
                "--text-tokens",
                "9",
                "--max-new-tokens",
                "9",
                "--dry-run",
            ],
            2,
            "begin with compute capability 8.9",
        ),
    ],
)
def test_refusals(
    exported_bundle: Bundle, llava_checkpoint: Path, arguments: list[str], code: int, why: str, capsys: Capture
) -> None:
    assert compiled(exported_bundle, llava_checkpoint, *arguments) == code
    assert why in capsys.readouterr().err


def test_a_checkpoint_must_be_named(exported_bundle: Bundle, capsys: Capture) -> None:
    assert run(["compile", str(exported_bundle.folder), "--decoder", "llamacpp"]) == 2
    assert "Name the checkpoint" in capsys.readouterr().err


def test_the_wrong_checkpoint_is_refused(exported_bundle: Bundle, tmp_path: Path, capsys: Capture) -> None:
    assert compiled(exported_bundle, tmp_path, "--decoder", "llamacpp") == 2
    assert capsys.readouterr().err
