#!/usr/bin/env python3
"""Ask the demo bundle about its held-out scenes, with all tokens and with a ninth of them, side by side.

    python scripts/ask_demo.py BUNDLE [--json OUT] [--repeats 9]

Prints answers and medians of interleaved runs. TTFT holds preprocessing, vision, stitching and prefill.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import median

from rich.console import Console
from rich.table import Table

from holov_export import Session
from holov_export.assets import data_folder
from holov_export.tensors import Generation, SamplingSettings

GREEDY = SamplingSettings(max_new_tokens=16)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--repeats", type=int, default=9, help="timed runs of each budget")
    parser.add_argument("--json", type=Path, help="write the rows as JSON")
    options = parser.parse_args()

    scenes = data_folder("demo-scenes")
    questions = json.loads((scenes / "questions.json").read_text(encoding="utf-8"))
    rows = []
    with Session.open(options.bundle, provider="cpu") as session:
        tokens = session.bundle.manifest.plan.model.vision.tokens
        budgets = (tokens, session.default_budget)
        for item in questions:
            runs: dict[int, list[Generation]] = {budget: [] for budget in budgets}
            for _ in range(options.repeats + 1):  # the first run of each warms up
                for budget in budgets:
                    answer = session.ask(scenes / item["image"], item["question"], budget=budget, sampling=GREEDY)
                    runs[budget].append(answer)
            rows.append({"item": item, "runs": {budget: runs[budget][1:] for budget in budgets}})
    _print(rows, budgets)
    if options.json:
        options.json.write_text(json.dumps(_plain(rows, budgets), indent=2) + "\n", encoding="utf-8")


def _print(rows: list[dict], budgets: tuple[int, int]) -> None:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("scene")
    table.add_column("question")
    table.add_column("truth")
    for budget in budgets:
        table.add_column(f"{budget} tokens")
        table.add_column("prefill", justify="right")
        table.add_column("TTFT", justify="right")
    table.add_column("prefill is", justify="right")
    setups = []
    for row in rows:
        item, cells, prefill = row["item"], [], []
        for budget in budgets:
            answers = row["runs"][budget]
            mark = "right" if answers[0].text.strip() == item["answer"] else "WRONG"
            ttft = median(answer.timings.ttft for answer in answers)
            setups.append(median(answer.timings.setup for answer in answers))
            prefill.append(median(answer.timings.prefill for answer in answers))
            cells += [f"{answers[0].text.strip()} ({mark})", f"{prefill[-1] * 1e3:.1f} ms", f"{ttft * 1e3:.1f} ms"]
        cells.append(f"{prefill[0] / prefill[1]:.1f}x faster")
        table.add_row(item["image"], item["question"], item["answer"], *cells)
    console = Console(width=None if Console().is_terminal else 140)
    console.print(table)
    console.print(f"Medians. TTFT holds {median(setups) * 1e3:.1f} ms in which GenAI prepares for any prompt.")


def _plain(rows: list[dict], budgets: tuple[int, int]) -> list[dict]:
    return [
        {
            **row["item"],
            "answers": {
                str(budget): {
                    "text": row["runs"][budget][0].text.strip(),
                    "ttft_ms": median(answer.timings.ttft for answer in row["runs"][budget]) * 1e3,
                    "prefill_ms": median(answer.timings.prefill for answer in row["runs"][budget]) * 1e3,
                }
                for budget in budgets
            },
        }
        for row in rows
    ]


if __name__ == "__main__":
    main()
