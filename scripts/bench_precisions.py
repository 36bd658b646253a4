#!/usr/bin/env python3
"""What precisions of the true-size LLaVA-1.5 vision graph cost on a CPU, and what they lose.

    scripts/bench_precisions --json benchmarks/results/precisions-cpu.json

CLIP ViT-L/14-336 and LLaVA-1.5-7B's projector with random weights, twice: as drawn, and with six channels that every
norm of the layers multiplies by 15, as trained towers have some. Ways:

    torch fp32      the module that is exported, eager; what the others are compared with
    ORT fp32        the exported graph, --provider cpu
    OpenVINO fp32   the same with --provider openvino, where onnxruntime-openvino is installed
    int8 for CPU    holov_export.quantize.cpu; the curve keeps more and more layers in float, from the front
    int8 Q/DQ       holov_export.quantize.qdq, the form for TensorRT: its loss, and its time in ONNX Runtime

Rounds are interleaved, times are medians of the process's CPU time. Overlap and cosine are the worst over the pictures
that the recipe judges by, at every budget; the ranges of the Q/DQ form come from its other pictures.

The choice of tokens is discontinuous, so the last table says what overlap a given error of the saliency costs by
itself: torch's own saliency, made wrong at random, and the rule's plain loops.
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
from collections.abc import Callable, Sequence
from functools import partial
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

import onnxruntime as ort  # noqa: E402
import torch  # noqa: E402
from machine import one_line, write_result  # noqa: E402
from precision_towers import Tower, made_tower, overlap_by_error  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

from holov_export.quantize.cpu import write_quantized_cpu  # noqa: E402
from holov_export.quantize.observe import observe  # noqa: E402
from holov_export.quantize.qdq import write_quantized  # noqa: E402
from holov_export.recipes import recipe_from_name  # noqa: E402
from holov_export.runtime.ort_providers import OPENVINO  # noqa: E402
from holov_export.runtime.runner_ort import OrtRunner  # noqa: E402
from holov_export.spec import Quantization, QuantizedType  # noqa: E402

TORCH, ORT, OPENVINO_FP32, INT8_CPU, INT8_QDQ = "torch fp32", "ORT fp32", "OpenVINO fp32", "int8 for CPU", "int8 Q/DQ"
CPU = Quantization(type=QuantizedType.INT8, engine="cpu")
COLUMNS = ("cpu_ms", "ratio_to_ort_fp32", "megabytes", "overlap_min", "overlap_mean", "cosine_min", "saliency_error")


def interleaved(ways: dict[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Process CPU milliseconds of every round; the order turns by one each round."""
    taken: dict[str, list[float]] = {name: [] for name in ways}
    names = list(ways)
    for run in ways.values():
        run()  # allocates
    for number in range(repeats):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            began = time.process_time()
            ways[name]()
            taken[name].append((time.process_time() - began) * 1e3)
        print(f"  round {number + 1}/{repeats}", file=sys.stderr, flush=True)
    return taken


def times_of(taken: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    fp32 = statistics.median(taken[ORT])
    return {
        name: {
            "cpu_ms": round(statistics.median(values), 1),
            "cpu_ms_least": round(min(values), 1),
            "ratio_to_ort_fp32": round(statistics.median(values) / fp32, 4),
        }
        for name, values in taken.items()
    }


def compared_ways(tower: Tower, repeats: int) -> dict[str, dict[str, Any]]:
    """Time and loss of every way, all sessions open at once."""
    budget = tower.cases[0].budget
    providers = {ORT: "cpu"}
    if OPENVINO in ort.get_available_providers():
        providers[OPENVINO_FP32] = "openvino"
    bundles = {name: (tower.bundle, provider) for name, provider in providers.items()}
    fp32 = round(sum(path.stat().st_size for path in tower.bundle.folder.iterdir()) / 1e6, 1)
    sizes = dict.fromkeys(bundles, fp32)

    cpu, sizes[INT8_CPU] = tower.quantised(
        "int8-cpu", CPU, partial(write_quantized_cpu, tower.bundle.vision, quantization=CPU)
    )
    bundles[INT8_CPU] = (cpu, "cpu")
    print(f"  calibrating on {len(tower.pictures.calibrate)} pictures", file=sys.stderr, flush=True)
    ranges = observe(tower.bundle, tower.recipe, tower.pictures.calibrate, threads=THREADS)
    for name, smoothing in ((INT8_QDQ, None), (f"{INT8_QDQ}, smoothed", 0.5)):
        quantization = Quantization(
            type=QuantizedType.INT8, recipe=tower.recipe.name, algorithm=tower.recipe.algorithm, smoothing=smoothing
        )
        write = partial(write_quantized, tower.bundle.vision, quantization=quantization, ranges=ranges)
        made, sizes[name] = tower.quantised(name.replace("/", ""), quantization, write)
        bundles[name] = (made, "cpu")

    ways: dict[str, Callable[[], Any]] = {TORCH: partial(tower.torch, tower.cases[0].pixels, budget)}
    rows: dict[str, dict[str, Any]] = {TORCH: {}}
    for name, (bundle, provider) in bundles.items():
        runner = OrtRunner(bundle, provider=provider, threads=THREADS)
        rows[name] = {"megabytes": sizes[name], **tower.loss(runner).row()}
        print(f"  {name}: {rows[name]}", file=sys.stderr, flush=True)
        ways[name] = partial(runner.run, tower.cases[0].pixels, budget)
    for name, times in times_of(interleaved(ways, repeats)).items():
        rows[name].update(times)
    return rows


def curve_of_kept(tower: Tower, kept: Sequence[int], repeats: int) -> dict[str, dict[str, Any]]:
    """The CPU form with the first layers in float: time in interleaved pairs with ORT fp32, and loss."""
    pixels, budget = tower.cases[0].pixels, tower.cases[0].budget
    plain = OrtRunner(tower.bundle, provider="cpu", threads=THREADS)
    rows = {}
    for number in kept:
        quantization = CPU.model_copy(update={"keep": tuple(f"layers.{layer}" for layer in range(number))})
        write = partial(write_quantized_cpu, tower.bundle.vision, quantization=quantization)
        bundle, size = tower.quantised(f"kept-{number}", quantization, write)
        runner = OrtRunner(bundle, provider="cpu", threads=THREADS)
        ways = {ORT: partial(plain.run, pixels, budget), INT8_CPU: partial(runner.run, pixels, budget)}
        loss = tower.loss(runner).row()
        rows[str(number)] = {"megabytes": size, **loss, **times_of(interleaved(ways, repeats))[INT8_CPU]}
        print(f"  {number} layers kept: {rows[str(number)]}", file=sys.stderr, flush=True)
        runner.close()
        for path in bundle.folder.iterdir():
            path.unlink()
    plain.close()
    return rows


def show(title: str, rows: dict[str, dict[str, Any]], columns: Sequence[str]) -> None:
    table = Table("", *(name.replace("_", " ") for name in columns), title=title, title_justify="left", box=None)
    for name, row in rows.items():
        table.add_row(name, *("" if row.get(column) is None else f"{row[column]:g}" for column in columns))
    Console(width=150).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1, help="of torch and of ONNX Runtime (1)")
    parser.add_argument("--repeats", type=int, default=7, help="interleaved rounds (7)")
    parser.add_argument("--layers", type=int, default=24, help="layers of the tower, fewer for a quick run (24)")
    parser.add_argument("--budgets", type=int, nargs="+", default=[64, 192], help="the first is timed (64 192)")
    parser.add_argument("--outliers", type=float, nargs="+", default=[1, 15], help="a tower for each factor (1 15)")
    parser.add_argument(
        "--kept", type=int, nargs="*", default=[2, 4, 8, 12, 16, 20], help="layers in float (2 4 8 ...)"
    )
    parser.add_argument("--recipe", default="smoke-8", help="whose pictures are used (smoke-8)")
    parser.add_argument("--note", default="", help="what is special about this run; kept in the result")
    parser.add_argument("--json", type=Path, help="write the result here as well")
    options = parser.parse_args()
    torch.set_num_threads(THREADS)
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    print(one_line())
    recipe = recipe_from_name(options.recipe)
    result: dict[str, Any] = {"threads": THREADS, "layers": options.layers, "repeats": options.repeats}
    result.update({"budgets": options.budgets, "recipe": options.recipe, "towers": {}})
    for outliers in options.outliers:
        with tempfile.TemporaryDirectory(prefix="bench-precisions-") as work:
            tower = made_tower(options.layers, outliers, recipe, options.budgets, Path(work))
            ways = compared_ways(tower, options.repeats)
            curve = curve_of_kept(tower, options.kept, max(2, options.repeats // 2))
            by_error = overlap_by_error(tower)
            result["pictures"] = [picture.name for picture in tower.pictures.judge]
            del tower
            gc.collect()
        result["towers"][f"{outliers:g}"] = {"ways": ways, "layers_kept_in_float": curve, "overlap_by_error": by_error}
        title = f"six channels times {outliers:g}, {THREADS} thread(s), {options.layers} layers"
        show(title, ways, COLUMNS)
        show("int8 for CPU, first layers in float", curve, COLUMNS)
        show("error of the saliency", by_error, ("overlap_mean", "overlap_min_mean", "draws_with_min_0.97"))
        if options.json:  # after each tower: a run that is cut off keeps what it has measured
            write_result(options.json, {"note": options.note, **result} if options.note else result)


if __name__ == "__main__":
    main()
