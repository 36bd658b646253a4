"""What a mixture of precisions loses on one picture, at several budgets from one run where that is possible.

The tower's work does not depend on the budget. A rule that reads nothing but saliency is asked outside of the graph
what it keeps (by the reference loops, which graphs equal), and the rows of kept tokens are those of a run that keeps
all: at the feature layer a kept token attends to every token, kept or not. Cuts inside the tower, rules that read
features and clips are run at each budget.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np

from holov_export.errors import UsageError
from holov_export.policies import FeatureSource
from holov_export.quantize.probe_runner import ProbeRunner
from holov_export.spec import ExportPlan
from holov_export.tensors import PixelBatch, VisualTokens
from holov_export.verify.backends import gathered, tokens_from_reference
from holov_export.verify.vision_loss import PictureLoss, loss_of_picture


@dataclass(frozen=True)
class ProbePicture:
    """A picture to measure on.

    Attributes:
        pixels: a batch of one. tokens: N. quotas: in ascending order, each once.
        at_once: one run tells what happens at every quota.
        before: what the float graph gives at each quota.
    """

    name: str
    pixels: PixelBatch
    tokens: int
    quotas: tuple[int, ...]
    at_once: bool
    before: tuple[VisualTokens, ...]

    @property
    def runs(self) -> int:
        """Runs of the graph that one measurement takes."""
        return 1 if self.at_once else len(self.quotas)


def probe_picture(
    runner: ProbeRunner, plan: ExportPlan, name: str, pixels: PixelBatch, tokens: int, quotas: Sequence[int]
) -> ProbePicture:
    """Run the float graph on a picture.

    Raises:
        UsageError: it gives numbers that are not finite.
    """
    different = tuple(sorted(set(quotas)))
    full = runner.run(pixels, [tokens]) if asked_outside(plan) else None
    at_once = full is not None and _keeps_all(full, tokens)
    if at_once and full is not None:
        before = _at_quotas(plan, pixels, full, different)
    else:
        before = tuple(runner.run(pixels, [quota]) for quota in different)
    picture = ProbePicture(name, pixels, tokens, different, at_once, before)
    if not all(loss.sound for loss in losses_between(picture, before)):
        raise UsageError(
            f"the graph gives numbers that are not finite for '{name}', before anything is quantised.",
            hint="Verify the bundle: holov-export verify BUNDLE",
        )
    return picture


def asked_outside(plan: ExportPlan) -> bool:
    """One run tells what a graph does at every budget."""
    rule = plan.policy
    return rule.features is FeatureSource.NONE and rule.lossless_at_full and not plan.cuts and plan.part == "image"


def _keeps_all(full: VisualTokens, tokens: int) -> bool:
    """Row i is token i, as `gathered` needs it."""
    return int(full.counts[0]) == tokens and bool((full.positions[0, :tokens] == np.arange(tokens)).all())


def _at_quotas(
    plan: ExportPlan, pixels: PixelBatch, full: VisualTokens, quotas: Sequence[int]
) -> tuple[VisualTokens, ...]:
    """What the graph would have given at each quota; `full` where it is not finite, so that there is no choice."""
    if full.saliency is None or not np.isfinite(full.saliency).all():
        return tuple(full for _ in quotas)
    return tuple(gathered(full, tokens_from_reference(plan, pixels, full, quota, [quota])) for quota in quotas)


def seen_with(
    runner: ProbeRunner, plan: ExportPlan, picture: ProbePicture, quantized: Collection[str]
) -> tuple[VisualTokens, ...]:
    """What the graph gives at each of the picture's quotas with some groups quantised."""
    if not picture.at_once:
        return tuple(runner.run(picture.pixels, [quota], quantized=quantized) for quota in picture.quotas)
    full = runner.run(picture.pixels, [picture.tokens], quantized=quantized)
    return _at_quotas(plan, picture.pixels, full, picture.quotas)


def losses_between(picture: ProbePicture, after: Sequence[VisualTokens]) -> list[PictureLoss]:
    """At each quota."""
    return [
        loss_of_picture(picture.name, picture.tokens, quota, left, right)
        for quota, left, right in zip(picture.quotas, picture.before, after, strict=True)
    ]


def saliency_distance(picture: ProbePicture, after: Sequence[VisualTokens]) -> float | None:
    """Relative L2 distance of the saliency, at the largest quota; None where a number is not finite."""
    left, right = picture.before[-1].saliency, after[-1].saliency
    if left is None or right is None:
        return None
    there = left >= 0  # -1 marks tokens that a frame does not have
    length = float(np.linalg.norm(left[there].astype(np.float64)))
    with np.errstate(invalid="ignore", over="ignore"):
        distance = float(np.linalg.norm((right[there] - left[there]).astype(np.float64)))
    return _finite(distance / length) if length > 0 else 0.0


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
