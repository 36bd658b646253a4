"""The crops of pictures of several regions."""

from __future__ import annotations

import numpy as np
import pytest

from holov_export.policies import (
    CropLayout,
    HolovOfficialPolicy,
    HolovPlusPolicy,
    HolovPolicy,
    ScopePolicy,
    SelectionPolicy,
)
from holov_export.selection.geometry import (
    MOST_CROPS,
    crops_of_grid,
    crops_of_ids,
    crops_of_layout,
    crops_of_official_qwen,
    shares_of_regions,
)
from holov_export.tensors import CropBox, ImageLayout, Region

BOX = CropBox(0, 0, 1, 1)


def layout_of(*grids: tuple[int, int], cls: bool = False) -> ImageLayout:
    regions = tuple(Region(grid, BOX, cls=cls) for grid in grids)
    tokens = sum(region.tokens for region in regions)
    empty = np.zeros((0, 2), dtype=np.int64)
    return ImageLayout("image", 1, tokens, np.arange(tokens), regions, empty, empty[:, 0])


@pytest.mark.parametrize("crops", [1, 5, 6, 16, 100])
@pytest.mark.parametrize("layout", list(CropLayout))
@pytest.mark.parametrize("policy_type", [HolovPolicy, HolovPlusPolicy])
def test_one_region_has_the_crops_of_its_grid(
    policy_type: type[HolovPolicy] | type[HolovPlusPolicy], layout: CropLayout, crops: int
) -> None:
    for grid in ((24, 24), (4, 4), (7, 13), (1, 3)):
        ids = crops_of_layout(layout_of(grid), policy_type(crops=crops, layout=layout), 8)
        found, expected = crops_of_ids(ids), crops_of_grid(grid, crops, layout)
        assert ids.dtype == np.int64
        assert [crop.tolist() for crop in found] == [crop.tolist() for crop in expected]


def test_llava_next_shares_crops_by_tokens() -> None:
    """24 x 24 and 48 x 48: a fifth of 16 is 3.2, so 3 and 13; no crop reaches over the border."""
    layout = layout_of((24, 24), (48, 48))
    ids = crops_of_layout(layout, HolovPolicy(), 320)
    assert shares_of_regions(layout.regions, 16) == (3, 13)
    assert sorted(set(ids[:576].tolist())) == [0, 1, 2]
    assert sorted(set(ids[576:].tolist())) == list(range(3, 16))
    inside = np.array_split(np.arange(2304), 13)
    assert [crop.tolist() for crop in crops_of_ids(ids)[3:]] == [(part + 576).tolist() for part in inside]


@pytest.mark.parametrize(
    ("sizes", "crops", "expected"),
    [
        ([(1, 10), (1, 10)], 5, (3, 2)),  # equal remainders: the first
        ([(1, 1), (1, 99)], 16, (1, 15)),  # one at least
        ([(1, 1), (1, 1), (1, 98)], 4, (1, 1, 2)),
        ([(1, 1)] * 3 + [(10, 10)] * 2, 5, (1, 1, 1, 1, 1)),
        ([(1, 2), (1, 3), (1, 4)], 2, (1, 1, 1)),  # more regions than crops
        ([(2, 3), (2, 2)], 10, (6, 4)),
    ],
)
def test_shares_of_regions(sizes: list[tuple[int, int]], crops: int, expected: tuple[int, ...]) -> None:
    assert shares_of_regions(layout_of(*sizes).regions, crops) == expected


def test_shares_are_near_to_proportion() -> None:
    """No share is a whole crop off, but for those raised to one and those that pay for it; the sum is right."""
    dice = np.random.default_rng(0)
    for _ in range(300):
        sizes = [(int(rows), int(columns)) for rows, columns in dice.integers(1, 30, (dice.integers(1, 12), 2))]
        crops, regions = int(dice.integers(1, 40)), layout_of(*sizes).regions
        shares = shares_of_regions(regions, crops)
        total, tokens = max(crops, len(sizes)), sum(region.tokens for region in regions)
        assert sum(shares) == total
        assert min(shares) >= 1
        exact = [total * region.tokens / tokens for region in regions]
        if min(exact) >= 1:
            assert all(abs(share - wanted) < 1 for share, wanted in zip(shares, exact, strict=True))


def test_frames_with_cls_have_a_crop_each() -> None:
    """Eight frames of 257: two crops of each for 16; CLS is in its frame's first."""
    ids = crops_of_layout(layout_of(*[(16, 16)] * 8, cls=True), HolovPolicy(), 136)
    assert len(ids) == 8 * 257
    frames = ids.reshape(8, 257)
    for number, frame in enumerate(frames):
        assert frame.tolist() == [2 * number] * 129 + [2 * number + 1] * 128


@pytest.mark.parametrize("frames", [17, MOST_CROPS, MOST_CROPS + 1, 384])
def test_many_frames(frames: int) -> None:
    """Each has its own crop as long as there is room; then neighbours share one."""
    ids = crops_of_layout(layout_of(*[(2, 3)] * frames), HolovPolicy(), 10).reshape(frames, 6)
    assert (ids == ids[:, :1]).all()
    assert ids[:, 0].tolist() == sorted(ids[:, 0].tolist())
    assert sorted(set(ids[:, 0].tolist())) == list(range(min(frames, MOST_CROPS)))
    if frames <= MOST_CROPS:
        assert ids[:, 0].tolist() == list(range(frames))


def test_holov_official_knows_no_regions() -> None:
    layout = layout_of((24, 24), (40, 48))
    ids = crops_of_layout(layout, HolovOfficialPolicy(), 64)
    assert [crop.tolist() for crop in crops_of_ids(ids)] == [part.tolist() for part in np.array_split(range(2496), 16)]


def test_other_rules_have_one_crop() -> None:
    policy: SelectionPolicy = ScopePolicy()
    assert crops_of_layout(layout_of((2, 3), (1, 4)), policy, 2).tolist() == [0] * 10


@pytest.mark.parametrize(
    ("tokens", "keep", "strips"),
    [(1296, 144, 16), (1296, 259, 8), (1296, 288, 8), (1296, 432, 5), (1296, 1296, 1), (10, 9, 1), (1296, 10, 64)],
)
def test_official_qwen_strips(tokens: int, keep: int, strips: int) -> None:
    """A ninth: 16, a fifth: 8, 2/9: 8, a third: 5, as the published formula has them."""
    ids = crops_of_official_qwen(tokens, keep)
    assert [crop.tolist() for crop in crops_of_ids(ids)] == [
        part.tolist() for part in np.array_split(range(tokens), strips)
    ]


def test_ids_without_a_crop() -> None:
    assert [crop.tolist() for crop in crops_of_ids(np.array([3, -1, 0, 3]))] == [[2], [0, 3]]


@pytest.mark.parametrize("policy", [HolovPolicy(), HolovPlusPolicy(), HolovOfficialPolicy()])
def test_a_region_without_tokens_has_no_crop(policy: SelectionPolicy) -> None:
    """A thin picture of LLaVA-NeXT is unpadded until nothing of its tiles is left: only the base view counts."""
    for empty in ((0, 48), (48, 0)):
        ids = crops_of_layout(layout_of((24, 24), empty), policy, 64)
        assert ids.tolist() == crops_of_layout(layout_of((24, 24)), policy, 64).tolist()
