#!/usr/bin/env python3
"""What the graphs of one bundle cost at true size: selection rules, and cuts inside the tower.

    scripts/bench_graphs --json benchmarks/results/graphs-cpu.json

CLIP ViT-L/14-336 and LLaVA-1.5-7B's projector with random weights; every graph over one weight file, as `holov-export
--method holov,scope,holov@12` writes them. In ONNX Runtime, CPU time of the process, medians of interleaved rounds. The
plain encoder (all 576 tokens, no selection) runs in every round, and each graph is divided by it. Graphs are taken a
few at a time, because each session holds all weights.

The share of the rule alone comes from ONNX Runtime's own profiler: nodes in the scope `selection/`.
"""

from __future__ import annotations

import argparse
import gc
import logging
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


def _threads_from_arguments() -> int:
    """Set the thread pools' size before torch is imported."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--threads", type=int, default=1)
    threads = int(parser.parse_known_args()[0].threads)
    os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = str(threads)
    return threads


THREADS = _threads_from_arguments()

import torch  # noqa: E402
from encoder_models import WeightsInMemory, spec_of_size, transformers_models  # noqa: E402
from machine import one_line, write_result  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

from holov_export.bundle import SCHEMA, VISION, Bundle, Manifest, graph_file, graph_tensors, provenance  # noqa: E402
from holov_export.export.onnx_from_graph import (  # noqa: E402
    onnx_from_graph,
    save_beside,
    save_vision,
)
from holov_export.policies import NoSelection, policy_from_settings  # noqa: E402
from holov_export.runtime.preprocess import pixels_from_images  # noqa: E402
from holov_export.runtime.runner_ort import OrtRunner  # noqa: E402
from holov_export.spec import CheckpointSource, ExportPlan, GraphPlan, ModelSpec, Precision, cuts_from_text  # noqa: E402
from holov_export.tensors import PixelBatch  # noqa: E402
from holov_export.verify.bench_selection import ort_selection_share  # noqa: E402
from holov_export.verify.operations import operations_of  # noqa: E402
from holov_export.verify.pictures import default_pictures  # noqa: E402
from holov_export.vision.families import vision_from_plan  # noqa: E402

GRAPHS = (
    *("holov", "cls-topk", "scope", "divprune", "visionzip", "dart", "cdpruner-unconditional", "holov-plus"),
    *("holov@20", "holov@18", "holov@16", "holov@14", "holov@12", "holov@10", "holov@8", "holov@6", "holov@4"),
    *("scope@12", "holov-plus@12", "holov@12:256,22"),
)
PLAIN = "none"


@dataclass(frozen=True)
class Sample:
    """One graph at one budget: process CPU milliseconds of each round, and of the plain encoder in the same rounds."""

    graph: str
    budget: int
    cpu_ms: tuple[float, ...]
    plain_ms: tuple[float, ...]

    def row(self, share: float | None, counted: float) -> dict[str, Any]:
        ours, plain = statistics.median(self.cpu_ms), statistics.median(self.plain_ms)
        found = {
            "cpu_ms": round(ours, 1),
            "plain_cpu_ms": round(plain, 1),
            "ratio": round(ours / plain, 4),
            "ratio_by_counting_products": round(counted, 4),
        }
        return found if share is None else {**found, "selection_share": round(share, 6)}


def graph_plan(name: str, spec: ModelSpec) -> GraphPlan:
    """The plan that --method NAME asks for."""
    rule, _, layers = name.partition("@")
    policy = NoSelection() if rule == PLAIN else policy_from_settings(rule)
    cuts = cuts_from_text(layers, spec.vision)[0] if layers else ()
    return GraphPlan(policy=policy, cuts=cuts)


def written_bundle(names: Sequence[str], spec: ModelSpec, folder: Path) -> Bundle:
    """All graphs over one weight file, the plain encoder's first."""
    eager, _, projector = transformers_models(spec)
    reader: Any = WeightsInMemory.from_models(eager, projector)
    graphs = [graph_plan(name, spec) for name in (PLAIN, *names)]
    plan = ExportPlan(
        model=spec,
        source=CheckpointSource(kind="local", name="random"),
        policy=graphs[0].policy,
        also=tuple(graphs[1:]),
        precision=Precision.FP32,
        decoder=None,
    )
    for graph in graphs:
        began = time.perf_counter()
        alone = plan.of_graph(graph)
        model = onnx_from_graph(vision_from_plan(alone, reader), alone)
        if graph is graphs[0]:
            save_vision(model, folder)
        else:
            save_beside(model, folder, graph_file(graph.name))
        size = (folder / (VISION if graph is graphs[0] else graph_file(graph.name))).stat().st_size
        seconds = time.perf_counter() - began
        print(f"  exported {graph.name}: {seconds:.0f} s, {size / 1e3:.0f} kB", file=sys.stderr, flush=True)
        gc.collect()
    inputs, outputs = (graph_tensors(side) for side in plan.signature)
    manifest = Manifest(
        schema_version=SCHEMA, plan=plan, inputs=inputs, outputs=outputs, artifacts=(), provenance=provenance("", {})
    )
    return Bundle(folder, manifest)


def interleaved(
    bundle: Bundle, names: Sequence[str], pixels: PixelBatch, budgets: Sequence[int], repeats: int
) -> Iterator[Sample]:
    """Rounds of the plain encoder and a few graphs at every budget; the order turns by one each round."""
    tokens = bundle.manifest.plan.model.vision.tokens
    runners = {name: OrtRunner(bundle.of_method(name), provider="cpu", threads=THREADS) for name in (PLAIN, *names)}
    cases = [(PLAIN, tokens), *((name, budget) for name in names for budget in budgets)]
    taken: dict[tuple[str, int], list[float]] = {case: [] for case in cases}
    for name, budget in cases:
        runners[name].run(pixels, budget)  # allocates
    for number in range(repeats):
        turn = number % len(cases)
        for name, budget in cases[turn:] + cases[:turn]:
            began = time.process_time()
            runners[name].run(pixels, budget)
            taken[name, budget].append((time.process_time() - began) * 1e3)
        print(f"  {', '.join(names)}: round {number + 1}/{repeats}", file=sys.stderr, flush=True)
    for runner in runners.values():
        runner.close()
    for name, budget in cases[1:]:
        yield Sample(name, budget, tuple(taken[name, budget]), tuple(taken[PLAIN, tokens]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1, help="of ONNX Runtime (1)")
    parser.add_argument("--repeats", type=int, default=5, help="interleaved rounds (5)")
    parser.add_argument("--layers", type=int, default=24, help="layers of the tower, fewer for a quick run (24)")
    parser.add_argument("--budgets", type=int, nargs="+", default=[64], help="tokens kept (64)")
    parser.add_argument("--graphs", nargs="+", default=list(GRAPHS), help="rules, with @LAYER for a cut in the tower")
    parser.add_argument("--together", type=int, default=4, help="graphs that are in memory at a time (4)")
    parser.add_argument("--note", default="", help="what is special about this run; kept in the result")
    parser.add_argument("--json", type=Path, help="write the result here as well")
    options = parser.parse_args()
    torch.set_num_threads(THREADS)
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    print(one_line())
    spec = spec_of_size(options.layers)
    rows: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory(prefix="bench-graphs-") as work, torch.no_grad():
        bundle = written_bundle(options.graphs, spec, Path(work))
        gc.collect()
        picture = next(picture for name, picture in default_pictures() if picture.width > 1)
        pixels = pixels_from_images([picture], spec.image.model_copy(update={"resize_to": (336, 336)}))
        plain = operations_of(bundle.manifest.plan, spec.vision.tokens)
        for at in range(0, len(options.graphs), options.together):
            few = options.graphs[at : at + options.together]
            for sample in interleaved(bundle, few, pixels, options.budgets, options.repeats):
                view = bundle.of_method(sample.graph)
                share = ort_selection_share(view, pixels, sample.budget, provider="cpu", threads=THREADS, runs=2).share
                counted = operations_of(view.manifest.plan, sample.budget) / plain
                rows[f"{sample.graph} K={sample.budget}"] = sample.row(share, counted)
    table = Table("graph", "CPU ms", "plain", "ratio", "by counting", "share of the rule", title="", box=None)
    for name, row in rows.items():
        cells = [f"{row['cpu_ms']:.0f}", f"{row['plain_cpu_ms']:.0f}", f"{row['ratio']:.3f}"]
        table.add_row(name, *cells, f"{row['ratio_by_counting_products']:.3f}", f"{row['selection_share']:.2%}")
    Console(width=120).print(table)
    if options.json:
        result = {"threads": THREADS, "layers": options.layers, "repeats": options.repeats, "graphs": rows}
        write_result(options.json, {"note": options.note, **result} if options.note else result)


if __name__ == "__main__":
    main()
