"""`holov-export calibrate`: the ranges of a bundle's activations, kept in the bundle."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import click
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from holov_export.bundle import Bundle, open_bundle
from holov_export.cli.console import ERR, OUT, print_json, progress, say, table
from holov_export.cli.options import bundle_argument, graph_of, json_option, method_option, verify_option
from holov_export.cli.quantize_options import (
    keep_option,
    pictures_option,
    quantize_for_option,
    quantize_request,
    recipe_option,
    smooth_option,
)
from holov_export.cli.sensitivity_text import print_sensitivity
from holov_export.compile.graph_file import graph_from_file
from holov_export.pipeline_quantized import swept
from holov_export.quantize.cache import calibrated, ranges_folder
from holov_export.quantize.linears import linears_of
from holov_export.quantize.observe import Advance, Tell, check_can_observe
from holov_export.quantize.ranges import OUTLIER, NamedRange, Ranges, RangesSummary, summary_of
from holov_export.quantize.sensitivity_record import Sensitivity
from holov_export.recipes import NamedPicture, Recipe, RecipePictures, pictures_of, recipe_from_name
from holov_export.request import quantization_from_request
from holov_export.spec import Quantization


@click.command()
@bundle_argument
@recipe_option
@pictures_option
@method_option
@click.option("--again", is_flag=True, help="Calibrate again, even if the bundle keeps ranges of this recipe.")
@click.option(
    "--sensitivity",
    is_flag=True,
    help="Then measure which layers lose most when they are quantised, and which to keep.",
)
@click.option("--int8", "quantized", flag_value="int8", default="int8", help="Sweep with int8 products (default).")
@click.option("--fp8", "quantized", flag_value="fp8", help="Sweep with 8-bit floats.")
@quantize_for_option
@smooth_option
@keep_option
@click.option("--threads", type=click.IntRange(1), help="CPU threads.")
@verify_option
@json_option
def calibrate(
    bundle: Path,
    recipe: str,
    pictures: Path | None,
    method: str | None,
    again: bool,
    sensitivity: bool,
    quantized: str,
    quantize_for: Literal["tensorrt", "cpu"],
    smooth: float | None,
    keep: tuple[str, ...],
    threads: int | None,
    verify: Literal["full", "size"],
    as_json: bool,
) -> None:
    """Collect the ranges of a bundle's activations on the pictures of a recipe, and keep them in the bundle.

    Runs every vision graph of the bundle on a CPU. `quantize` and `export --int8` do it by themselves where there are
    no ranges yet. A run that was killed goes on where it was when it is started again.
    """
    opened = open_bundle(bundle, verify=verify)
    chosen = recipe_from_name(recipe)
    views = [view for view in opened.views if method is None or view.method == graph_of(opened, method).method]
    seen = pictures_of(chosen, pictures)
    check_can_observe(views[0], seen.calibrate)
    found = _calibrated(views, chosen, seen.calibrate, again=again, threads=threads)
    summaries = [(view, ranges, summary_of(ranges, linears_of(graph_from_file(view.vision)))) for view, ranges in found]
    if not as_json:
        for item in summaries:
            _print(*item)
    sweeps: list[Sensitivity] = []
    if sensitivity:
        request = quantize_request(quantized, quantize_for, recipe, pictures, smooth, keep, None, accept_loss=False)
        assert request is not None  # there is a type
        sweeps = _swept(
            found, quantization_from_request(request, opened.manifest.plan.precision), chosen, seen, threads
        )
    if as_json:
        further = [{"sensitivity": each.model_dump(mode="json")} for each in sweeps] or [{}] * len(summaries)
        print_json([{**_json(*item), **more} for item, more in zip(summaries, further, strict=True)])
        return
    for each in sweeps:
        print_sensitivity(each)


def _swept(
    found: Sequence[tuple[Bundle, Ranges]],
    quantization: Quantization,
    recipe: Recipe,
    pictures: RecipePictures,
    threads: int | None,
) -> list[Sensitivity]:
    """The sweep of each graph; its runs are counted by the lines that it tells."""
    with progress() as tell:
        return [
            swept(
                view,
                quantization,
                ranges if quantization.recipe else None,
                recipe,
                pictures,
                threads=threads,
                tell=tell,
            )
            for view, ranges in found
        ]


def _calibrated(
    views: Sequence[Bundle], recipe: Recipe, pictures: Sequence[NamedPicture], *, again: bool, threads: int | None
) -> list[tuple[Bundle, Ranges]]:
    """The ranges of each graph."""
    found = []
    with _progress(len(views) * len(pictures)) as (tell, advance):
        for view in views:
            tell(f"{view.title}: {len(pictures)} pictures of '{recipe.name}'")
            ranges = calibrated(view, recipe, pictures, again=again, threads=threads, tell=tell, advance=advance)
            found.append((view, ranges))
    return found


@contextmanager
def _progress(total: int) -> Iterator[tuple[Tell, Advance]]:
    """Lines on stderr, and on a terminal a bar of pictures below them."""
    if not ERR.is_terminal:
        yield (lambda message: say(f"  {message}"), lambda count: None)
        return
    columns = (TextColumn("  pictures"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=ERR) as bar:
        task = bar.add_task("", total=total)
        yield (
            lambda message: ERR.print(Text(f"  {message}"), soft_wrap=True),
            lambda count: bar.advance(task, count),
        )


def _json(view: Bundle, ranges: Ranges, summary: RangesSummary) -> dict[str, Any]:
    record = ranges.record.model_dump(mode="json", exclude={"tensors", "schema_version"})
    folder = str(ranges_folder(view, ranges.record.recipe))
    return {"graph": view.title, "folder": folder, **record, **summary.model_dump(mode="json")}


def _print(view: Bundle, ranges: Ranges, summary: RangesSummary) -> None:
    record = ranges.record
    budgets = ", ".join(map(str, record.budgets))
    made = table("graph", view.title)
    made.add_row("recipe", f"{record.recipe}: {record.algorithm}, {len(record.pictures)} pictures at {budgets} tokens")
    made.add_row("activations", str(summary.activations))
    made.add_row("widest", _range_text(summary.widest))
    made.add_row("narrowest", _range_text(summary.narrowest))
    outliers = (
        f"{summary.outlier_channels} of {summary.channels} channels are above {OUTLIER:g} times the median channel"
    )
    made.add_row("outliers", f"{outliers} of their activation, in {summary.outlier_activations} activations")
    made.add_row("took", f"{record.seconds:.1f} s, {record.created}")
    made.add_row("kept in", str(ranges_folder(view, record.recipe)))
    OUT.print(made)
    OUT.print()


def _range_text(found: NamedRange) -> str:
    return f"{found.low:.4g}..{found.high:.4g}, read by {found.linear}"
