"""The smallest budget, and the rule, that keep a share of the answers; with what each costs on this machine."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import Field

from holov_export.bundle import Bundle
from holov_export.errors import StorageError
from holov_export.evaluate.data import Question
from holov_export.evaluate.plan import Cell, Plan
from holov_export.evaluate.report import Table, interval_text
from holov_export.evaluate.results import (
    AskInfo,
    BundleInfo,
    CellResult,
    DataInfo,
    Evaluation,
    MetricValue,
    budget_text,
    value_of,
)
from holov_export.evaluate.run import AskSettings, Opened, opened_cell, shared_decoder
from holov_export.policies import Frozen
from holov_export.runtime.preprocess import pixels_from_pictures
from holov_export.tensors import SamplingSettings, Timings
from holov_export.verify.bench import Case, measure, warm_up
from holov_export.verify.machine import Machine, utc_now

SCHEMA = 1
JSON = "recommendation.json"
#: a cell is warm after so many runs or seconds, whichever comes first
_WARM_RUNS, _WARM_SECONDS = 20, 2.0
_FIRST_TOKEN = SamplingSettings(max_new_tokens=1)


class Latency(Frozen):
    """Milliseconds of one picture and one question, medians.

    Attributes:
        vision: the graph. setup: what the decoder prepares for any prompt. prefill: stitching, and the prompt up to the
            first token. first_token: all three; without preprocessing, which is the same for all.
    """

    vision: float
    setup: float
    prefill: float
    first_token: float


class Candidate(Frozen):
    """A rule at a budget.

    Attributes:
        own_share: as of `CellResult`.
        value: of the metric. retention: its ratio to the unpruned run. loyalty: same answers as the unpruned run.
        latency: None for rules inside the language model of transformers, which no bundle holds.
        keeps: the lower end of the retention's interval is at least what was asked for.
    """

    method: str
    budget: int
    own_share: str | None = None
    value: MetricValue
    retention: MetricValue
    loyalty: MetricValue
    latency: Latency | None
    keeps: bool


class Recommendation(Frozen):
    """recommendation.json.

    Attributes:
        retain: share of the unpruned metric that must be kept. metric, title: which one.
        rounds: interleaved runs of each cell that the latencies are medians of.
        chosen: None if nothing keeps as much.
        unpruned: all tokens. candidates: smallest budget first, and the fastest first among equal ones.
    """

    schema_version: int = SCHEMA
    date: str
    command: str
    machine: Machine
    data: DataInfo
    bundle: BundleInfo
    ask: AskInfo
    retain: float = Field(gt=0, le=1)
    metric: str
    title: str
    rounds: int
    chosen: Candidate | None
    unpruned: Candidate
    candidates: tuple[Candidate, ...]
    remarks: tuple[str, ...]


@dataclass
class _Times:
    """Seconds of each run of a cell."""

    vision: list[float] = field(default_factory=list)
    setup: list[float] = field(default_factory=list)
    prefill: list[float] = field(default_factory=list)

    def add(self, vision: float, decoder: Timings) -> None:
        self.vision.append(vision)
        self.setup.append(decoder.setup)
        self.prefill.append(decoder.stitch + decoder.prefill)

    def clear(self) -> None:
        for times in (self.vision, self.setup, self.prefill):
            times.clear()

    def latency(self) -> Latency:
        together = [sum(parts) for parts in zip(self.vision, self.setup, self.prefill, strict=True)]
        vision, setup, prefill, first_token = (
            round(statistics.median(times) * 1e3, 3) for times in (self.vision, self.setup, self.prefill, together)
        )
        return Latency(vision=vision, setup=setup, prefill=prefill, first_token=first_token)


@dataclass(frozen=True)
class Measured:
    """Latencies by (method, budget) of the journal, and how many rounds were made."""

    latencies: dict[tuple[str, int], Latency]
    rounds: int


def latencies_of(
    bundle: Bundle, plan: Plan, settings: AskSettings, question: Question, *, rounds: int, seconds: float
) -> Measured:
    """Time the vision graph and the first token of every cell whose rule is in the bundle.

    All are loaded together and run in interleaved rounds, so that each sees the same machine.

    Args:
        question: that is asked; one, so that all prompts differ in nothing but the picture's tokens.
        rounds: runs of each cell. seconds: no round begins later, but one is always made.

    Raises:
        EnvironmentFaultError: this machine lacks something.
    """
    cells = [cell for cell in plan.to_ask() if not cell.inner]
    times = {cell.asked: _Times() for cell in cells}
    pixels = pixels_from_pictures([question.picture.read()], bundle.manifest.plan.model)
    with ExitStack() as stack:
        lent = stack.enter_context(shared_decoder(bundle, settings))
        graphs = {
            cell.graph: stack.enter_context(opened_cell(bundle, cell, settings, lent))
            for cell in {cell.graph: cell for cell in cells}.values()
        }

        def run_of(cell: Cell, opened: Opened, taken: _Times) -> Callable[[], None]:
            def run() -> None:
                began = time.perf_counter()
                rows = opened.see(pixels, cell).rows
                seen = time.perf_counter()
                answer = opened.session.answer(rows, settings.prompt(question), sampling=_FIRST_TOKEN)
                taken.add(seen - began, answer.timings)

            return run

        cases = [
            Case(cell.method, 1, cell.budget, run_of(cell, graphs[cell.graph], times[cell.asked])) for cell in cells
        ]
        for case in cases:
            warm_up(case.run, runs=_WARM_RUNS, seconds=_WARM_SECONDS)
        for taken in times.values():
            taken.clear()
        made = measure(cases, rounds, deadline=time.perf_counter() + seconds)
    return Measured({key: taken.latency() for key, taken in times.items()}, len(made[0].wall))


def recommendation_from(
    report: Evaluation, plan: Plan, measured: Measured, retain: float, *, command: str = ""
) -> Recommendation:
    """Choose from an evaluation: the smallest budget that keeps `retain`, among equal ones the fastest rule.

    The lower end of the interval decides. The unpruned run is no candidate, nor is a rule that is in no bundle.
    """
    results = {(cell.method, cell.budget): cell for cell in report.cells}
    found = []
    for cell in plan.cells:
        if cell.asked == plan.reference.asked:
            continue
        latency = measured.latencies.get(cell.asked)
        found.append(_candidate(results[cell.method, cell.budget], report.metric, latency, retain))
    found.sort(key=lambda item: (item.budget, item.latency.first_token if item.latency else float("inf")))
    chosen = next((item for item in found if item.keeps), None)
    unpruned = _candidate(report.reference, report.metric, measured.latencies[plan.reference.asked], retain)
    return Recommendation(
        date=utc_now(),
        command=command,
        machine=report.machine,
        data=report.data,
        bundle=report.bundle,
        ask=report.ask,
        retain=retain,
        metric=report.metric,
        title=report.title(report.metric),
        rounds=measured.rounds,
        chosen=chosen,
        unpruned=unpruned,
        candidates=tuple(found),
        remarks=(*report.remarks, *_doubts(chosen, report.bootstrap.groups)),
    )


def _doubts(chosen: Candidate | None, groups: int) -> list[str]:
    """An interval without width says less than it seems: no draw can show what no question has shown.

    Source: the rule of three; Hanley and Lippman-Hand, JAMA 249(13), 1983.
    """
    if chosen is None or chosen.retention.low != chosen.retention.high:
        return []
    agree = f"no draw of the {groups} groups differs, so the interval has no width"
    return [f"{agree}; that up to {min(1.0, 3 / groups):.0%} of all groups lose something is still possible"]


def _candidate(cell: CellResult, metric: str, latency: Latency | None, retain: float) -> Candidate:
    value, retention, loyalty = (
        value_of(values, name)
        for values, name in ((cell.metrics, metric), (cell.retention, metric), (cell.metrics, "loyalty"))
    )
    assert value is not None and retention is not None and loyalty is not None
    keeps = latency is not None and retention.low is not None and retention.low >= retain
    return Candidate(
        method=cell.method,
        budget=cell.budget,
        own_share=cell.own_share,
        value=value,
        retention=retention,
        loyalty=loyalty,
        latency=latency,
        keeps=keeps,
    )


def write_recommendation(found: Recommendation, folder: Path) -> Path:
    """Write recommendation.json.

    Raises:
        StorageError: it cannot be written.
    """
    work = folder / f".{JSON}.partial"
    try:
        work.write_text(found.model_dump_json(indent=2) + "\n", encoding="utf-8")
        work.replace(folder / JSON)
    except OSError as error:
        raise StorageError(f"cannot write to '{folder}': {error.strerror}.") from error
    return folder / JSON


# ---------------------------------------------------------------------------------------------------- in words


def table_of(found: Recommendation) -> Table:
    """Every candidate and the unpruned run; the chosen one is marked."""
    columns = ("", "tokens>", f"{found.title}, %>", "kept, %>", "loyalty, %>")
    rows = [_row(item, found) for item in (*found.candidates, found.unpruned)]
    title = f"what is kept of {found.title}, and what it costs; asked for: {found.retain:.1%}"
    return title, (*columns, "vision ms>", "setup>", "prefill>", "first token>", ""), rows


def _row(item: Candidate, found: Recommendation) -> list[str]:
    times = item.latency
    cells = ["-"] * 4
    if times is not None:
        cells = [f"{value:.2f}" for value in (times.vision, times.setup, times.prefill, times.first_token)]
    verdict = "<- smallest" if item == found.chosen else "keeps" if item.keeps else ""
    if item is found.unpruned:
        verdict = ""
    return [
        "unpruned" if item is found.unpruned else item.method,
        budget_text(item.budget, item.own_share),
        interval_text(item.value),
        interval_text(item.retention),
        interval_text(item.loyalty),
        *cells,
        verdict,
    ]


def verdict_of(found: Recommendation) -> str:
    """The recommendation in one sentence."""
    best = found.chosen
    if best is None:
        return f"nothing keeps {found.retain:.1%} of {found.title}: {_nearest(found.candidates)}."
    assert best.latency is not None and best.retention.low is not None and found.unpruned.latency is not None
    size = (
        f"{best.budget} of {found.bundle.tokens}" if best.own_share is None else f"{best.own_share} of each picture's"
    )
    return (
        f"{best.method} at {size} tokens keeps at least {best.retention.low:.1%} of "
        f"{found.title} (asked for: {found.retain:.1%}); first token after {best.latency.first_token:.1f} ms instead "
        f"of {found.unpruned.latency.first_token:.1f} ms."
    )


def _nearest(candidates: Sequence[Candidate]) -> str:
    if not candidates:
        return "at these budgets every rule gives the unpruned run's tokens, and nothing is pruned"
    if not any(item.latency for item in candidates):
        return "all of these rules prune inside the language model, and none of them can be exported"
    lows = [(item.retention.low, item) for item in candidates if item.retention.low is not None and item.latency]
    if not lows:
        return "there are no intervals, because all questions are of one group or the metric is not defined"
    low, item = max(lows, key=lambda pair: pair[0])
    size = budget_text(item.budget, item.own_share)
    return f"the most that is certain is {low:.1%}, with {item.method} at {size} tokens"
