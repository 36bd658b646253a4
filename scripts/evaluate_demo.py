#!/usr/bin/env python3
"""What pruning costs the demo model in answers: `holov-export evaluate` on held-out scenes, for the README.

    python scripts/evaluate_demo.py rules  OUT --json benchmarks/results/demo-answers.json
    python scripts/evaluate_demo.py cuts   OUT --json benchmarks/results/demo-cuts.json
    python scripts/evaluate_demo.py inside OUT --json benchmarks/results/demo-inside.json

rules   every exported rule at six budgets
cuts    cuts inside the tower: the layer that decides, from the first to the feature layer, at four budgets
inside  rules that prune inside the language model, on transformers, with two exported ones beside them

Exports the demo model (vision and decoder float32) with the graphs that a part needs, draws held-out scenes (digits and
photograph regions that training never saw), and evaluates. Everything lies in OUT, and a run that was killed goes on.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from demo_scenes import write_held_out
from machine import command

from holov_export.cli import run
from holov_export.evaluate.report import JSON, PLOT, evaluation_from_file
from holov_export.policies import POLICIES

#: of 144 tokens: all, a third, two ninths, a ninth, 5.6 % and 2.8 %
BUDGETS = "144,48,32,16,8,4"
LAYERS = (0, 1, 2, 3)  # the feature layer is 4


@dataclass(frozen=True)
class Part:
    """One table: the graphs of its bundle, the methods it shows, budgets, and further options of `evaluate`."""

    graphs: tuple[str, ...]
    methods: tuple[str, ...]
    budgets: str = BUDGETS
    options: tuple[str, ...] = ()


def _cuts(*rules: str) -> tuple[str, ...]:
    return tuple(name for rule in rules for name in (*(f"{rule}@{layer}" for layer in LAYERS), rule))


PARTS = {
    "rules": Part(tuple(POLICIES), tuple(POLICIES)),
    "cuts": Part(
        (*_cuts("holov", "holov-plus"), "holov-plus@2:48,4"),
        (*_cuts("holov", "holov-plus"), "holov-plus@2:48,4"),
        "48,32,16,8",
    ),
    "inside": Part(
        ("holov", "scope"),
        ("holov", "scope", "fastv", "sparsevlm", "pyramiddrop"),
        "72,48,32,16",
        ("--decoder", "hf"),
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("out", type=Path, help="folder for scenes, bundle and answers; a second run goes on in it")
    parser.add_argument("--scenes", type=int, default=200, help="held-out scenes, some nine questions each (200)")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--json", type=Path, help="write the evaluation here as well")
    parser.add_argument("--plot", type=Path, help="write the plot here as well")
    options = parser.parse_args()
    part, work = PARTS[options.part], options.out / options.part
    scenes, bundle = options.out / f"scenes-{options.scenes}-{options.seed}", work / "demo"
    if not (scenes / "data.jsonl").is_file():
        write_held_out(scenes, options.scenes, options.seed)
    if not bundle.is_dir():
        call("--model", "demo", "-o", str(bundle), "--method", ",".join(part.graphs))
    words = ("--methods", ",".join(part.methods), "--budgets", part.budgets, "--threads", "1", "--provider", "cpu")
    call("evaluate", str(bundle), str(scenes / "data.jsonl"), "-o", str(work), *words, *part.options)
    if options.json:
        found = evaluation_from_file(work / JSON).model_copy(update={"command": command()})
        options.json.write_text(found.model_dump_json(indent=2) + "\n", encoding="utf-8")
    if options.plot:
        shutil.copyfile(work / PLOT, options.plot)


def call(*words: str) -> None:
    """Run a command of holov-export in this process; an error ends the script with its exit code."""
    print("$ holov-export", *words, file=sys.stderr, flush=True)
    code = run(list(words))
    if code:
        sys.exit(code)


if __name__ == "__main__":
    main()
