"""Which nodes of a quantised float32 graph TensorRT 8 may run in half precision.

The types of such a graph do not say it, as those of a float16 graph do. So it is decided by structure: what computes
floats may be halved, but for what decides which tokens stay, and for the statistics of norms, whose squares are too
large for float16 and whose epsilon is too small. A float16 export has both in float32, too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from holov_export.compile.deciding_part import QUANTIZERS, deciding_part
from holov_export.compile.graph_view import GraphView, view_of
from holov_export.compile.rewrites import label_of

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

_FLOAT = 1  # TensorProto.FLOAT
#: of a norm in parts: what stands between the square and the root, and behind the root
_BEFORE_ROOT = ("Add", "Cast", "Div", "Mul", "ReduceMean", "ReduceSum")
_ROOTS = ("Reciprocal", "Sqrt")


def is_quantized(model: ModelProto) -> bool:
    """Whether the main graph has Q/DQ nodes."""
    return any(node.op_type in QUANTIZERS for node in model.graph.node)


def halvable_nodes(model: ModelProto, types: Mapping[str, int]) -> frozenset[str]:
    """What `label_of` calls the nodes that may run in half precision.

    Q/DQ nodes, which may not be pinned, are among them. A loop that decides is float32 as a whole: what it carries has
    one type.

    Args:
        model: best loaded without its weights. types: value name -> TensorProto.DataType.
    """
    view = view_of(model)
    kept = set(deciding_part(view, types).nodes)
    for inner, node in view.walk():
        if label_of(node) in kept:
            kept |= {label_of(item) for body in inner.bodies_of(node) for _, item in body.walk()}
        if node.op_type in _ROOTS:
            kept |= _statistics(inner, node)
    return frozenset(
        label_of(node)
        for _, node in view.walk()
        if label_of(node) not in kept and any(types.get(name) == _FLOAT for name in (*node.input, *node.output))
    )


def _statistics(view: GraphView, root: NodeProto) -> set[str]:
    """A root and what it is taken of: the mean of squares, the squares, the deviations and their mean."""
    found, todo = {label_of(root)}, list(root.input)
    while todo:
        node = view.makers.get(todo.pop())
        if node is None or label_of(node) in found:
            continue
        if node.op_type in ("Pow", "Sub") or (node.op_type == "Mul" and len(set(node.input)) == 1):
            found.add(label_of(node))
            todo += [name for name in node.input if _maker(view, name) in ("ReduceMean", "Sub")]
        elif node.op_type in (*_BEFORE_ROOT, *_ROOTS):
            found.add(label_of(node))
            todo += [name for name in node.input if _maker(view, name) in (*_BEFORE_ROOT, *_ROOTS, "Pow", "Sub")]
    return found


def _maker(view: GraphView, name: str) -> str:
    maker = view.makers.get(name)
    return maker.op_type if maker is not None else ""
