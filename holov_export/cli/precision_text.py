"""What people read of a precision report: what was lost, picture by picture and in answers, and what is allowed."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

from holov_export.cli.console import OUT, say, size_text, table
from holov_export.evaluate.intervals import FEW_GROUPS
from holov_export.evaluate.results import budget_text
from holov_export.quantize.precision_report import (
    AnswersKept,
    Estimated,
    PrecisionReport,
    Verdict,
    share_text,
)
from holov_export.verify.vision_loss import PictureLoss, summary_of

#: names of layers in one line
_SHOWN = 4


def print_precision(report: PrecisionReport) -> None:
    """All tables of a report on stdout; on stderr why answers were not compared."""
    title = f"{report.precision} against {report.compared_with}, {report.method}"
    title = title if report.part == "image" else f"{title}, {report.part}"
    print_losses(report.losses, f"{title}, {len(report.pictures)} pictures of recipe {report.recipe}")
    if report.answers is not None:
        OUT.print()
        print_answers(report.answers, (report.compared_with, report.precision))
    OUT.print()
    OUT.print(_verdicts_table(report))
    OUT.print(products_text(report), soft_wrap=True)
    if report.keep:
        OUT.print(f"a sweep says to keep: {', '.join(report.keep)}", soft_wrap=True)
    if report.answers is None:
        say(f"answers were not compared: {report.no_answers or 'nobody was asked'}")


def precision_line(report: PrecisionReport) -> str:
    """A report in one line, for lists: "int8 against fp32: overlap 0.984, cosine 0.99961, ... ok"."""
    found = [
        f"{verdict.what} {share_text(verdict.found, verdict.what)}"
        for verdict in report.verdicts
        if verdict.found is not None
    ]
    if report.answers is not None:
        found[-1] += f" ({_counted(report.answers.questions, 'question')})"
    state = "ok" if report.passed else "FAILED, accepted" if report.accepted_loss else "FAILED"
    return f"{report.precision} against {report.compared_with}: {', '.join(found)}  {state}"


def products_text(report: PrecisionReport) -> str:
    """How many products are quantised, which stay, and what that saves."""
    written = report.written
    staying = [*written.deciding, *written.kept]
    total = len(written.quantized) + len(staying)
    names = ", ".join(staying[:_SHOWN]) + (f" and {len(staying) - _SHOWN} more" if len(staying) > _SHOWN else "")
    stays = f"; {report.compared_with} stay {names}" if staying else ""
    return (
        f"{len(written.quantized)} of {total} products quantised{stays}; weights {size_text(written.bytes_before)} -> "
        f"{size_text(written.bytes_after)}"
    )


def print_title(title: str) -> None:
    """Above a table: its own title would be broken to the width of the table."""
    OUT.print(Text(title, style="italic"), soft_wrap=True)


def print_losses(losses: Sequence[PictureLoss], title: str) -> None:
    """A row for each budget, or each share where pictures have unequal numbers of tokens: the worst and the mean."""
    print_title(title)
    made = table(
        "K>",
        "overlap, worst>",
        "mean>",
        "equal sets>",
        "cosine, worst>",
        "mean>",
        "saliency error>",
        "worst picture",
    )
    for words, few in _by_budget(losses):
        found = summary_of(few)
        pruned = found.overlap_min is not None
        made.add_row(
            words,
            _number(found.overlap_min, 3),
            _number(found.overlap_mean, 3),
            f"{sum(loss.overlap == 1.0 for loss in few)}/{len(few)}" if pruned else "",
            _number(found.cosine_min, 6),
            _number(found.cosine_mean, 6),
            "-" if found.saliency_error is None else f"{found.saliency_error:.1e}",
            _worst_picture(few),
        )
    OUT.print(made)


def _worst_picture(losses: Sequence[PictureLoss]) -> str | Text:
    """By overlap, then by cosine; none where all is equal."""
    if not all(loss.sound for loss in losses):
        return Text("not sound", "red")
    worst = min(losses, key=lambda loss: (loss.overlap, _known(loss.cosine_min)))
    return worst.picture if worst.overlap < 1 or worst.saliency_error else ""


def _by_budget(losses: Sequence[PictureLoss]) -> list[tuple[str, list[PictureLoss]]]:
    """By number of tokens; where every picture has its own, by the share that it is of them."""
    same = len({loss.tokens for loss in losses}) == 1
    found: dict[str, list[PictureLoss]] = {}
    for loss in losses:
        whole = loss.budget == loss.tokens
        words = str(loss.budget) if same else "all" if whole else f"1/{round(loss.tokens / loss.budget)} of each"
        found.setdefault(words, []).append(loss)
    return list(found.items())


def _known(value: float | None) -> float:
    return -1.0 if value is None else value


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def print_answers(answers: AnswersKept, names: tuple[str, str]) -> None:
    """A row for each budget. The number of questions stands beside the shares: few of them prove little."""
    print_title(f"answers to {_counted(answers.questions, 'question')} of {answers.data}")
    columns = ["K>", "the same answer>", "loyalty, %>"]
    if answers.metric:
        columns += [f"{answers.metric}, %: {names[0]}>", f"{names[1]}>", f"{names[1]} / {names[0]}, %>"]
    made = table(*columns)
    for at in answers.at:
        row = [budget_text(at.budget, at.own_share), f"{at.same} of {answers.questions}", _percent(at.loyalty)]
        if answers.metric:
            row += [_percent(at.before), _percent(at.after), _percent(at.kept)]
        made.add_row(*row)
    OUT.print(made)
    OUT.print(_answers_note(answers), style="dim", soft_wrap=True)


def _answers_note(answers: AnswersKept) -> str:
    """What the shares are of, and what they are worth."""
    few = answers.pictures < FEW_GROUPS
    return (
        f"{_counted(answers.questions, 'question')} about {_counted(answers.pictures, 'picture')}"
        + (", which is too few to say much" if few else f"; {answers.confidence:.0%} bootstrap intervals")
        + f"; decoders {answers.decoders[0]} and {answers.decoders[1]}"
    )


def _percent(share: Estimated | None) -> str:
    if share is None:
        return "-"
    if share.low is None or share.high is None:
        return f"{100 * share.value:.1f}"
    return f"{100 * share.value:.1f} [{100 * share.low:.1f}, {100 * share.high:.1f}]"


def _verdicts_table(report: PrecisionReport) -> Table:
    made = table("limit", "at least>", "found>", "where", "")
    for verdict in report.verdicts:
        made.add_row(
            verdict.what,
            "" if verdict.limit is None else f"{verdict.limit:g}",
            "" if verdict.found is None else share_text(verdict.found, verdict.what),
            _where(verdict),
            _state(verdict, accepted=report.accepted_loss),
        )
    return made


def _where(verdict: Verdict) -> str:
    below = verdict.found is not None and verdict.limit is not None and verdict.found < verdict.limit
    return f"{verdict.where}, one token" if below and verdict.passed else verdict.where


def _state(verdict: Verdict, *, accepted: bool) -> Text:
    if verdict.passed:
        return Text("ok", "green")
    return Text("FAILED, accepted", "yellow") if accepted else Text("FAILED", "red")


def _counted(number: int, noun: str) -> str:
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"
