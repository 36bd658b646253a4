"""Small arguments that a vision module can be traced with: every axis that is dynamic is longer than one.

The numbers in them mean nothing; what fits together are the tables.
"""

from __future__ import annotations

import torch
from torch import Tensor

from holov_export.spec import ExportPlan, FramesSpec, QwenVisionSpec, VisionSpec
from holov_export.vision.loading import TORCH_DTYPES


def example_inputs(plan: ExportPlan) -> tuple[Tensor, ...]:
    """Arguments of the plan's vision module, in the order of `plan.signature`: two pictures that keep 2 and 1 tokens.

    Of packed graphs the pictures have unequal numbers of tokens, and of towers that read patches the windows and views
    unequal numbers of patches.
    """
    vision, dtype = plan.model.vision, TORCH_DTYPES[plan.precision]
    if isinstance(vision, QwenVisionSpec):
        inputs = _patches(vision, plan.tokens, dtype)
    elif plan.packed:
        with_cls = plan.part == "video" and isinstance(plan.model.video, FramesSpec) and plan.model.video.cls
        inputs = _views(vision, vision.tokens + with_cls, plan.tokens, dtype)
    else:
        inputs = (_pixels(2, vision, dtype),)
    budget = min(2, plan.tokens)
    return (*inputs, torch.tensor([budget]), torch.tensor([budget, 1]))


def _pixels(views: int, vision: VisionSpec, dtype: torch.dtype) -> Tensor:
    return torch.zeros(views, vision.channels, vision.image_size, vision.image_size, dtype=dtype)


def _views(vision: VisionSpec, rows: int, most: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Three views: two are the first picture's, of which it has one and a little, and one is the second's."""
    tokens = min(rows + 3, most)
    return (_pixels(3, vision, dtype), *_sources(tokens, 2 * rows, max(min(rows, tokens - 1), 1)))


def _patches(vision: QwenVisionSpec, most: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Two frames of a clip, each of one window and a row of tokens more, and a picture of one window."""
    side = vision.window_size // vision.patch_size // vision.merge
    whole, frame, row = side**2, side**2 + side, side * vision.unit
    window_rows, window_slots = _table([vision.window_patches, row] * 2 + [vision.window_patches])
    view_rows, view_slots = _table([frame * vision.unit] * 2 + [whole * vision.unit])
    patches = int(window_slots.shape[0])
    place = torch.arange(patches)
    pixels = torch.zeros(patches, vision.patch_values, dtype=dtype)
    places = torch.stack([place // vision.merge, place % vision.merge], dim=1)
    tables = (places, window_rows, window_slots, view_rows, view_slots)
    return (pixels, *tables, *_sources(min(2 * frame, most), 2 * frame, whole))


def _table(sizes: list[int]) -> tuple[Tensor, Tensor]:
    """(int64 [groups, longest], -1 where a group has fewer; int64 [sum of sizes], each member's place in it)."""
    filled = torch.arange(max(sizes)) < torch.tensor(sizes)[:, None]
    member = filled.flatten().long().cumsum(0).sub(1).unflatten(0, filled.shape)
    return torch.where(filled, member, -1), filled.flatten().nonzero().flatten()


def _sources(longer: int, first: int, shorter: int) -> tuple[Tensor, Tensor]:
    """(int64 [2, longer] source, int64 [2, longer] crops): `shorter` tokens of the second picture, from row `first`."""
    index = torch.arange(longer)
    source = torch.stack([index, torch.where(index < shorter, first + index, -1)])
    return source, torch.where(source >= 0, 0, -1)
