"""A picture of a benchmark: latency against budget, and the time to the first token in stages."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from holov_export.errors import StorageError
from holov_export.extras import require
from holov_export.verify.bench_results import BenchReport, CaseResult, FirstTokenResult

#: told apart by people with colour-blindness as well. Source: Okabe and Ito, "Color Universal Design", 2008
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKS = ("o", "s", "^", "D", "v", "P", "X")
_STAGES = ("preprocess", "vision", "stitch", "setup", "prefill")
_STAGE_COLOURS = ("#BBBBBB", "#0072B2", "#999999", "#E69F00", "#D55E00")


def plot_report(report: BenchReport, path: Path) -> None:
    """Write a PNG: a panel for each batch, and one of first tokens if any were measured.

    Raises:
        MissingExtraError: matplotlib is not installed.
        StorageError: the file cannot be written.
    """
    require("matplotlib").use("Agg")
    pyplot = require("matplotlib.pyplot")
    batches = sorted({item.batch for item in report.cases})
    panels = len(batches) + bool(report.first_token)
    figure, axes = pyplot.subplots(1, panels, figsize=(1.2 + 4.2 * panels, 4.6), squeeze=False, layout="constrained")
    try:
        for axis, batch in zip(axes[0], batches, strict=False):
            _latency_panel(axis, report, batch)
        axes[0][0].set_ylabel("latency of a batch, ms (median; bar: p90, tick: p99)")
        if report.first_token:
            _first_token_panel(axes[0][-1], report.first_token)
        machine = report.machine.gpu.name if report.machine.gpu else report.machine.cpu
        figure.suptitle(f"{machine}, {report.date}", fontsize=9)
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise StorageError(f"cannot write '{path}': {error.strerror}.") from error
    finally:
        pyplot.close(figure)


def _latency_panel(axis: Any, report: BenchReport, batch: int) -> None:
    labels = [one.label for one in report.contestants]
    plain = {one.label for one in report.contestants if one.method == "none"}
    for index, label in enumerate(labels):
        found = sorted(
            (item for item in report.cases if item.contestant == label and item.batch == batch),
            key=lambda item: item.budget,
        )
        colour, mark = _COLOURS[index % len(_COLOURS)], _MARKS[index % len(_MARKS)]
        if not found:
            continue
        if label in plain:
            axis.axhline(found[0].latency.p50, color=colour, linestyle="--", label=f"{label}, all {found[0].budget}")
            continue
        _latency_line(axis, found, label, colour, mark)
    axis.set_title(f"B = {batch}")
    axis.set_xlabel("budget K, tokens an image")
    axis.set_ylim(bottom=0)
    axis.set_xticks(sorted({item.budget for item in report.cases}))
    axis.grid(alpha=0.3)
    axis.legend(fontsize=7, loc="lower right")


def _latency_line(axis: Any, found: Sequence[CaseResult], label: str, colour: str, mark: str) -> None:
    budgets = [item.budget for item in found]
    middle = [item.latency.p50 for item in found]
    above = [item.latency.p90 - item.latency.p50 for item in found]
    axis.errorbar(budgets, middle, yerr=[[0.0] * len(found), above], color=colour, marker=mark, capsize=3, label=label)
    axis.plot(budgets, [item.latency.p99 for item in found], color=colour, marker="_", linestyle="none")
    on_gpu = [(item.budget, item.gpu.p50) for item in found if item.gpu]
    if on_gpu:
        axis.plot(*zip(*on_gpu, strict=True), color=colour, marker=mark, linestyle=":", label=f"{label}, GPU work")


def _first_token_panel(axis: Any, found: Sequence[FirstTokenResult]) -> None:
    several = len({item.contestant for item in found}) > 1
    names = [f"{item.contestant}\n{item.budget}" if several else str(item.budget) for item in found]
    places = range(len(found))
    base = [0.0] * len(found)
    for stage, colour in zip(_STAGES, _STAGE_COLOURS, strict=True):
        heights = [float(getattr(item, stage)) for item in found]
        axis.bar(places, heights, 0.62, bottom=base, color=colour, label=stage)
        base = [low + height for low, height in zip(base, heights, strict=True)]
    for place, top in zip(places, base, strict=True):
        axis.annotate(f"{top:.3g}", (place, top), ha="center", va="bottom", fontsize=8)
    axis.set_xticks(list(places), names, fontsize=7 if several else 9)
    axis.set_title("time to the first token, B = 1, ms (medians)")
    axis.set_xlabel("budget K" if not several else "")
    axis.margins(y=0.12)
    axis.grid(axis="y", alpha=0.3)
    axis.legend(fontsize=7)
