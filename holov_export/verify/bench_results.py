"""What a benchmark found: plain data for bench.json. Times are milliseconds of wall clock where nothing else is said.

Shape words: B images of a batch, N tokens before selection, K budget.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from holov_export.policies import Frozen
from holov_export.verify.device_monitor import DeviceReading
from holov_export.verify.machine import Machine

#: of bench.json
SCHEMA: Literal[1] = 1


class Percentiles(Frozen):
    """Of `samples` times, ms. Between two samples, percentiles are interpolated linearly (numpy's default)."""

    p50: float
    p90: float
    p99: float
    mean: float
    least: float
    most: float
    samples: int


def percentiles_of(seconds: Sequence[float]) -> Percentiles:
    """Percentiles in ms of times in seconds.

    Raises:
        ValueError: there are none.
    """
    if not seconds:
        raise ValueError("no samples")
    values = np.asarray(seconds, dtype=np.float64) * 1e3
    p50, p90, p99 = (float(value) for value in np.percentile(values, [50, 90, 99]))
    return Percentiles(
        p50=_rounded(p50),
        p90=_rounded(p90),
        p99=_rounded(p99),
        mean=_rounded(float(values.mean())),
        least=_rounded(float(values.min())),
        most=_rounded(float(values.max())),
        samples=len(values),
    )


def _rounded(milliseconds: float) -> float:
    return round(milliseconds, 4)


class WarmUp(Frozen):
    """Runs before measuring. `steady`: they ended because times no longer moved, not because patience did."""

    runs: int
    seconds: float
    steady: bool


class SelectionShare(Frozen):
    """What the selection takes of a graph's time, by a profile of its nodes or layers.

    Attributes:
        source: which profiler. runs: how many profiled runs it is a mean of.
        share: layers that hold selection nodes alone. mixed: layers that hold others as well, which bounds it above.
        total_ms: of all layers, in the profiler's own clock; profiling slows a run down.
    """

    source: str
    runs: int
    share: float
    mixed: float
    total_ms: float


class ContestantInfo(Frozen):
    """One bundle in one engine.

    Attributes:
        label: how it is called in this report. bundle: name of its folder. engine: the runner's own name.
        engine_kind: "ort" or "tensorrt". method: of selection; "none" for a plain encoder.
        tokens: N, of the largest picture that the model can have. graph_sha256: of the vision graph.
        load_seconds: from an opened bundle to a runner.
        built_with: for an engine, what built it. device_mb: MiB on the device after the run, where the runner says so.
    """

    label: str
    bundle: str
    engine: str
    engine_kind: str
    method: str
    precision: str
    tokens: int
    graph_sha256: str
    load_seconds: float
    built_with: str | None = None
    device_mb: float | None = None


class CaseResult(Frozen):
    """One contestant at one batch and budget, one caller.

    Attributes:
        latency: from pixels in host memory to tokens in host memory.
        gpu: between two events on the GPU around the engine's work, without copies; None where nothing gives it.
        copies: pixels to the GPU and tokens from it, by events. host: what is left of the latency, run by run.
        images_per_second: B over the mean latency.
        tokens: of the largest picture of the batch, where pictures differ; else all have the contestant's N.
        gflop_per_image: matrix products of one picture (see `operations`), the mean of a batch.
        tflops: those over the median GPU time, or over the median latency where there is no GPU time.
        peak_share: tflops over the target's peak rate of the precision; None without a target.
        sustained: the case alone, back to back, while `device` was read.
    """

    contestant: str
    batch: int
    budget: int
    tokens: int | None = None
    warm_up: WarmUp
    latency: Percentiles
    gpu: Percentiles | None = None
    copies: Percentiles | None = None
    host: Percentiles | None = None
    images_per_second: float
    gflop_per_image: float
    tflops: float
    peak_share: float | None = None
    selection: SelectionShare | None = None
    sustained: Percentiles | None = None
    device: DeviceReading | None = None


class ConcurrencyResult(Frozen):
    """Several threads over one runner: latency of each call, images a second of all together."""

    contestant: str
    batch: int
    budget: int
    threads: int
    latency: Percentiles
    images_per_second: float


class FirstTokenResult(Frozen):
    """Time to the decoder's first token for one picture and a short question: medians of the stages of `Timings`, ms.

    Attributes:
        prompt_tokens: S. total: median of the whole, which is not the sum of medians.
    """

    contestant: str
    budget: int
    prompt_tokens: int
    preprocess: float
    vision: float
    stitch: float
    setup: float
    prefill: float
    total: float
    samples: int


class Ratio(Frozen):
    """Median of `contestant` over that of `baseline`, which runs at K = `baseline_budget`; below 1 is faster.

    `gpu` is None where one of the two has no GPU time.
    """

    contestant: str
    baseline: str
    batch: int
    budget: int
    baseline_budget: int
    latency: float
    gpu: float | None = None


class Failure(Frozen):
    """A step that did not work out. The rest of the report stands."""

    step: str
    reason: str


class BenchReport(Frozen):
    """bench.json.

    Attributes:
        rounds: how often each case ran after its warm-up. target: whose peak rates `peak_share` is of.
        no_device: why clocks, power and memory were not read, None if they were.
        notes: what a reader must know of this run.
    """

    schema_version: Literal[1] = SCHEMA
    date: str
    command: str
    machine: Machine
    rounds: int
    target: str | None = None
    no_device: str | None = None
    contestants: tuple[ContestantInfo, ...]
    cases: tuple[CaseResult, ...]
    concurrency: tuple[ConcurrencyResult, ...] = ()
    first_token: tuple[FirstTokenResult, ...] = ()
    ratios: tuple[Ratio, ...] = ()
    failures: tuple[Failure, ...] = ()
    notes: tuple[str, ...] = ()
