"""`selection.scope.scope_steps` as an ONNX Loop.

No `from __future__ import annotations` here: the exporter reads the annotations to know what goes in and out.
"""

from typing import Any

from onnxscript import FLOAT, INT64, script
from onnxscript.values import Opset

from holov_export.extras import require
from holov_export.selection import scope as scope  # registers the torch operator

#: what torch's exporter builds in, whatever opset it is asked for; it converts the finished graph
BUILT_IN = 18


def scope_loop() -> Any:
    """The loop as an onnxscript function (similarity [B, N, N], weights, state [B, N], budget [1]) -> state [B, N].

    The trip count is the budget itself, a shape value; what is carried keeps its shape and nothing is scanned out, so
    TensorRT can take the loop. A step reads the similarities once (Sub, Relu, ReduceSum) and then one row of them.

    Gains only fall, so a lazy greedy would look at a few rows a step. It needs as many rounds as the picture makes it:
    a condition that the body computes, which TensorRT's parser ignores, or a branch.
    Source: onnx/onnx-tensorrt importer of Loop, 8.0 to 10.1 ("the updated condition ... is ignored").
    """
    op = getattr(require(f"onnxscript.onnx_opset._impl.opset{BUILT_IN}"), f"Opset{BUILT_IN}")()
    own = Opset("holov_export", 1)

    @script(own, default_opset=op)
    def scope_steps(similarity: FLOAT, weights: FLOAT, state: FLOAT, budget: INT64) -> FLOAT:
        size = op.Shape(weights)
        batch = op.Gather(size, 0)
        tokens = op.Gather(size, 1)
        rows = op.Reshape(similarity, op.Concat([-1], op.Unsqueeze(tokens, [0]), axis=0))
        start = op.Unsqueeze(op.Range(0, batch, 1) * tokens, [1])
        place = op.Unsqueeze(op.Range(0, tokens, 1), [0])
        zero = op.Constant(value_float=0.0)  # literals would become CastLike, which TensorRT learnt late
        first = op.Constant(value_float=-3.0)
        covered = op.Expand(zero, size)
        for step in range(op.Squeeze(budget, [0])):
            missing = op.Relu(similarity - op.Unsqueeze(covered, [1]))
            gain = op.ReduceSum(missing, [2], keepdims=0) * weights
            best = op.ArgMax(op.Where(op.Less(state, zero), state, gain), axis=1, keepdims=1)
            state = op.Where(place == best, first - op.Cast(step, to=1), state)
            row = op.Gather(rows, op.Squeeze(best + start, [1]))
            covered = op.Max(covered, row)
        return state

    return scope_steps
