"""What every selection rule promises, whatever the picture; and that the torch rules are the reference loops."""

from __future__ import annotations

import numpy as np
import pytest
from cases import GRIDS, NAMES, POLICIES, Floats, Grid, batches, features_of, hangs_on_rounding, kept, realistic
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from holov_export.policies import POLICIES as POLICY_CLASSES
from holov_export.policies import (
    CropLayout,
    HolovOfficialPolicy,
    HolovPolicy,
    NoSelection,
    ScopePolicy,
    SelectionPolicy,
    VisionzipPolicy,
    policy_from_settings,
)
from holov_export.selection.geometry import crops_of_grid, tiles_of
from holov_export.selection.reference import (
    contextual_rows,
    official_quotas,
    paper_quotas,
    positions_of,
    scope_order,
    uniform_positions,
)
from holov_export.selection.registry import rule_from_policy

each_policy = pytest.mark.parametrize("policy", POLICIES, ids=NAMES)
each_grid = st.sampled_from(GRIDS)
quick = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def check_row(policy: SelectionPolicy, row: np.ndarray, quota: int) -> None:
    """What one picture's positions must be, whatever the input."""
    tokens, chosen = len(row), row[:quota]
    assert (row[quota:] == -1).all()
    real = chosen[chosen >= 0]
    assert len(set(real.tolist())) == len(real)
    assert (real < tokens + policy.keeps_cls).all()
    assert real[:1].tolist() == [tokens] or not policy.keeps_cls, "the CLS token comes first"
    if isinstance(policy, HolovOfficialPolicy):
        assert (chosen[len(real) :] == -1).all(), "zero rows are at the end"
        assert len(real) >= 1
    elif isinstance(policy, VisionzipPolicy):
        assert len(real) == quota
        targets = contextual_rows(policy, quota)
        assert (np.diff(real[1 : quota - targets]) > 0).all(), "dominant tokens in raster order"
        assert (np.diff(real[quota - targets :]) > 0).all(), "targets in raster order"
    else:
        assert len(real) == quota
        assert (np.diff(real) > 0).all(), "raster order"
    if quota == tokens and policy.lossless_at_full:
        assert np.array_equal(chosen, np.arange(tokens))


def test_every_policy_is_tested() -> None:
    assert {policy.method for policy in POLICIES} == set(POLICY_CLASSES)


@each_policy
@quick
@given(st.data())
def test_exactly_quota_distinct_positions(policy: SelectionPolicy, data: st.DataObject) -> None:
    grid = data.draw(each_grid)
    saliency, quota, features = data.draw(batches(grid))
    for row, asked in zip(kept(policy, saliency, quota, grid, features), quota, strict=True):
        check_row(policy, row, asked)


@each_policy
@quick
@given(st.data())
def test_rule_is_the_reference(policy: SelectionPolicy, data: st.DataObject) -> None:
    grid = data.draw(each_grid)
    saliency, quota, features = data.draw(batches(grid))
    rows = kept(policy, saliency, quota, grid, features)
    for image, asked in enumerate(quota):
        if not hangs_on_rounding(policy, saliency[image], asked, grid, features[image]):
            expected = positions_of(policy, saliency[image], asked, grid, features[image])
            assert rows[image, :asked].tolist() == expected.tolist()


@each_policy
@quick
@given(st.data())
def test_reference_keeps_the_promises_too(policy: SelectionPolicy, data: st.DataObject) -> None:
    grid = data.draw(each_grid)
    saliency, quota, features = data.draw(batches(grid))
    tokens = saliency.shape[1]
    for image, asked in enumerate(quota):
        row = np.full(tokens, -1)
        row[:asked] = positions_of(policy, saliency[image], asked, grid, features[image])
        check_row(policy, row, asked)


@each_policy
@quick
@given(st.data())
def test_batch_is_its_singles_in_any_order(policy: SelectionPolicy, data: st.DataObject) -> None:
    grid = data.draw(each_grid)
    saliency, quota, features = data.draw(batches(grid))
    images = range(len(quota))
    order = np.array(data.draw(st.permutations(list(images))))
    together = kept(policy, saliency, quota, grid, features)
    shuffled = kept(policy, saliency[order], np.array(quota)[order], grid, features[order])
    for image in images:
        if hangs_on_rounding(policy, saliency[image], quota[image], grid, features[image]):
            continue
        one = slice(image, image + 1)
        assert kept(policy, saliency[one], quota[one], grid, features[one])[0].tolist() == together[image].tolist()
        assert shuffled[order.tolist().index(image)].tolist() == together[image].tolist()


@pytest.mark.parametrize("kind", ["flat", "usual", "peaky"])
@each_policy
def test_rule_is_the_reference_on_realistic_attention(policy: SelectionPolicy, kind: str) -> None:
    dice = np.random.default_rng(len(kind))
    compared = images = 0
    for grid in ((12, 12), (24, 24)):
        tokens = grid[0] * grid[1]
        # a step of scope costs N x N, and its near ties grow with the steps
        many, most = (6, tokens // 4) if policy.method == "scope" and tokens > 144 else (16, tokens)
        saliency, features = realistic(kind, many, tokens, dice), features_of(many, tokens, tokens)
        quota = dice.integers(1, most + 1, many)
        rows = kept(policy, saliency, quota, grid, features)
        for image, asked in enumerate(quota):
            images += 1
            check_row(policy, rows[image], asked)
            if hangs_on_rounding(policy, saliency[image], asked, grid, features[image]):
                continue
            compared += 1
            expected = positions_of(policy, saliency[image], asked, grid, features[image])
            assert rows[image, :asked].tolist() == expected.tolist()
    shares = {"holov-paper": 0.3, "scope": 0.15, "divprune": 0.5, "cdpruner-unconditional": 0.25}
    assert compared >= images * shares.get(policy.method, 0.85)


@pytest.mark.parametrize("alpha", ["1", "0.5"])
def test_scope_is_greedy(alpha: str) -> None:
    """The reference follows the definition: each step has the largest weighted gain of the coverage function."""
    policy, dice = ScopePolicy(alpha=float(alpha)), np.random.default_rng(3)
    saliency, features = realistic("usual", 1, 36, dice)[0], features_of(1, 36, 3)[0]
    unit = features.astype(np.float64) / np.linalg.norm(features.astype(np.float64), axis=1, keepdims=True)
    similarity = unit @ unit.T

    def coverage(kept: list[int]) -> float:
        return float(np.maximum(similarity[:, kept].max(1), 0).sum()) if kept else 0.0

    order = scope_order(policy, saliency, features, 36).tolist()
    assert sorted(order) == list(range(36))
    for step in range(35):
        before = coverage(order[:step])
        gains = {
            token: (coverage([*order[:step], token]) - before) * float(saliency[token]) ** policy.alpha
            for token in order[step:]
        }
        assert gains[order[step]] >= max(gains.values()) - 1e-6


def test_scope_keeps_nearly_the_same_set_whatever_the_rounding() -> None:
    """Near ties swap steps of the greedy order; what is kept at the published budgets stays almost the same."""
    policy, dice = ScopePolicy(), np.random.default_rng(8)
    for kind in ("flat", "usual", "peaky"):
        saliency, features = realistic(kind, 4, 576, dice), features_of(4, 576, 8)
        for quota in (64, 128, 192):
            rows = kept(policy, saliency, [quota] * 4, (24, 24), features)[:, :quota]
            for image, row in enumerate(rows):
                expected = positions_of(policy, saliency[image], quota, (24, 24), features[image])
                assert len(set(row.tolist()) & set(expected.tolist())) >= 0.98 * quota


def test_scope_spreads_over_what_is_different() -> None:
    """Two groups of equal tokens: the second step takes the other group, however salient the first one is."""
    features = np.zeros((1, 8, WIDTH_OF_ROWS), dtype=np.float32)
    features[0, :6, 0] = features[0, 6:, 1] = 1.0
    saliency = np.array([[0.2, 0.15, 0.15, 0.15, 0.15, 0.15, 0.02, 0.03]], dtype=np.float32)
    row = kept(ScopePolicy(), saliency, [2], (2, 4), features)[0]
    assert row[:2].tolist() == [0, 7]


def test_no_selection_is_no_rule_and_keeps_the_first_tokens() -> None:
    """A plain encoder's reference; it must not pass for the last of the rules."""
    saliency = np.random.default_rng(0).random(16, dtype=np.float32)
    assert positions_of(NoSelection(), saliency, 5, (4, 4)).tolist() == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match="'none' is no rule"):
        rule_from_policy(NoSelection(), (4, 4))


SPECIAL: dict[str, float] = {"zero": 0.0, "constant": 1 / 64, "tiny": 2.0**-100, "one": 1.0}


@pytest.mark.parametrize("value", SPECIAL.values(), ids=SPECIAL)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
@each_policy
def test_constant_saliency(policy: SelectionPolicy, grid: Grid, value: float) -> None:
    tokens = grid[0] * grid[1]
    quota = np.arange(1, tokens + 1)
    saliency = np.full((tokens, tokens), value, dtype=np.float32)
    features = features_of(tokens, tokens, 3)
    for row, asked in zip(kept(policy, saliency, quota, grid, features), quota, strict=True):
        check_row(policy, row, asked)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@each_policy
def test_all_attention_on_one_token(policy: SelectionPolicy, grid: Grid) -> None:
    tokens = grid[0] * grid[1]
    saliency = np.eye(tokens, dtype=np.float32)
    features = features_of(tokens, tokens, 4)
    for asked in {1, min(2, tokens), (tokens + 1) // 2, tokens}:
        rows = kept(policy, saliency, np.full(tokens, asked), grid, features)
        for image, row in enumerate(rows):
            check_row(policy, row, asked)
            if policy.method in ("holov", "holov-official", "cls-topk"):
                assert image in row[:asked]


@pytest.mark.parametrize("rows", ["equal", "zero", "huge", "tiny"])
@pytest.mark.parametrize("method", [name for name, policy in POLICY_CLASSES.items() if policy.features != "none"])
def test_degenerate_features(method: str, rows: str) -> None:
    """Rows of zeros, equal rows, squares that overflow or vanish: still `quota` distinct positions."""
    settings = {"crops": "4"} if method == "holov-paper" else {}
    policy, grid, tokens = policy_from_settings(method, settings), (4, 4), 16
    scale = {"equal": 1.0, "zero": 0.0, "huge": 1e15, "tiny": 1e-15}[rows]
    base = np.ones((1, tokens, WIDTH_OF_ROWS)) if rows in ("equal", "zero") else features_of(1, tokens, 5)
    features = np.repeat((base * scale).astype(np.float32), tokens, 0)
    saliency = np.repeat(realistic("usual", 1, tokens, np.random.default_rng(0)), tokens, 0)
    quota = np.arange(1, tokens + 1)
    for row, asked in zip(kept(policy, saliency, quota, grid, features), quota, strict=True):
        check_row(policy, row, asked)


WIDTH_OF_ROWS = 12


def test_equal_values_keep_the_lower_position() -> None:
    saliency, features = np.full((1, 16), 2.0**-4, dtype=np.float32), features_of(1, 16, 0)
    grid = (4, 4)

    def first(method: str, quota: int, **extra: str) -> list[int]:
        row = kept(policy_from_settings(method, extra), saliency, [quota], grid, features)[0]
        return row[:quota].tolist()

    assert first("cls-topk", 5) == [0, 1, 2, 3, 4]
    assert first("holov", 6, crops="4") == [0, 1, 4, 5, 8, 12]
    assert first("holov-official", 6, crops="4") == [0, 1, 4, 5, 8, 12]
    assert first("holov", 6, crops="4", layout="tiles") == [0, 1, 2, 3, 8, 10]


def test_quotas_follow_the_attention() -> None:
    saliency = np.zeros((1, 16), dtype=np.float32)
    saliency[0, [4, 5, 6, 7]] = [0.1, 0.4, 0.2, 0.3]
    policy, features = policy_from_settings("holov-official", {"crops": "4"}), features_of(1, 16, 0)
    assert kept(policy, saliency, [3], (4, 4), features)[0, :3].tolist() in ([5, 7, 6], [0, 5, 7])
    assert kept(policy_from_settings("holov", {"crops": "4"}), saliency, [6], (4, 4), features)[0, :6].tolist() == [
        0, 1, 4, 5, 6, 7,
    ]  # fmt: skip


def test_overflow_becomes_zero_rows_in_the_published_rule_only() -> None:
    saliency = np.full((1, 16), 1e-6, dtype=np.float32)
    saliency[0, 8:12] = 0.2
    features = features_of(1, 16, 0)
    official = kept(HolovOfficialPolicy(crops=4), saliency, [10], (4, 4), features)[0, :10].tolist()
    assert official[-5:] == [-1] * 5
    assert [place for place in official if 8 <= place < 12] == [8, 9, 10, 11], "a full crop is in raster order"
    ours = kept(HolovPolicy(crops=4), saliency, [10], (4, 4), features)[0, :10].tolist()
    assert ours == sorted(ours)
    assert {8, 9, 10, 11} <= set(ours)
    assert -1 not in ours


def test_random_is_nested_and_seeded() -> None:
    saliency, features = np.zeros((3, 64), dtype=np.float32), features_of(3, 64, 0)
    rows = kept(policy_from_settings("random"), saliency, [8, 16, 64], (8, 8), features)
    assert set(rows[0, :8]) < set(rows[1, :16])
    other = kept(policy_from_settings("random", {"seed": "1"}), saliency, [8, 16, 64], (8, 8), features)
    assert rows[0].tolist() != other[0].tolist()


def test_uniform_spreads_evenly() -> None:
    for tokens in (1, 6, 144, 576):
        for quota in {1, 2, tokens // 3 + 1, tokens}:
            if quota <= tokens:
                gaps = np.diff(uniform_positions(tokens, quota))
                assert len(gaps) == 0 or gaps.max() - gaps.min() <= 1


def test_uniform_ignores_the_picture() -> None:
    features = features_of(2, 144, 0)
    saliency = realistic("peaky", 2, 144, np.random.default_rng(0))
    rows = kept(policy_from_settings("uniform"), saliency, [16, 16], (12, 12), features)
    assert rows[0].tolist() == rows[1].tolist()


@given(st.integers(1, 30), st.integers(1, 30), st.integers(1, 64), st.sampled_from(CropLayout))
@settings(deadline=None)
def test_crops_divide_the_grid(rows: int, columns: int, crops: int, layout: CropLayout) -> None:
    parts = crops_of_grid((rows, columns), crops, layout)
    assert sorted(np.concatenate(parts).tolist()) == list(range(rows * columns))
    assert all(len(part) and (np.diff(part) > 0).all() for part in parts)
    assert len(parts) <= crops
    if layout is CropLayout.STRIPS:
        sizes = [len(part) for part in parts]
        assert sizes == sorted(sizes, reverse=True)
        assert max(sizes) - min(sizes) <= 1
    down, across = tiles_of(crops, (rows, columns))
    assert down * across == crops


@given(st.lists(st.integers(1, 50), min_size=1, max_size=20), st.data())
@settings(deadline=None)
def test_paper_quotas_fill_exactly(sizes: list[int], data: st.DataObject) -> None:
    quota = data.draw(st.integers(1, sum(sizes)))
    shares = data.draw(st.lists(st.floats(0.0009765625, 1, width=32), min_size=len(sizes), max_size=len(sizes)))
    weights = np.array(shares, dtype=np.float32) / np.float32(sum(shares))
    given_out = paper_quotas(weights, quota, np.array(sizes, dtype=np.int64))
    assert given_out.sum() == quota
    assert (given_out >= 0).all()
    assert (given_out <= np.array(sizes)).all()


def test_official_quotas_sum_to_the_quota() -> None:
    dice = np.random.default_rng(5)
    crops = crops_of_grid((24, 24), 16, CropLayout.STRIPS)
    for kind in ("flat", "usual", "peaky"):
        rows: Floats = realistic(kind, 40, 576, dice)
        for row in rows:
            for quota in (1, 15, 16, 64, 192, 576):
                assert official_quotas(row, quota, crops).sum() == quota
