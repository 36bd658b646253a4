"""DivPrune, CDPruner's DPP, DART and VisionZip against their definitions and transcriptions of the published codes."""

from __future__ import annotations

import numpy as np
import pytest
from cases import Floats, Wide, decided, features_of, hangs_on_rounding, kept, realistic, similarities

from holov_export.policies import (
    CdprunerUnconditionalPolicy,
    DartPolicy,
    DivprunePolicy,
    VisionzipPolicy,
)
from holov_export.selection.reference import (
    contextual_rows,
    dart_order,
    divprune_order,
    dpp_order,
    merged_of,
    positions_of,
)


def published_divprune(similarity: Wide, budget: int) -> list[int]:
    """vbdi/divprune llava_arch.py@799e2d9 from its description: no token is barred, the diagonal stays in."""
    distance = 1 - similarity
    chosen = [int(np.sort(distance, axis=0)[1].argmax())]
    while len(chosen) < budget:
        chosen.append(int(distance[chosen].min(axis=0).argmax()))
    return chosen


def published_map(kernel: Wide, budget: int) -> list[int]:
    """Theia-4869/CDPruner llava_arch.py@9541616 from its description, the kernel given."""
    left, factor, chosen = np.diag(kernel).copy(), np.zeros((0, len(kernel))), list[int]()
    for _ in range(budget):
        best = int(left.argmax())
        row = (kernel[best] - factor[:, best] @ factor) / np.sqrt(left[best])
        factor, left = np.vstack([factor, row]), left - row**2
        left[best] = -np.inf
        chosen.append(best)
    return chosen


def published_visionzip(saliency: Wide, keys: Wide, dominant: int, contextual: int) -> tuple[list[int], dict[int, int]]:
    """dvlab-research/VisionZip clip_encoder.py@3151f6d from its description: (rows, token -> its target).

    `dominant` counts the CLS token, as the published arguments do.
    """
    tokens = len(saliency)
    top = sorted(np.argsort(-saliency, kind="stable")[: dominant - 1].tolist())
    rest = [token for token in range(tokens) if token not in set(top)]
    step = max(1, len(rest) // contextual)
    targets = rest[::step][:contextual]
    unit = keys / np.linalg.norm(keys, axis=1, keepdims=True)
    into = {}
    for token in rest:
        if token not in set(targets):
            into[token] = targets[int(np.argmax([unit[token] @ unit[target] for target in targets]))]
    return [tokens, *top, *targets], into


@pytest.mark.parametrize("tokens", [16, 144])
def test_divprune_is_the_published_code(tokens: int) -> None:
    saliency, compared = np.ones(tokens, dtype=np.float32), 0
    for seed in range(40):
        features = features_of(1, tokens, seed)[0]
        budget = (tokens + 2) // 3
        if not hangs_on_rounding(DivprunePolicy(), saliency, budget, (1, tokens), features):
            compared += 1
            expected = published_divprune(similarities(features), budget)
            assert divprune_order(saliency, features, budget).tolist() == expected
            assert kept(DivprunePolicy(), saliency[None], [budget], (1, tokens), features[None])[0][
                :budget
            ].tolist() == sorted(expected)
    assert compared >= 30


def test_divprune_takes_no_token_twice() -> None:
    """Where all that is left equals what is kept, the published code takes a token again; here others follow."""
    features = np.zeros((1, 8, 12), dtype=np.float32)
    features[0, :4, 0] = features[0, 4:, 1] = 1.0
    saliency = np.ones((1, 8), dtype=np.float32)
    assert published_divprune(similarities(features[0]), 4) == [0, 4, 0, 0]
    assert divprune_order(saliency[0], features[0], 4).tolist() == [0, 4, 1, 2]
    assert kept(DivprunePolicy(), saliency, [4], (2, 4), features)[0, :4].tolist() == [0, 1, 2, 4]


def test_divprune_starts_with_the_loneliest_token() -> None:
    features = np.zeros((1, 6, 12), dtype=np.float32)
    features[0, :, 0] = 1.0
    features[0, 4] = np.eye(12)[3]
    row = kept(DivprunePolicy(), np.ones((1, 6), dtype=np.float32), [1], (2, 3), features)[0]
    assert row[0] == 4


def test_dpp_is_the_published_map() -> None:
    """The same steps as the published code on the same kernel, its first step tied: the lowest position wins."""
    compared, policy = 0, CdprunerUnconditionalPolicy()
    for seed in range(40):
        features = features_of(1, 60, seed)[0]
        saliency = np.ones(60, dtype=np.float32)
        if hangs_on_rounding(policy, saliency, 10, (6, 10), features):
            continue
        compared += 1
        kernel = similarities(features)
        np.fill_diagonal(kernel, 1.0)
        assert dpp_order(saliency, features, 10).tolist() == published_map(kernel, 10)
    assert compared >= 30


def test_dpp_takes_what_makes_the_determinant_largest() -> None:
    features, saliency = features_of(1, 24, 5)[0], np.ones(24, dtype=np.float32)
    kernel, order = similarities(features), dpp_order(saliency, features, 9).tolist()

    def volume(tokens: list[int]) -> float:
        return float(np.linalg.det(kernel[np.ix_(tokens, tokens)]))

    assert order[0] == 0
    for step in range(1, 9):
        volumes = {token: volume([*order[:step], token]) for token in range(24) if token not in order[:step]}
        assert volumes[order[step]] >= max(volumes.values()) * (1 - 1e-3)


def test_dpp_past_the_rank_goes_on_in_raster_order() -> None:
    """Twelve dimensions: after twelve steps nothing is left of any token, and rounding must not decide."""
    features, saliency = features_of(1, 40, 2)[0], np.ones(40, dtype=np.float32)
    order = dpp_order(saliency, features, 40).tolist()
    assert sorted(order) == list(range(40))
    assert order[12:] == sorted(order[12:])
    row = kept(CdprunerUnconditionalPolicy(), saliency[None], [20], (5, 8), features[None])[0, :20]
    assert row.tolist() == sorted(order[:20])


def test_dart_grows_from_its_pivots() -> None:
    """Two pivots by L1 norm, each with half of what is wanted: what is least like it."""
    features = np.zeros((1, 8, 12), dtype=np.float32)
    features[0, :, 0] = [9, 1, 1, 1, 8, 1, 1, 1]
    features[0, :, 1] = [0, 1, 2, 3, 0, -1, -2, -3]
    features[0, 4, 2] = 8
    saliency, policy = np.ones((1, 8), dtype=np.float32), DartPolicy(pivots=2)
    # pivot 4 (16) and 0 (9); 4 is least like 3 and 7, which tie, so the lower; then 0 takes 7
    assert dart_order(policy, saliency[0], features[0], 4).tolist() == [4, 0, 3, 7]
    assert kept(policy, saliency, [4], (2, 4), features)[0, :4].tolist() == [0, 3, 4, 7]
    assert kept(policy, saliency, [1], (2, 4), features)[0, :1].tolist() == [4], "no more pivots than the quota"


def test_dart_shares_are_rounded_up() -> None:
    """11 wanted, 4 pivots: 7 more, as 2 + 2 + 2 + 1."""
    features, saliency = features_of(1, 30, 1)[0], np.ones(30, dtype=np.float32)
    order = dart_order(DartPolicy(), saliency, features, 11)
    likeness = similarities(features)
    pool = set(range(30)) - set(order[:4].tolist())
    for pivot, share, start in zip(order[:4], (2, 2, 2, 1), (4, 6, 8, 10), strict=True):
        taken = order[start : start + share].tolist()
        worst = sorted(pool, key=lambda token, pivot=pivot: (likeness[pivot, token], token))[:share]
        assert sorted(taken) == sorted(worst)
        pool -= set(taken)


@pytest.mark.parametrize(("budget", "contextual"), [(64, 10), (128, 20), (192, 30), (320, 50), (640, 100), (160, 25)])
def test_visionzip_splits_as_published(budget: int, contextual: int) -> None:
    assert contextual_rows(VisionzipPolicy(), budget) == contextual


@pytest.mark.parametrize("budget", [64, 128, 192, 320, 33, 144])
def test_visionzip_is_the_published_code(budget: int) -> None:
    dice, policy = np.random.default_rng(budget), VisionzipPolicy()
    saliency, keys = realistic("usual", 3, 576, dice), features_of(3, 576, budget)
    chosen = decided(policy, saliency, [budget] * 3, (24, 24), keys)
    assert chosen.merged is not None
    contextual = contextual_rows(policy, budget)
    for image in range(3):
        rows, into = published_visionzip(
            saliency[image].astype(np.float64), keys[image].astype(np.float64), budget - contextual, contextual
        )
        assert chosen.positions[image, :budget].tolist() == rows
        assert positions_of(policy, saliency[image], budget, (24, 24), keys[image]).tolist() == rows
        for merged in (chosen.merged[image].numpy(), merged_of(policy, saliency[image], budget, keys[image])):
            check_merged(merged, into, similarities(keys[image]), rows, contextual)


def check_merged(merged: np.ndarray, into: dict[int, int], likeness: Wide, rows: list[int], contextual: int) -> None:
    """Each token that goes has the published target, or one whose key is as near as float32 can tell."""
    assert {token for token, target in enumerate(merged.tolist()) if target >= 0} == set(into)
    targets = set(rows[len(rows) - contextual :])
    near_ties = 0
    for token, target in into.items():
        assert int(merged[token]) in targets
        if int(merged[token]) != target:
            near_ties += 1
            assert abs(likeness[token, int(merged[token])] - likeness[token, target]) < 1e-6
    assert near_ties <= len(into) // 50


@pytest.mark.parametrize("quota", [1, 2, 6, 7, 15, 16])
def test_visionzip_of_small_and_full_budgets(quota: int) -> None:
    """Below 7 rows none is contextual and nothing is merged; at N rows all targets but one token are kept."""
    saliency: Floats = realistic("usual", 1, 16, np.random.default_rng(0))
    policy = VisionzipPolicy()
    chosen = decided(policy, saliency, [quota], (4, 4), features_of(1, 16, 0))
    assert chosen.merged is not None
    merged = chosen.merged[0].numpy()
    rows = chosen.positions[0, :quota].tolist()
    assert rows[0] == 16
    assert (merged >= 0).sum() == (16 - (quota - 1) if quota >= 7 else 0)
    assert set(merged[merged >= 0].tolist()) <= set(rows[quota - contextual_rows(policy, quota) :])
