"""Answers as the OpenAI API has them, with `holov` beside: what was kept, and how long each stage took."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel

from holov_export.runtime.media import boxes_of_tokens
from holov_export.serve.jobs import Finished, Seeing
from holov_export.tensors import ImageRows, Region


class Usage(BaseModel):
    """Tokens; those of the prompt include the visual ones."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Kept(BaseModel):
    """What stays of an image or clip.

    Attributes:
        size: (width, height) of the upright original.
        tokens: kept, of so many.
        boxes: (left, top, right, bottom) in pixels of the original, of each kept token that shows a place.
        frames: of clips, the 0-based frame of each box.
    """

    size: tuple[int, int]
    tokens: int
    of: int
    boxes: list[tuple[float, float, float, float]]
    frames: list[int] = []


class Holov(BaseModel):
    """Additions to an answer; times in milliseconds."""

    budget: int
    visual_tokens: list[int]
    kept: list[Kept] = []
    timings_ms: dict[str, float]


class Said(BaseModel):
    """A message of an answer, or a piece of it."""

    role: Literal["assistant"] = "assistant"
    content: str | None = None
    refusal: None = None


class Choice(BaseModel):
    """The answer; there is always one."""

    index: int
    message: Said
    logprobs: None
    finish_reason: str


class Completion(BaseModel):
    """Body of an answer that is not streamed."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[Choice]
    usage: Usage
    holov: Holov


class PieceChoice(BaseModel):
    """A piece of the answer."""

    index: int
    delta: Said
    logprobs: None
    finish_reason: str | None


class Chunk(BaseModel):
    """An event of a stream."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[PieceChoice]
    usage: Usage | None = None
    holov: Holov | None = None


class Replies:
    """Makes the answers to one request."""

    def __init__(
        self, name: str, created: int, model: str, sizes: Sequence[tuple[int, int]], *, kept: bool, usage_chunk: bool
    ) -> None:
        """Args: sizes: of images and clips. kept: boxes are wanted. usage_chunk: `stream_options.include_usage`."""
        self._name, self._created, self._model = name, created, model
        self._sizes, self._kept, self._usage_chunk = sizes, kept, usage_chunk

    def completion(self, seeing: Seeing | None, done: Finished) -> bytes:
        """The whole answer."""
        text = done.generation.text
        choice = Choice(
            index=0,
            message=Said(role="assistant", content=text, refusal=None),
            logprobs=None,
            finish_reason=done.generation.finish_reason,
        )
        made = Completion(
            id=self._name,
            object="chat.completion",
            created=self._created,
            model=self._model,
            choices=[choice],
            usage=usage_of(done),
            holov=self._holov(seeing, done, kept=self._kept),
        )
        return made.model_dump_json(exclude_unset=True).encode()

    def first(self, seeing: Seeing | None) -> bytes:
        """The event that begins a stream; with what was kept if that was asked for."""
        opening = Said(role="assistant", content="", refusal=None)
        if seeing is None or not self._kept:
            return self._event(opening)
        return self._event(opening, holov=self._holov(seeing, None, kept=True))

    def piece(self, text: str) -> bytes:
        return self._event(Said(content=text))

    def last(self, seeing: Seeing | None, done: Finished) -> list[bytes]:
        """The events that end a stream; the very last has `usage` and `holov`."""
        reason = done.generation.finish_reason
        holov, usage = self._holov(seeing, done, kept=False), usage_of(done)
        if not self._usage_chunk:
            return [self._event(Said(), reason, usage=usage, holov=holov)]
        return [self._event(Said(), reason), self._event(None, usage=usage, holov=holov)]

    def _event(
        self, said: Said | None, reason: str | None = None, *, usage: Usage | None = None, holov: Holov | None = None
    ) -> bytes:
        """Args: said: None for an event without choices."""
        extra: dict[str, Any] = {}
        if usage is not None or self._usage_chunk:  # clients that ask for usage find null in the events before it
            extra["usage"] = usage
        if holov is not None:
            extra["holov"] = holov
        choices = [] if said is None else [PieceChoice(index=0, delta=said, logprobs=None, finish_reason=reason)]
        made = Chunk(
            id=self._name,
            object="chat.completion.chunk",
            created=self._created,
            model=self._model,
            choices=choices,
            **extra,
        )
        return event_from_json(made.model_dump_json(exclude_unset=True))

    def _holov(self, seeing: Seeing | None, done: Finished | None, *, kept: bool) -> Holov:
        counts = list(done.generation.visual_tokens) if done else counts_of(seeing)
        budget = seeing.budget if seeing else 0
        times = milliseconds(seeing, done)
        if not kept or seeing is None:
            return Holov(budget=budget, visual_tokens=counts, timings_ms=times)
        return Holov(budget=budget, visual_tokens=counts, kept=kept_of(seeing, self._sizes), timings_ms=times)


def event_from_json(text: str) -> bytes:
    """One server-sent event. JSON has no line ends of its own."""
    return b"data: " + text.encode() + b"\n\n"


def usage_of(done: Finished) -> Usage:
    made, asked = len(done.generation.token_ids), done.generation.prompt_tokens
    return Usage(prompt_tokens=asked, completion_tokens=made, total_tokens=asked + made)


def counts_of(seeing: Seeing | None) -> list[int]:
    """Rows of each image and then of each clip."""
    return [] if seeing is None else [len(item.rows) for item in (*seeing.seen.images, *seeing.seen.videos)]


def milliseconds(seeing: Seeing | None, done: Finished | None) -> dict[str, float]:
    """queue, preprocess, vision; of a finished answer also stitch, setup, prefill, decode, ttft and total."""
    seconds: dict[str, float] = {}
    if seeing is not None:
        seconds |= {"queue": seeing.waited, "preprocess": seeing.preprocess, "vision": seeing.vision}
    if done is not None:
        times = done.generation.timings
        seconds |= {"stitch": times.stitch, "setup": times.setup, "prefill": times.prefill, "decode": times.decode}
        seconds |= {"ttft": done.ttft, "total": done.total}
    return {name: round(value * 1e3, 3) for name, value in seconds.items()}


def kept_of(seeing: Seeing, sizes: Sequence[tuple[int, int]]) -> list[Kept]:
    """Where the kept tokens of each image and then of each clip are."""
    images = seeing.seen.images
    items = (*images, *seeing.seen.videos)
    return [
        _kept(item, regions, size, clip=index >= len(images))
        for index, (item, regions, size) in enumerate(zip(items, seeing.seen.regions, sizes, strict=True))
    ]


def _kept(item: ImageRows, regions: Sequence[Region], size: tuple[int, int], *, clip: bool) -> Kept:
    boxes, frames = [], []
    ends = np.cumsum([region.tokens for region in regions])
    places = np.searchsorted(ends, item.positions, side="right")
    for box, place in zip(boxes_of_tokens(item.positions, regions), places.tolist(), strict=True):
        if box is not None:
            boxes.append((round(box.left, 2), round(box.top, 2), round(box.right, 2), round(box.bottom, 2)))
            frames.append(regions[place].frame)
    tokens, total = int(np.count_nonzero(item.positions >= 0)), int(ends[-1])
    if not clip:
        return Kept(size=size, tokens=tokens, of=total, boxes=boxes)
    return Kept(size=size, tokens=tokens, of=total, boxes=boxes, frames=frames)
