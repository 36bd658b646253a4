"""Rows of a tower between two cuts: where they are, which of them are real, and what was merged into them.

Shape words: B images, N patch tokens, M rows that an earlier cut left, K rows that stay now, Q rows with CLS, E width.
"""

from __future__ import annotations

import torch
from torch import Tensor

#: added to the score of a row that is not there: its share of the softmax is 0, and float16 can hold it
_HIDDEN = -30000.0


def row_index(positions: Tensor, places: Tensor | None, tokens: int, *, with_cls: bool, keeps_cls: bool) -> Tensor:
    """int64 [B, K] or [B, K + 1]: which of the rows [B, Q, E] to take; row 0 is CLS.

    Args:
        positions: int64 [B, K] among N, -1 for padding (any row is taken for it).
        places: int64 [B, M], the positions of the rows behind CLS; None if all N are there.
        tokens: N.
        with_cls: CLS comes out as well, in front.
        keeps_cls: a position N asks for CLS.
    """
    index = positions.clamp_min(0)
    if places is not None:
        row = torch.arange(places.shape[1], device=places.device)[None, :, None]
        index = torch.where(_at(places, tokens), row, 0).sum(1).gather(1, index)
    index = index + 1
    if keeps_cls:
        index = torch.where(positions == tokens, 0, index)
    return torch.cat([torch.zeros_like(index[:, :1]), index], dim=1) if with_cls else index


def spread(saliency: Tensor, features: Tensor | None, places: Tensor, tokens: int) -> tuple[Tensor, Tensor | None]:
    """Values of the M rows that are left, in their places among all N: what a rule decides from at a later cut.

    Args:
        saliency: float32 [B, M]. features: [B, M, ..] or None. places: int64 [B, M], -1 for padding.

    Returns:
        (float32 [B, N], -1 for the tokens that are gone; float32 [B, N, ..], zero there).
    """
    at = _at(places, tokens)
    whole = torch.where(at, saliency[:, :, None], -1.0).amax(1)
    # a product with zeros and ones is exact
    return whole, None if features is None else at.float().transpose(1, 2) @ features.float()


def real_rows_mask(positions: Tensor, dtype: torch.dtype) -> Tensor:
    """[B, 1, 1, K + 1], to be added to attention scores: CLS and real rows are seen, padding is not."""
    padding = torch.where(positions >= 0, 0.0, _HIDDEN).to(dtype)
    return torch.cat([torch.zeros_like(padding[:, :1]), padding], dim=1)[:, None, None]


def join_merged(rows: Tensor, hidden: Tensor, positions: Tensor, merged: Tensor) -> Tensor:
    """[B, K, E]: each kept row plus the mean of the tokens that were merged into it.

    Args:
        rows: [B, K, E], the kept rows. hidden: [B, N, E], all. positions: int64 [B, K].
        merged: int64 [B, N], see `selection.rule.Selection`.
    """
    into = (merged[:, None, :] == positions[:, :, None]) & (merged >= 0)[:, None, :]
    share = into.float() / into.float().sum(-1, keepdim=True).clamp_min(1.0)
    return rows + share.to(hidden.dtype) @ hidden


def _at(places: Tensor, tokens: int) -> Tensor:
    """bool [B, M, N]: row m is the token n."""
    return places[:, :, None] == torch.arange(tokens, device=places.device)
