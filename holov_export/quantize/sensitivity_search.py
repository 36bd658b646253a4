"""How groups are ranked, and how the smallest set that must stay in float is searched."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from holov_export.quantize.sensitivity_record import Measured
from holov_export.recipes import Limits
from holov_export.verify.vision_loss import summary_of

#: groups that are tried without, once a set is found
RETRIED = 6
#: room that is left by a limit of 1, where any damage is too much
_NO_ROOM = 1e-6
#: damage of what gives numbers that are not finite
_BROKEN = 1e6


def damage_of(alone: Measured, everything: Measured, limits: Limits, *, reads_features: bool) -> float:
    """How much of what the limits allow a group uses up by itself: the worst of its parts, so none is forgotten.

    The cosine is continuous and tells directly. Overlap is not: of a group alone it is 1 nearly always, so the error of
    the saliency stands for it, in proportion to what everything quantised does to both. A rule that reads features can
    change its mind with the same saliency, so there the mean overlap counts as well.

    Args:
        everything: all groups quantised.
    """
    summary, worst = summary_of(alone.losses), summary_of(everything.losses)
    if alone.saliency_error is None or summary.cosine_min is None:
        return _BROKEN
    parts = [(1 - summary.cosine_min) / max(1 - limits.cosine, _NO_ROOM)]
    room = max(1 - limits.overlap, _NO_ROOM)
    lost = 1.0 if worst.overlap_mean is None or everything.saliency_error is None else 1 - worst.overlap_mean
    if everything.saliency_error:
        parts.append(alone.saliency_error / everything.saliency_error * lost / room)
    if reads_features and summary.overlap_mean is not None:
        parts.append((1 - summary.overlap_mean) / room)
    return min(max(parts), _BROKEN)


def fewest(most: int, good: Callable[[int], bool]) -> int | None:
    """The smallest number in 0..most that is good, if more is never worse; None if `most` is not good either.

    0, 1, 2, 4, ... are tried, then the numbers between the last two.
    """
    low, high = -1, 0
    while not good(high):
        if high == most:
            return None
        low, high = high, min(most, max(1, 2 * high))
    while high - low > 1:
        middle = (low + high) // 2
        if good(middle):
            high = middle
        else:
            low = middle
    return high


def needed(kept: Sequence[str], good: Callable[[Sequence[str]], bool]) -> list[str]:
    """`kept` without those that it is good without; the last ones are tried first, and `RETRIED` at most."""
    left = list(kept)
    for name in reversed(kept[-RETRIED:]):
        without = [other for other in left if other != name]
        if good(without):
            left = without
    return left
