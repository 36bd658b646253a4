"""`holov_decoder`: a stitched prompt becomes a stream of text, a response for each token."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from holov_export.bundle import Bundle
from holov_export.errors import PromptError
from holov_export.runtime.answer_stream import AnswerStream
from holov_export.runtime.decoder import check_prompt
from holov_export.serve.triton.bridge import Bridge, texts_of
from holov_export.serve.triton.config_text import ModelConfig, TensorConfig
from holov_export.serve.triton.decoding import DecodingLoop
from holov_export.serve.triton.prompt_model import INPUT_IDS, NEXT_POSITION, POSITION_IDS, ROW_COUNTS, ROWS, TEXT
from holov_export.serve.triton.sampling import SAMPLING_INPUTS, sampling_from_request
from holov_export.serve.triton.settings import ModelSettings, settings_from_arguments
from holov_export.tensors import StitchedPrompt

NAME = "holov_decoder"
CANCEL = "cancel"
TOKEN_IDS = "token_ids"
FINISH_REASON = "finish_reason"


def decoder_config(bundle: Bundle, settings: ModelSettings, *, gpu: bool) -> ModelConfig:
    """Its configuration: decoupled, a response for each token and a last one that says why the answer ends.

    In are the outputs of `holov_prompt` and how tokens are drawn. `cancel` alone names another request (its id) whose
    answer is not wanted any more: a model that calls this one has no other way to say so before Triton 25.04.
    Out: the text that this token completes, often empty; the ids [0 or 1]; the reason, empty but for the last.
    """
    width = bundle.manifest.plan.model.decoder.width
    return ModelConfig(
        name=NAME,
        backend="python",
        inputs=(
            TensorConfig(INPUT_IDS, "int64", (-1,), optional=True),
            TensorConfig(ROWS, "float32", (-1, width), optional=True),
            TensorConfig(ROW_COUNTS, "int64", (-1,), optional=True),
            TensorConfig(POSITION_IDS, "int64", (-1, -1), optional=True),
            TensorConfig(NEXT_POSITION, "int64", (1,), optional=True),
            *SAMPLING_INPUTS,
            TensorConfig(CANCEL, "string", (1,), optional=True),
        ),
        outputs=ANSWER_OUTPUTS,
        decoupled=True,
        device="gpu" if gpu else "cpu",
        parameters=settings.parameters(),
    )


ANSWER_OUTPUTS = (
    TensorConfig(TEXT, "string", (1,)),
    TensorConfig(TOKEN_IDS, "int64", (-1,)),
    TensorConfig(FINISH_REASON, "string", (1,)),
)


class DecoderModel:
    """What Triton's Python backend calls."""

    def initialize(self, arguments: Mapping[str, str]) -> None:
        """Load the decoder."""
        self._bridge = Bridge()
        self._settings = settings_from_arguments(arguments, ModelSettings)
        bundle = self._settings.opened()
        self._spec = bundle.manifest.plan.model.decoder
        self._session = self._settings.decoding_session(bundle)
        self._cancelled: set[str] = set()
        self._running: set[str] = set()
        self._guard = threading.Lock()
        self._loop = DecodingLoop(self._session.decoder.lanes, self._settings.queue)
        self._session.encoder  # noqa: B018  loads the tokenizer

    def execute(self, requests: Sequence[Any]) -> None:
        """Take requests; their responses come from the loop's thread."""
        for request in requests:
            sink = TritonSink(self._bridge, request, self._is_cancelled, self._over)
            try:
                cancel = self._bridge.input(request, CANCEL)
                if cancel is not None:
                    self._cancel(texts_of(cancel)[0])
                    sink.finished("cancelled")
                    continue
                self._started(request.request_id())
                self._loop.submit(self._maker(request), sink)
            except Exception as error:
                sink.failed(error)

    def finalize(self) -> None:
        """End what is being made and release the decoder."""
        self._loop.close()
        self._session.close()

    def _maker(self, request: Any) -> Callable[[], AnswerStream]:
        """What opens the answer. The request is read and refused now.

        Raises:
            PromptError, UsageError: it is wrong.
        """
        prompt = self._prompt(request)
        check_prompt(prompt, self._spec)
        sampling = sampling_from_request(self._bridge, request, self._settings.new_tokens)
        room = self._spec.context - max(len(prompt), prompt.next_position or 0)
        if room < 1:
            raise PromptError(f"the prompt has {len(prompt)} tokens and the context {self._spec.context}.")
        sampling = replace(sampling, max_new_tokens=min(sampling.max_new_tokens, room))
        return lambda: AnswerStream(self._session.decoder, prompt, sampling, self._session.encoder.tokenizer)

    def _prompt(self, request: Any) -> StitchedPrompt:
        bridge = self._bridge
        ids = bridge.needed(request, INPUT_IDS)
        rows, counts = bridge.input(request, ROWS), bridge.input(request, ROW_COUNTS)
        positions, following = bridge.input(request, POSITION_IDS), bridge.input(request, NEXT_POSITION)
        if ids.size and not 0 <= int(ids.min()) <= int(ids.max()) < self._spec.vocab_size:
            raise PromptError(f"an id of the prompt is outside 0..{self._spec.vocab_size - 1}.")
        rows = np.zeros((0, self._spec.width), dtype=np.float32) if rows is None else rows
        has_positions = positions is not None and positions.size > 0
        return StitchedPrompt(
            input_ids=ids,
            rows=rows,
            counts=(len(rows),) if counts is None else tuple(int(count) for count in counts),
            image_token_id=self._spec.image_token_id,
            text="",
            position_ids=positions if has_positions else None,
            next_position=None if following is None or following[0] < 0 else int(following[0]),
        )

    def _started(self, name: str) -> None:
        with self._guard:
            self._running.add(name)

    def _cancel(self, name: str) -> None:
        with self._guard:
            if name and name in self._running:  # else it has ended by itself
                self._cancelled.add(name)

    def _is_cancelled(self, name: str) -> bool:
        with self._guard:
            return name in self._cancelled

    def _over(self, name: str) -> None:
        with self._guard:
            self._running.discard(name)
            self._cancelled.discard(name)


class TritonSink:
    """Sends an answer's pieces to whoever asked: a client, or another model."""

    def __init__(
        self,
        bridge: Bridge,
        request: Any,
        is_cancelled: Callable[[str], bool],
        over: Callable[[str], None],
    ) -> None:
        """`is_cancelled` is asked with the request's id; `over` is told it when nothing more will be sent."""
        self._bridge, self._sender, self._name = bridge, request.get_response_sender(), request.request_id()
        self._wanted = frozenset(request.requested_output_names())
        self._is_cancelled, self._over = is_cancelled, over
        self._tokens = 0

    def cancelled(self) -> bool:
        return bool(self._sender.is_cancelled()) or self._is_cancelled(self._name)

    def piece(self, text: str, token_ids: list[int]) -> None:
        self._tokens += len(token_ids)
        self._bridge.send(self._sender, answer_response(self._bridge, text, token_ids, ""), self._wanted)

    def finished(self, reason: str) -> None:
        if reason == "cancelled" and self._tokens:
            self._bridge.backend.Logger.log_info(f"answer {self._name} cancelled after {self._tokens} tokens")
        self._last(answer_response(self._bridge, "", [], reason))

    def failed(self, error: Exception) -> None:
        self._last(self._bridge.failure(error))

    def _last(self, response: Any) -> None:
        self._over(self._name)
        self._bridge.send(self._sender, response, self._wanted, last=True)


def answer_response(bridge: Bridge, text: str, token_ids: Sequence[int], reason: str) -> Any:
    """A response with these outputs."""
    return bridge.response(
        [
            bridge.texts(TEXT, [text]),
            bridge.tensor(TOKEN_IDS, np.array(token_ids, dtype=np.int64)),
            bridge.texts(FINISH_REASON, [reason]),
        ]
    )
