#!/usr/bin/env python3
"""Compares the estimator with published figures, and writes docs/estimates.md.

    python scripts/check_estimates.py           print every figure: estimate, published, ratio; rewrite the document
    python scripts/check_estimates.py --check   change nothing; exit code 1 if the document is out of date

The figures and the shapes of their models are in benchmarks/published. All rows are estimated with the same shares
(`holov_export.estimate.roofline.SHARES`). The goal is a ratio within 1.5 either way for two thirds of the figures of
the files that count; the document says what came out, whatever it is, and so does --check.
"""

from __future__ import annotations

import argparse
import json
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from holov_export.estimate.memory import memory_of
from holov_export.estimate.report import estimate
from holov_export.estimate.roofline import Format, Machine, format_of
from holov_export.estimate.shapes import ModelShape, shape_from_name
from holov_export.estimate.stages import prefill_seconds, step_seconds, vision_seconds
from holov_export.spec import DecoderPrecision
from holov_export.targets import EngineTarget, list_targets, target_from_name

ROOT = Path(__file__).resolve().parent.parent
PUBLISHED = ROOT / "benchmarks" / "published"
DOCUMENT = ROOT / "docs" / "estimates.md"
WITHIN = 1.5
GOAL = 2 / 3
UNITS = {
    "vision_ms": "vision ms",
    "prefill_ms": "prefill ms",
    "decode_tokens_per_s": "decode tokens/s",
    "memory_mb": "memory MB",
}


@dataclass(frozen=True)
class Figure:
    """One published number beside its estimate."""

    target: str
    model: str
    what: str
    estimate: float
    published: float

    @property
    def ratio(self) -> float:
        return self.estimate / self.published

    @property
    def close(self) -> bool:
        return 1 / WITHIN <= self.ratio <= WITHIN


def figures_of(data: dict[str, Any]) -> list[Figure]:
    """Every figure of one file of benchmarks/published."""
    shapes = {shape["name"]: ModelShape.model_validate(shape) for shape in data["shapes"]}
    return [figure for row in data["rows"] for figure in _figures(row, shapes[row["model"]], data["group"])]


def _figures(row: dict[str, Any], shape: ModelShape, group: int) -> Iterator[Figure]:
    target = target_from_name(row["target"])
    estimates = estimates_of(row, shape, target, group)
    for what in UNITS:
        if what in row:
            yield Figure(row["target"], row["model"], what, estimates[what], row[what])


def estimates_of(row: dict[str, Any], shape: ModelShape, target: EngineTarget, group: int) -> dict[str, float]:
    """The estimator's own numbers: vision tower fp16 without selection, 4-bit layers, output matrix fp16."""
    if row["image_tokens"] != shape.vision.tokens:
        raise ValueError(f"{shape.name} has {shape.vision.tokens} image tokens, the row says {row['image_tokens']}")
    machine, half = Machine(target), format_of(target, "fp16")
    four = Format(half.rate, 0.5 + 2 / group, half.value, weight_only=True)
    prompt = row["prompt_tokens"]
    memory = memory_of(shape, half, four, half, prompt=prompt, context=shape.decoder.context, batch=1)
    return {
        "vision_ms": 1e3 * vision_seconds(machine, shape, half, budget=shape.vision.tokens, batch=1),
        "prefill_ms": 1e3 * prefill_seconds(machine, shape, four, half, prompt=prompt, batch=1),
        "decode_tokens_per_s": 1 / step_seconds(machine, shape, four, half, past=prompt, batch=1),
        "memory_mb": memory.total / 1e6,
    }


def read_published() -> list[dict[str, Any]]:
    """The files of benchmarks/published that hold such figures, those that count first."""
    files = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(PUBLISHED.glob("edge-llm*.json"))]
    return sorted(files, key=lambda data: not data["counted"])


def times_of(figures: list[Figure]) -> list[Figure]:
    """Those that the goal is about: memory is reported beside them."""
    return [figure for figure in figures if figure.what != "memory_mb"]


def share_of(figures: list[Figure]) -> str:
    """ "11 of 15 (73 %)": how many are within the factor."""
    close = sum(figure.close for figure in figures)
    return f"{close} of {len(figures)} ({close / len(figures):.0%})"


def document() -> str:
    """docs/estimates.md."""
    parts = [HEAD]
    for data in read_published():
        parts += _section(data)
    parts += [*_boards(), TAIL]
    return "\n".join(parts).rstrip() + "\n"


def _section(data: dict[str, Any]) -> list[str]:
    figures = figures_of(data)
    lines = [f"## {data['title']}", "", wrapped(f"{data['conditions']} Source: {'; '.join(data['sources'])}."), ""]
    lines += ["| target | model | figure | estimate | published | ratio | |", "|---|---|---|---|---|---|---|"]
    for figure in figures:
        mark = "" if figure.close else f"beyond {WITHIN}"
        lines.append(
            f"| {figure.target} | {figure.model} | {UNITS[figure.what]} | {figure.estimate:.1f} | "
            f"{figure.published:.1f} | {figure.ratio:.2f} | {mark} |"
        )
    times = times_of(figures)
    met = "which meets" if sum(item.close for item in times) >= GOAL * len(times) else "which misses"
    goal = f", {met} the goal of two thirds" if data["counted"] else ""
    lines += ["", f"**Within a factor of {WITHIN}: {share_of(times)} of the times and rates{goal}.**", ""]
    for row in data["rows"]:
        if "note" in row:
            lines.append(wrapped(f"- {row['model']} on {row['target']}: {row['note']}."))
    for row in data["left_out"]:
        said = ", ".join(f"{UNITS.get(key, key.replace('_', ' '))} {value:g}" for key, value in row["figures"].items())
        lines.append(wrapped(f"- left out: {row['model']} on {row['target']} ({said}): {row['reason']}."))
    return [*lines, ""]


def wrapped(text: str) -> str:
    """Markdown in lines of at most 120 characters; what follows a list item's first line is indented."""
    indent = "  " if text.startswith("- ") else ""
    return textwrap.fill(text, 120, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def _boards() -> list[str]:
    """What the estimator is for: one model on every board (not on every JetPack of it)."""
    shape = shape_from_name("llava-1.5-7b")
    rows, needed = [], 0
    for target in list_targets():
        if "-jetpack" in target.name:
            continue
        found = estimate(shape, target, precision="fp16", decoder=DecoderPrecision.INT4, context=1024)
        full, needed = found.rows[0], max(needed, found.rows[0].memory_bytes)
        first = " | ".join(f"{row.ttft_ms:.0f}" for row in found.rows)
        cells = f"{full.vision_ms:.1f} | {first} | {full.decode_tokens_per_s:.0f} | {'yes' if found.fits else 'no'}"
        rows.append(f"| {target.name} | {cells} |")
    return [*BOARDS.format(needed=needed / 1e9).splitlines(), *rows, "", THOR, ""]


BOARDS = """## LLaVA-1.5-7B, board by board

Vision engine fp16, decoder int4 (ONNX Runtime GenAI's blocks of 32), batch 1, 32 text tokens, room for 1024:
{needed:.1f} GB. Estimates; nothing here has run on these boards.

    holov-export estimate llava-1.5-7b --target NAME --decoder-precision int4 --context 1024

| target | vision ms | TTFT ms at 576 | at 192 | at 64 | decode tokens/s | fits |
|---|---|---|---|---|---|---|"""
THOR = """On Thor, INT4 kernels as slow as those of the first table would make prefill three times as long."""

HEAD = """# How good are the estimates?

Written by `scripts/check_estimates.py` from `benchmarks/published`.

`holov-export estimate` multiplies what a model has to compute and to move by what a target can do: peak rates of
`engines/*.toml`, and the share of them that kernels commonly reach. The shares are in
`holov_export/estimate/roofline.py`, one value each with its reason, and they are the same for every row below. They are
round numbers that were settled with NVIDIA's figures in view, so the first table is a calibration and not a blind test;
the second came later.

None of these figures was measured by this project. A ratio above 1 means that the estimate is higher than what was
published: too slow for a time, too fast for a rate.
"""

TAIL = """## What an estimate does not know

- the power mode: rates are those of the highest clocks;
- how good the kernels of one runtime are for one type on one chip (INT4 on Thor, above);
- what else the machine does: preprocessing, the host between kernels, another process;
- GPUs with fast memory: no figure above is of one. There the cost of a kernel weighs more, and decoding at batch 1 is
  likely slower than the estimate;
- selection is counted as some small kernels, `scope` as a round of them for each token of the budget; its true share
  has to be measured in an engine;
- memory is weights, activations, the KV cache (for 4096 tokens in the first two tables, whose sources do not say) and a
  fixed sum for the runtime; a builder needs more while it works, and so does an engine with several profiles.

Use it to choose between boards and budgets. Before a decision that costs money, run the engine.
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing, say whether the document is up to date")
    check = parser.parse_args().check
    for data in read_published():
        figures = figures_of(data)
        print(data["title"])
        for figure in figures:
            print(
                f"  {figure.target:22} {figure.model:18} {UNITS[figure.what]:17} estimate {figure.estimate:8.1f}  "
                f"published {figure.published:8.1f}  ratio {figure.ratio:.2f}{'' if figure.close else '  *'}"
            )
        print(f"  within {WITHIN}: {share_of(times_of(figures))}")
    text = document()
    stale = not DOCUMENT.is_file() or DOCUMENT.read_text(encoding="utf-8") != text
    if stale and not check:
        DOCUMENT.write_text(text, encoding="utf-8")
        print(f"{DOCUMENT.relative_to(ROOT)} written")
    elif stale:
        print(f"{DOCUMENT.relative_to(ROOT)} is out of date: run scripts/check_estimates.py")
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
