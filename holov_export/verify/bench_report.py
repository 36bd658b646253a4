"""A benchmark's results as rows for a table and as Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from pydantic import ValidationError

from holov_export.errors import StorageError, UsageError
from holov_export.verify.bench_results import SCHEMA, BenchReport, CaseResult
from holov_export.verify.device_monitor import DeviceReading, Span

JSON, MARKDOWN, PLOT = "bench.json", "bench.md", "bench.png"
ABSENT = "-"

Rows = list[list[str]]


def report_from_file(path: Path) -> BenchReport:
    """Read a bench.json.

    Raises:
        UsageError: it is not one, or of another schema.
        StorageError: it cannot be read.
    """
    try:
        return BenchReport.model_validate_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise StorageError(f"cannot read '{path}': {error.strerror}.") from error
    except ValidationError as error:
        raise UsageError(f"'{path}' is no bench.json of schema {SCHEMA}: {error.errors()[0]['msg']}.") from error


def write_report(report: BenchReport, folder: Path) -> list[Path]:
    """Write bench.json and bench.md into a folder, which is made if need be.

    Raises:
        StorageError: it cannot be written.
    """
    texts = {JSON: report.model_dump_json(indent=2, exclude_none=True) + "\n", MARKDOWN: markdown_of(report)}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            (folder / name).write_text(text, encoding="utf-8")
    except OSError as error:
        raise StorageError(f"cannot write to '{folder}': {error.strerror}.") from error
    return [folder / name for name in texts]


# ---------------------------------------------------------------------------------------------------- tables

CASE_COLUMNS = (
    "",
    "B>",
    "K>",
    "p50 ms>",
    "p90>",
    "p99>",
    "GPU ms>",
    "copies>",
    "host>",
    "images/s>",
    "TFLOP/s>",
    "selection>",
)


def case_rows(report: BenchReport) -> Rows:
    """One row a case, for `CASE_COLUMNS`."""
    return [
        [
            item.contestant,
            str(item.batch),
            str(item.budget),
            *(_number(value) for value in (item.latency.p50, item.latency.p90, item.latency.p99)),
            _number(item.gpu.p50 if item.gpu else None),
            _number(item.copies.p50 if item.copies else None),
            _number(item.host.p50 if item.host else None),
            _number(item.images_per_second),
            _rate(item),
            _share(item),
        ]
        for item in report.cases
    ]


def _rate(item: CaseResult) -> str:
    return _number(item.tflops) + (f" ({item.peak_share:.0%} of peak)" if item.peak_share is not None else "")


def _share(item: CaseResult) -> str:
    if item.selection is None:
        return ABSENT
    most = item.selection.share + item.selection.mixed
    return f"{item.selection.share:.1%}" + (f" to {most:.1%}" if item.selection.mixed > 0.0005 else "")


RATIO_COLUMNS = ("ratio of medians", "to", "B>", "K>", "latency>", "GPU>")


def ratio_rows(report: BenchReport) -> Rows:
    """One row a ratio, for `RATIO_COLUMNS`."""
    return [
        [
            item.contestant,
            f"{item.baseline}, K={item.baseline_budget}",
            str(item.batch),
            str(item.budget),
            f"{item.latency:.3f}",
            ABSENT if item.gpu is None else f"{item.gpu:.3f}",
        ]
        for item in report.ratios
    ]


CONCURRENCY_COLUMNS = ("", "B>", "K>", "threads>", "p50 ms>", "p90>", "p99>", "images/s>")


def concurrency_rows(report: BenchReport) -> Rows:
    """One row for each number of threads, for `CONCURRENCY_COLUMNS`."""
    return [
        [
            item.contestant,
            str(item.batch),
            str(item.budget),
            str(item.threads),
            *(_number(value) for value in (item.latency.p50, item.latency.p90, item.latency.p99)),
            _number(item.images_per_second),
        ]
        for item in report.concurrency
    ]


FIRST_TOKEN_COLUMNS = (
    "first token",
    "K>",
    "prompt>",
    "preprocess ms>",
    "vision ms>",
    "stitch ms>",
    "setup ms>",
    "prefill ms>",
    "TTFT ms>",
)


def first_token_rows(report: BenchReport) -> Rows:
    """One row a budget, for `FIRST_TOKEN_COLUMNS`."""
    return [
        [
            item.contestant,
            str(item.budget),
            str(item.prompt_tokens),
            *(
                _number(value)
                for value in (item.preprocess, item.vision, item.stitch, item.setup, item.prefill, item.total)
            ),
        ]
        for item in report.first_token
    ]


DEVICE_COLUMNS = ("alone", "B>", "K>", "p50 ms>", "SM MHz>", "memory MHz>", "W>", "device MiB>", "busy %>", "C>")


def device_rows(report: BenchReport) -> Rows:
    """One row for each case that ran alone while the device was read, for `DEVICE_COLUMNS`."""
    return [
        [
            item.contestant,
            str(item.batch),
            str(item.budget),
            _number(item.sustained.p50 if item.sustained else None),
            *_device_cells(item.device),
        ]
        for item in report.cases
        if item.device is not None
    ]


def _device_cells(device: DeviceReading) -> list[str]:
    power = _span(device.power_w)
    if device.power_w is None and device.rails:
        power = ", ".join(f"{rail.name} {rail.watts.mean:.1f}" for rail in device.rails)
    return [
        _span(device.sm_clock_mhz),
        _span(device.memory_clock_mhz),
        power,
        _span(device.memory_used_mb),
        _span(device.load_percent),
        _span(device.temperature_c),
    ]


def _span(span: Span | None) -> str:
    if span is None:
        return ABSENT
    mean = f"{span.mean:.0f}"
    return mean if f"{span.least:.0f}" == f"{span.most:.0f}" else f"{mean} ({span.least:.0f} to {span.most:.0f})"


def _number(value: float | None) -> str:
    """Three significant digits or more."""
    if value is None:
        return ABSENT
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.1f}" if abs(value) >= 100 else f"{value:.3g}"


def tables_of(report: BenchReport) -> Iterator[tuple[str, tuple[str, ...], Rows]]:
    """(title, columns, rows) of every table that has rows."""
    tables = (
        ("latency, one caller", CASE_COLUMNS, case_rows(report)),
        ("ratios (below 1 is faster)", RATIO_COLUMNS, ratio_rows(report)),
        ("each case alone", DEVICE_COLUMNS, device_rows(report)),
        ("several callers", CONCURRENCY_COLUMNS, concurrency_rows(report)),
        ("time to the first token", FIRST_TOKEN_COLUMNS, first_token_rows(report)),
    )
    return ((title, columns, rows) for title, columns, rows in tables if rows)


def remarks_of(report: BenchReport) -> list[str]:
    """What a reader must know beside the tables."""
    said = [f"{report.rounds} interleaved rounds after a warm-up until steady"]
    restless = [f"{item.contestant} B={item.batch} K={item.budget}" for item in report.cases if not item.warm_up.steady]
    if restless:
        said.append(f"never steady, so read with care: {'; '.join(restless)}")
    if not any(item.gpu for item in report.cases):
        said.append("no GPU times: ONNX Runtime gives none")
    if report.no_device is not None:
        said.append(f"clocks, power and device memory were not read: {report.no_device}")
    said += _sizes_of(report)
    if report.target:
        said.append(f"peak rates are those of the target {report.target}")
    said += report.notes
    return said


def _sizes_of(report: BenchReport) -> list[str]:
    """How large the pictures were, of contestants whose pictures differ."""
    found: dict[str, dict[int, int]] = {}
    for item in report.cases:
        if item.tokens is not None:
            found.setdefault(item.contestant, {})[item.batch] = item.tokens
    labels: dict[str, list[str]] = {}
    for label, sizes in found.items():
        said = ", ".join(f"{tokens} (B={batch})" for batch, tokens in sizes.items())
        labels.setdefault(f"the largest picture has {said} tokens", []).append(label)
    return [f"{', '.join(names)}: {said}" for said, names in labels.items()]


# ---------------------------------------------------------------------------------------------------- Markdown


def markdown_of(report: BenchReport) -> str:
    """The report as a document."""
    lines = ["# Benchmark", "", f"{report.date}, `{report.command}`", "", f"{report.machine}", ""]
    for one in report.contestants:
        memory = f", {one.device_mb:.0f} MiB on the device" if one.device_mb is not None else ""
        built = f", built with {one.built_with}" if one.built_with else ""
        lines.append(
            f"- **{one.label}**: {one.method} {one.precision}, N={one.tokens}, {one.engine}{built}, "
            f"loaded in {one.load_seconds:.2f} s{memory}"
        )
    for title, columns, rows in tables_of(report):
        lines += ["", f"## {title.capitalize()}", "", *markdown_table(columns, rows)]
    lines += ["", *(f"- {remark}." for remark in remarks_of(report))]
    if report.failures:
        lines += ["", "## What did not work", "", *(f"- {item.step}: {item.reason}" for item in report.failures)]
    return "\n".join(lines) + "\n"


def markdown_table(columns: Sequence[str], rows: Rows) -> list[str]:
    """Lines of a table; a column whose name ends in '>' is right-aligned."""
    heads = " | ".join(column.rstrip(">") for column in columns)
    rules = "|".join("---:" if column.endswith(">") else "---" for column in columns)
    return [f"| {heads} |", f"|{rules}|", *(f"| {' | '.join(row)} |" for row in rows)]
