"""TensorRT-LLM engines (TensorRT-LLM 0.12 to 1.2, also 0.12.0-jetson) through its C++ executor.

Requests are batched in flight, each with its own number of visual rows. **It has not run on the real TensorRT-LLM**:
names and rules are from its source, and tests check every call against a stand-in that has them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

from holov_export.decoder_files import read_decoder
from holov_export.errors import BundleError, EnvironmentFaultError, UnsupportedModelError
from holov_export.extras import require
from holov_export.runtime.decoder import check_prompt, check_sampling, end_tokens
from holov_export.runtime.trtllm_executor import (
    EngineRequest,
    executor_api,
    make_executor,
    request_from_parts,
)
from holov_export.runtime.trtllm_prompts import (
    check_engine,
    check_room,
    engine_ids,
    extra_ids,
    facts_from_engine,
    position_delta,
    rotary_table,
)
from holov_export.spec import DecoderSpec
from holov_export.tensors import SamplingSettings, StitchedPrompt

#: how long one wait for answers lasts, so that an interrupt is seen
_PATIENCE = timedelta(seconds=1)


@dataclass
class _Answer:
    """What has come for one request and was not yielded yet."""

    tokens: deque[int] = field(default_factory=deque)
    final: bool = False
    error: str = ""


class TrtllmDecoder:
    """An engine of `holov-export compile --decoder trtllm`.

    Attributes:
        lanes: requests that the engine runs at once. More may be open; they wait.
    """

    def __init__(self, folder: Path, spec: DecoderSpec) -> None:
        """Load the engine.

        Args:
            folder: with decoder.json, BUNDLE/decoders/trtllm.
            spec: of the language model.

        Raises:
            BundleError, IntegrityError: no such decoder, or one of another model or made for other sizes.
            UnsupportedModelError: positions that this TensorRT-LLM cannot be given.
            MissingExtraError: TensorRT-LLM is not installed.
            EnvironmentFaultError: it runs no engines, or the engine does not load here.
        """
        decoder = read_decoder(folder, "trtllm")
        self._facts = facts_from_engine(decoder.main)
        check_engine(self._facts, spec)
        sizes = decoder.record.sizes
        built = (self._facts.batch, self._facts.input, self._facts.sequence, self._facts.multimodal)
        if sizes is None or (sizes.batch, sizes.input, sizes.sequence, sizes.multimodal) != built:
            raise BundleError(
                f"decoder.json and the engine's config.json disagree: {sizes} and {built} (batch, input, sequence, "
                "rows).",
                hint="Make it again: holov-export compile BUNDLE --decoder trtllm --checkpoint DIR",
            )
        self._api = executor_api()
        if self._facts.mrope and self._api.rotary is None:
            raise UnsupportedModelError(
                f"this TensorRT-LLM ({self._api.version}) cannot be given the positions of kept tokens (M-RoPE).",
                hint="Choose --decoder ort, or a newer TensorRT-LLM.",
            )
        self._torch = require("torch")
        self._spec = spec
        self._answers: dict[int, _Answer] = {}
        try:
            self._executor: Any = make_executor(self._api, decoder.main, self._facts)
        except (RuntimeError, ValueError) as error:
            raise EnvironmentFaultError(
                f"TensorRT-LLM {self._api.version} cannot load the engine, which {self._facts.version} built: {error}",
                hint="An engine runs only with the TensorRT-LLM and on the kind of GPU that it was built with.",
            ) from error
        self.lanes = 1 if self._facts.mrope and self._api.mixes_rotary_tables else self._facts.batch
        self.name = f"tensorrt-llm {self._api.version} (engine, {decoder.record.weights})"

    def stream(self, prompt: StitchedPrompt, sampling: SamplingSettings) -> Iterator[int]:
        """See `Decoder.stream`. The first `next` sends the request.

        Raises:
            PromptError, UsageError: see `Decoder.stream`, or the engine was built for less; nothing is sent then.
        """
        check_prompt(prompt, self._spec)
        check_sampling(sampling)
        check_room(prompt, sampling.max_new_tokens, self._facts)
        if self._executor is None:
            raise EnvironmentFaultError("the decoder is closed.")
        ends = end_tokens(self._spec, sampling)
        return self._tokens(request_from_parts(self._api, self._parts(prompt, ends), sampling), ends)

    def _parts(self, prompt: StitchedPrompt, ends: frozenset[int]) -> EngineRequest:
        mrope = self._facts.mrope
        rows = None
        if len(prompt.rows):
            # one row after another in memory, and of the engine's element type: it compares them. numpy knows no
            # bfloat16, so torch casts
            dtype = getattr(self._torch, self._facts.dtype)
            rows = self._torch.tensor(prompt.rows).to(dtype).contiguous()
        own = [token for token in self._spec.eos_token_ids if token in ends]
        return EngineRequest(
            ids=engine_ids(prompt, self._facts.vocab_size),
            extra=extra_ids(prompt) if self._api.extra_ids and len(prompt.rows) else None,
            rows=rows,
            rotary=rotary_table(prompt, self._facts, self._spec.mrope_sections) if mrope else None,
            delta=position_delta(prompt) if mrope else 0,
            ends=(*own, *sorted(ends - set(own))),
        )

    def _tokens(self, request: Any, ends: frozenset[int]) -> Iterator[int]:
        executor = self._executor
        if executor is None:
            raise EnvironmentFaultError("the decoder is closed.")
        try:
            number = int(executor.enqueue_request(request))
        except RuntimeError as error:
            raise EnvironmentFaultError(f"TensorRT-LLM refused the request: {error}") from error
        answer = self._answers[number] = _Answer()
        try:
            while True:
                while not (answer.tokens or answer.final):
                    self._await()
                if not answer.tokens:
                    if answer.error:
                        raise EnvironmentFaultError(f"TensorRT-LLM failed: {answer.error}")
                    return
                token = answer.tokens.popleft()
                if token in ends:
                    return
                yield token
        finally:
            del self._answers[number]
            if not answer.final and self._executor is not None:
                executor.cancel_request(number)

    def _await(self) -> None:
        """Wait for answers to any request and put them where their own `next` finds them."""
        if self._executor is None:
            raise EnvironmentFaultError("the decoder was closed while it answered.")
        try:
            responses = self._executor.await_responses(timeout=_PATIENCE)
        except RuntimeError as error:
            raise EnvironmentFaultError(f"TensorRT-LLM failed: {error}") from error
        for response in responses:
            answer = self._answers.get(int(response.request_id))
            if answer is None:  # of a stream that was closed
                continue
            if response.has_error():
                answer.error, answer.final = str(response.error_msg), True
                continue
            result = response.result
            answer.tokens.extend(int(token) for token in result.output_token_ids[0])
            answer.final = bool(result.is_final)

    def close(self) -> None:
        """Stop the executor and release the engine."""
        executor, self._executor = self._executor, None
        if executor is not None:
            executor.shutdown()
