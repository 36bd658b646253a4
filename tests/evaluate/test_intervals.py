from __future__ import annotations

import numpy as np
import pytest

from holov_export.evaluate.intervals import RESAMPLES, estimate_from, resamples_of


def mean_interval(groups: list[str], values: np.ndarray, **settings: int) -> tuple[float, float]:
    resamples = resamples_of(groups, **settings)
    sums = resamples.sums(np.stack([values, np.ones(len(values))], axis=1))
    found = estimate_from(sums.all[0] / sums.all[1], sums.drawn[:, 0] / sums.drawn[:, 1], resamples.groups)
    assert found.low is not None and found.high is not None
    return found.low, found.high


def test_one_question_a_group_is_the_binomial_interval() -> None:
    """Of 400 independent questions with half right, the interval is 0.5 +- 1.96 sqrt(0.25 / 400)."""
    values = np.tile([0.0, 1.0], 200)
    low, high = mean_interval([str(index) for index in range(400)], values)
    assert (low, high) == pytest.approx((0.451, 0.549), abs=0.005)


def test_questions_that_agree_within_groups_count_as_one() -> None:
    """Ten copies of each of 40 answers tell as much as 40 answers: the interval is sqrt(10) times as wide."""
    right = np.tile([0.0, 1.0], 20)
    groups = [str(index) for index in range(40) for _ in range(10)]
    low, high = mean_interval(groups, np.repeat(right, 10))
    half = 1.96 * np.sqrt(0.25 / 40)
    assert (low, high) == pytest.approx((0.5 - half, 0.5 + half), abs=0.015)
    alone = mean_interval([str(index) for index in range(400)], np.repeat(right, 10))
    assert (high - low) / (alone[1] - alone[0]) == pytest.approx(np.sqrt(10), rel=0.1)


def test_a_draw_takes_whole_groups_and_as_many_as_there_are() -> None:
    resamples = resamples_of(["a", "a", "b", "c"], resamples=50, seed=1)
    assert resamples.times.shape == (50, 3)
    assert (resamples.times.sum(axis=1) == 3).all()
    sums = resamples.sums(np.array([[1.0], [1.0], [10.0], [100.0]]))
    expected = resamples.times.astype(float) @ np.array([2.0, 10.0, 100.0])
    assert np.array_equal(sums.drawn[:, 0], expected)
    assert sums.all[0] == 112


def test_equal_seeds_give_equal_draws() -> None:
    groups = [str(index) for index in range(9)]
    first, second, third = (resamples_of(groups, seed=seed).times for seed in (3, 3, 4))
    assert np.array_equal(first, second) and not np.array_equal(first, third)
    assert len(first) == RESAMPLES


def test_a_paired_difference_is_narrower_than_two_intervals() -> None:
    """Two rules that are right on the same groups but for a constant share differ by exactly that share."""
    dice = np.random.default_rng(0)
    base = dice.random(60)
    resamples = resamples_of([str(index) for index in range(60)])
    sums = resamples.sums(np.stack([base, base - 0.1, np.ones(60)], axis=1))
    drawn = sums.drawn[:, 0] / sums.drawn[:, 2] - sums.drawn[:, 1] / sums.drawn[:, 2]
    found = estimate_from(0.1, drawn, resamples.groups)
    assert (found.low, found.high) == pytest.approx((0.1, 0.1))


@pytest.mark.parametrize("groups", [1])
def test_one_group_has_no_interval(groups: int) -> None:
    found = estimate_from(0.5, np.full(10, 0.5), groups)
    assert (found.value, found.low, found.high) == (0.5, None, None)


def test_no_interval_from_draws_without_a_value() -> None:
    assert estimate_from(0.5, np.array([0.5, np.nan]), 5).low is None
    assert estimate_from(float("nan"), np.array([0.5]), 5).value is None


def test_the_intervals_cover_what_they_say() -> None:
    """Of 300 samples of 60 groups whose mean is known, some 95 % of the intervals hold it."""
    dice, held = np.random.default_rng(5), 0
    groups = [str(index) for index in range(60) for _ in range(3)]
    for number in range(300):
        values = np.repeat(dice.random(60) < 0.7, 3).astype(float)
        low, high = mean_interval(groups, values, resamples=300, seed=number)
        held += low <= 0.7 <= high
    assert 0.90 <= held / 300 <= 0.985
