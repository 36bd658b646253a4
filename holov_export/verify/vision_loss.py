"""What one vision graph loses against another: the same pictures through both, picture by picture.

The gate of a quantised export and the command `compare` both ask here; the figures are `parity.compare`'s, the mean of
the cosines apart.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from holov_export.bundle import Bundle
from holov_export.errors import ImageError
from holov_export.policies import Frozen
from holov_export.runtime.runner import Runner
from holov_export.runtime.runner_ort import OrtRunner
from holov_export.spec import ExportPlan
from holov_export.tensors import PixelBatch, VisualTokens
from holov_export.verify.backends import CPU_PRECISIONS
from holov_export.verify.parity import Tolerance, compare
from holov_export.verify.pictures import pixels_for

Pictures = Sequence[tuple[str, Image.Image]]
#: a number of tokens, or a share of each picture's own
Size = int | Fraction

#: a ninth, a third and all: 64, 192 and 576 of 576
USUAL_SIZES: tuple[Size, ...] = (Fraction(1, 9), Fraction(1, 3), Fraction(1))
#: pictures of one run: activations of a large batch would cost more memory than the weights
_TOGETHER = 2
#: refuses only what is never right: numbers that are not finite, other counts, padding that is not empty
_SOUND = Tolerance(tokens=math.inf, saliency=math.inf, overlap=0.0)


class PictureLoss(Frozen):
    """One picture at one budget.

    Attributes:
        picture: its name. tokens: N, how many it has. budget: asked for. count: kept by the graph before.
        overlap: share of kept positions in common.
        cosine_min, cosine_mean: of the rows of positions that both kept; None without any, or with a number that is
            not finite.
        saliency_error: largest difference as a share of the largest saliency before; None as above.
        sound: all numbers are finite, padding is empty, and both kept as many tokens.
    """

    picture: str
    tokens: int
    budget: int
    count: int
    overlap: float
    cosine_min: float | None
    cosine_mean: float | None
    saliency_error: float | None
    sound: bool

    @property
    def differing(self) -> int:
        """Tokens that only one of them kept."""
        return round((1 - self.overlap) * self.count)


class LossSummary(Frozen):
    """Over pictures and budgets; a budget of all tokens says nothing about overlap and is left out of it.

    Attributes:
        overlap_min, overlap_mean: None where every budget keeps all tokens.
        cosine_min, cosine_mean, saliency_error: None where any number was not finite, or no row is in common.
    """

    overlap_min: float | None
    overlap_mean: float | None
    cosine_min: float | None
    cosine_mean: float | None
    saliency_error: float | None


def summary_of(losses: Sequence[PictureLoss]) -> LossSummary:
    """The worst and the mean."""
    overlaps = [loss.overlap for loss in losses if loss.budget < loss.tokens]
    sound = bool(losses) and all(loss.sound for loss in losses)
    lows = [loss.cosine_min for loss in losses if loss.cosine_min is not None] if sound else []
    means = [loss.cosine_mean for loss in losses if loss.cosine_mean is not None] if sound else []
    errors = [loss.saliency_error for loss in losses if loss.saliency_error is not None] if sound else []
    return LossSummary(
        overlap_min=min(overlaps, default=None),
        overlap_mean=float(np.mean(overlaps)) if overlaps else None,
        cosine_min=min(lows, default=None),
        cosine_mean=float(np.mean(means)) if means else None,
        saliency_error=max(errors, default=None),
    )


def vision_losses(
    before: Bundle,
    after: Bundle,
    pictures: Pictures,
    sizes: Sequence[Size] = USUAL_SIZES,
    *,
    threads: int | None = None,
    tell: Callable[[str], None] = lambda message: None,
) -> tuple[PictureLoss, ...]:
    """Run both graphs on every picture at every budget, one graph after the other, and compare.

    Args:
        before, after: views of bundles whose graphs see the same pictures; of clips, each picture is made one.
        sizes: budgets. A picture that has fewer tokens keeps all.
        threads: CPU threads within one operator; None for one per core.

    Raises:
        ImageError: there is no picture.
        EnvironmentFaultError, BundleError: see `OrtRunner`.
    """
    if not pictures:
        raise ImageError("no picture to compare on.", hint="Name at least one.")
    cases = _cases(before.manifest.plan, pictures, sizes)
    sides = []
    for name, bundle in (("before", before), ("after", after)):
        tell(f"compare: {name} ({bundle.manifest.plan.precision_name}, {bundle.title})")
        with runner_on_cpu(bundle, threads) as runner:
            sides.append([runner.run(case.pixels, max(case.quota), case.quota, saliency=True) for case in cases])
    return tuple(loss for case, left, right in zip(cases, *sides, strict=True) for loss in _losses(case, left, right))


@contextmanager
def runner_on_cpu(bundle: Bundle, threads: int | None = None) -> Iterator[Runner]:
    """A vision graph in ONNX Runtime on the CPU; a bfloat16 one is widened to float32 first."""
    if bundle.manifest.plan.precision in CPU_PRECISIONS:
        with OrtRunner(bundle, provider="cpu", threads=threads) as runner:
            yield runner
        return
    from holov_export.export.onnx_from_graph import write_widened

    inputs = tuple(
        item.model_copy(update={"dtype": "float32"}) if item.dtype == "bfloat16" else item
        for item in bundle.manifest.inputs
    )
    # beside the bundle: /tmp is often memory
    with tempfile.TemporaryDirectory(prefix=".widened-", dir=bundle.folder.parent) as work:
        write_widened(bundle.vision, Path(work))
        widened = Bundle(Path(work), bundle.manifest.model_copy(update={"inputs": inputs}))
        with OrtRunner(widened, provider="cpu", threads=threads) as runner:
            yield runner


@dataclass(frozen=True)
class _Case:
    """Some pictures, how many tokens they have and how many they are to keep."""

    names: tuple[str, ...]
    pixels: PixelBatch
    tokens: list[int]
    quota: list[int]


def _cases(plan: ExportPlan, pictures: Pictures, sizes: Sequence[Size]) -> list[_Case]:
    """Size by size; two sizes that are the same for all pictures of a batch are one."""
    batches = []
    for start in range(0, len(pictures), _TOGETHER):
        few = pictures[start : start + _TOGETHER]
        pixels = pixels_for(plan, [picture for _, picture in few])
        tokens = [layout.tokens for layout in pixels.layouts] or [plan.tokens] * len(few)
        batches.append((tuple(name for name, _ in few), pixels, tokens))
    found: dict[tuple[int, tuple[int, ...]], _Case] = {}
    for size in sizes:
        for number, (names, pixels, tokens) in enumerate(batches):
            quota = [tokens_of(size, most) for most in tokens]
            found.setdefault((number, tuple(quota)), _Case(names, pixels, tokens, quota))
    return list(found.values())


def tokens_of(size: Size, tokens: int) -> int:
    """The budget of a picture that has so many tokens: at least 1, at most all."""
    return max(1, min(tokens, size if isinstance(size, int) else round(tokens * size)))


def _losses(case: _Case, before: VisualTokens, after: VisualTokens) -> Iterator[PictureLoss]:
    for image, name in enumerate(case.names):
        yield loss_of_picture(name, case.tokens[image], case.quota[image], _only(before, image), _only(after, image))


def loss_of_picture(name: str, tokens: int, budget: int, before: VisualTokens, after: VisualTokens) -> PictureLoss:
    """What one picture of `tokens` tokens lost at one budget; both sides are batches of one."""
    found = compare(before, after, names=("before", "after"), budget=budget, tolerance=_SOUND)
    with np.errstate(invalid="ignore", over="ignore"):  # infinities are judged by `sound`
        cosines = _cosines(before, after)
    largest = 0.0 if before.saliency is None else float(before.saliency.max())
    error = None if found.saliency_error is None or largest <= 0 else found.saliency_error / largest
    return PictureLoss(
        picture=name,
        tokens=tokens,
        budget=budget,
        count=int(before.counts[0]),
        overlap=found.overlap,
        cosine_min=_finite(found.token_cosine) if cosines.size else None,
        cosine_mean=_finite(float(cosines.mean())) if cosines.size else None,
        saliency_error=_finite(error),
        sound=found.passed,
    )


def _only(seen: VisualTokens, image: int) -> VisualTokens:
    """One picture as a batch."""
    few = slice(image, image + 1)
    saliency = None if seen.saliency is None else seen.saliency[few]
    return VisualTokens(seen.tokens[few], seen.positions[few], seen.counts[few], saliency)


def _cosines(left: VisualTokens, right: VisualTokens) -> npt.NDArray[np.float64]:
    """Of each position that both kept; the first picture of each."""
    kept = [side.positions[0, : int(side.counts[0])] for side in (left, right)]
    common, at_left, at_right = np.intersect1d(kept[0], kept[1], return_indices=True)
    rows = [
        side.tokens[0][places[common >= 0]].astype(np.float64) for side, places in ((left, at_left), (right, at_right))
    ]
    norms = np.linalg.norm(rows[0], axis=1) * np.linalg.norm(rows[1], axis=1)
    cosines: npt.NDArray[np.float64] = (rows[0] * rows[1]).sum(1) / np.maximum(norms, 1e-30)
    return cosines


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
