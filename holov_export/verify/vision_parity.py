"""The parity report of one bundle: its graph in ONNX Runtime against torch, the reference loops and transformers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

from PIL import Image

from holov_export.bundle import Bundle
from holov_export.extras import is_installed
from holov_export.policies import FeatureSource
from holov_export.runtime.runner import joined
from holov_export.spec import Precision
from holov_export.tensors import FloatArray, PixelBatch, VisualTokens
from holov_export.verify.backends import (
    CPU_PRECISIONS,
    as_looked_at,
    features_from_torch,
    gathered,
    tokens_from_reference,
    tokens_from_torch,
)
from holov_export.verify.parity import TOLERANCES, Comparison, ParityReport, compare, tolerance_of
from holov_export.verify.pictures import pixels_for
from holov_export.verify.transformers_vision import transformers_vision
from holov_export.verify.vision_loss import runner_on_cpu

Pictures = Sequence[tuple[str, Image.Image]]
Case = tuple[PixelBatch, int, list[int]]


def parity_report(
    bundle: Bundle,
    pictures: Pictures,
    *,
    checkpoint: Path | None,
    budgets: Sequence[int] = (),
    with_transformers: bool,
    tell: Callable[[str], None] = lambda message: None,
) -> ParityReport:
    """Run every back end that is at hand on every picture and budget and compare.

    The back ends run one after another and are freed in between, so the largest decides the peak memory. torch and
    transformers run in float32, so for an fp16 bundle the report shows what the precision costs.

    Args:
        bundle: its vision graph is run by ONNX Runtime on the CPU.
        checkpoint: directory of the weights; None compares with the reference loops only.
        budgets: K of each run; quotas are mixed inside a batch. () for one, a ninth of the tokens, and all.
    """
    plan = bundle.manifest.plan
    skipped: list[str] = []
    cases = list(_cases(bundle, pictures, budgets))
    torch_side: list[VisualTokens] = []
    features: FloatArray | None = None
    transformers_side: list[VisualTokens] = []
    if checkpoint is None or not is_installed("torch"):
        skipped.append("torch and transformers: no checkpoint at hand, or the 'export' extra is not installed")
    else:
        tell("torch")
        torch_side, features = _run_torch(bundle, checkpoint, cases)
        if with_transformers and plan.cuts:
            skipped.append("transformers: it has no tower that drops tokens on the way")
        elif with_transformers and plan.policy.merges:
            skipped.append(f"transformers: it has no tower that merges tokens as '{plan.policy.method}' does")
        elif with_transformers:
            tell("transformers")
            transformers_side = _run_transformers(bundle, checkpoint, cases)
    tell("ONNX Runtime")
    graph, ort_side = _run_graph(bundle, cases)
    comparisons = [
        comparison
        for index, case in enumerate(cases)
        for comparison in _compare_case(
            bundle, graph, case, ort_side[index], _at(torch_side, index), features, _at(transformers_side, index)
        )
    ]
    if len(plan.cuts) > 1:
        skipped.append("the reference: a later cut decides from what an earlier one has left")
    elif plan.policy.features is not FeatureSource.NONE and features is None:
        skipped.append(f"the reference: '{plan.policy.method}' reads features, which only torch gives")
    return ParityReport(
        precision=plan.precision,
        precision_name=plan.precision_name,
        method=plan.method,
        pictures=tuple(name for name, _ in pictures),
        comparisons=tuple(comparisons),
        skipped=tuple(skipped),
    )


def _cases(bundle: Bundle, pictures: Pictures, budgets: Sequence[int]) -> Iterator[Case]:
    """One batch of all pictures for each budget; the quotas fall from K to K/2 over the batch."""
    pixels = pixels_for(bundle.manifest.plan, [picture for _, picture in pictures])
    tokens = max((layout.tokens for layout in pixels.layouts), default=bundle.manifest.plan.tokens)
    for budget in budgets or sorted({1, max(1, tokens // 9), tokens}):
        steps = max(len(pictures) - 1, 1)
        yield pixels, budget, [max(1, budget - index * budget // (2 * steps)) for index in range(len(pictures))]


def _run_graph(bundle: Bundle, cases: Sequence[Case]) -> tuple[str, list[VisualTokens]]:
    """(name of the back end, results) of the bundle's own graph; a bfloat16 one is widened to float32 first."""
    widened = bundle.manifest.plan.precision not in CPU_PRECISIONS
    with runner_on_cpu(bundle) as runner:

        def run(pixels: PixelBatch, budget: int, quota: list[int]) -> VisualTokens:
            return runner.run(pixels, budget, quota, saliency=True)

        return "onnxruntime, widened" if widened else "onnxruntime", [_in_small_batches(run, case) for case in cases]


def _in_small_batches(run: Callable[[PixelBatch, int, list[int]], VisualTokens], case: Case) -> VisualTokens:
    """Run two pictures at a time: activations of a large batch would cost more memory than the weights."""
    pixels, budget, quota = case
    parts = []
    for start in range(0, len(pixels), 2):
        few = slice(start, start + 2)
        parts.append(run(pixels.part(start, start + 2), budget, quota[few]))
    return joined(parts)


def _run_torch(bundle: Bundle, checkpoint: Path, cases: Sequence[Case]) -> tuple[list[VisualTokens], FloatArray | None]:
    """(results, features [B, N, ..] for a rule that reads any)."""
    from holov_export.vision.families import vision_from_plan
    from holov_export.vision.loading import forget_weights
    from holov_export.vision.weights import SafetensorsReader

    plan = bundle.manifest.plan
    with SafetensorsReader(checkpoint) as reader:
        module = vision_from_plan(plan, reader, Precision.FP32)
    run = partial(tokens_from_torch, module, plan)
    results = [_in_small_batches(run, case) for case in cases]
    features = None
    if plan.policy.features is not FeatureSource.NONE:
        features = features_from_torch(module, plan, cases[0][0])
    forget_weights(module)
    return results, features


def _run_transformers(bundle: Bundle, checkpoint: Path, cases: Sequence[Case]) -> list[VisualTokens]:
    tower = transformers_vision(checkpoint, bundle.manifest.plan)
    results = [tower.run(cases[0][0])] * len(cases)  # all tokens, whatever the budget
    tower.close()
    return results


def _at(results: list[VisualTokens], index: int) -> VisualTokens | None:
    return results[index] if results else None


def _compare_case(
    bundle: Bundle,
    graph: str,
    case: Case,
    ort_side: VisualTokens,
    torch_side: VisualTokens | None,
    features: FloatArray | None,
    transformers_side: VisualTokens | None,
) -> Iterator[Comparison]:
    """Each back end with the next simpler one: graph, torch, reference, transformers."""
    plan = bundle.manifest.plan
    pixels, budget, quota = case
    exact = TOLERANCES[Precision.FP32]
    one_cut = len(plan.cuts) <= 1
    if plan.policy.features is FeatureSource.NONE and one_cut:
        reference = tokens_from_reference(plan, pixels, ort_side, budget, quota)
        yield compare(ort_side, reference, names=(graph, "reference"), budget=budget, tolerance=exact, ordered=True)
    if torch_side is None:
        return
    names = (graph, "torch fp32")
    yield compare(ort_side, torch_side, names=names, budget=budget, tolerance=tolerance_of(plan))
    if features is not None and one_cut:
        reference = tokens_from_reference(plan, pixels, torch_side, budget, quota, features)
        names = ("torch fp32", "reference")
        yield compare(torch_side, reference, names=names, budget=budget, tolerance=exact, ordered=True)
    if transformers_side is not None:
        kept = torch_side
        if plan.policy.features is FeatureSource.NONE:
            kept = tokens_from_reference(plan, pixels, transformers_side, budget, quota)
        theirs = gathered(as_looked_at(plan, pixels, transformers_side, quota), kept)
        yield compare(torch_side, theirs, names=("torch fp32", "transformers"), budget=budget, tolerance=exact)
