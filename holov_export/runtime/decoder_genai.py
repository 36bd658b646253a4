"""ONNX Runtime GenAI over a bundle's decoder folder (written by `export/decoder_onnx.py`).

What GenAI 0.18 offers a vision-language model for several prompts at once, tried on a CPU (ADR 0013):

- Several generators on one model may be open and be stepped in turn; each gives the tokens it gives alone. A generator
  holds keys and values for its prompt and its longest answer from the moment it is made.
- One generator may have a batch of prompts of unequal length, padded on the right. They begin together: no prompt joins
  later. That is what `batch` uses; padded on the left, tokens are wrong without a word.
- Its engine for continuous batching (`Engine`, `Request`) refuses every vision-language model.
- `rewind_to` refuses this type of model, so the keys and values of a common beginning cannot be used again.

CUDA has not run on a real GPU yet.
"""

from __future__ import annotations

import json
import weakref
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from holov_export.errors import BundleError, EnvironmentFaultError, UnknownNameError, UsageError
from holov_export.extras import require
from holov_export.runtime.decoder import check_genai, check_prompt, check_sampling, end_tokens, load_hint
from holov_export.spec import DecoderSpec
from holov_export.tensors import SamplingSettings, StitchedPrompt

if TYPE_CHECKING:
    from typing_extensions import Self

PROVIDERS = ("auto", "cpu", "cuda")
CONFIG = "genai_config.json"
#: GenAI's own limit. Source: microsoft/onnxruntime-genai src/generators.cpp@a0c04eb kMaxBatchSize
LARGEST_BATCH = 32
#: Padding: at most so many tokens a batch has for each one that its prompts have. It is computed and thrown away.
PADDED = 1.25
#: GenAI finds the length of a prompt by the pad ids at its end, and the model's own pad may be the last word of one. No
#: word has this number; graphs look it up as the last row of the table.
PAD = -1


class GenaiDecoder:
    """The decoder embedded in a bundle.

    Streams that are open but have not begun when one of them is asked for its first token begin together, up to `batch`
    of them. A stream that is closed early stays in its batch, without being heard, until the others are done.
    """

    lanes = 64

    def __init__(
        self,
        folder: Path,
        spec: DecoderSpec,
        *,
        provider: str = "auto",
        threads: int | None = None,
        batch: int = 1,
    ) -> None:
        """Load the decoder.

        Args:
            folder: `decoder/` of a bundle.
            spec: of the language model.
            provider: "cpu", "cuda", or "auto" for CUDA where this GenAI has it.
            threads: CPU threads within one operator; None for GenAI's choice.
            batch: so many prompts may be decoded in one go, 1..32. The weights are read once for all of them, but the
                first tokens of all come together, when the last prompt has been read.

        Raises:
            UnknownNameError: another provider.
            UsageError: the language model is one that GenAI would run wrongly, or another batch.
            MissingExtraError: onnxruntime-genai is not installed.
            BundleError: the folder is no GenAI decoder.
            EnvironmentFaultError: CUDA was asked for and is not there, or the model does not load here.
        """
        check_genai(spec)
        if not 1 <= batch <= LARGEST_BATCH:
            raise UsageError(f"the batch is {batch}, it must be in 1..{LARGEST_BATCH}.")
        if not (folder / CONFIG).is_file():
            raise BundleError(f"'{folder}' has no {CONFIG}.", hint="Export the bundle again, without --no-decoder.")
        require("onnxruntime")  # GenAI ends the whole process when it cannot find ONNX Runtime's library
        self._genai = require("onnxruntime_genai")
        self._spec = spec
        self._batch = batch
        self._waiting: list[weakref.ref[_Stream]] = []
        device = self._device(provider)
        config = self._genai.Config(str(folder))
        config.clear_providers()
        if device == "cuda":
            config.append_provider("cuda")
        config.overlay(json.dumps({"model": {"pad_token_id": PAD}}))
        if threads is not None:
            options = {"session_options": {"intra_op_num_threads": threads}}
            config.overlay(json.dumps({"model": {"decoder": options}}))
        try:
            self._model: Any = self._genai.Model(config)
        except RuntimeError as error:
            raise EnvironmentFaultError(
                f"ONNX Runtime GenAI {self._genai.__version__} cannot load the decoder on {device}: {error}",
                hint=load_hint(error),
            ) from error
        self.name = f"onnxruntime-genai {self._genai.__version__} ({device})"

    def _device(self, provider: str) -> str:
        if provider not in PROVIDERS:
            raise UnknownNameError(f"unknown provider '{provider}'.", hint=f"Known: {', '.join(PROVIDERS)}.")
        has_cuda = bool(self._genai.is_cuda_available())
        if provider == "cuda" and not has_cuda:
            raise EnvironmentFaultError(
                f"this ONNX Runtime GenAI ({self._genai.__version__}) has no CUDA.",
                hint='Run: pip uninstall onnxruntime onnxruntime-genai; pip install "holov-export[gpu]". '
                "Or choose --provider cpu.",
            )
        return "cuda" if has_cuda and provider != "cpu" else "cpu"

    def stream(self, prompt: StitchedPrompt, sampling: SamplingSettings) -> Iterator[int]:
        """See `Decoder.stream`. With a `batch` nothing is prepared before the first token is asked for."""
        check_prompt(prompt, self._spec)
        check_sampling(sampling)
        if self._model is None:
            raise EnvironmentFaultError("the decoder is closed.")
        stream = _Stream(self, prompt, sampling, end_tokens(self._spec, sampling))
        if self._batch == 1:
            self._join([stream])
        else:
            self._waiting.append(weakref.ref(stream))  # one that was dropped unread must not be decoded
        return stream

    def begin(self, first: _Stream) -> tuple[_Batch, int]:
        """Give a stream, and those that fit beside it, a generator; returns its place there."""
        if self._model is None:
            raise EnvironmentFaultError("the decoder is closed.")
        chosen = [first]
        for stream in (reference() for reference in self._waiting):
            if stream is None or stream is first or stream.ended:
                continue
            if len(chosen) < self._batch and self._fits([*chosen, stream]):
                chosen.append(stream)
        batch = self._join(chosen)
        self._waiting = [item for item in self._waiting if (held := item()) is not None and held.waits]
        return batch, 0

    def _fits(self, streams: Sequence[_Stream]) -> bool:
        """Whether these may be one batch: drawn alike, of similar length, and none beyond the context."""
        first = streams[0].sampling
        alike = all(self._options(item.sampling) == self._options(first) for item in streams)
        repeatable = first.temperature > 0 and first.seed is not None  # draws would depend on the neighbours
        lengths = [len(item.prompt) for item in streams]
        padded = max(lengths) * len(lengths) <= PADDED * sum(lengths)
        return alike and not repeatable and padded and _room(streams) <= self._spec.context

    def _options(self, sampling: SamplingSettings) -> dict[str, bool | int | float]:
        return _search(sampling, self._spec.vocab_size)

    def _join(self, streams: Sequence[_Stream]) -> _Batch:
        batch = _Batch(self._generator(streams), self._inputs([item.prompt for item in streams]), len(streams))
        for row, stream in enumerate(streams):
            stream.take((batch, row))
        return batch

    def _generator(self, streams: Sequence[_Stream]) -> Any:
        """A GenAI generator with room for the longest prompt and the longest answer."""
        genai = self._genai
        settings = genai.GeneratorParams(self._model)
        settings.set_search_options(
            max_length=_room(streams), batch_size=len(streams), **self._options(streams[0].sampling)
        )
        try:
            return genai.Generator(self._model, settings)
        except RuntimeError as error:
            raise EnvironmentFaultError(f"ONNX Runtime GenAI failed: {error}") from error

    def _inputs(self, prompts: Sequence[StitchedPrompt]) -> Any:
        """Prompts as GenAI's named tensors, shorter ones padded on the right.

        Source of the names: onnxruntime-genai 0.18 src/models/multi_modal.cpp, for the type "phi3v". It adds the counts
        up; rows go to the placeholders of one prompt after another.
        """
        inputs = self._genai.NamedTensors()
        ids = np.full((len(prompts), max(map(len, prompts))), PAD, dtype=np.int32)
        for row, prompt in enumerate(prompts):
            ids[row, : len(prompt)] = prompt.input_ids
        inputs["input_ids"] = ids
        # float32 whatever the decoder is: its vision graph casts, and numpy has no bfloat16
        rows = [prompt.rows.reshape(-1, self._spec.width).astype(np.float32) for prompt in prompts]
        inputs["pixel_values"] = np.ascontiguousarray(np.concatenate(rows))
        inputs["num_image_tokens"] = np.array([len(item) for item in rows], dtype=np.int64)
        return inputs

    def close(self) -> None:
        """Release the model. Streams that have begun keep it until they are closed."""
        self._model = None
        self._waiting = []


class _Batch:
    """A generator over some prompts, which it steps together; each row's tokens wait until they are asked for."""

    def __init__(self, generator: Any, inputs: Any, rows: int) -> None:
        self._generator: Any = generator
        self._inputs: Any = inputs
        self._failure: str | None = None
        self._tokens: dict[int, deque[int]] = {row: deque() for row in range(rows)}

    def token(self, row: int) -> int | None:
        """The next token of a row; None behind the last one.

        Raises:
            EnvironmentFaultError: GenAI failed, now or when it was stepped for another row.
        """
        waiting = self._tokens[row]
        if not waiting and self._generator is not None:
            self._step()
        if not waiting and self._failure is not None:
            raise EnvironmentFaultError(f"ONNX Runtime GenAI failed: {self._failure}")
        return waiting.popleft() if waiting else None

    def _step(self) -> None:
        try:
            if self._inputs is not None:
                inputs, self._inputs = self._inputs, None
                self._generator.set_inputs(inputs)  # this prefills
            if self._generator.is_done():
                self._generator = None
                return
            self._generator.generate_next_token()
        except RuntimeError as error:  # and it would again, for each of the others
            self._failure, self._generator = str(error), None
            return
        made = self._generator.get_next_tokens()
        for row, tokens in self._tokens.items():
            tokens.append(int(made[row]))

    def leave(self, row: int) -> None:
        """Nobody listens to a row any more; with the last one the generator goes."""
        self._tokens.pop(row, None)
        if not self._tokens:
            self._generator = self._inputs = None


class _Stream:
    """One prompt's tokens. A class of its own because a generator that was never begun would not notice its close.

    Attributes:
        prompt, sampling: what is answered, and how.
        ended: whether there are no more tokens.
    """

    def __init__(
        self, decoder: GenaiDecoder, prompt: StitchedPrompt, sampling: SamplingSettings, ends: frozenset[int]
    ) -> None:
        self.prompt, self.sampling, self.ended = prompt, sampling, False
        self._decoder, self._ends = decoder, ends
        self._left = sampling.max_new_tokens
        self._place: tuple[_Batch, int] | None = None

    @property
    def waits(self) -> bool:
        """Whether it has neither begun nor ended."""
        return self._place is None and not self.ended

    def take(self, place: tuple[_Batch, int]) -> None:
        """It begins there, in a row of a batch."""
        self._place = place

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> int:
        if self.ended:
            raise StopIteration
        try:
            batch, row = self._place or self._decoder.begin(self)
            token = batch.token(row)
        except BaseException:
            self.close()
            raise
        self._left -= 1
        if token is None or token in self._ends:
            self.close()
            raise StopIteration
        if self._left == 0:
            self.close()
        return token

    def close(self) -> None:
        """Free what it holds. May be called twice."""
        self.ended = True
        if self._place is not None:
            batch, row = self._place
            batch.leave(row)
        self._place = None

    def __del__(self) -> None:
        self.close()


def _room(streams: Sequence[_Stream]) -> int:
    """Tokens of the longest prompt and the longest answer together."""
    return max(len(item.prompt) for item in streams) + max(item.sampling.max_new_tokens for item in streams)


def _search(sampling: SamplingSettings, vocab_size: int) -> dict[str, bool | int | float]:
    """GenAI's search options.

    top_p never goes without a top_k: alone, GenAI 0.18 draws outside the nucleus (at top_p 0.5 and temperature 1, 357
    of 1500 draws); together with a top_k of the whole vocabulary none.
    """
    if sampling.temperature == 0:
        return {"do_sample": False, "temperature": 1.0, "top_k": 1, "top_p": 1.0}
    seed = -1 if sampling.seed is None else sampling.seed  # -1: GenAI throws its own dice
    return {
        "do_sample": True,
        "temperature": sampling.temperature,
        "top_k": sampling.top_k or vocab_size,
        "top_p": sampling.top_p,
        "random_seed": seed,
    }
