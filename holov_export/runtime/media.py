"""Images and clips of several prompts become batches for the vision graphs that see them, each with its quota."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Literal

from holov_export.errors import ImageError, UnknownNameError
from holov_export.runtime.packing import SPREADS, Spread
from holov_export.runtime.preprocess import ImageSource, pixels_from_pictures
from holov_export.runtime.preprocess_video import (
    VideoSource,
    check_takes_videos,
    joined_batches,
    pixels_from_videos,
)
from holov_export.runtime.runner import chosen_budget, default_budget, default_quotas, quota_array
from holov_export.spec import ExportPlan, ModelSpec
from holov_export.tensors import CropBox, ImageRows, Int64Array, PixelBatch, Region

Part = Literal["image", "video"]


@dataclass(frozen=True)
class Media:
    """What one prompt is about, in the order of its placeholders: its images and its clips."""

    images: Sequence[ImageSource]
    videos: Sequence[VideoSource] = ()


@dataclass(frozen=True)
class MediaBatch:
    """Images and clips that go into one vision graph together.

    Attributes:
        part: the graph that sees them.
        owners: of each of them its index among the images and clips of all prompts.
        quota: tokens of each of them.
    """

    part: Part
    pixels: PixelBatch
    owners: tuple[int, ...]
    quota: tuple[int, ...]


@dataclass(frozen=True)
class PreparedMedia:
    """What can go into the vision graphs, and how many seconds preprocessing it took."""

    batches: tuple[MediaBatch, ...]
    spread: Spread
    seconds: float


@dataclass(frozen=True)
class Seen:
    """What is seen of one prompt's images and clips.

    Attributes:
        images, videos: their rows.
        regions: of each image and then of each clip, where its tokens are (see `boxes_of_tokens`).
    """

    images: tuple[ImageRows, ...]
    videos: tuple[ImageRows, ...]
    regions: tuple[tuple[Region, ...], ...]


def regions_of(prepared: PreparedMedia, model: ModelSpec) -> list[tuple[Region, ...]]:
    """Where the tokens of each image and clip are, in the order of the prompts."""
    found: dict[int, tuple[Region, ...]] = {}
    for batch in prepared.batches:
        for index, owner in enumerate(batch.owners):
            pixels = batch.pixels
            if pixels.layouts:
                found[owner] = pixels.layouts[index].regions
            else:
                found[owner] = (Region(model.clip.grid, pixels.boxes[index]),)
    return [found[owner] for owner in sorted(found)]


def boxes_of_tokens(positions: Int64Array, regions: Sequence[Region]) -> list[CropBox | None]:
    """The part of the upright original that each token shows; None for a CLS token and where there is no token."""
    boxes: list[CropBox | None] = []
    for region in regions:
        rows, columns = region.grid
        width = (region.box.right - region.box.left) / columns
        height = (region.box.bottom - region.box.top) / rows
        if region.cls:
            boxes.append(None)
        for index in range(rows * columns):
            row, column = divmod(index, columns)
            left, top = region.box.left + column * width, region.box.top + row * height
            boxes.append(CropBox(left, top, left + width, top + height))
    return [boxes[place] if 0 <= place < len(boxes) else None for place in positions.tolist()]


def media_from_groups(
    groups: Sequence[Media], plan: ExportPlan, budget: int | None, quota: Sequence[int] | None, spread: Spread
) -> PreparedMedia:
    """Preprocess the images and clips of all prompts.

    Args:
        budget, quota, spread: as of `Session.ask`; quotas in the order of the prompts, a prompt's images first.

    Raises:
        BudgetError: a budget or quota outside its range.
        ImageError: an image or clip is refused, or there is none.
        UsageError: the model takes no clips, or an unknown spread.
    """
    if spread not in SPREADS:
        raise UnknownNameError(f"unknown spread '{spread}'.", hint=f"Known: {', '.join(SPREADS)}.")
    kinds: list[Part] = []
    for group in groups:
        kinds.extend("image" for _ in group.images)
        kinds.extend("video" for _ in group.videos)
    if not kinds:
        raise ImageError("there is no image.")
    if "video" in kinds:
        check_takes_videos(plan.model)
    if budget is not None or quota is not None:
        largest = max(plan.of_part(part).tokens for part in plan.parts)
        budget = chosen_budget(budget, quota, largest, default_budget(plan))
        quota = quota_array(quota, budget, len(kinds)).tolist()
    began = perf_counter()
    batches = _batches(groups, kinds, plan, quota)
    return PreparedMedia(batches, spread, perf_counter() - began)


def _batches(
    groups: Sequence[Media], kinds: Sequence[Part], plan: ExportPlan, quota: Sequence[int] | None
) -> tuple[MediaBatch, ...]:
    """One batch for each graph that has something to see."""
    images = [image for group in groups for image in group.images]
    videos = [video for group in groups for video in group.videos]
    of_images = tuple(index for index, kind in enumerate(kinds) if kind == "image")
    of_videos = tuple(index for index, kind in enumerate(kinds) if kind == "video")
    made: list[tuple[Part, PixelBatch, tuple[int, ...]]] = []
    if images:
        made.append(("image", pixels_from_pictures(images, plan.model), of_images))
    if videos:
        pixels = pixels_from_videos(videos, plan.model)
        if images and len(plan.parts) == 1:
            made = [("image", joined_batches(made[0][1], pixels), (*of_images, *of_videos))]
        else:
            made.append((plan.parts[-1], pixels, of_videos))
    return tuple(
        MediaBatch(part, pixels, owners, _quotas(plan.of_part(part), pixels, owners, quota))
        for part, pixels, owners in made
    )


def _quotas(
    plan: ExportPlan, pixels: PixelBatch, owners: Sequence[int], quota: Sequence[int] | None
) -> tuple[int, ...]:
    """Of each image or clip of one batch; none is larger than what the graph's axis can hold."""
    if quota is None:
        return tuple(default_quotas(plan, pixels))
    return tuple(min(quota[owner], plan.tokens) for owner in owners)
