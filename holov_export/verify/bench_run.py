"""A benchmark from beginning to end: contestants in, report out.

    warm up -> interleaved rounds -> each case alone while the device is read -> profiles -> threads -> first tokens

A step that fails is noted in the report and the next one goes on.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

from PIL import Image

from holov_export.errors import HolovExportError, UsageError
from holov_export.runtime.decoder import Decoder, decoder_maker
from holov_export.runtime.preprocess import pixels_from_images
from holov_export.runtime.session import Session
from holov_export.tensors import PixelBatch, SamplingSettings, Timings
from holov_export.verify.bench import Case, Samples, concurrent, interleaved, measure, sustained, warm_up
from holov_export.verify.bench_engines import Contestant
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
from holov_export.verify.operations import operations_of
from holov_export.verify.pictures import default_pictures

Tell = Callable[[str], None]

PROFILED_RUNS = 5
QUESTION = "what is shown?"


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
        Case(one.info.label, batch, budget, partial(one.run, pixels_of(one, batch), budget))
        for one in contestants
        for batch in request.batches
        for budget in one.budgets(request.budgets)
    ]
    warm, taken = _measured(run, cases)
    by_label = {one.info.label: one for one in contestants}
    monitor = monitor_of_this_machine()
    results = []
    for case, warmth, samples in zip(warm, taken.warm, taken.samples, strict=True):
        alone, device = _alone(run, case, monitor)
        share = _share(run, by_label[case.contestant], case)
        results.append(_case_result(by_label[case.contestant], case, warmth, samples, share, alone, device))
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


def pixels_of(contestant: Contestant, batch: int) -> PixelBatch:
    """B pictures as the bundle's model takes them: the default ones, over and over."""
    pictures = [picture for _, picture in default_pictures()]
    chosen = [pictures[index % len(pictures)] for index in range(batch)]
    return pixels_from_images(chosen, contestant.bundle.manifest.plan.model.image)


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
        return one.selection_share(pixels_of(one, case.batch), case.budget, PROFILED_RUNS)
    return None


def _case_result(
    one: Contestant,
    case: Case,
    warmth: WarmUp,
    samples: Samples,
    share: SelectionShare | None,
    alone: Percentiles | None,
    device: DeviceReading | None,
) -> CaseResult:
    latency, gpu = samples.latency, samples.gpu_time
    operations = operations_of(one.bundle.manifest.plan, case.budget)
    tflops = operations * case.batch / ((gpu or latency).p50 / 1e3) / 1e12
    peak = one.peak_tflops()
    return CaseResult(
        contestant=case.contestant,
        batch=case.batch,
        budget=case.budget,
        warm_up=warmth,
        latency=latency,
        gpu=gpu,
        copies=samples.copy_time,
        host=samples.host_time,
        images_per_second=round(case.batch / (latency.mean / 1e3), 3),
        gflop_per_image=round(operations / 1e9, 3),
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
        batch, budget = min(request.batches), min(one.budgets(request.budgets))
        pixels = pixels_of(one, batch)
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
            decoder = decoder_maker("genai", one.bundle, run.request.provider, run.request.decoder_threads, None)()
            try:
                yield from first_tokens(one, decoder, one.budgets(run.request.budgets), min(run.request.rounds, 10))
            finally:
                decoder.close()


def first_tokens(one: Contestant, decoder: Decoder, budgets: Sequence[int], rounds: int) -> Iterator[FirstTokenResult]:
    """Ask one question about one picture at every budget, in interleaved rounds after one round of warm-up."""
    session = Session(one.bundle, one.runner, lambda: decoder)  # not closed: both are the caller's
    _, picture = default_pictures()[0]
    sampling = SamplingSettings(max_new_tokens=1)

    def ask(budget: int, picture: Image.Image = picture) -> tuple[Timings, int]:
        answer = session.ask(picture, QUESTION, budget=budget, sampling=sampling)
        return answer.timings, answer.prompt_tokens

    taken: dict[int, list[tuple[Timings, int]]] = {budget: [] for budget in budgets}
    for budget in budgets:
        ask(budget)
    for budget in interleaved(budgets, rounds):
        taken[budget].append(ask(budget))
    for budget, answers in taken.items():
        times = [timings for timings, _ in answers]
        yield FirstTokenResult(
            contestant=one.info.label,
            budget=budget,
            prompt_tokens=answers[0][1],
            preprocess=_median_ms([item.preprocess for item in times]),
            vision=_median_ms([item.vision for item in times]),
            stitch=_median_ms([item.stitch for item in times]),
            setup=_median_ms([item.setup for item in times]),
            prefill=_median_ms([item.prefill for item in times]),
            total=_median_ms([item.ttft for item in times]),
            samples=len(times),
        )


def _median_ms(seconds: Sequence[float]) -> float:
    return round(statistics.median(seconds) * 1e3, 4)


# ---------------------------------------------------------------------------------------------------- ratios


def ratios_of(contestants: Sequence[Contestant], results: Sequence[CaseResult]) -> Iterator[Ratio]:
    """Each pruned contestant to the plain encoders in its engine, at K = N; the others to the first, at the same K."""
    infos = [one.info for one in contestants]
    pruned = [info for info in infos if info.method != "none"]
    for info in pruned:
        for plain in infos:
            if plain.method == "none" and plain.engine_kind == info.engine_kind:
                yield from _ratios(results, info.label, plain.label, plain.tokens)
    for info in pruned[1:]:
        yield from _ratios(results, info.label, pruned[0].label, None)


def _ratios(results: Sequence[CaseResult], label: str, baseline: str, fixed: int | None) -> Iterator[Ratio]:
    """`fixed` is the baseline's budget, None for the same as the contestant's."""
    known = {(item.contestant, item.batch, item.budget): item for item in results}
    for item in results:
        other = known.get((baseline, item.batch, item.budget if fixed is None else fixed))
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
