"""The parity report of one bundle: its graph in ONNX Runtime against torch, the reference loops and transformers."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from PIL import Image

from holov_export.bundle import Bundle
from holov_export.extras import is_installed
from holov_export.runtime.preprocess import pixels_from_images
from holov_export.runtime.runner_ort import OrtRunner
from holov_export.spec import FeatureSource, Precision
from holov_export.tensors import PixelBatch, VisualTokens
from holov_export.verify.backends import (
    CPU_PRECISIONS,
    TransformersVision,
    gathered,
    tokens_from_reference,
    tokens_from_torch,
)
from holov_export.verify.parity import TOLERANCES, Comparison, ParityReport, compare

Pictures = Sequence[tuple[str, Image.Image]]
Case = tuple[PixelBatch, int, list[int]]


def parity_report(
    bundle: Bundle,
    pictures: Pictures,
    *,
    checkpoint: Path | None,
    budgets: Sequence[int],
    with_transformers: bool,
    tell: Callable[[str], None] = lambda message: None,
) -> ParityReport:
    """Run every back end that is at hand on every picture and budget and compare.

    The back ends run one after another and are freed in between, so the largest decides the peak memory. torch and
    transformers run in float32, so for an fp16 bundle the report shows what the precision costs.

    Args:
        bundle: its vision graph is run by ONNX Runtime on the CPU.
        checkpoint: directory of the weights; None compares with the reference loops only.
        budgets: K of each run; quotas are mixed inside a batch.
    """
    plan = bundle.manifest.plan
    skipped: list[str] = []
    cases = list(_cases(bundle, pictures, budgets))
    torch_side: list[VisualTokens] = []
    transformers_side: list[VisualTokens] = []
    if checkpoint is None or not is_installed("torch"):
        skipped.append("torch and transformers: no checkpoint at hand, or the 'export' extra is not installed")
    else:
        tell("torch")
        torch_side = _run_torch(bundle, checkpoint, cases)
        if with_transformers:
            tell("transformers")
            reference_tower = TransformersVision(checkpoint, plan.model)
            transformers_side = [reference_tower.run(pixels) for pixels, _, _ in cases]
            del reference_tower
            gc.collect()
    ort_side: list[VisualTokens] = []
    if plan.precision in CPU_PRECISIONS:
        tell("ONNX Runtime")
        with OrtRunner(bundle, provider="cpu") as runner:
            ort_side = [runner.run(pixels, budget, quota, saliency=True) for pixels, budget, quota in cases]
    else:
        skipped.append(f"ONNX Runtime: its CPU provider has no {plan.precision.value} convolution")
    comparisons = [
        comparison
        for index, case in enumerate(cases)
        for comparison in _compare_case(
            bundle, case, _at(torch_side, index), _at(transformers_side, index), _at(ort_side, index)
        )
    ]
    return ParityReport(
        precision=plan.precision,
        method=plan.policy.method,
        pictures=tuple(name for name, _ in pictures),
        comparisons=tuple(comparisons),
        skipped=tuple(skipped),
    )


def _cases(bundle: Bundle, pictures: Pictures, budgets: Sequence[int]) -> Iterator[Case]:
    """One batch of all pictures for each budget; the quotas fall from K to K/2 over the batch."""
    pixels = pixels_from_images([picture for _, picture in pictures], bundle.manifest.plan.model.image)
    for budget in budgets:
        steps = max(len(pictures) - 1, 1)
        yield pixels, budget, [max(1, budget - index * budget // (2 * steps)) for index in range(len(pictures))]


def _run_torch(bundle: Bundle, checkpoint: Path, cases: Sequence[Case]) -> list[VisualTokens]:
    from holov_export.vision.clip import vision_from_checkpoint
    from holov_export.vision.weights import SafetensorsReader

    plan = bundle.manifest.plan
    with SafetensorsReader(checkpoint) as reader:
        module = vision_from_checkpoint(plan.model, plan.policy, reader, Precision.FP32)
    results = [tokens_from_torch(module, pixels, budget, quota) for pixels, budget, quota in cases]
    del module
    gc.collect()
    return results


def _at(results: list[VisualTokens], index: int) -> VisualTokens | None:
    return results[index] if results else None


def _compare_case(
    bundle: Bundle,
    case: Case,
    torch_side: VisualTokens | None,
    transformers_side: VisualTokens | None,
    ort_side: VisualTokens | None,
) -> Iterator[Comparison]:
    plan = bundle.manifest.plan
    _, budget, quota = case
    tolerance = TOLERANCES[plan.precision]
    exact = TOLERANCES[Precision.FP32]
    if ort_side is not None:
        reference = tokens_from_reference(plan, ort_side, budget, quota)
        if reference is not None:
            # both sides decide from the same saliency, so nothing but equality will do
            yield compare(ort_side, reference, names=("onnxruntime", "reference"), budget=budget, tolerance=exact)
        if torch_side is not None:
            names = ("onnxruntime", "torch fp32")
            yield compare(ort_side, torch_side, names=names, budget=budget, tolerance=tolerance)
    if torch_side is not None and transformers_side is not None:
        kept = torch_side
        if plan.policy.features is FeatureSource.NONE:
            kept = tokens_from_reference(plan, transformers_side, budget, quota) or torch_side
        theirs = gathered(transformers_side, kept)
        yield compare(torch_side, theirs, names=("torch fp32", "transformers"), budget=budget, tolerance=exact)
