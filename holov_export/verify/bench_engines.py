"""Bundles in engines, ready to be timed."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from holov_export.bundle import Bundle
from holov_export.errors import UnknownNameError
from holov_export.runtime.runner import Runner, checked_budget
from holov_export.runtime.runner_ort import OrtRunner
from holov_export.storage import sha256_of
from holov_export.targets import EngineTarget
from holov_export.tensors import PixelBatch
from holov_export.verify.bench import OnDevice
from holov_export.verify.bench_results import ContestantInfo, SelectionShare
from holov_export.verify.bench_selection import ort_selection_share

ENGINES = ("ort", "tensorrt")
#: shares of N that are measured when no budgets are named: all, a third, two ninths and a ninth (576, 192, 128, 64);
#: where pictures differ, of the largest of a batch
DEFAULT_SHARES = ((1, 1), (1, 3), (2, 9), (1, 9))


@dataclass(frozen=True)
class Contestant:
    """A bundle in an engine.

    Attributes:
        run: one batch through the graph, from host memory to host memory.
        selection_share: profiles a batch at a budget, so many runs.
        target: whose peak rates its TFLOP/s are compared with.
        device_bytes: what the runner holds on the device now; None where it does not say.
        profiled: False to leave `selection_share` out of a report.
    """

    info: ContestantInfo
    bundle: Bundle
    runner: Runner
    run: Callable[[PixelBatch, int], OnDevice | None]
    selection_share: Callable[[PixelBatch, int, int], SelectionShare]
    target: EngineTarget | None
    device_bytes: Callable[[], int] | None = None
    profiled: bool = True

    @property
    def is_plain(self) -> bool:
        return self.info.method == "none"

    def info_now(self) -> ContestantInfo:
        """What a report says of it, with the device memory that it holds by now and what its runner had to give up."""
        found: dict[str, object] = {"engine": self.runner.name}
        if self.device_bytes is not None:
            found["device_mb"] = round(self.device_bytes() / 2**20, 1)
        return self.info.model_copy(update=found)

    def budgets(self, asked: Sequence[int], tokens: int | None = None) -> tuple[int, ...]:
        """Budgets to measure it at: those asked for, or the default shares; a plain encoder has one, all.

        Args:
            asked: a picture that has fewer tokens keeps all of them.
            tokens: of the largest picture at hand; None where all pictures have N.

        Raises:
            BudgetError: one is outside 1..N.
        """
        tokens = self.info.tokens if tokens is None else tokens
        if self.is_plain:
            return (tokens,)
        chosen = asked or [max(1, round(tokens * over / under)) for over, under in DEFAULT_SHARES]
        return tuple(dict.fromkeys(checked_budget(budget, self.info.tokens) for budget in chosen))

    def peak_tflops(self) -> float | None:
        """The target's dense rate of the bundle's precision, TFLOP/s; of a quantised one that of its products."""
        plan = self.bundle.manifest.plan
        seen = plan.precision if plan.quantization is None else plan.quantization.type
        return self.target.rate(seen.value) if self.target else None


def ort_contestant(
    bundle: Bundle, label: str, *, provider: str, threads: int | None, target: EngineTarget | None
) -> Contestant:
    """The bundle in ONNX Runtime.

    Raises:
        EnvironmentFaultError, BundleError: see `OrtRunner`.
    """
    began = time.perf_counter()
    runner = OrtRunner(bundle, provider=provider, threads=threads)
    loaded = time.perf_counter() - began
    device = "cuda" if runner.name.endswith("(cuda)") else "cpu"

    def run(pixels: PixelBatch, budget: int) -> OnDevice | None:
        runner.run(pixels, budget, saliency=False)
        return None  # ONNX Runtime does not say how long the device was at work

    def share(pixels: PixelBatch, budget: int, runs: int) -> SelectionShare:
        return ort_selection_share(bundle, pixels, budget, provider=device, threads=threads, runs=runs)

    info = contestant_info(bundle, label, engine=runner.name, kind="ort", load_seconds=loaded)
    return Contestant(info, bundle, runner, run, share, target)


def contestant_info(
    bundle: Bundle, label: str, *, engine: str, kind: str, load_seconds: float, built_with: str | None = None
) -> ContestantInfo:
    """What a report says of a contestant."""
    plan = bundle.manifest.plan
    known = next((item.sha256 for item in bundle.manifest.artifacts if item.path == bundle.graph), None)
    return ContestantInfo(
        label=label,
        bundle=bundle.folder.name,
        engine=engine,
        engine_kind=kind,
        method=plan.method,
        precision=plan.precision_name,
        tokens=plan.tokens,
        graph_sha256=known or sha256_of(bundle.vision),
        load_seconds=round(load_seconds, 3),
        built_with=built_with,
    )


def labels_of(bundles: Sequence[Bundle], engines: Sequence[str]) -> list[list[str]]:
    """A label for each bundle in each engine: the folder's name, the graph unless it is the default one, what tells
    equal names apart, the engine if several.

    Raises:
        UnknownNameError: an engine that does not exist.
    """
    unknown = [name for name in engines if name not in ENGINES]
    if unknown:
        raise UnknownNameError(f"unknown engine '{unknown[0]}'.", hint=f"Known: {', '.join(ENGINES)}.")
    names = [", ".join([bundle.folder.name, *_graph_words(bundle)]) for bundle in bundles]
    told_apart = [
        name if names.count(name) == 1 else f"{name} ({names[: index + 1].count(name)})"
        for index, name in enumerate(names)
    ]
    return [[f"{name}, {engine}" if len(engines) > 1 else name for engine in engines] for name in told_apart]


def _graph_words(bundle: Bundle) -> list[str]:
    """What tells a bundle's graph from its default one: the rule, "video", or both."""
    if bundle.is_default:
        return []
    return [bundle.label or bundle.method]
