"""`holov-export export`, the default command."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import click
from pydantic import ValidationError

from holov_export.bundle import Bundle, label_of, labelled_file
from holov_export.cli.compile import engine_json, previews_json, print_engine, print_previews, target_asked
from holov_export.cli.console import OUT, print_json, progress, say, size_text, table
from holov_export.cli.options import UserPath, json_option, method_names
from holov_export.compile.compilation import CompileOptions, engine_folder
from holov_export.compile.preview import previews
from holov_export.engine import Engine
from holov_export.errors import UsageError
from holov_export.pipeline import export_and_compile, export_bundle, readiness_report, written_parity
from holov_export.policies import POLICIES, SelectionPolicy, policy_from_settings
from holov_export.request import ExportRequest, GraphRequest, plan_from_request
from holov_export.runtime.runner import default_budget
from holov_export.spec import (
    DecoderPrecision,
    ExportPlan,
    FramePairsSpec,
    FramesSpec,
    GraphPlan,
    PatchImageSpec,
    Precision,
    TiledImageSpec,
)
from holov_export.targets import EngineTarget
from holov_export.verify.parity import ParityReport


@click.command()
@click.option("--model", required=True, help="A name of `holov-export models`, a directory, or OWNER/REPO[@REVISION].")
@click.option("--fp32", "precision", flag_value="fp32", default="fp32", help="float32 vision graph (default).")
@click.option("--fp16", "precision", flag_value="fp16", help="float16 vision graph; selection stays float32.")
@click.option("--bf16", "precision", flag_value="bf16", help="bfloat16 vision graph (opset 22, GPU only).")
@click.option(
    "--method",
    "methods",
    multiple=True,
    default=("holov",),
    show_default=True,
    metavar="NAME",
    help="Selection rule, one of `holov-export methods`. Several, repeated or comma separated, become graphs over the "
    "same weights; the first is the default. NAME@LAYER cuts at that layer of the tower.",
)
@click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="KEY=VALUE",
    help="A setting of the first rule, e.g. crops=8; of another one with its name in front, e.g. scope.alpha=0.5.",
)
@click.option(
    "--select-layer",
    metavar="LAYERS",
    help="Experimental: decide at this layer of the tower and run the layers behind it for the kept tokens only, "
    "e.g. 12; several cuts: 12:256,22:64. For every rule without an @ of its own.",
)
@click.option(
    "--decoder-precision",
    type=click.Choice([item.value for item in DecoderPrecision]),
    help="Weights of the embedded decoder [default: fp32 beside --fp32, else fp16].",
)
@click.option(
    "--decoder-provider",
    type=click.Choice(["cpu", "cuda"]),
    default="cpu",
    show_default=True,
    help="What the decoder's graph is built for.",
)
@click.option("--no-decoder", is_flag=True, help="Leave the decoder out: vision graph and tokenizer only.")
@click.option(
    "--newlines/--no-newlines",
    default=True,
    show_default=True,
    help="LLaVA-NeXT: the rows of an image that keep a token keep their newline embedding.",
)
@click.option("-o", "--output", type=UserPath(), help="Folder of the bundle.")
@click.option("--overwrite", is_flag=True, help="Replace a bundle that is already there.")
@click.option("--no-verify", is_flag=True, help="Write the bundle without comparing it with torch and the reference.")
@click.option(
    "--target", "target_name", help="Compile it here, too: a name of `holov-export targets`, a TOML file, auto."
)
@click.option("--dry-run", is_flag=True, help="Print the resolved plan and stop.")
@json_option
def export(
    model: str,
    precision: str,
    methods: tuple[str, ...],
    settings: tuple[str, ...],
    select_layer: str | None,
    decoder_precision: str | None,
    decoder_provider: Literal["cpu", "cuda"],
    no_decoder: bool,
    newlines: bool,
    output: Path | None,
    overwrite: bool,
    no_verify: bool,
    target_name: str | None,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Export a checkpoint as a bundle.

    It holds the vision graph with the selection in it, the decoder, the tokenizer and the parity report.
    """
    if no_decoder and decoder_precision:
        raise click.UsageError("--no-decoder and --decoder-precision exclude each other.")
    first, *also = _graphs(methods, settings, select_layer)
    request = ExportRequest(
        model=model,
        policy=first.policy,
        select_layer=first.select_layer,
        also=tuple(also),
        precision=Precision(precision),
        decoder=None if no_decoder else _decoder_precision(decoder_precision, Precision(precision)),
        output=output,
        overwrite=overwrite,
        verify=not no_verify,
        decoder_provider=decoder_provider,
        newlines=newlines,
    )
    target = None if target_name is None else target_asked(target_name, dry_run=dry_run)
    if dry_run:
        _dry_run(request, target, as_json)
        return
    engines: tuple[Engine, ...] = ()
    with progress() as tell:
        if target is None:
            bundle, report = export_bundle(request, tell=tell)
        else:
            bundle, report, engines = export_and_compile(request, target, tell=tell)
    if as_json:
        print_json(_result(bundle, report, engines))
        return
    _print_result(bundle, report)
    for part, engine in zip(bundle.manifest.plan.parts, engines, strict=False):
        print_engine(engine, bundle.of_part(part) if len(engines) > 1 else None)


def _dry_run(request: ExportRequest, target: EngineTarget | None, as_json: bool) -> None:
    """Print what would be exported, and with a target what would be compiled."""
    plan, output = plan_from_request(request)
    if target is None:
        _print_plan(plan, output, as_json)
        return
    options = CompileOptions()
    made = []
    for part in plan.parts:
        label = label_of("", part)
        graph = labelled_file(label, "vision", ".onnx")
        folder = engine_folder(output, labelled_file(label, target.name), options)
        made.append((previews(plan.of_part(part), output, target, options, graph=graph), folder))
    if as_json:
        found = [previews_json(each, folder) for each, folder in made]
        print_json({**_plan_json(plan, output), "compile": found[0] if len(found) == 1 else {"graphs": found}})
        return
    _print_plan(plan, output, as_json)
    for each, folder in made:
        OUT.print()
        print_previews(each, folder, as_json)


def _graphs(methods: tuple[str, ...], settings: tuple[str, ...], select_layer: str | None) -> list[GraphRequest]:
    """The graphs that --method, --set and --select-layer ask for.

    Raises:
        UsageError: an unknown rule, or settings that are wrong or for a rule that is not asked for.
    """
    asked = [name for text in methods for name in method_names(text)]
    rules = [name.partition("@") for name in asked]
    of_rule: dict[str, dict[str, str]] = {rule: {} for rule, _, _ in rules}
    unknown = [rule for rule in of_rule if rule not in POLICIES]
    if unknown:
        raise UsageError(f"unknown method '{unknown[0]}'.", hint=f"Known: {', '.join(POLICIES)}.")
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals:
            raise click.UsageError(f"--set takes KEY=VALUE, not '{setting}'.")
        rule, dot, field = key.strip().rpartition(".")
        if "@" in rule:
            raise click.UsageError(f"--set {setting}: leave the @ out, it is one rule wherever it cuts.")
        if dot and rule not in of_rule:
            raise click.UsageError(f"--set {setting}: '{rule}' is not among the methods.")
        of_rule[rule if dot else rules[0][0]][field] = value.strip()
    return [GraphRequest(_policy(rule, of_rule[rule]), layers or select_layer) for rule, _, layers in rules]


def _policy(method: str, pairs: dict[str, str]) -> SelectionPolicy:
    fields = [name for name in POLICIES[method].model_fields if name != "method"]
    if "method" in pairs:
        raise UsageError("the rule is no setting of its own.", hint="Name it with --method.")
    try:
        return policy_from_settings(method, pairs)
    except ValidationError as error:
        problem = "; ".join(f"{'.'.join(map(str, item['loc'][1:]))}: {item['msg']}" for item in error.errors())
        raise UsageError(
            f"the settings of '{method}' are wrong: {problem}.", hint=f"It takes: {', '.join(fields) or 'no settings'}."
        ) from error


def _decoder_precision(asked: str | None, precision: Precision) -> DecoderPrecision:
    if asked is not None:
        return DecoderPrecision(asked)
    return DecoderPrecision.FP32 if precision is Precision.FP32 else DecoderPrecision.FP16


def _plan_json(plan: ExportPlan, output: Path) -> dict[str, Any]:
    return {"output": str(output), "plan": plan.model_dump(mode="json")}


def _print_plan(plan: ExportPlan, output: Path, as_json: bool) -> None:
    if as_json:
        print_json(_plan_json(plan, output))
        return
    decoder = plan.model.decoder
    rows = {
        "model": f"{plan.model.name} ({plan.source.kind}: {plan.source.name})",
        "revision": plan.source.revision or "-",
        "vision": _vision_text(plan),
        **({"video": _video_text(plan)} if plan.model.video.kind != "none" else {}),
        "selection": graph_text(plan.graphs[0]),
        **({"also": "; ".join(graph_text(graph) for graph in plan.also)} if plan.also else {}),
        "default budget": _budget_text(plan),
        **({"newlines": "kept" if plan.keeps_newlines else "dropped"} if plan.model.image.kind == "tiles" else {}),
        "precision": f"{plan.precision.value}, selection float32, opset {plan.opset}",
        "decoder": f"{decoder.architecture}, {decoder.layers} layers, {plan.decoder.value}" if plan.decoder else "none",
        "context": f"{decoder.context} tokens",
        "output": str(output),
    }
    made = table("plan", "")
    for key, value in rows.items():
        made.add_row(key, value)
    OUT.print(made)


def _vision_text(plan: ExportPlan) -> str:
    """What the tower sees of an image, and how much of the tower is exported."""
    image, vision = plan.model.image, plan.model.vision
    exported = f"{vision.feature_layer + 1} of {vision.layers} layers"
    if isinstance(image, PatchImageSpec):
        side = image.token_pixels
        fewest = max(1, image.min_pixels // side**2)
        return (
            f"any size, a token each {side} x {side} pixels, {fewest} to {plan.model.image_tokens} tokens, {exported}"
        )
    seen = f"{plan.model.clip.image_size} x {plan.model.clip.image_size} pixels"
    if isinstance(image, TiledImageSpec):
        largest = max(height * width for height, width in image.pinpoints) // plan.model.clip.image_size**2
        return f"{seen} and up to {largest} tiles of that size, up to {plan.model.image_tokens} tokens, {exported}"
    return f"{seen}, {plan.model.image_tokens} tokens, {exported}"


def _video_text(plan: ExportPlan) -> str:
    video = plan.model.video
    if isinstance(video, FramesSpec):
        return f"{video.frames} frames of a clip, {plan.model.video_tokens} tokens, a tower of its own"
    assert isinstance(video, FramePairsSpec)  # it is not "none"
    frames = f"{video.fps:g} frames a second, {video.min_frames} to {video.max_frames}"
    return f"{frames}, up to {plan.model.video_tokens} tokens"


def _budget_text(plan: ExportPlan) -> str:
    if plan.budget is None and plan.packed:
        return "a ninth of an image's tokens"
    return f"{default_budget(plan)} tokens of an image"


def graph_text(graph: GraphPlan) -> str:
    """A graph's rule with its settings, and where it cuts."""
    settings = ", ".join(f"{key}={value}" for key, value in graph.policy.model_dump(mode="json").items())
    return f"{settings}, cuts at {graph.name.partition('@')[2]}" if graph.cuts else settings


def _result(bundle: Bundle, report: ParityReport | None, engines: tuple[Engine, ...]) -> dict[str, Any]:
    readiness = readiness_report(bundle)
    made = {
        "bundle": str(bundle.folder),
        "bytes": sum(item.bytes for item in bundle.manifest.artifacts),
        "parity": None if report is None else report.model_dump(mode="json"),
        "tensorrt": {version.tensorrt: version.ready for version in readiness.versions},
        "methods": list(bundle.methods),
        "also": {view.title: _further_result(view, verified=report is not None) for view in _further(bundle)},
    }
    if not engines:
        return made
    found = [engine_json(engine) for engine in engines]
    return {**made, **(found[0] if len(found) == 1 else {"graphs": found})}


def _further(bundle: Bundle) -> list[Bundle]:
    """The bundle once for each graph beside the default one."""
    return list(bundle.views[1:])


def _further_result(view: Bundle, *, verified: bool) -> dict[str, Any]:
    return {
        "parity": written_parity(view).model_dump(mode="json") if verified else None,
        "tensorrt": {version.tensorrt: version.ready for version in readiness_report(view).versions},
    }


def _print_result(bundle: Bundle, report: ParityReport | None) -> None:
    if report is not None:
        print_report(report)
        for view in _further(bundle):
            found = written_parity(view)
            worst = max(item.token_error for item in found.comparisons)
            OUT.print(
                f"{view.title}: {len(found.comparisons)} comparisons of {len(found.pictures)} pictures, largest token "
                f"error {worst:.1e}  {'ok' if found.passed else 'FAILED'}",
                soft_wrap=True,
            )
    for view in bundle.views:
        OUT.print((f"{view.title}: " if len(bundle.views) > 1 else "") + _readiness_line(view))
    total = size_text(sum(item.bytes for item in bundle.manifest.artifacts))
    OUT.print(f"{_shown(bundle.folder)}  {total}", soft_wrap=True)


def _readiness_line(bundle: Bundle) -> str:
    """For which TensorRT the graph is ready."""
    versions = readiness_report(bundle).versions
    ready = [version.tensorrt for version in versions if version.ready]
    others = [version.tensorrt for version in versions if not version.ready]
    line = f"TensorRT: by the rules of `check` ready for {', '.join(ready) or 'none'}"
    return f"{line}, not for {', '.join(others)}" if others else line


def _shown(path: Path) -> Path:
    """Relative to the working directory where it lies inside, as the user would type it."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def print_report(report: ParityReport) -> None:
    """The comparisons on stdout, what could not be compared on stderr."""
    OUT.print(_parity_table(report))
    answers = report.decoder
    if answers is not None:
        OUT.print(
            f"decoder {answers.precision.value} = transformers: {answers.identical} of {answers.prompts} answers of "
            f"{answers.new_tokens} tokens identical, {answers.first_token_same} begin alike  "
            f"{'ok' if answers.passed else 'FAILED'}"
        )
    for reason in report.skipped:
        say(f"not compared: {reason}")


def _parity_table(report: ParityReport) -> Any:
    """The comparisons of a report, one line each."""
    made = table(
        "compared",
        "budget>",
        "token error>",
        "cosine>",
        "saliency error>",
        "overlap>",
        "equal sets>",
        "",
        title=f"parity, {report.method} {report.precision.value}, {len(report.pictures)} pictures",
    )
    for item in report.comparisons:
        rows = item.token_cosine < 1.0 or item.token_error > 0.0
        made.add_row(
            f"{item.left} = {item.right}",
            str(item.budget),
            f"{item.token_error:.1e}" if rows else "-",
            f"{item.token_cosine:.6f}" if rows else "-",
            "-" if item.saliency_error is None else f"{item.saliency_error:.1e}",
            f"{item.overlap:.3f}",
            f"{item.same_sets}/{item.pictures}",
            "ok" if item.passed else "FAILED",
        )
    return made
