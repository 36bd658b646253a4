"""Histograms with a growing range, against ONNX Runtime's own collector."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from onnxruntime.quantization.calibrate import HistogramCollector

from holov_export.quantize.histograms import BINS, Histogram, entropy_threshold, percentile_range

Values = npt.NDArray[np.float32]


def values_of(kind: str) -> Values:
    dice = np.random.default_rng(3)
    made = {
        "normal": dice.standard_normal(20_000),
        "heavy": dice.standard_t(3, 20_000),
        "gelu": np.maximum(dice.standard_normal(20_000) * 3, -0.17),
        "positive": np.abs(dice.standard_normal(5_000)) + 1,
        "few": dice.laplace(size=300),
    }
    return made[kind].astype(np.float32)


def theirs(values: Values) -> HistogramCollector:
    collector = HistogramCollector("entropy", True, BINS, 255, 99.9, None)
    collector.collect_value({"x": values})
    return collector


def histogram_of(*batches: Values) -> Histogram:
    made = Histogram()
    for batch in batches:
        made.add(batch)
    return made


@pytest.mark.parametrize("kind", ["normal", "heavy", "gelu", "positive", "few"])
def test_counts_are_those_of_onnx_runtime(kind: str) -> None:
    values = values_of(kind)
    # a later batch that is not larger changes no bin there either
    collector = theirs(values)
    collector.collect_value({"x": values / 3})
    counts, edges = collector.histogram_dict["x"][:2]
    mine = histogram_of(values, values / 3)
    np.testing.assert_array_equal(mine.counts, counts)
    np.testing.assert_allclose(mine.edges, edges, rtol=0, atol=1e-6 * mine.top)


@pytest.mark.parametrize("kind", ["heavy", pytest.param("gelu", marks=pytest.mark.slow)])  # their loops are slow
def test_the_entropy_threshold_is_that_of_onnx_runtime(kind: str) -> None:
    values = values_of(kind)
    collector = theirs(values)
    low, high = collector.get_entropy_threshold(collector.histogram_dict["x"], 255)
    threshold = entropy_threshold(histogram_of(values))
    assert threshold == pytest.approx(float(high), rel=1e-6)
    assert max(float(values.min()), -threshold) == pytest.approx(float(low), rel=1e-6)


@pytest.mark.parametrize("percentile", [99.99, 99.0, 60.0])
def test_a_percentile_is_that_of_numpy_to_a_bin(percentile: float) -> None:
    values = values_of("heavy")
    made = histogram_of(values)
    low, high = percentile_range(made, percentile)
    share = (100 - percentile) / 200
    width = 2 * made.top / BINS
    # never inside of it: the bin that holds the quantile stays
    assert np.quantile(values, share, method="inverted_cdf") - width <= low <= np.quantile(values, share)
    upper = np.quantile(values, 1 - share, method="inverted_cdf")
    assert upper <= high <= upper + width * 1.01


def test_a_range_that_grows_keeps_every_value_and_the_number_of_bins() -> None:
    small, large = values_of("normal"), values_of("normal") * 40
    grown = histogram_of(small, large)
    assert grown.counts.size == BINS
    assert grown.counts.sum() == small.size + large.size
    assert grown.top >= np.abs(large).max() > grown.top / 3
    # each old bin lies in one new bin: the counts of a coarse grid are exact
    at_once = np.histogram(np.concatenate([small, large]), BINS, range=(-grown.top, grown.top))[0]
    assert np.abs(np.cumsum(grown.counts) - np.cumsum(at_once)).max() <= 2, "rounding at an edge"


def test_a_dark_first_picture_does_not_make_bins_without_end() -> None:
    grown = histogram_of(np.full(10, 1e-30, np.float32), np.array([3.0, -60000.0], np.float32))
    assert grown.counts.size == BINS
    assert grown.counts.sum() == 12


def test_zeros_in_front_stay_in_the_middle() -> None:
    made = histogram_of(np.zeros(7, np.float32), np.array([-2.0, 2.0], np.float32), np.zeros(0, np.float32))
    assert (made.counts[BINS // 2], made.counts[0], made.counts[-1]) == (7, 1, 1)
    assert made.top == 2.0


def test_a_constant_lies_within_its_percentiles() -> None:
    low, high = percentile_range(histogram_of(np.full(100, 5.0, np.float32)), 99.99)
    assert low <= 5.0 <= high
