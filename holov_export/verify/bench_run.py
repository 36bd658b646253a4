"""A benchmark from beginning to end: contestants in, report out.

    warm up -> interleaved rounds -> each case alone while the device is read -> profiles -> threads -> first tokens

A step that fails is noted in the report and the next one goes on.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

from PIL import Image

from holov_export.errors import HolovExportError, UsageError
from holov_export.runtime.decoder_choice import DecoderOptions, decoder_maker
from holov_export.tensors import PixelBatch
from holov_export.verify.bench import Case, Samples, concurrent, measure, sustained, warm_up
from holov_export.verify.bench_engines import Contestant
from holov_export.verify.bench_first_token import first_tokens
from holov_export.verify.bench_pictures import largest_of, pixels_of
from holov_export.verify.bench_results import (
    BenchReport,
    CaseResult,
    ConcurrencyResult,
    Failure,
    FirstTokenResult,
    Percentiles,
    Ratio,
    SelectionShare,
    WarmUp,
    percentiles_of,
)
from holov_export.verify.device_monitor import DeviceReading, Monitor, NoMonitor, monitor_of_this_machine
from holov_export.verify.machine import this_machine, utc_now
from holov_export.verify.operations_packed import operations_of_batch

Tell = Callable[[str], None]

PROFILED_RUNS = 5


@dataclass(frozen=True)
class BenchRequest:
    """What to measure.

    Attributes:
        budgets: K; empty for the default shares of N. batches: B.
        rounds: runs of each case. seconds: instead, as many rounds as fit in so many seconds for each case.
        sustain: seconds that each case runs alone while clocks and power are read; 0 leaves that out.
        threads: numbers of concurrent callers; empty leaves that out.
        profile: measure the selection's share. first_token: time the embedded decoder as well.
        provider, decoder_threads: of that decoder.
        pictures: to measure on; empty for the default ones.
    """

    budgets: tuple[int, ...] = ()
    batches: tuple[int, ...] = (1,)
    rounds: int = 30
    seconds: float | None = None
    sustain: float = 1.0
    threads: tuple[int, ...] = ()
    profile: bool = True
    first_token: bool = False
    provider: str = "auto"
    decoder_threads: int | None = None
    pictures: tuple[Image.Image, ...] = ()


@dataclass
class _Run:
    """What has been found so far; one contestant's case is `(label, batch, budget)`."""

    request: BenchRequest
    tell: Tell
    failures: list[Failure] = field(default_factory=list)

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Say what is being done; note a refusal instead of ending the run."""
        self.tell(name)
        try:
            yield
        except (HolovExportError, RuntimeError, ValueError) as error:  # the latter two are what bindings raise
            self.failures.append(Failure(step=name, reason=str(error)))


def bench(
    contestants: Sequence[Contestant],
    request: BenchRequest,
    *,
    command: str,
    notes: Sequence[str] = (),
    tell: Tell = lambda message: None,
) -> BenchReport:
    """Measure all contestants side by side.

    Raises:
        BudgetError: a budget outside 1..N of a contestant.
        HolovExportError: no case ran at all; the first one's reason.
    """
    run = _Run(request, tell)
    cases = [
        Case(one.info.label, batch, budget, partial(one.run, pixels, budget))
        for one in contestants
        for batch, pixels in ((batch, pixels_of(one, batch, request.pictures)) for batch in request.batches)
        for budget in one.budgets(request.budgets, largest_of(pixels))
    ]
    warm, taken = _measured(run, cases)
    by_label = {one.info.label: one for one in contestants}
    monitor = monitor_of_this_machine()
    results = []
    for case, warmth, samples in zip(warm, taken.warm, taken.samples, strict=True):
        alone, device = _alone(run, case, monitor)
        share = _share(run, by_label[case.contestant], case)
        pixels = pixels_of(by_label[case.contestant], case.batch, request.pictures)
        results.append(_case_result(by_label[case.contestant], case, pixels, warmth, samples, share, alone, device))
    targets = sorted({one.target.name for one in contestants if one.target})
    return BenchReport(
        date=utc_now(),
        command=command,
        machine=this_machine(),
        rounds=min(len(samples.wall) for samples in taken.samples),
        target=", ".join(targets) or None,
        no_device=monitor.reason if isinstance(monitor, NoMonitor) else None,
        contestants=tuple(one.info_now() for one in contestants),
        cases=tuple(results),
        concurrency=tuple(_concurrency(run, contestants)),
        first_token=tuple(_first_tokens(run, contestants)),
        ratios=tuple(ratios_of(contestants, results)),
        failures=tuple(run.failures),
        notes=tuple(notes),
    )


# ---------------------------------------------------------------------------------------------------- the steps


@dataclass(frozen=True)
class _Taken:
    """Of each case that ran."""

    warm: list[WarmUp]
    samples: list[Samples]


def _measured(run: _Run, cases: Sequence[Case]) -> tuple[list[Case], _Taken]:
    """The cases that could be warmed up, and their samples."""
    warm: list[tuple[Case, WarmUp]] = []
    for case in cases:
        with run.step(f"warm up: {case.contestant}, B={case.batch}, K={case.budget}"):
            warm.append((case, warm_up(case.run)))
    if not warm:
        raise UsageError(f"nothing could be measured: {run.failures[0].reason if run.failures else 'no case'}")
    request, ready = run.request, [case for case, _ in warm]
    run.tell(f"measure {len(ready)} cases in interleaved rounds")
    deadline = None if request.seconds is None else time.perf_counter() + request.seconds * len(ready)
    rounds = request.rounds if request.seconds is None else 1_000_000
    samples = measure(ready, rounds, deadline=deadline)
    return ready, _Taken([item for _, item in warm], samples)


def _alone(
    run: _Run, case: Case, monitor: Callable[[], Monitor] | NoMonitor
) -> tuple[Percentiles | None, DeviceReading | None]:
    """The case back to back while the device is read."""
    if run.request.sustain <= 0 or isinstance(monitor, NoMonitor):
        return None, None
    with run.step(f"alone: {case.contestant}, B={case.batch}, K={case.budget}"):
        with monitor() as watch:
            samples = sustained(case, run.request.sustain)
        return samples.latency, watch.reading()
    return None, None


def _share(run: _Run, one: Contestant, case: Case) -> SelectionShare | None:
    if not run.request.profile or not one.profiled or one.is_plain:
        return None
    with run.step(f"profile: {case.contestant}, B={case.batch}, K={case.budget}"):
        pixels = pixels_of(one, case.batch, run.request.pictures)
        return one.selection_share(pixels, case.budget, PROFILED_RUNS)
    return None


def _case_result(
    one: Contestant,
    case: Case,
    pixels: PixelBatch,
    warmth: WarmUp,
    samples: Samples,
    share: SelectionShare | None,
    alone: Percentiles | None,
    device: DeviceReading | None,
) -> CaseResult:
    latency, gpu = samples.latency, samples.gpu_time
    operations = operations_of_batch(one.bundle.manifest.plan, pixels, case.budget)
    tflops = operations / ((gpu or latency).p50 / 1e3) / 1e12
    peak = one.peak_tflops()
    return CaseResult(
        contestant=case.contestant,
        batch=case.batch,
        budget=case.budget,
        tokens=largest_of(pixels),
        warm_up=warmth,
        latency=latency,
        gpu=gpu,
        copies=samples.copy_time,
        host=samples.host_time,
        images_per_second=round(case.batch / (latency.mean / 1e3), 3),
        gflop_per_image=round(operations / case.batch / 1e9, 3),
        tflops=round(tflops, 4),
        peak_share=round(tflops / peak, 4) if peak else None,
        selection=share,
        sustained=alone,
        device=device,
    )


def _concurrency(run: _Run, contestants: Sequence[Contestant]) -> Iterator[ConcurrencyResult]:
    """Threads over one runner, at the smallest batch and each contestant's smallest budget."""
    request = run.request
    for one in contestants:
        batch = min(request.batches)
        pixels = pixels_of(one, batch, request.pictures)
        budget = min(one.budgets(request.budgets, largest_of(pixels)))
        for threads in request.threads:
            calls = max(4, -(-request.rounds // threads))
            with run.step(f"{threads} threads: {one.info.label}, B={batch}, K={budget}"):
                found = concurrent(partial(one.runner.run, pixels, budget, saliency=False), threads, calls)
                yield ConcurrencyResult(
                    contestant=one.info.label,
                    batch=batch,
                    budget=budget,
                    threads=threads,
                    latency=percentiles_of(found.calls),
                    images_per_second=round(batch * len(found.calls) / found.seconds, 3),
                )


def _first_tokens(run: _Run, contestants: Sequence[Contestant]) -> Iterator[FirstTokenResult]:
    """The embedded decoders of those bundles that have one."""
    if not run.request.first_token:
        return
    answering = [one for one in contestants if one.bundle.decoder is not None]
    if not answering:
        run.failures.append(Failure(step="first token", reason="no bundle has a decoder"))
    for one in answering:
        with run.step(f"first token: {one.info.label}"):
            request = run.request
            decoder = decoder_maker("auto", one.bundle, DecoderOptions(request.provider, request.decoder_threads))()
            budgets = one.budgets(request.budgets, largest_of(pixels_of(one, 1, request.pictures)))
            try:
                yield from first_tokens(one, decoder, budgets, min(request.rounds, 10), request.pictures)
            finally:
                decoder.close()


# ---------------------------------------------------------------------------------------------------- ratios


def ratios_of(contestants: Sequence[Contestant], results: Sequence[CaseResult]) -> Iterator[Ratio]:
    """Each pruned contestant to the plain encoders in its engine, at K = N; the others to the first, at the same K."""
    infos = [one.info for one in contestants]
    pruned = [info for info in infos if info.method != "none"]
    for info in pruned:
        for plain in infos:
            if plain.method == "none" and plain.engine_kind == info.engine_kind:
                yield from _ratios(results, info.label, plain.label, whole=True)
    for info in pruned[1:]:
        yield from _ratios(results, info.label, pruned[0].label, whole=False)


def _ratios(results: Sequence[CaseResult], label: str, baseline: str, *, whole: bool) -> Iterator[Ratio]:
    """`whole`: the baseline keeps all tokens and has no other budget; else it has the contestant's."""
    known = {(item.batch, item.budget): item for item in results if item.contestant == baseline}
    for item in results:
        budget = max((at for batch, at in known if batch == item.batch), default=0) if whole else item.budget
        other = known.get((item.batch, budget))
        if item.contestant != label or other is None:
            continue
        both_on_gpu = item.gpu is not None and other.gpu is not None and other.gpu.p50 > 0
        yield Ratio(
            contestant=label,
            baseline=baseline,
            batch=item.batch,
            budget=item.budget,
            baseline_budget=other.budget,
            latency=round(item.latency.p50 / other.latency.p50, 4),
            gpu=round(item.gpu.p50 / other.gpu.p50, 4) if both_on_gpu and item.gpu and other.gpu else None,
        )
