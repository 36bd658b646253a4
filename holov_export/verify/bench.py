"""How times are taken: warm up until steady, then whole rounds over all cases, so that all see the same machine.

What is timed is a `Case`: anything that can be called. Nothing here knows ONNX Runtime or TensorRT.
"""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from holov_export.verify.bench_results import Percentiles, WarmUp, percentiles_of

T = TypeVar("T")

#: a case is steady when the medians of two windows of so many runs, one after the other, differ by less than this share
WINDOW, STEADY = 5, 0.03
#: patience: a case that is not steady after so many runs or seconds is measured nevertheless, and the report says so
WARM_UP_RUNS, WARM_UP_SECONDS = 100, 10.0


@dataclass(frozen=True)
class OnDevice:
    """Seconds between events on the GPU: the work itself, and the copies to and from it."""

    work: float
    copies: float = 0.0


#: does something once; None where the GPU's own times are not known
Run = Callable[[], OnDevice | None]


@dataclass(frozen=True)
class Case:
    """One thing to time."""

    contestant: str
    batch: int
    budget: int
    run: Run


@dataclass
class Samples:
    """Seconds of wall clock of each run, and the GPU's own where all runs gave them."""

    wall: list[float] = field(default_factory=list)
    device: list[OnDevice] = field(default_factory=list)

    @property
    def latency(self) -> Percentiles:
        return percentiles_of(self.wall)

    @property
    def _knows_device(self) -> bool:
        return bool(self.device) and len(self.device) == len(self.wall)

    @property
    def gpu_time(self) -> Percentiles | None:
        return percentiles_of([item.work for item in self.device]) if self._knows_device else None

    @property
    def copy_time(self) -> Percentiles | None:
        return percentiles_of([item.copies for item in self.device]) if self._knows_device else None

    @property
    def host_time(self) -> Percentiles | None:
        """Wall clock less the GPU's work and copies, run by run."""
        if not self._knows_device:
            return None
        pairs = zip(self.wall, self.device, strict=True)
        return percentiles_of([max(0.0, wall - item.work - item.copies) for wall, item in pairs])

    def take(self, run: Run, clock: Callable[[], float] = time.perf_counter) -> None:
        """Run once and note its times."""
        start = clock()
        device = run()
        self.wall.append(clock() - start)
        if device is not None:
            self.device.append(device)


def warm_up(
    run: Run,
    *,
    clock: Callable[[], float] = time.perf_counter,
    runs: int = WARM_UP_RUNS,
    seconds: float = WARM_UP_SECONDS,
) -> WarmUp:
    """Run until it is steady: see `WINDOW`. At least two windows, unless `seconds` or `runs` end it."""
    start, taken = clock(), Samples()
    while len(taken.wall) < runs:
        taken.take(run, clock)
        if is_steady(taken.wall):
            return WarmUp(runs=len(taken.wall), seconds=round(clock() - start, 3), steady=True)
        if clock() - start >= seconds:
            break
    return WarmUp(runs=len(taken.wall), seconds=round(clock() - start, 3), steady=False)


def is_steady(times: Sequence[float]) -> bool:
    """Whether the last `WINDOW` times have the median of the `WINDOW` before them, within `STEADY`."""
    if len(times) < 2 * WINDOW:
        return False
    before, last = statistics.median(times[-2 * WINDOW : -WINDOW]), statistics.median(times[-WINDOW:])
    return abs(last - before) <= STEADY * before


def interleaved(entries: Sequence[T], rounds: int) -> Iterator[T]:
    """Each entry once a round. Every round begins one entry later and every other one runs backwards.

    So none always follows the same one, whose heat and caches it would inherit.
    """
    for number in range(rounds):
        turn = number % len(entries) if entries else 0
        order = [*entries[turn:], *entries[:turn]]
        yield from reversed(order) if number % 2 else order


def measure(
    cases: Sequence[Case], rounds: int, *, deadline: float | None = None, clock: Callable[[], float] = time.perf_counter
) -> list[Samples]:
    """Time all cases in interleaved rounds. They must be warm.

    Args:
        rounds: runs of each case.
        deadline: on `clock`; no round begins after it, but one is always made.

    Returns:
        samples in the order of the cases, equally many each.
    """
    taken = [Samples() for _ in cases]
    order = interleaved(range(len(cases)), rounds)
    for number, index in enumerate(order):
        begins_round = number and number % len(cases) == 0
        if begins_round and deadline is not None and clock() >= deadline:
            break
        taken[index].take(cases[index].run, clock)
    return taken


def sustained(case: Case, seconds: float, *, clock: Callable[[], float] = time.perf_counter) -> Samples:
    """One case alone, back to back, for so many seconds and at least once."""
    taken, start = Samples(), clock()
    while not taken.wall or clock() - start < seconds:
        taken.take(case.run, clock)
    return taken


@dataclass(frozen=True)
class Concurrent:
    """Calls of several threads: seconds of each, and from the common start to the end of the last."""

    calls: tuple[float, ...]
    seconds: float


def concurrent(run: Callable[[], object], threads: int, calls: int) -> Concurrent:
    """`threads` threads call `run` once to get warm, wait for each other, and then call it `calls` times each.

    Raises:
        what `run` raises, from the first thread that failed; the others stop after the call that they are in.
    """
    start_line = threading.Barrier(threads + 1)
    times: list[list[float]] = [[] for _ in range(threads)]
    errors: list[BaseException] = []

    def once(mine: list[float] | None) -> None:
        start = time.perf_counter()
        try:
            run()
        except BaseException as error:  # carried to the thread that waits
            errors.append(error)
        if mine is not None:
            mine.append(time.perf_counter() - start)

    def work(mine: list[float]) -> None:
        once(None)
        start_line.wait()
        for _ in range(calls):
            if errors:
                return
            once(mine)

    workers = [threading.Thread(target=work, args=(mine,), daemon=True) for mine in times]
    for worker in workers:
        worker.start()
    start_line.wait()
    start = time.perf_counter()
    for worker in workers:
        worker.join()
    took = time.perf_counter() - start
    if errors:
        raise errors[0]
    return Concurrent(tuple(value for mine in times for value in mine), took)
