"""A stitched prompt in the shapes that vLLM takes: pure functions over numpy, the same for the engine and the server.

Visual rows never travel as "images" between engines: vLLM 0.32 stacks the images of one step into one tensor, and
images of different row counts end the engine, with everybody else's requests in it. They travel as rows at places.
"""

from __future__ import annotations

import base64
import hashlib
import io
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from holov_export.errors import PromptError, UsageError
from holov_export.runtime.decoder import end_tokens
from holov_export.spec import DecoderSpec
from holov_export.tensors import FloatArray, SamplingSettings, StitchedPrompt

#: rows of one item: vLLM takes none that is longer than a step's token budget, which is never below 2048 by default
ITEM_ROWS = 1024
#: msgpack's extension type of raw bytes. Source: vLLM 0.32 vllm/v1/serial_utils.py (`CUSTOM_TYPE_RAW_VIEW`)
_RAW = 3


def check_vllm(spec: DecoderSpec) -> None:
    """Refuse a language model that vLLM would run wrongly.

    Raises:
        UsageError: its positions are three numbers.
    """
    if spec.mrope_sections:
        raise UsageError(
            "vLLM cannot answer here: it works the positions of visual tokens (M-RoPE) out of the picture's grid, and "
            "gives rows that come from elsewhere the positions of text.",
            hint="Choose --decoder ort, or auto.",
        )


def check_room(prompt: StitchedPrompt, sampling: SamplingSettings, context: int) -> None:
    """Refuse a prompt whose answer would be cut off: vLLM ends it at the context without a word.

    Raises:
        PromptError: names the numbers.
    """
    end = len(prompt) + sampling.max_new_tokens
    if end > context:
        raise PromptError(
            f"the prompt and {sampling.max_new_tokens} new tokens end at {end}, vLLM's context at {context}.",
            hint="Lower max_new_tokens, shorten the prompt or lower the budget.",
        )


@dataclass(frozen=True)
class VllmSampling:
    """Sampling settings under vLLM's names, the same in `SamplingParams` and in a request's body.

    The model's own end tokens are among `stop_token_ids`, so `ignore_eos` leaves the choice to them. What a checkpoint
    recommends (repetition_penalty, min_p) is set to its neutral value, because a server would apply it otherwise.
    Source of the names: vLLM 0.32 vllm/sampling_params.py
    """

    temperature: float
    top_p: float
    top_k: int
    seed: int | None
    max_tokens: int
    stop_token_ids: tuple[int, ...]
    ignore_eos: bool = True
    min_p: float = 0.0
    repetition_penalty: float = 1.0


def vllm_sampling(spec: DecoderSpec, sampling: SamplingSettings) -> VllmSampling:
    """Checked settings under vLLM's names. Stop strings are not among them: the caller looks for them."""
    return VllmSampling(
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        seed=sampling.seed,
        max_tokens=sampling.max_new_tokens,
        stop_token_ids=tuple(sorted(end_tokens(spec, sampling))),
    )


@dataclass(frozen=True)
class RowItem:
    """Rows that stand next to each other in a prompt.

    Attributes:
        offset: of the first one, in tokens.
        rows: float [R, D], float32 or float16.
    """

    offset: int
    rows: FloatArray

    @property
    def digest(self) -> str:
        """What vLLM's caches know the rows by: the same rows, and no others, have the same one."""
        words = hashlib.sha256(f"{self.rows.dtype} {self.rows.shape}".encode())
        words.update(self.rows.tobytes())
        return words.hexdigest()


def items_from_prompt(prompt: StitchedPrompt, longest: int = ITEM_ROWS) -> list[RowItem]:
    """A checked prompt's rows by where they stand, no item longer than `longest` rows.

    Items know nothing of images: rows of neighbouring images may share one, and words between the rows of one image
    divide it.
    """
    rows = plain_rows(prompt.rows)
    places = np.flatnonzero(prompt.input_ids == prompt.image_token_id)
    cuts = np.flatnonzero(np.diff(places) != 1) + 1
    items: list[RowItem] = []
    for begin, end in zip([0, *cuts], [*cuts, len(places)], strict=True):
        for first in range(begin, end, longest):
            items.append(RowItem(int(places[first]), rows[first : min(first + longest, end)]))
    return items


def plain_rows(rows: FloatArray) -> FloatArray:
    """The rows as contiguous float32, or float16 where they are."""
    return np.ascontiguousarray(rows, dtype=np.float16 if rows.dtype == np.float16 else np.float32)


def whole_prompt_rows(prompt: StitchedPrompt) -> FloatArray:
    """[S, D]: the visual rows in their places, ones elsewhere.

    What stands elsewhere is not read, but vLLM 0.32 tells prompts apart by these numbers and by the token ids, with 0
    for the ids of visual rows, so a zero row would be taken for token 0. A row of ones does not come out of a model.
    """
    rows = plain_rows(prompt.rows)
    whole = np.ones((len(prompt), rows.shape[1]), dtype=rows.dtype)
    whole[prompt.input_ids == prompt.image_token_id] = rows
    return whole


def npy_base64(rows: FloatArray) -> str:
    """Rows as base64 of a .npy file, which a server reads as it reads torch's format; no torch is needed for it."""
    buffer = io.BytesIO()
    np.save(buffer, plain_rows(rows), allow_pickle=False)
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def wire_base64(rows: FloatArray) -> str:
    """Rows as a server's multimodal item "prompt_embeds" in base64: rows that go into their places as they are.

    Source: vLLM 0.32 vllm/v1/serial_utils.py (`MsgpackEncoder._encode_mm_item`), vllm/renderers/hf.py
    (`_apply_prompt_embeds_to_engine_input`)
    """
    tensor = [str(rows.dtype), list(rows.shape), rows.tobytes()]
    field = ["shared", {"keep_on_cpu": False, "batch_size": 1}]
    packed = msgpack_from_value({"embedding": {"data": tensor, "field": field}})
    return base64.b64encode(packed).decode("ascii")


def msgpack_from_value(value: object) -> bytes:
    """msgpack of plain values; bytes become vLLM's extension type of raw bytes.

    Source of the format: https://github.com/msgpack/msgpack/blob/master/spec.md

    Raises:
        TypeError: a value of another type.
    """
    if isinstance(value, bool):
        return b"\xc3" if value else b"\xc2"
    if isinstance(value, int) and 0 <= value < 2**64:
        return bytes([value]) if value < 128 else b"\xcf" + value.to_bytes(8, "big")
    if isinstance(value, str):
        text = value.encode("utf-8")
        return b"\xdb" + len(text).to_bytes(4, "big") + text
    if isinstance(value, bytes):
        return b"\xc9" + len(value).to_bytes(4, "big") + bytes([_RAW]) + value
    if isinstance(value, list):
        return b"\xdd" + len(value).to_bytes(4, "big") + b"".join(msgpack_from_value(item) for item in value)
    if isinstance(value, dict):
        pairs = b"".join(msgpack_from_value(key) + msgpack_from_value(item) for key, item in value.items())
        return b"\xdf" + len(value).to_bytes(4, "big") + pairs
    raise TypeError(f"msgpack of a {type(value).__name__}")


def rows_of_images(prompt: StitchedPrompt) -> list[FloatArray]:
    """The rows [K_i, D] of each image that has any."""
    ends = np.cumsum((0, *prompt.counts))
    rows = plain_rows(prompt.rows)
    return [rows[begin:end] for begin, end in pairwise(ends) if end > begin]
