"""`holov_answer` and `holov_answer_once`: pictures and a question in, text out, through the three other models.

They hold nothing themselves. Each request calls `holov_vision`, where Triton puts it together with others, then
`holov_prompt` and `holov_decoder`.
"""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from holov_export.errors import BusyError, EnvironmentFaultError
from holov_export.serve.triton import decoder_model, prompt_model, vision_model
from holov_export.serve.triton.bridge import Bridge, responses_of, texts_of
from holov_export.serve.triton.config_text import ModelConfig, TensorConfig
from holov_export.serve.triton.decoder_model import ANSWER_OUTPUTS, CANCEL, FINISH_REASON, TOKEN_IDS, answer_response
from holov_export.serve.triton.decoding import RETRY_AFTER
from holov_export.serve.triton.prompt_model import QUESTION, RAW, ROW_COUNTS, TEXT
from holov_export.serve.triton.sampling import SAMPLING_INPUTS
from holov_export.serve.triton.settings import ModelSettings, settings_from_arguments
from holov_export.serve.triton.vision_model import BUDGET, COUNTS, IMAGES, LAYOUTS, POSITIONS, TOKENS

STREAMED = "holov_answer"
ONCE = "holov_answer_once"
VISUAL_TOKENS = "visual_tokens"
_PROMPT_OUTPUTS = (
    prompt_model.INPUT_IDS,
    prompt_model.ROWS,
    prompt_model.ROW_COUNTS,
    prompt_model.POSITION_IDS,
    prompt_model.NEXT_POSITION,
)


def answer_config(settings: ModelSettings, *, streamed: bool, instances: int = 1) -> ModelConfig:
    """The configuration of one of the two: images [n] and budget [n] or [1], a question, how tokens are drawn.

    Without images the question is about none. `holov_answer` gives a response for each token (gRPC streams, and
    HTTP's `generate_stream`); `holov_answer_once` the whole answer in one, for any client, and as many at a time as it
    has instances. `visual_tokens` are the rows of each image; while an answer is streamed only its last response has
    them.
    """
    return ModelConfig(
        name=STREAMED if streamed else ONCE,
        backend="python",
        inputs=(
            TensorConfig(IMAGES, "string", (-1,), optional=True),
            TensorConfig(QUESTION, "string", (1,)),
            TensorConfig(BUDGET, "int32", (-1,), optional=True),
            TensorConfig(RAW, "bool", (1,), optional=True),
            *SAMPLING_INPUTS,
        ),
        outputs=(*ANSWER_OUTPUTS, TensorConfig(VISUAL_TOKENS, "int64", (-1,))),
        decoupled=streamed,
        instances=instances,
        parameters=settings.parameters(),
    )


class CalledModelError(Exception):
    """Another model refused. `error` is Triton's, for the client as it is: it has been classed there."""

    def __init__(self, error: Any) -> None:
        super().__init__(error.message())
        self.error = error


@dataclass(frozen=True)
class Piece:
    """Of an answer; `reason` is empty but for the last one."""

    text: str
    token_ids: tuple[int, ...]
    reason: str


class Chain:
    """The calls of one request."""

    def __init__(self, bridge: Bridge, request: Any, name: str) -> None:
        """`name` is what the decoder knows the answer by."""
        self._bridge, self._request, self._name = bridge, request, name
        self.visual_tokens: list[int] = []

    def pieces(self, is_cancelled: Callable[[], bool]) -> Iterator[Piece]:
        """The answer, piece by piece.

        Raises:
            CalledModelError: a model refused.
            UsageError: the request is wrong.
        """
        prompt = self._call(prompt_model.NAME, [*self._given(QUESTION, RAW), *self._visual()], _PROMPT_OUTPUTS)
        self.visual_tokens = [int(count) for count in prompt[ROW_COUNTS]]
        if is_cancelled():
            yield Piece("", (), "cancelled")
            return
        inputs = [self._bridge.tensor(name, value) for name, value in prompt.items()]
        inputs += self._given(*(tensor.name for tensor in SAMPLING_INPUTS))
        outputs = [tensor.name for tensor in ANSWER_OUTPUTS]
        call = self._bridge.backend.InferenceRequest(
            model_name=decoder_model.NAME, requested_output_names=outputs, inputs=inputs, request_id=self._name
        )
        told = False
        for response in responses_of(call):
            _check(response)
            if not response.output_tensors():
                continue  # Triton's own mark of the end
            (text,) = texts_of(self._bridge.output(response, TEXT))
            (reason,) = texts_of(self._bridge.output(response, FINISH_REASON))
            yield Piece(text, tuple(self._bridge.output(response, TOKEN_IDS).tolist()), reason)
            if not told and not reason and is_cancelled():
                told = True
                self._cancel()

    def _visual(self) -> list[Any]:
        """Inputs for `holov_prompt`: what the pictures become; nothing if there are none."""
        images = self._bridge.input(self._request, IMAGES)
        if images is None or images.size == 0:
            return []
        inputs = [self._bridge.tensor(IMAGES, images[None])]
        budget = self._bridge.input(self._request, BUDGET)
        if budget is not None:
            inputs.append(self._bridge.tensor(BUDGET, budget[None]))
        seen = self._call(vision_model.NAME, inputs, (TOKENS, POSITIONS, COUNTS, LAYOUTS))
        values = {name: value[0] for name, value in seen.items()}
        values[TOKENS] = values[TOKENS].astype(np.float32)
        return [self._bridge.tensor(name, value) for name, value in values.items()]

    def _given(self, *names: str) -> list[Any]:
        """Those inputs of the request that are there."""
        arrays = ((name, self._bridge.input(self._request, name)) for name in names)
        return [self._bridge.tensor(name, array) for name, array in arrays if array is not None]

    def _call(self, model: str, inputs: Sequence[Any], outputs: Sequence[str]) -> dict[str, npt.NDArray[Any]]:
        call = self._bridge.backend.InferenceRequest(
            model_name=model, requested_output_names=list(outputs), inputs=list(inputs), request_id=self._name
        )
        response = call.exec()
        _check(response)
        return {name: self._bridge.output(response, name) for name in outputs}

    def _cancel(self) -> None:
        name = self._bridge.texts(CANCEL, [self._name])
        call = self._bridge.backend.InferenceRequest(
            model_name=decoder_model.NAME, requested_output_names=[FINISH_REASON], inputs=[name]
        )
        for _ in responses_of(call):
            pass


def _check(response: Any) -> None:
    if response.has_error():
        raise CalledModelError(response.error())


class AnswerModel:
    """What Triton's Python backend calls for `holov_answer`."""

    def initialize(self, arguments: Mapping[str, str]) -> None:
        """Make the threads that wait for other models."""
        self._bridge = Bridge()
        self._settings = settings_from_arguments(arguments, ModelSettings)
        self._threads = ThreadPoolExecutor(self._settings.answers, thread_name_prefix="answer")
        self._places = threading.BoundedSemaphore(self._settings.queue)

    def execute(self, requests: Sequence[Any]) -> None:
        """Take requests; each is answered in a thread."""
        for request in requests:
            sender = request.get_response_sender()
            if self._places.acquire(blocking=False):
                self._threads.submit(self._answer, request, sender)
            else:
                busy = BusyError(f"{self._settings.queue} answers wait already.", retry_after=RETRY_AFTER)
                self._bridge.send(sender, self._bridge.failure(busy), (), last=True)

    def finalize(self) -> None:
        """Wait for the threads."""
        self._threads.shutdown(wait=True, cancel_futures=True)

    def _answer(self, request: Any, sender: Any) -> None:
        bridge = self._bridge
        wanted = frozenset(request.requested_output_names())
        try:
            chain = Chain(bridge, request, uuid.uuid4().hex)
            last = None
            for piece in chain.pieces(sender.is_cancelled):
                response = whole_response(bridge, piece, chain.visual_tokens if piece.reason else [])
                if piece.reason:
                    last = response
                else:
                    bridge.send(sender, response, wanted)
            if last is None:
                raise EnvironmentFaultError("the decoder gave no last piece.")
            bridge.send(sender, last, wanted, last=True)
        except Exception as error:
            bridge.send(sender, _failure(bridge, error), wanted, last=True)
        finally:
            self._places.release()


class AnswerOnceModel:
    """What Triton's Python backend calls for `holov_answer_once`."""

    def initialize(self, arguments: Mapping[str, str]) -> None:
        """Look at the parameters."""
        self._bridge = Bridge()
        settings_from_arguments(arguments, ModelSettings)

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """One response for each request."""
        return [self._answer(request) for request in requests]

    def _answer(self, request: Any) -> Any:
        try:
            chain = Chain(self._bridge, request, uuid.uuid4().hex)
            pieces = list(chain.pieces(request.is_cancelled))
            whole = Piece(
                "".join(piece.text for piece in pieces),
                tuple(token for piece in pieces for token in piece.token_ids),
                pieces[-1].reason,
            )
            return whole_response(self._bridge, whole, chain.visual_tokens)
        except Exception as error:
            return _failure(self._bridge, error)


def whole_response(bridge: Bridge, piece: Piece, visual_tokens: Sequence[int]) -> Any:
    """A response of either model."""
    response = answer_response(bridge, piece.text, piece.token_ids, piece.reason)
    tensors = [*response.output_tensors(), bridge.tensor(VISUAL_TOKENS, np.array(visual_tokens, dtype=np.int64))]
    return bridge.response(tensors)


def _failure(bridge: Bridge, error: Exception) -> Any:
    if isinstance(error, CalledModelError):
        return bridge.backend.InferenceResponse(output_tensors=[], error=error.error)
    return bridge.failure(error)
