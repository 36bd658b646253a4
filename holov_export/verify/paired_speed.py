"""How fast two bundles' vision graphs are: one picture, interleaved rounds in one process."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Literal

from holov_export.bundle import Bundle
from holov_export.policies import Frozen
from holov_export.runtime.runner_ort import OrtRunner
from holov_export.tensors import PixelBatch
from holov_export.verify.bench import Case, measure

#: runs before the first that counts: ONNX Runtime allocates its memory in them
_WARM_UP = 2


class SpeedAt(Frozen):
    """Medians in ms at a budget, before and after, and after / before."""

    budget: int
    milliseconds: tuple[float, float]
    ratio: float


class PairedSpeed(Frozen):
    """What was measured.

    Attributes:
        clock: "cpu" is the process's CPU time, which other processes disturb less; with several threads it would count
            those that wait, so there it is "wall".
    """

    clock: Literal["cpu", "wall"]
    threads: int
    rounds: int
    at: tuple[SpeedAt, ...]


def paired_speed(
    before: Bundle, after: Bundle, pixels: PixelBatch, budgets: Sequence[int], *, threads: int = 1, rounds: int = 10
) -> PairedSpeed:
    """Run both graphs in turns. Both are loaded at once.

    Args:
        pixels: of one picture.
        threads: CPU threads within one operator.

    Raises:
        EnvironmentFaultError: see `OrtRunner`.
    """
    clock: Callable[[], float] = time.process_time if threads == 1 else time.perf_counter
    with ExitStack() as stack:
        runners = [
            stack.enter_context(OrtRunner(bundle, provider="cpu", threads=threads)) for bundle in (before, after)
        ]
        cases = [
            Case(str(side), 1, budget, partial(_run, runner, pixels, budget))
            for budget in budgets
            for side, runner in enumerate(runners)
        ]
        for case in cases * _WARM_UP:
            case.run()
        taken = measure(cases, rounds, clock=clock)
    medians = [statistics.median(samples.wall) * 1e3 for samples in taken]
    return PairedSpeed(
        clock="cpu" if threads == 1 else "wall",
        threads=threads,
        rounds=rounds,
        at=tuple(
            SpeedAt(budget=budget, milliseconds=(left, right), ratio=right / left)
            for budget, left, right in zip(budgets, medians[::2], medians[1::2], strict=True)
        ),
    )


def _run(runner: OrtRunner, pixels: PixelBatch, budget: int) -> None:
    runner.run(pixels, budget, saliency=False)
