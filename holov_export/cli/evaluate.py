"""`holov-export evaluate`: what pruning costs in answers, on the user's own questions."""

from __future__ import annotations

import re
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

import click
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from holov_export.bundle import Bundle, open_bundle, read_manifest
from holov_export.cli.console import ERR, OUT, print_json, say, table
from holov_export.cli.options import (
    UserPath,
    bundle_argument,
    check_output,
    method_names,
    provider_option,
    verify_option,
)
from holov_export.errors import BundleError, MissingExtraError
from holov_export.evaluate.data import Dataset, check_pictures
from holov_export.evaluate.formats import FORMATS, dataset_from_path
from holov_export.evaluate.journal import open_journal
from holov_export.evaluate.metrics import METRICS
from holov_export.evaluate.plan import Plan, Size, plan_from_bundle
from holov_export.evaluate.plot import plot_retention
from holov_export.evaluate.report import (
    PLOT,
    Table,
    remarks_of,
    tables_of,
    write_evaluation,
)
from holov_export.evaluate.results import Evaluation
from holov_export.evaluate.run import (
    Advance,
    AskSettings,
    Tell,
    ask_all,
    check_images,
    check_prompts,
    header_of,
    unanswered,
)
from holov_export.evaluate.score import chosen_metrics, evaluation_from_journal
from holov_export.extras import is_installed
from holov_export.pipeline import checkpoint_of

Command = Callable[..., None]
#: an option and its value in one word: --output=/tmp/x, -o/tmp/x
_OPTION = re.compile(r"(--[a-z-]+=|-[a-z])(.*)", re.DOTALL)


@dataclass(frozen=True)
class Asked:
    """The options that both commands share."""

    bundle: Path
    data: Path
    methods: tuple[str, ...]
    budgets: tuple[Size, ...]
    metric: str | None
    form: str
    images: Path | None
    questions: Path | None
    limit: int | None
    decoder: str
    checkpoint: str | None
    suffix: str
    max_new_tokens: int
    threads: int | None
    provider: str
    verify: Literal["full", "size"]
    output: Path
    overwrite: bool
    baseline: str | None = None


def _names(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[str, ...]:
    if value is None:
        return ()
    names = tuple(dict.fromkeys(method_names(value)))
    if "" in names:
        raise click.BadParameter(f"'{value}' is no list of names such as holov,scope.", ctx, param)
    return names


def _sizes(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[Size, ...]:
    """(192, Fraction(1, 9)) of "192,1/9"; () where nothing was said."""
    if value is None:
        return ()
    try:
        found = tuple(Fraction(part) if "/" in part else int(part) for part in value.split(","))
    except (ValueError, ZeroDivisionError):
        words = f"'{value}' is no list of whole numbers such as 192,64 or shares such as 1/3,1/9."
        raise click.BadParameter(words, ctx, param) from None
    small = [size for size in found if size <= 0 or (isinstance(size, int) and size < 1)]
    if small:
        raise click.BadParameter(f"{small[0]} is below {'1' if isinstance(small[0], int) else '0'}.", ctx, param)
    return tuple(dict.fromkeys(found))


_SHARED = (
    bundle_argument,
    click.argument("data", type=UserPath()),
    click.option(
        "--budgets",
        callback=_sizes,
        help="Numbers of tokens, or shares such as 1/9; where pictures differ, of each one's own tokens "
        "[default: 1/3,2/9,1/9].",
    ),
    click.option("--methods", callback=_names, help="Rules, comma separated [default: all that the bundle holds]."),
    click.option(
        "--metric",
        metavar="NAME",
        help=f"That tables begin with: {', '.join(item.name for item in METRICS)} [default: the data's custom].",
    ),
    click.option("--format", "form", type=click.Choice(FORMATS), default="auto", show_default=True, help="Of DATA."),
    click.option("--images", type=UserPath(), help="Folder of the pictures [default: the data's]."),
    click.option("--questions", type=UserPath(), help="VQAv2: the questions JSON; DATA is then the annotations."),
    click.option("--limit", type=click.IntRange(1), help="Ask the first so many questions only."),
    click.option(
        "--decoder",
        type=click.Choice(["auto", "genai", "ort", "hf"]),
        default="auto",
        show_default=True,
        help="Back end: as of `ask`.",
    ),
    click.option("--checkpoint", help="For --decoder hf: directory, name or OWNER/REPO (demo: found by itself)."),
    click.option(
        "--prompt-suffix",
        "--suffix",
        "suffix",
        default="",
        help='A line after every question. LLaVA was trained for short answers with "Answer the question using a '
        'single word or phrase."',
    ),
    click.option("--max-new-tokens", type=click.IntRange(1), default=32, show_default=True, help="Longest answer."),
    click.option("--threads", type=click.IntRange(1), help="CPU threads."),
    provider_option,
    verify_option,
    click.option(
        "-o",
        "--output",
        type=UserPath(),
        help="Folder of the journal and the results [default: BUNDLE-DATA-evaluation, here].",
    ),
    click.option("--overwrite", is_flag=True, help="Forget the answers in --output and begin anew."),
    click.option("--json", "as_json", is_flag=True, help="Result as JSON on stdout."),
)


def shared_options(command: Command) -> Command:
    """The arguments and options that both commands have."""
    for option in reversed(_SHARED):
        command = option(command)
    return command


@click.command()
@shared_options
@click.option("--baseline", help="Rule that the others are compared with [default: holov, else the first].")
@click.option("--no-plot", is_flag=True, help=f"Write no {PLOT}; needs no matplotlib.")
def evaluate(as_json: bool, no_plot: bool, **options: Any) -> None:
    """Measure what pruning costs in answers.

    Asks every question of DATA with all visual tokens and with every rule at every budget. Answers go to a journal at
    once: a run that was killed goes on where it was when it is started again.
    """
    asked = asked_from_options(options)
    report = evaluated(ready_to_ask(asked, plot=not no_plot))
    written = write_evaluation(report, asked.output)
    if not no_plot:
        plot_retention(report, asked.output / PLOT)
        written.append(asked.output / PLOT)
    if as_json:
        print_json(report.model_dump(mode="json"))
        return
    print_tables(list(tables_of(report, kinds=False)))
    for remark in remarks_of(report):
        say(f"{remark}.")
    for path in written:
        OUT.print(str(path), soft_wrap=True)


def asked_from_options(options: dict[str, Any]) -> Asked:
    """The options as one value, refused where they contradict each other."""
    if options["checkpoint"] is not None and options["decoder"] != "hf":
        raise click.UsageError("--checkpoint is for --decoder hf only; the embedded decoder has its own weights.")
    bundle, data = options["bundle"], options["data"]
    if options["output"] is None:
        options["output"] = Path(f"{bundle.resolve().name}-{data.resolve().stem}-evaluation")
    return Asked(**options)


@dataclass(frozen=True)
class Ready:
    """A request that was checked."""

    asked: Asked
    dataset: Dataset
    bundle: Bundle
    plan: Plan
    settings: AskSettings


def ready_to_ask(asked: Asked, *, plot: bool = False) -> Ready:
    """Check everything that can be checked before the first question.

    Args:
        plot: a plot will be drawn in the end.

    Raises:
        HolovExportError: the request or its data is wrong, or this machine lacks something.
    """
    read_manifest(asked.bundle)  # a wrong folder, before a long data file is read
    dataset = dataset_from_path(asked.data, asked.form, images=asked.images, questions=asked.questions)
    dataset = dataset.first(asked.limit)
    chosen_metrics(dataset, asked.metric)
    check_pictures(dataset)
    if plot and not is_installed("matplotlib"):
        raise MissingExtraError(
            "the Python package 'matplotlib' is not installed; it draws the plot.",
            hint='Run: pip install "holov-export[bench]", or leave the plot out: --no-plot',
        )
    check_output(asked.output)
    bundle = open_bundle(asked.bundle, verify=asked.verify)
    plan = plan_from_bundle(bundle, asked.methods, asked.budgets, decoder=asked.decoder, baseline=asked.baseline)
    settings = settings_of(asked, bundle)
    check_prompts(bundle, dataset, settings)
    return Ready(asked, dataset, bundle, plan, settings)


def evaluated(ready: Ready) -> Evaluation:
    """Ask what is not answered yet, and score it.

    Raises:
        HolovExportError: the journal is of something else, or this machine lacks something.
    """
    began = time.perf_counter()
    bundle, dataset, plan, settings = ready.bundle, ready.dataset, ready.plan, ready.settings
    header = header_of(bundle, dataset, settings)
    with open_journal(ready.asked.output, header, overwrite=ready.asked.overwrite) as journal:
        check_images(dataset, journal)
        missing = unanswered(plan, dataset, journal)
        _say_what_is_to_do(plan, dataset, missing)
        if missing:
            with _progress(len(plan.to_ask()) * len(dataset.questions), missing) as (tell, advance):
                ask_all(bundle, dataset, plan, settings, journal, tell=tell, advance=advance)
        return evaluation_from_journal(
            bundle,
            dataset,
            plan,
            settings,
            journal,
            metric=ready.asked.metric,
            command=command_line(),
            seconds=time.perf_counter() - began,
        )


def settings_of(asked: Asked, bundle: Bundle) -> AskSettings:
    """How to ask; the checkpoint is looked for where the decoder needs it.

    Raises:
        BundleError: the bundle has no decoder, or none is named.
        UsageError: "genai" for a language model that it would run wrongly.
        CheckpointError: the checkpoint is not that of the bundle.
    """
    if asked.decoder != "hf" and bundle.decoder is None:
        raise BundleError(
            f"the bundle '{bundle.folder.name}' was exported without a decoder.",
            hint="Export it without --no-decoder, or evaluate with --decoder hf --checkpoint DIR.",
        )
    checkpoint = checkpoint_of(bundle, asked.checkpoint) if asked.decoder == "hf" else None
    if asked.decoder == "hf" and checkpoint is None:
        raise click.UsageError("the decoder 'hf' needs the checkpoint: --checkpoint DIR")
    settings = AskSettings(
        asked.decoder, checkpoint, asked.provider, asked.threads, asked.suffix.strip(), asked.max_new_tokens
    )
    settings.back_end(bundle)  # refuses now what could not answer later
    return settings


def _say_what_is_to_do(plan: Plan, dataset: Dataset, missing: int) -> None:
    total = len(plan.to_ask()) * len(dataset.questions)
    done = f"; {total - missing} are answered already" if missing < total else ""
    say(
        f"{len(dataset.questions)} questions about {len(dataset.pictures)} pictures in {len(plan.to_ask())} cells: "
        f"{total} answers{done}"
    )


@contextmanager
def _progress(total: int, missing: int) -> Iterator[tuple[Tell, Advance]]:
    """A bar on a terminal; elsewhere a line for each rule."""
    if not ERR.is_terminal:
        yield (lambda message: ERR.print(Text(f"  {message}")), lambda count: None)
        return
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=ERR) as bar:
        task = bar.add_task("", total=total, completed=total - missing)
        yield (
            lambda message: bar.update(task, description=message),
            lambda count: bar.advance(task, count),
        )


def print_tables(tables: list[Table]) -> None:
    for title, columns, rows in tables:
        made = table(*columns)
        for row in rows:
            made.add_row(*row)
        OUT.print(Text(title, style="italic"))  # a table's own title is broken to the width of the table
        OUT.print(made)
        OUT.print()


def command_line() -> str:
    """The command as it was typed, without absolute paths: they say something about this machine."""
    words = []
    for word in sys.argv[1:]:
        option, path = found.groups() if (found := _OPTION.fullmatch(word)) else ("", word)
        words.append(f"{option}{Path(path).name}" if Path(path).is_absolute() else word)
    return shlex.join(["holov-export", *words])
