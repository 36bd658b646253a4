#!/usr/bin/env python3
"""Write what documentation takes from code and from benchmark results.

    python scripts/update_docs.py           rewrite docs/cli.md, docs/demo-answers.md, docs/estimates.md, the schemas
                                            of targets and recipes, the marked blocks of README.md and of others
    python scripts/update_docs.py --check   exit code 1 if any of them is out of date

A block lies between `<!-- NAME:start -->` and `<!-- NAME:end -->`. Numbers come from benchmarks/results
only, so a figure that was not measured cannot be written.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import click

from holov_export.cli import cli
from holov_export.cli.compile_decoder import compile_decoder
from holov_export.policies import POLICIES, FeatureSource
from holov_export.recipes import recipe_schema_text
from holov_export.targets import target_schema_text
from holov_export.verify.bench_report import markdown_table, remarks_of, report_from_file, tables_of

sys.path.append(str(Path(__file__).parent / "gpu"))
sys.path.append(str(Path(__file__).parent))
from answer_tables import (
    answers_block,
    answers_document,
    cuts_block,
    graphs_block,
    inside_block,
    published_block,
    rules_block,
    study_block,
)
from check_estimates import document as estimates_document
from gpu_report import gpu_block
from precision_tables import demo_block, error_block, kept_block, openvino_block, readme_block, ways_block

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing, say what is out of date")
    check = parser.parse_args().check
    stale = []
    for path, text in documents().items():
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            stale.append(path.relative_to(ROOT))
            if not check:
                path.write_text(text, encoding="utf-8")
    for name in stale:
        print(f"{name} {'is out of date: run scripts/update_docs.py' if check else 'written'}")
    return 1 if check and stale else 0


def documents() -> dict[Path, str]:
    """Every generated document as it should be."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for name, block in blocks().items():
        readme = replaced(readme, name, block)
    benchmarks = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    plus = (ROOT / "docs" / "holov-plus.md").read_text(encoding="utf-8")
    inside = (ROOT / "docs" / "inner-methods.md").read_text(encoding="utf-8")
    published = (ROOT / "docs" / "published-results.md").read_text(encoding="utf-8")
    cpu = (ROOT / "docs" / "cpu.md").read_text(encoding="utf-8")
    cpu_blocks = {"ways": ways_block, "kept": kept_block, "error": error_block, "openvino": openvino_block}
    for name, made in cpu_blocks.items():
        cpu = replaced(cpu, name, made())
    quantize = (ROOT / "docs" / "quantize.md").read_text(encoding="utf-8")
    return {
        ROOT / "docs" / "cli.md": cli_reference(),
        ROOT / "docs" / "cpu.md": cpu,
        ROOT / "docs" / "demo-answers.md": answers_document(),
        ROOT / "docs" / "estimates.md": estimates_document(),
        ROOT / "docs" / "holov-plus.md": replaced(plus, "study", study_block()),
        ROOT / "docs" / "inner-methods.md": replaced(inside, "demo-inside", inside_block()),
        ROOT / "docs" / "published-results.md": replaced(published, "published-answers", published_block()),
        ROOT / "docs" / "quantize.md": replaced(quantize, "demo-precisions", demo_block()),
        ROOT / "engines" / "target.schema.json": target_schema_text(),
        ROOT / "calibration" / "recipe.schema.json": recipe_schema_text(),
        ROOT / "README.md": readme,
        ROOT / "docs" / "benchmarks.md": replaced(
            replaced(benchmarks, "bench-demo", bench_tables("bench-demo-cpu.json")), "rules", rules_block()
        ),
    }


def blocks() -> dict[str, str]:
    """README block name -> Markdown."""
    return {
        "demo-output": demo_output(),
        "methods": methods_table(),
        "demo-answers": answers_block(),
        "published-answers": published_block(),
        "demo-cuts": cuts_block(),
        "demo-precisions": readme_block(),
        "encoder": encoder_table(),
        "graphs": graphs_block(),
        "prefill": prefill_table(),
        "true-size": true_size_table(),
        "true-size-families": true_size_families_table(),
        "serving": serving_table(),
        "gpu": gpu_block(RESULTS),
    }


def demo_output() -> str:
    """What `./scripts/demo` printed in a fresh clone (it writes `transcript.txt` beside its bundle)."""
    lines = (RESULTS / "demo-transcript.txt").read_text(encoding="utf-8").strip().splitlines()
    return "\n".join(["```", *(line.rstrip() for line in lines), "```"])


def replaced(text: str, name: str, block: str) -> str:
    """`text` with the block `name` filled; unchanged if it has no such block."""
    start, end = f"<!-- {name}:start -->", f"<!-- {name}:end -->"
    if start not in text:
        return text
    before, rest = text.split(start, 1)
    after = rest.split(end, 1)[1]
    return f"{before}{start}\n{block.strip()}\n{end}{after}"


def cli_reference() -> str:
    """docs/cli.md: the help of every command as click prints it."""
    parts = ["# Command line", "", "Written by `scripts/update_docs.py` from the commands' own help.", ""]
    top = click.Context(cli, info_name="holov-export", terminal_width=100, max_content_width=100)
    parts += ["```", cli.get_help(top), "```", ""]
    named = [(name, command) for name, command in cli.commands.items()]
    named.insert([name for name, _ in named].index("compile") + 1, ("compile --decoder", compile_decoder))
    for name, command in named:
        context = click.Context(command, info_name=name, parent=top, terminal_width=100, max_content_width=100)
        parts += [f"## {name}", "", "```", command.get_help(context), "```", ""]
    return "\n".join(line.rstrip() for part in parts for line in part.split("\n"))


def methods_table() -> str:
    """The selection rules, from their policies."""
    lines = ["| method | keeps | selects | source |", "|---|---|---|---|"]
    for name, policy in POLICIES.items():
        when = "early" if policy.features is FeatureSource.NONE else "late"
        lines.append(f"| `{name}` | {policy.summary} | {when} | {policy.source} |")
    return "\n".join(lines)


def serving_table() -> str:
    """Requests a second and time to the first token of scripts/bench_serving, for the model with 576 tokens."""
    result = read("serving-cpu.json")
    (model,) = (item for item in result["models"] if item["tokens"] == 576)
    found = {(row["clients"], row["mode"]): row for row in model["rows"]}
    everything, ninth, controlled = dict.fromkeys(row["mode"] for row in model["rows"])
    heads = [f"requests/s, {everything}", ninth, "ratio", "controller"]
    heads += [f"first token p50, {everything}", ninth, "controller"]
    lines = ["| clients | " + " | ".join(heads) + " |", "|---:|" + "---:|" * len(heads)]
    for clients in dict.fromkeys(row["clients"] for row in model["rows"]):
        rows = [found[clients, mode] for mode in (everything, ninth, controlled)]
        rates = [row["requests_per_second"] for row in rows]
        firsts = [f"{row['ttft_p50_seconds']:.2f} s" for row in rows]
        cells = [f"{rates[0]:.2f}", f"{rates[1]:.2f}", f"{rates[1] / rates[0]:.1f}x", f"{rates[2]:.2f}", *firsts]
        lines.append(f"| {clients} | " + " | ".join(cells) + " |")
    smallest, largest = model["controller_range"]
    note = (
        "`scripts/bench_serving`: a random model with LLaVA-1.5's 576 tokens and few, small layers, answers of at most "
        f"{model['new_tokens_at_most']} tokens, GenAI with {result['threads']} thread on {result['machine']['cpu']}, "
        f"clients on the same two cores, medians of {result['rounds']} interleaved rounds, no errors, "
        f"{result['date'][:10]}. The controller aims at {model['target_ttft_seconds']:g} s with budgets of {smallest} "
        f"to {largest}."
    )
    if result.get("note"):
        note += f" Note: {result['note']}."
    assert not result["faults"]
    return "\n".join([*lines, "", note])


def encoder_table() -> str:
    """Ratios of scripts/bench_encoder: CPU time of the ways to encode a picture, side by side in one run."""
    result = read("encoder-cpu.json")
    columns = [(batch, budget) for batch in result["batches"] for budget in (64, 192)]
    rows = {
        "the official way / ours, torch": "official / ours torch, K={}",
        "ours / plain encoder without selection, ONNX Runtime": "ours ORT / plain ORT, K={}",
        "ours / plain encoder without selection, torch": "ours torch / plain torch, K={}",
        "share of the selection itself, ONNX Runtime": "selection share of ours ORT, K={}",
    }
    lines = ["| CPU time | " + " | ".join(f"B={batch}, K={budget}" for batch, budget in columns) + " |"]
    lines.append("|---|" + "---|" * len(columns))
    for title, key in rows.items():
        cells = []
        for batch, budget in columns:
            value = result["batches"][batch]["ratios"][key.format(budget)]
            cells.append(f"{value:.2%}" if title.startswith("share") else f"{value:.2f}")
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    note = (
        f"CLIP ViT-L/14-336 and LLaVA-1.5-7B's projector, random weights, {result['threads']} thread on "
        f"{result['machine']['cpu']}, medians of interleaved runs, {result['date'][:10]} (`scripts/bench_encoder`). "
        "The official way is eager attention with all maps returned, the projector on all 576 tokens and the "
        "published loop."
    )
    if result.get("note"):
        note += f" Note: {result['note']}."
    wide, alone = read("encoder-cpu-mkl-avx512.json")["batches"], read("encoder-ort-cpu.json")["batches"]
    intel = read("encoder-cpu-intel.json")
    first = rows["the official way / ours, torch"]
    second = rows["ours / plain encoder without selection, ONNX Runtime"]
    more = (
        "How much the official way loses depends on how fast torch multiplies matrices: with MKL told to use its "
        f"AVX-512 kernels on that processor the first row is {wide['1']['ratios'][first.format(64)]:.2f} (B=1) and "
        f"{wide['4']['ratios'][first.format(64)]:.2f} (B=4) at K=64; on an {intel['machine']['cpu']}, where it does so "
        f"by itself, {intel['batches']['1']['ratios'][first.format(64)]:.2f} (B=1). A longer run of ONNX Runtime alone "
        "gave "
        f"{alone['1']['ratios'][second.format(64)]:.3f} and {alone['4']['ratios'][second.format(64)]:.3f} in the "
        "second row at K=64; the runs scatter by some percent."
    )
    return "\n".join([*lines, "", note, "", more])


def prefill_table() -> str:
    """Times of scripts/bench_prefill: time to the decoder's first token by visual tokens in the prompt."""
    result = read("prefill-cpu.json")
    precisions = result["precisions"]
    counts = list(next(iter(precisions.values()))["times"])
    lines = ["| decoder | " + " | ".join(f"{count} visual tokens" for count in counts) + " |"]
    lines.append("|---|" + "---|" * len(counts))
    for precision, found in precisions.items():
        times, ratios = found["times"], found["ttft_ratios"]
        cells = [f"{times[count]['ttft_ms']:.0f} ms ({ratios[count]:.1f}x)" for count in counts]
        lines.append(f"| {precision} | " + " | ".join(cells) + " |")
    note = (
        f"A random LLaMA of {result['layers']} layers and width {result['width']} in ONNX Runtime GenAI, "
        f"{result['threads']} threads on {result['machine']['cpu']}, medians of {result['repeats']} runs, "
        f"{result['date'][:10]} (`scripts/bench_prefill`)."
    )
    return "\n".join([*lines, "", note])


def true_size_table() -> str:
    """Time and memory of exporting the vision graph of a checkpoint of LLaVA-1.5-7B's size."""
    result = read("true-size-export.json")
    names = {"cli": "`--no-verify`", "cli-verified": "with the parity check"}
    lines = ["| export | precision | seconds | peak memory | read from disk |", "|---|---|---|---|---|"]
    for row in result["exports"]:
        if row["route"] in names:
            peak, disk = row["peak_rss_bytes"] / 1e9, row["disk_bytes_read"] / 1e9
            lines.append(
                f"| {names[row['route']]} | {row['precision']} | {row['seconds']:.0f} | {peak:.2f} GB | {disk:.2f} GB |"
            )
    note = (
        f"Vision graph of a {result['checkpoint_apparent_bytes'] / 1e9:.1f} GB directory with random weights on "
        f"{result['machine']['cpu']}, {result['date'][:10]} (`scripts/check_true_size`)."
    )
    return "\n".join([*lines, "", note])


def true_size_families_table() -> str:
    """Time, memory and nodes of exporting the vision graphs of the other models at true size."""
    lines = ["| model | graphs | seconds | peak memory | nodes |", "|---|---|---|---|---|"]
    paths = sorted(RESULTS.glob("true-size-*-module.json"))
    for path in paths:
        result = read(path.name)
        (row,) = result["exports"]
        nodes = row["nodes"]
        lines.append(
            f"| {result['model']} | {', '.join(nodes)} | {row['seconds']:.0f} | {row['peak_rss_bytes'] / 1e9:.2f} GB | "
            f"{' + '.join(map(str, nodes.values()))} |"
        )
    note = (
        f"The `holov` graphs in fp16, random weights, without the decoder and without hashes, one run each "
        f"on {result['machine']['cpu']}, {result['date'][:10]} "
        "(`scripts/check_true_size --routes module --precisions fp16`)."
    )
    return "\n".join([*lines, "", note])


def bench_tables(name: str) -> str:
    """The tables of a bench.json, or that there is none yet."""
    path = RESULTS / name
    if not path.is_file():
        return "Not measured yet."
    report = report_from_file(path)
    lines = [f"{report.machine}, {report.date}:", "", "```", report.command, "```"]
    for title, columns, rows in tables_of(report):
        lines += ["", f"**{title.capitalize()}**", "", *markdown_table(columns, rows)]
    return "\n".join([*lines, "", *(f"- {remark}." for remark in remarks_of(report))])


def read(name: str) -> dict[str, Any]:
    """A benchmark result."""
    result: dict[str, Any] = json.loads((RESULTS / name).read_text(encoding="utf-8"))
    return result


if __name__ == "__main__":
    sys.exit(main())
