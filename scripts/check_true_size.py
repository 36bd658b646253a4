#!/usr/bin/env python3
"""Exports the vision graphs of a directory of a model's true size and watches time, memory and disk.

The directory is made by make_sparse_checkpoint (14 to 27 GB of shards, of which the language model is a hole) and
deleted afterwards. Each export runs in a process of its own, whose peak memory the kernel reports. Routes:

    module         spec_from_checkpoint, vision_from_plan, onnx_from_graph, save_vision, for each tower of the model
    cli            holov-export --model DIR --no-decoder --no-verify: the bundle with its hashes as well
    cli-verified   the same with the parity report (torch, the reference and ONNX Runtime side by side)

Ends with status 1 if a peak reaches 3 GB, or if an export without the parity check reads from the disk half as much
again as is there.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from machine import one_line, write_result
from make_sparse_checkpoint import DEFAULT, MODELS, sizes_of, write_checkpoint
from rich.console import Console
from rich.table import Table

PEAK_LIMIT, READ_LIMIT = 3 * 10**9, 1.5  # bytes; times what the directory takes on the disk
ROUTES = ("module", "cli", "cli-verified")


def export_here(folder: Path, out: Path, precision: str) -> None:
    """The module route, in this process; prints what it read and how long each step took, as JSON."""
    from holov_export.export.checkpoint import spec_from_checkpoint
    from holov_export.export.onnx_from_graph import forget_graph, onnx_from_graph, save_vision
    from holov_export.policies import HolovPolicy
    from holov_export.spec import OPSETS, CheckpointSource, ExportPlan, Precision
    from holov_export.vision.families import vision_from_plan
    from holov_export.vision.loading import forget_weights
    from holov_export.vision.weights import SafetensorsReader

    wanted = Precision(precision)
    plan = ExportPlan(
        model=spec_from_checkpoint(folder, folder.name),
        source=CheckpointSource(kind="local", name=folder.name),
        policy=HolovPolicy(),
        precision=wanted,
        decoder=None,
        opset=OPSETS[wanted],
    )
    out.mkdir()
    read, nodes, steps = 0, {}, {}
    for part in plan.parts:
        marks = [time.perf_counter()]
        with SafetensorsReader(folder) as reader:
            module = vision_from_plan(plan.of_part(part), reader)
        read += reader.bytes_read
        marks.append(time.perf_counter())
        model = onnx_from_graph(module, plan.of_part(part))
        marks.append(time.perf_counter())
        save_vision(model, out, f"{part}.onnx")
        marks.append(time.perf_counter())
        nodes[part] = sum(1 for _ in model.graph.all_nodes())
        steps[part] = {name: round(marks[i + 1] - marks[i], 2) for i, name in enumerate(("load", "graph", "save"))}
        forget_graph(model)
        forget_weights(module)
    print(json.dumps({"tensor_bytes_read": read, "nodes": nodes, "step_seconds": steps}))


def command_of(route: str, folder: Path, out: Path, precision: str) -> list[str]:
    if route == "module":
        return [sys.executable, __file__, "--child", str(folder), str(out), precision]
    line = [sys.executable, "-c", "from holov_export.cli import main; main()"]
    line += ["--model", str(folder), f"--{precision}", "--no-decoder", "--json", "-o", str(out)]
    return line if route == "cli-verified" else [*line, "--no-verify"]


def forget_cached_pages(folder: Path) -> None:
    """Ask the kernel to drop the shards from memory, so that reading them is reading."""
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def watch(route: str, folder: Path, work: Path, precision: str) -> dict[str, Any]:
    """Run one export in a child and measure it."""
    out = work / f"{route}-{precision}"
    forget_cached_pages(folder)
    start = time.perf_counter()
    with tempfile.TemporaryFile("w+") as stdout, tempfile.TemporaryFile("w+") as stderr:
        child = subprocess.Popen(command_of(route, folder, out, precision), stdout=stdout, stderr=stderr)
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        seconds = time.perf_counter() - start
        stdout.seek(0)
        stderr.seek(0)
        printed = stdout.read()
        if child.returncode:
            raise SystemExit(f"{route} {precision} ended with {child.returncode}:\n{stderr.read()[-3000:]}")
    seen: dict[str, Any] = {
        "route": route,
        "precision": precision,
        "seconds": round(seconds, 1),
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 1),
        "peak_rss_bytes": usage.ru_maxrss * 1024,
        "disk_bytes_read": usage.ru_inblock * 512,
        "output_bytes": sum(path.stat().st_size for path in out.rglob("*") if path.is_file()),
    }
    if route == "module":
        seen |= json.loads(printed.splitlines()[-1])
    shutil.rmtree(out)
    return seen


def show(rows: list[dict[str, Any]]) -> None:
    table = Table("route", "precision", "s", "CPU s", "peak MB", "tensors read MB", "disk read MB", "written MB")
    for row in rows:
        sizes = [row["peak_rss_bytes"], row.get("tensor_bytes_read"), row["disk_bytes_read"], row["output_bytes"]]
        cells = ["" if size is None else f"{size / 1e6:,.0f}" for size in sizes]
        table.add_row(row["route"], row["precision"], str(row["seconds"]), str(row["cpu_seconds"]), *cells)
    Console(width=120).print(table)


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        export_here(Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=DEFAULT, choices=MODELS, help=f"whose sizes the directory has ({DEFAULT})")
    parser.add_argument("--work", type=Path, help="where to make the directory (the system's temporary folder)")
    parser.add_argument("--precisions", nargs="+", default=["fp16", "fp32"], help="of the vision graph (fp16 fp32)")
    parser.add_argument("--routes", nargs="+", default=["module", "cli"], choices=ROUTES, help="(module cli)")
    parser.add_argument("--json", type=Path, help="write the result here as well")
    options = parser.parse_args()
    print(one_line())
    with tempfile.TemporaryDirectory(prefix="true-size-", dir=options.work) as temporary:
        work = Path(temporary)
        folder = work / options.model
        write_checkpoint(folder, name=options.model)
        apparent, on_disk = sizes_of(folder)
        print(f"shards: {apparent / 1e9:.2f} GB apparent, {on_disk / 1e9:.2f} GB on disk")
        rows = [watch(route, folder, work, item) for item in options.precisions for route in options.routes]
    show(rows)
    # the parity check reads the weights once more, in float32, and the graph that was written
    read = [row["disk_bytes_read"] for row in rows if row["route"] != "cli-verified"]
    good = all(row["peak_rss_bytes"] < PEAK_LIMIT for row in rows) and all(size < READ_LIMIT * on_disk for size in read)
    limits = {"peak_rss_bytes": PEAK_LIMIT, "disk_bytes_read": int(READ_LIMIT * on_disk)}
    sizes = {"model": options.model, "checkpoint_apparent_bytes": apparent, "checkpoint_disk_bytes": on_disk}
    if options.json:
        write_result(options.json, {**sizes, "limits": limits, "within_limits": good, "exports": rows})
    print("within the limits" if good else "A LIMIT IS PASSED")
    raise SystemExit(0 if good else 1)


if __name__ == "__main__":
    main()
