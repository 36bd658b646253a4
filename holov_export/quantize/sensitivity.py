"""Which layers must stay in float so that a quantised graph keeps the limits: measured, not guessed.

1. Every group of products (`probe_groups`) is quantised alone, and ranked by what it does
   (`sensitivity_search.damage_of`).
2. Everything is quantised but the j most harmful groups, j = 0, 1, 2, 4, ... until the limits are met, then the
   smallest such j is searched between the last two. Errors of layers neither add up nor cancel in a way that one could
   rely on, so each combination is run.
3. Groups without which the errors are hardly larger are quantised again, the least harmful first.

The limits are judged as the gate judges them (`precision_report.vision_verdicts`), but on the pictures of the
calibration: the gate has others and would judge nothing otherwise, so a set that was found here can still fail there.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from holov_export.bundle import Bundle
from holov_export.compile.graph_file import graph_from_file
from holov_export.errors import ImageError
from holov_export.policies import FeatureSource
from holov_export.quantize.linears import linears_of, quantised_linears
from holov_export.quantize.precision_report import vision_verdicts
from holov_export.quantize.probe_graph import ProbeGraph, probe_from_graph
from holov_export.quantize.probe_groups import groups_of, patterns_of
from holov_export.quantize.probe_losses import (
    ProbePicture,
    asked_outside,
    losses_between,
    probe_picture,
    saliency_distance,
    seen_with,
)
from holov_export.quantize.probe_runner import ProbeRunner
from holov_export.quantize.ranges import Ranges
from holov_export.quantize.sensitivity_record import (
    CurvePoint,
    GroupDamage,
    Measured,
    Sensitivity,
    SweepJournal,
    sweep_key,
)
from holov_export.quantize.sensitivity_search import RETRIED, damage_of, fewest, needed
from holov_export.recipes import Limits
from holov_export.spec import ExportPlan, Quantization
from holov_export.tensors import PixelBatch
from holov_export.verify.pictures import pixels_for
from holov_export.verify.vision_loss import USUAL_SIZES, Size, summary_of, tokens_of

if TYPE_CHECKING:
    from holov_export.recipes import NamedPicture

Tell = Callable[[str], None]
Advance = Callable[[int], None]

#: the gate's budgets and some between them, where they need no further run: what is within the limits at all of them,
#: on few pictures, is seldom so by luck
DENSE_SIZES: tuple[Size, ...] = (*(Fraction(1, part) for part in (18, 9, 6, 4, 3, 2)), Fraction(1))
#: how much larger the errors may become when a group is quantised that seemed to be needed: more means that it is, and
#: that the limits are met by luck
_HARDLY = 1.05
#: pictures that a sweep looks at: each costs as many runs as there are groups
MOST_PICTURES = 8


def runs_of(
    view: Bundle,
    quantization: Quantization,
    pictures: int,
    *,
    sizes: Sequence[Size] = (),
    whole_layers: bool = False,
) -> int:
    """About how many runs of the graph a sweep takes, rather too many than too few: what a progress bar is of.

    Raises:
        UsageError: see `quantised_linears`.
    """
    linears = linears_of(graph_from_file(view.vision))
    chosen = quantised_linears(linears, quantization.keep)
    groups = len(groups_of(linears, chosen, whole_layers=whole_layers))
    each = 1 if asked_outside(view.manifest.plan) else len(sizes or USUAL_SIZES)
    return _combinations(groups) * min(pictures, MOST_PICTURES) * each


def _combinations(groups: int) -> int:
    """Mixtures that are measured at most: the groups alone, the doublings, the search, the retries."""
    doublings = (groups - 1).bit_length() + 1
    return groups + 2 * doublings + min(groups - 1, RETRIED)


def sensitivity_of(
    view: Bundle,
    quantization: Quantization,
    ranges: Ranges | None,
    pictures: Sequence[NamedPicture],
    *,
    limits: Limits,
    sizes: Sequence[Size] = (),
    partial: Path | None = None,
    whole_layers: bool = False,
    threads: int | None = None,
    tell: Tell = lambda message: None,
    advance: Advance = lambda runs: None,
) -> Sensitivity:
    """Sweep over the groups of one graph.

    Args:
        view: of a float bundle. quantization: with what is kept from the start.
        ranges: of this graph; None for engine "cpu", whose ranges are found at run time.
        pictures: of the calibration, never those of the gate; the first `MOST_PICTURES` are taken.
        limits: to be met. sizes: budgets at which they are judged; () for the gate's, and more where they cost nothing.
        partial: a file that lets a killed sweep go on; what is measured goes there, line by line.
        whole_layers: switch layers, not the parts of layers: half the runs, a coarser answer.
        threads: CPU threads within one operator; None for one per core.
        advance: is told how many runs are over.

    Raises:
        UsageError: no range of an activation, a pattern that names nothing, a bfloat16 graph, or a float graph that
            gives numbers that are not finite. ImageError: there is no picture.
        EnvironmentFaultError: ONNX Runtime cannot load or run the graph.
        StorageError: `partial` cannot be written.
    """
    if not pictures:
        raise ImageError("no picture to measure on.", hint="Name a recipe with pictures.")
    start, plan, few = time.perf_counter(), view.manifest.plan, pictures[:MOST_PICTURES]
    sizes = tuple(sizes) or (DENSE_SIZES if asked_outside(plan) else USUAL_SIZES)
    names = tuple((picture.name, picture.sha256) for picture in few)
    tell(f"sensitivity of {view.title}: round the weights")
    probe = probe_from_graph(view.vision, quantization, ranges, whole_layers=whole_layers)
    groups = tuple(group.name for group in probe.groups)
    journal = SweepJournal(partial, sweep_key(view, quantization, ranges, names, sizes, groups))
    with ProbeRunner(probe, plan, threads=threads) as runner:
        tell(f"sensitivity of {view.title}: the float graph on {_counted(len(few), 'picture')}")
        cases = tuple(_case(runner, plan, picture, sizes) for picture in few)
        shares = _shares(runner, probe, cases[0])
        sweep = _Sweep(runner, plan, groups, shares, cases, limits, journal, advance)
        _announce(sweep, tell)
        ranked = sweep.rank(probe)
        tell(f"sensitivity of {view.title}: the limits, with the most harmful groups in float")
        curve, kept = sweep.curve(tuple(group.name for group in ranked))
    return Sensitivity(
        method=plan.method,
        part=plan.part,
        precision=plan.precision.value,
        quantization=quantization,
        pictures=names,
        budgets=tuple(size if isinstance(size, int) else str(size) for size in sizes),
        limits=limits,
        groups=ranked,
        curve=curve,
        keep=(*quantization.keep, *patterns_of(kept.kept, probe.groups, probe.linears)),
        met=kept.met,
        runs=len(journal) * sweep.runs,
        seconds=time.perf_counter() - start,
    )


def _case(runner: ProbeRunner, plan: ExportPlan, picture: NamedPicture, sizes: Sequence[Size]) -> ProbePicture:
    pixels: PixelBatch = pixels_for(plan, [picture.image()])
    tokens = pixels.layouts[0].tokens if pixels.layouts else plan.tokens
    return probe_picture(runner, plan, picture.name, pixels, tokens, [tokens_of(size, tokens) for size in sizes])


def _shares(runner: ProbeRunner, probe: ProbeGraph, case: ProbePicture) -> tuple[float, ...]:
    """Each group's share of the multiplications of all products with weights, at the smallest budget."""
    costs = runner.multiplications(case.pixels, case.quotas[:1])
    of_weight = {linear.weight: cost for linear, cost in zip(probe.linears, costs, strict=True)}
    return tuple(sum(of_weight[linear.weight] for linear in group.linears) / sum(costs) for group in probe.groups)


def _announce(sweep: _Sweep, tell: Tell) -> None:
    """Say what it costs before it begins."""
    found = len(sweep.journal)
    known = f"; {_counted(found, 'mixture')} known from before" if found else ""
    tell(
        f"sensitivity: {_counted(len(sweep.groups), 'group')} alone, {_counted(sweep.runs, 'run')} of the graph each; "
        f"then up to {_combinations(len(sweep.groups)) - len(sweep.groups)} mixtures{known}"
    )


@dataclass
class _Sweep:
    """A session and what it is asked on.

    Attributes:
        groups: names, in the order of the graph. shares: of the multiplications, same order.
        runs: of the graph, for one mixture.
    """

    runner: ProbeRunner
    plan: ExportPlan
    groups: tuple[str, ...]
    shares: tuple[float, ...]
    cases: tuple[ProbePicture, ...]
    limits: Limits
    journal: SweepJournal
    advance: Advance
    runs: int = field(init=False)

    def __post_init__(self) -> None:
        self.runs = sum(case.runs for case in self.cases)

    def measure(self, kept: Sequence[str]) -> Measured:
        """Quantise everything but some groups; what was measured before is not run again."""
        ordered = tuple(group for group in self.groups if group in kept)
        found = self.journal.find(ordered)
        if found is not None:
            self.advance(self.runs)
            return found
        quantized = set(self.groups) - set(ordered)
        losses, distances = [], []
        for case in self.cases:
            seen = seen_with(self.runner, self.plan, case, quantized)
            losses += losses_between(case, seen)
            distances.append(saliency_distance(case, seen))
            self.advance(case.runs)
        finite = [distance for distance in distances if distance is not None]
        error = float(np.mean(finite)) if len(finite) == len(distances) else None
        measured = Measured(kept=ordered, saliency_error=error, losses=tuple(losses))
        self.journal.add(measured)
        return measured

    def rank(self, probe: ProbeGraph) -> tuple[GroupDamage, ...]:
        """Each group alone, the most harmful first."""
        everything = self.measure(())
        features = self.plan.policy.features is not FeatureSource.NONE
        found = []
        for group, share in zip(probe.groups, self.shares, strict=True):
            alone = self.measure([name for name in self.groups if name != group.name])
            found.append(
                GroupDamage(
                    name=group.name,
                    linears=tuple(linear.name for linear in group.linears),
                    share=share,
                    damage=damage_of(alone, everything, self.limits, reads_features=features),
                    saliency_error=alone.saliency_error,
                    overlap=vision_verdicts(alone.losses, self.limits)[1].found,
                    cosine=summary_of(alone.losses).cosine_min,
                )
            )
        return tuple(sorted(found, key=lambda item: -item.damage))

    def curve(self, ranked: Sequence[str]) -> tuple[tuple[CurvePoint, ...], CurvePoint]:
        """(what was measured on the way, by how many groups are kept; the point that is proposed)."""
        points: dict[tuple[str, ...], CurvePoint] = {}

        def good(kept: Sequence[str]) -> bool:
            points[tuple(kept)] = self.point(kept)
            return points[tuple(kept)].met

        found = fewest(len(ranked) - 1, lambda count: good(ranked[:count]))
        on_curve = tuple(points.values())
        if found is None:
            best = max(on_curve, key=_closeness)
        else:
            usual = points[tuple(ranked[:found])]
            best = points[tuple(needed(usual.kept, lambda kept: good(kept) and _as_good(points[tuple(kept)], usual)))]
            on_curve = tuple({point.kept: point for point in (*on_curve, best)}.values())
        return tuple(sorted(on_curve, key=lambda point: len(point.kept))), best

    def point(self, kept: Sequence[str]) -> CurvePoint:
        """One combination, judged as the gate would."""
        measured = self.measure(kept)
        verdicts = vision_verdicts(measured.losses, self.limits)
        quantized = sum(share for group, share in zip(self.groups, self.shares, strict=True) if group not in kept)
        return CurvePoint(
            kept=tuple(kept),
            share=max(0.0, 1 - quantized),
            met=all(verdict.passed for verdict in verdicts),
            saliency_error=measured.saliency_error,
            overlap=verdicts[1].found,
            cosine=summary_of(measured.losses).cosine_min,
        )


def _as_good(point: CurvePoint, other: CurvePoint) -> bool:
    """Hardly more error."""
    saliency = (point.saliency_error or 0.0, other.saliency_error or 0.0)
    cosine = (1 - (point.cosine or 0.0), 1 - (other.cosine or 0.0))
    return saliency[0] <= _HARDLY * saliency[1] and cosine[0] <= _HARDLY * cosine[1]


def _closeness(point: CurvePoint) -> tuple[float, float]:
    """What comes closest to the limits, where none is met."""
    return (
        math.inf if point.overlap is None else point.overlap,
        -1.0 if point.cosine is None else point.cosine,
    )


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
