"""`holov-export bench`: measure bundles side by side."""

from __future__ import annotations

import shlex
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Literal

import click

from holov_export.bundle import Bundle, open_bundle, read_manifest
from holov_export.cli.console import OUT, print_json, progress, say, table
from holov_export.cli.options import (
    UserPath,
    check_output,
    json_option,
    method_names,
    numbers,
    provider_option,
    verify_option,
)
from holov_export.errors import CheckpointError
from holov_export.extras import require
from holov_export.pipeline import Tell, checkpoint_of
from holov_export.runtime.media import Part
from holov_export.runtime.preprocess import image_from
from holov_export.runtime.runner import checked_budget
from holov_export.targets import EngineTarget, target_from_name
from holov_export.verify.baselines import BASELINES, baseline_of
from holov_export.verify.bench_engines import ENGINES, Contestant, labels_of, ort_contestant
from holov_export.verify.bench_plot import plot_report
from holov_export.verify.bench_report import PLOT, remarks_of, tables_of, write_report
from holov_export.verify.bench_results import BenchReport
from holov_export.verify.bench_run import BenchRequest, bench
from holov_export.verify.bench_tensorrt import engine_for_comparison, tensorrt_contestant


def _engines(ctx: click.Context, param: click.Parameter, value: str) -> tuple[str, ...]:
    """("ort", "tensorrt") of "ort,tensorrt"."""
    names = tuple(dict.fromkeys(part.strip() for part in value.split(",")))
    unknown = [name for name in names if name not in ENGINES]
    if unknown:
        raise click.BadParameter(f"unknown engine '{unknown[0]}'; known: {', '.join(ENGINES)}.", ctx, param)
    return names


@click.command(name="bench")
@click.argument("bundles", nargs=-1, required=True, type=UserPath(), metavar="BUNDLE...")
@click.option("--compare", "others", multiple=True, type=UserPath(), metavar="BUNDLE", help="Another bundle; repeat.")
@click.option("--methods", help="Graphs of each bundle, comma separated [default: its first graph].")
@click.option(
    "--part",
    type=click.Choice(["image", "video"]),
    default="image",
    show_default=True,
    help="Which graph of a model that has one for images and one for clips.",
)
@click.option("--engine", "engines", callback=_engines, default="ort", show_default=True, help="ort, tensorrt or both.")
@click.option("--budgets", callback=numbers, help="Budgets K [default: all tokens, a third, two ninths, a ninth].")
@click.option("--image", "images", multiple=True, type=UserPath(), help="Measure on this picture; repeat.")
@click.option("--batch", "batches", callback=numbers, default="1", show_default=True, help="Batch sizes B.")
@click.option(
    "--vs",
    multiple=True,
    type=click.Choice(list(BASELINES)),
    help="Export the encoder again without selection (plain) or with a fixed one (uniform) and give ratios; repeat.",
)
@click.option("--checkpoint", help="Of the bundles, for --vs: directory, name or OWNER/REPO (demo: found by itself).")
@click.option("--target", "target_name", help="Whose engine and peak rates: a name or a TOML file.")
@click.option("--repeats", type=click.IntRange(1), default=30, show_default=True, help="Interleaved rounds.")
@click.option("--seconds", type=click.FloatRange(min=0, min_open=True), help="Instead: seconds for each case.")
@click.option("--alone", type=click.FloatRange(0), default=1.0, show_default=True, help="Seconds of each case alone.")
@click.option("--concurrency", callback=numbers, help="Numbers of callers at once, such as 1,2,4,8,16,32.")
@click.option("--decoder", "first_token", is_flag=True, help="Time the embedded decoder's first token as well.")
@click.option("--no-profile", is_flag=True, help="Do not profile what the selection takes.")
@click.option("--threads", type=click.IntRange(1), help="CPU threads of ONNX Runtime.")
@provider_option
@click.option("-o", "--output", type=UserPath(), help="Folder for bench.json, bench.md and bench.png.")
@click.option("--note", "notes", multiple=True, help="What is special about this run; kept in the report.")
@verify_option
@json_option
def bench_command(
    bundles: tuple[Path, ...],
    others: tuple[Path, ...],
    methods: str | None,
    part: Part,
    engines: tuple[str, ...],
    budgets: tuple[int, ...],
    images: tuple[Path, ...],
    batches: tuple[int, ...],
    vs: tuple[str, ...],
    checkpoint: str | None,
    target_name: str | None,
    repeats: int,
    seconds: float | None,
    alone: float,
    concurrency: tuple[int, ...],
    first_token: bool,
    no_profile: bool,
    threads: int | None,
    provider: str,
    output: Path | None,
    notes: tuple[str, ...],
    verify: Literal["full", "size"],
    as_json: bool,
) -> None:
    """Measure bundles side by side.

    Latency, throughput, the selection's share, power; as tables, JSON, Markdown and a plot. All cases run in
    interleaved rounds in this one process, so that each sees the same machine.
    """
    if checkpoint is not None and not vs:
        raise click.UsageError("--checkpoint is for --vs only.")
    folders = (*bundles, *others)
    names = method_names(methods) if methods else []
    _check_request(folders, names, part, budgets, output)
    target = target_from_name(target_name) if target_name else None
    request = BenchRequest(
        budgets=budgets,
        batches=batches,
        rounds=repeats,
        seconds=seconds,
        sustain=alone,
        threads=concurrency,
        profile=not no_profile,
        first_token=first_token,
        provider=provider,
        decoder_threads=threads,
        pictures=tuple(image_from(image) for image in images),
    )
    with progress() as tell:
        opened = _views([open_bundle(folder, verify=verify) for folder in folders], names, part)
        with ExitStack() as stack:
            baselines = stack.enter_context(_baselines(opened, vs, checkpoint, tell))
            if "tensorrt" in engines:
                for baseline, like in baselines:
                    engine_for_comparison(baseline, like, target, tell=tell)
            measured = [*opened, *(baseline for baseline, _ in baselines)]
            contestants = stack.enter_context(_contestants(measured, engines, provider, threads, target, tell))
            report = bench(contestants, request, command=_command_line(), notes=notes, tell=tell)
    written = _write(report, output)
    if as_json:
        print_json(report.model_dump(mode="json", exclude_none=True))
        return
    _print_report(report)
    for path in written:
        OUT.print(str(path), soft_wrap=True)


def _views(bundles: Sequence[Bundle], methods: Sequence[str], part: Part) -> list[Bundle]:
    """Each bundle once for each graph that is named, or with its first one."""
    return [
        bundle.of_method(name).of_part(part)
        for bundle in bundles
        for name in dict.fromkeys(methods or bundle.methods[:1])
    ]


def _check_request(
    folders: Sequence[Path], methods: Sequence[str], part: Part, budgets: Sequence[int], output: Path | None
) -> None:
    """Refuse what would be refused in the end, before gigabytes are hashed and minutes are spent.

    Raises:
        BundleError, UnknownNameError, UsageError, BudgetError, MissingExtraError, StorageError: as when the request is
            carried out.
    """
    for folder in folders:
        manifest = read_manifest(folder)
        _views([Bundle(folder, manifest)], methods, part)
        tokens = manifest.plan.of_part(part).tokens
        for budget in budgets:
            checked_budget(budget, tokens)
    if output is not None:
        require("matplotlib")
        check_output(output)


@contextmanager
def _baselines(
    opened: Sequence[Bundle], kinds: Sequence[str], checkpoint: str | None, tell: Tell
) -> Iterator[list[tuple[Bundle, Bundle]]]:
    """(baseline, bundle that it is like), one of each kind for each model and precision, while they are measured."""
    with tempfile.TemporaryDirectory(prefix="holov-baselines-") as work:
        made: dict[tuple[str, str, str], tuple[Bundle, Bundle]] = {}
        for bundle in opened:
            plan = bundle.manifest.plan
            for kind in kinds:
                key = (plan.source.config_sha256, plan.precision.value, kind)
                if key in made:
                    continue
                folder = checkpoint_of(bundle, checkpoint)
                if folder is None:
                    raise CheckpointError(
                        f"the baseline of '{bundle.folder.name}' is exported from its checkpoint.",
                        hint="Name it: --checkpoint DIR",
                    )
                output = Path(work) / str(len(made)) / f"{plan.model.name}-{kind}-{plan.precision.value}"
                output.parent.mkdir()
                made[key] = baseline_of(bundle, folder, output, kind=kind, tell=tell).of_part(bundle.part), bundle
        yield list(made.values())


@contextmanager
def _contestants(
    opened: Sequence[Bundle],
    engines: Sequence[str],
    provider: str,
    threads: int | None,
    target: EngineTarget | None,
    tell: Tell,
) -> Iterator[list[Contestant]]:
    """Every bundle in every engine; closed at the end."""
    made: list[Contestant] = []
    try:
        for bundle, labels in zip(opened, labels_of(opened, engines), strict=True):
            for engine, label in zip(engines, labels, strict=True):
                tell(f"load: {label}")
                if engine == "ort":
                    one = ort_contestant(bundle, label, provider=provider, threads=threads, target=target)
                else:
                    one = tensorrt_contestant(bundle, label, target=target)
                made.append(one)
        yield made
    finally:
        for one in made:
            one.runner.close()


def _command_line() -> str:
    """The command as it was typed, without absolute paths."""
    words = [Path(word).name if Path(word).is_absolute() else word for word in sys.argv[1:]]
    return shlex.join(["holov-export", *words])


def _write(report: BenchReport, output: Path | None) -> list[Path]:
    if output is None:
        return []
    written = write_report(report, output)
    plot_report(report, output / PLOT)
    return [*written, output / PLOT]


def _print_report(report: BenchReport) -> None:
    """The tables on stdout; remarks and what did not work on stderr."""
    for title, columns, rows in tables_of(report):
        made = table(*columns, title=title)
        for row in rows:
            made.add_row(*row)
        OUT.print(made)
        OUT.print()
    for remark in remarks_of(report):
        say(f"{remark}.")
    for failure in report.failures:
        say(f"did not work: {failure.step}: {failure.reason}")
