"""What the selection takes of a graph's time: the profile of its nodes (ONNX Runtime) or layers (TensorRT).

The exporter names nodes after the module that they come from, and both engines keep those names, so what carries the
scope `selection/` is the rule and the gathering of the kept rows. The CLS row of the attention is not in it: it belongs
to the encoder's last layer. What selecting costs as a whole is the ratio to the plain encoder.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from holov_export.bundle import Bundle
from holov_export.errors import EnvironmentFaultError
from holov_export.extras import require
from holov_export.runtime.packing import packed_inputs
from holov_export.signature import BUDGET, PIXEL_VALUES, QUOTA
from holov_export.tensors import PixelBatch
from holov_export.verify.bench_results import SelectionShare

SCOPE = "selection"
#: a node's name inside a layer's: TensorRT joins names ("a/Mul + b/Add", "{ForeignNode[a/Mul...b/Add]}", "PWN(a/Mul)")
_NODE = re.compile(r"[\w-]+(?:/[\w-]+)+")
#: a compiled region is named by its first and last node alone: what lies between may be anything
_REGION = "ForeignNode["
_KERNEL = "_kernel_time"
#: operators that run a graph of their own
_BODIES = ("Loop", "Scan", "If")


def share_of(layers: Iterable[tuple[str, float]], *, source: str, runs: int) -> SelectionShare:
    """The selection's share of some layers' times.

    Args:
        layers: (name, milliseconds) of every layer, summed over the runs; a name may come several times.
        source: the profiler. runs: profiled runs.

    Raises:
        ValueError: the layers took no time, so there is nothing to have a share of.
    """
    alone = mixed = total = 0.0
    for name, milliseconds in layers:
        total += milliseconds
        nodes = [node.split("/")[0] == SCOPE for node in _NODE.findall(name)]
        if nodes and all(nodes):
            alone += milliseconds
        elif any(nodes) or _REGION in name:
            mixed += milliseconds
    if total <= 0:
        raise ValueError(f"{source} reported no time for any layer")
    return SelectionShare(
        source=source,
        runs=runs,
        share=round(alone / total, 6),
        mixed=round(mixed / total, 6),
        total_ms=round(total / runs, 4),
    )


def ort_selection_share(
    bundle: Bundle, pixels: PixelBatch, budget: int, *, provider: str, threads: int | None, runs: int
) -> SelectionShare:
    """Profile the graph in a session of its own: ONNX Runtime's profiler cannot be switched on later.

    Raises:
        EnvironmentFaultError: ONNX Runtime does not run the graph, or wrote no profile.
    """
    ort = require("onnxruntime")
    with tempfile.TemporaryDirectory(prefix="holov-profile-") as work:
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.enable_profiling, options.profile_file_prefix = True, str(Path(work) / "ort")
        if threads is not None:
            options.intra_op_num_threads = threads
        names = ["CUDAExecutionProvider", "CPUExecutionProvider"] if provider == "cuda" else ["CPUExecutionProvider"]
        try:
            session = ort.InferenceSession(str(bundle.vision), options, providers=names)
            feed = _feed(bundle, pixels, budget)
            session.run(None, feed)
            for _ in range(runs):
                session.run(None, feed)
            events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
        except Exception as error:  # onnxruntime's exceptions have no common base
            raise EnvironmentFaultError(f"ONNX Runtime could not profile the vision graph: {error}") from error
    return share_of(node_times(events, runs), source="onnxruntime profiler", runs=runs)


def _feed(bundle: Bundle, pixels: PixelBatch, budget: int) -> dict[str, Any]:
    dtype = next(item.dtype for item in bundle.manifest.inputs if item.name == PIXEL_VALUES)
    values, quota = np.ascontiguousarray(pixels.pixel_values, dtype=dtype), np.full(len(pixels), budget, dtype=np.int64)
    if not pixels.layouts:
        return {PIXEL_VALUES: values, BUDGET: np.array([budget], dtype=np.int64), QUOTA: quota}
    packed = packed_inputs(pixels.layouts, bundle.manifest.plan, quota)
    return {
        PIXEL_VALUES: values,
        **{array.name: array.values for array in packed.arrays},
        BUDGET: np.array([packed.budget], dtype=np.int64),
        QUOTA: packed.quota,
    }


def node_times(events: list[dict[str, Any]], runs: int) -> list[tuple[str, float]]:
    """(node, ms) of an ONNX Runtime profile, over its last `runs` runs: the first ones allocate memory.

    What runs inside a Loop has events of its own besides the Loop's; only the Loop counts, with all that it holds.
    """
    nodes = [item for item in events if item.get("cat") == "Node" and str(item.get("name", "")).endswith(_KERNEL)]
    spans = [_span(item) for item in nodes if item.get("args", {}).get("op_name") in _BODIES]
    of_node: dict[str, list[float]] = {}
    for item in nodes:
        start, end = _span(item)
        if any(low <= start and end <= high and (low, high) != (start, end) for low, high in spans):
            continue
        of_node.setdefault(str(item["name"]).removesuffix(_KERNEL), []).append(float(item["dur"]) / 1e3)
    return [(name, sum(times[-runs:])) for name, times in of_node.items()]


def _span(event: dict[str, Any]) -> tuple[float, float]:
    """Begin and end in microseconds."""
    start = float(event.get("ts", 0))
    return start, start + float(event["dur"])


def tensorrt_selection_share(profile: Callable[[], Iterable[tuple[str, float]]], *, runs: int) -> SelectionShare:
    """Sum what TensorRT's IProfiler says of each layer.

    Args:
        profile: runs the engine once under the profiler and returns (layer, milliseconds).
        runs: how often; one more run comes first and is not counted.
    """
    profile()
    layers = [layer for _ in range(runs) for layer in profile()]
    return share_of(layers, source="TensorRT IProfiler", runs=runs)
