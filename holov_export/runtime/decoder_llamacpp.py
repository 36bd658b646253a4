"""llama.cpp over a GGUF file (written by `export/decoder_gguf.py`), where ONNX Runtime GenAI has no wheel.

A prompt goes in piece by piece: words as ids, visual rows as embeddings, words again. All open answers share one
context, and one step of llama.cpp makes a token for each of them.

Where positions are three numbers (Qwen2.5-VL) llama.cpp orders tokens by them, whatever their order in the prompt, so
prompts in which the two differ are refused.

On a CPU, in float32, tokens are those of transformers (scripts/check_llamacpp). CUDA has not run yet.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import numpy as np

from holov_export.errors import BundleError, EnvironmentFaultError, PromptError, UnknownNameError, UsageError
from holov_export.runtime.decoder import check_prompt, check_sampling, end_tokens, token_from_logits
from holov_export.runtime.decoder_kv_cache import KvCache, kv_cache_name
from holov_export.runtime.llamacpp_engine import BATCH, EIGHT_BITS_BLOCK, EngineOptions, LlamaEngine, llama_cpp
from holov_export.spec import DecoderSpec
from holov_export.tensors import Int64Array, SamplingSettings, StitchedPrompt

PROVIDERS = ("auto", "cpu", "cuda")
LANES = 16
_AGAIN = "Make it again: holov-export compile BUNDLE --decoder llamacpp --checkpoint DIR"


@dataclass
class _Answer:
    """An answer that is being made.

    Attributes:
        lane: llama.cpp's number of its sequence. cells: that it may fill.
        position: of the next token that is put in.
        drawn: the next token to be given, if it is known.
        last: the token given last, which is put in to draw the next one.
        given: how many were.
        broken: what ended it, where another answer's step did.
    """

    lane: int
    cells: int
    position: int
    sampling: SamplingSettings
    dice: np.random.Generator
    drawn: int | None = None
    last: int | None = None
    given: int = 0
    broken: Exception | None = field(default=None, repr=False)

    @property
    def waits(self) -> bool:
        """Whether a step makes a token for it."""
        return self.drawn is None and self.last is not None and self.given < self.sampling.max_new_tokens


class LlamaCppDecoder:
    """A language model in a GGUF file. Answers that are open at once are decoded together."""

    def __init__(
        self,
        file: Path,
        spec: DecoderSpec,
        *,
        provider: str = "auto",
        threads: int | None = None,
        exact: bool | None = None,
        lanes: int = LANES,
        kv_cache: KvCache = "auto",
    ) -> None:
        """Load the file.

        Args:
            file: "language.gguf".
            spec: of the language model.
            provider: "cpu", "cuda", or "auto" for the GPU where this llama.cpp was built with one.
            threads: CPU threads; None for one per core that this process may use.
            exact: attention in float32, see `EngineOptions`; None for True on a CPU. Keys and values take twice the
                memory then.
            lanes: answers that may be open at once.
            kv_cache: "int8" stores keys and values as Q8_0: half of float16's memory, and not exact.

        Raises:
            UnknownNameError: another provider.
            UsageError: lanes outside 1..64, or keys and values in another type than llama.cpp has, or beside `exact`.
            MissingExtraError: llama-cpp-python is not installed.
            BundleError: there is no such file, or it is of another model.
            EnvironmentFaultError: CUDA was asked for and is not there, or the file does not load.
        """
        if not 1 <= lanes <= 64:
            raise UsageError(f"{lanes} lanes: there can be 1 to 64.")
        if not file.is_file():
            raise BundleError(f"'{file}' does not exist.", hint=_AGAIN)
        eight_bits = _in_eight_bits(kv_cache, spec, exact)
        gpu = _on_gpu(provider)
        exact = not (gpu or eight_bits) if exact is None else exact
        options = EngineOptions(gpu, threads or _usable_cores(), exact, lanes, eight_bits)
        self._engine: LlamaEngine | None = LlamaEngine(file, options)
        self._spec = spec
        self._answers: dict[int, _Answer] = {}
        self.lanes = lanes
        self.name = f"llama-cpp-python {llama_cpp().__version__} ({'gpu' if gpu else 'cpu'})"
        self._check_model(file)

    def _check_model(self, file: Path) -> None:
        engine = self._opened()
        found = engine.width, engine.vocab_size, engine.mrope
        wanted = self._spec.width, self._spec.vocab_size, bool(self._spec.mrope_sections)
        if found != wanted:
            self.close()
            raise BundleError(
                f"'{file.name}' is of another model: width, words and M-RoPE are {found}, the bundle's are {wanted}.",
                hint=_AGAIN,
            )

    def _opened(self) -> LlamaEngine:
        if self._engine is None:
            raise EnvironmentFaultError("the decoder is closed.")
        return self._engine

    def stream(self, prompt: StitchedPrompt, sampling: SamplingSettings) -> Iterator[int]:
        """See `Decoder.stream`.

        Raises:
            PromptError: also where the prompt and its answer are longer than the context, or rows of a picture are in
                another order than llama.cpp would take them.
        """
        check_prompt(prompt, self._spec)
        check_sampling(sampling)
        self._opened()
        end = max(len(prompt), prompt.next_position or 0) + sampling.max_new_tokens
        if end > self._spec.context:
            raise PromptError(
                f"the prompt and {sampling.max_new_tokens} new tokens end at {end}, the context at "
                f"{self._spec.context}.",
                hint="Lower max_new_tokens, shorten the prompt or lower the budget.",
            )
        if self._spec.mrope_sections and prompt.position_ids is not None:
            check_order(prompt.position_ids)
        return self._tokens(prompt, sampling)

    def _tokens(self, prompt: StitchedPrompt, sampling: SamplingSettings) -> Iterator[int]:
        ends = end_tokens(self._spec, sampling)
        answer = self._entered(prompt, sampling)
        try:
            self._prefill(answer, prompt)
            while True:
                if answer.drawn is None:
                    self._step(answer)
                token = answer.drawn
                if token is None or token in ends:
                    return
                answer.drawn, answer.last, answer.given = None, token, answer.given + 1
                yield token
                if answer.given == sampling.max_new_tokens:
                    return
        finally:
            del self._answers[answer.lane]
            if self._engine is not None:
                self._engine.forget(answer.lane)

    def _entered(self, prompt: StitchedPrompt, sampling: SamplingSettings) -> _Answer:
        """A lane of its own, and room in the context for all that it may become."""
        engine = self._opened()
        free = [lane for lane in range(self.lanes) if lane not in self._answers]
        if not free:
            raise UsageError(f"{self.lanes} answers are open, and the decoder has no further lane.")
        cells = len(prompt) + sampling.max_new_tokens
        needed = cells + sum(answer.cells for answer in self._answers.values())
        if needed > engine.cells:
            most = self.lanes * self._spec.context
            room = max(needed, min(2 * engine.cells, most)) if self._answers else needed
            engine.resize(room, list(self._answers))
        answer = _Answer(
            lane=free[0],
            cells=cells,
            position=len(prompt) if prompt.next_position is None else prompt.next_position,
            sampling=sampling,
            dice=np.random.default_rng(sampling.seed),
        )
        self._answers[answer.lane] = answer
        return answer

    def _prefill(self, answer: _Answer, prompt: StitchedPrompt) -> None:
        """Put the prompt in and draw the first token."""
        engine, length, row = self._opened(), len(prompt), 0
        plain = np.arange(length, dtype=np.int32)
        for is_image, start, stop in pieces_of(prompt):
            number = stop - start
            lanes = np.full(number, answer.lane, dtype=np.int32)
            wanted = np.arange(start, stop) == length - 1
            positions = plain[start:stop]
            if prompt.position_ids is not None and self._spec.mrope_sections:
                three = prompt.position_ids[:, start:stop].astype(np.int32)
                positions = np.concatenate([three, np.zeros_like(three[:1])]) if is_image else three[0]
            if is_image:
                engine.put_rows(prompt.rows[row : row + number], positions, lanes, wanted)
                row += number
            else:
                engine.put_tokens(prompt.input_ids[start:stop].astype(np.int32), positions, lanes, wanted)
        answer.drawn = token_from_logits(engine.logits(number - 1), answer.sampling, answer.dice)

    def _step(self, asking: _Answer) -> None:
        """Draw the next token of every answer that waits for one."""
        if asking.broken is not None:
            raise EnvironmentFaultError(f"another answer's step failed: {asking.broken}")
        engine = self._opened()
        waiting = [answer for answer in self._answers.values() if answer.waits and answer.broken is None]
        try:
            engine.put_tokens(
                np.array([answer.last for answer in waiting], dtype=np.int32),
                np.array([answer.position for answer in waiting], dtype=np.int32),
                np.array([answer.lane for answer in waiting], dtype=np.int32),
                np.ones(len(waiting), dtype=bool),
            )
        except EnvironmentFaultError as error:
            for answer in waiting:
                answer.broken = error
            raise
        for index, answer in enumerate(waiting):
            answer.drawn = token_from_logits(engine.logits(index), answer.sampling, answer.dice)
            answer.position += 1

    def close(self) -> None:
        """Release the model. Answers that are still open end with an error."""
        if self._engine is not None:
            self._engine.close()
        self._engine = None


def pieces_of(prompt: StitchedPrompt) -> Iterator[tuple[bool, int, int]]:
    """(are they visual rows, first, past last) of the pieces that a prompt is put in by: one kind, at most `BATCH`."""
    is_image = prompt.input_ids == prompt.image_token_id
    borders = [0, *(np.flatnonzero(is_image[1:] != is_image[:-1]) + 1).tolist(), len(prompt)]
    for first, last in pairwise(borders):
        for start in range(first, last, BATCH):
            yield bool(is_image[first]), start, min(start + BATCH, last)


def check_order(positions: Int64Array) -> None:
    """Refuse positions [3, S] that are not in the order of time, then height, then width, each before the next.

    llama.cpp lets a row see those with lower positions, transformers those that come before it: only in this order both
    are the same.

    Source: ggml-org/llama.cpp src/llama-kv-cache.cpp at 0c1e570 (set_input_kq_mask_impl).

    Raises:
        PromptError: names the first place.
    """
    time, height, width = (np.diff(axis) for axis in positions)
    rises = (time > 0) | ((time == 0) & ((height > 0) | ((height == 0) & (width > 0))))
    if not rises.all():
        place = int(np.argmin(rises)) + 1
        before, after = positions[:, place - 1].tolist(), positions[:, place].tolist()
        raise PromptError(
            f"token {place} of the prompt has the position {after} and the one before it {before}: llama.cpp takes "
            "them in the order of time, height and width only.",
            hint="Rules that put rows in another order, and clips that last longer than their frames are wide, need "
            "--decoder ort.",
        )


def _in_eight_bits(kv_cache: KvCache, spec: DecoderSpec, exact: bool | None) -> bool:
    """Whether keys and values are stored as Q8_0.

    Raises:
        UsageError: llama.cpp would refuse it, or it contradicts `exact`.
    """
    if kv_cache_name("llamacpp", kv_cache) is None:
        return False
    if exact:
        raise UsageError("keys and values in int8 are not exact.", hint="Leave one of the two out.")
    if spec.head_width % EIGHT_BITS_BLOCK:
        raise UsageError(
            f"attention heads are {spec.head_width} wide; in int8 llama.cpp stores multiples of {EIGHT_BITS_BLOCK}.",
            hint="Leave --kv-cache out.",
        )
    return True


def _on_gpu(provider: str) -> bool:
    """Whether the layers go to the GPU."""
    if provider not in PROVIDERS:
        raise UnknownNameError(f"unknown provider '{provider}'.", hint=f"Known: {', '.join(PROVIDERS)}.")
    has_gpu = bool(llama_cpp().llama_supports_gpu_offload())
    if provider == "cuda" and not has_gpu:
        raise EnvironmentFaultError(
            "this llama-cpp-python was built without CUDA, or finds no GPU.",
            hint='Build it so: CMAKE_ARGS="-DGGML_CUDA=on" pip install llama-cpp-python (docs/llama-cpp.md). '
            "Or choose --provider cpu.",
        )
    return has_gpu and provider != "cpu"


def _usable_cores() -> int:
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
