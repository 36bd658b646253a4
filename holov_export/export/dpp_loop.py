"""`selection.cdpruner.dpp_steps` as an ONNX Loop.

No `from __future__ import annotations` here: the exporter reads the annotations to know what goes in and out.
"""

from typing import Any

from onnxscript import FLOAT, INT64, script
from onnxscript.values import Opset

from holov_export.export.scope_loop import BUILT_IN
from holov_export.extras import require
from holov_export.selection.cdpruner import FLOOR  # the module registers the torch operator


def dpp_loop() -> Any:
    """The loop as an onnxscript function (similarity [B, N, N], left, state [B, N], budget [1]) -> state [B, N].

    The Cholesky factor [B, K, N] is carried at its full size from the start, so that nothing in the loop changes its
    shape; a step reads it twice and writes it once. See `scope_loop` for the rest.
    """
    op = getattr(require(f"onnxscript.onnx_opset._impl.opset{BUILT_IN}"), f"Opset{BUILT_IN}")()
    own = Opset("holov_export", 1)

    @script(own, default_opset=op)
    def dpp_steps(similarity: FLOAT, left: FLOAT, state: FLOAT, budget: INT64) -> FLOAT:
        size = op.Shape(state)
        batch = op.Gather(size, 0)
        tokens = op.Gather(size, 1)
        rows = op.Reshape(similarity, op.Concat([-1], op.Unsqueeze(tokens, [0]), axis=0))
        start = op.Unsqueeze(op.Range(0, batch, 1) * tokens, [1])
        place = op.Unsqueeze(op.Range(0, tokens, 1), [0])
        steps = op.Squeeze(budget, [0])
        slot = op.Unsqueeze(op.Range(0, steps, 1), [0, 2])
        zero = op.Constant(value_float=0.0)
        first = op.Constant(value_float=-3.0)
        floor = op.Constant(value_float=FLOOR)
        factor = op.Expand(zero, op.Concat(op.Unsqueeze(batch, [0]), budget, op.Unsqueeze(tokens, [0]), axis=0))
        for step in range(steps):
            score = op.Where(op.Greater(left, floor), left, zero)
            best = op.ArgMax(op.Where(op.Less(state, zero), state, score), axis=1, keepdims=1)
            chosen = place == best
            state = op.Where(chosen, first - op.Cast(step, to=1), state)
            column = op.MatMul(factor, op.Unsqueeze(op.Cast(chosen, to=1), [2]))
            explained = op.Squeeze(op.MatMul(op.Transpose(column, perm=[0, 2, 1]), factor), [1])
            row = op.Gather(rows, op.Squeeze(best + start, [1]))
            length = op.GatherElements(left, best, axis=1)
            rest = (row - explained) / op.Sqrt(op.Max(length, floor))
            new = op.Where(op.Greater(length, floor), rest, zero)
            factor = op.Where(slot == step, op.Unsqueeze(new, [1]), factor)
            left = left - new * new
        return state

    return dpp_steps
