"""Bootstrap intervals over groups of questions.

Questions about one picture are not independent, so whole groups are drawn with replacement. All quantities of a report
come from the same draws, so that a difference or a ratio of two rules is a paired one: what makes a draw of pictures
easy makes it easy for both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

#: draws, and the seed of the generator; a report names both
RESAMPLES, SEED = 2000, 0
#: of an interval
CONFIDENCE = 0.95
#: with fewer groups a percentile interval is known to be too narrow, and a report says so.
#: Source: Cameron, Gelbach, Miller 2008, "Bootstrap-Based Improvements for Inference with Clustered Errors"
FEW_GROUPS = 30
_BLOCK = 128


@dataclass(frozen=True)
class Estimate:
    """A value and its interval; the ends are None where there are not two groups, or draws without a value."""

    value: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Sums:
    """Sums of some columns: over all questions [C], and over the questions of each draw [R, C]."""

    all: Array
    drawn: Array


@dataclass(frozen=True)
class Resamples:
    """Draws of groups. Build it with `resamples_of`.

    Attributes:
        group: int [Q], which group a question is in.
        times: uint16 [R, G], how often each draw has each group.
    """

    group: npt.NDArray[np.int64]
    times: npt.NDArray[np.uint16]

    @property
    def groups(self) -> int:
        return int(self.times.shape[1])

    def sums(self, columns: Array) -> Sums:
        """Add up columns [Q, C]."""
        by_group = np.zeros((self.groups, columns.shape[1]))
        np.add.at(by_group, self.group, columns)
        # in blocks: as float64 the draws of a large benchmark would take gigabytes
        blocks = [
            self.times[at : at + _BLOCK].astype(np.float64) @ by_group for at in range(0, len(self.times), _BLOCK)
        ]
        return Sums(columns.sum(axis=0), np.concatenate(blocks))


def resamples_of(groups: Sequence[str], *, resamples: int = RESAMPLES, seed: int = SEED) -> Resamples:
    """Draw from the groups of questions.

    Args:
        groups: of each question.
        resamples: how many draws.
        seed: of numpy's PCG64.
    """
    names = {name: index for index, name in enumerate(dict.fromkeys(groups))}
    dice, size = np.random.default_rng(seed), len(names)
    times = np.empty((resamples, size), dtype=np.uint16)
    for row in times:
        row[:] = np.bincount(dice.integers(0, size, size), minlength=size)
    return Resamples(np.array([names[name] for name in groups], dtype=np.int64), times)


def estimate_from(value: float, drawn: Array, groups: int) -> Estimate:
    """A value with the percentile interval of its draws [R]."""
    if not np.isfinite(value):
        return Estimate(None, None, None)
    if groups < 2 or not np.all(np.isfinite(drawn)):
        return Estimate(float(value), None, None)
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(drawn, [tail, 1 - tail])
    return Estimate(float(value), float(low), float(high))
