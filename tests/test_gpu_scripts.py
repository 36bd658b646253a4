"""scripts/gpu: rehearsed on a CPU and against a stand-in of TensorRT, so that nothing is left to find out on a GPU."""

from __future__ import annotations

import json
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorrt_standin
from tensorrt_standin import FakeGpu

from holov_export.bundle import Bundle
from holov_export.spec import Precision
from holov_export.tensors import VisualTokens
from holov_export.verify.baselines import baseline_of

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ROOT / "scripts" / "gpu"


@pytest.fixture(autouse=True)
def on_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    monkeypatch.syspath_prepend(str(SCRIPTS))


@pytest.fixture(scope="module")
def bundles(exported_bundle: Bundle, llava_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A pruned and a plain bundle to build engines in."""
    import shutil

    work = tmp_path_factory.mktemp("gpu")
    pruned = Path(shutil.copytree(exported_bundle.folder, work / "holov"))
    plain = baseline_of(exported_bundle, llava_checkpoint, work / "plain").folder
    return [plain, pruned]  # in the wrong order on purpose


@pytest.fixture(scope="module")
def reference(exported_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    sys.path[:0] = [str(SCRIPTS), str(ROOT / "scripts")]
    try:
        from prepare import write_reference
    finally:
        del sys.path[:2]
    path = tmp_path_factory.mktemp("reference") / "reference.npz"
    said = write_reference(exported_bundle, path, 3, (64, 7))
    assert (said["pictures"], said["budgets"]) == (3, [64, 7])
    return path


def options_for(bundles: list[Path], reference: Path | None, out: Path, **other: Any) -> Namespace:
    """What `measure` is asked for, small."""
    said = {
        "keep": False,
        "here": True,
        "memory": "auto",
        "level": None,
        "profile": [],
        "prefer": False,
        "seconds": 0.02,
        "budgets": (64, 7),
    }
    said |= {"bundles": bundles, "reference": [reference] if reference else [], "target": "h200", "json": out}
    return Namespace(**{**said, "batches": (1, 2), "callers": (1, 2), **other})


@pytest.fixture(scope="module", params=["8.6.0", "10.13.3"])
def found(
    request: pytest.FixtureRequest, bundles: list[Path], reference: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """What a whole run of `measure` writes."""
    sys.path[:0] = [str(SCRIPTS), str(ROOT / "scripts")]
    try:
        with tensorrt_standin.installed(request.param, gpu=FakeGpu()):
            import measure
            from steps import Steps

            steps = Steps(tmp_path_factory.mktemp("measured") / "out.json", 10)
            measure.measure(steps, options_for(bundles, reference, steps.path))
    finally:
        del sys.path[:2]
    assert steps.failed == []
    written: dict[str, Any] = json.loads(steps.path.read_text(encoding="utf-8"))
    return written


class TestSteps:
    def steps(self, tmp_path: Path, minutes: float = 1.0) -> Any:
        from steps import Steps

        return Steps(tmp_path / "deep" / "out.json", minutes)

    def written(self, tmp_path: Path) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((tmp_path / "deep" / "out.json").read_text(encoding="utf-8"))
        return found

    def test_a_failure_is_noted_and_the_next_step_runs(self, tmp_path: Path) -> None:
        steps = self.steps(tmp_path)

        def fail() -> None:
            raise KeyError("gone")

        assert steps.run("first", fail) is None
        assert self.written(tmp_path)["steps"][0]["outcome"] == "failed"  # written at once
        assert steps.run("second", lambda: 7) == 7
        first, second = self.written(tmp_path)["steps"]
        assert (first["reason"], first["where"][-1]) == ("KeyError: 'gone'", "fail")
        assert second["outcome"] == "done"
        assert [entry["step"] for entry in steps.failed] == ["first"]

    def test_what_would_not_end_in_time_is_not_begun(self, tmp_path: Path) -> None:
        steps = self.steps(tmp_path, minutes=0.5)
        ran: list[str] = []
        steps.run("long", lambda: ran.append("long"), needs=60)
        steps.run("short", lambda: ran.append("short"), needs=1)
        assert ran == ["short"]
        assert self.written(tmp_path)["steps"][0]["outcome"] == "skipped"

    def test_an_interrupted_run_leaves_what_it_has(self, tmp_path: Path) -> None:
        steps = self.steps(tmp_path)

        def interrupt() -> None:
            steps.found["half"] = 1
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            steps.run("first", interrupt)
        found = self.written(tmp_path)
        assert (found["half"], found["steps"][0]["outcome"]) == (1, "interrupted")
        assert not list((tmp_path / "deep").glob("*.part"))

    def test_the_file_names_the_machine_and_no_path(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(sys, "argv", [str(SCRIPTS / "measure.py"), str(tmp_path / "bundle"), "--minutes", "1"])
        self.steps(tmp_path).write()
        found = self.written(tmp_path)
        assert found["command"] == "scripts/gpu/measure bundle --minutes 1"
        assert found["machine"]["cpu"]


class TestMeasure:
    def test_a_whole_run(self, found: dict[str, Any]) -> None:
        assert [(item["bundle"], item["method"]) for item in found["builds"]] == [("holov", "holov"), ("plain", "none")]
        assert all(item["layers"] and item["bytes"] and item["built_with"]["gpu"] for item in found["builds"])
        assert {(item["batch"], item["budget"]) for item in found["parity"]} == {
            (b, k) for b in (1, 2) for k in (64, 7)
        }
        assert all(item["kept_in_common"] == 1.0 and item["passed"] for item in found["parity"])
        assert len(found["shapes"]) > 20 and not any(item["wrong"] for item in found["shapes"])
        assert [report["cases"][0]["batch"] for report in found["bench"]] == [1, 2]
        labels = [info["label"] for info in found["bench"][0]["contestants"]]
        assert labels == ["holov", "plain", "holov, no CUDA graphs"]
        assert [item["threads"] for item in found["callers"]["concurrency"]] == [1, 2]
        assert [entry["outcome"] for entry in found["steps"]] == ["done"] * len(found["steps"])

    def test_the_report_takes_its_numbers_from_the_file(self, found: dict[str, Any], tmp_path: Path) -> None:
        from gpu_report import gpu_block

        folder = tmp_path / "results"
        folder.mkdir()
        (folder / "gpu-engines.json").write_text(json.dumps(found), encoding="utf-8")
        text = gpu_block(folder)
        case = next(c for c in found["bench"][0]["cases"] if c["contestant"] == "holov" and c["budget"] == 7)
        assert f"{case['gpu']['p50']:.3f}" in text
        assert "holov: 100.00% or more of the tokens that float32 keeps in ONNX Runtime, over 4 combinations" in text
        assert f"{len(found['shapes'])} combinations of batch and budget ran without a rebuild, 0 with" in text
        assert "PyTorch: not measured" in text

    def test_an_engine_that_lost_its_cuda_graphs_is_not_reported_as_one_that_has_them(
        self, found: dict[str, Any], tmp_path: Path
    ) -> None:
        from gpu_report import gpu_block

        changed = json.loads(json.dumps(found))
        for info in changed["bench"][0]["contestants"][:1]:
            info["engine"] += ", no CUDA graphs"
        (tmp_path / "gpu-engines.json").write_text(json.dumps(changed), encoding="utf-8")
        assert ", holov fp32, K=7, no CUDA graph could be made |" in gpu_block(tmp_path)

    def test_without_a_gpu_every_step_says_why(self, bundles: list[Path], reference: Path, tmp_path: Path) -> None:
        from steps import Steps

        with tensorrt_standin.installed("8.6.0", gpu=None):
            import measure

            steps = Steps(tmp_path / "out.json", 10)
            measure.measure(steps, options_for(bundles, reference, steps.path))
        assert [entry["step"] for entry in steps.failed] == ["build holov", "build plain"]
        assert all("no usable NVIDIA GPU" in entry["reason"] for entry in steps.failed)

    def test_a_child_that_cannot_build_gives_its_reason(self, bundles: list[Path], tmp_path: Path) -> None:
        """A process of its own for each engine; here there is no TensorRT, so the reason is all that comes back."""
        import measure

        from holov_export.bundle import open_bundle

        one = open_bundle(bundles[1], verify="size")
        with pytest.raises(RuntimeError, match=r"ended with 3: .*(no usable NVIDIA GPU|not installed)"):
            measure.build_in_child(one, one, options_for(bundles, None, tmp_path / "out.json"), 60)

    def test_a_build_without_end_is_ended_and_says_how_far_it_was(
        self, bundles: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        import measure

        from holov_export.bundle import open_bundle

        slow = tmp_path / "slow.py"
        slow.write_text("import sys, time\nprint(*sys.argv[1:], file=sys.stderr)\ntime.sleep(60)\n", encoding="utf-8")
        monkeypatch.setattr(measure, "__file__", str(slow))
        one = open_bundle(bundles[1], verify="size")
        options = options_for(bundles, None, tmp_path / "out.json", profile=["batch=1,budget=7"], prefer=True)
        with pytest.raises(RuntimeError, match=r"ended after 1 s; last: .*--profile batch=1,budget=7 --prefer"):
            measure.build_in_child(one, one, options, 1.0)


class TestQuantised:
    """Quantised bundles beside the float one: built, compared and timed where they can be, named where they cannot."""

    @pytest.mark.parametrize(("version", "built"), [("8.6.0", ["int8"]), ("10.13.3", ["int8", "fp8"])])
    def test_a_whole_run(
        self, version: str, built: list[str], bundles: list[Path], reference: Path, tmp_path: Path
    ) -> None:
        from quantized_graphs import quantized_bundle

        from holov_export.bundle import open_bundle
        from holov_export.spec import QuantizedType

        pruned = bundles[1]
        made = [
            quantized_bundle(open_bundle(pruned), tmp_path / f"holov-{kind.value}", kind).folder
            for kind in QuantizedType
        ]
        with tensorrt_standin.installed(version, gpu=FakeGpu()):
            import measure
            from steps import Steps

            steps = Steps(tmp_path / "out.json", 10)
            asked = options_for([pruned, *made], reference, steps.path, batches=(1,), callers=(1,), budgets=(7,))
            measure.measure(steps, asked)
        assert steps.failed == []
        found = json.loads(steps.path.read_text(encoding="utf-8"))
        names = ["fp32", *built]
        assert [item["precision_name"] for item in found["builds"]] == names
        assert {item["precision_name"] for item in found["parity"]} == set(names)
        assert all({"kept_in_common", "token_cosine", "overlap"} <= set(item) for item in found["parity"])
        assert {info["precision"] for info in found["bench"][0]["contestants"]} == set(names)
        refused = [(item["precision_name"], item["reason"]) for item in found["refused"]]
        assert [name for name, _ in refused] == [name for name in ("int8", "fp8") if name not in built]
        assert all("no 8-bit floats" in reason for _, reason in refused)
        rows = [item for item in found["parity"] if item["precision_name"] == "int8"]
        exact = [item for item in found["parity"] if item["precision_name"] == "fp32"]
        assert max(item["token_error"] for item in rows) > 10 * max(item["token_error"] for item in exact)

    def test_without_a_gpu_the_builds_say_it(self, bundles: list[Path], tmp_path: Path) -> None:
        from fitting import fitting
        from quantized_graphs import quantized_bundle
        from steps import Steps

        from holov_export.bundle import open_bundle
        from holov_export.spec import QuantizedType
        from holov_export.targets import target_from_name

        made = [quantized_bundle(open_bundle(bundles[1]), tmp_path / "int8", QuantizedType.INT8)]
        with tensorrt_standin.installed("8.6.0", gpu=None):
            assert fitting(Steps(tmp_path / "out.json", 1), made, target_from_name("h200")) == made

    @pytest.mark.parametrize(
        ("sm", "asked", "kinds"),
        [
            (90, "auto", ("int8", "fp16-int8", "fp16-fp8")),
            (87, "auto", ("int8", "fp16-int8")),
            (0, "auto", ("int8", "fp16-int8")),
            (90, "none", ()),
            (87, "int8,fp16-fp8", ("int8", "fp16-fp8")),
        ],
    )
    def test_what_is_made_for_which_gpu(
        self, sm: int, asked: str, kinds: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        import prepare

        from holov_export import gpu

        there = gpu.Gpu("G", sm, 2**30, False, "12.6") if sm else gpu.NoGpu("there is none")
        monkeypatch.setattr(gpu, "probe", lambda: there)
        assert prepare.quantized_kinds(asked) == kinds

    @pytest.mark.slow
    def test_prepare_quantises_the_pruned_bundle(self, tmp_path: Path) -> None:
        """From a float bundle that is there, and from one that is exported for it."""
        import prepare
        from steps import Steps

        checkpoint = tmp_path / "checkpoint" / "llava-1.5-7b"
        prepare.write_checkpoint_of_size("tiny", checkpoint)
        prepare.export(checkpoint, tmp_path / "bundles" / "holov-fp16", Precision.FP16, "holov")
        steps = Steps(tmp_path / "prepare.json", 10)
        prepare.prepare_quantized(steps, tmp_path, ("int8", "fp16-int8", "fp16-fp8"))
        assert steps.failed == []
        made = {path.name: open_named(path) for path in sorted((tmp_path / "bundles").iterdir())}
        assert made == {
            "holov-fp16": "fp16", "holov-fp16-fp8": "fp16-fp8", "holov-fp16-int8": "fp16-int8", "holov-int8": "int8",
        }  # fmt: skip
        assert not list(tmp_path.glob("quantize-*"))
        assert len(steps.found["quantized"]) == 3


def open_named(folder: Path) -> str:
    from holov_export.bundle import open_bundle

    return open_bundle(folder).manifest.plan.precision_name


class TestContract:
    """What `measure` calls wrong, so that "nothing wrong" means something."""

    def result(self, quota: list[int], budget: int) -> VisualTokens:
        positions = np.full((len(quota), budget), -1, np.int64)
        tokens = np.zeros((len(quota), budget, 4), np.float32)
        for image, count in enumerate(quota):
            positions[image, :count], tokens[image, :count] = np.arange(count), 1.0
        return VisualTokens(tokens, positions, np.array(quota))

    def test_a_sound_result(self) -> None:
        from measure import wrong_with

        assert wrong_with(self.result([3, 2], 3), 3, [3, 2]) == ""

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            (lambda r: r.tokens.__setitem__((1, 2), 5.0), "padding"),
            (lambda r: r.tokens.__setitem__((0, 0, 0), np.nan), "finite"),
            (lambda r: r.positions.__setitem__((0, 1), 0), "different"),
            (lambda r: r.positions.__setitem__((0, 1), -1), "different"),
            (lambda r: r.positions.__setitem__((1, 2), 0), "padding"),
            (lambda r: r.counts.__setitem__(0, 2), "counts"),
        ],
    )
    def test_each_kind_of_fault_is_seen(self, change: Any, words: str) -> None:
        from measure import wrong_with

        result = self.result([3, 2], 3)
        change(result)
        assert words in wrong_with(result, 3, [3, 2])

    def test_another_shape(self) -> None:
        from measure import wrong_with

        assert "shapes" in wrong_with(self.result([3, 2], 3), 4, [3, 2])

    def test_kept_in_common_counts_sets(self) -> None:
        from measure import kept_in_common

        ours, theirs = self.result([3, 2], 3), self.result([3, 2], 3)
        assert kept_in_common(ours, theirs) == 1.0
        ours.positions[0] = [2, 9, 0]  # order does not count
        assert kept_in_common(ours, theirs) == 0.8


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What `peers --rehearse` writes."""
    import torch

    sys.path[:0] = [str(SCRIPTS), str(ROOT / "scripts")]
    try:
        import peers
        from steps import Steps
    finally:
        del sys.path[:2]
    steps = Steps(tmp_path_factory.mktemp("peers") / "peers.json", 10)
    options = Namespace(budgets=None, modes="", batches=(1, 2), rounds=2, no_language=False)
    with torch.inference_mode():
        peers.peers(steps, peers.sizes_of(rehearse=True), options)
    assert steps.failed == []
    found: dict[str, Any] = json.loads(steps.path.read_text(encoding="utf-8"))
    return found


class TestPeers:
    @pytest.mark.slow  # 5 s of tracing
    def test_ours_and_plain_are_compiled_as_one_graph(self) -> None:
        """A graph break, or a tensor of the CPU in the graph, and torch.compile makes no CUDA graph of it."""
        import peers
        import torch

        sizes, budget = peers.sizes_of(rehearse=True), 4

        def look(module: Any, found: list[Any]) -> Any:
            assert not [item for item in found if isinstance(item, torch.Tensor) and item.ndim == 0]
            return module

        with torch.inference_mode():
            encoders = peers.Encoders.made(sizes)
            side = sizes.spec.vision.image_size
            pixels = torch.randn(2, 3, side, side)
            asked = (pixels, torch.full((2,), budget), torch.tensor([budget]))
            for module, given in ((encoders.plain, (pixels,)), (peers.FixedBudget(encoders.ours, budget), asked)):
                wanted = module(*given)  # transformers installs its hooks in the first call
                torch._dynamo.reset()
                found = torch.compile(module, backend=look, dynamic=False, fullgraph=True)(*given)
                assert torch.equal(found[0], wanted[0])

    def test_all_ways_ran_and_ours_agrees_with_the_plain_encoder(self, rehearsed: dict[str, Any]) -> None:
        ways = {(row["way"], row["batch"]) for row in rehearsed["peers"] if "failed" not in row}
        assert ways == {(way, b) for way in ("official, eager", "plain, SDPA", "ours, eager") for b in (1, 2)}
        assert rehearsed["check"]["token_error"] < 1e-5
        assert rehearsed["ceilings"]["matrix_tflops"] > 0 and rehearsed["ceilings"]["copy_gbs"] > 0

    def test_the_cache_grows_with_the_visual_tokens(self, rehearsed: dict[str, Any]) -> None:
        kept = {
            (row["batch"], row["visual_tokens"]): row["cache_bytes_after_prefill"]
            for row in rehearsed["language"]
            if row["way"] == "prefill"
        }
        # two layers, keys and values, width 32, float32; 35 words
        assert kept == {(b, visual): b * (35 + visual) * 2 * 2 * 32 * 4 for b in (1, 2) for visual in (16, 4)}

    def test_a_rehearsal_is_never_reported(self, rehearsed: dict[str, Any], tmp_path: Path) -> None:
        from gpu_report import gpu_block

        (tmp_path / "gpu-peers.json").write_text(json.dumps(rehearsed), encoding="utf-8")
        with pytest.raises(ValueError, match="rehearsal"):
            gpu_block(tmp_path)

    def test_times_beside_the_floor_and_the_language_model(self, rehearsed: dict[str, Any], tmp_path: Path) -> None:
        from gpu_report import gpu_block

        measured = json.loads(json.dumps({**rehearsed, "rehearsal": False}))
        for row in [*measured["peers"], *measured["language"]]:
            row["gpu"] = {"p50": 2.5 * row["batch"]}
        (tmp_path / "gpu-peers.json").write_text(json.dumps(measured), encoding="utf-8")
        text = gpu_block(tmp_path)
        assert "| PyTorch, ours, eager, K=2 | 2.500 | 5.000 |" in text
        assert "| floor: " in text and "| B=1 | 16 | 51 | 2.500 |  | 2.500 | 0 MiB |" in text
        assert "engines: not measured" in text


def test_without_results_the_block_says_that_nothing_was_measured(tmp_path: Path) -> None:
    from gpu_report import NOTHING, gpu_block

    assert gpu_block(tmp_path) == NOTHING
    assert "Nothing has been measured on a GPU yet" in NOTHING


def test_what_has_to_be_installed_is_pinned_and_known_to_the_project() -> None:
    constraints = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    for name in ("requirements-torch.txt", "requirements-tensorrt.txt"):
        lines = [line for line in (SCRIPTS / name).read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
        assert len(lines) > 3
        for line in lines:
            package, _, version = line.partition("==")
            assert version, line
            # TensorRT 8.6.0 was built for CUDA 12 and for NumPy 1
            assert package in ("numpy", "cuda-bindings") or f"{package}=={version}" in constraints, line


@pytest.mark.slow
def test_prepare_makes_what_measure_needs(tmp_path: Path) -> None:
    """Six exports of a tiny checkpoint, and one that is quantised."""
    ended = subprocess.run(
        [
            sys.executable,
            str(SCRIPTS / "prepare.py"),
            "--work",
            str(tmp_path),
            "--size",
            "tiny",
            "--pictures",
            "3",
            "--quantized",
            "fp16-int8",
        ],
        capture_output=True,
        text=True,
        check=False,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "HF_HUB_OFFLINE": "1", "HOME": str(tmp_path)},
    )
    assert ended.returncode == 0, ended.stderr
    made = sorted(path.name for path in (tmp_path / "bundles").iterdir())
    assert made == ["holov-fp16", "holov-fp16-int8", "plain-fp16", "scope-fp16", "uniform-fp16"]
    for method in ("holov", "scope"):
        reference = np.load(tmp_path / f"reference-{method}.npz")
        assert reference["pixels"].shape[0] == 3 and str(reference["method"]) == method
        for budget in reference["budgets"].tolist():
            assert reference[f"positions_{budget}"].shape == (3, budget)
    assert not (tmp_path / "reference-fp32").exists()


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `prepare --families qwen2.5-vl-7b --size tiny` writes."""
    sys.path[:0] = [str(SCRIPTS), str(ROOT / "scripts")]
    try:
        import prepare
        from steps import Steps
    finally:
        del sys.path[:2]
    work = tmp_path_factory.mktemp("families")
    (work / "bundles").mkdir()
    steps = Steps(work / "prepare.json", 10)
    steps.found["references"] = []
    prepare.prepare_family(steps, work, "tiny", Precision.FP32, "qwen2.5-vl-7b")
    assert steps.failed == []
    assert steps.found["references"][0]["pictures"] == prepare.FEW_PICTURES
    return work


class TestPacked:
    """Graphs that see pictures of unequal size go through the same scripts."""

    @pytest.mark.slow
    @pytest.mark.parametrize("version", ["8.6.0", "11.4.0"])
    def test_a_whole_run(self, work: Path, version: str, tmp_path: Path, bundles: list[Path]) -> None:
        """Beside a square bundle, whose results stay where they were."""
        assert sorted(path.name for path in work.iterdir()) == [
            *("bundles", "checkpoint", "prepare.json", "reference-qwen2.5-vl-7b.npz")
        ]
        folders = [bundles[1], *sorted((work / "bundles").iterdir())]
        reference = work / "reference-qwen2.5-vl-7b.npz"
        with tensorrt_standin.installed(version, gpu=FakeGpu()):
            import measure
            from steps import Steps

            steps = Steps(tmp_path / "out.json", 10)
            measure.measure(steps, options_for(folders, reference, steps.path, batches=(1,), callers=(1,)))
        assert steps.failed == []
        found = json.loads(steps.path.read_text(encoding="utf-8"))
        assert [item["bundle"] for item in found["builds"]] == [
            "holov", "qwen2.5-vl-7b-holov-fp32", "qwen2.5-vl-7b-plain-fp32",
        ]  # fmt: skip
        (packed,) = found["packed"]
        assert (packed["model"], packed["part"]) == ("qwen2.5-vl-7b", "image")
        assert len(packed["parity"]) == 2
        assert all(item["kept_in_common"] == 1.0 and item["passed"] for item in packed["parity"])
        assert len({tuple(item["tokens"]) for item in packed["shapes"]}) >= 5
        assert not any(item["wrong"] for item in packed["shapes"])
        cases = packed["bench"]["cases"]
        assert {case["contestant"] for case in cases} == {"qwen2.5-vl-7b-holov-fp32", "qwen2.5-vl-7b-plain-fp32"}
        assert [report["cases"][0]["contestant"] for report in found["bench"]] == ["holov"]

    def test_each_kind_of_fault_is_seen(self) -> None:
        from packed import wrong_with

        from holov_export.tensors import CropBox, ImageLayout, PixelBatch, Region

        box = CropBox(0, 0, 1, 1)
        none = np.zeros((0, 2), np.int64)
        layouts = tuple(
            ImageLayout("image", count, count, np.arange(count), (Region((1, count), box),), none, none[:, 0])
            for count in (5, 3)
        )
        pixels = PixelBatch(np.zeros((8, 4), np.float32), (box, box), ((1, 1),) * 2, layouts)

        def result() -> VisualTokens:
            positions = np.array([[0, 1, 4], [0, 2, -1]])
            return VisualTokens(np.where(positions[..., None] >= 0, 1.0, 0.0), positions, np.array([3, 2]))

        assert wrong_with(result(), pixels, [3, 2]) == ""
        assert "counts" in wrong_with(result(), pixels, [3, 3])
        for change, words in (
            (lambda seen: seen.positions.__setitem__((1, 1), 3), "different ones of 3"),
            (lambda seen: seen.positions.__setitem__((0, 1), 0), "different"),
            (lambda seen: seen.tokens.__setitem__((1, 2), 1.0), "padding"),
            (lambda seen: seen.tokens.__setitem__((0, 0), np.inf), "finite"),
        ):
            seen = result()
            change(seen)
            assert words in wrong_with(seen, pixels, [3, 2])
