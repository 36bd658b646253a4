"""From answers to an `Evaluation`: every metric of every cell, its retention and its differences, with intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from holov_export import __version__
from holov_export.bundle import MANIFEST, Bundle
from holov_export.errors import UsageError
from holov_export.evaluate.data import Dataset, Question
from holov_export.evaluate.intervals import (
    CONFIDENCE,
    FEW_GROUPS,
    RESAMPLES,
    SEED,
    Array,
    Resamples,
    Sums,
    estimate_from,
    resamples_of,
)
from holov_export.evaluate.journal import Journal
from holov_export.evaluate.metrics import DESCRIPTIONS, METRICS, Metric, metrics_for
from holov_export.evaluate.plan import Cell, Plan
from holov_export.evaluate.results import (
    AskInfo,
    BootstrapInfo,
    BundleInfo,
    CellResult,
    DataInfo,
    Evaluation,
    KindValue,
    MetricValue,
)
from holov_export.evaluate.run import AskSettings
from holov_export.storage import sha256_of
from holov_export.verify.machine import this_machine, utc_now

#: digits that are kept of shares: further ones differ between processors
_DIGITS = 6
#: more kinds than these are no table any more
MOST_KINDS = 40


@dataclass(frozen=True)
class _Scored:
    """The columns of every metric of one cell, and their sums."""

    cell: Cell
    columns: dict[str, Array]
    sums: dict[str, Sums]
    visual_tokens: float


def chosen_metrics(dataset: Dataset, metric: str | None) -> tuple[Metric, ...]:
    """The metrics that apply, the chosen one first.

    Raises:
        UsageError: the chosen one does not apply; the message names those that do.
    """
    found = metrics_for(dataset)
    if metric is None:
        return found
    names = [item.name for item in found if item.name not in DESCRIPTIONS]
    if metric not in names:
        known = metric in [item.name for item in METRICS]
        said = f"the metric '{metric}' does not apply to this data" if known else f"unknown metric '{metric}'"
        raise UsageError(f"{said}; these apply: {', '.join(names)}.")
    return tuple(sorted(found, key=lambda item: item.name != metric))


def evaluation_from_journal(
    bundle: Bundle,
    dataset: Dataset,
    plan: Plan,
    settings: AskSettings,
    journal: Journal,
    *,
    metric: str | None = None,
    command: str = "",
    seconds: float = 0.0,
) -> Evaluation:
    """Score a journal that holds all answers of the plan.

    Args:
        metric: that tables begin with; None for the customary one of the data's format.
        command, seconds: of the run.
    """
    metrics = chosen_metrics(dataset, metric)
    resamples = resamples_of([question.group for question in dataset.questions])
    scorer = _Scorer(dataset.questions, metrics, resamples, journal, plan)
    remarks = [*plan.remarks, *_remarks(dataset, plan)]
    model, decoder = bundle.manifest.plan, settings.back_end(bundle)
    return Evaluation(
        tool=f"holov-export {__version__}",
        date=utc_now(),
        seconds=round(seconds, 1),
        command=command,
        machine=this_machine(),
        data=DataInfo(
            name=dataset.name,
            format=dataset.format,
            questions=len(dataset.questions),
            total=dataset.total,
            pictures=len(dataset.pictures),
            groups=len(dataset.groups),
            sha256=dataset.sha256,
        ),
        bundle=BundleInfo(
            name=bundle.folder.name,
            model=model.model.name,
            precision=model.precision_name,
            decoder=model.decoder_name if model.decoder and decoder != "hf" else decoder,
            tokens=plan.tokens,
            methods=bundle.methods,
            manifest_sha256=sha256_of(bundle.folder / MANIFEST),
        ),
        ask=AskInfo(
            decoder=decoder,
            provider=settings.provider,
            suffix=settings.suffix,
            max_new_tokens=settings.max_new_tokens,
        ),
        bootstrap=BootstrapInfo(resamples=RESAMPLES, seed=SEED, confidence=CONFIDENCE, groups=resamples.groups),
        metric=metrics[0].name,
        titles=tuple((item.name, item.title) for item in metrics),
        baseline=plan.baseline,
        reference=scorer.result(plan.reference),
        cells=tuple(scorer.result(cell) for cell in plan.cells),
        remarks=tuple(remarks),
    )


def _remarks(dataset: Dataset, plan: Plan) -> list[str]:
    said = []
    if len(dataset.questions) < dataset.total:
        said.append(f"only the first {len(dataset.questions)} of {dataset.total} questions were asked")
    if len(dataset.groups) < 2:
        said.append("all questions are of one group, so there are no intervals")
    elif len(dataset.groups) < FEW_GROUPS:
        said.append(f"with {len(dataset.groups)} groups the intervals are too narrow: {FEW_GROUPS} or more are needed")
    inner = [cell for cell in plan.cells if cell.inner]
    if inner:
        names = ", ".join(dict.fromkeys(cell.method for cell in inner))
        said.append(f"{names}: inside the language model of transformers, for reference; not exported")
        layers = "; ".join(f"{cell.method} at {cell.budget}: {cell.layer_average:.1f}" for cell in inner)
        said.append(f"visual tokens that a layer of the language model sees on average: {layers}")
    return said


class _Scorer:
    """Scores cells against the unpruned run and the baseline, each cell once."""

    def __init__(
        self,
        questions: Sequence[Question],
        metrics: Sequence[Metric],
        resamples: Resamples,
        journal: Journal,
        plan: Plan,
    ) -> None:
        self._questions, self._metrics, self._resamples = questions, metrics, resamples
        self._journal, self._plan = journal, plan
        self._reference = self._texts(plan.reference)
        self._kinds = _kinds(questions)
        self._known: dict[tuple[str, int], _Scored] = {}

    def _texts(self, cell: Cell) -> list[str]:
        answered = self._journal.cell(*cell.asked)
        return [answered[question.id].text for question in self._questions]

    def _scored(self, cell: Cell) -> _Scored:
        if cell.asked not in self._known:
            answers = self._texts(cell)
            columns = {item.name: item.columns(self._questions, answers, self._reference) for item in self._metrics}
            together = self._resamples.sums(np.concatenate(list(columns.values()), axis=1))
            sums, at = {}, 0
            for name, found in columns.items():
                span = slice(at, at + found.shape[1])
                sums[name], at = Sums(together.all[span], together.drawn[:, span]), span.stop
            answered = self._journal.cell(*cell.asked)
            rows = float(np.mean([answered[question.id].visual_tokens for question in self._questions]))
            self._known[cell.asked] = _Scored(cell, columns, sums, rows)
        return self._known[cell.asked]

    def result(self, cell: Cell) -> CellResult:
        """All that a report says of a cell."""
        mine, unpruned = self._scored(cell), self._scored(self._plan.reference)
        quality = [metric for metric in self._metrics if metric.name not in DESCRIPTIONS]
        baseline = self._baseline(cell)
        return CellResult(
            method=cell.method,
            budget=cell.budget,
            share=round(float(cell.share or cell.budget / self._plan.tokens), _DIGITS),
            own_share=None if cell.share is None else str(cell.share),
            inside=cell.inner,
            visual_tokens=round(mine.visual_tokens, 2),
            layer_tokens=round(mine.visual_tokens if cell.layer_average is None else cell.layer_average, 2),
            metrics=tuple(self._value(metric, mine) for metric in self._metrics),
            retention=tuple(self._ratio(metric, mine, unpruned) for metric in quality),
            differences=tuple(self._difference(metric, mine, baseline) for metric in quality) if baseline else (),
            kinds=tuple(self._of_kinds(mine)),
        )

    def _baseline(self, cell: Cell) -> _Scored | None:
        """The baseline at the cell's budget; None for the baseline itself and where both are the unpruned run."""
        if cell is self._plan.reference or cell.method == self._plan.baseline:
            return None
        for other in self._plan.cells:
            if other.method == self._plan.baseline and other.budget == cell.budget:
                return self._scored(other) if other.asked != cell.asked else None
        return None

    def _value(self, metric: Metric, mine: _Scored) -> MetricValue:
        sums = mine.sums[metric.name]
        return self._estimate(metric.name, float(metric.value(sums.all)), metric.value(sums.drawn))

    def _ratio(self, metric: Metric, mine: _Scored, other: _Scored) -> MetricValue:
        above, below = mine.sums[metric.name], other.sums[metric.name]
        with np.errstate(divide="ignore", invalid="ignore"):
            value = metric.value(above.all) / metric.value(below.all)
            drawn = metric.value(above.drawn) / metric.value(below.drawn)
        return self._estimate(metric.name, float(value), drawn)

    def _difference(self, metric: Metric, mine: _Scored, other: _Scored) -> MetricValue:
        first, second = mine.sums[metric.name], other.sums[metric.name]
        drawn = metric.value(first.drawn) - metric.value(second.drawn)
        return self._estimate(metric.name, float(metric.value(first.all) - metric.value(second.all)), drawn)

    def _estimate(self, name: str, value: float, drawn: Array) -> MetricValue:
        found = estimate_from(value, drawn, self._resamples.groups)
        return MetricValue(metric=name, value=_short(found.value), low=_short(found.low), high=_short(found.high))

    def _of_kinds(self, mine: _Scored) -> list[KindValue]:
        return [
            KindValue(
                kind=kind,
                metric=metric.name,
                questions=len(where),
                value=_short(float(metric.value(mine.columns[metric.name][where].sum(axis=0)))),
            )
            for kind, where in self._kinds.items()
            for metric in self._metrics
        ]


def _kinds(questions: Sequence[Question]) -> dict[str, list[int]]:
    """Places of the questions of each kind; none if there is one kind only, or too many."""
    found: dict[str, list[int]] = {}
    for place, question in enumerate(questions):
        found.setdefault(question.kind, []).append(place)
    return dict(sorted(found.items())) if 1 < len(found) <= MOST_KINDS else {}


def _short(value: float | None) -> float | None:
    return None if value is None or not np.isfinite(value) else round(value, _DIGITS)
