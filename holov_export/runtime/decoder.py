"""What turns a stitched prompt into new tokens, and how a token is drawn."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import numpy as np
import numpy.typing as npt

from holov_export.errors import PromptError, UsageError
from holov_export.spec import DecoderSpec
from holov_export.tensors import SamplingSettings, StitchedPrompt


class Decoder(Protocol):
    """A language model that takes embedding rows in the places of its image placeholders.

    Attributes:
        name: of the engine and the device, for people.
        lanes: how many streams may be open at once and be pulled in turn, from one thread.
    """

    name: str
    lanes: int

    def stream(self, prompt: StitchedPrompt, sampling: SamplingSettings) -> Iterator[int]:
        """New token ids, one at a time, as they are made.

        The call prepares what does not depend on the prompt's length, the first `next` prefills.

        Ends before `max_new_tokens` only because of an end token or one of `sampling.stop_token_ids`, which is not
        yielded. Closing the iterator early frees what it holds.

        Raises:
            PromptError: placeholders and rows of the prompt differ.
            UsageError: sampling settings outside their ranges.
        """
        ...

    def close(self) -> None: ...


def check_prompt(prompt: StitchedPrompt, spec: DecoderSpec) -> None:
    """Refuse a prompt whose rows do not fit its placeholders. Back ends do not check it: a surplus row vanishes there.

    Raises:
        PromptError: names the numbers; or the language model needs positions and the prompt has none.
    """
    places = int(np.count_nonzero(prompt.input_ids == prompt.image_token_id))
    rows = len(prompt.rows)
    if places != rows or sum(prompt.counts) != rows:
        raise PromptError(
            f"the prompt has {places} image places, {rows} visual rows and counts that sum to {sum(prompt.counts)}."
        )
    if rows and prompt.rows.shape[1] != spec.width:
        raise PromptError(f"the visual rows are {prompt.rows.shape[1]} wide, the decoder takes {spec.width}.")
    if len(prompt) == 0:
        raise PromptError("the prompt is empty.")
    if spec.mrope_sections:
        shape = None if prompt.position_ids is None else prompt.position_ids.shape
        if shape != (3, len(prompt)) or prompt.next_position is None:
            raise PromptError(f"the decoder needs positions [3, {len(prompt)}] and the next one, it got {shape}.")


def check_sampling(sampling: SamplingSettings) -> None:
    """Refuse settings that back ends would misread.

    Raises:
        UsageError: names the setting and its range.
    """
    ranges = (
        ("max_new_tokens", sampling.max_new_tokens >= 1, "at least 1"),
        ("temperature", 0 <= sampling.temperature < float("inf"), "0 (greedy) or more"),
        ("top_k", sampling.top_k >= 0, "0 (all) or more"),
        ("top_p", 0 < sampling.top_p <= 1, "above 0 and at most 1"),
        ("seed", sampling.seed is None or 0 <= sampling.seed < 2**31, "in 0..2147483647"),
    )
    for name, good, wanted in ranges:
        if not good:
            raise UsageError(f"{name} is {getattr(sampling, name)}, it must be {wanted}.")
    if isinstance(sampling.stop, str):
        raise UsageError(f"stop is the string {sampling.stop!r}, it must be a list of strings.")
    if any(not text for text in sampling.stop):
        raise UsageError("a stop string is empty.", hint="It would end every answer before it begins.")


def end_tokens(spec: DecoderSpec, sampling: SamplingSettings) -> frozenset[int]:
    """Ids that end an answer: the model's own and the caller's."""
    return frozenset(spec.eos_token_ids) | frozenset(sampling.stop_token_ids)


def load_hint(error: Exception) -> str:
    """What to do about a decoder that does not load; "" if nothing is known.

    onnxruntime 1.23.2 and 1.24.4 refuse the attention of 8-bit keys and values, 1.25.1 and later load it.
    """
    if "GroupQueryAttention" not in str(error):
        return ""
    return "A decoder with 8-bit keys and values needs ONNX Runtime 1.25: pip install --upgrade onnxruntime"


def token_from_logits(logits: npt.NDArray[np.floating], sampling: SamplingSettings, dice: np.random.Generator) -> int:
    """Pick a token: the most likely one at temperature 0, else drawn after temperature, top-k and top-p.

    Args:
        logits: float [V].
        sampling: checked settings.
        dice: the caller's random generator, seeded once for an answer.
    """
    if sampling.temperature == 0:
        return int(np.argmax(logits))
    scaled = logits.astype(np.float64) / sampling.temperature
    order = np.argsort(-scaled, kind="stable")
    if sampling.top_k:
        order = order[: sampling.top_k]
    weights = np.exp(scaled[order] - scaled[order[0]])
    weights /= weights.sum()
    # the token that crosses top_p belongs to the nucleus
    kept = int(np.searchsorted(np.cumsum(weights), sampling.top_p, side="left")) + 1
    weights = weights[:kept] / weights[:kept].sum()
    return int(dice.choice(order[:kept], p=weights))


def check_genai(spec: DecoderSpec) -> None:
    """Refuse a language model that ONNX Runtime GenAI would run wrongly.

    Raises:
        UsageError: its positions are three numbers.
    """
    if spec.mrope_sections:
        raise UsageError(
            "the decoder 'genai' cannot answer here: ONNX Runtime GenAI works the positions of visual tokens (M-RoPE) "
            "out of the picture's grid, and where tokens were pruned they would be wrong.",
            hint="Choose --decoder ort, or auto.",
        )
