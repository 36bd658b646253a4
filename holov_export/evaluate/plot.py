"""A picture of an evaluation: what is kept against the budget, a curve for each rule."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from holov_export.errors import StorageError
from holov_export.evaluate.results import Evaluation, value_of
from holov_export.extras import require

#: told apart by people with colour-blindness as well. Source: Okabe and Ito, "Color Universal Design", 2008
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKS = ("o", "s", "^", "D", "v", "P", "X")
_STYLES = ("-", "--", ":")


def plot_retention(report: Evaluation, path: Path) -> None:
    """Write a PNG: retention of the report's metric against the budget, with its intervals as bands.

    Raises:
        MissingExtraError: matplotlib is not installed.
        StorageError: the file cannot be written.
    """
    require("matplotlib").use("Agg")
    pyplot = require("matplotlib.pyplot")
    figure, axis = pyplot.subplots(figsize=(8.6, 4.8), layout="constrained")
    try:
        for index, method in enumerate(report.methods):
            _curve(axis, report, method, index)
        _axes(axis, report)
        # beside the panel: curves go everywhere in it
        figure.legend(loc="outside right upper", fontsize=8, frameon=False)
        machine = report.machine.gpu.name if report.machine.gpu else report.machine.cpu
        figure.suptitle(
            f"{report.bundle.model}: {report.data.questions} questions of {report.data.name}, {report.data.groups} "
            f"groups\n{machine}, {report.date}",
            fontsize=9,
            parse_math=False,  # a file may be called a$b$.jsonl
        )
        work = path.with_name(f".{path.name}.partial")
        figure.savefig(work, dpi=150, format="png")
        work.replace(path)
    except OSError as error:
        raise StorageError(f"cannot write '{path}': {error.strerror}.") from error
    finally:
        pyplot.close(figure)


def _curve(axis: Any, report: Evaluation, method: str, index: int) -> None:
    """A rule from its largest budget down; the unpruned run, where all curves begin, is drawn once by `_axes`."""
    cells = sorted((cell for cell in report.cells if cell.method == method), key=lambda cell: cell.budget)
    found = [(cell.budget, value_of(cell.retention, report.metric)) for cell in cells]
    points = [(budget, item) for budget, item in found if item is not None and item.value is not None]
    if not points:
        return
    colour, mark = _COLOURS[index % len(_COLOURS)], _MARKS[index % len(_MARKS)]
    style = _STYLES[(index // len(_COLOURS)) % len(_STYLES)]
    budgets = [budget for budget, _ in points]
    values = [100 * item.value for _, item in points if item.value is not None]
    axis.plot(budgets, values, color=colour, marker=mark, markersize=5, linestyle=style, label=method)
    banded = [
        (budget, item.low, item.high) for budget, item in points if item.low is not None and item.high is not None
    ]
    if banded:
        low, high = [100 * item[1] for item in banded], [100 * item[2] for item in banded]
        axis.fill_between([item[0] for item in banded], low, high, color=colour, alpha=0.12, linewidth=0)


def _axes(axis: Any, report: Evaluation) -> None:
    full = report.reference.budget
    axis.plot([full], [100], color="#444444", marker="*", markersize=11, linestyle="none", label=f"all {full} tokens")
    axis.axhline(100, color="#444444", linewidth=0.8, linestyle=(0, (1, 3)))
    axis.set_xscale("log")
    ticks = sorted({full, *report.budgets})
    axis.set_xticks(ticks, [f"{budget}\n{budget / full:.1%}" for budget in ticks], fontsize=8)
    axis.minorticks_off()
    axis.set_xlabel("budget: visual tokens of a picture (logarithmic)")
    axis.set_ylabel(f"kept of {report.title(report.metric)}, % (band: {report.bootstrap.confidence:.0%} interval)")
    axis.grid(alpha=0.3)
