"""An evaluation as rows for tables, as Markdown, and as files."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from pydantic import ValidationError

from holov_export.errors import StorageError, UsageError
from holov_export.evaluate.metrics import DESCRIPTIONS
from holov_export.evaluate.results import SCHEMA, CellResult, Evaluation, MetricValue, budget_text, value_of
from holov_export.verify.bench_report import ABSENT, Rows, markdown_table

JSON, MARKDOWN, PLOT = "evaluation.json", "evaluation.md", "retention.png"
#: title, columns (a '>' at the end: right-aligned), rows
Table = tuple[str, tuple[str, ...], Rows]


def evaluation_from_file(path: Path) -> Evaluation:
    """Read an evaluation.json.

    Raises:
        UsageError: it is not one, or of another schema.
        StorageError: it cannot be read.
    """
    try:
        found = Evaluation.model_validate_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise StorageError(f"cannot read '{path}': {error.strerror}.") from error
    except (ValidationError, UnicodeDecodeError) as error:
        words = error.errors()[0]["msg"] if isinstance(error, ValidationError) else "it is not text"
        raise UsageError(f"'{path}' is no {JSON} of schema {SCHEMA}: {words}.") from error
    if found.schema_version != SCHEMA:
        raise UsageError(f"'{path}' is no {JSON} of schema {SCHEMA}: its schema is {found.schema_version}.")
    return found


def write_evaluation(report: Evaluation, folder: Path) -> list[Path]:
    """Write evaluation.json and evaluation.md; each appears whole or stays as it was.

    Raises:
        StorageError: they cannot be written.
    """
    texts = {JSON: report.model_dump_json(indent=2) + "\n", MARKDOWN: markdown_of(report)}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            work = folder / f".{name}.partial"
            work.write_text(text, encoding="utf-8")
            os.replace(work, folder / name)
    except OSError as error:
        raise StorageError(f"cannot write to '{folder}': {error.strerror}.") from error
    return [folder / name for name in texts]


# ---------------------------------------------------------------------------------------------------- tables


def tables_of(report: Evaluation, *, kinds: bool = True) -> Iterator[Table]:
    """Every table that a report shows: the chosen metric and what is kept of it first.

    Args:
        kinds: also the one by kind of question, which is wide.
    """
    names = [name for name, _ in report.titles]
    first = report.metric
    yield _values(report, first)
    if first != "loyalty":
        yield _grid(report, f"kept of {report.title(first)}, %", lambda cell: value_of(cell.retention, first))
        yield _values(report, "loyalty")
    yield from _differences(report, first)
    for name in names:
        if name not in (first, "loyalty"):
            yield _values(report, name)
    if kinds:
        for name in dict.fromkeys((first, *(name for name in names if name == "accuracy-plus"))):
            yield from _kinds(report, name)


def _values(report: Evaluation, metric: str) -> Table:
    return _grid(report, f"{report.title(metric)}, %", lambda cell: value_of(cell.metrics, metric))


def _grid(report: Evaluation, title: str, value: Callable[[CellResult], MetricValue | None]) -> Table:
    """A row for each rule, a column for each budget; the unpruned run is a row of its own."""
    full = report.reference.budget
    budgets = list(dict.fromkeys((full, *report.budgets)))
    shares = {cell.budget: cell.own_share for cell in report.cells}
    heads = [
        f"{budget_text(budget, own)}>" if (own := shares.get(budget)) else f"{budget} ({budget / full:.1%})>"
        for budget in budgets
    ]
    found = {(cell.method, cell.budget): value(cell) for cell in report.cells}
    rows = [["unpruned", interval_text(value(report.reference)), *([""] * (len(budgets) - 1))]]
    for method in report.methods:
        cells = [found.get((method, budget)) for budget in budgets]
        rows.append([method, *(interval_text(cell) if cell else "" for cell in cells)])
    return title, ("", *heads), rows


def _differences(report: Evaluation, metric: str) -> Iterator[Table]:
    rows = [
        [cell.method, budget_text(cell.budget, cell.own_share), difference_text(value_of(cell.differences, metric))]
        for cell in report.cells
        if cell.differences
    ]
    if rows:
        title = f"{report.title(metric)}: difference to {report.baseline} at the same budget, points"
        yield title, ("", "tokens>", "difference>"), rows


def _kinds(report: Evaluation, metric: str) -> Iterator[Table]:
    kinds = [item.kind for item in report.reference.kinds if item.metric == metric]
    if not kinds:
        return
    rows = []
    for cell in (report.reference, *report.cells):
        name = "unpruned" if cell is report.reference else cell.method
        values = {item.kind: item.value for item in cell.kinds if item.metric == metric}
        rows.append([name, budget_text(cell.budget, cell.own_share), *(_percent(values.get(kind)) for kind in kinds)])
    heads = [f"{kind or 'other'}>" for kind in kinds]
    yield f"{report.title(metric)} by kind of question, %", ("", "tokens>", *heads), rows


def interval_text(found: MetricValue | None) -> str:
    """A share in percent, `93.0 [90.2, 95.5]`; without an interval the value alone."""
    if found is None or found.value is None:
        return ABSENT
    if found.low is None or found.high is None:
        return _percent(found.value)
    return f"{_percent(found.value)} [{_percent(found.low)}, {_percent(found.high)}]"


def difference_text(found: MetricValue | None) -> str:
    """A difference in points, `+2.1 [+0.4, +3.9]`."""
    if found is None or found.value is None:
        return ABSENT
    value = f"{found.value * 100:+.1f}"
    if found.low is None or found.high is None:
        return value
    return f"{value} [{found.low * 100:+.1f}, {found.high * 100:+.1f}]"


def _percent(value: float | None) -> str:
    return ABSENT if value is None else f"{value * 100:.1f}"


def remarks_of(report: Evaluation) -> list[str]:
    """What a reader must know beside the tables."""
    boot = report.bootstrap
    draws = f"{boot.resamples} bootstrap draws of {boot.groups} whole groups of questions, seed {boot.seed}"
    said = [
        f"[{boot.confidence:.0%} interval], {draws}",
        f"unpruned: {report.reference.method} with all {report.reference.budget} tokens",
    ]
    if report.ask.suffix:
        said.append(f'after every question: "{report.ask.suffix}"')
    unclear = [
        f"{cell.method} at {budget_text(cell.budget, cell.own_share)}: {found.value:.1%}"
        for cell in (report.reference, *report.cells)
        if (found := value_of(cell.metrics, "unclear")) is not None and found.value
    ]
    if unclear:
        said.append(f"answers that are neither yes nor no count as wrong ({'; '.join(unclear)})")
    return [*said, *report.remarks]


# ---------------------------------------------------------------------------------------------------- Markdown


def markdown_of(report: Evaluation) -> str:
    """The report as a document."""
    data, bundle = report.data, report.bundle
    model = f"{bundle.model} {bundle.precision}, N={bundle.tokens}, decoder {report.ask.decoder} ({bundle.decoder})"
    asked = f"{data.questions} of {data.total} questions about {data.pictures} pictures in {data.groups} groups"
    lines = [
        "# Evaluation",
        "",
        f"{report.date}, `{report.command}`",
        "",
        f"{report.machine}",
        "",
        f"- **{bundle.name}**: {model}, answers of at most {report.ask.max_new_tokens} tokens",
        f"- **{data.name}** ({data.format}): {asked}",
    ]
    for title, columns, rows in tables_of(report):
        heads, *cells = _escaped([columns, *rows])  # a kind of question can be the head of a column
        lines += ["", f"## {title[0].upper()}{title[1:]}", "", *markdown_table(heads, cells)]
    lines += ["", *(f"- {remark}." for remark in remarks_of(report))]
    return "\n".join(lines) + "\n"


def _escaped(rows: Sequence[Sequence[str]]) -> Rows:
    return [[cell.replace("|", "\\|") for cell in row] for row in rows]


def quality_metrics(report: Evaluation) -> list[str]:
    """Names of the metrics of which more is better."""
    return [name for name, _ in report.titles if name not in DESCRIPTIONS]
