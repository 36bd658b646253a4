"""How torch operators become ONNX where the exporter has no translation, or one that is worse than it need be."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from holov_export.export.divprune_loop import divprune_loop
from holov_export.export.dpp_loop import dpp_loop
from holov_export.export.receive_loop import receive_loop
from holov_export.export.scope_loop import scope_loop
from holov_export.extras import require


def translation_table(opset: int) -> dict[Any, Callable[..., Any]]:
    """torch operator -> onnxscript function, for `torch.onnx.export(custom_translation_table=...)`.

    * sort: TopK over the whole axis. ONNX TopK keeps the lower index of equal values, so a stable sort is what it is.
      K is a constant where the axis has a fixed length, which suits TensorRT 8.5 too; else it is read from the shape,
      which TensorRT can from 8.6 on. No TensorRT takes a K above 3840, so longer axes cannot be sorted there.
    * scaled_dot_product_attention: MatMul, Softmax, MatMul with the scale on the queries only. The exporter's own
      translation computes the transposition of the keys from their shape at run time (nine nodes a layer).
    * scope_steps, divprune_steps, dpp_steps: Loops, see `scope_loop`, `divprune_loop` and `dpp_loop`.
    * attend_and_receive: a Loop, see `receive_loop`.
    """
    op = require(f"onnxscript.onnx_opset._impl.opset{opset}")
    op = getattr(op, f"Opset{opset}")()

    def sort(values: Any, stable: bool | None = None, dim: int = -1, descending: bool = False) -> Any:
        size = values.shape[dim]
        if isinstance(size, int):
            k = op.Constant(value_ints=[size])
        else:
            k = op.Gather(op.Shape(values), op.Constant(value_ints=[dim % len(values.shape)]))
        return op.TopK(values, k, axis=dim, largest=int(descending), sorted=1)

    def sort_unstable(values: Any, dim: int = -1, descending: bool = False) -> Any:
        return sort(values, None, dim, descending)

    def attention(
        query: Any,
        key: Any,
        value: Any,
        attn_mask: Any = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Any:
        if dropout_p or is_causal or enable_gqa:
            raise ValueError("only plain bidirectional attention is translated")
        factor = scale if scale is not None else float(query.shape[-1]) ** -0.5
        factor_like = op.CastLike(op.Constant(value_float=factor), query)
        scores = op.MatMul(op.Mul(query, factor_like), op.Transpose(key, perm=[0, 1, 3, 2]))
        if attn_mask is not None:
            scores = op.Add(scores, attn_mask)
        return op.MatMul(op.Softmax(scores, axis=-1), value)

    aten = torch.ops.aten
    return {
        torch.ops.holov_export.scope_steps.default: scope_loop(),
        torch.ops.holov_export.divprune_steps.default: divprune_loop(),
        torch.ops.holov_export.dpp_steps.default: dpp_loop(),
        torch.ops.holov_export.attend_and_receive.default: receive_loop(),
        aten.sort.stable: sort,
        aten.sort.default: sort_unstable,
        aten.scaled_dot_product_attention.default: attention,
    }
