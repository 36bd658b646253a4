#!/usr/bin/env python3
"""Compares our `holov-official` rule and its reference with the published HoloV function, on random inputs.

    git clone https://github.com/obananas/HoloV
    python scripts/check_official.py HoloV/llava/model/utils.py

Kept rows and their order are compared, zero rows included. Rows are recognised by exact equality with the input rows,
so the features are what they are, without any marker.

Differences are forgiven, and counted apart, only where the published result itself hangs on a rounding:
    floor tie   a crop's share w K is within 1e-5 of a whole number
    rank tie    the last crop that gets one of the left-over tokens and the first that gets none have equal weights
    attention   two tokens of one crop have the very same attention (torch.topk leaves their order open)
"Equal" means within 1e-5, widened by what the published diversity term does not cancel: a crop whose similarity
variance is m scores mean(A) (1 + 0.09 m / (m + 1e-6)) and not mean(A) 1.09. Ends with status 1 on any other difference.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from holov_export.policies import CropLayout, HolovOfficialPolicy
from holov_export.selection.geometry import crops_of_grid
from holov_export.selection.reference import positions_of
from holov_export.selection.registry import rule_from_policy

TIE = 1e-5
TIES = {"floor tie", "rank tie", "attention"}
BATCH = 5
Floats = npt.NDArray[np.float32]
Published = Callable[[Tensor, Tensor, int, int], Tensor]
ATTENTION = ("softmax", "sharp softmax", "pareto", "one strip", "flat")
FEATURES = ("noise", "clusters", "anisotropic")


@dataclass(frozen=True)
class Case:
    """One shape of input: grid, crops P, budget K."""

    grid: tuple[int, int]
    crops: int
    budget: int


CASES = [
    *(Case((24, 24), 16, budget) for budget in (1, 7, 16, 64, 128, 192, 300, 575, 576)),
    *(Case((24, 24), crops, 64) for crops in (1, 5, 8, 100)),
    *(Case((12, 12), 16, budget) for budget in (8, 16, 48, 144)),
    *(Case((5, 10), 7, budget) for budget in (5, 20, 49)),
    *(Case((3, 5), 8, budget) for budget in (2, 9)),
]


def published_function(path: Path) -> Published:
    """The `HoloV` function of a published utils.py."""
    spec = importlib.util.spec_from_file_location("published_utils", path)
    if spec is None or spec.loader is None:
        raise SystemExit(f"{path} is no Python file.")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "HoloV"):
        raise SystemExit(f"{path} has no function HoloV.")
    function: Published = module.HoloV
    return function


def random_attention(kind: str, batch: int, tokens: int, dice: np.random.Generator) -> Floats:
    """float32 [B, N], each row a part of a distribution (the CLS column is missing, so it sums to less than 1)."""
    if kind == "softmax":
        logits = dice.standard_normal((batch, tokens))
    elif kind == "sharp softmax":
        logits = dice.standard_normal((batch, tokens)) * 3
    elif kind == "pareto":
        logits = np.log(dice.pareto(1.0, (batch, tokens)) + 1e-3)
    elif kind == "one strip":
        logits = dice.standard_normal((batch, tokens))
        start = dice.integers(0, tokens, batch)
        for image in range(batch):
            logits[image, start[image] : start[image] + max(1, tokens // 16)] += 5
    else:
        logits = dice.standard_normal((batch, tokens)) * 0.01
    share = np.exp(logits)
    cls = dice.uniform(0.02, 0.3, (batch, 1))
    row: Floats = (share / share.sum(1, keepdims=True) * (1 - cls)).astype(np.float32)
    return row


def random_features(kind: str, batch: int, tokens: int, width: int, dice: np.random.Generator) -> Floats:
    """float32 [B, N, D]: noise, clusters of similar rows around a common mean, or a few strong directions."""
    rows = dice.standard_normal((batch, tokens, width))
    if kind == "clusters":
        centres = dice.standard_normal((batch, 12, width)) * 2 + dice.standard_normal((batch, 1, width))
        rows = rows * 0.3 + np.take_along_axis(centres, dice.integers(0, 12, (batch, tokens))[..., None], axis=1)
    elif kind == "anisotropic":
        rows = rows * np.geomspace(20, 0.05, width) + dice.standard_normal((batch, 1, width)) * 3
    return rows.astype(np.float32)


def kept_rows(output: Tensor, features: Tensor) -> list[int]:
    """Positions of the output's rows among the input's rows; -1 for a zero row."""
    place = {row.tobytes(): index for index, row in enumerate(features.numpy())}
    assert len(place) == len(features), "two input rows are equal"
    return [place[row.tobytes()] if row.any() else -1 for row in output.numpy()]


def similarity_variance(features: Floats) -> float:
    """Mean over a crop's tokens of the published diversity term, in float64; the zero diagonal is counted as there."""
    rows = features.astype(np.float64)
    unit = rows / (np.linalg.norm(rows, axis=1, keepdims=True) + 1e-6)
    similarity = unit @ unit.T
    np.fill_diagonal(similarity, 0.0)
    mean = similarity.sum(axis=1, keepdims=True) / (len(rows) - 1)
    return float(np.mean(np.sum((similarity - mean) ** 2, axis=1) / (len(rows) - 1)))


def ties_of(attention: Floats, features: Floats, case: Case) -> set[str]:
    """Which roundings this picture's published result hangs on, see the top of the file."""
    crops = crops_of_grid(case.grid, case.crops, CropLayout.STRIPS)
    wide = attention.astype(np.float64)
    variances = [similarity_variance(features[crop]) for crop in crops if len(crop) > 1]
    slack = 2 * 0.09 / 1.09 * max((1e-6 / (variance + 1e-6) for variance in variances), default=0.0)
    scores = np.array([wide[crop].mean() * (1090.0 if len(crop) > 1 else 1.0) for crop in crops])
    weights = scores / (scores.sum() + 1e-6)
    shares = weights * case.budget
    found = set()
    if np.any(np.abs(shares - np.round(shares)) < TIE + slack * shares):
        found.add("floor tie")
    left = case.budget - int(np.floor(shares).sum())
    ranked = np.sort(weights)[::-1]
    if 0 < left < len(ranked) and ranked[left - 1] - ranked[left] < (TIE + slack) * ranked[left]:
        found.add("rank tie")
    if any(len(np.unique(attention[crop])) < len(crop) for crop in crops):
        found.add("attention")
    return found


def differing(case: Case, published: Published, attention: Floats, features: Floats) -> Iterator[set[str]]:
    """What was seen, image by image: "rule", "reference" (they differ), "zero rows", and the ties."""
    policy = HolovOfficialPolicy(crops=case.crops)
    rule = rule_from_policy(policy, case.grid)
    rows, seen = torch.from_numpy(features), torch.from_numpy(attention)
    output = published(rows.clone(), seen.clone(), case.crops, case.budget)
    positions, _ = rule(seen, None, torch.full((len(rows),), case.budget), torch.tensor([case.budget]))
    for image in range(len(rows)):
        expected = kept_rows(output[image], rows[image])
        ours = positions[image, : case.budget].tolist()
        loops = positions_of(policy, attention[image], case.budget, case.grid).tolist()
        seen_here = {"rule"} if ours != expected else set()
        seen_here |= {"reference"} if loops != expected else set()
        seen_here |= {"zero rows"} if -1 in expected else set()
        yield seen_here | ties_of(attention[image], features[image], case)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("published", type=Path, metavar="PUBLISHED_UTILS_PY", help="llava/model/utils.py")
    parser.add_argument("--images", type=int, default=6000, help="at least so many random images (6000)")
    parser.add_argument("--width", type=int, default=48, help="width of the feature rows (48)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    published = published_function(options.published)
    dice = np.random.default_rng(options.seed)
    combinations = [(case, kind, rows) for case in CASES for kind in ATTENTION for rows in FEATURES]
    rounds = math.ceil(options.images / (len(combinations) * BATCH))
    counts: Counter[str] = Counter()
    torch.set_num_threads(1)
    with torch.inference_mode():
        for case, kind, rows in combinations * rounds:
            tokens = case.grid[0] * case.grid[1]
            attention = random_attention(kind, BATCH, tokens, dice)
            features = random_features(rows, BATCH, tokens, options.width, dice)
            for seen in differing(case, published, attention, features):
                count(counts, seen)
                if seen & {"rule", "reference"} and not seen & TIES:
                    print(f"{sorted(seen)}: {case}, attention {kind}, features {rows}")
    report(counts)
    raise SystemExit(1 if counts["rule: NO TIE"] or counts["reference: NO TIE"] else 0)


def count(counts: Counter[str], seen: set[str]) -> None:
    """Add one image to the counts."""
    counts["images"] += 1
    for name in ("zero rows", *sorted(TIES)):
        counts[f"images with {name}"] += name in seen
    for name in ("rule", "reference"):
        counts[f"{name} differs"] += name in seen
        for tie in sorted(TIES):
            counts[f"{name} differs, {tie}"] += {name, tie} <= seen
        counts[f"{name}: NO TIE"] += name in seen and not seen & TIES


def report(counts: Counter[str]) -> None:
    """All counts, in the order in which they were first met."""
    for name, value in counts.items():
        print(f"{name:48} {value}")


if __name__ == "__main__":
    main()
