"""An answer while it is made, one token a step, so that several can be made in turn."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from time import perf_counter
from typing import Any

from holov_export.runtime.decoder import Decoder
from holov_export.runtime.text_stream import TextStream
from holov_export.tensors import Generation, SamplingSettings, StitchedPrompt, Timings


@dataclass(frozen=True)
class EarlierStages:
    """Seconds of the stages before decoding."""

    preprocess: float = 0.0
    vision: float = 0.0
    stitch: float = 0.0


class AnswerStream:
    """An answer's pieces of text, one for each token; many are empty, because a piece ends where a character does.

    Iterating to the end ends the answer; `close` ends it early. A decoder with several lanes can have several open.

    Attributes:
        prompt: what is answered.
        token_ids: made so far, without the token that ends the answer.
    """

    def __init__(
        self,
        decoder: Decoder,
        prompt: StitchedPrompt,
        sampling: SamplingSettings,
        tokenizer: Any,
        stages: EarlierStages = EarlierStages(),
    ) -> None:
        """Prepare the decoder; the first `next` prefills.

        Raises:
            PromptError, UsageError: see `Decoder.stream`.
        """
        self.prompt = prompt
        self.token_ids: list[int] = []
        self._sampling, self._stages = sampling, stages
        self._text = TextStream(tokenizer, sampling.stop)
        self._pieces: list[str] = []
        self._began = perf_counter()
        self._tokens = decoder.stream(prompt, sampling)
        self._ready = perf_counter()
        self._first: float | None = None
        self._ended: float | None = None

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        """The text that one more token completes; after the last token what was held back."""
        if self._ended is not None:
            raise StopIteration
        token = next(self._tokens, None)
        if self._first is None:
            self._first = perf_counter()
        if token is None:
            return self._finished(self._text.finish())
        piece = self._text.push(token)
        if self._text.stopped:
            return self._finished(piece)
        self.token_ids.append(token)
        self._pieces.append(piece)
        return piece

    def _finished(self, piece: str) -> str:
        self._pieces.append(piece)
        self.close()
        return piece

    @property
    def prefilled(self) -> bool:
        """Whether the first token is there."""
        return self._first is not None

    @property
    def ended(self) -> bool:
        return self._ended is not None

    def close(self) -> None:
        """End the answer where it is and free what the decoder holds for it. May be called twice."""
        if self._ended is None:
            self._ended = perf_counter()
        close = getattr(self._tokens, "close", None)  # generators have it; a decoder may give another iterator
        if close is not None:
            close()

    def generation(self) -> Generation:
        """The answer as far as it has been made."""
        ended = perf_counter() if self._ended is None else self._ended
        first = ended if self._first is None else self._first
        full = len(self.token_ids) >= self._sampling.max_new_tokens
        return Generation(
            text="".join(self._pieces),
            token_ids=tuple(self.token_ids),
            finish_reason="length" if full and not self._text.stopped else "stop",
            prompt_tokens=len(self.prompt),
            visual_tokens=self.prompt.counts,
            timings=Timings(
                preprocess=self._stages.preprocess,
                vision=self._stages.vision,
                stitch=self._stages.stitch,
                setup=self._ready - self._began,
                prefill=first - self._ready,
                decode=ended - first,
            ),
        )
