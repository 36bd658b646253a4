"""Exports that go wrong: damaged checkpoints, a full disk, a kill at any point. The old bundle or none."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from holov_export import pipeline
from holov_export.bundle import open_bundle
from holov_export.catalog import Checkpoint, ModelReference
from holov_export.errors import BundleError, CheckpointError, ParityError, StorageError, UnsupportedModelError
from holov_export.pipeline import export_bundle
from holov_export.policies import ClsTopkPolicy, HolovPaperPolicy, HolovPolicy, ScopePolicy, SelectionPolicy
from holov_export.request import ExportRequest
from holov_export.spec import Precision
from holov_export.verify.parity import TOLERANCES

HOLOV = HolovPolicy()


def request(
    checkpoint: Path, output: Path, policy: SelectionPolicy = HOLOV, *, overwrite: bool = False, verify: bool = True
) -> ExportRequest:
    return ExportRequest(str(checkpoint), policy, Precision.FP32, None, output, overwrite, verify)


@pytest.fixture
def copy(llava_checkpoint: Path, tmp_path: Path) -> Path:
    """A checkpoint to damage."""
    folder = tmp_path / "damaged"
    shutil.copytree(llava_checkpoint, folder)
    return folder


def left_behind(folder: Path) -> list[str]:
    """What is in a folder; a folder that was made for a failed export is gone with it."""
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json", "model.safetensors", "preprocessor_config.json"])
def test_a_missing_file_is_named(copy: Path, tmp_path: Path, file: str) -> None:
    (copy / file).unlink()
    if file == "preprocessor_config.json":
        (copy / "processor_config.json").unlink(missing_ok=True)
    out = tmp_path / "out" / "bundle"
    with pytest.raises(CheckpointError):
        export_bundle(request(copy, out))
    assert not out.exists()


def test_a_truncated_checkpoint(copy: Path, tmp_path: Path) -> None:
    weights = copy / "model.safetensors"
    with weights.open("r+b") as stream:
        stream.truncate(weights.stat().st_size // 2)
    with pytest.raises(CheckpointError, match="truncated or damaged"):
        export_bundle(request(copy, tmp_path / "out" / "bundle"))
    assert left_behind(tmp_path / "out") == []


def test_a_pickled_checkpoint_is_refused(copy: Path, tmp_path: Path) -> None:
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="pickled"):
        export_bundle(request(copy, tmp_path / "bundle"))


def test_another_family_is_refused(copy: Path, tmp_path: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "model_type": "qwen2_vl"}))
    with pytest.raises(UnsupportedModelError, match="qwen2_vl"):
        export_bundle(request(copy, tmp_path / "bundle"))


@pytest.mark.parametrize("change", [{"vision_feature_select_strategy": "full"}, {"vision_feature_layer": [-2, -5]}])
def test_a_layout_that_cannot_be_exported_says_so(copy: Path, tmp_path: Path, change: dict[str, object]) -> None:
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(UnsupportedModelError):
        export_bundle(request(copy, tmp_path / "bundle"))


def test_a_config_that_makes_no_sense(copy: Path, tmp_path: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    config["text_config"]["hidden_size"] = "wide"
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="config"):
        export_bundle(request(copy, tmp_path / "bundle"))


def test_config_that_contradicts_the_weights(copy: Path, tmp_path: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    config["vision_config"]["intermediate_size"] += 8
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="shape"):
        export_bundle(request(copy, tmp_path / "bundle"))


def test_a_graph_that_differs_is_not_accepted(
    llava_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from holov_export.verify import vision_parity

    def shifted(*arguments: object) -> object:
        seen = original(*arguments)  # type: ignore[arg-type]
        seen.tokens[...] += 0.1
        return seen

    original = vision_parity.tokens_from_torch
    monkeypatch.setattr(vision_parity, "tokens_from_torch", shifted)
    with pytest.raises(ParityError, match="token error"):
        export_bundle(request(llava_checkpoint, tmp_path / "out" / "bundle"))
    assert left_behind(tmp_path / "out") == []


def test_a_full_disk_leaves_the_old_bundle(
    llava_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "bundle"
    export_bundle(request(llava_checkpoint, out))
    before = (out / "manifest.json").read_bytes()

    def full(folder: Path, work: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(pipeline, "_copy_tokenizer", full)
    with pytest.raises(StorageError, match="disk is full"):
        export_bundle(request(llava_checkpoint, out, ClsTopkPolicy(), overwrite=True))
    assert (out / "manifest.json").read_bytes() == before
    assert open_bundle(out).manifest.plan.policy.method == "holov"
    assert left_behind(tmp_path) == ["bundle"]


def test_a_full_disk_while_weights_are_written(
    llava_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """numpy's tofile, which writes them, raises an OSError without a number."""

    def full(*arguments: object, **named: object) -> None:
        raise OSError("19456 requested and 0 written")

    monkeypatch.setattr("holov_export.export.onnx_from_graph.ir.save", full)
    with pytest.raises(StorageError, match="disk is full"):
        export_bundle(request(llava_checkpoint, tmp_path / "out" / "bundle"))
    assert left_behind(tmp_path / "out") == []


def test_something_else_at_the_output_is_never_touched(llava_checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "precious"
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    with pytest.raises(BundleError, match="not a bundle"):
        export_bundle(request(llava_checkpoint, out, overwrite=True))
    assert (out / "thesis.txt").read_text() == "years of work"


KILLED = """
import os, signal, sys
from pathlib import Path
from holov_export import pipeline, storage
from holov_export.policies import ClsTopkPolicy
from holov_export.spec import Precision

def dies(module, name, after):
    original = getattr(module, name)
    def wrapped(*arguments, **named):
        if after:
            original(*arguments, **named)
        os.kill(os.getpid(), signal.SIGKILL)
    setattr(module, name, wrapped)

place, after = sys.argv[3].split(":")
module, name = place.split(".")
dies({"pipeline": pipeline, "storage": storage}[module], name, after == "after")
pipeline.export_bundle(pipeline.ExportRequest(
    sys.argv[1], ClsTopkPolicy(), Precision.FP32, None, Path(sys.argv[2]), True, False))
"""


@pytest.mark.parametrize(
    "point",
    [
        "pipeline._write_vision:before",
        "pipeline._write_vision:after",
        "pipeline._copy_tokenizer:after",
        "pipeline.write_manifest:before",
        "pipeline.write_manifest:after",
        "storage._replace:before",
        "storage._exchange:after",
    ],
)
def test_killed_at_any_point(llava_checkpoint: Path, tmp_path: Path, old_bundle: Path, point: str) -> None:
    """SIGKILL in the middle of an export over an old bundle: afterwards there is the old one or the new one, whole."""
    out = tmp_path / "bundle"
    shutil.copytree(old_bundle, out)
    ended = subprocess.run([sys.executable, "-c", KILLED, str(llava_checkpoint), str(out), point], check=False)
    assert ended.returncode == -signal.SIGKILL
    method = open_bundle(out).manifest.plan.policy.method
    assert method == ("cls-topk" if point == "storage._exchange:after" else "holov")


def test_the_next_export_sweeps_what_a_killed_one_left(
    llava_checkpoint: Path, tmp_path: Path, old_bundle: Path
) -> None:
    out = tmp_path / "bundle"
    point = "pipeline.write_manifest:after"
    subprocess.run([sys.executable, "-c", KILLED, str(llava_checkpoint), str(out), point], check=False)
    assert not out.exists()
    assert any(name.startswith(".bundle.partial-") for name in left_behind(tmp_path))
    export_bundle(request(llava_checkpoint, out, verify=False))
    assert left_behind(tmp_path) == ["bundle"]


@pytest.fixture(scope="module")
def old_bundle(llava_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("old") / "bundle"
    export_bundle(request(llava_checkpoint, out, verify=False))
    return out


@pytest.mark.parametrize("precision", [Precision.FP16, Precision.BF16])
def test_lower_precisions_are_run_and_compared(llava_checkpoint: Path, tmp_path: Path, precision: Precision) -> None:
    out = tmp_path / precision.value
    bundle, report = export_bundle(ExportRequest(str(llava_checkpoint), HOLOV, precision, None, out))
    assert bundle.manifest.inputs[0].dtype == precision.dtype
    assert bundle.manifest.plan.opset == (22 if precision is Precision.BF16 else 18)
    assert report is not None
    graph = "onnxruntime, widened" if precision is Precision.BF16 else "onnxruntime"
    pairs = [(item.left, item.right) for item in report.comparisons]
    assert pairs == [(graph, "reference"), (graph, "torch fp32")] * 3
    errors = [item.token_error for item in report.comparisons if item.right == "torch fp32"]
    assert 1e-6 < max(errors) < TOLERANCES[precision].tokens
    assert left_behind(tmp_path) == [precision.value]


@pytest.mark.parametrize("policy", [HolovPaperPolicy(crops=4), ScopePolicy()], ids=lambda policy: policy.method)
def test_a_rule_that_reads_features_is_compared_with_its_reference(
    llava_checkpoint: Path, tmp_path: Path, policy: SelectionPolicy
) -> None:
    _, report = export_bundle(request(llava_checkpoint, tmp_path / "bundle", policy))
    assert report is not None
    assert [(item.left, item.right) for item in report.comparisons] == [
        ("onnxruntime", "torch fp32"),
        ("torch fp32", "reference"),
    ] * 3
    assert not report.skipped


def test_nothing_is_fetched_before_the_request_is_refused(
    llava_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An output that exists is refused with the configuration files alone."""
    asked: list[bool] = []
    original = pipeline.checkpoint_from_reference

    def counted(reference: ModelReference, *, weights: bool = True) -> Checkpoint:
        asked.append(weights)
        return original(reference, weights=weights)

    for module in ("pipeline", "request"):
        monkeypatch.setattr(f"holov_export.{module}.checkpoint_from_reference", counted)
    out = tmp_path / "bundle"
    out.mkdir()
    (out / "something").touch()
    with pytest.raises(BundleError):
        export_bundle(request(llava_checkpoint, out))
    assert asked == [False]
