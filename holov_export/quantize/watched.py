"""A vision graph whose activations come out, run in ONNX Runtime on the CPU.

Padding is left out. Pictures run one at a time, so no batch pads them; towers pad nothing in front of a product
(Qwen2.5-VL's tables of windows serve attention only). Behind the selection a row that an image did not fill is a copy
of some real token; `real_rows` drops those.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from holov_export.bundle import Bundle
from holov_export.compile.graph_file import graph_from_file
from holov_export.compile.lowering import all_nodes, subgraphs_of
from holov_export.errors import EnvironmentFaultError, StorageError, UsageError
from holov_export.extras import require
from holov_export.quantize.linears import linears_of
from holov_export.runtime.runner_ort import feed_from_pixels
from holov_export.signature import BUDGET, CROPS, POSITIONS, QUOTA
from holov_export.spec import Precision
from holov_export.tensors import PixelBatch
from holov_export.verify.backends import CPU_PRECISIONS

if TYPE_CHECKING:
    from onnx import ModelProto


@dataclass(frozen=True)
class Watched:
    """A session whose outputs are the activations as well.

    Attributes:
        names: of the activations, in the order of the graph.
        moving: those that depend on the budget.
        pixels: type that the graph takes them in.
    """

    view: Bundle
    session: Any
    names: tuple[str, ...]
    moving: frozenset[str]
    pixels: np.dtype[Any]


@contextmanager
def watched_graph(view: Bundle, threads: int | None) -> Iterator[Watched]:
    """The view's graph with what its products with weights multiply as further outputs.

    The changed graph is never a file: ONNX Runtime gets it as bytes and is told where the weights lie, for it refuses
    links to them, and the bundle may be on a disk that cannot be written.

    Raises:
        UsageError: it has no such product.
        MissingExtraError: onnx or ONNX Runtime is not installed.
        EnvironmentFaultError: ONNX Runtime cannot load the graph.
        StorageError: there is no room for a widened graph.
    """
    onnx, ort = require("onnx"), require("onnxruntime")
    precision = view.manifest.plan.precision
    with _runs_on_cpu(view) as path:
        model = graph_from_file(path)
        names = tuple(dict.fromkeys(name for linear in linears_of(model) for name in linear.activations))
        if not names:
            raise UsageError(f"{view.graph} has no product with weights that could be quantised.")
        at_hand = {item.name for item in model.graph.output}
        model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name not in at_hand)
        options = ort.SessionOptions()
        options.log_severity_level = 3  # errors only
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(path.parent))
        if threads is not None:
            options.intra_op_num_threads = threads
        try:
            session = ort.InferenceSession(
                model.SerializeToString(), options, providers=["CPUExecutionProvider"], enable_fallback=0
            )
        except Exception as error:  # onnxruntime's exceptions have no common base
            raise EnvironmentFaultError(f"ONNX Runtime {ort.__version__} cannot load {view.graph}: {error}") from error
        pixels = np.dtype("float16" if precision is Precision.FP16 else "float32")
        yield Watched(view, session, names, frozenset(_dependents(model)) & set(names), pixels)


@contextmanager
def _runs_on_cpu(view: Bundle) -> Iterator[Path]:
    """The graph, or where it is bfloat16 the same graph in float32 for a while."""
    if view.manifest.plan.precision in CPU_PRECISIONS:
        yield view.vision
        return
    from holov_export.export.onnx_from_graph import write_widened

    try:  # beside the bundle: /tmp is often memory
        work = tempfile.TemporaryDirectory(prefix=".widened-", dir=view.folder.parent)
    except OSError as error:
        raise StorageError(
            f"cannot write to '{view.folder.parent}', where a bfloat16 graph is widened for the CPU: {error.strerror}.",
            hint="Copy the bundle to a folder that can be written.",
        ) from error
    with work:
        yield write_widened(view.vision, Path(work.name))


def _dependents(model: ModelProto) -> set[str]:
    """Names of the values that depend on how many tokens stay."""
    reached = {BUDGET, QUOTA, CROPS}  # crops are made for a quota
    for node in model.graph.node:
        if node.op_type == "Shape" and node.input[0] == QUOTA:
            continue  # how many pictures there are, which a tower may ask any input for
        inner = (item for body in subgraphs_of(node) for part in all_nodes(body) for item in part.input)
        if any(name in reached for name in (*node.input, *inner)):
            reached.update(name for name in node.output if name)
    return reached


def run_watched(
    watched: Watched, pixels: PixelBatch, budget: int, names: Sequence[str]
) -> tuple[npt.NDArray[np.int64], list[npt.NDArray[np.floating]]]:
    """Run the graph with all quotas at the budget.

    Returns:
        (positions int64 [B, K], the activations of `names`).

    Raises:
        EnvironmentFaultError: ONNX Runtime fails.
    """
    quotas = np.full(len(pixels), budget, dtype=np.int64)
    feed = feed_from_pixels(pixels, watched.view.manifest.plan, watched.pixels, budget, quotas)
    try:
        positions, *values = watched.session.run([POSITIONS, *names], {item.name: item.values for item in feed.arrays})
    except Exception as error:  # onnxruntime's exceptions have no common base
        raise EnvironmentFaultError(f"ONNX Runtime failed in the vision graph: {error}") from error
    return positions, values


def real_rows(values: npt.NDArray[np.floating], positions: npt.NDArray[np.int64]) -> npt.NDArray[np.floating]:
    """[rows, width]: the rows of an activation behind the selection that belong to a token.

    Args:
        values: [.., width], in front of the last axis one row for each of [B, K]; or CLS and K of them; or the same
            number for each, a Qwen token's patches. What has other rows comes out whole.
        positions: int64 [B, K], -1 where there is none.
    """
    rows = values.reshape(-1, values.shape[-1])
    real = positions >= 0
    if real.all():
        return rows
    if len(rows) == real.size + len(real):
        real = np.concatenate([np.ones_like(real[:, :1]), real], axis=1)
    if len(rows) % real.size:
        return rows
    return rows[np.repeat(real.ravel(), len(rows) // real.size)]
