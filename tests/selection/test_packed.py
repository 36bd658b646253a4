"""Selection of pictures of unequal numbers of tokens: the packed rules are the reference, picture by picture."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from selection.cases import NAMES, POLICIES
from selection.packed_cases import LARGEST, Packed, check_kept, packed_inputs

from holov_export.policies import (
    CropLayout,
    HolovOfficialPolicy,
    HolovPaperPolicy,
    HolovPlusPolicy,
    HolovPolicy,
    NoSelection,
    RandomPolicy,
    SelectionPolicy,
    UniformPolicy,
    VisionzipPolicy,
)
from holov_export.selection.crop_ids import CropIds
from holov_export.selection.geometry import MOST_CROPS, crops_of_grid, most_crops
from holov_export.selection.packed import Kept, PackedSelection
from holov_export.selection.reference import official_quotas as loops_quotas
from holov_export.selection.reference import positions_of, random_order
from holov_export.selection.registry import rule_from_policy
from holov_export.selection.rule import ranks

PACKING = [(policy, name) for policy, name in zip(POLICIES, NAMES, strict=True) if policy.packs]
PACKING.append((NoSelection(), "none"))
each_policy = pytest.mark.parametrize("policy", [policy for policy, _ in PACKING], ids=[name for _, name in PACKING])
WITH_CROPS = (HolovPolicy, HolovPlusPolicy, HolovOfficialPolicy)


def run(policy: SelectionPolicy, given: Packed) -> Kept:
    with torch.no_grad():
        kept: Kept = PackedSelection(policy, LARGEST)(*given.tensors())
    assert kept.rows.dtype == kept.positions.dtype == kept.counts.dtype == torch.int64
    return kept


@each_policy
def test_each_picture_is_the_reference(policy: SelectionPolicy) -> None:
    compared = pictures = 0
    for seed in range(24):
        dice = np.random.default_rng(seed)
        sizes = [int(size) for size in dice.integers(1, 40, 1 + seed % 5)]
        given = packed_inputs(sizes, seed, spare=seed % 4, crops=1 + seed % 9)
        compared += check_kept(policy, given, run(policy, given))
        pictures += len(sizes)
    assert compared >= 0.7 * pictures


@each_policy
def test_exact_inputs_leave_little_out(policy: SelectionPolicy) -> None:
    """Many ties: the lower position must win. The quotas' floors and the DPP's roots round even here."""
    if isinstance(policy, HolovPlusPolicy):
        pytest.skip("subtracts a mean, after which ties are not exact any more")
    rounds = isinstance(policy, WITH_CROPS) or policy.method in ("cdpruner-unconditional", "scope")
    compared = 0
    for seed in range(12):
        given = packed_inputs([11, 30, 1, 17], seed, exact=True, spare=3)
        compared += check_kept(policy, given, run(policy, given), exact=not rounds)
    assert compared >= 12


@each_policy
def test_a_batch_is_its_pictures(policy: SelectionPolicy) -> None:
    """With no place to spare a picture keeps what it keeps beside a larger one; sums of other lengths may round."""
    same = pictures = 0
    for seed in range(10):
        given = packed_inputs([25, 3, 12, 40], seed, spare=2)
        together = run(policy, given)
        for index in range(4):
            alone = run(policy, given.alone(index))
            count = int(alone.counts[0])
            assert count == int(together.counts[index])
            same += torch.equal(alone.rows[0], together.rows[index, :count])
            pictures += 1
    assert same >= (pictures if policy.features.value == "none" else 0.95 * pictures)


@each_policy
def test_full_budget_keeps_all(policy: SelectionPolicy) -> None:
    given = packed_inputs([25, 3, 12, 40], 2, spare=1)
    kept = run(policy, Packed(given.saliency, given.features, given.source, given.crops, 99, np.full(4, 99)))
    assert kept.counts.tolist() == [25, 3, 12, 40]
    if policy.lossless_at_full:
        for index, size in enumerate((25, 3, 12, 40)):
            assert kept.positions[index].tolist() == [*range(size), *[-1] * (41 - size)]


@each_policy
def test_the_order_of_the_batch_and_of_the_rows_is_no_matter(policy: SelectionPolicy) -> None:
    given = packed_inputs([25, 3, 12, 40], 4)
    dice = np.random.default_rng(0)
    order, rows = dice.permutation(4), dice.permutation(len(given.saliency))
    source = np.where(given.source >= 0, np.argsort(rows)[given.source], -1)[order]
    other = Packed(
        given.saliency[rows], given.features[rows], source, given.crops[order], given.budget, given.quota[order]
    )
    assert torch.equal(run(policy, given).positions[torch.from_numpy(order)], run(policy, other).positions)


@pytest.mark.parametrize("layout", list(CropLayout))
@pytest.mark.parametrize("policy_type", WITH_CROPS)
def test_one_square_picture_is_the_fixed_rule(policy_type: type[SelectionPolicy], layout: CropLayout) -> None:
    """The same crops as data and as a table: the same positions, and the same order of `holov-official`."""
    if policy_type is HolovOfficialPolicy and layout is CropLayout.TILES:
        pytest.skip("holov-official has strips only")
    settings = {"crops": 6} if policy_type is HolovOfficialPolicy else {"crops": 6, "layout": layout}
    policy, same = policy_type(**settings), 0
    ids = np.zeros(64, dtype=np.int64)
    for number, members in enumerate(crops_of_grid((8, 8), 6, layout)):
        ids[members] = number
    for seed in range(40):
        given = packed_inputs([64], seed, crops=6)
        given = Packed(given.saliency, given.features, given.source, ids[None], given.budget, given.quota)
        saliency, features, _ = given.picture(0)
        asked = torch.tensor([given.wanted(0)])
        with torch.no_grad():
            fixed = rule_from_policy(policy, (8, 8))(
                torch.from_numpy(saliency)[None], torch.from_numpy(features)[None], asked, asked
            ).positions[:, : int(asked)]
        same += torch.equal(run(policy, given).positions[:, : int(asked)], fixed)
    assert same >= 39  # a floor may hang on the last bit of a mean


@pytest.mark.parametrize("policy", [VisionzipPolicy(), HolovPaperPolicy()])
def test_what_does_not_pack_is_refused(policy: SelectionPolicy) -> None:
    with pytest.raises(ValueError, match="unequal numbers of tokens"):
        PackedSelection(policy, 10)


def test_crops_as_data() -> None:
    """Sizes, means and ranks of a small case, by hand; crops 0 and 2 are empty, the last token does not exist."""
    crops = CropIds(torch.tensor([[3, 1, 3, 1, 3, -1]]), 4)
    values = torch.tensor([[1.0, 5.0, 3.0, 5.0, 2.0, 9.0]])
    assert crops.sizes.tolist() == [[0, 2, 0, 3]]
    assert crops.mean(values).tolist() == [[0.0, 5.0, 0.0, 2.0]]
    assert crops.ranks_inside(values)[0, :5].tolist() == [2, 0, 0, 1, 1]
    assert crops.places(None)[0, :5].tolist() == [2, 0, 3, 1, 4]
    assert crops.ranks_of_crops(torch.tensor([[0.0, 0.0, 0.0, 0.5]])).tolist() == [[2, 1, 3, 0]]
    assert crops.spread(torch.tensor([[7, 8, 9, 10]]))[0, :5].tolist() == [10, 8, 10, 8, 10]


@each_policy
def test_quotas_and_budgets_out_of_range(policy: SelectionPolicy) -> None:
    """At least one token, at most those that there are, whatever is asked for."""
    given = packed_inputs([6, 9, 4], 1)
    for budget, quota, counts in (
        (0, [3, 0, -5], [1, 1, 1]),
        (-7, [3, 3, 3], [1, 1, 1]),
        (5, [0, 7, 9], [1, 5, 4]),
        (9999, [9999, 0, 3], [6, 1, 3]),
    ):
        asked = Packed(given.saliency, given.features, given.source, given.crops, budget, np.array(quota))
        kept = run(policy, asked)
        assert kept.counts.tolist() == counts
        check_kept(policy, asked, kept)


def test_crops_of_one_token_are_scored_without_the_factor() -> None:
    """As the published code: 0.5 of one token is less than 0.01 of two, times 1090."""
    saliency = np.array([0.5, 0.01, 0.01], dtype=np.float32)
    ids = np.array([0, 1, 1])
    assert loops_quotas(saliency, 2, (ids[:1] * 0, np.array([1, 2]))).tolist() == [0, 2]
    given = Packed(saliency, np.zeros((3, 4), np.float32), np.arange(3)[None], ids[None], 2, np.array([2]))
    assert run(HolovPolicy(), given).positions.tolist() == [[1, 2]]


def test_many_crops() -> None:
    """As many as a policy asks for, and ids up to the last one that there is room for."""
    for policy in (HolovPolicy(), HolovPolicy(crops=150), HolovOfficialPolicy(crops=150), HolovPlusPolicy(crops=150)):
        most = most_crops(policy)
        assert most == max(policy.crops, MOST_CROPS)
        given = packed_inputs([300, 200], 1, crops=most)
        assert given.crops.max() == most - 1
        check_kept(policy, given, run(policy, given))


def test_no_attention_at_all() -> None:
    """Weights of zero: every crop's share is zero, and the first tokens are as good as any."""
    given = packed_inputs([9, 20], 0, crops=3)
    given = Packed(given.saliency * 0, given.features, given.source, given.crops, 6, np.array([6, 6]))
    for policy in (HolovPolicy(), HolovPlusPolicy(), HolovOfficialPolicy()):
        check_kept(policy, given, run(policy, given))


def test_random_is_one_permutation_for_all_sizes() -> None:
    order = random_order(RandomPolicy(seed=3), LARGEST)
    given = packed_inputs([30, 700], 1)
    given = Packed(given.saliency, given.features, given.source, given.crops, 20, np.array([20, 20]))
    positions = run(RandomPolicy(seed=3), given).positions
    for picture, size in enumerate((30, 700)):
        assert positions[picture].tolist() == sorted(order[order < size][:20].tolist())


def test_uniform_is_over_the_own_tokens() -> None:
    given = packed_inputs([10, 100], 1)
    given = Packed(given.saliency, given.features, given.source, given.crops, 5, np.array([5, 5]))
    assert run(UniformPolicy(), given).positions.tolist() == [[1, 3, 5, 7, 9], [10, 30, 50, 70, 90]]


def test_a_picture_without_tokens_keeps_none() -> None:
    """There is no such picture; but nothing may crash, and the others are not disturbed."""
    given = packed_inputs([6, 9], 1)
    source = np.concatenate([given.source, np.full((1, 9), -1)])
    crops = np.concatenate([given.crops, np.full((1, 9), -1)])
    more = Packed(given.saliency, given.features, source, crops, 4, np.array([4, 4, 4]))
    less = Packed(given.saliency, given.features, given.source, given.crops, 4, np.array([4, 4]))
    for policy, _ in PACKING:
        kept = run(policy, more)
        assert kept.counts.tolist() == [4, 4, 0]
        assert kept.positions[2].tolist() == [-1] * 4
        assert torch.equal(kept.positions[:2], run(policy, less).positions)


def test_the_reference_wants_a_grid_or_crops() -> None:
    saliency = np.array([0.1, 0.2], dtype=np.float32)
    with pytest.raises(ValueError, match="needs a grid or crops"):
        positions_of(HolovPolicy(), saliency, 1)
    assert positions_of(HolovPolicy(), saliency, 1, crops=np.array([0, 0])).tolist() == [1]


def test_ranks_by_counting_and_by_sorting_agree() -> None:
    """Inside one crop that is the whole picture."""
    values = torch.from_numpy(np.random.default_rng(0).integers(0, 5, (3, 50)).astype(np.float32))
    assert torch.equal(CropIds(torch.zeros(3, 50, dtype=torch.int64), 2).ranks_inside(values), ranks(values))
