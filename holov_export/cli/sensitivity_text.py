"""A sensitivity sweep for people: tables on stdout, and the option that follows from it in the last line."""

from __future__ import annotations

from holov_export.cli.console import OUT, print_json, table
from holov_export.quantize.precision_report import NEAR_TIES
from holov_export.quantize.sensitivity_record import CurvePoint, GroupDamage, Sensitivity

#: groups that are shown; the rest is in the JSON
_SHOWN = 20
#: width of the longest bar
_BAR = 20


def print_sensitivity(found: Sensitivity, *, as_json: bool = False) -> None:
    """Tables and the last line, or one JSON document."""
    if as_json:
        print_json(found.model_dump(mode="json"))
        return
    where = f"{found.method}, {found.part}" if found.part == "video" else found.method
    budgets = ", ".join(map(str, found.budgets))
    OUT.print(
        f"{where}: {found.quantization.type.value} ({found.quantization.engine}) against {found.precision}, "
        f"{len(found.pictures)} pictures of the calibration at {budgets} of the tokens",
        soft_wrap=True,
    )
    _print_groups(found.groups)
    _print_curve(found)
    OUT.print(option_text(found), soft_wrap=True)


def _print_groups(groups: tuple[GroupDamage, ...]) -> None:
    rows = table(
        "alone quantised", "damage>", "", "saliency error>", "overlap>", "cosine>", "of the work>", title="\nGroups"
    )
    most = max((group.damage for group in groups), default=0.0) or 1.0
    for group in groups[:_SHOWN]:
        rows.add_row(
            group.name,
            f"{group.damage:.3f}",
            "█" * max(1, round(_BAR * group.damage / most)),
            _share(group.saliency_error, 2),
            _number(group.overlap, 3),
            _number(group.cosine, 5),
            _share(group.share, 1),
        )
    OUT.print(rows)
    if len(groups) > _SHOWN:
        OUT.print(f"and {len(groups) - _SHOWN} more, each with less", soft_wrap=True)


def _print_curve(found: Sensitivity) -> None:
    rows = table(
        "kept in float",
        "of the work>",
        "saliency error>",
        "overlap>",
        "cosine>",
        "limits",
        title="\nTogether quantised",
    )
    for before, point in zip((None, *found.curve), found.curve, strict=False):
        rows.add_row(
            _kept(before, point),
            _share(point.share, 1),
            _share(point.saliency_error, 2),
            _number(point.overlap, 3),
            _number(point.cosine, 5),
            "met" if point.met else "missed",
        )
    OUT.print(rows)
    ties = f" or {NEAR_TIES} token of a picture" if found.limits.overlap < 1 else ""
    OUT.print(f"limits: overlap {found.limits.overlap:g}{ties}, cosine {found.limits.cosine:g}\n", soft_wrap=True)


def _kept(before: CurvePoint | None, point: CurvePoint) -> str:
    """How many, and which they are, or which are new."""
    if not point.kept:
        return "nothing more"
    more = before is not None and bool(before.kept) and set(before.kept) < set(point.kept)
    new = [name for name in point.kept if before is None or not more or name not in before.kept]
    shown = ", ".join(new[:2]) + (f" and {len(new) - 2} more" if len(new) > 2 else "")
    return f"{len(point.kept)}: {'+ ' if more else ''}{shown}"


def option_text(found: Sensitivity) -> str:
    """The option to quantise with, or why none helps."""
    option = f"--keep {','.join(found.keep)}" if found.keep else ""
    if found.met:
        return option or "nothing needs to be kept: quantise without --keep"
    return f"no set within the limits was found; the best: {option or 'no --keep'}"


def _share(value: float | None, digits: int) -> str:
    return "not finite" if value is None else f"{100 * value:.{digits}f} %"


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
