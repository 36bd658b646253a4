"""Panels of pictures with several views and of clips: what is lit, what is said, and that nothing is cut off."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from drawn_panels import UNDER_BLOCK_CAPTION, Texts, lit_tokens, record
from layouts import layout_of
from PIL import Image

from holov_export.policies import HolovPolicy
from holov_export.selection.geometry import crops_of_layout
from holov_export.tensors import CropBox, Int64Array, PixelBatch, Region
from holov_export.verify.panels import Panel, Subject, View
from holov_export.verify.picture import picture_of_panels


@pytest.fixture
def texts(monkeypatch: pytest.MonkeyPatch) -> Texts:
    return record(monkeypatch)


def view_of(name: str, grid: tuple[int, int], size: tuple[int, int], *, cls: bool = False, frame: int = 0) -> View:
    """Noise of about the same brightness everywhere."""
    region = Region(grid, CropBox(0, 0, *size), cls=cls, frame=frame)
    if not region.tokens:
        return View(name, None, region)
    values = np.random.default_rng(frame).integers(180, 220, (size[1], size[0], 3), dtype=np.uint8)
    return View(name, Image.fromarray(values), region)


def subject_of(views: Sequence[View], unit: str = "") -> Subject:
    layout = layout_of([view.region for view in views], "video" if unit else "image")
    pixels = PixelBatch(np.zeros((1, 3, 2, 2), np.float32), (views[0].region.box,), ((2, 2),), (layout,))
    return Subject(pixels, tuple(views), unit)


def crops_of(subject: Subject) -> Int64Array:
    return crops_of_layout(subject.pixels.layouts[0], HolovPolicy(crops=6), 1)


def check_nothing_is_cut(drawn: Image.Image, texts: Texts) -> None:
    """Every text is inside the picture, and no caption covers another one."""
    captions = [said for said in texts if not said.text.isdecimal()]
    for said in captions:
        left, top, right, bottom = said.box
        assert 0 <= left < right <= drawn.width, said
        assert 0 <= top < bottom <= drawn.height, said
    for number, one in enumerate(captions):
        for other in captions[:number]:
            beside = one.box[0] >= other.box[2] or one.box[2] <= other.box[0]
            assert beside or one.box[1] >= other.box[3] or one.box[3] <= other.box[1], (one, other)


@pytest.mark.parametrize(("size", "stacked"), [((300, 200), True), ((100, 300), False)])
def test_whole_picture_and_tiles(size: tuple[int, int], stacked: bool, texts: Texts) -> None:
    """Two views of unequal grids: one above the other, of upright pictures side by side."""
    subject = subject_of([view_of("whole picture", (4, 4), size), view_of("tiles", (6, 8), size)])
    kept = np.array([0, 3, 9, 16, 16 + 9, 16 + 47])
    drawn = picture_of_panels(subject, [Panel("holov", kept, crops=crops_of(subject)), Panel("uniform", kept[:2])])
    assert texts.captions.count("what the tower sees: 64 tokens") == 1
    plain = texts.below("what the tower sees: 64 tokens")
    assert [said.text for said in plain] == ["whole picture: 16 tokens", "tiles: 48 tokens"]
    assert (plain[0].at[0] == plain[1].at[0]) == stacked
    assert (plain[0].at[1] == plain[1].at[1]) != stacked
    for caption, counts, expected in [
        ("holov: 6 of 64", ["whole picture: 3 of 16", "tiles: 3 of 48"], ([0, 3, 9], [0, 9, 47])),
        ("uniform: 2 of 64", ["whole picture: 2 of 16", "tiles: 0 of 48"], ([0, 3], [])),
    ]:
        found = texts.below(caption)
        assert [said.text for said in found] == counts
        for before, after, view, tokens in zip(plain, found, subject.views, expected, strict=True):
            assert lit_tokens(drawn, before.corner(), after.corner(), view) == tokens
    check_nothing_is_cut(drawn, texts)


def test_counts_of_crops_add_up_in_each_view(texts: Texts) -> None:
    subject = subject_of([view_of("whole picture", (4, 4), (320, 320)), view_of("tiles", (6, 8), (320, 320))])
    kept = np.random.default_rng(1).choice(64, 20, replace=False)
    picture_of_panels(subject, [Panel("holov", np.sort(kept), crops=crops_of(subject))])
    counts = [int(said.text) for said in texts if said.text.isdecimal()]
    # crops of a view are drawn on its own picture, view after view: 2 of the 16 tokens, 4 of the 48
    assert len(counts) == 6
    assert (sum(counts[:2]), sum(counts[2:])) == ((kept < 16).sum(), (kept >= 16).sum())


def test_borders_are_between_crops_only() -> None:
    """Six strips of 6 x 8 tokens: lines below every row, none inside."""
    view = view_of("", (6, 8), (320, 240))
    subject = subject_of([view])
    crops = np.repeat(np.arange(6), 8)
    with_lines = np.asarray(picture_of_panels(subject, [Panel("holov", np.arange(48), crops=crops)]))[30:, 332:]
    without = np.asarray(picture_of_panels(subject, [Panel("holov", np.arange(48))]))[30:, 332:]
    changed = (with_lines != without).any(-1)[:, 40:]  # counts are at the left
    assert np.flatnonzero(changed.all(1)).tolist() == [40, 80, 120, 160, 200]
    assert not np.delete(changed, [40, 80, 120, 160, 200], axis=0).any()


def test_a_view_without_tokens(texts: Texts) -> None:
    subject = subject_of([view_of("whole picture", (4, 4), (300, 40)), view_of("tiles", (4, 0), (300, 40))])
    drawn = picture_of_panels(subject, [Panel("holov", np.array([5]), crops=np.zeros(16, np.int64))])
    assert [said.text for said in texts.below("holov: 1 of 16")] == ["whole picture: 1 of 16", "tiles: no tokens"]
    plain, kept = (texts.below(caption)[0] for caption in ("what the tower sees: 16 tokens", "holov: 1 of 16"))
    assert lit_tokens(drawn, plain.corner(), kept.corner(), subject.views[0]) == [5]
    check_nothing_is_cut(drawn, texts)


@pytest.mark.parametrize(("frames", "columns"), [(1, 1), (2, 2), (4, 4), (6, 3), (8, 4), (15, 5)])
def test_a_contact_sheet(frames: int, columns: int, texts: Texts) -> None:
    """CLS is the first of 13 tokens of a frame; it has no place in the picture and is named."""
    subject = subject_of(
        [view_of(f"frame {3 * number}", (3, 4), (160, 120), cls=True, frame=number) for number in range(frames)],
        "frame",
    )
    kept = np.array([13 * number + token for number in range(frames) for token in ((0, 4) if number % 2 else (1, 12))])
    drawn = picture_of_panels(subject, [Panel("holov", kept, spread="frames")])
    caption = f"what the tower sees: {13 * frames} tokens in {frames} frame{'' if frames == 1 else 's'}"
    plain, lit = (
        texts.below(caption),
        texts.below(f"holov: {2 * frames} of {13 * frames}, shared equally by the frames"),
    )
    assert [said.text for said in plain] == [f"frame {3 * number}: 13 tokens" for number in range(frames)]
    said = [f"frame {3 * number}: 2 of 13{', with CLS' if number % 2 else ''}" for number in range(frames)]
    assert [item.text for item in lit] == said
    assert len({item.at[0] for item in lit}) == columns
    for number, (before, after) in enumerate(zip(plain, lit, strict=True)):
        expected = [3] if number % 2 else [0, 11]
        assert lit_tokens(drawn, before.corner(), after.corner(), subject.views[number]) == expected
    check_nothing_is_cut(drawn, texts)


def test_what_is_kept_beside_tokens_is_said(texts: Texts) -> None:
    """In narrow pictures too, which then get the room that their captions need."""
    subject = subject_of([view_of("", (9, 2), (64, 288))])
    panel = Panel("holov-official", np.array([0, 17]), 3, beside="the word before the picture")
    drawn = picture_of_panels(subject, [panel])
    assert texts.captions == [
        "what the tower sees: 18 tokens",
        "holov-official: 2 of 18, 3 zero rows, and the word before the picture",
    ]
    plain, lit = (said.corner(UNDER_BLOCK_CAPTION) for said in texts)
    assert lit_tokens(drawn, plain, lit, subject.views[0]) == [0, 17]
    check_nothing_is_cut(drawn, texts)


def test_where_the_quota_of_a_clip_went_is_said(texts: Texts) -> None:
    views = [view_of(f"pair from frame {number}", (2, 3), (90, 60), frame=number) for number in (0, 2)]
    picture_of_panels(subject_of(views, "pair"), [Panel("scope", np.array([7, 8]), spread="clip")])
    assert "what the tower sees: 12 tokens in 2 pairs" in texts.captions
    (lit,) = (texts.below(caption) for caption in texts.captions if caption == "scope: 2 of 12, wherever in the clip")
    assert [said.text for said in lit] == ["pair from frame 0: 0 of 6", "pair from frame 2: 2 of 6"]


def test_counts_without_room_are_left_out(texts: Texts) -> None:
    """Rows of 8 pixels would lie under their numbers; captions have the counts of the frames."""
    views = [view_of("frame 0", (15, 15), (120, 120))]
    crops = np.repeat(np.arange(15), 15)
    drawn = picture_of_panels(subject_of(views, "frame"), [Panel("holov", np.array([0]), spread="clip", crops=crops)])
    assert not [said for said in texts if said.text.isdecimal()]
    assert (np.asarray(drawn) == (255, 176, 0)).all(-1).any(), "borders stay"
