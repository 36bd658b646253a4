"""A whole benchmark: contestants in ONNX Runtime and in a stand-in of TensorRT, its report and its picture."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tensorrt_standin
from PIL import Image
from tensorrt_standin import FakeGpu

from holov_export.bundle import Bundle, open_bundle
from holov_export.compile.engine_from_onnx import engine_from_bundle
from holov_export.errors import (
    BudgetError,
    EngineError,
    EnvironmentFaultError,
    ParityError,
    UnknownNameError,
    UsageError,
)
from holov_export.pipeline import export_bundle
from holov_export.policies import VisionzipPolicy
from holov_export.request import ExportRequest
from holov_export.runtime.runner_ort import OrtRunner
from holov_export.spec import Precision
from holov_export.targets import target_from_name
from holov_export.tensors import PixelBatch
from holov_export.verify import bench_run
from holov_export.verify.baselines import baseline_of, compare_with_pruned, refuse_if_different
from holov_export.verify.bench import OnDevice
from holov_export.verify.bench_engines import Contestant, labels_of, ort_contestant
from holov_export.verify.bench_plot import plot_report
from holov_export.verify.bench_report import (
    CASE_COLUMNS,
    case_rows,
    markdown_of,
    remarks_of,
    report_from_file,
    tables_of,
    write_report,
)
from holov_export.verify.bench_results import BenchReport, SelectionShare
from holov_export.verify.bench_run import BenchRequest, bench, pixels_of
from holov_export.verify.bench_tensorrt import (
    LayerProfiler,
    engine_for_comparison,
    profile_texts,
    tensorrt_contestant,
)
from holov_export.verify.device_monitor import NoMonitor, Snapshot, summary_of
from holov_export.verify.parity import TOLERANCES

N = 64  # patch tokens of the tiny checkpoint
QUICK = BenchRequest(budgets=(N, 7), batches=(1, 3), rounds=3, sustain=0, profile=False)


@pytest.fixture(scope="module")
def plain(exported_bundle: Bundle, llava_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return baseline_of(exported_bundle, llava_checkpoint, tmp_path_factory.mktemp("baselines") / "plain")


@pytest.fixture
def contestants(exported_bundle: Bundle, plain: Bundle) -> Iterator[list[Contestant]]:
    made = [
        ort_contestant(bundle, label, provider="cpu", threads=1, target=None)
        for bundle, label in ((exported_bundle, "pruned"), (plain, "plain"))
    ]
    yield made
    for one in made:
        one.runner.close()


@pytest.fixture
def report(contestants: list[Contestant]) -> BenchReport:
    request = replace(QUICK, threads=(1, 2), profile=True)
    return bench(contestants, request, command="holov-export bench pruned", notes=["a note"])


class TestBaselines:
    def test_a_plain_graph_gives_the_rows_of_the_pruned_one_at_full_budget(
        self, plain: Bundle, exported_bundle: Bundle
    ) -> None:
        found = compare_with_pruned(plain, exported_bundle)
        assert found.token_error <= TOLERANCES[exported_bundle.manifest.plan.precision].tokens
        assert found.same_order == found.pictures == 2

    def test_it_says_that_it_selects_nothing_and_opens_like_any_bundle(self, plain: Bundle) -> None:
        opened = open_bundle(plain.folder)
        assert opened.manifest.plan.policy.method == "none"
        assert opened.manifest.plan.decoder is None
        assert opened.tokenizer.is_file()

    def test_its_budget_cuts_rows_off_and_its_batch_is_dynamic(self, plain: Bundle) -> None:
        dice = np.random.default_rng(0)
        side = plain.manifest.plan.model.vision.image_size
        pixels = PixelBatch(dice.standard_normal((3, 3, side, side)).astype(np.float32), (), ())
        with OrtRunner(plain, provider="cpu") as runner:
            whole, some = runner.run(pixels, N, saliency=True), runner.run(pixels, 5)
        assert whole.tokens.shape[:2] == (3, N)
        np.testing.assert_allclose(some.tokens, whole.tokens[:, :5], rtol=0, atol=1e-5)
        assert (some.positions == np.arange(5)).all() and (some.counts == 5).all()
        assert whole.saliency is not None and not whole.saliency.any()

    @pytest.mark.slow  # one more export
    def test_the_blind_one_keeps_the_uniform_positions(
        self, exported_bundle: Bundle, llava_checkpoint: Path, tmp_path: Path
    ) -> None:
        made = baseline_of(exported_bundle, llava_checkpoint, tmp_path / "u", kind="uniform")
        assert made.manifest.plan.policy.method == "uniform"
        pixels = PixelBatch(np.zeros((1, *_image_shape(made)), np.float32), (), ())
        with OrtRunner(made, provider="cpu") as runner:
            assert runner.run(pixels, 4).positions.tolist() == [[8, 24, 40, 56]]

    def test_rows_that_are_merged_are_no_measure(self, llava_checkpoint: Path, tmp_path: Path) -> None:
        request = ExportRequest(
            str(llava_checkpoint), VisionzipPolicy(), Precision.FP32, None, tmp_path / "v", verify=False
        )
        merging, _ = export_bundle(request)
        said: list[str] = []
        made = baseline_of(merging, llava_checkpoint, tmp_path / "plain", tell=said.append)
        assert not any(line.startswith("compare") for line in said)
        found = compare_with_pruned(made, merging)
        assert found.token_error > TOLERANCES[Precision.FP32].tokens, "else it could have been compared"

    def test_other_rows_are_refused(self, plain: Bundle, exported_bundle: Bundle) -> None:
        found = compare_with_pruned(plain, exported_bundle).model_copy(update={"token_error": float("nan")})
        with pytest.raises(ParityError, match="differ from the pruned graph's"):
            refuse_if_different(found, exported_bundle.manifest.plan)

    def test_an_unknown_kind_is_refused(self, exported_bundle: Bundle, llava_checkpoint: Path, tmp_path: Path) -> None:
        with pytest.raises(UnknownNameError, match="plain, uniform"):
            baseline_of(exported_bundle, llava_checkpoint, tmp_path / "x", kind="none")
        assert not list(tmp_path.iterdir())


def _image_shape(bundle: Bundle) -> tuple[int, int, int]:
    side = bundle.manifest.plan.model.vision.image_size
    return 3, side, side


class TestRun:
    def test_every_case_is_there(self, report: BenchReport) -> None:
        keys = {(case.contestant, case.batch, case.budget) for case in report.cases}
        assert keys == {("pruned", b, k) for b in (1, 3) for k in (N, 7)} | {("plain", b, N) for b in (1, 3)}
        assert all(case.latency.samples == 3 for case in report.cases)
        assert report.rounds == 3
        assert [info.method for info in report.contestants] == ["holov", "none"]

    def test_throughput_and_rate_follow_from_the_times(self, report: BenchReport) -> None:
        for case in report.cases:
            assert case.images_per_second == pytest.approx(case.batch / case.latency.mean * 1e3, rel=1e-3)
            rate = case.gflop_per_image * case.batch / case.latency.p50  # GFLOP a millisecond
            assert case.tflops == pytest.approx(rate, rel=0.05, abs=1e-3)
            assert case.gpu is None and case.host is None and case.peak_share is None

    def test_the_selection_is_profiled_where_there_is_one(self, report: BenchReport) -> None:
        for case in report.cases:
            assert (case.selection is None) == (case.contestant == "plain")

    def test_ratios_are_to_the_plain_encoder_at_all_tokens(self, report: BenchReport) -> None:
        times = {(case.contestant, case.batch, case.budget): case.latency.p50 for case in report.cases}
        assert len(report.ratios) == 4
        for ratio in report.ratios:
            assert (ratio.contestant, ratio.baseline, ratio.baseline_budget, ratio.gpu) == ("pruned", "plain", N, None)
            wanted = times["pruned", ratio.batch, ratio.budget] / times["plain", ratio.batch, N]
            assert ratio.latency == pytest.approx(wanted, rel=1e-3)

    def test_callers_use_the_smallest_batch_and_budget(self, report: BenchReport) -> None:
        found = [(item.contestant, item.batch, item.budget, item.threads) for item in report.concurrency]
        assert found == [("pruned", 1, 7, 1), ("pruned", 1, 7, 2), ("plain", 1, N, 1), ("plain", 1, N, 2)]
        assert all(item.images_per_second > 0 and item.latency.samples >= 4 for item in report.concurrency)

    def test_a_budget_out_of_range_is_refused_before_anything_runs(self, contestants: list[Contestant]) -> None:
        with pytest.raises(BudgetError, match=f"1..{N}"):
            bench(contestants, replace(QUICK, budgets=(N + 1,)), command="")

    def test_budgets_are_shares_when_none_are_named(self, contestants: list[Contestant]) -> None:
        assert contestants[0].budgets(()) == (64, 21, 14, 7)
        assert contestants[1].budgets(()) == (64,)
        assert contestants[1].budgets((7,)) == (64,)

    def test_a_case_that_fails_is_noted_and_the_others_go_on(self, contestants: list[Contestant]) -> None:
        def fail(pixels: PixelBatch, budget: int) -> OnDevice | None:
            raise EngineError("no profile holds it.")

        found = bench([contestants[0], replace(contestants[1], run=fail)], QUICK, command="")
        assert {case.contestant for case in found.cases} == {"pruned"}
        assert [failure.step for failure in found.failures] == [f"warm up: plain, B={b}, K={N}" for b in (1, 3)]
        assert found.failures[0].reason == "no profile holds it."

    @pytest.mark.parametrize("error", [RuntimeError("infer_shapes error code: -1"), ValueError("no time")])
    def test_what_bindings_raise_does_not_lose_the_others(
        self, contestants: list[Contestant], error: Exception
    ) -> None:
        def fail(pixels: PixelBatch, budget: int, runs: int) -> SelectionShare:
            raise error

        found = bench([replace(contestants[0], selection_share=fail)], replace(QUICK, profile=True), command="")
        assert found.cases and all(case.selection is None for case in found.cases)
        assert {failure.reason for failure in found.failures} == {str(error)}

    def test_nothing_that_runs_is_an_error_with_the_first_reason(self, contestants: list[Contestant]) -> None:
        def fail(pixels: PixelBatch, budget: int) -> OnDevice | None:
            raise EngineError("out of memory.")

        with pytest.raises(UsageError, match="out of memory"):
            bench([replace(contestants[0], run=fail)], QUICK, command="")

    def test_without_a_monitor_nothing_is_read_and_the_reason_is_told(
        self, contestants: list[Contestant], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(bench_run, "monitor_of_this_machine", lambda: NoMonitor("no NVML here"))
        found = bench(contestants[:1], replace(QUICK, sustain=0.01), command="")
        assert found.no_device == "no NVML here"
        assert all(case.device is None and case.sustained is None for case in found.cases)
        assert any("no NVML here" in remark for remark in remarks_of(found))

    def test_a_monitor_is_read_while_each_case_runs_alone(
        self, contestants: list[Contestant], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        class Watch:
            def __enter__(self) -> Watch:
                return self

            def __exit__(self, *error: object) -> None:
                pass

            def reading(self) -> object:
                return summary_of("nvml", [Snapshot(sm_clock_mhz=1980.0, power_w=350.0)])

        monkeypatch.setattr(bench_run, "monitor_of_this_machine", lambda: Watch)
        found = bench(contestants[:1], replace(QUICK, sustain=0.01), command="")
        assert all(case.device and case.device.power_w and case.device.power_w.mean == 350 for case in found.cases)
        assert all(case.sustained and case.sustained.samples >= 1 for case in found.cases)
        assert "1980" in markdown_of(found)

    def test_first_tokens_have_all_stages(self, complete_bundle: Bundle) -> None:
        one = ort_contestant(complete_bundle, "complete", provider="cpu", threads=1, target=None)
        try:
            found = bench([one], replace(QUICK, batches=(1,), first_token=True, provider="cpu"), command="")
        finally:
            one.runner.close()
        assert [item.budget for item in found.first_token] == [N, 7]
        long, short = found.first_token
        assert long.prompt_tokens - short.prompt_tokens == N - 7
        assert all(item.prefill > 0 and item.vision > 0 and item.total >= item.prefill for item in found.first_token)

    def test_a_decoder_that_is_not_there_is_noted(self, contestants: list[Contestant]) -> None:
        found = bench(contestants[:1], replace(QUICK, first_token=True), command="")
        assert found.first_token == ()
        assert [failure.reason for failure in found.failures] == ["no bundle has a decoder"]


class TestReport:
    def test_it_is_written_and_read_back(self, report: BenchReport, tmp_path: Path) -> None:
        paths = write_report(report, tmp_path / "new" / "folder")
        assert [path.name for path in paths] == ["bench.json", "bench.md"]
        assert report_from_file(paths[0]) == report
        assert str(tmp_path) not in paths[0].read_text(encoding="utf-8")

    def test_markdown_has_every_case_and_remark(self, report: BenchReport) -> None:
        text = markdown_of(report)
        assert text.count("| pruned |") >= 4
        assert "a note." in text and "holov-export bench pruned" in text
        for line in text.splitlines():
            if line.startswith("| "):
                assert line.count("|") >= 6

    def test_rows_fit_their_columns(self, report: BenchReport) -> None:
        titles = [title for title, _, _ in tables_of(report)]
        assert titles == ["latency, one caller", "ratios (below 1 is faster)", "several callers"]
        assert all(len(row) == len(columns) for _, columns, rows in tables_of(report) for row in rows)
        assert len(case_rows(report)[0]) == len(CASE_COLUMNS)

    def test_a_file_that_is_none_is_refused(self, tmp_path: Path) -> None:
        path = tmp_path / "bench.json"
        path.write_text(json.dumps({"schema_version": 1}), encoding="utf-8")
        with pytest.raises(UsageError, match=r"no bench\.json"):
            report_from_file(path)

    def test_the_picture_shows_every_batch(self, report: BenchReport, tmp_path: Path) -> None:
        plot_report(report, tmp_path / "bench.png")
        with Image.open(tmp_path / "bench.png") as picture:
            assert picture.format == "PNG"
            one_panel_more = picture.width
        less = report.model_copy(update={"cases": tuple(case for case in report.cases if case.batch == 1)})
        plot_report(less, tmp_path / "less.png")
        with Image.open(tmp_path / "less.png") as picture:
            assert picture.width < one_panel_more

    def test_equal_folder_names_get_different_labels(self, exported_bundle: Bundle, plain: Bundle) -> None:
        assert labels_of([plain, exported_bundle, plain], ["ort"]) == [["plain (1)"], ["exported"], ["plain (2)"]]
        assert labels_of([plain, replace(plain, graph="vision-x.onnx")], ["ort"]) == [["plain"], ["plain, none"]]
        assert labels_of([plain], ["ort", "tensorrt"]) == [["plain, ort", "plain, tensorrt"]]


@pytest.mark.parametrize("version", ["8.6.0", "10.13.3", "11.4.0"])
class TestTensorrt:
    """Against stand-ins: they prove that the code runs and what it computes, not how fast anything is."""

    @pytest.fixture
    def pair(self, version: str, exported_bundle: Bundle, plain: Bundle, tmp_path: Path) -> Iterator[list[Bundle]]:
        """Copies of a pruned and a plain bundle with engines of this version."""
        import shutil

        copies = [Bundle(Path(shutil.copytree(one.folder, tmp_path / one.folder.name)), one.manifest)
                  for one in (exported_bundle, plain)]  # fmt: skip
        with tensorrt_standin.installed(version, gpu=FakeGpu()):
            engine_from_bundle(copies[0], target_from_name("h200"))
            engine_for_comparison(copies[1], copies[0], None, tell=lambda message: None)
            yield copies

    def test_gpu_times_memory_and_shares_are_reported(self, pair: list[Bundle]) -> None:
        made = [tensorrt_contestant(bundle, bundle.folder.name, target=None) for bundle in pair]
        try:
            found = bench(made, replace(QUICK, profile=True, threads=(2,)), command="")
        finally:
            for one in made:
                one.runner.close()
        assert not found.failures
        for case in found.cases:
            assert case.gpu and case.copies and case.host
            assert case.gpu.p50 + case.copies.p50 <= case.latency.most * 1.001
            assert case.peak_share is not None
            assert (case.selection is None) == (case.contestant == "plain")
        assert found.target == "h200"
        assert all(info.device_mb and info.built_with and "TensorRT" in info.built_with for info in found.contestants)
        assert all(ratio.gpu is not None for ratio in found.ratios)

    def test_a_plain_engine_is_tuned_for_all_tokens(self, pair: list[Bundle]) -> None:
        from holov_export.engine import engines_in

        pruned, plain = (engines_in(bundle.folder / "engines")[0].record for bundle in pair)
        assert {profile.budget for profile in plain.profiles} == {(N, N, N)}
        assert {profile.batch for profile in plain.profiles} == {profile.batch for profile in pruned.profiles}
        assert len(profile_texts(pruned, only=None)) == len(pruned.profiles)

    def test_without_an_engine_there_is_nothing_to_compare_with(
        self, pair: list[Bundle], exported_bundle: Bundle
    ) -> None:
        with pytest.raises(EngineError, match="no engine to compare with"):
            engine_for_comparison(pair[1], exported_bundle, None, tell=lambda message: None)

    def test_layers_are_named_and_timed(self, pair: list[Bundle]) -> None:
        one = tensorrt_contestant(pair[0], "pruned", target=None)
        try:
            runner = one.runner
            with LayerProfiler(pair[0], runner.engine, pixels_of(one, 2), 7) as profiler:  # type: ignore[attr-defined]
                names = [name for name, _ in profiler.layer_times()]
                assert len(names) == len(profiler.layer_times())
            assert any(name.startswith("selection/") for name in names)
            big = PixelBatch(np.zeros((4096, *_image_shape(pair[0])), np.float32), (), ())
            with pytest.raises(EngineError, match="no profile holds 4096 images"):
                LayerProfiler(pair[0], runner.engine, big, 7)  # type: ignore[attr-defined]
        finally:
            one.runner.close()

    def test_a_profiler_that_says_nothing_is_an_error(
        self, pair: list[Bundle], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from holov_export.verify import bench_tensorrt

        monkeypatch.setattr(bench_tensorrt, "profiler_into", lambda trt, seen: None)
        one = tensorrt_contestant(pair[0], "pruned", target=None)
        try:
            with pytest.raises(EnvironmentFaultError, match="no layer times"):
                one.selection_share(pixels_of(one, 1), 7, 2)
        finally:
            one.runner.close()
