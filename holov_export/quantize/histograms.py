"""Histograms of activations whose range is not known when they begin, and the ranges that are found in them."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

#: odd, so that zero lies in the middle of a bin; three odd thirds, so that three bins become one when the range grows
BINS = 4095
#: by which the range grows: the bins of the old one then end where bins of the new one do
_GROWTH = 3
#: values that a symmetric int8 can have, -127 to 127
_LEVELS = 255
#: what an empty bin of a distribution counts for.
#: Source: onnxruntime 1.31 quantization/quant_utils.py, smooth_distribution
_EPSILON = np.float32(1e-4)


@dataclass
class Histogram:
    """How many values lie in each of `BINS` equal bins of -top..top.

    The first values say what `top` is; larger ones later make it three times as large, as often as needed, so that the
    bins never become more (ONNX Runtime's own collector adds bins, without an end where the first picture is dark).
    """

    top: float = 0.0
    counts: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(BINS, dtype=np.int64))

    def add(self, values: npt.NDArray[np.floating]) -> None:
        """Count values, all of them finite."""
        if not values.size:
            return
        largest = max(abs(float(values.min())), abs(float(values.max())))
        if largest == 0.0:
            self.counts[BINS // 2] += values.size
            return
        if self.top == 0.0:
            self.top = largest  # the zeros so far are where they belong
        while largest > self.top:
            self._grow()
        top = np.float32(self.top)  # numpy makes edges of this type, and ONNX Runtime's collector has float32 ones
        self.counts += np.histogram(values, BINS, range=(-top, top))[0]  # type: ignore[arg-type]

    def _grow(self) -> None:
        third = BINS // _GROWTH
        merged = self.counts.reshape(third, _GROWTH).sum(1)
        self.counts = np.zeros(BINS, dtype=np.int64)
        self.counts[third : 2 * third] = merged
        self.top *= _GROWTH

    @property
    def edges(self) -> npt.NDArray[np.float64]:
        """float64 [BINS + 1]"""
        return np.linspace(-self.top, self.top, BINS + 1)


def percentile_range(histogram: Histogram, percentile: float) -> tuple[float, float]:
    """What is left when as many of the smallest as of the largest values are cut off, to whole bins.

    Args:
        percentile: 99.99 cuts one value in ten thousand: half of them below, half above.
    """
    share = (100.0 - percentile) / 200.0
    seen = np.cumsum(histogram.counts) / histogram.counts.sum()
    left, right = int(np.searchsorted(seen, share)), int(np.searchsorted(seen, 1.0 - share))
    return float(histogram.edges[left]), float(histogram.edges[min(right, BINS - 1) + 1])


def entropy_threshold(histogram: Histogram) -> float:
    """The t for which the values, cut to -t..t and rounded to 8 bits, differ least from themselves by KL divergence.

    Source: onnxruntime 1.31 quantization/calibrate.py, HistogramCollector.get_entropy_threshold, which is after Migacz,
    8-bit inference with TensorRT, GTC 2017; the numbers are the same, the loops over bins are gone.
    """
    counts, middle = histogram.counts, BINS // 2
    below = np.concatenate([[0], np.cumsum(counts)])
    halves = range(_LEVELS // 2, middle + 1)
    lost = [_divergence(counts, below, middle - half, middle + half + 1) for half in halves]
    best = halves[int(np.argmin(lost))]
    return float(histogram.edges[middle + best + 1])


def _divergence(counts: npt.NDArray[np.int64], below: npt.NDArray[np.int64], start: int, stop: int) -> float:
    """KL divergence of the bins `start` to `stop` - 1, what lies outside put in the outermost, rounded to 8 bits.

    Args:
        below: int64 [BINS + 1], values in the bins before each.
    """
    inside = counts[start:stop]
    exact = inside.copy()
    exact[0] += below[start]
    exact[-1] += below[-1] - below[stop]
    together = inside.size // _LEVELS
    whole = _LEVELS * together
    cells = inside[:whole].reshape(_LEVELS, together).sum(1)
    cells[-1] += inside[whole:].sum()
    filled = (exact[:whole] != 0).reshape(_LEVELS, together).sum(1)
    rounded = np.zeros_like(exact)
    rounded[:whole] = np.repeat(np.where(filled, cells // np.maximum(filled, 1), 0), together)
    if not exact.any() or not rounded.any():
        return np.inf
    left, right = _smooth(exact), _smooth(rounded)
    return float((left * np.log(left / right)).sum())


def _smooth(counts: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
    """Shares without a zero among them: empty bins get a little, the others give it."""
    empty = counts == 0
    given = _EPSILON * np.float32(empty.sum()) / np.float32(counts.size - empty.sum())
    made: npt.NDArray[np.float32] = np.where(empty, _EPSILON, counts.astype(np.float32) - given).astype(np.float32)
    made /= made.sum()
    return made
