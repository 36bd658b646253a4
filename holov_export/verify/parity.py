"""One function compares two back ends, whoever they are: reference, torch, ONNX Runtime, TensorRT, transformers.

Selection is discontinuous (a quota is a floor), so results are compared in this order: kept sets, then the rows of the
positions that both kept. An overlap below 1 is reported, not hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from holov_export.policies import Frozen
from holov_export.spec import CacheType, DecoderPrecision, ExportPlan, Precision
from holov_export.tensors import VisualTokens


class Tolerance(Frozen):
    """What still counts as equal.

    Attributes:
        tokens: largest difference of a row's element, relative to the largest magnitude among the rows.
        saliency: largest absolute difference of the saliency (it sums to at most 1).
        overlap: smallest share of kept positions in common, over all pictures (see `SMALLEST_JUDGED`).
    """

    tokens: float
    saliency: float
    overlap: float


#: in lower precisions overlap is judged from this many tokens on: with fewer, one near-tie is a large share
SMALLEST_JUDGED = 10

#: fp32 back ends differ by rounding only; fp16 and bf16 are compared with a float32 run, so weights differ as well
TOLERANCES = {
    Precision.FP32: Tolerance(tokens=1e-5, saliency=1e-5, overlap=1.0),
    Precision.FP16: Tolerance(tokens=2e-2, saliency=2e-2, overlap=0.9),
    Precision.BF16: Tolerance(tokens=1e-1, saliency=5e-2, overlap=0.8),
}


#: a quantised graph against float32 torch: that it is the same graph at all. What it may lose is the recipe's to say
_QUANTIZED = Tolerance(tokens=1.0, saliency=2e-1, overlap=0.5)


def tolerance_of(plan: ExportPlan) -> Tolerance:
    """Of a plan's vision graph against float32 torch."""
    return TOLERANCES[plan.precision] if plan.quantization is None else _QUANTIZED


class Comparison(Frozen):
    """How far two back ends are apart on a batch of pictures.

    Attributes:
        left, right: names of the back ends. budget: asked. pictures: how many.
        token_error: largest difference of rows at common positions, relative to the largest magnitude.
        token_cosine: smallest cosine between two rows at a common position.
        saliency_error: largest absolute difference, None if one side has no saliency.
        overlap: smallest share of kept positions in common. same_sets: pictures whose kept sets are equal.
        same_order: pictures whose kept positions are equal in order.
        same_counts: True if both kept as many tokens of each picture.
        passed: within the tolerance.
    """

    left: str
    right: str
    budget: int
    pictures: int
    token_error: float
    token_cosine: float
    saliency_error: float | None
    overlap: float
    same_sets: int
    same_order: int
    same_counts: bool
    passed: bool


class DecoderComparison(Frozen):
    """How a bundle's decoder and transformers answered the same prompts.

    Attributes:
        precision: of the decoder; transformers computes in float32. kv_cache: what keys and values are stored in.
        prompts: how many there were. new_tokens: the most tokens of one answer.
        identical: answers with the same tokens from the first to the last. first_token_same: with the same first one.
        passed: fp32 must be identical everywhere and fp16 begin alike everywhere; int4, and 8-bit keys and values, are
            reported and not judged.
    """

    precision: DecoderPrecision
    kv_cache: CacheType = "float"
    prompts: int
    new_tokens: int
    identical: int
    first_token_same: int
    passed: bool

    @property
    def judged(self) -> bool:
        """False where a difference is reported and nothing more."""
        return self.precision in (DecoderPrecision.FP32, DecoderPrecision.FP16) and self.kv_cache == "float"


class ParityReport(Frozen):
    """All comparisons of one bundle; goes to `reports/parity.json`.

    Attributes:
        precision: of what is not quantised. precision_name: as people call the whole graph's.
        pictures: names of the pictures. skipped: what could not be compared here, with the reason.
        decoder: how the embedded decoder answered, None if it was not asked.
    """

    precision: Precision
    precision_name: str = ""
    method: str
    pictures: tuple[str, ...]
    comparisons: tuple[Comparison, ...]
    skipped: tuple[str, ...] = ()
    decoder: DecoderComparison | None = None

    @property
    def passed(self) -> bool:
        """True if the graph itself took part and every comparison is within its tolerance."""
        ran = any(comparison.left.startswith("onnxruntime") for comparison in self.comparisons)
        decoder = self.decoder is None or self.decoder.passed
        return ran and decoder and all(comparison.passed for comparison in self.comparisons)


def compare(
    left: VisualTokens,
    right: VisualTokens,
    *,
    names: tuple[str, str],
    budget: int,
    tolerance: Tolerance,
    ordered: bool = False,
) -> Comparison:
    """Compare two results for the same pictures, budget and quotas.

    A side without rows (the reference decides positions only) has `tokens` of width 0; then only positions are
    compared. `ordered` demands equal order as well: where both sides decide from the same saliency, nothing but
    equality will do. Padding that is not zero, or a number that is not finite, never passes.
    """
    with np.errstate(invalid="ignore", over="ignore"):  # infinities are judged below
        pairs = [_compare_picture(left, right, image) for image in range(len(left))]
    # numpy's max and min let a NaN through, Python's may drop it
    scale = float(np.max([pair.scale for pair in pairs], initial=0.0)) or 1.0
    token_error = float(np.max([pair.difference for pair in pairs], initial=0.0)) / scale
    cosine = float(np.min([pair.cosine for pair in pairs], initial=1.0))
    judged = [pair.overlap for pair in pairs if tolerance.overlap == 1.0 or pair.count >= SMALLEST_JUDGED]
    saliency_error = _saliency_error(left.saliency, right.saliency)
    same_counts = bool(np.array_equal(left.counts, right.counts))
    same_order = sum(pair.same_order for pair in pairs)
    passed = (
        same_counts
        and _is_clean(left)
        and _is_clean(right)
        and token_error <= tolerance.tokens
        and all(overlap >= tolerance.overlap for overlap in judged)
        and (saliency_error is None or saliency_error <= tolerance.saliency)
        and (not ordered or same_order == len(pairs))
    )
    return Comparison(
        left=names[0],
        right=names[1],
        budget=budget,
        pictures=len(pairs),
        token_error=token_error,
        token_cosine=cosine,
        saliency_error=saliency_error,
        overlap=float(np.min([pair.overlap for pair in pairs], initial=1.0)),
        same_sets=sum(pair.overlap == 1.0 for pair in pairs),
        same_order=same_order,
        same_counts=same_counts,
        passed=passed,
    )


@dataclass(frozen=True)
class _Pair:
    """One picture: `count` tokens kept at most, the rest as of `Comparison`."""

    count: int
    difference: float
    scale: float
    cosine: float
    overlap: float
    same_order: bool


def _compare_picture(left: VisualTokens, right: VisualTokens, image: int) -> _Pair:
    kept_left = left.positions[image, : int(left.counts[image])]
    kept_right = right.positions[image, : int(right.counts[image])]
    real_left, real_right = kept_left[kept_left >= 0], kept_right[kept_right >= 0]
    _, at_left, at_right = np.intersect1d(kept_left, kept_right, return_indices=True)
    common = kept_left[at_left] >= 0
    rows_left = left.tokens[image][at_left[common]].astype(np.float64)
    rows_right = right.tokens[image][at_right[common]].astype(np.float64)
    largest = max(len(real_left), len(real_right))
    compared = rows_left.size and rows_right.size
    return _Pair(
        count=largest,
        difference=float(np.abs(rows_left - rows_right).max()) if compared else 0.0,
        scale=float(np.abs(rows_left).max()) if compared else 0.0,
        cosine=float(_cosines(rows_left, rows_right).min()) if compared else 1.0,
        overlap=float(common.sum()) / largest if largest else 1.0,
        same_order=bool(np.array_equal(kept_left, kept_right)),
    )


def _is_clean(side: VisualTokens) -> bool:
    """Finite rows; past each count, and where a position is -1, zero rows and position -1."""
    padding = np.arange(side.positions.shape[1])[None] >= side.counts[:, None]
    empty = padding | (side.positions < 0)
    finite = bool(np.isfinite(side.tokens).all()) and (side.saliency is None or bool(np.isfinite(side.saliency).all()))
    return finite and bool((side.positions[padding] == -1).all()) and not bool(side.tokens[empty].any())


def _cosines(left: npt.NDArray[np.float64], right: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    norms = np.linalg.norm(left, axis=1) * np.linalg.norm(right, axis=1)
    cosines: npt.NDArray[np.float64] = (left * right).sum(1) / np.maximum(norms, 1e-30)
    return cosines


def _saliency_error(left: npt.NDArray[np.float32] | None, right: npt.NDArray[np.float32] | None) -> float | None:
    if left is None or right is None:
        return None
    return float(np.abs(left - right).max())


def positions_only(positions: Sequence[npt.NDArray[np.int64]], budget: int) -> VisualTokens:
    """A result without rows, from one array of kept positions a picture (the reference gives these)."""
    padded = np.full((len(positions), budget), -1, dtype=np.int64)
    for image, kept in enumerate(positions):
        padded[image, : len(kept)] = kept
    counts = np.array([len(kept) for kept in positions], dtype=np.int64)
    return VisualTokens(np.zeros((len(positions), budget, 0), np.float32), padded, counts)
