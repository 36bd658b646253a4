#!/usr/bin/env python3
"""Draw docs/images/cuts.png from benchmarks/results: what a cut inside the tower keeps and what it saves.

    python scripts/plot_cuts.py

Left, the demo model's answers against the layer that decides (demo-cuts.json); right, the encoder's CPU time at true
size against it (graphs-cpu.json). Two different models: the demo's tower has 6 layers, LLaVA-1.5's has 24.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

sys.path.insert(0, str(Path(__file__).resolve().parent))
from answer_tables import RESULTS, ROOT, read

from holov_export.evaluate.report import evaluation_from_file
from holov_export.evaluate.results import Evaluation, value_of

PICTURE = ROOT / "docs" / "images" / "cuts.png"
COLOURS = {"holov": "#0072B2", "holov-plus": "#D55E00"}
STYLES = ("-", "--", ":", "-.")


def main() -> None:
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10.5, 4.2), layout="constrained")
    draw_answers(left, evaluation_from_file(RESULTS / "demo-cuts.json"))
    draw_times(right, read("graphs-cpu.json"))
    figure.savefig(PICTURE, dpi=140, format="png")
    print(PICTURE.relative_to(ROOT))


def draw_answers(axis: Any, found: Evaluation) -> None:
    """Share of the answers that is kept, a curve for each rule and budget."""
    feature_layer = 4
    for rule, colour in COLOURS.items():
        names = {layer: f"{rule}@{layer}" for layer in range(feature_layer)} | {feature_layer: rule}
        for budget, style in zip(found.budgets, STYLES, strict=False):
            points = []
            for layer, name in names.items():
                cell = next((cell for cell in found.cells if (cell.method, cell.budget) == (name, budget)), None)
                kept = value_of(cell.retention, found.metric) if cell else None
                if kept is not None and kept.value is not None and kept.low is not None and kept.high is not None:
                    points.append((layer, 100 * kept.value, 100 * kept.low, 100 * kept.high))
            layers, values, low, high = zip(*points, strict=True)
            axis.plot(layers, values, style, color=colour, marker="o", markersize=3, label=f"{rule}, {budget} tokens")
            axis.fill_between(layers, low, high, color=colour, alpha=0.06)
    axis.set_xticks(range(feature_layer + 1))
    axis.set_xlabel(f"layer that decides ({feature_layer} is the usual place)")
    axis.set_ylabel("answers kept, % of all 144 tokens")
    axis.set_title(f"Demo model, 6 layers: {found.data.questions} questions", fontsize=10)
    axis.legend(fontsize=7, loc="lower right", handlelength=3.5)
    axis.grid(alpha=0.3)


def draw_times(axis: Any, result: dict[str, Any]) -> None:
    """Time over that of the plain encoder, measured and by counting products."""
    rows = {name.removesuffix(" K=64"): row for name, row in result["graphs"].items() if name.endswith(" K=64")}
    cuts = {
        int(name.partition("@")[2]): row for name, row in rows.items() if name.startswith("holov@") and ":" not in name
    }
    cuts[22] = rows["holov"]
    layers = sorted(cuts)
    axis.plot(layers, [cuts[layer]["ratio"] for layer in layers], color="#0072B2", marker="o", label="measured")
    counted = [cuts[layer]["ratio_by_counting_products"] for layer in layers]
    axis.plot(layers, counted, "--", color="#009E73", label="by counting products")
    axis.axhline(1.0, color="black", linewidth=0.8)
    axis.set_ylim(0, 1.05)
    axis.set_xticks(layers)
    axis.set_xlabel("layer that decides (22 is the usual place)")
    axis.set_ylabel("encoder time / plain encoder")
    axis.set_title("CLIP ViT-L/14-336, random weights, 64 of 576 tokens", fontsize=10)
    axis.legend(fontsize=8, loc="lower right")
    axis.grid(alpha=0.3)


if __name__ == "__main__":
    main()
