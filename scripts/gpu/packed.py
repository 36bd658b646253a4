"""Steps of `measure` for packed graphs: pictures and clips of unequal size, each family by itself.

What they find lies under "packed", one entry for each model; the tables of `report` are of square graphs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from fitting import named
from pictures import odd_pixels, pixels_of
from steps import Steps

from holov_export.bundle import Bundle
from holov_export.runtime.runner_trt import TrtRunner
from holov_export.tensors import PixelBatch, VisualTokens
from holov_export.verify.parity import compare, tolerance_of

Agreement = Callable[[VisualTokens, VisualTokens], float]
#: what a packed bundle's runs need at least
SECONDS = 10.0
#: quotas of the shapes that are tried, as shares of a picture's own tokens
SHARES = (1, 3, 9, 100)


def check_packed(
    steps: Steps,
    entry: dict[str, Any],
    bundle: Bundle,
    references: Sequence[Path],
    runner_of: Callable[[Bundle], TrtRunner],
    agreement: Agreement,
) -> None:
    """Compare an engine with its reference, and run pictures of all shapes.

    Args:
        entry: of the family, is filled. bundle: a view of the packed graph.
        agreement: share of kept tokens that two results have in common.
    """
    method, family = bundle.manifest.plan.policy.method, bundle.manifest.plan.model.family
    for path in references:
        reference = np.load(path)
        if "model" in reference and (str(reference["method"]), str(reference["model"])) == (method, family):
            action = partial(_parity, entry, bundle, reference, runner_of, agreement)
            steps.run(f"compare {bundle.folder.name}", action, needs=SECONDS)
    steps.run(f"shapes {bundle.folder.name}", partial(_shapes, entry, bundle, runner_of), needs=SECONDS)


def _parity(
    entry: dict[str, Any],
    bundle: Bundle,
    reference: Any,
    runner_of: Callable[[Bundle], TrtRunner],
    agreement: Agreement,
) -> None:
    """Every budget of the reference, all its pictures together."""
    pixels = pixels_of(bundle, int(reference["pictures"]))
    tolerance, names = tolerance_of(bundle.manifest.plan), ("tensorrt", "onnxruntime fp32")
    with runner_of(bundle) as runner:
        for budget in reference["budgets"].tolist():
            theirs = VisualTokens(
                reference[f"tokens_{budget}"],
                reference[f"positions_{budget}"],
                reference[f"counts_{budget}"],
                reference["saliency"],
            )
            ours = runner.run(pixels, budget, saliency=True)
            found = compare(ours, theirs, names=names, budget=budget, tolerance=tolerance)
            row = {
                "bundle": bundle.folder.name,
                **named(bundle),
                "pictures": len(pixels),
                "kept_in_common": agreement(ours, theirs),
            }
            entry["parity"].append({**row, **found.model_dump(mode="json")})


def _shapes(entry: dict[str, Any], bundle: Bundle, runner_of: Callable[[Bundle], TrtRunner]) -> None:
    """Thin, tiny and large pictures at several quotas, alone and together; note what was wrong, or nothing."""
    pixels = odd_pixels(bundle)
    spreads = ("frames", "clip") if bundle.part == "video" else ("frames",)
    with runner_of(bundle) as runner:
        batches = [pixels, *(pixels.part(at, at + 1) for at in range(len(pixels)))]
        for few in batches:
            for share in SHARES:
                for spread in spreads:
                    quota = [max(1, layout.tokens // share) for layout in few.layouts]
                    result = runner.run(few, max(quota), quota, spread=spread)  # type: ignore[arg-type]
                    tokens = [layout.tokens for layout in few.layouts]
                    entry["shapes"].append(
                        {"tokens": tokens, "quota": quota, "spread": spread, "wrong": wrong_with(result, few, quota)}
                    )
    bad = [item for item in entry["shapes"] if item["wrong"]]
    if bad:
        raise RuntimeError(f"{len(bad)} shapes gave wrong results, the first: {bad[0]}")


def wrong_with(visual: VisualTokens, pixels: PixelBatch, quota: Sequence[int]) -> str:
    """What a result breaks of the contract of packed graphs; empty if nothing."""
    if visual.counts.tolist() != list(quota):
        return f"counts {visual.counts.tolist()[:8]}, asked {list(quota)[:8]}"
    if not np.isfinite(visual.tokens).all():
        return "a number that is not finite"
    for image, (count, layout) in enumerate(zip(quota, pixels.layouts, strict=True)):
        kept = visual.positions[image, :count]
        if len(set(kept.tolist())) != count or kept.min() < 0 or kept.max() >= layout.tokens:
            return f"image {image}: positions that are not {count} different ones of {layout.tokens}"
        if visual.tokens[image, count:].any() or (visual.positions[image, count:] != -1).any():
            return f"image {image}: padding that is not empty"
    return ""


def by_family(bundles: Sequence[Bundle]) -> list[list[Bundle]]:
    """The packed views of bundles that have one, those of each model together."""
    views = [bundle.of_part(bundle.manifest.plan.parts[-1]) for bundle in bundles]
    groups: dict[str, list[Bundle]] = {}
    for view in views:
        if view.manifest.plan.packed:
            groups.setdefault(view.manifest.plan.model.name, []).append(view)
    return list(groups.values())
