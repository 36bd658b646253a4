"""Draw what a selection kept: the photograph with kept tokens lit, pruned ones dimmed, crop borders and quotas."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from holov_export.bundle import Bundle
from holov_export.errors import UsageError
from holov_export.policies import CropLayout, FeatureSource, SelectionPolicy, policy_from_settings
from holov_export.runtime.preprocess import image_from, pixels_from_images
from holov_export.runtime.runner import Runner, checked_budget
from holov_export.selection.geometry import crops_of_grid
from holov_export.selection.reference import positions_of
from holov_export.tensors import CropBox, Int64Array

#: share of a pruned token's brightness that is left
_DIM = 0.22
_BORDER = (255, 176, 0)
_CAPTION = 30
_GAP = 12
_FONT = 15


@dataclass(frozen=True)
class Panel:
    """One rule's result on one picture.

    Attributes:
        method: name of the graph or rule. policy: the rule.
        positions: kept, without padding and without CLS. zero_rows: rows that the rule filled with zeros.
        cls: the CLS token is kept as well.
    """

    method: str
    policy: SelectionPolicy
    positions: Int64Array
    zero_rows: int
    cls: bool = False


def panels_from_bundle(
    bundle: Bundle,
    open_runner: Callable[[Bundle], Runner],
    source: str | Path,
    budget: int,
    methods: Sequence[str],
) -> tuple[Image.Image, CropBox, list[Panel]]:
    """Run the bundle's graphs on a picture; rules that it does not hold decide from the same saliency.

    Args:
        open_runner: makes the runner of one of the bundle's graphs.
        budget: K. methods: names of graphs, or of rules that read no features.

    Returns:
        (upright picture, the part of it that the tower sees, one panel a method).

    Raises:
        UsageError: a method that the bundle has no graph for and that reads features.
    """
    model = bundle.manifest.plan.model
    picture = image_from(source)
    pixels = pixels_from_images([picture], model.image)
    budget = checked_budget(budget, model.vision.tokens)
    panels, saliency = [], None
    for method in methods:
        if method in bundle.methods:
            view = bundle.of_method(method)
            with open_runner(view) as runner:
                seen = runner.run(pixels, budget, saliency=True)
            policy, kept = view.manifest.plan.policy, seen.positions[0, : int(seen.counts[0])]
            if "@" not in method and seen.saliency is not None:
                saliency = seen.saliency[0]  # the same in every graph that cuts at the usual place
        else:
            policy = policy_from_settings(method)
            if policy.features is not FeatureSource.NONE:
                raise UsageError(
                    f"'{method}' reads features that this bundle does not give.",
                    hint=f"Export the bundle with --method {','.join([*bundle.methods, method])}.",
                )
            if saliency is None:
                plain = next((name for name in bundle.methods if "@" not in name), bundle.method)
                with open_runner(bundle.of_method(plain)) as runner:
                    seen = runner.run(pixels, budget, saliency=True)
                assert seen.saliency is not None
                saliency = seen.saliency[0]
            kept = positions_of(policy, saliency, budget, model.vision.grid)
        patches = kept[(kept >= 0) & (kept < model.vision.tokens)]
        whole = bool((kept == model.vision.tokens).any())
        panels.append(Panel(method, policy, patches, int((kept < 0).sum()), whole))
    return picture, pixels.boxes[0], panels


def picture_of_panels(
    picture: Image.Image, box: CropBox, panels: Sequence[Panel], grid: tuple[int, int], *, side: int = 480
) -> Image.Image:
    """The part of the picture that the tower sees, plain and then once for each rule, with captions.

    Args:
        picture: upright RGB. box: the part that the tower sees. grid: (rows, columns) of tokens.
        side: pixels of the longer side of a panel.

    Returns:
        the panels side by side.
    """
    seen = _seen_part(picture, box, side)
    total = grid[0] * grid[1]
    drawn = [(f"what the tower sees: {total} tokens", seen)]
    for panel in panels:
        zeros = f", {panel.zero_rows} zero rows" if panel.zero_rows else ", and CLS" if panel.cls else ""
        caption = f"{panel.method}: {len(panel.positions)} of {total}{zeros}"
        drawn.append((caption, _lit(seen, panel, grid)))
    canvas = Image.new("RGB", (len(drawn) * (seen.width + _GAP) - _GAP, seen.height + _CAPTION), (24, 24, 24))
    for index, (caption, image) in enumerate(drawn):
        left = index * (seen.width + _GAP)
        canvas.paste(image, (left, _CAPTION))
        ImageDraw.Draw(canvas).text((left + 4, 6), caption, fill=(235, 235, 235), font=_font())
    return canvas


def _font() -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    return ImageFont.load_default(_FONT)


def _seen_part(picture: Image.Image, box: CropBox, side: int) -> Image.Image:
    """Cut the box out of the picture (black where it passes the border), its longer side `side` pixels."""
    width, height = box.right - box.left, box.bottom - box.top
    scale = side / max(width, height)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    return picture.transform(
        size, Image.Transform.EXTENT, (box.left, box.top, box.right, box.bottom), Image.Resampling.BICUBIC
    )


def _lit(seen: Image.Image, panel: Panel, grid: tuple[int, int]) -> Image.Image:
    rows, columns = grid
    kept = np.zeros(rows * columns, dtype=np.uint8)
    kept[panel.positions] = 255
    mask = Image.fromarray(kept.reshape(grid)).resize(seen.size, Image.Resampling.NEAREST)
    grey = seen.convert("L").convert("RGB").point(lambda level: int(level * _DIM))
    lit = Image.composite(seen, grey, mask)
    layout = _layout_of(panel.policy)
    if layout is not None:
        _draw_crops(lit, panel, grid, layout)
    return lit


def _layout_of(policy: SelectionPolicy) -> CropLayout | None:
    """The layout of a rule's crops; None for rules without crops."""
    if "crops" not in type(policy).model_fields:
        return None
    return getattr(policy, "layout", CropLayout.STRIPS)


def _draw_crops(lit: Image.Image, panel: Panel, grid: tuple[int, int], layout: CropLayout) -> None:
    """Border lines between tokens of different crops, and each crop's count at its first token."""
    rows, columns = grid
    draw = ImageDraw.Draw(lit)
    crops = crops_of_grid(grid, int(getattr(panel.policy, "crops", 1)), layout)
    of_token = np.empty(rows * columns, dtype=np.int64)
    for index, crop in enumerate(crops):
        of_token[crop] = index
    square = of_token.reshape(grid)
    step_x, step_y = lit.width / columns, lit.height / rows
    for row in range(rows):
        for column in range(columns):
            x, y = column * step_x, row * step_y
            if column + 1 < columns and square[row, column] != square[row, column + 1]:
                draw.line([(x + step_x, y), (x + step_x, y + step_y)], fill=_BORDER, width=1)
            if row + 1 < rows and square[row, column] != square[row + 1, column]:
                draw.line([(x, y + step_y), (x + step_x, y + step_y)], fill=_BORDER, width=1)
    kept = np.isin(np.arange(rows * columns), panel.positions)
    for crop in crops:
        row, column = divmod(int(crop[0]), columns)
        where = (column * step_x + 3, row * step_y + 1)
        draw.text(where, str(int(kept[crop].sum())), fill=_BORDER, font=_font(), stroke_width=2, stroke_fill=(0, 0, 0))
