"""`holov-export targets` and `holov-export estimate`: what a model would do on a board that nobody owns yet."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast, get_args

import click

from holov_export.bundle import MANIFEST, read_manifest
from holov_export.catalog import checkpoint_from_reference, reference_from_name
from holov_export.cli.console import OUT, print_json, size_text, table
from holov_export.cli.options import json_option
from holov_export.errors import UsageError
from holov_export.estimate.report import BudgetRow, Estimate, estimate
from holov_export.estimate.shapes import ModelShape, shape_from_name, shape_from_spec, shape_names
from holov_export.export.checkpoint import spec_from_checkpoint
from holov_export.policies import HolovPolicy
from holov_export.spec import CacheType, DecoderPrecision, decoder_name
from holov_export.targets import EngineTarget, TargetPrecision, list_targets, target_from_name

_PRECISIONS = ("fp32", "fp16", "bf16", "int8", "fp8")


@click.command()
@click.argument("name", required=False)
@json_option
def targets(name: str | None, as_json: bool) -> None:
    """List the deployment targets. With NAME (or a path to a TOML file) everything about one, its sources included."""
    if name is not None:
        target = target_from_name(name)
        if as_json:
            print_json(target.model_dump(mode="json"))
        else:
            _print_target(target)
        return
    known = list_targets()
    if as_json:
        print_json([target.model_dump(mode="json") for target in known])
        return
    made = table("name", "sm>", "GiB>", "GB/s>", "fp16 TFLOP/s>", "TensorRT")  # 80 columns hold the longest name
    for target in known:
        made.add_row(
            target.name,
            str(target.sm),
            f"{target.memory_gb:g}",
            f"{target.bandwidth_gbs:g}",
            f"{target.rates.fp16:g}",
            str(target.tensorrt),
        )
    OUT.print(made)


def _print_target(target: EngineTarget) -> None:
    made = table(target.name)
    made.add_column(target.title)
    for key, value in _facts(target).items():
        made.add_row(key, value)
    OUT.print(made)
    if target.notes:
        OUT.print()
        OUT.print(target.notes.strip(), soft_wrap=True)
    profiles = table("profile", "batch", "budget")  # smallest:usual:largest, as --batch and --budget take them
    for profile in target.profiles:
        batch, budget = profile.batch, profile.budget
        profiles.add_row(
            profile.name, f"{batch.min}:{batch.opt}:{batch.max}", f"{budget.min}:{budget.opt}:{budget.max}"
        )
    OUT.print()
    OUT.print(profiles)
    for source in target.sources:
        OUT.print()
        OUT.print(f"{source.checked} {source.date.isoformat()}: {source.url or source.document}", soft_wrap=True)
        OUT.print(f"  {source.what}", soft_wrap=True)


def _facts(target: EngineTarget) -> dict[str, str]:
    """The rows of a target's first table."""
    rates = target.rates.model_dump(exclude_none=True)
    flags = [f"{key}={value}" for key, value in target.flags.model_dump().items() if value not in (False, "none")]
    facts = {
        "kind": target.kind,
        "compute capability": f"{target.compute_capability} (sm_{target.sm}), {target.multiprocessors} multiprocessors",
        "memory": f"{target.memory_gb:g} GiB, {target.reserved_gb:g} of them for the system"
        + (", shared by CPU and GPU" if target.unified_memory else ""),
        "bandwidth": f"{target.bandwidth_gbs:g} GB/s",
        "dense rates": ", ".join(f"{key} {value:g}" for key, value in rates.items()) + " T/s",
        "power modes": ", ".join(
            mode.name + (f" ({mode.watts} W)" if mode.watts and mode.name != f"{mode.watts}W" else "")
            for mode in target.power_modes
        ),
        "TensorRT": str(target.tensorrt),
        "CUDA": str(target.cuda),
        "JetPack": f"{target.jetpack}, Python {target.python}" if target.jetpack else "",
        "precisions": ", ".join(target.precisions),
        "builder": f"workspace {target.workspace_mb} MiB, optimisation level {target.optimization_level}",
        "flags": ", ".join(flags),
    }
    return {key: value or "-" for key, value in facts.items()}


def _size(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[int, int] | None:
    """(1280, 960) of "1280x960"."""
    if value is None:
        return None
    width, _, height = value.lower().partition("x")
    if not (width.isdecimal() and height.isdecimal() and int(width) and int(height)):
        raise click.BadParameter(f"'{value}' is no size such as 1280x960.", ctx, param)
    return int(width), int(height)


@click.command(name="estimate")
@click.argument("model", metavar="BUNDLE|MODEL")
@click.option("--target", "target_name", required=True, help="A name of `holov-export targets`, or a path to a .toml.")
@click.option("--budget", "budgets", type=int, multiple=True, help="A further token budget; repeat for more.")
@click.option("--batch", type=click.IntRange(1), default=1, show_default=True, help="Images, and answers, at once.")
@click.option(
    "--context", type=click.IntRange(1), help="Tokens the KV cache has room for [default: the model's longest]."
)
@click.option(
    "--text-tokens", type=click.IntRange(0), default=32, show_default=True, help="Of the prompt beside the image."
)
@click.option(
    "--precision",
    type=click.Choice(_PRECISIONS),
    help="Of the vision engine [default: the bundle's, else what the target recommends].",
)
@click.option(
    "--decoder-precision",
    type=click.Choice([item.value for item in DecoderPrecision]),
    help="Of the decoder's weights [default: the bundle's, else fp16].",
)
@click.option(
    "--decoder-kv-cache",
    type=click.Choice(get_args(CacheType)),
    help="What keys and values are stored in [default: the bundle's, else float].",
)
@click.option(
    "--size",
    callback=_size,
    metavar="WIDTHxHEIGHT",
    help="Pixels of the picture, where they decide how many tokens it has [default: the largest].",
)
@click.option("--video", is_flag=True, help="Of a clip instead of a picture.")
@json_option
def estimate_command(
    model: str,
    target_name: str,
    budgets: tuple[int, ...],
    batch: int,
    context: int | None,
    text_tokens: int,
    precision: str | None,
    decoder_precision: str | None,
    decoder_kv_cache: CacheType | None,
    size: tuple[int, int] | None,
    video: bool,
    as_json: bool,
) -> None:
    """Estimate memory and times of a model on a target.

    Neither is needed: the numbers come from peak rates, shapes and stated assumptions.

    MODEL is a bundle, a checkpoint directory, OWNER/REPO, or a name; llava-1.5-7b needs neither files nor network.
    """
    target = target_from_name(target_name)
    known = _known_of(model, size, "video" if video else "image")
    found = estimate(
        known.shape,
        target,
        precision=cast(TargetPrecision, precision or known.precision or target.precisions[0]),
        decoder=DecoderPrecision(decoder_precision or known.decoder or "fp16"),
        kv_cache=decoder_kv_cache or known.kv_cache,
        budgets=budgets,
        batch=batch,
        context=context,
        text_tokens=text_tokens,
    )
    if as_json:
        print_json(found.model_dump(mode="json"))
    else:
        _print_estimate(found, target)


@dataclass(frozen=True)
class _Known:
    """What a model says of itself: its shape, and a bundle also the precisions of its vision graph and decoder."""

    shape: ModelShape
    precision: str | None = None
    decoder: str | None = None
    kv_cache: CacheType = "float"


def _known_of(model: str, size: tuple[int, int] | None, part: Literal["image", "video"]) -> _Known:
    """What is known of a model.

    Raises:
        UsageError: see `shape_from_spec`; or a size or clip of a shape that ships.
    """
    folder = Path(os.path.expanduser(model))
    if model and os.path.isfile(folder / MANIFEST):  # Path's own raises for a name that is too long
        plan = read_manifest(folder).plan
        decoder = plan.decoder.value if plan.decoder else None
        shape = shape_from_spec(plan.model, plan.policy, plan.cuts, size=size, part=part)
        seen = plan.precision if plan.quantization is None else plan.quantization.type
        return _Known(shape, seen.value, decoder, plan.decoder_kv_cache)
    if model in shape_names():
        if size is not None or part == "video":
            raise UsageError(f"'{model}' takes pictures only, and all have as many tokens.")
        return _Known(shape_from_name(model))
    reference = reference_from_name(model)
    checkpoint = checkpoint_from_reference(reference, weights=False)
    spec = spec_from_checkpoint(checkpoint.folder, reference.label)
    return _Known(shape_from_spec(spec, HolovPolicy(), size=size, part=part))


def _print_estimate(found: Estimate, target: EngineTarget) -> None:
    tokens = found.rows[0].budget
    made = table(
        "budget>", "of all>", "vision ms>", "prefill ms>", "TTFT ms>", "decode tok/s>", "prompt's KV>", "memory>", ""
    )
    for row in found.rows:
        made.add_row(
            str(row.budget),
            f"{row.budget / tokens:.0%}",
            f"{row.vision_ms:.1f}",
            f"{row.prefill_ms:.1f}",
            f"{row.ttft_ms:.1f}",
            f"{row.decode_tokens_per_s:.1f}",
            size_text(row.prompt_kv_bytes),
            size_text(row.memory_bytes),
            "fits" if row.memory_bytes <= found.usable_bytes else "TOO MUCH",
        )
    OUT.print(f"{found.model} on {target.title}: an estimate, not a measurement", soft_wrap=True)
    OUT.print(
        f"vision {found.precision}, decoder {decoder_name(found.decoder_precision, found.kv_cache)}, "
        f"batch {found.batch}, "
        f"{found.text_tokens} text tokens, room for {found.context}",
        soft_wrap=True,
    )
    OUT.print()
    OUT.print(made)
    OUT.print()
    OUT.print(_memory_table(found.rows[0]))
    OUT.print(_verdict(found), soft_wrap=True)
    OUT.print()
    for line in found.assumptions:
        OUT.print(f"- {line}", soft_wrap=True)


def _memory_table(row: BudgetRow) -> Any:
    """Where the memory of the largest budget goes."""
    made = table("memory", "size>")
    for name, size in row.memory.model_dump().items():
        made.add_row(name.replace("_", " ").replace("kv", "KV"), size_text(size))
    return made


def _verdict(found: Estimate) -> str:
    needed, usable = size_text(found.rows[0].memory_bytes), size_text(found.usable_bytes)
    if found.fits:
        return f"fits: {needed} of {usable}"
    prompt = found.rows[0].budget + found.text_tokens
    or_8 = ", and --decoder-kv-cache int8 leaves room for more" if found.kv_cache == "float" else ""
    if found.context_that_fits >= prompt:
        return f"does not fit: {needed}, {usable} are usable; it would with --context {found.context_that_fits}{or_8}"
    smaller = [] if found.decoder_precision is DecoderPrecision.INT4 else ["--decoder-precision int4"]
    smaller += ["a smaller --batch"] if found.batch > 1 else []
    advice = f"; try {', '.join(smaller)}" if smaller else ""
    return f"does not fit: {needed}, {usable} are usable, whatever the context{advice}"
