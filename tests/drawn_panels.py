"""What is on a picture that `verify.picture` has drawn: its texts, and which tokens are lit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw

from holov_export.verify.panels import View

#: from the top left corner of a text to that of the picture below it
UNDER_BLOCK_CAPTION = (-4, 24)
UNDER_VIEW_CAPTION = (-4, 20)


@dataclass(frozen=True)
class Said:
    """A text, where it was put, and what it covers: left, top, right, bottom in pixels."""

    text: str
    at: tuple[float, float]
    box: tuple[float, float, float, float]

    def corner(self, step: tuple[int, int] = UNDER_VIEW_CAPTION) -> tuple[int, int]:
        """(left, top) of the picture below it."""
        return round(self.at[0]) + step[0], round(self.at[1]) + step[1]


class Texts(list[Said]):
    """All texts that were drawn, in order."""

    @property
    def captions(self) -> list[str]:
        """From the top to the bottom, without the counts of crops."""
        return [said.text for said in self._captions()]

    def _captions(self) -> list[Said]:
        return sorted((said for said in self if not said.text.isdecimal()), key=lambda said: said.at[::-1])

    def below(self, caption: str) -> list[Said]:
        """The captions of the views of the block that has this caption."""
        order = self._captions()
        (block,) = (said for said in order if said.text == caption)
        others = [said for said in order if said.at[1] == block.at[1]]
        right = min((said.at[0] for said in others if said.at[0] > block.at[0]), default=float("inf"))
        blocks = [said for said in order if said.at[0] == block.at[0] and _starts_block(said)]
        bottom = min((said.at[1] for said in blocks if said.at[1] > block.at[1]), default=float("inf"))
        return [said for said in order if block.at[0] <= said.at[0] < right and block.at[1] < said.at[1] < bottom]


def _starts_block(said: Said) -> bool:
    return not said.text.startswith(("whole picture", "tiles", "frame", "pair"))


def record(monkeypatch: pytest.MonkeyPatch) -> Texts:
    """Texts that are drawn from now on."""
    texts = Texts()
    draw = ImageDraw.ImageDraw.text

    def text(self: ImageDraw.ImageDraw, xy: tuple[float, float], text: str, **settings: Any) -> None:
        texts.append(Said(text, xy, self.textbbox(xy, text, font=settings["font"])))
        draw(self, xy, text, **settings)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", text)
    return texts


def lit_tokens(drawn: Image.Image, plain: tuple[int, int], corner: tuple[int, int], view: View) -> list[int]:
    """Raster numbers of the tokens of a view whose picture at `corner` is as bright as at `plain`; the others must be
    as dim as pruned ones.

    Medians are compared: lines and counts of crops cover less than half of a token.
    """
    assert view.seen is not None
    width, height = view.seen.size
    rows, columns = view.region.grid
    before, after = (
        np.asarray(drawn.convert("L").crop((left, top, left + width, top + height)), dtype=np.float64)
        for left, top in (plain, corner)
    )
    found = []
    for row in range(rows):
        for column in range(columns):
            part = (
                slice(round(row * height / rows), round((row + 1) * height / rows)),
                slice(round(column * width / columns), round((column + 1) * width / columns)),
            )
            ratio = np.median(after[part]) / np.median(before[part])
            assert 0.85 < ratio < 1.1 or 0.15 < ratio < 0.35, (row, column, ratio)
            if ratio > 0.5:
                found.append(row * columns + column)
    return found
