"""What a quantised graph lost against the same graph before, and whether that is allowed: reports/precision.json.

The vision part is judged here. What became of the answers is asked by `evaluate.kept_answers` and added to the report.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

from pydantic import Field

from holov_export.bundle import Bundle
from holov_export.errors import LossError, UsageError
from holov_export.policies import Frozen
from holov_export.quantize.summary import QuantizedSummary
from holov_export.recipes import Limits
from holov_export.spec import Quantization
from holov_export.verify.parity import SMALLEST_JUDGED
from holov_export.verify.vision_loss import (
    USUAL_SIZES,
    LossSummary,
    PictureLoss,
    Pictures,
    Size,
    summary_of,
    vision_losses,
)

#: of precision.json
SCHEMA: Literal[1] = 1
#: tokens of a picture that may differ whatever share of its kept set they are: the last one kept and the first one left
#: out can be as good as equal, and at 16 tokens one of them is 6 %. Not with a limit of 1
NEAR_TIES = 1


class Estimated(Frozen):
    """A share with its interval; no ends where the questions are of one group, or none differs from the others."""

    value: float
    low: float | None = None
    high: float | None = None


class AnswerPair(Frozen):
    """What both said to one question. right: the right answers, empty where nobody knows them."""

    picture: str
    question: str
    budget: int
    right: tuple[str, ...]
    before: str
    after: str
    same: bool


class AnswersAt(Frozen):
    """Answers at one budget.

    Attributes:
        budget: tokens; of the largest picture where pictures differ. own_share: "1/9", what each then keeps of its own.
        same: answers that are the same text. loyalty: their share.
        before, after: share of right answers, by the metric of `AnswersKept`; kept: after / before. None where the
            right answers are not known, or none was right before.
    """

    budget: int
    own_share: str | None
    same: int
    loyalty: Estimated
    before: Estimated | None
    after: Estimated | None
    kept: Estimated | None


class AnswersKept(Frozen):
    """The same questions to two bundles.

    Attributes:
        data: name of the questions. sha256: of them.
        questions, pictures: how many. Few of them prove little, so they are said beside every share.
        metric: what `before` and `after` are; "" where the right answers are not known.
        decoders: precision of both decoders.
        confidence, resamples: of the intervals, which draw whole groups of questions (pictures, where nothing is said).
        at: budget by budget. examples: pairs of answers, those that differ first.
    """

    data: str
    sha256: str
    questions: int = Field(ge=1)
    pictures: int = Field(ge=1)
    metric: str
    decoders: tuple[str, str]
    confidence: float
    resamples: int
    at: tuple[AnswersAt, ...] = Field(min_length=1)
    examples: tuple[AnswerPair, ...]

    @property
    def worst(self) -> AnswersAt:
        """The budget at which fewest answers stayed the same."""
        return min(self.at, key=lambda item: item.same)


class Verdict(Frozen):
    """One limit.

    Attributes:
        what: "sound" has no limit: numbers are finite and both graphs kept as many tokens.
        limit: of the recipe. found: the smallest value that was judged; None where there was none.
        where: "scene_1.png at 16 tokens"; empty where nothing is worth a word.
    """

    what: Literal["sound", "overlap", "cosine", "answers"]
    limit: float | None
    found: float | None
    where: str
    passed: bool


class PrecisionReport(Frozen):
    """precision.json, of one graph.

    Attributes:
        precision, method, part: of the quantised graph. compared_with: precision of the same graph before.
        recipe, recipe_sha256: whose pictures and limits these are.
        pictures: names. losses: of each picture at each budget. summary: over them.
        limits: of the recipe. verdicts: one for each that was judged.
        written: which products were quantised, which stayed and why, and how many bytes that saves.
        answers: None with the reason in `no_answers`.
        keep: what should stay in `compared_with`'s type, as a sensitivity sweep found it; empty for none.
        accepted_loss: the user takes it, whatever it is.
    """

    schema_version: Literal[1] = SCHEMA
    precision: str
    method: str
    part: Literal["image", "video"]
    compared_with: str
    recipe: str
    recipe_sha256: str
    quantization: Quantization
    pictures: tuple[str, ...]
    losses: tuple[PictureLoss, ...] = Field(min_length=1)
    summary: LossSummary
    limits: Limits
    verdicts: tuple[Verdict, ...] = Field(min_length=1)
    written: QuantizedSummary
    answers: AnswersKept | None = None
    no_answers: str = ""
    keep: tuple[str, ...] = ()
    accepted_loss: bool = False

    @property
    def passed(self) -> bool:
        """Whether every limit is kept, whatever the user accepts."""
        return all(verdict.passed for verdict in self.verdicts)

    @property
    def failed(self) -> tuple[Verdict, ...]:
        """The limits that are not kept."""
        return tuple(verdict for verdict in self.verdicts if not verdict.passed)

    def with_answers(self, answers: AnswersKept | None, reason: str = "") -> PrecisionReport:
        """The report with what became of the answers, judged; or with the reason why nobody was asked."""
        verdicts = tuple(verdict for verdict in self.verdicts if verdict.what != "answers")
        if answers is not None:
            verdicts = (*verdicts, _answers_verdict(answers, self.limits))
        return self.model_copy(update={"answers": answers, "no_answers": reason, "verdicts": verdicts})

    def with_keep(self, keep: Sequence[str]) -> PrecisionReport:
        """The report with the layers that a sweep says should be kept."""
        return self.model_copy(update={"keep": tuple(keep)})


def judge_vision(
    before: Bundle,
    after: Bundle,
    pictures: Pictures,
    limits: Limits,
    *,
    recipe: str,
    recipe_sha256: str,
    written: QuantizedSummary,
    sizes: Sequence[Size] = USUAL_SIZES,
    accepted_loss: bool = False,
    threads: int | None = None,
    tell: Callable[[str], None] = lambda message: None,
) -> PrecisionReport:
    """Run a graph and its quantised form on pictures that the calibration did not see, and judge what was lost.

    Args:
        before, after: views of the float and of the quantised bundle, of the same rule and part.
        recipe, recipe_sha256: whose limits and pictures these are, also where the quantisation itself needs none.
        written: what the writer of `after` says that it did.
        sizes: budgets; overlap is judged where they do not keep everything.

    Raises:
        UsageError: `after` is not quantised. ImageError: there is no picture.
        EnvironmentFaultError, BundleError: see `OrtRunner`.
    """
    plan = after.manifest.plan
    if plan.quantization is None:
        raise UsageError(f"the graph '{after.title}' is not quantised, so there is no loss to judge.")
    losses = vision_losses(before, after, pictures, sizes, threads=threads, tell=tell)
    return PrecisionReport(
        precision=plan.precision_name,
        method=plan.method,
        part=plan.part,
        compared_with=before.manifest.plan.precision_name,
        recipe=recipe,
        recipe_sha256=recipe_sha256,
        quantization=plan.quantization,
        pictures=tuple(name for name, _ in pictures),
        losses=losses,
        summary=summary_of(losses),
        limits=limits,
        verdicts=vision_verdicts(losses, limits),
        written=written,
        accepted_loss=accepted_loss,
    )


def vision_verdicts(losses: Sequence[PictureLoss], limits: Limits) -> tuple[Verdict, ...]:
    """Soundness, overlap and cosine. What is not sound keeps no limit."""
    broken = [loss for loss in losses if not loss.sound]
    sound = Verdict(what="sound", limit=None, found=None, where=_place(broken[0]) if broken else "", passed=not broken)
    return (sound, _overlap_verdict(losses, limits.overlap), _cosine_verdict(losses, limits.cosine))


def _overlap_verdict(losses: Sequence[PictureLoss], limit: float) -> Verdict:
    """From `SMALLEST_JUDGED` tokens on, unless there are nowhere so many; `NEAR_TIES` may differ."""
    pruned = [loss for loss in losses if loss.budget < loss.tokens]
    strict = limit == 1.0
    judged = [loss for loss in pruned if strict or loss.count >= SMALLEST_JUDGED] or pruned
    passed = all(
        loss.sound and (loss.overlap >= limit or (not strict and loss.differing <= NEAR_TIES)) for loss in judged
    )
    worst = min(judged, key=lambda loss: loss.overlap, default=None)
    return Verdict(
        what="overlap",
        limit=limit,
        found=None if worst is None else worst.overlap,
        where="" if worst is None else _place(worst),
        passed=passed,
    )


def _cosine_verdict(losses: Sequence[PictureLoss], limit: float) -> Verdict:
    """Of all rows that both kept, at every budget."""
    measured = [(loss.cosine_min, loss) for loss in losses if loss.cosine_min is not None]
    found, worst = min(measured, key=lambda pair: pair[0], default=(None, None))
    passed = found is not None and found >= limit and all(loss.sound for loss in losses)
    where = "" if worst is None else _place(worst)
    return Verdict(what="cosine", limit=limit, found=found, where=where, passed=passed)


def _answers_verdict(answers: AnswersKept, limits: Limits) -> Verdict:
    worst, limit = answers.worst, limits.answers
    differing = answers.questions - worst.same
    return Verdict(
        what="answers",
        limit=limit,
        found=worst.loyalty.value,
        where=f"{differing} of {answers.questions} differ at {worst.budget} tokens" if differing else "",
        passed=worst.same >= limit * answers.questions,
    )


def _place(loss: PictureLoss) -> str:
    return f"{loss.picture} at {loss.budget} tokens"


def refuse_loss(report: PrecisionReport) -> None:
    """Refuse a graph that lost more than its recipe allows, unless the loss is accepted.

    Raises:
        LossError: names the limits, and what to keep where a sweep found it.
    """
    if report.passed or report.accepted_loss:
        return
    title = report.method if report.part == "image" else f"{report.method}, {report.part}"
    said = "; ".join(_failure_text(verdict) for verdict in report.failed)
    way_out = (
        f"Keep what matters most: --keep {','.join(report.keep)}."
        if report.keep
        else "See which layers matter: holov-export calibrate BUNDLE --sensitivity, and name them with --keep."
    )
    raise LossError(
        f"the {report.precision} graph ({title}) lost more against {report.compared_with} than the recipe "
        f"'{report.recipe}' allows: {said}.",
        hint=f"{way_out} Or take the loss: --accept-loss.",
    )


def _failure_text(verdict: Verdict) -> str:
    """In words: "overlap 0.906 is below 0.97 (scene_1.png at 16 tokens)"."""
    place = f" ({verdict.where})" if verdict.where else ""
    if verdict.limit is None:
        return f"numbers that are not finite, or another count of tokens{place}"
    if verdict.found is None or verdict.found >= verdict.limit:  # judged by what is sound
        return f"{verdict.what} cannot be told"
    return f"{verdict.what} {share_text(verdict.found, verdict.what)} is below {verdict.limit:g}{place}"


def share_text(value: float, what: str) -> str:
    """A value of a verdict as people read it; cosines differ in later digits."""
    return f"{value:.5f}" if what == "cosine" else f"{value:.3f}"
