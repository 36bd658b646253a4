"""`holov_prompt`: a question and visual tokens become a prompt: ids, and rows for its placeholders."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from holov_export.bundle import Bundle
from holov_export.errors import UsageError
from holov_export.runtime.stitch import stitch
from holov_export.serve.limits import Limits
from holov_export.serve.triton.bridge import Bridge, texts_of
from holov_export.serve.triton.config_text import ModelConfig, TensorConfig
from holov_export.serve.triton.picture_layouts import layout_from_text
from holov_export.serve.triton.settings import ModelSettings, settings_from_arguments
from holov_export.serve.triton.vision_model import COUNTS, LAYOUTS, POSITIONS, TOKENS, rows_from_outputs
from holov_export.tensors import StitchedPrompt

NAME = "holov_prompt"
QUESTION = "question"
RAW = "raw"
INPUT_IDS = "input_ids"
ROWS = "rows"
ROW_COUNTS = "row_counts"
POSITION_IDS = "position_ids"
NEXT_POSITION = "next_position"
TEXT = "text"


def prompt_config(bundle: Bundle, settings: ModelSettings) -> ModelConfig:
    """Its configuration, for one prompt at a time.

    In: the question in plain words (or, with `raw`, a whole prompt with a placeholder for each image), and the outputs
    of `holov_vision` without their first axis; none of them for a question about no picture. Out: input_ids [S], rows
    [R, D], row_counts [images]; where the language model's positions are three numbers, position_ids [3, S] and the
    next one, else [0, 0] and -1; the rendered text.
    """
    width = bundle.manifest.plan.model.decoder.width
    return ModelConfig(
        name=NAME,
        backend="python",
        inputs=(
            TensorConfig(QUESTION, "string", (1,)),
            TensorConfig(RAW, "bool", (1,), optional=True),
            TensorConfig(TOKENS, "float32", (-1, width), optional=True),
            TensorConfig(POSITIONS, "int64", (-1,), optional=True),
            TensorConfig(COUNTS, "int64", (-1,), optional=True),
            TensorConfig(LAYOUTS, "string", (-1,), optional=True),
        ),
        outputs=(
            TensorConfig(INPUT_IDS, "int64", (-1,)),
            TensorConfig(ROWS, "float32", (-1, width)),
            TensorConfig(ROW_COUNTS, "int64", (-1,)),
            TensorConfig(POSITION_IDS, "int64", (-1, -1)),
            TensorConfig(NEXT_POSITION, "int64", (1,)),
            TensorConfig(TEXT, "string", (1,)),
        ),
        parameters=settings.parameters(),
    )


class PromptModel:
    """What Triton's Python backend calls."""

    def initialize(self, arguments: Mapping[str, str]) -> None:
        """Load the tokenizer."""
        self._bridge = Bridge()
        settings = settings_from_arguments(arguments, ModelSettings)
        bundle = settings.opened()
        self._plan = bundle.manifest.plan
        self._session = settings.model_copy(update={"decoder": "none"}).decoding_session(bundle)
        self._session.encoder  # noqa: B018  loads it

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """One response for each request."""
        responses = []
        for request in requests:
            try:
                responses.append(self._response(self._stitched(request)))
            except Exception as error:
                responses.append(self._bridge.failure(error))
        return responses

    def finalize(self) -> None:
        """Nothing is held."""
        self._session.close()

    def _stitched(self, request: Any) -> StitchedPrompt:
        """Raises PromptError, UsageError: the request is wrong."""
        bridge = self._bridge
        (question,) = texts_of(bridge.needed(request, QUESTION))
        if len(question) > Limits().prompt_characters:
            raise UsageError(f"the question has {len(question)} characters, at most {Limits().prompt_characters} go.")
        counts = bridge.input(request, COUNTS)
        rows = []
        if counts is not None:
            layouts = bridge.input(request, LAYOUTS)
            texts = [""] * counts.size if layouts is None else texts_of(layouts)
            rows = rows_from_outputs(
                bridge.needed(request, TOKENS),
                bridge.needed(request, POSITIONS),
                counts,
                [layout_from_text(text) for text in texts],
            )
        raw = bridge.input(request, RAW)
        encoder = self._session.encoder
        if raw is None or not raw.ravel()[0]:
            question = encoder.text_from_question(question, images=len(rows))
        return stitch(
            encoder,
            question,
            rows,
            newline=self._session.newline,
            start_counts=self._plan.start_counts,
            max_new_tokens=1,
        )

    def _response(self, prompt: StitchedPrompt) -> Any:
        bridge = self._bridge
        nowhere = np.zeros((0, 0), dtype=np.int64)
        following = -1 if prompt.next_position is None else prompt.next_position
        return bridge.response(
            [
                bridge.tensor(INPUT_IDS, prompt.input_ids),
                bridge.tensor(ROWS, prompt.rows.astype(np.float32).reshape(-1, self._plan.model.decoder.width)),
                bridge.tensor(ROW_COUNTS, np.array(prompt.counts, dtype=np.int64)),
                bridge.tensor(POSITION_IDS, nowhere if prompt.position_ids is None else prompt.position_ids),
                bridge.tensor(NEXT_POSITION, np.array([following], dtype=np.int64)),
                bridge.texts(TEXT, [prompt.text]),
            ]
        )
