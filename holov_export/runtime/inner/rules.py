"""The rule that all methods share: scores, and the best of each image stay."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from holov_export.runtime.inner.layers import LlamaLayers
from holov_export.runtime.inner.schedule import Cut, Schedule
from holov_export.runtime.inner.states import Choice, TokenStates

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Boundary:
    """Between two layers, where a cut may fall.

    Attributes:
        layer: the one that comes next.
        before: what entered the layer that has just run.
        after: what it put out, and what enters `layer`; the same tokens as `before`.
    """

    layer: int
    before: TokenStates
    after: TokenStates


class Ranking(Protocol):
    """How a method scores the visual tokens of one prompt. Made anew for each prompt."""

    @property
    def renumber(self) -> bool:
        """Whether tokens get new positions 0, 1, 2 ... after a cut."""
        ...

    def scores(self, layers: LlamaLayers, boundary: Boundary) -> list[torch.Tensor]:
        """float32 [n] of each image's n tokens; the highest stay."""
        ...

    def merged(self, cut: Cut, dropped: torch.Tensor, scores: torch.Tensor) -> torch.Tensor | None:
        """What is made of an image's dropped tokens.

        Args:
            cut: what was asked for.
            dropped: float [d, D], the layer's output for the dropped tokens, in their order.
            scores: float32 [d].

        Returns:
            float [cut.merged, D], or None where nothing is.
        """
        ...


@dataclass(frozen=True)
class InnerRule:
    """A method with its settings.

    Attributes:
        schedule: (tokens N of an image, depth of the decoder) -> its cuts; raises BudgetError.
        ranking: what scores, given all states before layer 0.
    """

    schedule: Callable[[int, int], Schedule]
    ranking: Callable[[TokenStates], Ranking]


def best(scores: torch.Tensor, keep: int) -> torch.Tensor:
    """int64 [keep], rising: the indices of the highest scores; the lower index wins a tie."""
    order = scores.sort(descending=True, stable=True).indices
    return order[:keep].sort().values


def choices_at(layers: LlamaLayers, boundary: Boundary, cuts: list[Cut | None], ranking: Ranking) -> list[Choice]:
    """What stays of each image. An image without a cut here stays whole."""
    chosen = []
    for span, cut, scores in zip(boundary.after.spans, cuts, ranking.scores(layers, boundary), strict=True):
        kept = best(scores, span.length if cut is None else cut.keep)
        merged = None
        if cut is not None and cut.merged:
            gone = scores.new_ones(span.length).bool()
            gone[kept] = False
            rows = boundary.after.hidden[0, span.start : span.end]
            merged = ranking.merged(cut, rows[gone], scores[gone])
        chosen.append(Choice(kept, merged))
    return chosen
