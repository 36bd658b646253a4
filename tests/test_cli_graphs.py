"""The command line with several graphs in one bundle, and with cuts inside the tower."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from engine_bundles import put_engine
from PIL import Image

from holov_export.bundle import open_bundle
from holov_export.cli import run
from holov_export.runtime.engine_choice import graph_hashes

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def bundle(llava_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("graphs") / "bundle"
    wanted = [
        "--method",
        "holov,scope",
        "--method",
        "cls-topk@0:30,2:7",
        "--set",
        "scope.alpha=0.5",
        "--set",
        "crops=8",
    ]
    assert run(["--model", str(llava_checkpoint), "-o", str(out), *wanted]) == 0
    return out


@pytest.fixture(scope="module")
def photo(tmp_path_factory: pytest.TempPathFactory, photographs: list[Image.Image]) -> Path:
    path = tmp_path_factory.mktemp("photo") / "coffee.jpg"
    photographs[1].save(path)
    return path


def test_the_plan_holds_all_graphs(bundle: Path, capsys: Capture) -> None:
    assert run(["inspect", str(bundle), "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)["plan"]
    assert plan["policy"] == {"method": "holov", "crops": 8, "layout": "strips"}
    scope, cut = plan["also"]
    assert scope == {"policy": {"method": "scope", "alpha": 0.5}, "cuts": []}
    assert cut["policy"]["method"] == "cls-topk"
    assert cut["cuts"] == [{"layer": 0, "keep": 30}, {"layer": 2, "keep": None}]
    assert plan["budget"] == 7, "named by the last graph's schedule"
    assert run(["inspect", str(bundle)]) == 0
    text = capsys.readouterr().out
    assert "cuts at 0:30,2" in text
    assert "alpha=0.5" in text


def test_ask_takes_a_method(bundle: Path, photo: Path, capsys: Capture) -> None:
    answers = {}
    for method in ("holov", "scope", "cls-topk@0:30,2"):
        assert run(["ask", str(bundle), str(photo), "what?", "--method", method, "--budget", "5", "--json"]) == 0
        answers[method] = json.loads(capsys.readouterr().out)
        assert answers[method]["visual_tokens"] == [5]
    assert run(["ask", str(bundle), str(photo), "what?", "--budget", "5", "--json"]) == 0
    usual = json.loads(capsys.readouterr().out)
    assert usual["token_ids"] == answers["holov"]["token_ids"]
    assert run(["ask", str(bundle), str(photo), "what?", "--method", "divprune"]) == 2
    assert "no graph for 'divprune'; it has holov, scope, cls-topk@0:30,2" in capsys.readouterr().err


@pytest.mark.slow
def test_verify_compares_every_graph(bundle: Path, llava_checkpoint: Path, capsys: Capture) -> None:
    assert run(["verify", str(bundle), "--checkpoint", str(llava_checkpoint), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [report["method"], *(item["method"] for item in report["also"])] == ["holov", "scope", "cls-topk@0:30,2"]
    assert report["decoder"] is not None
    assert all(item["decoder"] is None for item in report["also"])
    assert any("drops tokens on the way" in reason for reason in report["also"][1]["skipped"])
    arguments = ["verify", str(bundle), "--checkpoint", str(llava_checkpoint), "--method", "scope", "--json"]
    assert run(arguments) == 0
    alone = json.loads(capsys.readouterr().out)
    assert alone["method"] == "scope"
    assert "also" not in alone


def test_verify_compares_rules_that_keep_cls_and_merge(llava_checkpoint: Path, tmp_path: Path, capsys: Capture) -> None:
    """The CLS token's position is one past transformers' rows, and merged rows are none of them."""
    out = tmp_path / "bundle"
    assert run(["--model", str(llava_checkpoint), "-o", str(out), "--method", "visionzip", "--no-decoder"]) == 0
    capsys.readouterr()
    assert run(["verify", str(out), "--checkpoint", str(llava_checkpoint), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    pairs = {(item["left"], item["right"]) for item in report["comparisons"]}
    assert pairs == {("onnxruntime", "torch fp32"), ("torch fp32", "reference")}
    assert any("merges tokens as 'visionzip' does" in reason for reason in report["skipped"])


def test_inspect_knows_the_engines_of_every_graph(bundle: Path, tmp_path: Path, capsys: Capture) -> None:
    copy = tmp_path / "bundle"
    shutil.copytree(bundle, copy)
    opened = open_bundle(copy)
    put_engine(opened, "h200", *graph_hashes(opened))
    put_engine(opened, "h200-scope", *graph_hashes(opened.of_method("scope")))
    put_engine(opened, "l4", "0" * 64, "")
    assert run(["inspect", str(copy), "--json"]) == 0
    found = {Path(item["engine"]).name: item for item in json.loads(capsys.readouterr().out)["engines"]}
    known = {name: (item["method"], item["fault"] is None) for name, item in found.items()}
    assert known == {"h200": ("holov", True), "h200-scope": ("scope", True), "l4": (None, False)}
    assert run(["inspect", str(copy)]) == 0
    assert capsys.readouterr().out.count("built from another graph") == 1


def test_bench_measures_graphs_side_by_side(bundle: Path, capsys: Capture) -> None:
    quick = ["--repeats", "1", "--alone", "0", "--no-profile", "--threads", "1", "--provider", "cpu", "--budgets", "5"]
    methods = ["--methods", "holov,cls-topk@0:30,2"]
    assert run(["bench", str(bundle), *quick, *methods, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["contestants"]
    assert [item["label"] for item in found] == ["bundle", "bundle, cls-topk@0:30,2"]
    assert [item["method"] for item in found] == ["holov", "cls-topk@0:30,2"]
    assert found[0]["graph_sha256"] != found[1]["graph_sha256"]
    assert run(["bench", str(bundle), *quick, "--methods", "divprune"]) == 2
    assert "no graph for 'divprune'" in capsys.readouterr().err


def test_show_draws_graphs_and_rules(bundle: Path, photo: Path, tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "kept.png"
    methods = "holov,scope,cls-topk@0:30,2,uniform"
    assert run(["show", str(bundle), str(photo), "--methods", methods, "--budget", "9", "-o", str(out)]) == 0
    assert Image.open(out).width > 4 * 480
    assert run(["show", str(bundle), str(photo), "--methods", "divprune", "-o", str(out)]) == 2
    assert "reads features that this bundle does not give" in capsys.readouterr().err


def test_check_and_lower_take_a_method(bundle: Path, tmp_path: Path, capsys: Capture) -> None:
    assert run(["check", str(bundle), "--method", "scope", "--tensorrt", "10.3", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["graph"].endswith("scope")
    assert run(["lower", str(bundle), "--method", "scope", "--tensorrt", "8.6", "-o", str(tmp_path / "low")]) == 0
    assert (tmp_path / "low" / "vision-scope.onnx").is_file()
    assert run(["check", str(bundle), "--method", "divprune"]) == 2
    assert "no graph for 'divprune'" in capsys.readouterr().err


def test_export_says_what_it_found_of_every_graph(llava_checkpoint: Path, tmp_path: Path, capsys: Capture) -> None:
    arguments = ["--model", str(llava_checkpoint), "--no-decoder", "--method", "holov,visionzip"]
    assert run([*arguments, "-o", str(tmp_path / "a")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("visionzip: ") and line.endswith("  ok") for line in lines)
    assert run([*arguments, "-o", str(tmp_path / "b"), "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert made["methods"] == ["holov", "visionzip"]
    assert made["also"]["visionzip"]["parity"]["method"] == "visionzip"
    assert made["also"]["visionzip"]["tensorrt"]["10.3"] is True


def test_compile_plans_a_graph(bundle: Path, capsys: Capture) -> None:
    arguments = ["compile", str(bundle), "--target", "h200", "--dry-run", "--json", "--method", "scope"]
    assert run(arguments) == 0
    made = json.loads(capsys.readouterr().out)
    assert "vision-scope.onnx" in json.dumps(made)
    assert "engines/h200-scope" in json.dumps(made)
    folders = []
    for method in ("holov", "scope"):
        asked = ["--target", "jetson-agx-orin-64gb-jetpack5", "--tensorrt", "8.5.2", "--method", method]
        assert run(["compile", str(bundle), *asked, "--dry-run", "--json"]) == 0
        (plan,) = json.loads(capsys.readouterr().out)["plans"]
        folders.append(plan["commands"][0][-1])
    assert folders == ["bundle-trt8.5.2", "bundle-scope-trt8.5.2"], "each brings the weights"


def test_a_schedule_names_the_usual_budget(llava_checkpoint: Path, tmp_path: Path, capsys: Capture) -> None:
    arguments = ["--model", str(llava_checkpoint), "-o", str(tmp_path / "b"), "--select-layer", "0:30,2:7", "--dry-run"]
    assert run(arguments) == 0
    text = capsys.readouterr().out
    assert "cuts at 0:30,2" in text
    assert "7 tokens of an image" in text


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--method", "scope,nonsense"], "unknown method 'nonsense'"),
        (["--method", "holov", "--set", "scope.alpha=1"], "'scope' is not among the methods"),
        (["--method", "holov,scope", "--set", "alpha=1"], "settings of 'holov' are wrong"),
        (["--select-layer", "7"], "behind the feature layer"),
        (["--method", "holov-official", "--select-layer", "1"], "feature layer only"),
        (["--method", "holov,holov"], "same name"),
        (["--method", "holov,scope@1", "--set", "scope@1.alpha=1"], "leave the @ out"),
        (["--set", "method=scope"], "Name it with --method"),
        (["--method", "holov@1:5,scope@1:6"], "different budgets: 5, 6"),
        (["--select-layer", "0:30,2:40"], "cannot keep more"),
        (["--method", ""], "unknown method ''"),
    ],
)
def test_requests_that_are_refused(arguments: list[str], reason: str, llava_checkpoint: Path, capsys: Capture) -> None:
    assert run(["--model", str(llava_checkpoint), *arguments, "--dry-run"]) == 2
    assert reason in capsys.readouterr().err
