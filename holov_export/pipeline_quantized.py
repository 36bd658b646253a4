"""bundle --ranges of a recipe--> quantised graphs --judged on other pictures--> bundle, step by step.

The gate is the last step: below the limits of the recipe nothing appears at the output, unless the loss is accepted.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from holov_export.bundle import (
    REPORTS,
    Bundle,
    atomic_folder,
    check_target,
    labelled_file,
    write_manifest,
)
from holov_export.compile.compilation import CompileOptions
from holov_export.compile.readiness import readiness_of
from holov_export.engine import Engine
from holov_export.errors import BundleError
from holov_export.evaluate.kept_answers import kept_answers, obstacle_of, questions_at_hand
from holov_export.evaluate.run import AskSettings
from holov_export.pipeline import (
    READINESS,
    Tell,
    check_compile,
    compile_bundle,
    export_bundle,
    manifest_of,
    report_file,
    silent,
    write_report,
)
from holov_export.quantize.cache import calibrated, sweep_file
from holov_export.quantize.cpu import write_quantized_cpu
from holov_export.quantize.precision_report import PrecisionReport, judge_vision, refuse_loss
from holov_export.quantize.qdq import write_quantized
from holov_export.quantize.ranges import Ranges
from holov_export.quantize.sensitivity import Advance, sensitivity_of
from holov_export.quantize.sensitivity_record import Sensitivity
from holov_export.quantize.summary import QuantizedSummary
from holov_export.recipes import Recipe, RecipePictures, pictures_of, recipe_from_name, recipe_sha256
from holov_export.request import (
    AUTO,
    ExportRequest,
    QuantizeRequest,
    plan_from_request,
    quantization_from_request,
    usual_name,
)
from holov_export.spec import ExportPlan, Precision, Quantization, opset_of
from holov_export.targets import EngineTarget
from holov_export.verify.parity import ParityReport

#: reports that a quantisation writes: the name of one, and the stem of the other, of which a graph has one of its own
PRECISION, RANGES = "precision.json", "ranges"
#: where an export keeps the graphs that it quantises, inside the folder that it writes
_FLOAT = ".float"

#: hears what a gate found before it decides
Hear = Callable[[PrecisionReport], None]


def unadvanced(runs: int) -> None:
    """An `Advance` that does nothing."""


def unheard(report: PrecisionReport) -> None:
    """A `Hear` that does nothing."""


@dataclass(frozen=True)
class Quantized:
    """A finished bundle, what each of its graphs lost, and the parity of the graphs before (None if not compared)."""

    bundle: Bundle
    reports: tuple[PrecisionReport, ...]
    parity: ParityReport | None = None


@dataclass(frozen=True)
class _Order:
    """What is quantised, how, and on which pictures."""

    source: Bundle
    request: QuantizeRequest
    recipe: Recipe
    pictures: RecipePictures
    tell: Tell
    hear: Hear


def export_quantized(request: ExportRequest, *, tell: Tell = silent, hear: Hear = unheard) -> Quantized:
    """Export a checkpoint and quantise its vision graphs. The graphs before exist only meanwhile.

    Raises:
        LossError: a graph lost more than the recipe allows; nothing is written then.
        HolovExportError: see `export_bundle`, `recipes` and `quantize`.
    """
    assert request.quantize is not None
    recipe = recipe_from_name(request.quantize.recipe)
    pictures = pictures_of(recipe, request.quantize.pictures)  # refused before an export that may take long
    _, output = plan_from_request(request)
    with atomic_folder(output, overwrite=request.overwrite) as work:
        plain = replace(request, quantize=None, output=work / _FLOAT, overwrite=False)
        source, parity = export_bundle(plain, tell=tell)
        order = _Order(source, request.quantize, recipe, pictures, tell, hear)
        plan, reports = _quantized_into(work, order, _link)
        shutil.rmtree(work / _FLOAT)
        made = _finished(work, output, plan, tell)
    return Quantized(made, reports, parity)


def export_quantized_and_compile(
    request: ExportRequest, target: EngineTarget, *, tell: Tell = silent, hear: Hear = unheard
) -> tuple[Quantized, tuple[Engine, ...]]:
    """Export, quantise, and build the default rule's engines here, one for each tower.

    Raises:
        HolovExportError: see `export_quantized` and `engine_from_bundle`.
    """
    options = CompileOptions()
    check_compile(request, target, options)
    made = export_quantized(request, tell=tell, hear=hear)
    return made, compile_bundle(made.bundle, target, options, tell=tell)


def quantize_bundle(
    source: Bundle,
    request: QuantizeRequest,
    output: Path | None = None,
    *,
    overwrite: bool = False,
    tell: Tell = silent,
    hear: Hear = unheard,
) -> Quantized:
    """Quantise the vision graphs of an exported bundle, which stays as it is; its decoder is copied.

    Ranges that `calibrate` left in the bundle are used; others are collected, and kept there as well.

    Args:
        output: folder of the new bundle; None for its usual name in the working directory.

    Raises:
        BundleError: it is quantised already.
        LossError: a graph lost more than the recipe allows; nothing is written then.
        HolovExportError: see `recipes` and `quantize`.
    """
    refuse_quantized(source)
    recipe = recipe_from_name(request.recipe)
    pictures = pictures_of(recipe, request.pictures)
    plan = _quantized_plan(source.manifest.plan, quantization_from_request(request, source.manifest.plan.precision))
    output = (output or Path(usual_name(plan))).absolute()
    check_target(output, overwrite=overwrite)
    with atomic_folder(output, overwrite=overwrite) as work:
        plan, reports = _quantized_into(work, _Order(source, request, recipe, pictures, tell, hear), shutil.copyfile)
        made = _finished(work, output, plan, tell)
    return Quantized(made, reports)


def refuse_quantized(bundle: Bundle) -> None:
    """Refuse a bundle whose graphs are quantised.

    Raises:
        BundleError: they are.
    """
    plan = bundle.manifest.plan
    if plan.quantization is not None:
        raise BundleError(
            f"the vision graphs of '{bundle.folder.name}' are quantised already ({plan.precision_name}).",
            hint="Begin with a bundle in --fp32, --fp16 or --bf16.",
        )


def _quantized_plan(plan: ExportPlan, quantization: Quantization) -> ExportPlan:
    opset = opset_of(plan.precision, quantization)
    return plan.model_copy(update={"quantization": quantization, "opset": opset})


def _quantized_into(
    work: Path, order: _Order, take: Callable[[Path, Path], object]
) -> tuple[ExportPlan, tuple[PrecisionReport, ...]]:
    """Fill `work` with the quantised bundle, all but its manifest.

    Args:
        take: brings a file of the source to its place here.
    """
    source, tell = order.source, order.tell
    quantization = quantization_from_request(order.request, source.manifest.plan.precision)
    ranges = _ranges(order) if quantization.recipe else {}
    if AUTO in order.request.keep:
        found = _sensitivity(order, quantization, ranges)
        quantization = quantization.model_copy(update={"keep": tuple(dict.fromkeys([*quantization.keep, *found.keep]))})
    plan = _quantized_plan(source.manifest.plan, quantization)
    made = Bundle(work, manifest_of(plan, work, hashed=False))
    summaries = []
    for view in source.views:
        tell(f"quantise the vision graph ({plan.precision_name}, {view.title})")
        summaries.append(_write_graph(view, work, quantization, ranges.get(view.label)))
    (work / REPORTS).mkdir(exist_ok=True)
    for label, each in ranges.items():
        write_report(each.record, labelled_file(label, RANGES, ".json"), work)
    for view in made.views:
        write_report(readiness_of(view.vision), report_file(READINESS, view), work)
    _bring_the_rest(source, work, take)
    return plan, _judged(order, made, summaries, ranges)


def _ranges(order: _Order) -> dict[str, Ranges]:
    """The ranges of every graph, by its label (`Bundle.label`)."""
    found = {}
    for view in order.source.views:
        order.tell(f"calibrate on {len(order.pictures.calibrate)} pictures ({view.title})")
        found[view.label] = calibrated(view, order.recipe, order.pictures.calibrate, tell=order.tell)
    return found


def _sensitivity(order: _Order, quantization: Quantization, ranges: dict[str, Ranges]) -> Sensitivity:
    """Which layers of the default graph must be kept."""
    order.tell("measure which layers must be kept")
    view = order.source.views[0]
    return swept(view, quantization, ranges.get(view.label), order.recipe, order.pictures, tell=order.tell)


def swept(
    view: Bundle,
    quantization: Quantization,
    ranges: Ranges | None,
    recipe: Recipe,
    pictures: RecipePictures,
    *,
    threads: int | None = None,
    tell: Tell = silent,
    advance: Advance = unadvanced,
) -> Sensitivity:
    """Measure which layers of a graph must be kept, on the pictures of the calibration.

    What is measured stays in the bundle: the same sweep goes on where it was, or costs nothing.

    Args:
        ranges: None where the form needs none.
        advance: hears how many further runs of the graph are over.

    Raises:
        HolovExportError: see `sensitivity_of`.
    """
    return sensitivity_of(
        view,
        quantization,
        ranges,
        pictures.calibrate,
        limits=recipe.limits,
        partial=sweep_file(view, recipe.name, quantization),
        threads=threads,
        tell=tell,
        advance=advance,
    )


def _write_graph(view: Bundle, work: Path, quantization: Quantization, ranges: Ranges | None) -> QuantizedSummary:
    """Write one graph; the first of a part brings the weights, the others name those that are equal."""
    target = work / view.graph
    first = view.of_method(view.methods[0])
    share = None if first.graph == view.graph else work / first.graph
    if quantization.engine == "cpu":
        return write_quantized_cpu(view.vision, target, quantization, ranges, share=share)
    assert ranges is not None  # of every graph
    return write_quantized(view.vision, target, quantization, ranges, share=share)


def _judged(
    order: _Order, made: Bundle, summaries: list[QuantizedSummary], ranges: dict[str, Ranges]
) -> tuple[PrecisionReport, ...]:
    """Judge every graph, write its report and refuse the bundle if one lost too much.

    Raises:
        LossError: names what was lost and which layers to keep.
    """
    reports = []
    for before, after, summary in zip(order.source.views, made.views, summaries, strict=True):
        order.tell(f"compare with the graph before on {len(order.pictures.judge)} other pictures ({after.title})")
        reports.append(_report(order, before, after, summary))
    failed = [report for report in reports if not report.passed]
    plan = made.manifest.plan
    # a sweep runs the graph on a CPU, which has no bfloat16
    swept_here = AUTO not in order.request.keep and plan.precision is not Precision.BF16
    if failed and not order.request.accept_loss and swept_here:
        assert plan.quantization is not None
        found = _sensitivity(order, plan.quantization, ranges)
        reports = [report.with_keep(found.keep) for report in reports]
    for report, view in zip(reports, made.views, strict=True):
        write_report(report, report_file(PRECISION, view), made.folder)
        order.hear(report)
    for report in reports:
        refuse_loss(report)
    return tuple(reports)


def _report(order: _Order, before: Bundle, after: Bundle, summary: QuantizedSummary) -> PrecisionReport:
    """What a graph lost on pictures that the calibration did not see, and what became of the answers."""
    recipe = order.recipe
    report = judge_vision(
        before,
        after,
        [(picture.name, picture.image()) for picture in order.pictures.judge],
        recipe.limits,
        recipe=recipe.name,
        recipe_sha256=recipe_sha256(recipe),
        written=summary,
        accepted_loss=order.request.accept_loss,
        tell=order.tell,
    )
    questions, reason = questions_at_hand(before.manifest.plan, order.request.questions)
    reason = (
        reason
        or obstacle_of(before)
        or obstacle_of(after)
        or ("clips are not asked about" if after.part == "video" else "")
    )
    if questions is None or reason:
        return report.with_answers(None, reason)
    order.tell(f"compare the answers to {len(questions.questions)} questions")
    return report.with_answers(kept_answers(before, after, questions, AskSettings(provider="cpu")))


def _bring_the_rest(source: Bundle, work: Path, take: Callable[[Path, Path], object]) -> None:
    """Everything of the source that is no graph, weight or readiness report: decoder, tokenizer, parity."""
    for item in source.manifest.artifacts:
        place = work / item.path
        if item.kind in ("vision", "weights") or place.exists():
            continue
        place.parent.mkdir(parents=True, exist_ok=True)
        take(source.folder / item.path, place)


def _link(source: Path, place: Path) -> None:
    """Give a file of a folder that will be removed a second name; a copy where the file system has no hard links."""
    try:
        os.link(source, place)
    except OSError:
        shutil.copyfile(source, place)


def _finished(work: Path, output: Path, plan: ExportPlan, tell: Tell) -> Bundle:
    tell("hash and write the manifest")
    manifest = manifest_of(plan, work, hashed=True)
    write_manifest(work, manifest)
    return Bundle(output, manifest)
