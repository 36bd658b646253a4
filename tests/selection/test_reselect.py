"""Rules that decide again after an earlier cut: tokens of negative saliency are gone and are never kept."""

from __future__ import annotations

import numpy as np
import pytest
from cases import NAMES, POLICIES, Floats, decided, features_of, hangs_on_rounding, kept, realistic

from holov_export.policies import HolovPlusPolicy, HolovPolicy, SelectionPolicy
from holov_export.selection.geometry import crops_of_grid
from holov_export.selection.reference import positions_of

AGAIN = [(policy, name) for policy, name in zip(POLICIES, NAMES, strict=True) if policy.reselects]
each_policy = pytest.mark.parametrize("policy", [policy for policy, _ in AGAIN], ids=[name for _, name in AGAIN])
#: crops keep their places and sizes, whatever is gone
WITHOUT_CROPS = [policy for policy, _ in AGAIN if not isinstance(policy, HolovPolicy | HolovPlusPolicy)]
GONE = [-1.0, -1e-6, -100.0]


def after_a_cut(images: int, tokens: int, seed: int, kind: str = "usual") -> tuple[Floats, Floats, list[int]]:
    """(saliency, features, how many are left) of pictures whose earlier cut has left all, some or one of the tokens."""
    dice = np.random.default_rng(seed)
    saliency, features = realistic(kind, images, tokens, dice), features_of(images, tokens, seed)
    left = [int(dice.integers(1, tokens + 1)) for _ in range(images - 2)] + [1, tokens]
    for image, many in enumerate(left):
        gone = dice.permutation(tokens)[many:]
        saliency[image, gone] = GONE[image % len(GONE)]
        features[image, gone] = 0
    return saliency, features, left


@pytest.mark.parametrize("kind", ["flat", "usual", "peaky"])
@each_policy
def test_only_tokens_that_are_left_are_kept(policy: SelectionPolicy, kind: str) -> None:
    """Quotas up to all that is left, in one batch: what is gone never comes back, and the reference says the same."""
    compared = 0
    for grid, images in (((4, 4), 60), ((12, 12), 12)):
        saliency, features, left = after_a_cut(images, grid[0] * grid[1], len(kind), kind)
        dice = np.random.default_rng(7)
        quota = [many if image % 3 == 0 else int(dice.integers(1, many + 1)) for image, many in enumerate(left)]
        for image, row in enumerate(kept(policy, saliency, quota, grid, features)):
            chosen = row[: quota[image]]
            assert (saliency[image, chosen] >= 0).all()
            assert len(set(chosen.tolist())) == quota[image]
            if quota[image] == left[image]:
                assert chosen.tolist() == np.flatnonzero(saliency[image] >= 0).tolist()
            if not hangs_on_rounding(policy, saliency[image], quota[image], grid, features[image]):
                compared += 1
                expected = positions_of(policy, saliency[image], quota[image], grid, features[image])
                assert chosen.tolist() == expected.tolist()
    assert compared >= 30


@pytest.mark.parametrize("policy", WITHOUT_CROPS, ids=[policy.method for policy in WITHOUT_CROPS])
def test_the_reference_without_what_is_gone(policy: SelectionPolicy) -> None:
    """Rules without crops keep what they would keep of the tokens that are left, if those were the whole picture."""
    saliency, features, left = after_a_cut(40, 36, 3)
    compared = 0
    for image, many in enumerate(left):
        alive = np.flatnonzero(saliency[image] >= 0)
        quota = (many + 1) // 2
        whole = positions_of(policy, saliency[image], quota, (6, 6), features[image])
        alone = positions_of(policy, saliency[image, alive], quota, (many, 1), features[image, alive])
        if not hangs_on_rounding(policy, saliency[image], quota, (6, 6), features[image]):
            compared += 1
            assert whole.tolist() == alive[alone].tolist()
    assert compared >= 10


def test_holov_means_are_over_whole_crops() -> None:
    """Two crops of four; half of the first is gone. Its share is its attention's, as if the two had got none."""
    saliency = np.array([[0.3, 0.1, -1, -1, 0.1, 0.1, 0.1, 0.1]], dtype=np.float32)
    as_zero = np.maximum(saliency, 0)
    policy, features = HolovPolicy(crops=2), features_of(1, 8, 0)
    assert [crop.tolist() for crop in crops_of_grid((2, 4), 2, policy.layout)] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    for quota, expected in ((2, [0, 4]), (3, [0, 1, 4]), (4, [0, 1, 4, 5]), (6, [0, 1, 4, 5, 6, 7])):
        assert kept(policy, saliency, [quota], (2, 4), features)[0, :quota].tolist() == expected
    assert kept(policy, as_zero, [4], (2, 4), features)[0, :4].tolist() == [0, 1, 4, 5]


@each_policy
def test_a_batch_with_one_small_picture(policy: SelectionPolicy) -> None:
    """The budget is larger than what one picture has left: its steps go on, and must not disturb what it has kept."""
    saliency, features = realistic("usual", 2, 16, np.random.default_rng(1)), features_of(2, 16, 1)
    saliency[0, 3:], features[0, 3:] = -1, 0
    together = decided(policy, saliency, [3, 16], (4, 4), features).positions.numpy()
    assert together[0].tolist() == [0, 1, 2] + [-1] * 13
    assert together[1].tolist() == list(range(16))
