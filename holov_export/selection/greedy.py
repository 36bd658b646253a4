"""What the greedy rules share: a state that says of each token whether it is left, gone or taken, and at which step.

A greedy rule takes one token a step. torch cannot export a loop whose trip count is the budget, so the steps of each
rule are an operator of its own (`holov_export::scope_steps` and so on), which the exporter translates to ONNX Loop; see
`export/translations.py`. The steps of a smaller quota are the first steps of a larger one, so a batch runs `budget`
steps once and each picture keeps as many as its own quota says.

The state, float32 [B, N]: 0 for a token that is left, -2 for one that an earlier cut took away, -2 - s for the one that
step s = 1, 2, ... takes. All scores are above -2, so taken and gone tokens stand in for their scores themselves: those
gone are taken when none is left (another picture of the batch has a larger quota), and none is taken twice.
"""

from __future__ import annotations

import torch
from torch import Tensor

from holov_export.selection.rule import Selection, raster_order

GONE = -2.0


def first_state(saliency: Tensor) -> Tensor:
    """float32 [B, N] -> the state before the first step."""
    return torch.where(saliency < 0, GONE, 0.0)


def next_token(score: Tensor, state: Tensor) -> Tensor:
    """int64 [B]: the token of the highest score that is left, the lower one of equals."""
    return torch.where(state < 0, state, score).argmax(-1)


def selection_of(state: Tensor, quota: Tensor) -> Selection:
    """The tokens of the first `quota` steps, in raster order."""
    last = float(state.shape[-1]) - GONE + 1
    return raster_order(torch.where(state < GONE, state + last, 0.0), quota)
