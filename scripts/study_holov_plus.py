#!/usr/bin/env python3
"""The rule `holov-plus` against others on the demo model: chosen on one half of the scenes, reported on the other.

    python scripts/study_holov_plus.py --json benchmarks/results/holov-plus-study.json

Held-out scenes of eight seeds; the even ones are the development half, the odd ones the test half. The rules are those
of `holov_export.selection`, in torch; answers are greedy and must be exact. Ten questions of a scene are read at once
behind one picture, each seeing the picture and itself alone, which gives the answers of ten prompts (see
`demo_training.PackedLayout`). Intervals are 95 %, by drawing whole scenes.

The development half also shows what the parts of the rule are worth: other strips, and features from other places.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent))

import demo_scenes
import demo_training
import numpy as np
import torch
from demo_checkpoint import vocabulary
from machine import write_result
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from holov_export.assets import data_folder
from holov_export.policies import FeatureSource, policy_from_settings
from holov_export.selection.registry import rule_from_policy

SEEDS = (101, 102, 103, 104, 201, 202, 203, 204)
BUDGETS = (48, 32, 16, 8, 4)
GRID = (demo_scenes.GRID, demo_scenes.GRID)
RULES = ("scope", "divprune", "holov", "cls-topk", "holov-plus")
OURS, REFERENCE = "holov-plus", "scope"
#: title -> settings of the rule, and what it reads
VARIANTS: dict[str, tuple[dict[str, str], str]] = {
    "one strip": ({"crops": "1"}, "hidden"),
    "6 strips": ({"crops": "6"}, "hidden"),
    "48 strips": ({"crops": "48"}, "hidden"),
    "16 tiles": ({"layout": "tiles"}, "hidden"),
    "input of the feature layer": ({}, "input"),
    "the same after its norm": ({}, "normed"),
    "its keys": ({}, "keys"),
}


@dataclass(frozen=True)
class Half:
    """S scenes. ids, targets: packed questions; fair: bool [S, 10], asked; saliency [S, N]; features by source."""

    ids: Tensor
    targets: Tensor
    fair: Tensor
    saliency: Tensor
    features: dict[str, Tensor]

    @property
    def scenes(self) -> int:
        return len(self.saliency)


def halves(llava: Any, layout: Any, scenes: int) -> dict[str, Half]:
    """The development half and the test half of `scenes` scenes a seed."""
    bank, photographs = demo_scenes.digit_bank("held-out"), demo_scenes.photo_bank("held-out")
    parts: dict[str, list[Half]] = {"development": [], "test": []}
    for seed in SEEDS:
        rng = np.random.default_rng([seed, 99])
        batch = demo_scenes.scene_batch(bank, photographs, scenes, rng)
        questions = [demo_scenes.questions_of_scene(batch, index, rng) for index in range(scenes)]
        ids, targets = layout.pack(questions)
        fair = torch.tensor([_fair(asked, int(count)) for asked, count in zip(questions, batch.count, strict=True)])
        saliency, features = seen(llava, batch.images)
        for name, start in (("development", 0), ("test", 1)):
            take = slice(start, None, 2)
            kept = {source: rows[take] for source, rows in features.items()}
            parts[name].append(Half(ids[take], targets[take], fair[take], saliency[take], kept))
        print(f"  scenes of seed {seed}", file=sys.stderr, flush=True)
    return {name: _joined(items) for name, items in parts.items()}


def _fair(questions: list[demo_scenes.Question], digits: int) -> list[bool]:
    """Each question once; of a scene with one digit no position is asked."""
    return [
        (digits > 1 or item.kind not in demo_scenes.POSITIONS) and item not in questions[:index]
        for index, item in enumerate(questions)
    ]


def _joined(parts: list[Half]) -> Half:
    features = {name: torch.cat([part.features[name] for part in parts]) for name in parts[0].features}
    columns = [torch.cat([getattr(part, name) for part in parts]) for name in ("ids", "targets", "fair", "saliency")]
    return Half(*columns, features)


@torch.no_grad()
def seen(llava: Any, images: np.ndarray) -> tuple[Tensor, dict[str, Tensor]]:
    """(saliency [S, N], features [S, N, ..] from several places) of some pictures."""
    tower = getattr(llava.model.vision_tower, "vision_model", llava.model.vision_tower)
    index = len(tower.encoder.layers) - 2
    layer, saliency = tower.encoder.layers[index], []
    found: dict[str, list[Tensor]] = {"hidden": [], "projected": [], "input": [], "normed": [], "keys": []}
    for start in range(0, len(images), 64):
        pixels = demo_training.pixels_from_images(images[start : start + 64])
        states = tower(pixels, output_hidden_states=True).hidden_states
        saliency.append(demo_training.cls_attention(tower, pixels))
        normed = layer.layer_norm1(states[index])
        rows = {"hidden": states[index + 1], "input": states[index], "normed": normed}
        rows["keys"] = layer.self_attn.k_proj(normed)
        rows["projected"] = llava.model.multi_modal_projector(states[index + 1])
        for name, values in rows.items():
            found[name].append(values[:, 1:])
    return torch.cat(saliency), {name: torch.cat(rows) for name, rows in found.items()}


@torch.no_grad()
def kept(half: Half, method: str, settings: dict[str, str], source: str | None, budget: int) -> Tensor:
    """int64 [S, K]: positions that a rule keeps."""
    policy = policy_from_settings(method, settings)
    rule, parts = rule_from_policy(policy, GRID), []
    source = source or policy.features.value
    for start in range(0, half.scenes, 100):
        few = slice(start, start + 100)
        saliency = half.saliency[few]
        features = None if policy.features is FeatureSource.NONE else half.features[source][few]
        quota = torch.full((len(saliency),), budget)
        parts.append(rule(saliency, features, quota, torch.tensor([budget])).positions[:, :budget])
    return torch.cat(parts)


class Answers:
    """Counts right answers of scenes from their kept rows."""

    def __init__(self, llava: Any, layout: Any) -> None:
        self.layout, self.reader = layout, demo_training.Reader(llava, layout).eval()

    @torch.no_grad()
    def right(self, half: Half, positions: Tensor) -> np.ndarray:
        """float64 [S]: right answers of each scene."""
        counts = []
        for start in range(0, half.scenes, 50):
            few = slice(start, start + 50)
            rows = demo_training.gathered(half.features["hidden"][few], positions[few])
            targets = half.targets[few]
            good = (self.reader(rows, half.ids[few]).argmax(-1) == targets) | (targets == -100)
            whole = torch.stack([good[:, self.layout.slot == slot].all(1) for slot in range(10)], 1)
            counts.append((whole & half.fair[few]).sum(1))
        return torch.cat(counts).numpy().astype(np.float64)


def value(right: np.ndarray, asked: np.ndarray) -> list[float]:
    """[share, low, high] in %: of right answers, or of a difference of two counts."""
    draws = np.random.default_rng(0).integers(0, len(right), (2000, len(right)))
    means = right[draws].sum(1) / asked[draws].sum(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return [round(100 * float(number), 2) for number in (right.sum() / asked.sum(), low, high)]


def studied(half: Half, score: Callable[[Tensor], np.ndarray], *, variants: bool) -> dict[str, Any]:
    """Accuracy of every rule at every budget, and the differences of ours to the others."""
    asked = half.fair.sum(1).numpy().astype(np.float64)
    everything = torch.arange(GRID[0] * GRID[1]).expand(half.scenes, -1)
    counts = {rule: {k: score(kept(half, rule, {}, None, k)) for k in BUDGETS} for rule in RULES}
    found: dict[str, Any] = {
        "scenes": half.scenes,
        "questions": int(asked.sum()),
        "all tokens": value(score(everything), asked),
        "accuracy": {rule: {str(k): value(counts[rule][k], asked) for k in BUDGETS} for rule in RULES},
        "holov-plus minus": {
            rule: {str(k): value(counts[OURS][k] - counts[rule][k], asked) for k in BUDGETS}
            for rule in RULES
            if rule != OURS
        },
    }
    if variants:
        found["variants"] = {}
        for title, (settings, source) in VARIANTS.items():
            of_variant = {k: score(kept(half, OURS, settings, source, k)) for k in BUDGETS}
            found["variants"][title] = {
                str(k): {
                    "accuracy": value(of_variant[k], asked),
                    "minus holov-plus": value(of_variant[k] - counts[OURS][k], asked),
                }
                for k in BUDGETS
            }
    return found


def show(name: str, found: dict[str, Any]) -> None:
    table = Table("rule", *(f"{k} tokens" for k in BUDGETS), title_justify="left", box=None)
    table.title = (
        f"{name}: {found['questions']} questions, {found['scenes']} scenes, all tokens {found['all tokens'][0]}"
    )
    for rule, row in found["accuracy"].items():
        table.add_row(rule, *("{} [{}, {}]".format(*row[str(k)]) for k in BUDGETS))
    for rule, row in found["holov-plus minus"].items():
        table.add_row(f"holov-plus - {rule}", *("{:+} [{:+}, {:+}]".format(*row[str(k)]) for k in BUDGETS))
    for title, row in found.get("variants", {}).items():
        cells = (row[str(k)]["minus holov-plus"] for k in BUDGETS)
        table.add_row(f"{title} - holov-plus", *("{:+} [{:+}, {:+}]".format(*cell) for cell in cells))
    Console(width=150).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=int, default=250, help="of each of the eight seeds; half of them a half (250)")
    parser.add_argument("--json", type=Path, help="write the result here as well")
    options = parser.parse_args()
    torch.set_num_threads(1)
    checkpoint = data_folder("demo-model")
    llava = LlavaForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32).eval().requires_grad_(False)
    layout = demo_training.PackedLayout(vocabulary())
    answers = Answers(llava, layout)
    result: dict[str, Any] = {"seeds": list(SEEDS), "scenes_of_a_seed": options.scenes}
    for name, half in halves(llava, layout, options.scenes).items():

        def score(positions: Tensor, half: Half = half) -> np.ndarray:
            return answers.right(half, positions)

        result[name] = studied(half, score, variants=name == "development")
        show(name, result[name])
    if options.json:
        write_result(options.json, result)


if __name__ == "__main__":
    main()
