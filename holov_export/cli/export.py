"""`holov-export export`, the default command."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, get_args

import click
from pydantic import ValidationError

from holov_export.bundle import Bundle, label_of, labelled_file
from holov_export.cli.compile import previews_json, print_engine, print_previews, target_asked
from holov_export.cli.console import OUT, print_json, progress
from holov_export.cli.export_text import plan_json, print_plan, print_result, result_json
from holov_export.cli.options import UserPath, json_option, method_names
from holov_export.cli.quantize_options import quantize_options, quantize_request
from holov_export.cli.quantized_text import ReportPrinter, print_quantized, quantized_json
from holov_export.compile.compilation import CompileOptions, engine_folder
from holov_export.compile.preview import previews
from holov_export.engine import Engine
from holov_export.errors import LossError, UsageError
from holov_export.pipeline import export_and_compile, export_bundle
from holov_export.pipeline_quantized import export_quantized, export_quantized_and_compile
from holov_export.policies import POLICIES, SelectionPolicy, policy_from_settings
from holov_export.request import CacheRequest, ExportRequest, GraphRequest, plan_from_request
from holov_export.spec import CacheType, DecoderPrecision, Int4Settings, Precision
from holov_export.targets import EngineTarget


@click.command()
@click.option("--model", required=True, help="A name of `holov-export models`, a directory, or OWNER/REPO[@REVISION].")
@click.option("--fp32", "precision", flag_value="fp32", default="fp32", help="float32 vision graph (default).")
@click.option("--fp16", "precision", flag_value="fp16", help="float16 vision graph; selection stays float32.")
@click.option("--bf16", "precision", flag_value="bf16", help="bfloat16 vision graph (opset 22, GPU only).")
@quantize_options
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
@click.option(
    "--int4-algorithm",
    type=click.Choice(get_args(Int4Settings.model_fields["algorithm"].annotation)),
    help="How an int4 decoder's weights are rounded [default: rtn].",
)
@click.option(
    "--int4-block-size",
    type=click.Choice(["16", "32", "64", "128", "256"]),
    help="Weights that share a scale [default: 32].",
)
@click.option(
    "--decoder-kv-cache",
    type=click.Choice(get_args(CacheType)),
    default="float",
    show_default=True,
    help="What the embedded decoder stores keys and values in. Scales of int8 come from answers about up to 32 of the "
    "pictures of --recipe and 32 of the --questions.",
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
    quantized: str | None,
    quantize_for: Literal["tensorrt", "cpu"],
    recipe: str,
    pictures: Path | None,
    smooth: float | None,
    keep: tuple[str, ...],
    questions: Path | None,
    accept_loss: bool,
    methods: tuple[str, ...],
    settings: tuple[str, ...],
    select_layer: str | None,
    decoder_precision: str | None,
    decoder_provider: Literal["cpu", "cuda"],
    int4_algorithm: str | None,
    int4_block_size: str | None,
    decoder_kv_cache: CacheType,
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
    cache = CacheRequest(recipe, pictures) if decoder_kv_cache == "int8" else None
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
        questions=questions,
        decoder_int4=_int4(int4_algorithm, int4_block_size, decoder_precision),
        decoder_kv_cache=cache,
        quantize=quantize_request(
            quantized,
            quantize_for,
            recipe,
            pictures,
            smooth,
            keep,
            questions,
            accept_loss,
            pictures_for_more=cache is not None,
        ),
    )
    target = None if target_name is None else target_asked(target_name, dry_run=dry_run)
    if dry_run:
        _dry_run(request, target, as_json)
        return
    if request.quantize is not None:
        _export_quantized(request, target, as_json)
        return
    engines: tuple[Engine, ...] = ()
    with progress() as tell:
        if target is None:
            bundle, report = export_bundle(request, tell=tell)
        else:
            bundle, report, engines = export_and_compile(request, target, tell=tell)
    if as_json:
        print_json(result_json(bundle, report, engines))
        return
    print_result(bundle, report)
    _print_engines(bundle, engines)


def _export_quantized(request: ExportRequest, target: EngineTarget | None, as_json: bool) -> None:
    printer = ReportPrinter(as_json)
    engines: tuple[Engine, ...] = ()
    try:
        with progress() as tell:
            if target is None:
                made = export_quantized(request, tell=tell, hear=printer.hear)
            else:
                made, engines = export_quantized_and_compile(request, target, tell=tell, hear=printer.hear)
    except LossError:
        printer.refused()
        raise
    if as_json:
        print_json(quantized_json(made, engines))
        return
    print_quantized(made)
    _print_engines(made.bundle, engines)


def _print_engines(bundle: Bundle, engines: tuple[Engine, ...]) -> None:
    for part, engine in zip(bundle.manifest.plan.parts, engines, strict=False):
        print_engine(engine, bundle.of_part(part) if len(engines) > 1 else None)


def _dry_run(request: ExportRequest, target: EngineTarget | None, as_json: bool) -> None:
    """Print what would be exported, and with a target what would be compiled."""
    plan, output = plan_from_request(request)
    if target is None:
        print_plan(plan, output, as_json)
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
        print_json({**plan_json(plan, output), "compile": found[0] if len(found) == 1 else {"graphs": found}})
        return
    print_plan(plan, output, as_json)
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


def _int4(algorithm: str | None, block_size: str | None, precision: str | None) -> Int4Settings | None:
    """The settings that were asked for; None for the usual ones."""
    asked = {"algorithm": algorithm, "block_size": None if block_size is None else int(block_size)}
    said = {name: value for name, value in asked.items() if value is not None}
    if said and precision != DecoderPrecision.INT4.value:
        raise click.UsageError("--int4-algorithm and --int4-block-size need --decoder-precision int4.")
    return Int4Settings.model_validate(said) if said else None


def _decoder_precision(asked: str | None, precision: Precision) -> DecoderPrecision:
    if asked is not None:
        return DecoderPrecision(asked)
    return DecoderPrecision.FP32 if precision is Precision.FP32 else DecoderPrecision.FP16
