"""Tables of documents about answers: what the demo model keeps, what others published, what graphs cost."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from holov_export.evaluate.report import evaluation_from_file, markdown_of
from holov_export.evaluate.results import CellResult, Evaluation, MetricValue, value_of

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
#: what the published figures are about, in the order of the columns
PUBLISHED = ("HoloV", "SCOPE", "DivPrune", "VisionZip", "DART", "CDPruner", "SparseVLM", "PyramidDrop", "FastV")
WORDS = (
    "Written by `scripts/update_docs.py` from `benchmarks/results/demo-*.json`, which `scripts/evaluate_demo.py` made. "
    "The demo model is a toy of 2.3 M parameters that answers about digits on photographs: it compares rules, it does "
    "not say what a real model loses."
)
#: budgets at which README shows differences
DIFFERENCES = (16, 8, 4)


def read(name: str) -> dict[str, Any]:
    """A file of benchmarks/results."""
    result: dict[str, Any] = json.loads((RESULTS / name).read_text(encoding="utf-8"))
    return result


def markdown(head: Sequence[str], rows: Iterator[Sequence[str]] | Sequence[Sequence[str]]) -> list[str]:
    """The lines of a Markdown table; all columns but the first are right-aligned."""
    lines = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)]
    return [*lines, *("| " + " | ".join(row) + " |" for row in rows)]


def percent(item: MetricValue | None) -> str:
    """ "93.0 [90.2, 95.5]"."""
    if item is None or item.value is None:
        return ""
    if item.low is None or item.high is None:
        return f"{100 * item.value:.1f}"
    return f"{100 * item.value:.1f} [{100 * item.low:.1f}, {100 * item.high:.1f}]"


def points(item: MetricValue | None) -> str:
    """ "+4.1 [+2.0, +6.5]"."""
    if item is None or item.value is None or item.low is None or item.high is None:
        return ""
    return f"{100 * item.value:+.1f} [{100 * item.low:+.1f}, {100 * item.high:+.1f}]"


def about(found: Evaluation) -> str:
    """What an evaluation asked, of whom, on what."""
    libraries = {item.name: item.version for item in found.machine.libraries}
    decoder = (
        f"transformers {libraries['transformers']}"
        if found.ask.decoder == "hf"
        else f"ONNX Runtime GenAI {libraries['onnxruntime-genai']}"
    )
    return (
        f"{found.data.questions} questions on {found.data.groups} held-out scenes, % right [95 % interval, drawing "
        f"whole scenes]; {found.bundle.precision}, {decoder}, {found.machine.cpu}, {found.date[:10]}, "
        f"`{found.command}`."
    )


def _cell(found: Evaluation, method: str, budget: int) -> CellResult | None:
    return next((cell for cell in found.cells if (cell.method, cell.budget) == (method, budget)), None)


def _accuracy(found: Evaluation, *, code: bool = True) -> list[str]:
    tokens, metric = found.bundle.tokens, found.metric
    head = ["rule", *(f"{budget} ({budget / tokens:.1%})" for budget in found.budgets)]
    rows = []
    for method in found.methods:
        cells = [_cell(found, method, budget) for budget in found.budgets]
        values = [percent(value_of(cell.metrics, metric)) if cell else "" for cell in cells]
        rows.append([f"`{method}`" if code else method, *values])
    return markdown(head, rows)


def answers_block() -> str:
    """README: every rule at every budget, and the paired differences to HoloV."""
    found = evaluation_from_file(RESULTS / "demo-answers.json")
    budgets = [budget for budget in DIFFERENCES if budget in found.budgets]
    head = [f"minus `{found.baseline}`, points", *(f"{budget} tokens" for budget in budgets)]
    rows = []
    for method in found.methods:
        cells = [_cell(found, method, budget) for budget in budgets]
        values = [points(value_of(cell.differences, found.metric)) if cell else "" for cell in cells]
        if method != found.baseline and any(values):
            rows.append([f"`{method}`", *values])
    unpruned = percent(value_of(found.reference.metrics, found.metric))
    intro = f"All {found.bundle.tokens} tokens: {unpruned}."
    return "\n".join([intro, "", *_accuracy(found), "", about(found), "", *markdown(head, rows)])


def answers_document() -> str:
    """docs/demo-answers.md: the whole report of the three evaluations."""
    parts = [
        "# The demo model's answers",
        "",
        WORDS,
    ]
    for title, name in (
        ("Exported rules", "demo-answers.json"),
        ("Cuts inside the tower", "demo-cuts.json"),
        ("Rules inside the language model", "demo-inside.json"),
    ):
        if (RESULTS / name).is_file():
            text = markdown_of(evaluation_from_file(RESULTS / name))
            body = "\n".join(f"#{line}" if line.startswith("#") else line for line in text.splitlines()[1:])
            parts += ["", f"## {title}", body.rstrip()]
    return "\n".join(parts).rstrip() + "\n"


def cuts_block() -> str:
    """README: answers against the layer that decides, and what the encoder costs then."""
    found = evaluation_from_file(RESULTS / "demo-cuts.json")
    return "\n".join([*_accuracy(found), "", about(found)])


def inside_block() -> str:
    """docs/inner-methods.md: the demo model's answers, with the tokens that a layer sees."""
    if not (RESULTS / "demo-inside.json").is_file():
        return "Not measured yet."
    found = evaluation_from_file(RESULTS / "demo-inside.json")
    rows = []
    for cell in found.cells:
        value = percent(value_of(cell.metrics, found.metric))
        rows.append([f"`{cell.method}`", str(cell.budget), f"{cell.layer_tokens:.1f}", value])
    head = ["rule", "budget", "tokens a layer sees, mean", "% right"]
    return "\n".join([*markdown(head, rows), "", about(found)])


def graphs_block() -> str:
    """README: CPU time of graphs at true size, as shares of the plain encoder's."""
    if not (RESULTS / "graphs-cpu.json").is_file():
        return "Not measured yet."
    result = read("graphs-cpu.json")
    rows = []
    for name, row in result["graphs"].items():
        graph, _, budget = name.partition(" K=")
        share = f"{row['selection_share']:.2%}" if "selection_share" in row else ""
        rows.append([f"`{graph}`", budget, f"{row['ratio']:.3f}", f"{row['ratio_by_counting_products']:.3f}", share])
    head = ["graph", "K", "time / plain encoder", "by counting products", "of it, the rule alone"]
    note = (
        f"CLIP ViT-L/14-336 and LLaVA-1.5-7B's projector, random weights, N = 576, ONNX Runtime, {result['threads']} "
        f"thread on {result['machine']['cpu']}, process CPU time, medians of {result['repeats']} interleaved rounds, "
        f"{result['date'][:10]} (`scripts/bench_graphs`)."
    )
    if result.get("note"):
        note += f" {result['note']}"
    return "\n".join([*markdown(head, rows), "", note])


def rules_block() -> str:
    """docs/benchmarks.md: what each rule costs alone, and how that grows."""
    result = read("selection-rules-cpu.json")
    growth = result["growth_with_tokens"]
    rows = []
    for row in result["rules"]:
        times = [f"{row['cpu_ms'][budget]:.1f}" for budget in ("1", "64", "192")]
        grows = growth[row["method"]]["whole"] if row["tokens"] > 576 else None
        rows.append(
            [
                f"`{row['method']}`",
                str(row["tokens"]),
                str(row["width"]) if row["width"] > 1 else "",
                *times,
                f"{row['ms_a_step']:.3f}",
                "" if grows is None else f"N^{grows:.1f}",
            ]
        )
    head = ["rule", "N", "D", "K = 1", "K = 64", "K = 192", "one more token", "grows like, at K = 64"]
    note = (
        f"CPU ms, one thread on {result['machine']['cpu']}, the product of all pairs of rows included where a rule "
        f"needs it, {result['date'][:10]} (`scripts/check_rules.py`)."
    )
    return "\n".join([*markdown(head, rows), "", note])


def published_block() -> str:
    """README: what others published of LLaVA-1.5-7B."""
    data = json.loads((ROOT / "benchmarks" / "published" / "llava-1.5-7b.json").read_text(encoding="utf-8"))
    rows = []
    for source in data["sources"]:
        for tokens, values in source["tokens"].items():
            cells = [f"{values[name]:g}" if name in values else "" for name in PUBLISHED]
            rows.append([f"{source['name']}, by {source['by']}", tokens, *cells])
    return "\n".join(markdown(["source", "tokens of 576", *PUBLISHED], rows))


def study_block() -> str:
    """docs/holov-plus.md: both halves, and the variants."""
    result = read("holov-plus-study.json")
    parts: list[str] = []
    for name in ("test", "development"):
        half = result[name]
        budgets = list(next(iter(half["accuracy"].values())))
        head = [f"{name} half", *(f"{budget} tokens" for budget in budgets)]
        rows = [[f"`{rule}`", *(_plain(row[budget]) for budget in budgets)] for rule, row in half["accuracy"].items()]
        rows += [
            [f"`holov-plus` minus `{rule}`", *(_signed(row[budget]) for budget in budgets)]
            for rule, row in half["holov-plus minus"].items()
        ]
        whole = _plain(half["all tokens"])
        parts += [
            *markdown(head, rows),
            "",
            f"{half['questions']} questions, {half['scenes']} scenes; all tokens: {whole}.",
            "",
        ]
    variants = result["development"]["variants"]
    budgets = list(next(iter(variants.values())))
    head = ["development half, minus `holov-plus`", *(f"{budget} tokens" for budget in budgets)]
    rows = [[title, *(_signed(row[k]["minus holov-plus"]) for k in budgets)] for title, row in variants.items()]
    note = f"{result['machine']['cpu']}, {result['date'][:10]}, `{result['command']}`; % or points [95 % interval]."
    return "\n".join([*parts, *markdown(head, rows), "", note])


def _plain(row: Sequence[float]) -> str:
    return f"{row[0]:.1f} [{row[1]:.1f}, {row[2]:.1f}]"


def _signed(row: Sequence[float]) -> str:
    return f"{row[0]:+.2f} [{row[1]:+.2f}, {row[2]:+.2f}]"
