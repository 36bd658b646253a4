#!/usr/bin/env python3
"""How many held-out questions does the demo model answer through the exported bundle, per rule and budget?

    python scripts/evaluate_demo.py --scenes 120 --json benchmarks/results/demo-answers.json

Exports one bundle a rule into a temporary folder (vision float32, decoder float32), draws held-out scenes (digits and
photograph regions that training never saw) and asks every question through `Session`: ONNX Runtime and GenAI, greedy.
The random control runs with three seeds. Intervals are 95 %, bootstrapped over scenes.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parent))
from demo_scenes import write_held_out
from machine import write_result

from holov_export import Session
from holov_export.pipeline import ExportRequest, export_bundle
from holov_export.policies import policy_from_settings
from holov_export.spec import DecoderPrecision, Precision
from holov_export.tensors import SamplingSettings

GREEDY = SamplingSettings(max_new_tokens=16)
RULES: tuple[tuple[str, dict[str, str]], ...] = (
    ("holov", {}),
    ("holov-official", {}),
    ("holov-paper", {}),
    ("scope", {}),
    ("cls-topk", {}),
    ("uniform", {}),
    ("random", {"seed": "0"}),
    ("random", {"seed": "1"}),
    ("random", {"seed": "2"}),
)


@dataclass(frozen=True)
class Question:
    image: Path
    text: str
    answers: tuple[str, ...]
    kind: str
    scene: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=int, default=120, help="held-out scenes, some ten questions each")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--budgets", default="144,48,16,8,4")
    parser.add_argument("--rules", help="only these, comma separated")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    budgets = [int(budget) for budget in options.budgets.split(",")]
    wanted = set(options.rules.split(",")) if options.rules else {name for name, _ in RULES}

    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        questions = held_out_questions(Path(folder) / "scenes", options.scenes, options.seed)
        results = {}
        for name, settings in RULES:
            if name not in wanted:
                continue
            label = f"{name} seed {settings['seed']}" if settings else name
            bundle = exported(Path(folder) / label.replace(" ", "-"), name, settings)
            needed = budgets if label == "holov" else [budget for budget in budgets if budget < 144]
            if name == "holov-official":
                needed = budgets  # at the full budget the published code loses tokens
            results[label] = {budget: answered(bundle, questions, budget) for budget in needed}
            print(label, {k: round(float(v.mean()), 4) for k, v in results[label].items()}, file=sys.stderr)
    scenes = np.array([question.scene for question in questions])
    kinds = np.array([question.kind for question in questions])
    rows = {
        label: {str(budget): summary(right, scenes, kinds) for budget, right in of_budget.items()}
        for label, of_budget in results.items()
    }
    print_table(rows, budgets, len(questions), options.scenes)
    if options.json:
        seconds = round(time.perf_counter() - began, 1)
        write_result(
            options.json, {"questions": len(questions), "scenes": options.scenes, "seconds": seconds, "rules": rows}
        )


def held_out_questions(folder: Path, scenes: int, seed: int) -> list[Question]:
    """Write the scenes and read their questions back."""
    write_held_out(folder, scenes, seed)
    lines = (folder / "data.jsonl").read_text(encoding="utf-8").splitlines()
    return [
        Question(folder / row["image"], row["question"], tuple(row["answers"]), row["kind"], row["scene"])
        for row in map(json.loads, lines)
    ]


def exported(folder: Path, method: str, settings: dict[str, str]) -> Path:
    """Export the demo model with one rule."""
    policy = policy_from_settings(method, settings)
    export_bundle(ExportRequest("demo", policy, Precision.FP32, DecoderPrecision.FP32, folder))
    return folder


def answered(bundle: Path, questions: list[Question], budget: int) -> np.ndarray:
    """bool [questions]: which are answered right at a budget."""
    right = []
    with Session.open(bundle, provider="cpu", threads=1) as session:
        for question in questions:
            answer = session.ask(question.image, question.text, budget=budget, sampling=GREEDY)
            right.append(answer.text.strip() in question.answers)
    return np.array(right)


def summary(right: np.ndarray, scenes: np.ndarray, kinds: np.ndarray) -> dict:
    """Accuracy with its interval (resampling whole scenes) and by kind of question."""
    rng = np.random.default_rng(0)
    names = np.unique(scenes)
    sums = np.array([right[scenes == name].sum() for name in names])
    sizes = np.array([(scenes == name).sum() for name in names])
    draws = rng.integers(0, len(names), (2000, len(names)))
    means = sums[draws].sum(1) / sizes[draws].sum(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return {
        "accuracy": float(right.mean()),
        "interval": [float(low), float(high)],
        "by_kind": {str(kind): float(right[kinds == kind].mean()) for kind in np.unique(kinds)},
    }


def print_table(rows: dict, budgets: list[int], questions: int, scenes: int) -> None:
    table = Table(
        title=f"{questions} held-out questions, {scenes} scenes; accuracy in %", box=None, title_justify="left"
    )
    table.add_column("rule")
    for budget in budgets:
        table.add_column(f"{budget} tokens", justify="right")
    for label, row in rows.items():
        cells = []
        for budget in budgets:
            cell = row.get(str(budget))
            if cell is None:
                cells.append("")
                continue
            low, high = cell["interval"]
            cells.append(f"{cell['accuracy']:.1%} [{low:.1%}, {high:.1%}]".replace("%", ""))
        table.add_row(label, *cells)
    Console(width=150).print(table)


if __name__ == "__main__":
    main()
