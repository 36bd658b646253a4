"""Floating-point operations of one picture's way through a vision graph: its matrix products, counted from the sizes.

A multiplication and the addition after it are two operations. What is not a matrix product (norms, activations, the
softmax, the selection's own arithmetic) is left out; it is well under a percent of the whole. Rules that compare all
tokens with each other (scope, divprune, ...) do more than that.

Where pictures have unequal numbers of tokens, `operations_packed` counts.
"""

from __future__ import annotations

from holov_export.policies import FeatureSource
from holov_export.spec import ExportPlan, ModelSpec


def operations_of(plan: ExportPlan, budget: int) -> int:
    """Operations for one picture at K = `budget`: 0.37e12 for LLaVA-1.5 at 64 of 576 tokens.

    A rule that decides from the CLS row alone runs the feature layer's queries, output projection and MLP, and the
    projector, for K rows. A rule that reads features runs them for all; a plain graph selects nothing. Behind a cut
    inside the tower the layers run for what the cut keeps and CLS.

    Raises:
        ValueError: the graph is packed, so it depends on the picture.
    """
    if plan.packed:
        raise ValueError("pictures have unequal numbers of tokens here; operations_packed counts for some of them")
    if plan.cuts:
        return _operations_with_cuts(plan, budget)
    selects = plan.policy.method != "none"
    early = selects and plan.policy.features is FeatureSource.NONE
    tokens = plan.tokens
    last_rows = budget if early else tokens + 1
    late_projection = plan.policy.features is FeatureSource.PROJECTED
    return encoder_operations(
        plan.model,
        last_rows=last_rows,
        projected=tokens if late_projection else budget,
        cls_row=selects,
    )


def encoder_operations(spec: ModelSpec, *, last_rows: int, projected: int, cls_row: bool) -> int:
    """Operations of the layers up to the feature layer, and of the projector.

    Args:
        spec: sizes.
        last_rows: rows that the feature layer is run for, beside the keys and values of all.
        projected: rows that go through the projector.
        cls_row: the CLS row of the feature layer's attention is computed once more, for the saliency.
    """
    vision = spec.clip
    length, width = vision.tokens + 1, vision.width
    linear, mlp = width * width, 2 * width * vision.mlp_width
    patches = vision.tokens * vision.channels * vision.patch_size**2 * width
    whole = _layer(length, length, linear, mlp, width)
    last = _layer(length, last_rows, linear, mlp, width)
    saliency = linear + length * width if cls_row else 0
    projector = projected * (width * spec.decoder.width + spec.decoder.width**2)
    return 2 * (patches + vision.feature_layer * whole + last + saliency + projector)


def _operations_with_cuts(plan: ExportPlan, budget: int) -> int:
    vision, width = plan.model.clip, plan.model.decoder.width
    early = plan.policy.features is FeatureSource.NONE
    kept = {cut.layer: min(max(budget, cut.keep or budget), vision.tokens) for cut in plan.cuts}
    linear, mlp, rows = vision.width**2, 2 * vision.width * vision.mlp_width, vision.tokens + 1
    total = vision.tokens * vision.channels * vision.patch_size**2 * vision.width
    for layer in range(vision.feature_layer + 1):
        if layer not in kept:
            total += _layer(rows, rows, linear, mlp, vision.width)
            continue
        left = kept[layer] + (layer < vision.feature_layer)  # CLS stays for the layers behind
        total += _layer(rows, left if early else rows, linear, mlp, vision.width) + linear + rows * vision.width
        rows = left
    return 2 * (total + budget * (vision.width * width + width**2))


def _layer(length: int, rows: int, linear: int, mlp: int, width: int) -> int:
    """Multiplications of a layer: keys and values of all rows, the rest for `rows` of them."""
    return 2 * length * linear + rows * (2 * linear + mlp) + 2 * rows * length * width
