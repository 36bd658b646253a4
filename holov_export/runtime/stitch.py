"""Text and visual rows become one prompt: every placeholder is repeated once for each row that replaces it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from holov_export.errors import BundleError, PromptError
from holov_export.extras import require
from holov_export.runtime.prompt import check_placeholders, prompt_from_question
from holov_export.spec import DecoderSpec, ModelSpec, PromptSpec
from holov_export.tensors import FloatArray, StitchedPrompt


@dataclass(frozen=True)
class PromptEncoder:
    """A tokenizer and what it must know of the model. Build it with `prompt_encoder_from_tokenizer`."""

    tokenizer: Any
    prompt: PromptSpec
    decoder: DecoderSpec

    def text_from_question(self, question: str, *, images: int = 1) -> str:
        """The prompt in the model's own words, with one placeholder for each image. See `prompt_from_question`."""
        ids = {
            "bos_token": self.decoder.bos_token_id,
            "eos_token": next(iter(self.decoder.eos_token_ids), None),
            "pad_token": self.decoder.pad_token_id,
        }
        names = {name: self.tokenizer.id_to_token(index) for name, index in ids.items() if index is not None}
        known = {name: token for name, token in names.items() if token is not None}
        return prompt_from_question(question, self.prompt, images=images, special_tokens=known)

    def ids_from_text(self, text: str) -> list[int]:
        """Token ids with the special tokens that the tokenizer adds, as transformers' processor gives them.

        A text that already begins with the BOS token gets no second one.
        """
        bos = self.decoder.bos_token_id
        token = self.tokenizer.id_to_token(bos) if bos is not None else None
        add_special_tokens = not (token and text.startswith(token))
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        return ids


def prompt_encoder_from_tokenizer(path: Path, model: ModelSpec) -> PromptEncoder:
    """Read a bundle's tokenizer.json.

    Raises:
        MissingExtraError: the package `tokenizers` is not installed.
        BundleError: the file is missing or does not parse.
    """
    tokenizers = require("tokenizers")
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the package raises plain Exception
        raise BundleError(f"{path.name} does not load: {error}.", hint="Export the bundle again.") from error
    tokenizer.no_truncation()  # a training setting that some files carry; it would cut visual rows off
    tokenizer.no_padding()
    return PromptEncoder(tokenizer, model.prompt, model.decoder)


def stitch(encoder: PromptEncoder, text: str, rows: Sequence[FloatArray], *, max_new_tokens: int = 0) -> StitchedPrompt:
    """Put the visual rows into a prompt.

    Args:
        encoder: of the model.
        text: a rendered prompt with one placeholder for each image.
        rows: float [count, D] of each image, in the order of the placeholders.
        max_new_tokens: room to keep free for the answer.

    Raises:
        PromptError: an empty prompt, placeholders and images differ, or it is longer than the context.
    """
    if not text.strip():
        raise PromptError("the prompt is empty.")
    placeholder, width = encoder.decoder.image_token_id, encoder.decoder.width
    ids = encoder.ids_from_text(text)
    check_placeholders(ids.count(placeholder), len(rows), encoder.prompt.image_placeholder)
    counts = [len(item) for item in rows]
    stitched: list[int] = []
    remaining = iter(counts)
    for token in ids:
        stitched.extend([token] * (next(remaining) if token == placeholder else 1))
    _check_length(len(stitched), sum(counts), max_new_tokens, encoder.decoder.context)
    together = np.concatenate(rows) if rows else np.zeros((0, width), dtype=np.float32)
    if together.ndim != 2 or together.shape[1] != width:
        raise PromptError(f"the visual rows have shape {together.shape}, the decoder takes rows of width {width}.")
    return StitchedPrompt(np.array(stitched, dtype=np.int64), together, tuple(counts), placeholder, text)


def _check_length(length: int, visual: int, max_new_tokens: int, context: int) -> None:
    if length + max_new_tokens <= context:
        return
    room = context - length
    advice = f"Lower max_new_tokens to at most {room}." if room > 0 else "Shorten the prompt or lower the budget."
    raise PromptError(
        f"the prompt has {length} tokens ({visual} of them visual) and the answer may have {max_new_tokens}: "
        f"{length + max_new_tokens} are more than the context of {context}.",
        hint=advice,
    )
