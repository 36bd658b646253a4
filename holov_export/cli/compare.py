"""`holov-export compare`: two bundles of one model side by side."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal

import click
from PIL import Image

from holov_export.bundle import Bundle, open_bundle, read_manifest
from holov_export.cli.console import OUT, print_json, progress, say, size_text, table
from holov_export.cli.options import UserPath, json_option, method_option, numbers, verify_option
from holov_export.cli.precision_text import print_answers, print_losses, print_title
from holov_export.errors import StorageError
from holov_export.evaluate.compare_bundles import (
    BundleComparison,
    ComparisonRequest,
    check_comparable,
    compare_bundles,
    question_about,
)
from holov_export.evaluate.data import Dataset
from holov_export.evaluate.kept_answers import questions_at_hand
from holov_export.evaluate.run import AskSettings
from holov_export.quantize.precision_report import AnswerPair
from holov_export.runtime.media import Part
from holov_export.runtime.preprocess import image_from
from holov_export.runtime.runner import checked_budget
from holov_export.runtime.runner_ort import OrtRunner
from holov_export.verify.backends import CPU_PRECISIONS
from holov_export.verify.bench_engines import labels_of
from holov_export.verify.panels import panels_from_bundle, subject_from_picture
from holov_export.verify.picture import picture_of_panels
from holov_export.verify.pictures import default_pictures
from holov_export.verify.vision_loss import USUAL_SIZES

Pictures = list[tuple[str, Image.Image]]

#: asked about every picture where no questions are at hand
_QUESTION = "what is in the image?"
#: letters of an answer in a table
_WIDTH = 60
#: pixels of the longer side of the drawn picture
_SIDE = 504


@click.command()
@click.argument("before", type=UserPath(), metavar="A")
@click.argument("after", type=UserPath(), metavar="B")
@click.option(
    "--pictures", "--image", "files", multiple=True, type=UserPath(), metavar="FILE", help="Compare on it; repeat."
)
@click.option("--budgets", callback=numbers, help="Budgets K [default: a ninth of the tokens, a third, all].")
@method_option
@click.option(
    "--part",
    type=click.Choice(["image", "video"]),
    default="image",
    show_default=True,
    help="Which graph of a model that has one for images and one for clips.",
)
@click.option("--data", type=UserPath(), metavar="QUESTIONS", help="Ask these, in a form that `evaluate` reads.")
@click.option("--question", help=f"Ask this about every picture [default of unknown models: {_QUESTION}].")
@click.option("--no-answers", is_flag=True, help="Ask nothing.")
@click.option("--max-new-tokens", type=click.IntRange(1), default=32, show_default=True, help="Longest answer.")
@click.option("--repeats", type=click.IntRange(0), default=10, show_default=True, help="Rounds of the timing.")
@click.option("--threads", type=click.IntRange(1), default=1, show_default=True, help="CPU threads.")
@click.option("--draw", type=UserPath(), metavar="FILE", help="Draw what both keep of the picture that differs most.")
@verify_option
@json_option
def compare(
    before: Path,
    after: Path,
    files: tuple[Path, ...],
    budgets: tuple[int, ...],
    method: str | None,
    part: Part,
    data: Path | None,
    question: str | None,
    no_answers: bool,
    max_new_tokens: int,
    repeats: int,
    threads: int,
    draw: Path | None,
    verify: Literal["full", "size"],
    as_json: bool,
) -> None:
    """Compare two bundles of one model on the same pictures.

    Tensors, kept tokens, answers, speed and size of A and B. Both run on the CPU. Exit code 0 also where they differ:
    what may be lost is the gate's to say (`export`, `quantize`).
    """
    if sum((data is not None, question is not None, no_answers)) > 1:
        raise click.UsageError("--data, --question and --no-answers exclude each other.")
    opened = _opened((before, after), method, part, budgets, verify)
    if draw is not None:
        _check_draw(opened, draw)
    pictures = [(path.name, image_from(path)) for path in files] or default_pictures()
    questions, reason = _questions(opened[0], pictures, data, question)
    request = ComparisonRequest(
        pictures=pictures,
        sizes=budgets or USUAL_SIZES,
        questions=None if no_answers else questions,
        no_questions="it was not asked for" if no_answers else reason,
        settings=AskSettings(provider="cpu", threads=threads, max_new_tokens=max_new_tokens),
        threads=threads,
        rounds=repeats,
    )
    first, second = (labels[0] for labels in labels_of(opened, ["ort"]))
    with progress() as tell:
        found = compare_bundles(*opened, (first, second), request, tell=tell)
        if draw is not None:
            tell("draw")
            _draw(opened, found, dict(pictures), draw)
    if as_json:
        print_json(found.model_dump(mode="json"))
        return
    _print(found)
    if draw is not None:
        OUT.print(str(draw), soft_wrap=True)


def _opened(
    folders: tuple[Path, Path], method: str | None, part: Part, budgets: Sequence[int], verify: Literal["full", "size"]
) -> tuple[Bundle, Bundle]:
    """Both views; what cannot be compared is refused before gigabytes are hashed."""

    def view(bundle: Bundle) -> Bundle:
        return (bundle if method is None else bundle.of_method(method)).of_part(part)

    before, after = (view(Bundle(folder, read_manifest(folder))) for folder in folders)
    check_comparable(before, after)
    for budget in budgets:
        checked_budget(budget, before.manifest.plan.tokens)
    first, second = (view(open_bundle(folder, verify=verify)) for folder in folders)
    return first, second


def _questions(
    bundle: Bundle, pictures: Pictures, data: Path | None, question: str | None
) -> tuple[Dataset | None, str]:
    """(what both are asked, "") or (None, the reason)."""
    if question is not None:
        return question_about(pictures, question), ""
    found, _ = questions_at_hand(bundle.manifest.plan, data)
    return (found, "") if found is not None else (question_about(pictures, _QUESTION), "")


def _check_draw(views: tuple[Bundle, Bundle], file: Path) -> None:
    """Refuse before anything runs what could not be drawn in the end.

    Raises:
        UsageError: clips, a graph that a CPU does not run, or an ending that Pillow does not write.
    """
    if views[0].part != "image":
        raise click.UsageError("--draw is for pictures; holov-export show draws clips.")
    for view in views:
        if view.manifest.plan.precision not in CPU_PRECISIONS:
            raise click.UsageError(f"--draw: a CPU does not run the {view.manifest.plan.precision.value} graph.")
    if file.suffix.lower() not in Image.registered_extensions():
        raise click.UsageError(f"--draw: '{file.name}' is no name of a picture, such as kept.png.")


def _draw(views: tuple[Bundle, Bundle], found: BundleComparison, pictures: dict[str, Image.Image], file: Path) -> None:
    """What both keep of one picture, side by side."""
    worst = min(found.losses, key=lambda loss: (loss.overlap, loss.budget))
    with tempfile.TemporaryDirectory(prefix="holov-compare-") as work:
        source = Path(work) / "picture.png"
        pictures[worst.picture].save(source)
        subject = subject_from_picture(source, views[0].manifest.plan.model, _SIDE)
    panels = []
    for view, side in zip(views, found.sides, strict=True):
        open_runner = partial(OrtRunner, provider="cpu", threads=1)
        (panel,) = panels_from_bundle(view, open_runner, subject.pixels, worst.budget, [view.method])
        panels.append(replace(panel, method=side.name))
    try:
        picture_of_panels(subject, panels).save(file)
    except OSError as error:
        raise StorageError(f"cannot write '{file}': {error.strerror}.", hint="Choose another --draw.") from error


# ---------------------------------------------------------------------------------------------------- tables


def _print(found: BundleComparison) -> None:
    _print_sides(found)
    _print_tensors(found)
    OUT.print()
    print_losses(found.losses, f"kept tokens of {len(found.pictures)} pictures, B against A")
    OUT.print()
    _print_answers(found)
    OUT.print()
    _print_speed(found)
    OUT.print()
    _print_sizes(found)
    for remark in found.remarks:
        say(f"{remark}.")


def _print_sides(found: BundleComparison) -> None:
    left, right = found.sides
    made = table("", "A", "B")
    made.add_row("bundle", left.name, right.name)
    made.add_row("rule", left.method, right.method)
    made.add_row("vision graph", *(f"{side.precision}, opset {side.opset}" for side in found.sides))
    made.add_row("decoder", left.decoder, right.decoder)
    OUT.print(made)
    clips = ", of a clip" if found.part == "video" else ""
    OUT.print(f"{found.model}: {found.tokens} tokens{clips}", style="dim")


def _print_tensors(found: BundleComparison) -> None:
    OUT.print()
    if found.tensors:
        made = table("tensor", "", "A", "B")
        for item in found.tensors:
            made.add_row(item.name, item.side, item.before or "-", item.after or "-")
        OUT.print(made)
    else:
        OUT.print("inputs and outputs: the same names, types and shapes")
    if found.weights:
        made = table("weights", "A>", ">", "B>", ">", "B / A>")
        for weights in found.weights:
            cells = []
            for count, size in zip(weights.tensors, weights.bytes, strict=True):
                cells += [f"{count} tensors" if count else "-", size_text(size) if count else ""]
            made.add_row(weights.dtype, *cells, _ratio(weights.bytes))
        OUT.print()
        OUT.print(made)


def _print_answers(found: BundleComparison) -> None:
    if found.answers is None:
        OUT.print(f"answers: not compared, {found.no_answers}", soft_wrap=True)
        return
    print_answers(found.answers, ("A", "B"))
    shown, asked = len(found.answers.examples), found.answers.questions * len(found.answers.at)
    OUT.print()
    if shown < asked:
        print_title(f"{shown} of {asked:,} pairs, those that differ first")
    made = table("picture", "K>", "question", "right", "A", "B", "")
    for pair in found.answers.examples:
        made.add_row(*_pair_row(pair))
    OUT.print(made)


def _pair_row(pair: AnswerPair) -> list[str]:
    texts = (pair.question, " | ".join(pair.right), pair.before, pair.after)
    shown = [_short(text) for text in texts]
    return [pair.picture, str(pair.budget), *shown, "same" if pair.same else "DIFFERENT"]


def _short(text: str) -> str:
    """On one line, and not too long for a table."""
    line = " ".join(text.split())
    return line if len(line) <= _WIDTH else f"{line[: _WIDTH - 3]}..."


def _print_speed(found: BundleComparison) -> None:
    speed = found.speed
    if speed is None:
        OUT.print(f"speed: not measured, {found.no_speed}", soft_wrap=True)
        return
    threads = "1 thread" if speed.threads == 1 else f"{speed.threads} threads"
    what = "CPU time" if speed.clock == "cpu" else "wall clock"
    print_title(f"vision graph, one picture, {what}, {threads}")
    made = table("K>", "A ms>", "B ms>", "B / A>")
    for item in speed.at:
        made.add_row(str(item.budget), *(f"{value:.2f}" for value in item.milliseconds), f"{item.ratio:.3f}")
    OUT.print(made)
    OUT.print(f"medians of {speed.rounds} interleaved rounds on {found.machine.cpu}", style="dim", soft_wrap=True)


def _print_sizes(found: BundleComparison) -> None:
    made = table("files", "A>", "B>", "B / A>")
    for item in found.sizes:
        made.add_row(item.kind, *(size_text(size) if size else "-" for size in item.bytes), _ratio(item.bytes))
    totals = tuple(sum(item.bytes[side] for item in found.sizes) for side in (0, 1))
    made.add_row("all", *map(size_text, totals), _ratio((totals[0], totals[1])))
    OUT.print(made)


def _ratio(sizes: tuple[int, int]) -> str:
    """How many times as large B is; "" where one of them is nothing."""
    return f"{sizes[1] / sizes[0]:.3f}" if all(sizes) else ""
