"""The budget controller against simulated servers: latency holds where it can, and quality comes back."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass

import pytest

from holov_export.serve.budget import BudgetController
from holov_export.serve.limits import BudgetRange

TARGET = 0.15
RANGE = BudgetRange(target_ttft=TARGET, smallest=32, largest=576)
#: seconds to a first token: 63 ms at 576 tokens (16 a second), 8 ms at 32 (122 a second)
FIXED_COST, TOKEN_COST = 0.005, 0.0001


@dataclass(frozen=True)
class Answer:
    arrived: float
    ttft: float
    budget: int


def simulate(arrivals: Sequence[float], controller: BudgetController, batch: int = 8) -> list[Answer]:
    """A server that takes up to `batch` jobs with one budget and makes their first tokens one after the other."""
    answers: list[Answer] = []
    queue: list[float] = []
    now, coming = 0.0, 0
    while coming < len(arrivals) or queue:
        if not queue:
            now = max(now, arrivals[coming])
        while coming < len(arrivals) and arrivals[coming] <= now:
            queue.append(arrivals[coming])
            coming += 1
        alone, began = len(queue) == 1, now
        budget = controller.choose(
            now, waiting=len(queue), oldest_wait=now - queue[0], newest_wait=now - queue[-1], alone=alone
        )
        taken, queue = queue[:batch], queue[batch:]
        for index, arrived in enumerate(taken):
            now += FIXED_COST + TOKEN_COST * budget
            while coming < len(arrivals) and arrivals[coming] <= now:
                queue.append(arrivals[coming])
                coming += 1
            controller.observe(
                now,
                ttft=now - arrived,
                waited=began - arrived,
                budget=budget,
                waiting=len(taken) - index - 1 + len(queue),
                alone=alone and not queue,
            )
            answers.append(Answer(arrived, now - arrived, budget))
    return answers


def fixed(budget: int) -> BudgetController:
    return BudgetController(BudgetRange(smallest=budget, largest=budget))


def steady(rate: float, seconds: float, start: float = 0.0) -> list[float]:
    """Arrivals of a Poisson process."""
    dice, now, found = random.Random(int(rate * 1000 + start)), start, []
    while (now := now + dice.expovariate(rate)) < start + seconds:
        found.append(now)
    return found


def in_time(answers: Sequence[Answer]) -> float:
    return sum(answer.ttft <= TARGET for answer in answers) / len(answers)


def mean_budget(answers: Sequence[Answer]) -> float:
    return sum(answer.budget for answer in answers) / len(answers)


@pytest.mark.parametrize(("rate", "least_mean"), [(5, 480), (20, 250), (40, 120), (80, 45)])
def test_target_holds_under_every_load_that_some_budget_holds(rate: float, least_mean: float) -> None:
    arrivals = steady(rate, 60)
    answers = simulate(arrivals, BudgetController(RANGE))
    assert in_time(answers) > 0.95
    assert mean_budget(answers) > least_mean, "it gives what it can"
    if rate > 16:
        assert in_time(simulate(arrivals, fixed(576))) < 0.05, "which the largest budget does not hold"


def test_burst_lowers_the_budget_before_an_answer_is_late() -> None:
    controller = BudgetController(RANGE)
    quiet = simulate([2.0 * index for index in range(5)], controller)
    assert {answer.budget for answer in quiet} == {576}
    burst = [20.0 + 0.001 * index for index in range(10)]
    answers = simulate(burst, controller)
    late = next((index for index, answer in enumerate(answers) if answer.ttft > TARGET), len(answers))
    lowered = next(index for index, answer in enumerate(answers) if answer.budget < 300)
    assert lowered < late
    assert in_time(answers) >= 0.8
    assert in_time(simulate(burst, fixed(576))) < 0.3


def test_bursts_that_come_again_are_held() -> None:
    arrivals = [2.0 * burst + 0.001 * index for burst in range(30) for index in range(10)]
    answers = simulate(arrivals, BudgetController(RANGE))
    assert in_time(answers) > 0.95
    assert in_time(simulate(arrivals, fixed(576))) < 0.3


def test_budget_follows_a_ramp_up_and_down() -> None:
    rates = (2, 10, 30, 60, 90, 60, 30, 10, 2)
    arrivals = [time for index, rate in enumerate(rates) for time in steady(rate, 10, 10.0 * index)]
    answers = simulate(arrivals, BudgetController(RANGE))
    assert in_time(answers) > 0.95
    means = [
        mean_budget([answer for answer in answers if 10 * index <= answer.arrived < 10 * index + 10])
        for index in range(len(rates))
    ]
    assert means[0] > means[1] > means[2] > means[3] > means[4]
    assert means[4] < means[6] < means[8]
    assert means[8] > 500


def test_load_that_no_budget_holds_stays_at_the_smallest() -> None:
    answers = simulate(steady(200, 20), BudgetController(RANGE))
    settled = [answer for answer in answers if answer.arrived > 1]
    assert {answer.budget for answer in settled} == {32}


def test_it_comes_back_to_the_largest_when_idle() -> None:
    controller = BudgetController(RANGE)
    simulate(steady(200, 5), controller)
    assert controller.budget == 32
    after = simulate([100.0 + 2 * index for index in range(4)], controller)
    assert after[-1].budget == 576


def test_it_does_not_swing_under_a_steady_load() -> None:
    """Between two answers hardly a change, over seconds a band."""
    answers = simulate([index / 30 for index in range(1800)], BudgetController(RANGE))
    settled = [answer.budget for answer in answers if answer.arrived > 10]
    assert max(settled) < 2 * min(settled)
    steps = [abs(after - before) / before for before, after in itertools.pairwise(settled)]
    assert sum(step > 0.25 for step in steps) < 0.02 * len(steps)


def test_lone_requests_learn_what_the_target_affords() -> None:
    """Idle, and even so the largest budget is too slow: one late answer says it, and it is not tried again."""
    tight = BudgetController(BudgetRange(target_ttft=0.03, smallest=32, largest=576))
    answers = simulate([2.0 * index for index in range(40)], tight)
    assert [answer.ttft > 0.03 for answer in answers] == [True] + [False] * 39
    assert answers[-1].budget > 150


def test_without_a_target_every_budget_is_the_largest() -> None:
    controller = BudgetController(BudgetRange(smallest=16, largest=64))
    answers = simulate(steady(80, 5), controller)
    assert {answer.budget for answer in answers} == {64}


def test_budgets_that_clients_chose_are_no_evidence() -> None:
    """They are late by their own wish: the budget of the others stays."""
    controller = BudgetController(RANGE)
    for index in range(50):
        controller.observe(float(index), ttft=1.0, waited=0.0, budget=None)
    assert controller.budget == 576


def test_late_answers_without_a_queue_lower_it_too() -> None:
    """Many lanes make answers slow although nothing waits: feedback alone has to see it."""
    controller = BudgetController(RANGE)
    for index in range(200):
        now = index * 0.1
        budget = controller.choose(now, waiting=1, oldest_wait=0.0)
        controller.observe(now + 0.05, ttft=0.02 + 0.0005 * budget, waited=0.0, budget=budget)
    assert 100 < controller.budget < 265, "0.15 s are 260 tokens"
