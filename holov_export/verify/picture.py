"""Draw what a selection kept: the picture with kept tokens lit, pruned ones dimmed, crop borders and quotas.

A picture has its panels side by side, a clip its contact sheets one below the other.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from holov_export.tensors import Int64Array
from holov_export.verify.panels import Panel, Subject, View

#: share of a pruned token's brightness that is left
_DIM = 0.22
_BORDER = (255, 176, 0)
_TEXT = (235, 235, 235)
_BACKGROUND = (24, 24, 24)
_CAPTION = 30
_GAP = 12
#: between pictures of several views beside each other
_WIDE_GAP = 36
_FONT = 15
#: of the captions of single views
_VIEW_CAPTION = 22
_VIEW_FONT = 13
#: of the counts in frames of a clip
_FRAME_FONT = 11


@dataclass(frozen=True)
class _Cell:
    """A view as it is drawn; without a caption for the only one of a picture."""

    caption: str
    image: Image.Image | None


@dataclass(frozen=True)
class _Block:
    """All views once: as they are, or with what one rule keeps."""

    caption: str
    cells: list[_Cell]


def picture_of_panels(subject: Subject, panels: Sequence[Panel]) -> Image.Image:
    """What the tower sees, plain and then once for each rule, with captions."""
    blocks = [_plain(subject), *(_of_panel(subject, panel) for panel in panels)]
    columns = _columns(subject)
    cell = _cell_size(blocks, fit=subject.packed)
    size = _block_size(blocks, columns, cell, fit=subject.packed)
    gap = _GAP if columns == 1 else _WIDE_GAP
    step = (0, size[1] + gap) if subject.clip else (size[0] + gap, 0)
    last = len(blocks) - 1
    canvas = Image.new("RGB", (size[0] + last * step[0], size[1] + last * step[1]), _BACKGROUND)
    for number, block in enumerate(blocks):
        _draw_block(canvas, block, (number * step[0], number * step[1]), columns, cell)
    return canvas


def _plain(subject: Subject) -> _Block:
    count = len(subject.views)
    views = f" in {count} {subject.unit}{'' if count == 1 else 's'}" if subject.clip else ""
    cells = [_Cell(_caption(view, f"{view.region.tokens} tokens"), view.seen) for view in subject.views]
    return _Block(f"what the tower sees: {subject.tokens} tokens{views}", cells)


def _of_panel(subject: Subject, panel: Panel) -> _Block:
    kept = np.zeros(subject.tokens, dtype=np.bool_)
    kept[panel.positions] = True
    zeros = f", {panel.zero_rows} zero rows" if panel.zero_rows else ""
    beside = f", and {panel.beside}" if panel.beside else ""
    spread = {"frames": ", shared equally by the frames", "clip": ", wherever in the clip", None: ""}[panel.spread]
    cells, start = [], 0
    for view in subject.views:
        few = slice(start, start + view.region.tokens)
        cells.append(_lit_cell(subject, view, kept[few], None if panel.crops is None else panel.crops[few]))
        start = few.stop
    caption = f"{panel.method}: {len(panel.positions)} of {subject.tokens}{zeros}{beside}{spread}"
    return _Block(caption, cells)


def _lit_cell(subject: Subject, view: View, kept: npt.NDArray[np.bool_], crops: Int64Array | None) -> _Cell:
    region = view.region
    with_cls = ", with CLS" if region.cls and bool(kept[0]) else ""
    caption = _caption(view, f"{int(kept.sum())} of {region.tokens}{with_cls}")
    if view.seen is None:
        return _Cell(caption, None)
    first = int(region.cls)
    mask = Image.fromarray(kept[first:].reshape(region.grid).astype(np.uint8) * 255)
    mask = mask.resize(view.seen.size, Image.Resampling.NEAREST)
    grey = view.seen.convert("L").convert("RGB").point(lambda level: int(level * _DIM))
    lit = Image.composite(view.seen, grey, mask)
    if crops is not None:
        _draw_borders(lit, crops[first:].reshape(region.grid))
        _draw_counts(lit, kept, crops, subject, view)
    return _Cell(caption, lit)


def _caption(view: View, said: str) -> str:
    return f"{view.name}: {said if view.region.tokens else 'no tokens'}" if view.name else ""


def _draw_borders(lit: Image.Image, crops: Int64Array) -> None:
    """Lines between tokens [rows, columns] of different crops."""
    rows, columns = crops.shape
    draw = ImageDraw.Draw(lit)
    step_x, step_y = lit.width / columns, lit.height / rows
    for row in range(rows):
        for column in range(columns):
            x, y = column * step_x, row * step_y
            if column + 1 < columns and crops[row, column] != crops[row, column + 1]:
                draw.line([(x + step_x, y), (x + step_x, y + step_y)], fill=_BORDER, width=1)
            if row + 1 < rows and crops[row, column] != crops[row + 1, column]:
                draw.line([(x, y + step_y), (x + step_x, y + step_y)], fill=_BORDER, width=1)


def _draw_counts(
    lit: Image.Image, kept: npt.NDArray[np.bool_], crops: Int64Array, subject: Subject, view: View
) -> None:
    """What each crop keeps in this view, at its first token; but for squares only if there is room."""
    size = _FRAME_FONT if subject.clip else _FONT
    rows, columns = view.region.grid
    draw = ImageDraw.Draw(lit)
    step_x, step_y = lit.width / columns, lit.height / rows
    of_patch = crops[int(view.region.cls) :].reshape(rows, columns)
    places = {int(crop): np.nonzero(of_patch == crop) for crop in np.unique(of_patch[of_patch >= 0])}
    if subject.packed and places:
        width = np.mean([np.ptp(across) + 1 for _, across in places.values()]) * step_x
        height = np.mean([np.ptp(down) + 1 for down, _ in places.values()]) * step_y
        if width < 1.2 * size or height < size:
            return
    for crop, (down, across) in places.items():
        where = (int(across[0]) * step_x + 3, int(down[0]) * step_y + 1)
        count = str(int(kept[crops == crop].sum()))
        draw.text(where, count, fill=_BORDER, font=_font(size), stroke_width=2, stroke_fill=(0, 0, 0))


def _columns(subject: Subject) -> int:
    """Views beside each other."""
    count, first = len(subject.views), subject.views[0].seen
    if subject.clip:
        return math.ceil(count / max(1, round(math.sqrt(count / 2))))
    return count if first is not None and first.height > first.width else 1


def _cell_size(blocks: Sequence[_Block], *, fit: bool) -> tuple[int, int]:
    """(width, height) of a view with its caption.

    Args:
        fit: as wide as the captions, too.
    """
    cells = [cell for block in blocks for cell in block.cells]
    images = [cell.image for cell in cells if cell.image is not None]
    width, height = max(image.width for image in images), max(image.height for image in images)
    if fit:
        width = max(width, *(_text_width(cell.caption, _VIEW_FONT) for cell in cells))
    return width, height + (_VIEW_CAPTION if cells[0].caption else 0)


def _block_size(blocks: Sequence[_Block], columns: int, cell: tuple[int, int], *, fit: bool) -> tuple[int, int]:
    rows = math.ceil(len(blocks[0].cells) / columns)
    width, height = (count * (size + _GAP) - _GAP for count, size in zip((columns, rows), cell, strict=True))
    if fit:
        width = max(width, *(_text_width(block.caption, _FONT) for block in blocks))
    return width, height + _CAPTION


def _draw_block(
    canvas: Image.Image, block: _Block, corner: tuple[int, int], columns: int, cell: tuple[int, int]
) -> None:
    draw = ImageDraw.Draw(canvas)
    for number, item in enumerate(block.cells):
        row, column = divmod(number, columns)
        left, top = corner[0] + column * (cell[0] + _GAP), corner[1] + _CAPTION + row * (cell[1] + _GAP)
        if item.caption:
            draw.text((left + 4, top + 2), item.caption, fill=_TEXT, font=_font(_VIEW_FONT))
            top += _VIEW_CAPTION
        if item.image is not None:
            canvas.paste(item.image, (left, top))
    draw.text((corner[0] + 4, corner[1] + 6), block.caption, fill=_TEXT, font=_font(_FONT))


def _text_width(text: str, size: int) -> int:
    """Pixels of a line with its margins."""
    return math.ceil(_font(size).getlength(text)) + 8


def _font(size: int) -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    return ImageFont.load_default(size)
