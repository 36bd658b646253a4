#!/usr/bin/env python3
"""What selecting costs and saves in Qwen2.5-VL's vision tower at true size, and what windows cost that are not whole.

    scripts/bench_qwen_vision --json benchmarks/results/qwen-vision-cpu.json

The tower of Qwen2.5-VL-3B or 7B with random weights: 32 blocks, float32, in ONNX Runtime, CPU time of the process,
medians of interleaved rounds. Each pruned graph (a ninth of the tokens stays) is divided by the plain encoder's of the
same round and picture. Every grid runs; two grids of equally many patches, one in whole windows and one not, say what
the filling of windows costs, for all else in them is the same.
"""

from __future__ import annotations

import argparse
import gc
import logging
import os
import resource
import statistics
import sys
import tempfile
import time
import warnings
from collections import Counter
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

import numpy as np  # noqa: E402
import onnx  # noqa: E402
import onnxruntime  # noqa: E402
import torch  # noqa: E402
from encoder_models import WeightsInMemory  # noqa: E402
from machine import one_line, write_result  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

from holov_export.bundle import VISION, graph_file  # noqa: E402
from holov_export.export.onnx_from_graph import onnx_from_graph, save_beside, save_vision  # noqa: E402
from holov_export.policies import NoSelection, SelectionPolicy, policy_from_settings  # noqa: E402
from holov_export.runtime.packing import packed_inputs  # noqa: E402
from holov_export.runtime.preprocess_patches import patch_layout  # noqa: E402
from holov_export.signature import BUDGET, PIXEL_VALUES, QUOTA  # noqa: E402
from holov_export.spec import (  # noqa: E402
    CheckpointSource,
    DecoderSpec,
    ExportPlan,
    ModelSpec,
    PatchImageSpec,
    Precision,
    PromptSpec,
    QwenVisionSpec,
)
from holov_export.tensors import CropBox, Region  # noqa: E402
from holov_export.vision.families import vision_from_plan  # noqa: E402
from holov_export.vision.qwen2_5_vl import QwenVision, checkpoint_names  # noqa: E402

PLAIN = "none"
#: width of the language model. Source: config.json of Qwen/Qwen2.5-VL-{3B,7B}-Instruct
WIDTHS = {"3b": 2048, "7b": 3584}
#: 448 x 448 pixels; 1008 x 700, a picture of 1000 x 700; as many tokens as that in 57 windows instead of 63
GRIDS = ("16x16", "25x36", "12x75")


@dataclass(frozen=True)
class Case:
    """One grid of tokens: the graph's inputs for a graph and a budget."""

    grid: tuple[int, int]

    @property
    def name(self) -> str:
        return f"{self.grid[0]}x{self.grid[1]}"

    @property
    def tokens(self) -> int:
        return self.grid[0] * self.grid[1]

    def feed(self, plan: ExportPlan, quota: int) -> dict[str, np.ndarray]:
        vision = plan.model.vision
        assert isinstance(vision, QwenVisionSpec)
        layout = patch_layout("image", (Region(self.grid, CropBox(0, 0, 1, 1)),), vision)
        packed = packed_inputs((layout,), plan, np.array([quota]))
        dice = np.random.default_rng(self.tokens)
        pixels = dice.standard_normal((layout.rows, vision.patch_values)).astype(np.float32)
        feed = {array.name: np.asarray(array.values) for array in packed.arrays}
        return {PIXEL_VALUES: pixels, **feed, BUDGET: np.array([packed.budget]), QUOTA: packed.quota}

    def padding(self, plan: ExportPlan) -> float:
        """Places of windows that hold no patch, as a share of the patches."""
        rows = self.feed(plan, 1)["window_rows"]
        return float((rows < 0).sum() / (rows >= 0).sum())


def spec_of(size: str, layers: int) -> ModelSpec:
    """Qwen2.5-VL's vision side; fewer layers for a quick run, every eighth and the last attend to whole views.

    Source: config.json and preprocessor_config.json of Qwen/Qwen2.5-VL-{3B,7B}-Instruct.
    """
    vision = QwenVisionSpec(
        patch_size=14,
        temporal_patch_size=2,
        merge=2,
        window_size=112,
        width=1280,
        layers=layers,
        heads=16,
        mlp_width=3420,
        activation="silu",
        full_layers=tuple(sorted({*range(7, layers, 8), layers - 1})),
        norm_eps=1e-6,
        theta=10000.0,
    )
    image = PatchImageSpec(
        patch_size=14,
        merge=2,
        temporal=2,
        min_pixels=3136,
        max_pixels=1003520,
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
    )
    decoder = DecoderSpec(
        architecture="qwen2_5_vl",
        width=WIDTHS[size],
        layers=1,
        heads=16,
        kv_heads=2,
        head_width=128,
        mlp_width=11008,
        vocab_size=151936,
        context=32768,
        image_token_id=151655,
        bos_token_id=None,
        eos_token_ids=(151645,),
        pad_token_id=None,
    )
    prompt = PromptSpec(chat_template="")
    return ModelSpec(family="qwen2_5_vl", name=size, image=image, vision=vision, decoder=decoder, prompt=prompt)


def random_weights(spec: ModelSpec) -> WeightsInMemory:
    """Seeded weights in which rows keep their size and attention is not even."""
    dice = torch.Generator().manual_seed(0)
    with torch.device("meta"):
        parameters = dict(QwenVision(spec, NoSelection()).named_parameters())
    tensors = {}
    for name, parameter in parameters.items():
        norm = "norm" in name or "ln_q" in name
        tensors[name] = torch.ones(parameter.shape) if norm else torch.empty(parameter.shape).normal_(generator=dice)
        if not norm:
            tensors[name] *= 0.02
        if name.endswith("qkv.weight"):
            tensors[name][: 2 * parameter.shape[1]] *= 2.5
    assert all(name == checkpoint_names(name)[0] for name in tensors)
    return WeightsInMemory(tensors)


def plan_of(spec: ModelSpec, method: str) -> ExportPlan:
    policy: SelectionPolicy = NoSelection() if method == PLAIN else policy_from_settings(method)
    source = CheckpointSource(kind="local", name="random")
    return ExportPlan(model=spec, source=source, policy=policy, precision=Precision.FP32, decoder=None)


def exported(spec: ModelSpec, methods: Sequence[str], folder: Path) -> dict[str, dict[str, Any]]:
    """Write all graphs over one weight file; what each export took."""
    reader: Any = random_weights(spec)
    found = {}
    for method in (PLAIN, *methods):
        began, plan = time.perf_counter(), plan_of(spec, method)
        model = onnx_from_graph(vision_from_plan(plan, reader), plan)
        path = save_vision(model, folder) if method == PLAIN else save_beside(model, folder, graph_file(method))
        del model
        gc.collect()
        kinds = Counter(operators(path))
        found[method] = {
            "export_seconds": round(time.perf_counter() - began, 1),
            "nodes": sum(kinds.values()),
            "graph_kb": round(path.stat().st_size / 1e3),
            "peak_memory_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
        }
        print(f"  exported {method}: {found[method]}", file=sys.stderr, flush=True)
    return found


def operators(path: Path) -> Iterator[str]:
    """The operators of a graph and of the bodies in it."""
    graphs = [onnx.load(path, load_external_data=False).graph]
    for graph in graphs:
        for node in graph.node:
            yield node.op_type
            graphs.extend(attribute.g for attribute in node.attribute if attribute.g.node)


def interleaved(
    folder: Path, spec: ModelSpec, methods: Sequence[str], cases: Sequence[Case], options: argparse.Namespace
) -> dict[tuple[str, str], list[float]]:
    """(graph, grid) -> process CPU milliseconds of each round; the order turns by one each round."""
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = THREADS
    sessions, feeds = {}, {}
    for method in (PLAIN, *methods):
        path = folder / (VISION if method == PLAIN else graph_file(method))
        sessions[method] = onnxruntime.InferenceSession(path, settings, providers=["CPUExecutionProvider"])
        for case in cases:
            quota = case.tokens if method == PLAIN else max(1, case.tokens // options.ninth)
            feeds[method, case.name] = case.feed(plan_of(spec, method), quota)
    todo = list(feeds)
    taken: dict[tuple[str, str], list[float]] = {key: [] for key in todo}
    for number in range(options.repeats + 1):  # the first round allocates
        turn = number % len(todo)
        for key in todo[turn:] + todo[:turn]:
            began = time.process_time()
            sessions[key[0]].run(None, feeds[key])
            if number:
                taken[key].append((time.process_time() - began) * 1e3)
        print(f"  round {number}/{options.repeats}", file=sys.stderr, flush=True)
    return taken


def rows_of(
    taken: dict[tuple[str, str], list[float]], spec: ModelSpec, methods: Sequence[str], cases: Sequence[Case]
) -> dict[str, dict[str, Any]]:
    """The medians of each grid, and of the ratios of each round."""
    rows = {}
    for case in cases:
        plain = taken[PLAIN, case.name]
        row: dict[str, Any] = {
            "tokens": case.tokens,
            "window_padding": round(case.padding(plan_of(spec, PLAIN)), 4),
            "plain_cpu_ms": round(statistics.median(plain), 1),
        }
        for method in methods:
            ours = taken[method, case.name]
            ratios = sorted(mine / theirs for mine, theirs in zip(ours, plain, strict=True))
            row[method] = {
                "cpu_ms": round(statistics.median(ours), 1),
                "ratio": round(statistics.median(ratios), 4),
                "ratios": [round(ratio, 4) for ratio in ratios],
            }
        rows[case.name] = row
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1, help="of ONNX Runtime (1)")
    parser.add_argument("--repeats", type=int, default=5, help="interleaved rounds (5)")
    parser.add_argument("--layers", type=int, default=32, help="blocks of the tower, fewer for a quick run (32)")
    parser.add_argument("--size", choices=sorted(WIDTHS), default="3b", help="whose merger (3b)")
    parser.add_argument("--ninth", type=int, default=9, help="one token of so many stays (9)")
    parser.add_argument("--graphs", nargs="+", default=["holov"], help="rules (holov)")
    parser.add_argument("--grids", nargs="+", default=list(GRIDS), help="tokens down x across")
    parser.add_argument("--note", default="", help="what is special about this run; kept in the result")
    parser.add_argument("--json", type=Path, help="write the result here as well")
    options = parser.parse_args()
    torch.set_num_threads(THREADS)
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    print(one_line())
    spec = spec_of(options.size, options.layers)
    cases = [Case((int(down), int(across))) for down, across in (grid.split("x") for grid in options.grids)]
    with tempfile.TemporaryDirectory(prefix="bench-qwen-") as work, torch.no_grad():
        exports = exported(spec, options.graphs, Path(work))
        gc.collect()
        taken = interleaved(Path(work), spec, options.graphs, cases, options)
    rows = rows_of(taken, spec, options.graphs, cases)
    table = Table("tokens", "window padding", "plain CPU ms", *options.graphs, title="", box=None)
    for name, row in rows.items():
        ratios = [f"{row[method]['cpu_ms']:.0f} ({row[method]['ratio']:.3f})" for method in options.graphs]
        table.add_row(name, f"{row['window_padding']:.1%}", f"{row['plain_cpu_ms']:.0f}", *ratios)
    Console(width=120).print(table)
    if options.json:
        result = {
            "threads": THREADS,
            "layers": options.layers,
            "size": options.size,
            "repeats": options.repeats,
            "kept": f"1/{options.ninth}",
            "exports": exports,
            "grids": rows,
        }
        write_result(options.json, {"note": options.note, **result} if options.note else result)


if __name__ == "__main__":
    main()
