"""What two bundles are made of, side by side: tensors of the graph, weights by type, bytes by kind of file."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from holov_export.bundle import Bundle, GraphTensor
from holov_export.errors import BundleError
from holov_export.extras import require
from holov_export.policies import Frozen

#: kinds of files in the order that tables have them
_KINDS = ("vision", "weights", "decoder", "tokenizer", "newline", "report", "other")

#: two of these share a byte in a file
_PACKED, _HALF_BYTES = ("int4", "uint4", "float4_e2m1fn"), 4


class TensorDifference(Frozen):
    """An input or output that is not the same in both; None where a graph has none of the name."""

    side: str
    name: str
    before: str | None
    after: str | None


class WeightsOfType(Frozen):
    """Initializers of one element type: how many there are and their bytes, before and after."""

    dtype: str
    tensors: tuple[int, int]
    bytes: tuple[int, int]


class BytesOfKind(Frozen):
    """Bytes of the files of one kind, before and after."""

    kind: str
    bytes: tuple[int, int]


def tensor_differences(before: Bundle, after: Bundle) -> tuple[TensorDifference, ...]:
    """Names, types and shapes of the vision graph's inputs and outputs, where they differ."""
    found = []
    sides = (
        ("input", before.manifest.inputs, after.manifest.inputs),
        ("output", before.manifest.outputs, after.manifest.outputs),
    )
    for side, left, right in sides:
        for name in dict.fromkeys(item.name for item in (*left, *right)):
            texts = _tensor_text(left, name), _tensor_text(right, name)
            if texts[0] != texts[1]:
                found.append(TensorDifference(side=side, name=name, before=texts[0], after=texts[1]))
    return tuple(found)


def _tensor_text(tensors: Sequence[GraphTensor], name: str) -> str | None:
    """Type and shape, "float32 B x 3 x 84 x 84"; None if no tensor has the name."""
    for item in tensors:
        if item.name == name:
            return f"{item.dtype} {' x '.join(map(str, item.shape))}"
    return None


def weights_by_type(before: Bundle, after: Bundle) -> tuple[WeightsOfType, ...]:
    """The initializers of both vision graphs, the type with most bytes first.

    Raises:
        MissingExtraError: onnx is not installed. BundleError: a graph does not parse.
    """
    left, right = _weights(before.vision), _weights(after.vision)
    types = sorted({*left, *right}, key=lambda name: -max(left.get(name, (0, 0))[1], right.get(name, (0, 0))[1]))
    found = []
    for dtype in types:
        (few, small), (many, large) = left.get(dtype, (0, 0)), right.get(dtype, (0, 0))
        found.append(WeightsOfType(dtype=dtype, tensors=(few, many), bytes=(small, large)))
    return tuple(found)


def _weights(graph: Path) -> dict[str, tuple[int, int]]:
    """(tensors, bytes) of each element type."""
    onnx = require("onnx")
    found: dict[str, tuple[int, int]] = {}
    for tensor in _model(graph).graph.initializer:
        dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
        bits = _HALF_BYTES if dtype.name in _PACKED else 8 * dtype.itemsize
        count, size = found.get(dtype.name, (0, 0))
        found[dtype.name] = (count + 1, size + math.ceil(math.prod(tensor.dims) * bits / 8))
    return found


def _model(graph: Path) -> Any:
    onnx = require("onnx")
    try:
        return onnx.load(str(graph), load_external_data=False)
    except Exception as error:  # protobuf's errors have no common base with onnx's
        raise BundleError(f"'{graph.name}' is no ONNX file: {error}", hint="Export the bundle again.") from error


def bytes_by_kind(before: Bundle, after: Bundle) -> tuple[BytesOfKind, ...]:
    """Sizes of all files that the manifests name."""
    found = []
    for kind in _KINDS:
        sizes = [
            sum(item.bytes for item in bundle.manifest.artifacts if item.kind == kind) for bundle in (before, after)
        ]
        if any(sizes):
            found.append(BytesOfKind(kind=kind, bytes=(sizes[0], sizes[1])))
    return tuple(found)
