"""The tokens on their way through the layers, and how some of them leave."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from holov_export.errors import PromptError
from holov_export.extras import require
from holov_export.tensors import StitchedPrompt

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Span:
    """Where the visual tokens of one image are: they always lie side by side."""

    start: int
    length: int

    @property
    def end(self) -> int:
        return self.start + self.length


@dataclass(frozen=True)
class TokenStates:
    """What enters a layer.

    Attributes:
        hidden: float [1, S, D].
        positions: int64 [S], for the rotary embedding; rising.
        origin: int64 [S], place in the prompt; -1 for a token that was merged out of others.
        spans: of each image.
    """

    hidden: torch.Tensor
    positions: torch.Tensor
    origin: torch.Tensor
    spans: tuple[Span, ...]

    @property
    def text_start(self) -> int:
        """Index of the first token behind the last image."""
        return self.spans[-1].end


@dataclass(frozen=True)
class Choice:
    """What stays of one image: indices within its span, rising, int64 [k], and merged rows behind them, [c, D]."""

    kept: torch.Tensor
    merged: torch.Tensor | None = None


def spans_of_prompt(prompt: StitchedPrompt) -> tuple[Span, ...]:
    """Where each image is.

    Raises:
        PromptError: there is no image, the placeholders of one are torn apart, or the prompt ends with an image: what
            comes after it decides what stays.
    """
    places = np.flatnonzero(prompt.input_ids == prompt.image_token_id)
    spans, used = [], 0
    for count in prompt.counts:
        if count:
            run = places[used : used + count]
            if run[-1] - run[0] != count - 1:
                raise PromptError("the placeholders of an image are not side by side.")
            spans.append(Span(int(run[0]), count))
            used += count
    if not spans:
        raise PromptError("the prompt has no image.", hint="This decoder prunes visual tokens; ask about an image.")
    if spans[-1].end == len(prompt):
        raise PromptError("the prompt ends with an image.", hint="Text must follow it: its attention decides.")
    return tuple(spans)


def states_from_embeds(embeds: torch.Tensor, spans: tuple[Span, ...]) -> TokenStates:
    """All tokens of a prompt, before layer 0; embeds are [1, S, D]."""
    places = require("torch").arange(embeds.shape[1], device=embeds.device)
    return TokenStates(embeds, places, places, spans)


def pruned(states: TokenStates, choices: Sequence[Choice], *, renumber: bool) -> TokenStates:
    """The states without what was not chosen; text stays.

    Args:
        states: S tokens.
        choices: of each image.
        renumber: positions become 0, 1, 2 ...; otherwise tokens keep theirs, which merged rows have none of.
    """
    library = require("torch")
    hidden, places, origin, spans = [], [], [], []
    done = length = 0

    def take(index: torch.Tensor) -> None:
        hidden.append(states.hidden[0, index])
        places.append(states.positions[index])
        origin.append(states.origin[index])

    def between(start: int, end: int) -> torch.Tensor:
        made: torch.Tensor = library.arange(start, end, device=states.hidden.device)
        return made

    for span, choice in zip(states.spans, choices, strict=True):
        take(between(done, span.start))
        take(choice.kept + span.start)
        start, left = length + span.start - done, len(choice.kept)
        if choice.merged is not None:
            assert renumber
            hidden.append(choice.merged)
            places.append(choice.kept.new_zeros(len(choice.merged)))
            origin.append(choice.kept.new_full((len(choice.merged),), -1))
            left += len(choice.merged)
        spans.append(Span(start, left))
        done, length = span.end, start + left
    take(between(done, states.hidden.shape[1]))
    positions = library.cat(places)
    if renumber:
        positions = between(0, len(positions))
    return TokenStates(library.cat(hidden)[None], positions, library.cat(origin), tuple(spans))
