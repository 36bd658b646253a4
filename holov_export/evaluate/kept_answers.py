"""What a bundle's answers become when its precision changes: the same questions to two bundles.

Loyalty asks whether the answers stay the same, accuracy whether they stay right. Both sides may differ in the vision
graph, in the decoder, or in both.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np

from holov_export.assets import data_folder
from holov_export.bundle import Bundle
from holov_export.errors import BudgetError, UsageError
from holov_export.evaluate.data import Dataset, Picture, Question, check_pictures, dataset_from_questions
from holov_export.evaluate.formats import dataset_from_path
from holov_export.evaluate.intervals import CONFIDENCE, RESAMPLES, Array, Resamples, estimate_from, resamples_of
from holov_export.evaluate.journal import Journal
from holov_export.evaluate.metrics import LOYALTY, Metric
from holov_export.evaluate.plan import Cell, Plan, Size, tokens_of_share
from holov_export.evaluate.run import AskSettings, ask_all, check_prompts
from holov_export.evaluate.score import chosen_metrics
from holov_export.extras import is_installed
from holov_export.quantize.precision_report import AnswerPair, AnswersAt, AnswersKept, Estimated
from holov_export.runtime.runner import checked_budget
from holov_export.spec import DecoderPrecision, ExportPlan, Precision

#: where no budgets are named: a ninth, what a bundle keeps by itself
USUAL_SIZES: tuple[Size, ...] = (Fraction(1, 9),)
#: pairs of answers that a report shows
SHOWN = 12


@dataclass(frozen=True)
class Answers:
    """What a bundle said.

    Attributes:
        decoder: its precision. cells: rule and budget. texts: of each cell, in the order of the questions.
    """

    decoder: str
    cells: tuple[Cell, ...]
    texts: tuple[tuple[str, ...], ...]


def questions_at_hand(plan: ExportPlan, data: Path | None = None) -> tuple[Dataset | None, str]:
    """(questions to ask, "") or (None, why there are none): the user's, or for the demo model the shipped scenes.

    Raises:
        UsageError, StorageError: the user's file cannot be used.
    """
    if data is not None:
        found = dataset_from_path(data)
        check_pictures(found)
        return found, ""
    source = plan.source
    if source.kind == "bundled" and source.name == "demo":
        return demo_questions(), ""
    return None, "no questions at hand"


def demo_questions() -> Dataset:
    """The questions about the scenes that ship with the demo model, one a scene."""
    folder = data_folder("demo-scenes")
    rows = json.loads((folder / "questions.json").read_text(encoding="utf-8"))
    return dataset_from_questions(
        "demo-scenes",
        "jsonl",
        [
            Question(
                id=str(number),
                picture=Picture(row["image"], folder / row["image"]),
                text=row["question"],
                answers=(row["answer"],),
                group=row["image"],
                where=f"questions.json, question {number}",
            )
            for number, row in enumerate(rows, start=1)
        ],
    )


def obstacle_of(bundle: Bundle) -> str:
    """Why a bundle cannot be asked on this machine's CPU; "" if it can."""
    plan, name = bundle.manifest.plan, bundle.folder.name
    if plan.decoder is None:
        return f"'{name}' has no decoder"
    if plan.precision is Precision.BF16:
        return f"ONNX Runtime cannot run the bf16 vision graph of '{name}'"
    if plan.decoder is DecoderPrecision.BF16:
        return f"ONNX Runtime's CPU provider cannot run the bf16 decoder of '{name}'"
    if plan.decoder_provider != "cpu" and plan.decoder is not DecoderPrecision.FP16:
        return f"the decoder of '{name}' was built for {plan.decoder_provider}"
    missing = [module for module in ("onnxruntime", "tokenizers", "jinja2") if not is_installed(module)]
    return f"not installed: {', '.join(missing)}" if missing else ""


def kept_answers(
    before: Bundle,
    after: Bundle,
    dataset: Dataset,
    settings: AskSettings,
    sizes: Sequence[Size] = (),
    *,
    tell: Callable[[str], None] = lambda message: None,
    advance: Callable[[int], None] = lambda count: None,
) -> AnswersKept:
    """Ask both bundles all questions, one bundle after the other, and compare.

    Args:
        before, after: views of bundles of the same model, each with a decoder; they need no manifest on disk.
        dataset: a question without right answers counts for loyalty only, and then nothing is said of accuracy.
        sizes: budgets, numbers or shares; () for the bundle's usual one.

    Raises:
        UsageError: one has no decoder. BudgetError: a budget outside 1..N.
        PromptError: a question is too long. ImageError: a picture does not decode.
        EnvironmentFaultError: this machine lacks something.
    """
    for bundle in (before, after):
        if bundle.decoder is None:
            raise UsageError(f"the bundle '{bundle.folder.name}' has no decoder to ask.")
        check_prompts(bundle, dataset, settings)
    sizes = tuple(sizes) or _usual_sizes(before)  # the same for both
    first = answers_of(before, dataset, settings, sizes, tell=tell, advance=advance)
    second = answers_of(after, dataset, settings, sizes, tell=tell, advance=advance)
    return kept_from_answers(dataset, first, second)


def answers_of(
    bundle: Bundle,
    dataset: Dataset,
    settings: AskSettings,
    sizes: Sequence[Size] = (),
    *,
    journal: Journal | None = None,
    tell: Callable[[str], None] = lambda message: None,
    advance: Callable[[int], None] = lambda count: None,
) -> Answers:
    """Ask one bundle.

    Args:
        bundle: a view; its rule answers.
        journal: what it holds is not asked again; None for one in memory, for a bundle that is not finished yet.

    Raises:
        see `kept_answers`.
    """
    cells = tuple(_cells(bundle, tuple(sizes) or _usual_sizes(bundle)))
    if journal is None:
        journal = Journal(Path("memory"), io.BytesIO(), [])
    plan = Plan(
        tokens=bundle.manifest.plan.model.image_tokens,
        methods=(bundle.method,),
        budgets=tuple(cell.budget for cell in cells),
        reference=cells[0],
        cells=cells[1:],
        baseline=bundle.method,
    )
    ask_all(bundle, dataset, plan, settings, journal, tell=tell, advance=advance)
    texts = tuple(
        tuple(answered[question.id].text for question in dataset.questions)
        for answered in (journal.cell(*cell.asked) for cell in cells)
    )
    return Answers(bundle.manifest.plan.decoder_name, cells, texts)


def _usual_sizes(bundle: Bundle) -> tuple[Size, ...]:
    budget = bundle.manifest.plan.budget
    return USUAL_SIZES if budget is None else (budget,)


def _cells(bundle: Bundle, sizes: Sequence[Size]) -> Iterator[Cell]:
    """The bundle's own rule at each budget, none asked twice."""
    plan, method = bundle.manifest.plan, bundle.method
    tokens, asked = plan.model.image_tokens, set[tuple[str, int]]()
    for size in sizes:
        if isinstance(size, Fraction) and not 0 < size <= 1:
            raise BudgetError(f"the share {size} is outside 0..1.")
        budget = tokens_of_share(size, tokens) if isinstance(size, Fraction) else checked_budget(size, tokens)
        share = size if isinstance(size, Fraction) and plan.packed else None
        key = (method if share is None else f"{method}, {share} of each", budget)
        if key not in asked:
            asked.add(key)
            yield Cell(method, budget, key, method, budget, share=share)


def kept_from_answers(dataset: Dataset, before: Answers, after: Answers) -> AnswersKept:
    """Compare what two bundles said to the same questions at the same budgets."""
    questions = dataset.questions
    known = all(question.answers for question in questions)
    metric = chosen_metrics(dataset, None)[0] if known else None
    resamples = resamples_of([question.group for question in questions])
    at, pairs = [], []
    for cell, left, right in zip(before.cells, before.texts, after.texts, strict=True):
        loyal = LOYALTY.columns(questions, right, left)
        at.append(_at(cell, questions, (left, right), loyal, metric, resamples))
        pairs += [
            AnswerPair(
                picture=question.picture.name,
                question=question.text,
                budget=cell.budget,
                right=question.answers,
                before=said,
                after=said_after,
                same=bool(same),
            )
            for question, said, said_after, same in zip(questions, left, right, loyal[:, 0], strict=True)
        ]
    return AnswersKept(
        data=dataset.name,
        sha256=dataset.sha256,
        questions=len(questions),
        pictures=len(dataset.pictures),
        metric="" if metric is None else metric.title,
        decoders=(before.decoder, after.decoder),
        confidence=CONFIDENCE,
        resamples=RESAMPLES,
        at=tuple(at),
        examples=tuple(sorted(pairs, key=lambda pair: pair.same)[:SHOWN]),
    )


def _at(
    cell: Cell,
    questions: Sequence[Question],
    texts: tuple[Sequence[str], Sequence[str]],
    loyal: Array,
    metric: Metric | None,
    resamples: Resamples,
) -> AnswersAt:
    """One budget."""
    kept = AnswersAt(
        budget=cell.budget,
        own_share=None if cell.share is None else str(cell.share),
        same=int(loyal[:, 0].sum()),
        loyalty=_estimated(LOYALTY, loyal, resamples) or Estimated(value=0.0),
        before=None,
        after=None,
        kept=None,
    )
    if metric is None:
        return kept
    left, right = texts
    before, after = metric.columns(questions, left, left), metric.columns(questions, right, left)
    figures = {
        "before": _estimated(metric, before, resamples),
        "after": _estimated(metric, after, resamples),
        "kept": _ratio(metric, after, before, resamples),
    }
    return kept.model_copy(update=figures)


def _estimated(metric: Metric, columns: Array, resamples: Resamples) -> Estimated | None:
    sums = resamples.sums(columns)
    return _estimate(float(metric.value(sums.all)), metric.value(sums.drawn), resamples)


def _ratio(metric: Metric, above: Array, below: Array, resamples: Resamples) -> Estimated | None:
    """Of both sides in the same draws, so that an easy draw is easy for both."""
    first, second = resamples.sums(above), resamples.sums(below)
    with np.errstate(divide="ignore", invalid="ignore"):
        value = metric.value(first.all) / metric.value(second.all)
        drawn = metric.value(first.drawn) / metric.value(second.drawn)
    return _estimate(float(value), drawn, resamples)


def _estimate(value: float, drawn: Array, resamples: Resamples) -> Estimated | None:
    """Draws that are all equal are no interval: they only say that nothing else was seen."""
    found = estimate_from(value, drawn, resamples.groups)
    if found.value is None:
        return None
    return Estimated(value=found.value) if found.low == found.high else Estimated(**vars(found))
