"""Back ends that a bundle's vision graph is compared with: our torch module, the reference loops.

`verify.transformers_vision` has the third.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from holov_export.extras import require
from holov_export.runtime.packing import GraphRow, Spread, packed_inputs, pictures_from_rows
from holov_export.selection.reference import official_qwen_positions, positions_of
from holov_export.spec import ExportPlan, Precision
from holov_export.tensors import FloatArray, Int64Array, PixelBatch, VisualTokens
from holov_export.verify.parity import positions_only

if TYPE_CHECKING:
    from holov_export.vision.families import VisionModule


def tokens_from_torch(
    module: VisionModule, plan: ExportPlan, pixels: PixelBatch, budget: int, quota: list[int]
) -> VisualTokens:
    """Run the torch module, in its own precision, as the graph would be run."""
    torch = require("torch")
    values = torch.from_numpy(pixels.pixel_values).to(next(module.parameters()).dtype)
    packed = packed_inputs(pixels.layouts, plan, np.array(quota)) if pixels.layouts else None
    with torch.inference_mode():
        if packed is None:
            made = module(values, torch.tensor([budget]), torch.tensor(quota))
        else:
            further = [torch.from_numpy(array.values) for array in packed.arrays]
            made = module(values, *further, torch.tensor([packed.budget]), torch.from_numpy(packed.quota))
    tokens, positions, counts, saliency = made
    seen = VisualTokens(tokens.float().numpy(), positions.numpy(), counts.numpy(), saliency.numpy())
    return seen if packed is None else pictures_from_rows(seen, packed, pixels.layouts)


def features_from_torch(module: VisionModule, plan: ExportPlan, pixels: PixelBatch) -> FloatArray:
    """float32 [B, N, ..]: what the module's rule reads beside saliency, two pictures at a time; zero where a picture
    has no more tokens.
    """
    torch = require("torch")
    dtype, parts = next(module.parameters()).dtype, []
    with torch.inference_mode():
        for start in range(0, len(pixels), 2):
            few = pixels.part(start, start + 2)
            further = []
            if few.layouts:
                most = np.array([layout.tokens for layout in few.layouts])
                packed = packed_inputs(few.layouts, plan, most, "clip")
                further = [torch.from_numpy(array.values) for array in packed.arrays]
            parts.append(module.features_of(torch.from_numpy(few.pixel_values).to(dtype), *further).numpy())
    longest = max(part.shape[1] for part in parts)
    return np.concatenate([np.pad(part, ((0, 0), (0, longest - part.shape[1]), (0, 0))) for part in parts])


def tokens_from_reference(
    plan: ExportPlan,
    pixels: PixelBatch,
    seen: VisualTokens,
    budget: int,
    quota: list[int],
    features: FloatArray | None = None,
    spread: Spread = "frames",
) -> VisualTokens:
    """What the reference loops keep, given another back end's saliency (and [B, N, D] features, if the rule reads any).

    Positions only: the result's `tokens` have width 0.
    """
    assert seen.saliency is not None  # every comparison asks for it
    if not pixels.layouts:
        grid = plan.model.clip.grid
        kept = [
            positions_of(plan.policy, seen.saliency[image], quota[image], grid, _at(features, image))
            for image in range(len(seen))
        ]
        return positions_only(kept, budget)
    packed = packed_inputs(pixels.layouts, plan, np.array(quota), spread)
    found: list[list[Int64Array]] = [[] for _ in range(len(seen))]
    for row, crops in zip(packed.rows, packed.crops, strict=True):
        few = slice(row.start, row.start + row.layout.tokens)
        of_token = None if features is None else features[row.image, few]
        positions = _positions_of_row(plan, row, seen.saliency[row.image, few], of_token, crops)
        found[row.image].append(np.where(positions >= 0, positions + row.start, -1))
    return positions_only([np.concatenate(rows) for rows in found], seen.tokens.shape[1])


def _positions_of_row(
    plan: ExportPlan,
    row: GraphRow,
    saliency: npt.NDArray[np.float32],
    features: FloatArray | None,
    crops: Int64Array,
) -> Int64Array:
    if plan.start_counts:
        return official_qwen_positions(saliency, row.layout.source, row.quota)
    return positions_of(plan.policy, saliency, row.quota, None, features, crops, plan.tokens)


def _at(features: FloatArray | None, image: int) -> FloatArray | None:
    return None if features is None else features[image]


def gathered(full: VisualTokens, kept: VisualTokens) -> VisualTokens:
    """The rows of `full` (all N) at the positions that `kept` keeps; zero rows stay zero.

    A position that is none of the picture's tokens is the word before it (`official_qwen`): its row is zero as well.
    """
    there = (kept.positions >= 0) & (kept.positions < full.counts[:, None])
    tokens = np.take_along_axis(full.tokens, np.where(there, kept.positions, 0)[..., None], axis=1)
    return VisualTokens(np.where(there[..., None], tokens, 0), kept.positions, kept.counts, full.saliency)


def as_looked_at(plan: ExportPlan, pixels: PixelBatch, full: VisualTokens, quota: list[int]) -> VisualTokens:
    """`full` with the saliency that a graph gives: -1 for the tokens of frames that are not to keep any."""
    if not pixels.layouts or full.saliency is None:
        return full
    saliency = np.full_like(full.saliency, -1.0)
    for row in packed_inputs(pixels.layouts, plan, np.array(quota)).rows:
        few = slice(row.start, row.start + row.layout.tokens)
        saliency[row.image, few] = full.saliency[row.image, few]
    return VisualTokens(full.tokens, full.positions, full.counts, saliency)


#: precisions that ONNX Runtime's CPU provider can run (it has no bfloat16 convolution)
CPU_PRECISIONS = (Precision.FP32, Precision.FP16)
