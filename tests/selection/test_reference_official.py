"""The published algorithm transcribed once more, with its features, against the rule and the reference without them.

`selection/reference/holov.py` leaves the published diversity term out, because it cancels: a crop's mean score is
mean(1e3 A) (1 + 0.09 m / (m + 1e-6)) for the mean m of its similarity variances, the same factor for every crop as long
as m is well above 1e-6. The transcription here keeps the term, so these tests prove that features never change what is
kept (and the last one shows the one case in which they would).

Source of the algorithm: obananas/HoloV llava/model/utils.py@1d2e65e, from its description.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
import torch
from cases import Floats, realistic

from holov_export.policies import HolovOfficialPolicy
from holov_export.selection.reference import positions_of
from holov_export.selection.registry import rule_from_policy

Wide = npt.NDArray[np.float64]
EPSILON, ALPHA = 1e-6, 0.09


def published_positions(features: Wide, attention: Wide, crops: int, budget: int) -> tuple[list[int], Wide]:
    """(kept positions, -1 for a zero row; the crops' shares w K before floor), in float64."""
    base, longer = divmod(len(attention), crops)
    ends = np.cumsum([base + (crop < longer) for crop in range(crops)])
    strips = [range(start, end) for start, end in zip([0, *ends[:-1]], ends, strict=True) if end > start]
    scores = np.array([published_score(features[strip], attention[strip]) for strip in strips])
    shares = scores / (scores.sum() + EPSILON) * budget
    quotas = [int(share) for share in shares]
    spare = budget - sum(quotas)
    for crop in sorted(range(len(strips)), key=lambda crop: (-shares[crop], crop))[: max(spare, 0)]:
        quotas[crop] += 1
    positions: list[int] = []
    for strip, quota in zip(strips, quotas, strict=True):
        if quota >= len(strip):
            positions += strip
        else:
            positions += sorted(strip, key=lambda token: (-attention[token], token))[:quota]
    positions = positions[:budget]
    return positions + [-1] * (budget - len(positions)), shares


def published_score(features: Wide, attention: Wide) -> float:
    """A crop's score: mean of scaled attention and of similarity variance brought to the same size."""
    size = len(attention)
    if size == 1:
        return float(attention.mean())
    unit = features / (np.sqrt((features**2).sum(1, keepdims=True)) + EPSILON)
    similarity = np.einsum("id,jd->ij", unit, unit)
    similarity[np.arange(size), np.arange(size)] = 0
    deviation = similarity - similarity.sum(1, keepdims=True) / (size - 1)
    variance = (deviation**2).sum(1) / (size - 1)
    scaled = 1000 * attention
    gain = np.abs(scaled).mean() / (np.abs(variance).mean() + EPSILON)
    return float((scaled + ALPHA * gain * variance).mean())


def features_of_kind(kind: str, tokens: int, dice: np.random.Generator) -> Floats:
    rows = dice.standard_normal((tokens, 24))
    if kind == "clusters":
        rows = 0.3 * rows + 2 * dice.standard_normal((8, 24))[dice.integers(0, 8, tokens)] + dice.standard_normal(24)
    elif kind == "one crop of copies":
        rows[: tokens // 16] = rows[0]
    elif kind == "anisotropic":
        rows = rows * np.geomspace(20, 0.05, 24) + 3 * dice.standard_normal(24)
    return rows.astype(np.float32)


FEATURES = ["noise", "clusters", "one crop of copies", "anisotropic"]


@pytest.mark.parametrize("attention_kind", ["flat", "usual", "peaky"])
@pytest.mark.parametrize("feature_kind", FEATURES)
@pytest.mark.parametrize(("grid", "crops"), [((24, 24), 16), ((12, 12), 16), ((5, 10), 7), ((10, 10), 6)], ids=str)
def test_features_do_not_change_what_is_kept(
    grid: tuple[int, int], crops: int, feature_kind: str, attention_kind: str
) -> None:
    """50 pictures each, 2,400 together."""
    tokens, images = grid[0] * grid[1], 50
    policy = HolovOfficialPolicy(crops=crops)
    dice = np.random.default_rng([tokens, FEATURES.index(feature_kind), len(attention_kind)])
    attention = realistic(attention_kind, images, tokens, dice)
    budgets = dice.choice([1, tokens // 9, tokens // 3, tokens - 1, tokens], images)
    ours, _, _ = rule_from_policy(policy, grid)(
        torch.from_numpy(attention), None, torch.from_numpy(budgets), torch.tensor([int(budgets.max())])
    )
    on_a_tie = 0
    for image in range(images):
        budget = int(budgets[image])
        features = features_of_kind(feature_kind, tokens, dice)
        expected, shares = published_positions(
            features.astype(np.float64), attention[image].astype(np.float64), crops, budget
        )
        reference = positions_of(policy, attention[image], budget, grid).tolist()
        if reference == expected == ours[image, :budget].tolist():
            continue
        assert is_tie(shares, budget), (reference, expected, shares)
        on_a_tie += 1
    assert on_a_tie <= 1


def is_tie(shares: Wide, budget: int) -> bool:
    """A share within 1e-4 of a whole number, or the last crop to get a left-over token as heavy as the next one."""
    ranked, left = np.sort(shares)[::-1], budget - int(np.floor(shares).sum())
    near_whole = (np.abs(shares - np.round(shares)) < 1e-4).any()
    return bool(near_whole or (0 < left < len(shares) and ranked[left - 1] - ranked[left] < 1e-4 * ranked[left]))


def test_zero_rows_do_occur() -> None:
    """Peaky attention overflows crops, so the comparison above has seen zero rows."""
    attention = realistic("peaky", 200, 576, np.random.default_rng(0))
    positions, _, _ = rule_from_policy(HolovOfficialPolicy(), (24, 24))(
        torch.from_numpy(attention), None, torch.full((200,), 192), torch.tensor([192])
    )
    assert ((positions[:, :192] == -1).any(1).sum()) > 10


def test_the_term_cancels_only_where_rows_are_similar() -> None:
    """Crops whose rows are all orthogonal lose the term, up to 9 % of a score: there features would matter."""
    attention = np.full(8, 1 / 8)
    attention[:4] *= 0.95
    alike, orthogonal = np.ones((4, 8)), np.eye(8)[:4]
    assert published_score(alike, attention[:4]) > published_score(orthogonal, attention[4:])
    assert published_score(alike, attention[:4]) == pytest.approx(1090 * attention[:4].mean(), rel=1e-5)
    assert published_score(orthogonal, attention[4:]) == pytest.approx(1000 * attention[4:].mean(), rel=1e-5)
