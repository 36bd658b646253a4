"""`bench` where pictures have unequal numbers of tokens: what is counted, which budgets, baselines, reports."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from family_bundles import FamilyBundle, family_bundle, family_plan, true_size
from family_checkpoints import write_family
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from holov_export.bundle import open_bundle
from holov_export.cli import run
from holov_export.errors import BudgetError
from holov_export.runtime.packing import packed_inputs
from holov_export.runtime.runner_ort import OrtRunner
from holov_export.runtime.session import Session
from holov_export.verify.baselines import baseline_of
from holov_export.verify.bench_engines import Contestant, labels_of, ort_contestant
from holov_export.verify.bench_pictures import largest_of, pixels_of
from holov_export.verify.bench_report import remarks_of
from holov_export.verify.bench_run import BenchRequest, bench
from holov_export.verify.operations import operations_of
from holov_export.verify.operations_packed import operations_of_batch
from holov_export.verify.pictures import pixels_for
from holov_export.vision import qwen_layers
from holov_export.vision.families import vision_from_plan
from holov_export.vision.weights import SafetensorsReader

#: several exports with decoders; scripts/test-slow runs them
pytestmark = pytest.mark.slow

FAMILIES = ["llava_next", "qwen2_5_vl", "video_llava"]
GRAPHS = [("llava_next", "image"), ("qwen2_5_vl", "image"), ("video_llava", "image"), ("video_llava", "video")]
QUICK = ["--repeats", "1", "--alone", "0", "--threads", "1", "--provider", "cpu"]


@pytest.fixture(scope="module", params=FAMILIES)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> FamilyBundle:
    return family_bundle(tmp_path_factory.mktemp("bundles") / request.param, request.param)


@pytest.fixture(scope="module")
def with_decoder(tmp_path_factory: pytest.TempPathFactory) -> FamilyBundle:
    return family_bundle(tmp_path_factory.mktemp("bundles") / "answering", "qwen2_5_vl", decoder=True)


@pytest.fixture
def contestants(made: FamilyBundle) -> Iterator[list[Contestant]]:
    """One for each graph of the bundle."""
    views = [made.bundle.of_part(part) for part in made.bundle.manifest.plan.parts]
    found = [ort_contestant(view, view.part, provider="cpu", threads=1, target=None) for view in views]
    yield found
    for one in found:
        one.runner.close()


class TestOperations:
    @pytest.fixture(params=GRAPHS, ids=lambda pair: "-".join(pair))
    def graph(self, request: pytest.FixtureRequest) -> tuple[str, Any]:
        return request.param

    @pytest.mark.parametrize("method", ["holov", "holov-plus", "divprune", "uniform", "none"])
    def test_are_those_that_torch_counts(
        self,
        graph: tuple[str, Any],
        method: str,
        photographs: list[Image.Image],
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """The counter looks into every operator but custom ones, so those run as plain functions."""
        monkeypatch.setattr(qwen_layers, "attend_and_receive", qwen_layers.attend_and_receive._init_fn)
        family, part = graph
        checkpoint = write_family(tmp_path / family, family)
        plan = family_plan(checkpoint, method, part=part)
        pixels = pixels_for(plan, [photographs[0], photographs[1].resize((150, 100))])
        with SafetensorsReader(checkpoint) as reader:
            module = vision_from_plan(plan, reader)
        for budget in (1, 9, largest_of(pixels) or plan.tokens):
            inputs = [torch.from_numpy(pixels.pixel_values)]
            asked, quota = budget, torch.full((2,), budget)
            if pixels.layouts:
                packed = packed_inputs(pixels.layouts, plan, quota.numpy())
                inputs += [torch.from_numpy(array.values) for array in packed.arrays]
                asked, quota = packed.budget, torch.from_numpy(packed.quota)
            counter = FlopCounterMode(display=False)
            math = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)  # fused kernels are not counted
            with torch.no_grad(), math, counter:
                module(*inputs, torch.tensor([asked]), quota)
            counted, ours = counter.get_total_flops(), operations_of_batch(plan, pixels, budget)
            if method in ("holov-plus", "divprune"):  # they compare all tokens with each other
                assert ours <= counted < 1.2 * ours
            else:
                assert ours == counted

    def test_a_packed_graph_has_no_number_without_its_pictures(self, tmp_path: Path) -> None:
        plan = family_plan(write_family(tmp_path / "next", "llava_next"))
        with pytest.raises(ValueError, match="unequal numbers of tokens"):
            operations_of(plan, 9)

    def test_at_true_size_they_are_the_known_numbers(self, tmp_path: Path) -> None:
        """Counted by hand: LLaVA-NeXT is five times LLaVA-1.5's tower; Qwen2.5-VL-7B at 24 x 24 tokens."""
        plan = true_size(family_plan(write_family(tmp_path / "next", "llava_next"), "none"))
        pixels = pixels_for(plan, [Image.new("RGB", (672, 672))])
        assert largest_of(pixels) == 2880
        # the tower's 577 rows less what CLS no longer needs: output projection, MLP and its row of the attention
        rows = 576 * 588 * 1024 + 22 * (577 * 12 * 1024**2 + 2 * 577**2 * 1024)
        last = 577 * 2 * 1024**2 + 576 * (10 * 1024**2 + 2 * 577 * 1024) + 1024**2 + 577 * 1024
        projector = 576 * (1024 * 4096 + 4096**2)
        assert operations_of_batch(plan, pixels, 2880) == 2 * 5 * (rows + last + projector)

        plan = true_size(family_plan(write_family(tmp_path / "qwen", "qwen2_5_vl"), "none"))
        pixels = pixels_for(plan, [Image.new("RGB", (672, 672))])
        assert largest_of(pixels) == 576
        of_patch = 32 * (4 * 1280**2 + 3 * 1280 * 3420) + 1176 * 1280
        attention = 4 * 2 * 2304**2 * 1280 + 28 * 36 * 2 * 64**2 * 1280
        merger = 576 * (5120**2 + 5120 * 3584)
        assert operations_of_batch(plan, pixels, 576) == 2 * (2304 * of_patch + attention + merger)


class TestBudgets:
    def test_shares_are_of_the_largest_picture_at_hand(self, contestants: list[Contestant]) -> None:
        for one in contestants:
            plan = one.bundle.manifest.plan
            pixels = pixels_of(one, 1)
            tokens = largest_of(pixels)
            if not plan.packed:
                assert tokens is None and one.budgets((), tokens) == (16, 5, 4, 2)
                continue
            assert tokens == pixels.layouts[0].tokens
            assert one.budgets((), tokens) == (tokens, round(tokens / 3), round(tokens * 2 / 9), round(tokens / 9))
            with pytest.raises(BudgetError, match=rf"1\.\.{plan.tokens}"):
                one.budgets((plan.tokens + 1,), tokens)

    def test_a_budget_above_a_pictures_tokens_keeps_all(self, contestants: list[Contestant]) -> None:
        for one in contestants:
            plan = one.bundle.manifest.plan
            if plan.packed:
                pixels = pixels_of(one, 5, [Image.new("RGB", (60, 40)), Image.new("RGB", (300, 100))])
                seen = one.runner.run(pixels, plan.tokens)
                assert seen.counts.tolist() == [layout.tokens for layout in pixels.layouts]
                one.run(pixels, plan.tokens)

    def test_the_usual_pictures_are_large_where_size_decides(self, contestants: list[Contestant]) -> None:
        for one in contestants:
            plan = one.bundle.manifest.plan
            pixels = pixels_of(one, 5)
            if plan.model.image.kind == "square":
                assert max(pixels.sizes[0]) == 84
            else:
                assert {max(size) for size in pixels.sizes} == {672}
                assert len(set(pixels.sizes)) > 1


def test_a_benchmark_of_each_graph(contestants: list[Contestant]) -> None:
    request = BenchRequest(batches=(1, 5), rounds=1, sustain=0, threads=(2,))
    report = bench(contestants, request, command="")
    assert not report.failures
    for one in contestants:
        plan = one.bundle.manifest.plan
        cases = [case for case in report.cases if case.contestant == one.info.label]
        assert {case.batch for case in cases} == {1, 5}
        for case in cases:
            pixels = pixels_of(one, case.batch)
            assert case.tokens == largest_of(pixels)
            expected = operations_of_batch(plan, pixels, case.budget) / case.batch / 1e9
            assert case.gflop_per_image == pytest.approx(expected, abs=1e-3)
            assert case.selection is not None and 0 < case.selection.share < 1
        largest = max(cases, key=lambda case: case.budget)
        assert largest.budget == (largest.tokens or plan.tokens)
    said = " ".join(remarks_of(report))
    assert ("the largest picture has" in said) == any(one.bundle.manifest.plan.packed for one in contestants)


class TestBaselines:
    @pytest.mark.parametrize("kind", ["plain", "uniform"])
    def test_has_every_graph_and_what_stands_beside_it(self, made: FamilyBundle, tmp_path: Path, kind: str) -> None:
        baseline = open_bundle(baseline_of(made.bundle, made.checkpoint, tmp_path / kind, kind=kind).folder)
        plan = baseline.manifest.plan
        assert plan.parts == made.bundle.manifest.plan.parts
        assert (baseline.newline is not None and baseline.newline.is_file()) == (plan.model.family == "llava_next")
        for part in plan.parts:
            view = baseline.of_part(part)
            pixels = pixels_for(view.manifest.plan, [Image.new("RGB", (90, 60), (200, 30, 90))])
            tokens = largest_of(pixels) or view.manifest.plan.tokens
            with OrtRunner(view, provider="cpu", threads=1) as runner:
                all_of_them, few = runner.run(pixels, tokens), runner.run(pixels, 8)
            assert all_of_them.positions.tolist() == [list(range(tokens))]
            with OrtRunner(made.bundle.of_part(part), provider="cpu", threads=1) as runner:
                assert np.allclose(runner.run(pixels, tokens).tokens, all_of_them.tokens, atol=1e-5)
            if kind == "uniform" and part == "image":
                assert few.positions.tolist() == [[(2 * index + 1) * tokens // 16 for index in range(8)]]

    def test_the_ratio_is_to_all_tokens_of_the_same_batch(self, made: FamilyBundle, tmp_path: Path) -> None:
        plain = baseline_of(made.bundle, made.checkpoint, tmp_path / "plain")
        part = made.bundle.manifest.plan.parts[-1]
        pair = [
            ort_contestant(bundle.of_part(part), label, provider="cpu", threads=1, target=None)
            for bundle, label in ((made.bundle, "pruned"), (plain, "plain"))
        ]
        try:
            pictures = (Image.new("RGB", (90, 60)), Image.new("RGB", (300, 200)))
            request = BenchRequest(budgets=(8,), batches=(1, 2), rounds=1, sustain=0, profile=False, pictures=pictures)
            report = bench(pair, request, command="")
            whole = {batch: largest_of(pixels_of(pair[0], batch, pictures)) for batch in (1, 2)}
        finally:
            for one in pair:
                one.runner.close()
        assert not report.failures
        ratios = {(ratio.batch, ratio.budget): ratio.baseline_budget for ratio in report.ratios}
        tokens = made.bundle.manifest.plan.of_part(part).tokens
        assert ratios == {(batch, 8): whole[batch] or tokens for batch in (1, 2)}
        if made.bundle.manifest.plan.model.family == "qwen2_5_vl":
            assert whole[1] != whole[2]


class TestCommand:
    def test_first_tokens_come_from_the_decoder_that_suits_the_bundle(
        self, with_decoder: FamilyBundle, capsys: pytest.CaptureFixture[str], tmp_path: Path
    ) -> None:
        path = tmp_path / "picture.png"
        Image.new("RGB", (300, 200), (10, 200, 30)).save(path)
        line = ["bench", str(with_decoder.bundle.folder), *QUICK, "--decoder", "--no-profile", "--image", str(path)]
        assert run([*line, "--budgets", "9,288", "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert "failures" not in found or not found["failures"]
        few, many = sorted(found["first_token"], key=lambda item: item["budget"])
        with Session.open(with_decoder.bundle, provider="cpu", threads=1) as session:
            (rows,), _ = session.rows_of([path], budget=288)
        assert rows.layout is not None and rows.layout.tokens == len(rows.rows) < 288
        assert many["prompt_tokens"] - few["prompt_tokens"] == rows.layout.tokens - 9
        assert {case["tokens"] for case in found["cases"]} == {rows.layout.tokens}

    def test_the_graph_of_clips(self, made: FamilyBundle, capsys: pytest.CaptureFixture[str]) -> None:
        line = ["bench", str(made.bundle.folder), *QUICK, "--part", "video", "--no-profile", "--json"]
        if made.bundle.manifest.plan.model.family != "video_llava":
            assert run(line) == 2
            assert "no vision graph for videos alone" in capsys.readouterr().err
            return
        assert run([*line, "--vs", "plain", "--checkpoint", str(made.checkpoint)]) == 0
        found = json.loads(capsys.readouterr().out)
        labels = [item["label"] for item in found["contestants"]]
        assert len(labels) == 2 and all(label.endswith(", video") for label in labels)
        assert {case["tokens"] for case in found["cases"]} == {136}
        assert {ratio["baseline_budget"] for ratio in found["ratios"]} == {136}

    def test_labels_tell_the_parts_apart(self, made: FamilyBundle) -> None:
        views = [made.bundle.of_part(part) for part in made.bundle.manifest.plan.parts]
        folder = made.bundle.folder.name
        assert labels_of(views, ["ort"]) == [[folder], [f"{folder}, video"]][: len(views)]
