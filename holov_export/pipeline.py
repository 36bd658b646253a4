"""checkpoint --tower + selection--> graph --onnx_from_graph--> bundle --engine_from_bundle--> engine, step by step.

Knows nothing of terminals: progress goes to a callback, results are returned.
"""

from __future__ import annotations

import importlib.metadata
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image
from pydantic import BaseModel

from holov_export import __version__
from holov_export.bundle import (
    DECODER,
    NEWLINE,
    REPORTS,
    SCHEMA,
    TOKENIZER,
    Bundle,
    Manifest,
    artifacts_in,
    atomic_folder,
    graph_tensors,
    labelled_file,
    provenance,
    write_manifest,
)
from holov_export.catalog import Checkpoint, checkpoint_from_reference, reference_from_name
from holov_export.compile.compilation import CompileOptions, plan_from_target
from holov_export.compile.engine_from_onnx import engine_from_bundle
from holov_export.compile.machine import check_gpu, this_machine
from holov_export.compile.readiness import ReadinessReport, readiness_of
from holov_export.engine import Engine
from holov_export.errors import BundleError, CheckpointError, ParityError
from holov_export.evaluate.kept_answers import answers_of, kept_from_answers, obstacle_of, questions_at_hand
from holov_export.evaluate.run import AskSettings
from holov_export.extras import is_installed, require
from holov_export.pipeline_decoder import cache_material, write_decoder, write_decoder_with_cache
from holov_export.request import ExportRequest, plan_from_request
from holov_export.spec import DecoderPrecision, ExportPlan
from holov_export.targets import EngineTarget
from holov_export.verify.answers import compare_decoder, too_large
from holov_export.verify.parity import ParityReport
from holov_export.verify.pictures import default_pictures
from holov_export.verify.vision_parity import parity_report

Tell = Callable[[str], None]

#: names of the reports that an export writes
PARITY, READINESS, DECODER_ANSWERS = "parity.json", "readiness.json", "decoder.json"
CACHE_RANGES = "decoder-kv-cache.json"

#: distributions whose versions go into a manifest
_RECORDED = ("torch", "transformers", "onnx", "onnxscript", "onnx-ir", "onnxruntime", "onnxruntime-genai", "numpy")


def silent(message: str) -> None:
    """A `Tell` that says nothing."""


def export_bundle(request: ExportRequest, *, tell: Tell = silent) -> tuple[Bundle, ParityReport | None]:
    """Export a checkpoint as a bundle. Nothing appears at the output unless every step succeeds.

    Returns:
        (the finished bundle, its parity report or None if `request.verify` is False).

    Raises:
        HolovExportError: see `errors`; ParityError if the exported graph differs from torch or the reference.
    """
    _require_packages(request)
    tell("resolve the checkpoint")
    plan, output = plan_from_request(request)
    material = cache_material(request, plan)
    checkpoint = checkpoint_from_reference(reference_from_name(request.model))
    with atomic_folder(output, overwrite=request.overwrite) as work:
        for view in Bundle(work, manifest_of(plan, work, hashed=False)).views:
            tell(f"export the vision graph ({plan.precision.value}, {view.title})")
            _write_vision(view, checkpoint)
        if plan.model.image.kind == "tiles":
            _write_newline(checkpoint, work)
        tell("check the graph against TensorRT's rules")
        for view in Bundle(work, manifest_of(plan, work, hashed=False)).views:
            write_report(readiness_of(view.vision), report_file(READINESS, view), work)
        _copy_tokenizer(checkpoint.folder, work)
        if plan.decoder is not None:
            if material is None:
                tell(f"build the decoder ({plan.decoder_name})")
                write_decoder(plan, checkpoint.folder, work / DECODER)
            else:
                unfinished = Bundle(work, manifest_of(plan, work, hashed=False))
                ranges = write_decoder_with_cache(unfinished, checkpoint.folder, material, tell)
                write_report(ranges, CACHE_RANGES, work)
        bundle = Bundle(work, manifest_of(plan, work, hashed=False))
        report = None
        if request.verify:
            report = _verified(bundle, checkpoint.folder, work, tell)
            if plan.decoder is DecoderPrecision.INT4 or plan.decoder_kv_cache == "int8":
                _report_decoder(bundle, checkpoint.folder, request.questions, tell)
        tell("hash and write the manifest")
        manifest = manifest_of(plan, work, hashed=True)
        write_manifest(work, manifest)
    return Bundle(output, manifest), report


def report_file(name: str, bundle: Bundle) -> str:
    """Name of a graph's report: "parity.json", "parity-scope.json"."""
    stem, ending = name.split(".")
    return labelled_file(bundle.label, stem, f".{ending}")


def _verified(bundle: Bundle, checkpoint: Path, work: Path, tell: Tell) -> ParityReport:
    """Compare every graph, write its report and refuse the bundle if one differs; the default graph's report."""
    reports = []
    for view in bundle.views:
        if not view.is_default:
            tell(f"compare the graph of {view.title}")
        report = verify_bundle(
            view, checkpoint, default_pictures(), with_transformers=False, with_decoder=view.is_default, tell=tell
        )
        write_report(report, report_file(PARITY, view), work)
        refuse_if_failed(report)
        reports.append(report)
    return reports[0]


def _report_decoder(bundle: Bundle, checkpoint: Path, questions: Path | None, tell: Tell) -> None:
    """Write what a decoder of few bits answers beside transformers' float32, if questions are at hand; not judged."""
    dataset, reason = questions_at_hand(bundle.manifest.plan, questions)
    reason = reason or obstacle_of(bundle) or too_large(checkpoint)
    if dataset is None or reason:
        tell(f"the decoder's answers are not compared: {reason}")
        return
    tell(f"compare the decoder's answers ({bundle.manifest.plan.decoder_name}) to {len(dataset.questions)} questions")
    view = bundle.views[0]
    full = AskSettings(decoder="hf", checkpoint=checkpoint, provider="cpu")
    before = replace(answers_of(view, dataset, full), decoder="fp32 (transformers)")
    after = answers_of(view, dataset, AskSettings(provider="cpu"))
    write_report(kept_from_answers(dataset, before, after), DECODER_ANSWERS, bundle.folder)


def _require_packages(request: ExportRequest) -> None:
    """What an export imports late is asked for before it begins: a 7B model takes long to get there."""
    seen = request.decoder is not None and request.decoder_kv_cache is not None
    late = {"onnxruntime": request.verify or seen, "onnxruntime_genai": request.decoder is not None}
    late |= {"tokenizers": seen, "jinja2": seen}
    for module, needed in late.items():
        if needed and not is_installed(module):
            require(module)


def export_and_compile(
    request: ExportRequest, target: EngineTarget, options: CompileOptions | None = None, *, tell: Tell = silent
) -> tuple[Bundle, ParityReport | None, tuple[Engine, ...]]:
    """Export a checkpoint and build the default rule's engines here, one for each tower.

    What would refuse an engine is asked before the export begins.

    Returns:
        (the finished bundle, its parity report or None, the engines). If a build fails, the bundle stays.

    Raises:
        HolovExportError: see `export_bundle` and `engine_from_bundle`.
    """
    options = options or CompileOptions()
    check_compile(request, target, options)
    bundle, report = export_bundle(request, tell=tell)
    return bundle, report, compile_bundle(bundle, target, options, tell=tell)


def check_compile(request: ExportRequest, target: EngineTarget, options: CompileOptions) -> None:
    """Ask what would refuse an engine, before an export that may take long.

    Raises:
        HolovExportError: see `plan_from_target` and `engine_from_bundle`.
    """
    machine = this_machine()
    check_gpu(target, machine.gpu)
    plan, _ = plan_from_request(request)
    for part in plan.parts:
        plan_from_target(plan.of_part(part), target, options, machine.tensorrt)


def compile_bundle(
    bundle: Bundle, target: EngineTarget, options: CompileOptions, *, tell: Tell = silent
) -> tuple[Engine, ...]:
    """Build the default rule's engines, one for each tower. If a build fails, the bundle stays."""
    tell(f"the bundle is written: {bundle.folder}")
    views = [bundle.of_part(part) for part in bundle.manifest.plan.parts]
    return tuple(engine_from_bundle(view, target, options, tell=tell) for view in views)


def verify_bundle(
    bundle: Bundle,
    checkpoint: Path | None,
    pictures: Sequence[tuple[str, Image.Image]],
    *,
    with_transformers: bool = True,
    with_decoder: bool = True,
    tell: Tell = silent,
) -> ParityReport:
    """Compare one vision graph at three budgets (a ninth of the tokens, one, all), and the decoder's answers.

    The decoder is compared with transformers' if the language model is small enough to be held twice.
    """
    report = parity_report(
        bundle,
        pictures,
        checkpoint=checkpoint,
        with_transformers=with_transformers,
        tell=lambda name: tell(f"compare: {name}"),
    )
    if bundle.decoder is None or checkpoint is None or not with_decoder:
        return report
    tell("compare: decoder")
    answers, reason = compare_decoder(bundle, checkpoint)
    skipped = (*report.skipped, *([f"decoder: {reason}"] if reason else []))
    return report.model_copy(update={"decoder": answers, "skipped": skipped})


def refuse_if_failed(report: ParityReport) -> None:
    """Raise ParityError naming the first comparison that did not pass, or that the graph was not compared at all."""
    for comparison in report.comparisons:
        if not comparison.passed:
            raise ParityError(
                f"{comparison.left} and {comparison.right} differ at budget {comparison.budget}: "
                f"token error {comparison.token_error:.2e}, overlap {comparison.overlap:.3f}, "
                f"saliency error {comparison.saliency_error or 0.0:.2e}.",
                hint="The bundle was not accepted; --no-verify writes it nevertheless.",
            )
    if report.decoder is not None and not report.decoder.passed:
        raise ParityError(
            f"the decoder ({report.decoder.precision.value}) answers {report.decoder.identical} of "
            f"{report.decoder.prompts} prompts as transformers does, begins {report.decoder.first_token_same} alike.",
            hint="The bundle was not accepted; --no-verify writes it nevertheless.",
        )
    if not report.passed:
        raise ParityError("the vision graph was not compared with anything.", hint="; ".join(report.skipped))


def _write_vision(view: Bundle, checkpoint: Checkpoint) -> None:
    """Write one graph; the first of a part brings the weights of its tower, the others name them."""
    from holov_export.export.onnx_from_graph import forget_graph, onnx_from_graph, save_beside, save_vision
    from holov_export.vision.families import vision_from_plan
    from holov_export.vision.loading import forget_weights
    from holov_export.vision.weights import SafetensorsReader

    plan = view.manifest.plan
    with SafetensorsReader(checkpoint.folder) as reader:
        module = vision_from_plan(plan, reader)
    model = onnx_from_graph(module, plan)
    first = view.of_method(view.methods[0])
    if view.method == first.method:
        save_vision(model, view.folder, view.graph)
    else:
        save_beside(model, view.folder, view.graph, first.graph)
    forget_graph(model)
    forget_weights(module)


def _write_newline(checkpoint: Checkpoint, work: Path) -> None:
    from holov_export.vision.families import newline_from_checkpoint
    from holov_export.vision.weights import SafetensorsReader

    with SafetensorsReader(checkpoint.folder) as reader:
        np.save(work / NEWLINE, newline_from_checkpoint(reader))


def _copy_tokenizer(folder: Path, work: Path) -> None:
    path = folder / TOKENIZER
    if not path.is_file():
        raise CheckpointError(
            f"the checkpoint has no {TOKENIZER}.", hint="Save it with transformers' fast tokenizer first."
        )
    try:
        require("tokenizers").Tokenizer.from_file(str(path))
    except Exception as error:  # the Rust side raises a bare Exception
        raise CheckpointError(f"{TOKENIZER} of the checkpoint does not parse ({error}).") from error
    shutil.copyfile(path, work / TOKENIZER)


def readiness_report(bundle: Bundle) -> ReadinessReport:
    """What the export found about TensorRT for the graph that `bundle` stands for.

    Raises:
        BundleError: the bundle has no such report, or one of another version.
    """
    return _read_report(bundle, READINESS, ReadinessReport)


def written_parity(bundle: Bundle) -> ParityReport:
    """The parity report that the export wrote for the graph that `bundle` stands for.

    Raises:
        BundleError: the bundle has no such report (`--no-verify`), or one of another version.
    """
    return _read_report(bundle, PARITY, ParityReport)


_Report = TypeVar("_Report", ParityReport, ReadinessReport)


def _read_report(bundle: Bundle, name: str, kind: type[_Report]) -> _Report:
    path = bundle.folder / REPORTS / report_file(name, bundle)
    try:
        return kind.model_validate_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BundleError(
            f"the bundle has no report that can be read: {path.name}.", hint="Export it again."
        ) from error


def write_report(report: BaseModel, name: str, work: Path) -> None:
    """Write a report into the bundle that is being made."""
    (work / REPORTS).mkdir(exist_ok=True)
    (work / REPORTS / name).write_text(report.model_dump_json(indent=2) + "\n", encoding="utf-8")


def manifest_of(plan: ExportPlan, work: Path, *, hashed: bool) -> Manifest:
    """The manifest of the bundle that is being made; its files are hashed at the end only."""
    inputs, outputs = plan.signature
    return Manifest(
        schema_version=SCHEMA,
        plan=plan,
        inputs=graph_tensors(inputs),
        outputs=graph_tensors(outputs),
        artifacts=artifacts_in(work) if hashed else (),
        provenance=provenance(__version__, dict(_library_versions())),
    )


def _library_versions() -> Iterator[tuple[str, str]]:
    for name in _RECORDED:
        try:
            yield name, importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue


def checkpoint_of(bundle: Bundle, model: str | None) -> Path | None:
    """The checkpoint that a bundle came from: named by `model`, or the one that ships; None if neither is known.

    Raises:
        CheckpointError: the checkpoint's config.json is not the one that was exported.
    """
    from holov_export.export.checkpoint import config_sha256

    source = bundle.manifest.plan.source
    if model is None and source.kind != "bundled":
        return None
    folder = checkpoint_from_reference(reference_from_name(model or source.name)).folder
    if not (folder / "config.json").is_file() or config_sha256(folder) != source.config_sha256:
        raise CheckpointError(
            f"'{model or source.name}' is not the checkpoint that the bundle was exported from ('{source.name}').",
            hint="Name the right one: --checkpoint DIR",
        )
    return folder
