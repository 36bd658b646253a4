"""`selection.divprune.divprune_steps` as an ONNX Loop.

No `from __future__ import annotations` here: the exporter reads the annotations to know what goes in and out.
"""

from typing import Any

from onnxscript import FLOAT, INT64, script
from onnxscript.values import Opset

from holov_export.export.scope_loop import BUILT_IN
from holov_export.extras import require
from holov_export.selection import divprune as divprune  # registers the torch operator


def divprune_loop() -> Any:
    """The loop as an onnxscript function (similarity [B, N, N], state [B, N], budget [1]) -> state [B, N].

    All similarities are read once, for the first token; a step reads one row. See `scope_loop` for the rest.
    """
    op = getattr(require(f"onnxscript.onnx_opset._impl.opset{BUILT_IN}"), f"Opset{BUILT_IN}")()
    own = Opset("holov_export", 1)

    @script(own, default_opset=op)
    def divprune_steps(similarity: FLOAT, state: FLOAT, budget: INT64) -> FLOAT:
        size = op.Shape(state)
        batch = op.Gather(size, 0)
        tokens = op.Gather(size, 1)
        rows = op.Reshape(similarity, op.Concat([-1], op.Unsqueeze(tokens, [0]), axis=0))
        start = op.Unsqueeze(op.Range(0, batch, 1) * tokens, [1])
        place = op.Unsqueeze(op.Range(0, tokens, 1), [0])
        zero = op.Constant(value_float=0.0)
        gone = op.Constant(value_float=-2.0)
        first = op.Constant(value_float=-3.0)
        itself = op.Unsqueeze(op.Unsqueeze(op.Range(0, tokens, 1), [1]) == place, [0])
        others = op.Where(op.Or(itself, op.Unsqueeze(op.Less(state, zero), [1])), gone, similarity)
        score = op.Neg(op.ReduceMax(others, [2], keepdims=0))
        nearest = op.Expand(gone, size)
        for step in range(op.Squeeze(budget, [0])):
            best = op.ArgMax(op.Where(op.Less(state, zero), state, score), axis=1, keepdims=1)
            state = op.Where(place == best, first - op.Cast(step, to=1), state)
            row = op.Gather(rows, op.Squeeze(best + start, [1]))
            nearest = op.Max(nearest, row)
            score = op.Neg(nearest)
        return state

    return divprune_steps
