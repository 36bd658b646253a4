"""`vision.qwen_layers.attend_and_receive` as an ONNX Loop.

No `from __future__ import annotations` here: the exporter reads the annotations to know what goes in and out.
"""

from typing import Any

from onnxscript import BOOL, FLOAT, INT64, graph, script
from onnxscript.values import Opset

from holov_export.export.scope_loop import BUILT_IN
from holov_export.extras import require
from holov_export.vision.qwen_layers import BLOCK


def receive_loop() -> Any:
    """The loop as an onnxscript function.

    (queries, keys, values [G, A, L, W], mask, shares [G, L]) -> (mixed [G, L, A * W], received [G, L]).

    The trip count is L / BLOCK rounded up, so it comes from a shape. A step gathers BLOCK queries; those past the last
    are the last one again, with a share of 0, so all shapes in the body are the same at every step. Both results are
    carried, and the rows of a step are written into one of them: TensorRT scans nothing out if the trip count is not
    constant. Source: onnx/onnx-tensorrt docs/operators.md, 8.5-GA to 10.1-GA.
    """
    op = getattr(require(f"onnxscript.onnx_opset._impl.opset{BUILT_IN}"), f"Opset{BUILT_IN}")()
    own = Opset("holov_export", 1)

    @script(own, default_opset=op)
    def attend_and_receive(
        queries: FLOAT, keys: FLOAT, values: FLOAT, mask: FLOAT, shares: FLOAT
    ) -> tuple[FLOAT, FLOAT]:
        size = op.Shape(queries)
        none = op.Constant(value_int=0)  # literals would become CastLike, which TensorRT learnt late
        one = op.Constant(value_int=1)
        block = op.Constant(value_int=BLOCK)
        nothing = op.Constant(value_float=0.0)
        along = op.Constant(value_ints=[1])
        middle = op.Constant(value_ints=[1, 2])
        longest = op.Gather(size, op.Constant(value_int=2))
        last = op.Sub(longest, one)
        places = op.Range(none, block, one)
        transposed = op.Transpose(keys, perm=[0, 1, 3, 2])
        hidden = op.Unsqueeze(mask, middle)
        unheard = op.Expand(nothing, op.Shape(mask))
        unseen = op.Expand(nothing, op.Gather(size, op.Constant(value_ints=[2, 0, 1, 3])))

        @graph()
        def step(number: INT64, going: BOOL, received: FLOAT[...], mixed: FLOAT[...]):  # type: ignore
            at = op.Add(places, op.Mul(number, block))
            inside = op.Min(at, last)
            few = op.Gather(queries, inside, axis=2)
            attention = op.Softmax(op.Add(op.MatMul(few, transposed), hidden), axis=-1)
            share = op.Where(op.Less(at, longest), op.Gather(shares, inside, axis=1), nothing)
            given = op.MatMul(op.Unsqueeze(share, middle), attention)
            more = op.Add(received, op.ReduceSum(given, middle, keepdims=0))
            rows = op.Transpose(op.MatMul(attention, values), perm=[2, 0, 1, 3])
            filled = op.ScatterND(mixed, op.Unsqueeze(inside, along), rows)
            on = op.Identity(going)
            return on, more, filled

        heard, seen = op.Loop(op.Add(op.Div(last, block), one), None, unheard, unseen, body=step)
        width = op.Mul(op.Gather(size, along), op.Gather(size, op.Constant(value_ints=[3])))
        groups = op.Gather(size, op.Constant(value_ints=[0]))
        shape = op.Concat(groups, op.Constant(value_ints=[-1]), width, axis=0)
        return op.Reshape(op.Transpose(seen, perm=[1, 0, 2, 3]), shape), heard

    return attend_and_receive
