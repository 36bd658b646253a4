"""The one function that compares back ends, on results made by hand: what must pass, and what must not."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from holov_export.spec import Precision
from holov_export.tensors import VisualTokens
from holov_export.verify.parity import TOLERANCES, Comparison, ParityReport, compare, positions_only

EXACT, HALF = TOLERANCES[Precision.FP32], TOLERANCES[Precision.FP16]


def result(batch: int = 3, budget: int = 12, count: int = 12, width: int = 8, tokens: int = 64) -> VisualTokens:
    """Random rows of the first positions of each picture, the rest padding."""
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((batch, budget, width)).astype(np.float32)
    positions = np.stack([np.sort(rng.permutation(tokens)[:budget]) for _ in range(batch)]).astype(np.int64)
    rows[:, count:] = 0
    positions[:, count:] = -1
    saliency = rng.random((batch, tokens), dtype=np.float32)
    return VisualTokens(rows, positions, np.full(batch, count, np.int64), saliency / saliency.sum(1, keepdims=True))


def judged(left: VisualTokens, right: VisualTokens, *, half: bool = False, ordered: bool = False) -> Comparison:
    tolerance = HALF if half else EXACT
    return compare(left, right, names=("onnxruntime", "b"), budget=12, tolerance=tolerance, ordered=ordered)


def test_equal_results_pass() -> None:
    comparison = judged(result(count=9), result(count=9), ordered=True)
    assert comparison.passed
    assert (comparison.token_error, comparison.overlap, comparison.same_sets, comparison.same_order) == (0, 1, 3, 3)


@pytest.mark.parametrize("picture", range(3))
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_number_that_is_not_finite_never_passes(picture: int, value: float) -> None:
    spoiled = result()
    spoiled.tokens[picture, 4, 2] = value
    assert not judged(result(), spoiled).passed
    assert not judged(spoiled, result()).passed
    assert not judged(spoiled, spoiled).passed


def test_a_small_difference_in_any_picture_is_seen() -> None:
    other = result()
    other.tokens[2, 11, 7] += 1e-3
    comparison = judged(result(), other)
    assert not comparison.passed
    assert comparison.token_error == pytest.approx(1e-3 / np.abs(result().tokens).max(), rel=1e-3)
    assert judged(result(), other, half=True).passed


def test_another_kept_set_lowers_the_overlap() -> None:
    other = result()
    free = next(position for position in range(64) if position not in other.positions[1])
    other.positions[1, 0] = free
    comparison = judged(result(), other)
    assert comparison.overlap == pytest.approx(11 / 12)
    assert comparison.same_sets == 2
    assert not comparison.passed
    assert judged(result(), other, half=True).passed


def test_a_single_token_is_not_judged_by_overlap_in_lower_precisions() -> None:
    one, other = result(budget=1, count=1), result(budget=1, count=1)
    other.positions[0, 0] = (other.positions[0, 0] + 1) % 64
    assert judged(one, other, half=True).passed
    assert not judged(one, other).passed


def test_order_counts_where_it_must() -> None:
    base = result()
    turned = VisualTokens(base.tokens[:, ::-1], base.positions[:, ::-1], base.counts, base.saliency)
    assert judged(base, turned).passed
    comparison = judged(base, turned, ordered=True)
    assert comparison.same_order == 0
    assert not comparison.passed


def test_other_counts_do_not_pass() -> None:
    assert not judged(result(count=12), result(count=11)).passed


@pytest.mark.parametrize("what", ["row", "position"])
def test_padding_must_be_empty(what: str) -> None:
    spoiled = result(count=9)
    if what == "row":
        spoiled.tokens[0, 10, 0] = 1e-3
    else:
        spoiled.positions[0, 10] = 5
    assert not judged(result(count=9), spoiled).passed


def test_a_row_that_is_no_token_must_be_zero() -> None:
    """holov-official keeps zero rows inside its count."""
    spoiled = result()
    spoiled.positions[0, 11] = -1
    assert not judged(spoiled, spoiled).passed
    spoiled.tokens[0, 11] = 0
    assert judged(spoiled, spoiled).passed


def test_the_reference_is_compared_by_position_only() -> None:
    base = result(count=9)
    kept = [base.positions[image, :9] for image in range(3)]
    assert judged(base, positions_only(kept, 12), ordered=True).passed
    kept[2] = kept[2][::-1]
    assert not judged(base, positions_only(kept, 12), ordered=True).passed


def test_saliency_is_compared() -> None:
    base = result()
    assert base.saliency is not None
    other = replace(base, saliency=base.saliency + np.float32(1e-3))
    assert judged(base, other).saliency_error == pytest.approx(1e-3, rel=1e-2)
    assert not judged(base, other).passed
    assert judged(base, replace(base, saliency=None)).passed


def test_a_report_without_the_graph_has_not_passed() -> None:
    comparison = judged(result(), result())
    report = ParityReport(precision=Precision.FP32, method="holov", pictures=("a",), comparisons=(comparison,))
    assert report.passed
    assert not report.model_copy(update={"comparisons": ()}).passed
    others = (comparison.model_copy(update={"left": "torch fp32"}),)
    assert not report.model_copy(update={"comparisons": others}).passed
    failed = (comparison, comparison.model_copy(update={"passed": False}))
    assert not report.model_copy(update={"comparisons": failed}).passed
