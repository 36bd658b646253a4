"""What a quantisation says: its reports as they come, and the bundle at the end."""

from __future__ import annotations

from typing import Any

from holov_export.cli.console import OUT, print_json
from holov_export.cli.export_text import print_result, result_json
from holov_export.cli.precision_text import print_precision
from holov_export.engine import Engine
from holov_export.pipeline_quantized import Quantized
from holov_export.quantize.precision_report import PrecisionReport


class ReportPrinter:
    """Prints what the gate found, also where it then refuses the bundle."""

    def __init__(self, as_json: bool) -> None:
        self._as_json, self._heard = as_json, list[PrecisionReport]()

    def hear(self, report: PrecisionReport) -> None:
        """See `pipeline_quantized.Hear`."""
        self._heard.append(report)
        if not self._as_json:
            print_precision(report)

    def refused(self) -> None:
        """No bundle will be written; programs get the reports nevertheless."""
        if self._as_json and self._heard:
            print_json({"bundle": None, "precision": _reports_json(self._heard)})


def print_quantized(made: Quantized) -> None:
    """The parity of the graphs before, if they were exported for this, and where the bundle is."""
    OUT.print()
    print_result(made.bundle, made.parity)


def quantized_json(made: Quantized, engines: tuple[Engine, ...] = ()) -> dict[str, Any]:
    """The result of `export` and the reports of the gate."""
    return {**result_json(made.bundle, made.parity, engines), "precision": _reports_json(list(made.reports))}


def _reports_json(reports: list[PrecisionReport]) -> list[dict[str, Any]]:
    return [{**report.model_dump(mode="json"), "passed": report.passed} for report in reports]
