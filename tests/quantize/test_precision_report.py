"""The gate: what passes, what does not and why, and that a report says the same after it was written and read."""

from __future__ import annotations

from pathlib import Path

import pytest
from changed_bundles import INT8, WRITTEN, changed, noise, spoiled_rows
from PIL import Image

from holov_export.bundle import Bundle
from holov_export.errors import ImageError, LossError, UsageError
from holov_export.quantize.precision_report import (
    AnswersAt,
    AnswersKept,
    Estimated,
    PrecisionReport,
    Verdict,
    judge_vision,
    refuse_loss,
    vision_verdicts,
)
from holov_export.recipes import Limits
from holov_export.verify.vision_loss import PictureLoss

Named = list[tuple[str, Image.Image]]
LIMITS = Limits()
#: nothing that can be told is below these
ANYTHING = Limits(overlap=0.0, cosine=-1.0, answers=0.0)


@pytest.fixture
def pictures(photographs: list[Image.Image]) -> Named:
    return [(f"photograph {number}", picture) for number, picture in enumerate(photographs[:3])]


def judged(before: Bundle, after: Bundle, pictures: Named, limits: Limits = LIMITS, **more: bool) -> PrecisionReport:
    return judge_vision(
        before,
        after,
        pictures,
        limits,
        recipe="smoke-8",
        recipe_sha256="1" * 64,
        written=WRITTEN,
        threads=1,
        **more,
    )


def loss(count: int = 64, differing: int = 0, cosine: float | None = 1.0, tokens: int = 576) -> PictureLoss:
    return PictureLoss(
        picture="a.png",
        tokens=tokens,
        budget=count,
        count=count,
        overlap=1 - differing / count,
        cosine_min=cosine,
        cosine_mean=cosine,
        saliency_error=0.0,
        sound=True,
    )


def verdict(losses: list[PictureLoss], what: str, limits: Limits = LIMITS) -> Verdict:
    return next(item for item in vision_verdicts(losses, limits) if item.what == what)


def answers(same: int, questions: int = 200) -> AnswersKept:
    at = AnswersAt(
        budget=16,
        own_share=None,
        same=same,
        loyalty=Estimated(value=same / questions),
        before=None,
        after=None,
        kept=None,
    )
    better = at.model_copy(update={"budget": 48, "same": questions, "loyalty": Estimated(value=1.0)})
    return AnswersKept(
        data="d",
        sha256="",
        questions=questions,
        pictures=questions,
        metric="",
        decoders=("fp32", "fp32"),
        confidence=0.95,
        resamples=2000,
        at=(better, at),
        examples=(),
    )


CPU = INT8.model_copy(update={"engine": "cpu"})


class TestOfGraphs:
    @pytest.fixture
    def quantized(self, exported_bundle: Bundle, tmp_path: Path) -> Bundle:
        # ONNX Runtime runs Q/DQ graphs with fewer optimisations, which rounds otherwise; this one runs as before
        return changed(exported_bundle, tmp_path / "int8", lambda name, values: values, quantization=CPU)

    def test_nothing_lost(self, exported_bundle: Bundle, quantized: Bundle, pictures: Named) -> None:
        report = judged(exported_bundle, quantized, pictures)
        assert report.passed and report.failed == ()
        assert (report.summary.overlap_min, report.summary.saliency_error) == (1.0, 0.0)
        assert report.summary.cosine_min == pytest.approx(1.0, abs=1e-12)
        assert (report.precision, report.compared_with, report.method, report.part) == (
            "int8-cpu",
            "fp32",
            "holov",
            "image",
        )
        assert (report.recipe, report.quantization, report.written) == ("smoke-8", CPU, WRITTEN)
        assert [item.what for item in report.verdicts] == ["sound", "overlap", "cosine"]
        refuse_loss(report)

    def test_noise_is_refused_and_the_reason_named(
        self, exported_bundle: Bundle, pictures: Named, tmp_path: Path
    ) -> None:
        noisy = changed(exported_bundle, tmp_path / "noisy", noise(1.0), quantization=INT8)
        report = judged(exported_bundle, noisy, pictures)
        assert not report.passed
        assert {item.what for item in report.failed} == {"overlap", "cosine"}
        with pytest.raises(LossError) as caught:
            refuse_loss(report)
        said = caught.value
        assert said.exit_code == 1
        assert "the int8 graph (holov) lost more against fp32 than the recipe 'smoke-8' allows" in said.message
        overlap = min(loss.overlap for loss in report.losses if loss.budget == 21)  # 7 tokens are too few to judge
        assert f"overlap {overlap:.3f} is below 0.97 (photograph" in said.message
        assert f"cosine {report.summary.cosine_min:.5f} is below 0.999" in said.message
        assert "at 21 tokens" in said.message
        assert "--sensitivity" in said.hint and "--accept-loss" in said.hint
        with pytest.raises(LossError) as caught:
            refuse_loss(report.with_keep(("layers.0.mlp.fc2", "layers.1")))
        assert "--keep layers.0.mlp.fc2,layers.1" in caught.value.hint

    def test_a_loss_that_is_accepted_is_still_a_loss(
        self, exported_bundle: Bundle, pictures: Named, tmp_path: Path
    ) -> None:
        noisy = changed(exported_bundle, tmp_path / "noisy", noise(1.0), quantization=INT8)
        report = judged(exported_bundle, noisy, pictures, accepted_loss=True)
        assert not report.passed and report.accepted_loss
        refuse_loss(report)

    @pytest.mark.parametrize("side", ["before", "after"])
    def test_nan_never_passes(
        self, exported_bundle: Bundle, quantized: Bundle, pictures: Named, tmp_path: Path, side: str
    ) -> None:
        spoiled = changed(exported_bundle, tmp_path / "spoiled", spoiled_rows, quantization=INT8)
        before, after = (spoiled, quantized) if side == "before" else (exported_bundle, spoiled)
        report = judged(before, after, pictures[:1], ANYTHING)
        assert not report.passed
        assert {item.what for item in report.failed} == {"sound", "overlap", "cosine"}
        assert report.summary.cosine_min is None
        with pytest.raises(LossError, match=r"not finite, or another count of tokens.*cosine cannot be told"):
            refuse_loss(report)
        assert PrecisionReport.model_validate_json(report.model_dump_json()) == report

    def test_written_and_read_again(self, exported_bundle: Bundle, quantized: Bundle, pictures: Named) -> None:
        report = judged(exported_bundle, quantized, pictures).with_answers(answers(199)).with_keep(("layers.0",))
        again = PrecisionReport.model_validate_json(report.model_dump_json(indent=2))
        assert again == report and again.passed
        assert len(again.losses) == 9

    def test_what_is_not_quantised_is_not_judged(self, exported_bundle: Bundle, pictures: Named) -> None:
        with pytest.raises(UsageError, match="is not quantised"):
            judged(exported_bundle, exported_bundle, pictures)

    def test_no_picture(self, exported_bundle: Bundle, quantized: Bundle) -> None:
        with pytest.raises(ImageError, match="no picture"):
            judged(exported_bundle, quantized, [])


class TestVerdicts:
    @pytest.mark.parametrize(
        ("count", "differing", "passed"),
        [
            (64, 0, True),
            (64, 1, True),
            (64, 2, False),  # 0.969
            (192, 5, True),
            (192, 6, False),
            (16, 1, True),  # 0.938: one near-tie
            (16, 2, False),
        ],
    )
    def test_overlap(self, count: int, differing: int, passed: bool) -> None:
        found = verdict([loss(), loss(count, differing)], "overlap")
        assert found.passed is passed
        assert found.found == pytest.approx(1 - differing / count)

    def test_a_limit_of_one_lets_no_token_pass(self) -> None:
        strict = Limits(overlap=1.0)
        assert verdict([loss()], "overlap", strict).passed
        assert not verdict([loss(64, 1)], "overlap", strict).passed
        assert not verdict([loss(), loss(4, 1)], "overlap", strict).passed

    def test_a_few_tokens_are_judged_only_where_there_are_no_others(self) -> None:
        few = loss(5, 3, tokens=45)
        assert verdict([few, loss()], "overlap").passed
        assert verdict([few, loss()], "overlap").found == 1.0
        assert not verdict([few], "overlap").passed

    def test_a_budget_that_keeps_all_says_nothing_of_overlap(self) -> None:
        found = verdict([loss(576)], "overlap")
        assert (found.found, found.passed) == (None, True)
        assert verdict([loss(576), loss(64, 9)], "overlap").found == pytest.approx(1 - 9 / 64)

    def test_the_worst_picture_is_named(self) -> None:
        other = loss(192, 50, cosine=0.5).model_copy(update={"picture": "b.png"})
        found = vision_verdicts([loss(), other, loss(192)], LIMITS)
        assert [item.where for item in found] == ["", "b.png at 192 tokens", "b.png at 192 tokens"]

    @pytest.mark.parametrize(("cosine", "passed"), [(0.999, True), (0.99899, False), (None, False)])
    def test_cosine_counts_at_every_budget(self, cosine: float | None, passed: bool) -> None:
        assert verdict([loss(576, cosine=cosine)], "cosine").passed is passed

    def test_one_unsound_picture_fails_all(self) -> None:
        bad = loss().model_copy(update={"sound": False})
        assert [item.passed for item in vision_verdicts([loss(), bad], ANYTHING)] == [False, False, False]


class TestAnswers:
    @pytest.fixture
    def report(self, exported_bundle: Bundle) -> PrecisionReport:
        plan = exported_bundle.manifest.plan.model_copy(update={"quantization": INT8})
        picture = Image.new("RGB", (60, 60), (200, 40, 90))
        after = Bundle(exported_bundle.folder, exported_bundle.manifest.model_copy(update={"plan": plan}))
        return judged(exported_bundle, after, [("one", picture)])

    @pytest.mark.parametrize(("same", "passed"), [(200, True), (196, True), (195, False)])
    def test_the_worst_budget_counts(self, report: PrecisionReport, same: int, passed: bool) -> None:
        found = report.with_answers(answers(same))
        assert found.passed is passed
        (last,) = [item for item in found.verdicts if item.what == "answers"]
        assert (last.limit, last.found) == (0.98, same / 200)
        assert last.where == ("" if same == 200 else f"{200 - same} of 200 differ at 16 tokens")
        if not passed:
            with pytest.raises(LossError, match=r"answers 0\.975 is below 0\.98 \(5 of 200 differ at 16 tokens\)"):
                refuse_loss(found)

    def test_judged_twice_counts_once(self, report: PrecisionReport) -> None:
        found = report.with_answers(answers(100)).with_answers(answers(200))
        assert found.passed
        assert [item.what for item in found.verdicts].count("answers") == 1

    def test_nobody_asked(self, report: PrecisionReport) -> None:
        found = report.with_answers(answers(100)).with_answers(None, "no questions at hand")
        assert found.passed and found.answers is None
        assert found.no_answers == "no questions at hand"
        assert "answers" not in [item.what for item in found.verdicts]
