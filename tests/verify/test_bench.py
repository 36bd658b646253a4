"""How times are taken: percentiles, warm-up, interleaving, threads. None of it depends on how fast this machine is."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holov_export.verify.bench import (
    STEADY,
    WINDOW,
    Case,
    OnDevice,
    Samples,
    concurrent,
    interleaved,
    is_steady,
    measure,
    sustained,
    warm_up,
)
from holov_export.verify.bench_results import percentiles_of


class Clock:
    """A clock that only moves when something is run."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    def runner(self, *seconds: float) -> Callable[[], None]:
        """Something that takes these times, one after the other and from the beginning again."""
        times = itertools.cycle(seconds)

        def run() -> None:
            self.now += next(times)

        return run


class TestPercentiles:
    def test_of_known_numbers(self) -> None:
        found = percentiles_of([0.001 * value for value in range(1, 102)])  # 1..101 ms
        assert (found.p50, found.p90, found.p99) == pytest.approx((51, 91, 100))
        assert (found.least, found.most, found.mean, found.samples) == pytest.approx((1, 101, 51, 101))

    def test_between_two_samples_they_are_interpolated(self) -> None:
        found = percentiles_of([0.010, 0.020])
        assert (found.p50, found.p90, found.p99) == pytest.approx((15, 19, 19.9))

    def test_of_one_sample(self) -> None:
        found = percentiles_of([0.004])
        assert {found.p50, found.p90, found.p99, found.mean, found.least, found.most} == {4.0}

    def test_of_nothing_is_refused(self) -> None:
        with pytest.raises(ValueError, match="no samples"):
            percentiles_of([])

    @given(st.lists(st.floats(1e-6, 10), min_size=1, max_size=50))
    def test_are_in_order(self, seconds: list[float]) -> None:
        found = percentiles_of(seconds)
        # rounded to a tenth of a microsecond each
        assert found.least <= found.p50 + 1e-3 <= found.p90 + 2e-3 <= found.p99 + 3e-3 <= found.most + 4e-3
        assert found.samples == len(seconds)


class TestWarmUp:
    def test_ends_after_two_windows_that_are_alike(self) -> None:
        clock = Clock()
        found = warm_up(clock.runner(0.01), clock=clock)
        assert (found.runs, found.steady, found.seconds) == (2 * WINDOW, True, 0.1)

    def test_goes_on_while_times_fall(self) -> None:
        clock, falling = Clock(), [0.5 * 0.8**step for step in range(20)]
        found = warm_up(clock.runner(*falling, *[0.004] * 1000), clock=clock)
        assert found.steady
        assert found.runs > 20

    def test_patience_ends_and_the_result_says_so(self) -> None:
        clock = Clock()
        restless = [0.01 * (1 + step) for step in range(1000)]
        found = warm_up(clock.runner(*restless), clock=clock, runs=30, seconds=1e9)
        assert (found.runs, found.steady) == (30, False)
        found = warm_up(clock.runner(4.0, 8.0), clock=clock, seconds=10)
        assert (found.runs, found.steady) == (2, False)

    def test_one_slow_run_in_a_window_does_not_count(self) -> None:
        assert is_steady([1.0] * WINDOW + [1.0] * (WINDOW - 1) + [50.0])
        assert not is_steady([1.0] * WINDOW + [1.0 + 2 * STEADY] * WINDOW)
        assert not is_steady([1.0] * (2 * WINDOW - 1))


class TestRounds:
    def test_every_entry_once_a_round_from_another_start_and_in_turns_backwards(self) -> None:
        assert "".join(interleaved("abc", 4)) == "abc" + "acb" + "cab" + "cba"
        assert list(interleaved([], 3)) == []

    def test_no_entry_always_follows_the_same_one(self) -> None:
        order = list(interleaved("abcd", 4))
        before = {entry: {order[at - 1] for at in range(1, len(order)) if order[at] == entry} for entry in "abcd"}
        assert all(len(found) > 1 for found in before.values())

    def test_cases_share_the_rounds(self) -> None:
        clock, calls = Clock(), []

        def case(name: str, seconds: float) -> Case:
            def run() -> OnDevice:
                calls.append(name)
                clock.now += seconds
                return OnDevice(seconds / 2, seconds / 4)

            return Case(name, 1, 64, run)

        found = measure([case("a", 0.010), case("b", 0.020)], 3, clock=clock)
        assert "".join(calls) == "ab" + "ab" + "ab"  # two entries: turned by one and backwards is the same order
        assert [samples.latency.p50 for samples in found] == pytest.approx([10, 20])
        first = found[0]
        assert first.gpu_time and first.copy_time and first.host_time
        assert (first.gpu_time.p50, first.copy_time.p50, first.host_time.p50) == pytest.approx((5, 2.5, 2.5))

    def test_a_deadline_ends_whole_rounds_only(self) -> None:
        clock = Clock()
        cases = [Case(name, 1, 1, clock.runner(1.0)) for name in "ab"]
        found = measure(cases, 1000, deadline=clock() + 3.5, clock=clock)
        assert [len(samples.wall) for samples in found] == [2, 2]
        found = measure(cases, 1000, deadline=clock() - 1, clock=clock)
        assert [len(samples.wall) for samples in found] == [1, 1]

    def test_gpu_times_are_given_for_all_runs_or_not_at_all(self) -> None:
        samples = Samples([0.1, 0.2], [OnDevice(0.05)])
        assert samples.gpu_time is None
        assert samples.host_time is None
        assert Samples([0.1]).copy_time is None

    def test_a_case_alone_runs_for_its_seconds_and_at_least_once(self) -> None:
        clock = Clock()
        assert len(sustained(Case("a", 1, 1, clock.runner(0.3)), 1.0, clock=clock).wall) == 4
        assert len(sustained(Case("a", 1, 1, clock.runner(5.0)), 1.0, clock=clock).wall) == 1


class TestConcurrent:
    def test_all_threads_work_at_once_and_warm_up_untimed(self) -> None:
        together, seen = threading.Barrier(4, timeout=20), set()

        def run() -> None:
            seen.add(threading.get_ident())
            together.wait()  # ends only if four threads are here

        found = concurrent(run, threads=4, calls=3)
        assert len(found.calls) == 12  # a warm-up each is not among them
        assert len(seen) == 4
        assert found.seconds > 0

    def test_the_first_error_is_raised_after_all_threads_have_ended(self) -> None:
        calls = itertools.count()

        def run() -> None:
            if next(calls) == 5:
                raise KeyError("the sixth call")

        with pytest.raises(KeyError, match="the sixth call"):
            concurrent(run, threads=3, calls=50)
        assert next(calls) < 150

    def test_an_error_in_the_warm_up_does_not_hang(self) -> None:
        def run() -> None:
            raise RuntimeError("not here")

        with pytest.raises(RuntimeError, match="not here"):
            concurrent(run, threads=4, calls=2)
