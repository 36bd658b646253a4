"""`holov-export quantize`: a bundle that was exported becomes one with quantised vision graphs."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import click

from holov_export.bundle import open_bundle
from holov_export.cli.console import print_json, progress
from holov_export.cli.options import UserPath, bundle_argument, json_option, verify_option
from holov_export.cli.quantize_options import quantize_options, quantize_request
from holov_export.cli.quantized_text import ReportPrinter, print_quantized, quantized_json
from holov_export.errors import LossError
from holov_export.pipeline_quantized import quantize_bundle


@click.command()
@bundle_argument
@quantize_options
@click.option("-o", "--output", type=UserPath(), help="Folder of the new bundle.")
@click.option("--overwrite", is_flag=True, help="Replace a bundle that is already there.")
@verify_option
@json_option
def quantize(
    bundle: Path,
    quantized: str | None,
    quantize_for: Literal["tensorrt", "cpu"],
    recipe: str,
    pictures: Path | None,
    smooth: float | None,
    keep: tuple[str, ...],
    questions: Path | None,
    accept_loss: bool,
    output: Path | None,
    overwrite: bool,
    verify: Literal["full", "size"],
    as_json: bool,
) -> None:
    """Quantise the vision graphs of a bundle; needs no checkpoint.

    Ranges come from `calibrate`, or are collected now. What was lost is measured on other pictures and written to
    reports/precision.json. Exit code 1, and no bundle, if it is more than the recipe allows.
    """
    request = quantize_request(quantized, quantize_for, recipe, pictures, smooth, keep, questions, accept_loss)
    if request is None:
        raise click.UsageError("name the type: --int8 or --fp8.")
    source, printer = open_bundle(bundle, verify=verify), ReportPrinter(as_json)
    try:
        with progress() as tell:
            made = quantize_bundle(source, request, output, overwrite=overwrite, tell=tell, hear=printer.hear)
    except LossError:
        printer.refused()
        raise
    if as_json:
        print_json(quantized_json(made))
        return
    print_quantized(made)
