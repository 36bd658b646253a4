"""What graphs and rules keep of one picture or clip, and what is seen there: `verify.picture` draws it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from holov_export.bundle import Bundle
from holov_export.errors import UsageError
from holov_export.policies import CropLayout, FeatureSource, SelectionPolicy, policy_from_settings
from holov_export.runtime.packing import Spread, packed_inputs
from holov_export.runtime.preprocess import image_from, pixels_from_pictures
from holov_export.runtime.preprocess_video import clip_from, pixels_from_videos
from holov_export.runtime.runner import Runner, checked_budget, default_quotas
from holov_export.selection.geometry import crops_of_grid
from holov_export.spec import ExportPlan, ModelSpec
from holov_export.tensors import CropBox, Int64Array, PixelBatch, Region, VisualTokens
from holov_export.verify.backends import tokens_from_reference


@dataclass(frozen=True)
class View:
    """A rectangle of tokens and what is seen there: a whole picture, its tiles together, a frame.

    Attributes:
        name: for captions; empty for the only one of a picture.
        seen: upright RGB, as large as it will be drawn; None where there are no tokens.
        region: the tokens.
    """

    name: str
    seen: Image.Image | None
    region: Region


@dataclass(frozen=True)
class Subject:
    """A picture or clip as the tower sees it.

    Attributes:
        pixels: a batch of it alone. views: their tokens, one view after another, are the N tokens.
        unit: what each view of a clip is: "frame", or "pair" of frames; empty for pictures.
    """

    pixels: PixelBatch
    views: tuple[View, ...]
    unit: str = ""

    @property
    def clip(self) -> bool:
        return bool(self.unit)

    @property
    def packed(self) -> bool:
        """It goes into a graph for which pictures have unequal numbers of tokens."""
        return bool(self.pixels.layouts)

    @property
    def tokens(self) -> int:
        """N"""
        return sum(view.region.tokens for view in self.views)


@dataclass(frozen=True)
class Panel:
    """What one rule keeps.

    Attributes:
        method: name of the graph or rule.
        positions: kept tokens, without padding and without what is no token of the N.
        zero_rows: rows that the rule filled with zeros.
        beside: what is kept and is none of the N tokens: "CLS", "the word before the picture"; empty for nothing.
        spread: how the quota of a clip was spent; None for pictures.
        crops: int64 [N], the crop of each token, -1 for none. Equal numbers of two frames may be different crops. None
            for rules without crops.
    """

    method: str
    positions: Int64Array
    zero_rows: int = 0
    beside: str = ""
    spread: Spread | None = None
    crops: Int64Array | None = None


def subject_from_picture(source: str | Path, model: ModelSpec, side: int) -> Subject:
    """Preprocess a picture.

    Args:
        side: pixels of the longer side of what is drawn.

    Raises:
        ImageError: it is refused.
    """
    picture = image_from(source)
    pixels = pixels_from_pictures([picture], model)
    if not pixels.layouts:
        box = pixels.boxes[0]
        return Subject(pixels, (View("", _seen_part(picture, box, side), Region(model.clip.grid, box)),))
    regions = pixels.layouts[0].regions
    names = ("",) if len(regions) == 1 else ("whole picture", "tiles")
    views = [View(name, _small_part(picture, part, side), part) for name, part in zip(names, regions, strict=True)]
    return Subject(pixels, tuple(views))


def subject_from_clip(source: str | Path, model: ModelSpec, side: int) -> Subject:
    """Preprocess a clip.

    Args:
        side: pixels of the longer side of a frame.

    Raises:
        VideoError, ImageError, MissingExtraError: it is refused, or cannot be read here.
        UsageError: the model takes none.
    """
    pixels = pixels_from_videos([source], model)
    regions = pixels.layouts[0].regions
    unit, what = ("pair", "pair from frame") if model.video.kind == "pairs" else ("frame", "frame")
    # one after the other: all frames of a long clip would fill gigabytes before they are made small
    frames = clip_from(source).frames([region.frame for region in regions])
    views = [
        View(f"{what} {region.frame}", _small_part(frame, region, side), region)
        for frame, region in zip(frames, regions, strict=True)
    ]
    return Subject(pixels, tuple(views), unit)


def _small_part(picture: Image.Image, region: Region, side: int) -> Image.Image | None:
    """`_seen_part` of a region; smooth also where a large picture becomes very small.

    What is much longer than wide is drawn wider than it is, so that its tokens can be told apart.
    """
    if not region.tokens:
        return None
    box = region.box
    factor = int(max(box.right - box.left, box.bottom - box.top) // (2 * side))
    if factor > 1:
        picture = picture.reduce(factor)
        box = CropBox(box.left / factor, box.top / factor, box.right / factor, box.bottom / factor)
    rows, columns = region.grid
    return _seen_part(picture, box, side, least=(min(side // 8, 4 * columns), min(side // 8, 4 * rows)))


def _seen_part(picture: Image.Image, box: CropBox, side: int, least: tuple[int, int] = (1, 1)) -> Image.Image:
    """Cut the box out of the picture (black where it passes the border), its longer side `side` pixels.

    Args:
        least: width and height that it has at least, whatever its aspect ratio.
    """
    width, height = box.right - box.left, box.bottom - box.top
    scale = side / max(width, height)
    size = (max(least[0], round(width * scale)), max(least[1], round(height * scale)))
    return picture.transform(
        size, Image.Transform.EXTENT, (box.left, box.top, box.right, box.bottom), Image.Resampling.BICUBIC
    )


def panels_from_bundle(
    bundle: Bundle,
    open_runner: Callable[[Bundle], Runner],
    pixels: PixelBatch,
    budget: int | None,
    methods: Sequence[str],
    spread: Spread = "frames",
) -> list[Panel]:
    """Run the bundle's graphs on a picture or clip; rules that it does not hold decide from the same saliency.

    Args:
        bundle: with the graph of the part that sees it. open_runner: makes the runner of one of the bundle's graphs.
        pixels: a batch of one.
        budget: tokens, 1..N of the largest picture; None for the usual number.
        methods: names of graphs, or of rules that read no features.
        spread: of clips.

    Returns:
        one panel a method.

    Raises:
        BudgetError: a budget outside its range.
        UsageError: a method that the bundle has no graph for, and that reads features or cannot decide here.
    """
    plan = bundle.manifest.plan
    plans = [_plan_of(method, bundle) for method in methods]
    quota = default_quotas(plan, pixels)[0] if budget is None else checked_budget(budget, plan.tokens)
    whole: VisualTokens | None = None
    panels = []
    for method, ruled in zip(methods, plans, strict=True):
        if method in bundle.methods:
            with open_runner(bundle.of_method(method)) as runner:
                seen = runner.run(pixels, quota, saliency=True, spread=spread)
            if "@" not in method and seen.saliency is not None and bool((seen.saliency >= 0).all()):
                whole = seen  # its saliency is the same in every graph that cuts at the usual place
        else:
            whole = _whole(bundle, open_runner, pixels, quota) if whole is None else whole
            seen = tokens_from_reference(ruled, pixels, whole, quota, [quota], spread=spread)
        kept = seen.positions[0, : int(seen.counts[0])]
        panels.append(_panel(method, ruled, pixels, kept, quota, spread))
    return panels


def _plan_of(method: str, bundle: Bundle) -> ExportPlan:
    """The plan of the bundle's graph for a method, or what it would be for a rule that needs no graph of its own."""
    if method in bundle.methods:
        return bundle.of_method(method).manifest.plan
    plan, policy = bundle.manifest.plan, policy_from_settings(method)
    if plan.packed and not policy.packs:
        raise UsageError(
            f"'{method}' cannot decide where pictures have unequal numbers of tokens, as in '{plan.model.name}'.",
            hint="Choose another rule: holov-export methods",
        )
    if policy.features is not FeatureSource.NONE:
        raise UsageError(
            f"'{method}' reads features that this bundle does not give.",
            hint=f"Export the bundle with --method {','.join([*bundle.methods, method])}.",
        )
    return plan.model_copy(update={"policy": policy, "cuts": (), "also": ()})


def _whole(bundle: Bundle, open_runner: Callable[[Bundle], Runner], pixels: PixelBatch, quota: int) -> VisualTokens:
    """With the saliency of all N tokens; an equal spread may leave frames out."""
    plain = next((name for name in bundle.methods if "@" not in name), bundle.method)
    with open_runner(bundle.of_method(plain)) as runner:
        return runner.run(pixels, quota, saliency=True, spread="clip")


def _panel(method: str, plan: ExportPlan, pixels: PixelBatch, kept: Int64Array, quota: int, spread: Spread) -> Panel:
    layout = pixels.layouts[0] if pixels.layouts else None
    tokens = layout.tokens if layout is not None else plan.model.clip.tokens
    clip = layout is not None and layout.kind == "video"
    other = "CLS" if layout is None else f"the word before the {'clip' if clip else 'picture'}"
    return Panel(
        method=method,
        positions=kept[(kept >= 0) & (kept < tokens)],
        zero_rows=int((kept < 0).sum()),
        beside=other if bool((kept == tokens).any()) else "",
        spread=(spread if plan.policy.spreads else "clip") if clip else None,
        crops=_crops(plan, pixels, quota, spread),
    )


def _crops(plan: ExportPlan, pixels: PixelBatch, quota: int, spread: Spread) -> Int64Array | None:
    """int64 [N]; None for rules without crops."""
    if "crops" not in type(plan.policy).model_fields:
        return None
    if not pixels.layouts:
        return _crops_of_grid(plan.policy, plan.model.clip.grid)
    packed = packed_inputs(pixels.layouts, plan, np.array([quota]), spread)
    found = np.full(pixels.layouts[0].tokens, -1, dtype=np.int64)
    for row, crops in zip(packed.rows, packed.crops, strict=True):
        found[row.start : row.start + row.layout.tokens] = crops
    if plan.start_counts:  # of its candidates, the word before the picture and all tokens but the last
        return np.append(found[1:], -1)
    return found


def _crops_of_grid(policy: SelectionPolicy, grid: tuple[int, int]) -> Int64Array:
    layout = getattr(policy, "layout", CropLayout.STRIPS)
    found = np.empty(grid[0] * grid[1], dtype=np.int64)
    for index, crop in enumerate(crops_of_grid(grid, int(getattr(policy, "crops", 1)), layout)):
        found[crop] = index
    return found
