"""Inputs for the selection tests, and where a float32 rounding decides what is kept.

`floor(w K)` is discontinuous: where w K is a whole number, the last bit of a sum moves a token from one crop to
another. Two correct implementations may differ there, so comparisons leave such inputs out; invariants do not.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from hypothesis import strategies as st

from holov_export.policies import (
    CdprunerUnconditionalPolicy,
    CropLayout,
    DartPolicy,
    DivprunePolicy,
    HolovOfficialPolicy,
    HolovPaperPolicy,
    HolovPlusPolicy,
    HolovPolicy,
    ScopePolicy,
    SelectionPolicy,
    policy_from_settings,
)
from holov_export.selection.geometry import crops_of_grid, crops_of_ids
from holov_export.selection.reference import DPP_FLOOR
from holov_export.selection.registry import rule_from_policy
from holov_export.selection.rule import Selection
from holov_export.tensors import Int64Array

Floats = npt.NDArray[np.float32]
Wide = npt.NDArray[np.float64]
Grid = tuple[int, int]

SETTINGS: list[tuple[str, dict[str, str]]] = [
    ("holov", {}),
    ("holov", {"crops": "5"}),
    ("holov", {"crops": "6", "layout": "tiles"}),
    ("holov", {"crops": "1"}),
    ("holov", {"crops": "100"}),
    ("holov-plus", {}),
    ("holov-plus", {"crops": "5"}),
    ("holov-plus", {"crops": "6", "layout": "tiles"}),
    ("holov-plus", {"crops": "100"}),
    ("holov-official", {}),
    ("holov-official", {"crops": "5"}),
    ("holov-official", {"crops": "100"}),
    ("holov-paper", {}),
    ("holov-paper", {"crops": "5", "layout": "strips"}),
    ("holov-paper", {"crops": "6", "tau": "0.5"}),
    ("holov-paper", {"tau": "4"}),
    ("holov-paper", {"crops": "100"}),
    ("scope", {}),
    ("scope", {"alpha": "0.5"}),
    ("divprune", {}),
    ("cdpruner-unconditional", {}),
    ("dart", {}),
    ("dart", {"pivots": "1"}),
    ("dart", {"pivots": "9"}),
    ("visionzip", {}),
    ("visionzip", {"contextual": "0"}),
    ("visionzip", {"contextual": "31"}),
    ("cls-topk", {}),
    ("uniform", {}),
    ("random", {}),
    ("random", {"seed": "7"}),
]
POLICIES = [policy_from_settings(method, settings) for method, settings in SETTINGS]
NAMES = [" ".join([method, *(f"{key}={value}" for key, value in settings.items())]) for method, settings in SETTINGS]
GRIDS: list[Grid] = [(4, 4), (5, 7), (3, 4), (8, 8), (2, 3), (1, 5), (1, 1)]
WIDTH = 12


def decided(policy: SelectionPolicy, saliency: Floats, quota: npt.ArrayLike, grid: Grid, features: Floats) -> Selection:
    """What the torch rule decides; its counts must be the quotas."""
    asked = torch.as_tensor(np.asarray(quota, dtype=np.int64))
    with torch.no_grad():
        chosen: Selection = rule_from_policy(policy, grid)(
            torch.from_numpy(saliency), torch.from_numpy(features), asked, asked.amax()[None]
        )
    assert chosen.positions.dtype == chosen.counts.dtype == torch.int64
    assert chosen.positions.shape == saliency.shape
    assert torch.equal(chosen.counts, asked)
    assert (chosen.merged is not None) == policy.merges
    return chosen


def kept(policy: SelectionPolicy, saliency: Floats, quota: npt.ArrayLike, grid: Grid, features: Floats) -> npt.NDArray:
    """int64 [B, N]: the torch rule's positions."""
    positions: npt.NDArray = decided(policy, saliency, quota, grid, features).positions.numpy()
    return positions


def features_of(batch: int, tokens: int, seed: int, width: int = WIDTH) -> Floats:
    """Rows with a common part, as a projector's are."""
    dice = np.random.default_rng(seed)
    rows = dice.standard_normal((batch, tokens, width)) + 2 * dice.standard_normal((batch, 1, width))
    return rows.astype(np.float32)


@st.composite
def batches(draw: st.DrawFn, grid: Grid) -> tuple[Floats, list[int], Floats]:
    """(saliency [B, N], quota of each picture, features [B, N, D]).

    Saliencies are whole multiples of 2^-12, with many equal ones: every sum of them is exact in float32.
    """
    tokens, batch = grid[0] * grid[1], draw(st.integers(1, 4))
    top = draw(st.sampled_from([1, 3, 255]))
    value = st.one_of(st.integers(0, top), st.integers(0, 2)) | st.just(0)
    row = st.lists(value, min_size=tokens, max_size=tokens)
    saliency = np.array(draw(st.lists(row, min_size=batch, max_size=batch)), dtype=np.float32) / np.float32(4096)
    quota = draw(st.lists(st.integers(1, tokens), min_size=batch, max_size=batch))
    return saliency, quota, features_of(batch, tokens, draw(st.integers(0, 2**16)))


def realistic(kind: str, batch: int, tokens: int, dice: np.random.Generator) -> Floats:
    """Rows of attention: "flat", "usual" or "peaky" (heavy tails, whole crops overflow)."""
    if kind == "peaky":
        logits = np.log(dice.pareto(1.0, (batch, tokens)) + 1e-3)
    else:
        logits = dice.standard_normal((batch, tokens)) * (0.2 if kind == "flat" else 1.5)
    share = np.exp(logits)
    row: Floats = (share / share.sum(1, keepdims=True)).astype(np.float32)
    return row


def hangs_on_rounding(
    policy: SelectionPolicy,
    saliency: Floats,
    quota: int,
    grid: Grid,
    features: Floats,
    ids: Int64Array | None = None,
) -> bool:
    """True where the rule's result for one picture may change with the last bit of a sum (computed in float64).

    `ids` are the crops of its tokens where they are not those of the grid.
    """
    if isinstance(policy, HolovPaperPolicy):
        return _paper_hangs(policy, saliency, quota, grid, features)
    if isinstance(policy, HolovPlusPolicy):
        crops = crops_of_grid(grid, policy.crops, policy.layout) if ids is None else crops_of_ids(ids)
        return _plus_hangs(crops, saliency, quota, features)
    if isinstance(policy, ScopePolicy):
        return _scope_hangs(policy, saliency, quota, features)
    if isinstance(policy, DivprunePolicy | CdprunerUnconditionalPolicy | DartPolicy):
        similarity, left = similarities(features), saliency >= 0
        if isinstance(policy, DivprunePolicy):
            return _divprune_hangs(similarity, left, quota)
        if isinstance(policy, CdprunerUnconditionalPolicy):
            return _dpp_hangs(similarity, left, quota)
        return _dart_hangs(policy, similarity, np.abs(features.astype(np.float64)).sum(1), left, quota)
    if not isinstance(policy, HolovPolicy | HolovOfficialPolicy):
        return False
    layout = policy.layout if isinstance(policy, HolovPolicy) else CropLayout.STRIPS
    crops = crops_of_grid(grid, policy.crops, layout) if ids is None else crops_of_ids(ids)
    wide = saliency.astype(np.float64)
    scores = np.array([wide[crop].mean() * (1090.0 if len(crop) > 1 else 1.0) for crop in crops])
    weights = scores / (scores.sum() + 1e-6)
    return len(crops) > 1 and (_near_whole(weights * quota) or _last_is_nearly_equal(weights, quota))


def _paper_hangs(policy: HolovPaperPolicy, saliency: Floats, quota: int, grid: Grid, features: Floats) -> bool:
    crops = crops_of_grid(grid, policy.crops, policy.layout)
    scores = [_holistic(saliency[crop].astype(np.float64), features[crop].astype(np.float64)) for crop in crops]
    means = np.array([score.mean() for score in scores]) ** policy.tau
    if means.max() < 1e-30:
        return False
    weights, sizes = means / means.sum(), np.array([len(crop) for crop in crops])
    shares = np.minimum(np.floor(weights * quota), sizes)
    surplus, pull = (np.floor(weights * quota) - shares).sum(), weights * (sizes - shares)
    extra = surplus * pull / max(pull.sum(), 1e-12)
    close = any(_nearly_equal(score) for score in [*scores, weights])
    return close or (len(crops) > 1 and (_near_whole(weights * quota) or _near_whole(extra)))


def _plus_hangs(crops: tuple[Int64Array, ...], saliency: Floats, quota: int, features: Floats) -> bool:
    """A floor, or the last token of a strip or of the whole picture, is nearer than float32 can tell."""
    alive, rows = saliency >= 0, features.astype(np.float64)
    centred = np.where(alive[:, None], rows - rows[alive].mean(0), 0)
    length = np.linalg.norm(centred, axis=1)
    unit = centred / np.maximum(length, np.maximum(1e-4 * np.linalg.norm(rows, axis=1), 1e-6))[:, None]
    similarity, wide = unit @ unit.T, saliency.astype(np.float64)
    before = (wide[None] > wide[:, None]) | ((wide[None] == wide[:, None]) & (np.tri(len(wide), k=-1) > 0))
    root = np.maximum(wide, 0) ** 0.25

    def scores(members: npt.NDArray[np.int64]) -> Wide:
        pairs = np.ix_(members, members)
        nearest = np.where(before[pairs], similarity[pairs], 0).max(1, initial=0)
        return np.asarray(root[members] * np.clip(1 - nearest, 0, 1))

    inside = [scores(crop) for crop in crops]
    means = np.array([score.mean() for score in inside])
    if means.sum() < 1e-30:
        return False
    shares = means / means.sum() * quota
    if len(crops) > 1 and _near_whole(shares):
        return True
    kept = np.zeros(len(wide), dtype=bool)
    for crop, score, share in zip(crops, inside, np.floor(shares).astype(int), strict=True):
        left = alive[crop]
        if _cut_is_close(score[left], share):
            return True
        kept[crop[left][np.argsort(-score[left], kind="stable")[:share]]] = True
    others = alive & ~kept
    return _cut_is_close(scores(np.arange(len(wide)))[others], quota - int(kept.sum()))


def _cut_is_close(values: Wide, taken: int) -> bool:
    """The last value that is taken and the first that is not differ by less than float32 can tell, but do differ."""
    if not 0 < taken < len(values):
        return False
    ordered = np.sort(values)[::-1]
    return bool(0 < ordered[taken - 1] - ordered[taken] < 1e-6 + 1e-5 * ordered[taken - 1])


def _scope_hangs(policy: ScopePolicy, saliency: Floats, quota: int, features: Floats) -> bool:
    """The best and the second best of some step differ by less than float32 can tell. Exact ties count: what is equal
    in one order of summation need not be in another."""
    similarity, weights = similarities(features), np.maximum(saliency.astype(np.float64), 0) ** policy.alpha
    covered, taken = np.zeros(len(saliency)), saliency < 0
    for _ in range(quota):
        gain = np.where(taken, -1.0, np.maximum(similarity - covered, 0).sum(1) * weights)
        best = int(gain.argmax())
        rivals = (gain >= 0) & (np.arange(len(gain)) != best)
        # each similarity is off by some 1e-7, whatever is left of it after subtraction, and the errors are independent
        error = 5e-7 * np.sqrt(len(gain)) * np.maximum(weights, weights[best])
        if (gain[best] - gain < error + 1e-6 * gain[best])[rivals].any():
            return True
        taken[best] = True
        covered = np.maximum(covered, similarity[best])
    return False


def similarities(features: Floats) -> Wide:
    """[N, D] -> [N, N] cosines in float64."""
    rows = features.astype(np.float64)
    unit = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-6)
    return np.asarray(unit @ unit.T)


def _divprune_hangs(similarity: Wide, left: npt.NDArray[np.bool_], quota: int) -> bool:
    """The lowest and the second lowest similarity of some step are nearer than float32 can tell; exact ties count."""
    others = np.where(np.eye(len(left), dtype=bool) | ~left[None], -2, similarity).max(1)
    nearest, usable = np.full(len(left), -2.0), left.copy()
    for step in range(min(quota, int(left.sum()))):
        score = np.where(usable, others if step == 0 else nearest, 3)
        best = int(score.argmin())
        if (np.delete(score, best) - score[best] < 2e-6).any():
            return True
        usable[best] = False
        nearest = np.maximum(nearest, similarity[best])
    return False


def _dpp_hangs(similarity: Wide, left: npt.NDArray[np.bool_], quota: int) -> bool:
    """The two that leave most are nearer than float32 can tell, or one of those left is as near to the floor.

    The first step's tie is exact everywhere, as are those of tokens below the floor.
    """
    rest = np.where(np.diag(similarity) > 0.5, 1.0, 0.0)
    factor, usable = np.zeros((0, len(left))), left.copy()
    for step in range(min(quota, int(left.sum()))):
        score = np.where(usable, np.where(rest > DPP_FLOOR, rest, 0), -1)
        best = int(score.argmax())
        rivals = np.delete(score, best)
        close = score[best] > 0 and (np.abs(score[best] - rivals) < 1e-5).any()
        if step > 0 and (close or (np.abs(rest[usable] - DPP_FLOOR) < 1e-5).any()):
            return True
        usable[best] = False
        if score[best] > 0:
            row = (similarity[best] - factor[:, best] @ factor) / np.sqrt(rest[best])
            factor, rest = np.vstack([factor, row]), rest - row**2
    return False


def _dart_hangs(policy: DartPolicy, similarity: Wide, length: Wide, left: npt.NDArray[np.bool_], quota: int) -> bool:
    """Two pivots are nearly of one length, or a pivot's last token and the first that it leaves are nearly alike."""
    length = np.where(left, length, -1)
    order = np.argsort(-length, kind="stable")
    pivots, kept = order[: min(policy.pivots, quota)], np.zeros(len(left), dtype=bool)
    longest = length[order[: len(pivots) + 1]]
    if (np.diff(longest) > -1e-5 * np.abs(longest[:-1])).any():
        return True
    kept[pivots] = True
    for number, pivot in enumerate(pivots):
        share = -(-(quota - int(kept.sum())) // (len(pivots) - number))
        likeness = np.where(kept | ~left, 3, similarity[pivot])
        ranked = np.argsort(likeness, kind="stable")
        if 0 < share < len(left) and likeness[ranked[share]] - likeness[ranked[share - 1]] < 2e-6:
            return True
        kept[ranked[:share]] = True
    return False


def _holistic(attention: npt.NDArray[np.float64], rows: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    size = len(attention)
    if size == 1:
        return attention
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    similarity = (unit @ unit.T) * (1 - np.eye(size))
    mean = similarity.sum(1, keepdims=True) / (size - 1)
    variance = ((similarity - mean) ** 2).sum(1) / (size - 1)
    return np.asarray(attention.mean() / max(variance.mean(), 1e-12) * variance + attention)


def _near_whole(shares: npt.NDArray[np.float64]) -> bool:
    near = np.abs(shares - np.round(shares)) < 1e-5 * shares
    return bool((near & (shares > 0.5)).any())


def _last_is_nearly_equal(weights: npt.NDArray[np.float64], quota: int) -> bool:
    """The last crop to get a left-over token and the first to get none differ by less than float32 can tell.

    Exact equality is no matter here: it is exact in every implementation, and the lower crop wins.
    """
    left = quota - int(np.floor(weights * quota).sum())
    if not 0 < left < len(weights):
        return False
    ranked = np.sort(weights)[::-1]
    return bool(0 < ranked[left - 1] - ranked[left] < 1e-5 * ranked[left - 1])


def _nearly_equal(values: npt.NDArray[np.float64]) -> bool:
    """Some two values differ by less than float32 can tell."""
    ordered = np.sort(values)
    return bool((np.diff(ordered) < 1e-5 * np.abs(ordered[1:])).any())
