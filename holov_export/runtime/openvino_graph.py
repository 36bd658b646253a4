"""The vision graph as ONNX Runtime's OpenVINO provider reads it.

OpenVINO 2025.4 (onnxruntime-openvino 1.24.1) computes a Clip of integers that has a lower bound only as zero, without a
word: quotas become 0, and every picture loses all its tokens. Max with the bound is the same and is computed right.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from holov_export.extras import require

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto

#: its options, as ONNX Runtime's Python interface takes them
Options = dict[str, str]


def openvino_options(threads: int | None) -> Options:
    """Options of the provider: the CPU, in the precision of the graph.

    OpenVINO may choose bfloat16 by itself on processors that have instructions for it, and would then also decide in it
    which tokens stay.

    Source: docs.openvino.ai/2025, "Precision Control"; microsoft/onnxruntime
    core/providers/openvino/backends/basic_backend.cc@0190f64 (PopulateConfigValue, SetNumThreads).
    """
    options = {"device_type": "CPU", "precision": "FP32"}
    return options if threads is None else {**options, "num_of_threads": str(threads)}


def graph_for_openvino(path: Path) -> bytes:
    """A graph without one-sided Clips of integers. It still names the weight file that lies beside `path`.

    Raises:
        MissingExtraError: onnx is not installed.
    """
    onnx = require("onnx")
    model: ModelProto = onnx.load(path, load_external_data=False)
    for graph in _graphs(model.graph):
        _replace_clips(graph, {onnx.TensorProto.INT64, onnx.TensorProto.INT32})
    return bytes(model.SerializeToString())


def _replace_clips(graph: GraphProto, kinds: set[int]) -> None:
    bounds = {item.name for item in graph.initializer if item.data_type in kinds}
    for node in graph.node:
        lower = node.input[1] if len(node.input) > 1 else ""
        upper = node.input[2] if len(node.input) > 2 else ""
        if node.op_type == "Clip" and bool(lower) != bool(upper) and (lower or upper) in bounds:
            node.op_type = "Max" if lower else "Min"
            value = node.input[0]
            del node.input[:]
            node.input.extend([value, lower or upper])


def _graphs(graph: GraphProto) -> Iterator[GraphProto]:
    """The graph, and the bodies of its loops."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from _graphs(attribute.g)
