#!/usr/bin/env python3
"""What each selection rule costs in ONNX Runtime on one core, without the encoder around it, and how that grows.

Each rule is a graph of its own at the true sizes of LLaVA-1.5-7B: N = 576 tokens, features as wide as what the rule
reads (1024 of the tower, 4096 of the projector, 64 of the keys), the product that makes the similarities included.
N = 2880 is LLaVA-NeXT's number of tokens. Times are CPU time of this process, single-threaded; the rules take turns,
and the median counts. With --encoder-seconds, the CPU time of the plain encoder, shares of it are printed as well.
"""

from __future__ import annotations

import argparse
import math
import os
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import torch
from machine import one_line, write_result
from rich.console import Console
from rich.table import Table

from holov_export.export.rule_graph import RuleAlone, onnx_from_rule
from holov_export.policies import POLICIES, FeatureSource, policy_from_settings
from holov_export.spec import OPSETS, Precision

WIDTHS = {FeatureSource.NONE: 1, FeatureSource.HIDDEN: 1024, FeatureSource.PROJECTED: 4096, FeatureSource.KEYS: 64}
GRIDS = {576: (24, 24), 2880: (60, 48)}


@dataclass
class Case:
    """One rule at one size, and its times so far in seconds."""

    method: str
    tokens: int
    width: int
    session: ort.InferenceSession
    seconds: dict[int, list[float]]

    def run(self, budget: int) -> None:
        feed = feed_of(self.tokens, self.width, budget)
        start = time.process_time()
        self.session.run(None, feed)
        self.seconds[budget].append(time.process_time() - start)

    def time(self, budget: int) -> float:
        return median(self.seconds[budget][1:])  # the first one allocates


def feed_of(tokens: int, width: int, budget: int) -> dict[str, np.ndarray]:
    """One picture: rows with a common part, as a tower's are, and attention with a heavy tail."""
    dice = np.random.default_rng(tokens)
    rows = dice.standard_normal((1, tokens, width)) + 2 * dice.standard_normal((1, 1, width))
    share = np.exp(1.5 * dice.standard_normal((1, tokens)))
    size = np.array([budget], dtype=np.int64)
    saliency = (share / share.sum()).astype(np.float32)
    return {"saliency": saliency, "features": rows.astype(np.float32), "quota": size, "budget": size}


def case_of(method: str, tokens: int, budgets: list[int]) -> Case:
    policy = policy_from_settings(method)
    width = WIDTHS[policy.features]
    model = onnx_from_rule(RuleAlone(policy, GRIDS[tokens]), tokens, width, OPSETS[Precision.FP32])
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    content = ir.serde.serialize_model(model).SerializeToString()
    session = ort.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    return Case(method, tokens, width, session, {budget: [] for budget in budgets})


def growth(small: float, large: float, factor: float) -> float:
    """The exponent g of a cost that grows like size^g."""
    return math.log(large / small) / math.log(factor)


def row_of(case: Case, budgets: list[int]) -> dict[str, Any]:
    small, large = budgets[-2], budgets[-1]
    step = (case.time(large) - case.time(small)) / (large - small)
    return {
        "method": case.method,
        "tokens": case.tokens,
        "width": case.width,
        "cpu_ms": {str(budget): round(1e3 * case.time(budget), 3) for budget in budgets},
        "ms_a_step": round(1e3 * step, 4),
        "growth_with_budget": round(growth(case.time(small), case.time(large), large / small), 2),
    }


def slopes_of(small: list[dict[str, Any]], large: list[dict[str, Any]], budget: str) -> dict[str, dict[str, float]]:
    """Exponents of N for each method: of the whole at `budget`, and of one step where steps take any time."""
    found: dict[str, dict[str, float]] = {}
    for few, many in zip(small, large, strict=True):
        factor = many["tokens"] / few["tokens"]
        found[few["method"]] = {"whole": round(growth(few["cpu_ms"][budget], many["cpu_ms"][budget], factor), 2)}
        if few["ms_a_step"] > 0.003:
            found[few["method"]]["step"] = round(growth(few["ms_a_step"], many["ms_a_step"], factor), 2)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=[name for name in POLICIES if name != "random"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[576, 2880], choices=sorted(GRIDS))
    parser.add_argument("--budgets", nargs="+", type=int, default=[1, 64, 192])
    parser.add_argument("--rounds", type=int, default=9, help="runs of each case after a first one (9)")
    parser.add_argument("--encoder-seconds", type=float, help="CPU time of the plain encoder, to print shares of it")
    parser.add_argument("--json", type=Path, help="write the result here as well")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(one_line())
    measured: list[list[dict[str, Any]]] = []
    for tokens in options.tokens:
        cases = [case_of(method, tokens, options.budgets) for method in options.methods]
        for _ in range(options.rounds + 1):
            for case in cases:
                for budget in options.budgets:
                    case.run(budget)
        measured.append([row_of(case, options.budgets) for case in cases])
    budget = str(options.budgets[-2])
    slopes = slopes_of(measured[0], measured[-1], budget) if len(options.tokens) > 1 else {}
    rows = [row for some in measured for row in some]
    show(rows, slopes, options.encoder_seconds, budget)
    if options.json:
        encoder = {"encoder_cpu_seconds": options.encoder_seconds} if options.encoder_seconds else {}
        write_result(options.json, {"rounds": options.rounds, **encoder, "rules": rows, "growth_with_tokens": slopes})


def show(
    rows: list[dict[str, Any]], slopes: dict[str, dict[str, float]], encoder_seconds: float | None, budget: str
) -> None:
    head = [f"K={budget}" for budget in rows[0]["cpu_ms"]]
    share = [f"of encoder, K={budget}"] if encoder_seconds else []
    table = Table("method", "N", "D", *head, "a step", "grows like", *share, title="CPU ms on one core")
    for row in rows:
        times = [f"{value:.2f}" for value in row["cpu_ms"].values()]
        part = [f"{row['cpu_ms'][budget] / (10 * encoder_seconds):.2f} %"] if encoder_seconds else []
        cells = [row["method"], str(row["tokens"]), str(row["width"]), *times, f"{row['ms_a_step']:.3f}"]
        table.add_row(*cells, f"K^{row['growth_with_budget']}", *part)
    console = Console(width=120)
    console.print(table)
    for method, slope in slopes.items():
        step = f", one step like N^{slope['step']}" if "step" in slope else ""
        console.print(f"{method}: grows like N^{slope['whole']} at K={budget}{step}")


if __name__ == "__main__":
    main()
