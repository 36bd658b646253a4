"""Floating-point operations of a batch's way through a packed vision graph, counted from its layouts.

As in `operations`, matrix products are counted and nothing else. They are those that the graph carries out, so what
fills windows, views and short pictures up to the size of the largest is among them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from holov_export.policies import FeatureSource, NoSelection
from holov_export.runtime.packing import packed_inputs
from holov_export.spec import ExportPlan, QwenVisionSpec
from holov_export.tensors import ImageLayout, PixelBatch
from holov_export.verify.operations import operations_of


def operations_of_batch(plan: ExportPlan, pixels: PixelBatch, budget: int) -> int:
    """Operations for all pictures of a batch at K = `budget`, whatever the family."""
    if not pixels.layouts:
        return operations_of(plan, budget) * len(pixels)
    packed = packed_inputs(pixels.layouts, plan, np.full(len(pixels), budget))
    kept = len(packed.rows) * packed.budget
    count = _qwen if isinstance(plan.model.vision, QwenVisionSpec) else _clip
    return 2 * count(plan, pixels.layouts, kept)


def _clip(plan: ExportPlan, layouts: Sequence[ImageLayout], kept: int) -> int:
    """Multiplications. The feature layer's attention runs for all rows, what is behind it for those that are kept."""
    vision, language = plan.model.clip, plan.model.decoder.width
    width, length = vision.width, vision.tokens + 1
    views, rows = sum(layout.rows for layout in layouts), sum(layout.tower_rows for layout in layouts)
    mlp = 2 * width * vision.mlp_width
    whole = length * (4 * width**2 + mlp) + 2 * length**2 * width
    of_view = vision.tokens * vision.channels * vision.patch_size**2 * width + vision.feature_layer * whole
    of_view += 2 * length * width**2  # keys and values of the feature layer
    of_view += width**2 + length * width  # the CLS row, for the saliency
    attended = rows * (2 * width**2 + 2 * length * width)
    reads, projects = plan.policy.features, width * language + language**2
    behind = kept if reads is FeatureSource.NONE else rows
    projected = rows if reads is FeatureSource.PROJECTED else kept
    return views * of_view + attended + behind * mlp + projected * projects


def _qwen(plan: ExportPlan, layouts: Sequence[ImageLayout], kept: int) -> int:
    """Multiplications. The last block's attention runs for all patches, what is behind it for those that are kept."""
    vision, language = plan.model.vision, plan.model.decoder.width
    assert isinstance(vision, QwenVisionSpec)  # operations_of_batch asks
    width, unit = vision.width, vision.unit
    patches = sum(layout.rows for layout in layouts)
    regions = [region.tokens * unit for layout in layouts for region in layout.regions]
    longest, windows = max(regions), sum(len(layout.windows) for layout in layouts)
    seen = {True: 2 * len(regions) * longest**2 * width, False: 2 * windows * vision.window_patches**2 * width}
    row = width**2 + 3 * width * vision.mlp_width  # output projection and MLP
    total = patches * vision.patch_values * width
    for layer in range(vision.layers - 1):
        total += patches * (3 * width**2 + row) + seen[layer in vision.full_layers]
    total += patches * 3 * width**2 + seen[True]
    plain = isinstance(plan.policy, NoSelection)
    if not plain:  # the sums over the queries, for the saliency
        total += len(regions) * vision.heads * longest**2
    tokens = kept if plan.policy.features is FeatureSource.NONE and not plain else patches // unit
    return total + tokens * (unit * row + (unit * width) ** 2 + unit * width * language)
