"""`holov-export compile`: an engine from a bundle, on the machine that will run it."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import click

from holov_export.bundle import Bundle, open_bundle
from holov_export.cli.compile_decoder import compile_decoder
from holov_export.cli.console import OUT, print_json, progress, say, size_text, table
from holov_export.cli.options import UserPath, bundle_argument, graph_of, json_option, method_option
from holov_export.compile.compilation import (
    CompileOptions,
    CompilePlan,
    HardwareCompatibility,
    engine_folder,
    engine_label,
)
from holov_export.compile.engine_from_onnx import engine_from_bundle
from holov_export.compile.machine import this_machine
from holov_export.compile.preview import Preview, previews
from holov_export.compile.profile import words
from holov_export.compile.target_choice import target_for
from holov_export.engine import LAYERS, Engine
from holov_export.errors import EnvironmentFaultError, UsageError
from holov_export.targets import EngineTarget, list_targets, target_from_name

AUTO = "auto"


def _switch(name: str, field: str, what: str) -> Callable[[Any], Any]:
    return click.option(f"--{name}/--no-{name}", field, default=None, help=f"{what} [default: as the target says]")


class _EngineOrDecoder(click.Command):
    """`compile` with --decoder is another command, with options of its own."""

    def make_context(
        self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: Any
    ) -> click.Context:
        if any(word.split("=")[0] == "--decoder" for word in args):
            return compile_decoder.make_context(info_name, args, parent, **extra)
        return super().make_context(info_name, args, parent, **extra)


@click.command("compile", cls=_EngineOrDecoder, epilog="With --decoder llamacpp or trtllm the language model is built "
               "instead: holov-export compile --decoder trtllm --help")  # fmt: skip
@bundle_argument
@click.option("--target", "target_name", default=AUTO, show_default=True, help="A name of `holov-export targets`, "
              "a TOML file, or auto: the one that this GPU is.")  # fmt: skip
@click.option("--batch", help="Smallest, usual and largest batch, e.g. 1:4:16 [default: the target's profiles].")
@click.option("--budget", help="Smallest, usual and largest token budget, e.g. 1:64:576; also all and 1/9.")
@click.option(
    "--max-tokens",
    type=click.IntRange(min=1),
    metavar="N",
    help="Tokens of the largest picture, for models whose pictures differ in size [default: all; Qwen2.5-VL 1280].",
)
@click.option(
    "--clip-frames",
    type=click.IntRange(min=1),
    metavar="N",
    help="Qwen2.5-VL: frames of the longest clip that goes in as well, with --max-tokens altogether [default: none].",
)
@click.option("--profile", "profiles", multiple=True, metavar="PROFILE", help="batch=1:1:1,budget=64:64:64; repeat.")
@click.option("--workspace", "workspace_mb", type=click.IntRange(min=16), metavar="MIB", help="Memory for the builder.")
@click.option("--optimization-level", type=click.IntRange(0, 5), help="0 builds fast, 5 searches longest.")
@click.option("--tf32", is_flag=True, help="Let float32 products round to 10 bits; other tokens may be kept.")
@_switch("version-compatible", "version_compatible", "Load in later TensorRT releases.")
@click.option(
    "--hardware-compatibility",
    type=click.Choice(["none", "ampere_plus", "same_compute_capability"]),
    help="Other GPUs that may run it [default: as the target says].",
)
@_switch("weight-streaming", "weight_streaming", "Weights may stay in host memory (TensorRT 10 and later).")
@_switch("strip-weights", "strip_plan", "Leave the weights out; refitted when loaded (TensorRT 10 and later).")
@_switch("refit", "refit", "Let weights be replaced later.")
@click.option("--timing-cache", type=UserPath(), help="File of kernel timings [default: in the user's cache folder].")
@click.option("--no-timing-cache", is_flag=True, help="Neither read nor write kernel timings.")
@click.option("--no-layer-report", is_flag=True, help="Do not load the engine again to ask for its layers.")
@click.option(
    "--prefer-pins",
    is_flag=True,
    help="TensorRT 8: what cannot run in the float32 that it is pinned to may run otherwise.",
)
@click.option("--force", is_flag=True, help="Build although the readiness check found errors.")
@click.option("-o", "--output", type=UserPath(), help="Write to OUTPUT/TARGET/ [default: BUNDLE/engines/TARGET/].")
@method_option
@click.option("--part", type=click.Choice(["image", "video"]), help="Video-LLaVA: only the graph that sees these.")
@click.option("--tensorrt", "tensorrt", metavar="VERSION", help="With --dry-run: the version to plan for.")
@click.option("--dry-run", is_flag=True, help="Print the plan and the equal trtexec command; needs no GPU.")
@json_option
def compile_engine(
    bundle: Path,
    target_name: str,
    batch: str | None,
    budget: str | None,
    max_tokens: int | None,
    clip_frames: int | None,
    profiles: tuple[str, ...],
    workspace_mb: int | None,
    optimization_level: int | None,
    tf32: bool,
    version_compatible: bool | None,
    hardware_compatibility: HardwareCompatibility | None,
    weight_streaming: bool | None,
    strip_plan: bool | None,
    refit: bool | None,
    timing_cache: Path | None,
    no_timing_cache: bool,
    no_layer_report: bool,
    prefer_pins: bool,
    force: bool,
    output: Path | None,
    method: str | None,
    part: Literal["image", "video"] | None,
    tensorrt: str | None,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Build a bundle's TensorRT engine for this machine's GPU; of Video-LLaVA one for pictures and one for clips."""
    if tensorrt and not dry_run:
        raise click.UsageError("--tensorrt goes with --dry-run: a build takes the TensorRT that is installed.")
    if timing_cache and no_timing_cache:
        raise click.UsageError("--timing-cache and --no-timing-cache exclude each other.")
    options = CompileOptions(
        batch=batch,
        budget=budget,
        max_tokens=max_tokens,
        clip_frames=clip_frames,
        profiles=profiles,
        workspace_mb=workspace_mb,
        optimization_level=optimization_level,
        tf32=tf32,
        version_compatible=version_compatible,
        hardware_compatibility=hardware_compatibility,
        weight_streaming=weight_streaming,
        strip_plan=strip_plan,
        refit=refit,
        timing_cache=timing_cache,
        use_timing_cache=not no_timing_cache,
        layer_report=not no_layer_report,
        force=force,
        prefer=prefer_pins,
        output=output,
    )
    target = target_asked(target_name, dry_run=dry_run)
    opened = graph_of(open_bundle(bundle, verify="size"), method)
    views = [opened.of_part(each) for each in (opened.manifest.plan.parts if part is None else (part,))]
    if dry_run:
        _dry_run(views, target, options, tensorrt, as_json)
        return
    with progress() as tell:
        engines = [engine_from_bundle(view, target, options, tell=tell) for view in views]
    if as_json:
        print_json(_of_graphs([engine_json(engine) for engine in engines]))
        return
    for view, engine in zip(views, engines, strict=True):
        print_engine(engine, view if len(views) > 1 else None)


def _dry_run(
    views: Sequence[Bundle], target: EngineTarget, options: CompileOptions, tensorrt: str | None, as_json: bool
) -> None:
    """Print what would be built of each graph."""
    made = [
        (
            previews(view.manifest.plan, view.folder, target, options, tensorrt, view.graph),
            engine_folder(view.folder, engine_label(target.name, view), options),
        )
        for view in views
    ]
    if as_json:
        print_json(_of_graphs([previews_json(each, folder) for each, folder in made]))
        return
    for each, folder in made:
        print_previews(each, folder, as_json)


def _of_graphs(found: list[dict[str, Any]]) -> dict[str, Any]:
    """What is said of one graph as it is; of several as a list."""
    return found[0] if len(found) == 1 else {"graphs": found}


def target_asked(name: str, *, dry_run: bool = False) -> EngineTarget:
    """The target of a --target value; with auto the one that this machine is, which is said on stderr.

    Raises:
        UsageError: auto in a dry run without a GPU or TensorRT. UnknownNameError, EngineError: no such target.
        EnvironmentFaultError: auto without a GPU or TensorRT.
    """
    if name != AUTO:
        return target_from_name(name)
    try:
        machine = this_machine()
    except EnvironmentFaultError as error:
        if not dry_run:
            raise
        raise UsageError(
            f"which target is meant cannot be told here: {error.message}",
            hint="Name one with --target; `holov-export targets` lists them.",
        ) from error
    choice = target_for(machine.gpu, machine.tensorrt, list_targets())
    say(f"target {choice.target.name}: {choice.reason}")
    return choice.target


# ------------------------------------------------------------------------------------------------------- what is shown


def previews_json(made: tuple[Preview, ...], folder: Path) -> dict[str, Any]:
    """Previews as --json shows them."""
    return {
        "engine": str(folder),
        "plans": [
            {
                "tensorrt": item.tensorrt,
                "plan": None if item.plan is None else item.plan.model_dump(mode="json"),
                "refusal": item.refusal or None,
                "commands": [list(command) for command in item.commands],
                "notes": list(item.notes),
            }
            for item in made
        ],
    }


def print_previews(made: tuple[Preview, ...], folder: Path, as_json: bool) -> None:
    """Plans and commands on stdout, what the commands do otherwise on stderr."""
    if as_json:
        print_json(previews_json(made, folder))
        return
    for item in made:
        if item.plan is None:
            say(f"TensorRT {item.tensorrt}: {item.refusal}")
            continue
        _print_plan(item.plan, folder)
        OUT.print()
        for command in item.commands:
            OUT.print(shlex.join(command), soft_wrap=True)
        OUT.print()
        for note in item.notes:
            say(f"trtexec of TensorRT {item.tensorrt}: {note}")


_NETWORKS = {
    "strongly-typed": "strongly typed: the graph's own types",
    "int8-flag": "INT8 and FP16 flags; what decides which tokens stay is pinned",
    "fp16-flag": "FP16 flag; what the graph computes in float32 is pinned",
    "fp32": "float32",
}


def _print_plan(plan: CompilePlan, folder: Path) -> None:
    made = table(f"TensorRT {plan.tensorrt}", "")
    flags = [f"{key}={value}" for key, value in plan.flags.model_dump().items() if value not in (False, "none")]
    rows = {
        "target": plan.target,
        "network": f"{_NETWORKS[plan.network]}; opset {plan.opset}{' (lowered)' if plan.lowered else ''}",
        "precision": f"{plan.precision_name}, TF32 {'on' if plan.tf32 else 'off'}",
        **{f"profile {index}": words(shape) for index, shape in enumerate(plan.profiles)},
        "workspace": f"{plan.workspace_mb} MiB",
        "optimisation level": "-" if plan.optimization_level is None else str(plan.optimization_level),
        "flags": ", ".join(flags) or "none",
        "engine": str(folder),
    }
    for key, value in rows.items():
        made.add_row(key, value)
    OUT.print(made)


def engine_json(engine: Engine) -> dict[str, Any]:
    """An engine as --json shows it."""
    return {"engine": str(engine.folder), "record": engine.record.model_dump(mode="json")}


def print_engine(engine: Engine, graph: Bundle | None = None) -> None:
    """What was built, on stdout; `graph` is the one that it was built from, where the bundle has several."""
    record, built = engine.record, engine.record.built_with
    made = table("engine", "")
    rows = {
        "target": record.target,
        **({} if graph is None else {"method": graph.method, "sees": f"{graph.part}s"}),
        "built with": f"TensorRT {built.tensorrt}, {built.gpu} (sm_{built.sm}), {built.network}",
        "precision": f"{record.precision_name}, opset {record.opset}",
        **{f"profile {index}": words(shape) for index, shape in enumerate(record.profiles)},
        "build": f"{record.build_seconds:.1f} s",
        "layers": LAYERS if (engine.folder / LAYERS).is_file() else "no report",
    }
    for key, value in rows.items():
        made.add_row(key, value)
    OUT.print(made)
    OUT.print(f"{engine.folder}  {size_text(record.bytes)}", soft_wrap=True)
