"""Text and visual rows become one prompt: every placeholder is repeated once for each row that replaces it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from holov_export.errors import BundleError, PromptError
from holov_export.extras import require
from holov_export.runtime.positions import mrope_positions
from holov_export.runtime.prompt import (
    MediaCount,
    Turn,
    check_placeholders,
    prompt_from_question,
    prompt_from_turns,
)
from holov_export.spec import DecoderSpec, FramePairsSpec, ModelSpec, PromptSpec
from holov_export.tensors import FloatArray, ImageLayout, ImageRows, Int64Array, StitchedPrompt


@dataclass(frozen=True)
class PromptEncoder:
    """A tokenizer and what it must know of the model. Build it with `prompt_encoder_from_tokenizer`.

    Attributes:
        tokens_per_second: see `FramePairsSpec`; 1 where the model takes no such videos.
    """

    tokenizer: Any
    prompt: PromptSpec
    decoder: DecoderSpec
    tokens_per_second: int = 1

    @property
    def placeholders(self) -> frozenset[int]:
        """Ids of the placeholders of images and of videos."""
        both = (self.decoder.image_token_id, self.decoder.video_token_id)
        return frozenset(token for token in both if token is not None)

    def text_from_question(self, question: str, *, images: int = 1, videos: int = 0) -> str:
        """The prompt in the model's own words, one placeholder for each image and video: `prompt_from_question`."""
        return prompt_from_question(
            question, self.prompt, images=images, videos=videos, special_tokens=self._special_tokens()
        )

    def text_from_turns(self, turns: Sequence[Turn]) -> str:
        """The prompt of a conversation: `prompt_from_turns`."""
        return prompt_from_turns(turns, self.prompt, special_tokens=self._special_tokens())

    def _special_tokens(self) -> dict[str, str]:
        """What chat templates call "bos_token", "eos_token", ..."""
        ids = {
            "bos_token": self.decoder.bos_token_id,
            "eos_token": next(iter(self.decoder.eos_token_ids), None),
            "pad_token": self.decoder.pad_token_id,
        }
        names = {name: self.tokenizer.id_to_token(index) for name, index in ids.items() if index is not None}
        return {name: token for name, token in names.items() if token is not None}

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
    seconds = model.video.tokens_per_second if isinstance(model.video, FramePairsSpec) else 1
    return PromptEncoder(tokenizer, model.prompt, model.decoder, seconds)


def stitch(
    encoder: PromptEncoder,
    text: str,
    rows: Sequence[FloatArray | ImageRows],
    videos: Sequence[ImageRows] = (),
    *,
    newline: FloatArray | None = None,
    start_counts: bool = False,
    max_new_tokens: int = 0,
) -> StitchedPrompt:
    """Put the visual rows into a prompt.

    Args:
        encoder: of the model.
        text: a rendered prompt with one placeholder for each image and each video.
        rows: of each image, in the order of the placeholders; plain float [count, D] where nothing needs to be known of
            a row's place.
        videos: of each video, likewise.
        newline: float [D], put behind each row of a region with newlines of which a token is kept; None for none.
        start_counts: the word before a placeholder is one of the tokens that the rule chose among; its position is the
            number of tokens of the picture. It is put where the rule puts it, and left out if the rule does.
        max_new_tokens: room to keep free for the answer.

    Raises:
        PromptError: an empty prompt, placeholders and images differ, it is longer than the context, or a row is in a
            place that its picture does not have.
    """
    ids, visual = _in_order(encoder, text, [_image_rows(item) for item in rows], videos)
    width, placeholder = encoder.decoder.width, encoder.decoder.image_token_id
    for item in visual:
        if item.rows.ndim != 2 or item.rows.shape[1] != width:
            raise PromptError(f"the visual rows have shape {item.rows.shape}, the decoder takes rows of width {width}.")
    positions, following = None, None
    if encoder.decoder.mrope_sections:
        positions, following = mrope_positions(
            ids, visual, encoder.placeholders, tokens_per_second=encoder.tokens_per_second
        )
    if newline is not None:
        visual = [_with_newlines(item, newline) for item in visual]
    stitched, stays = _expanded(encoder, ids, visual, start_counts=start_counts)
    if start_counts:
        visual = [_without_start(item) for item in visual]
    counts = tuple(len(item.rows) for item in visual)
    stitched = stitched[stays]
    _check_length(len(stitched), sum(counts), max_new_tokens, encoder.decoder.context, following)
    together = np.concatenate([item.rows for item in visual]) if visual else np.zeros((0, width), dtype=np.float32)
    return StitchedPrompt(
        input_ids=stitched,
        rows=together,
        counts=counts,
        image_token_id=placeholder,
        text=text,
        position_ids=None if positions is None else positions[:, stays],
        next_position=following,
    )


def check_fit(encoder: PromptEncoder, text: str, *, images: int, videos: int = 0, max_new_tokens: int = 1) -> None:
    """Refuse a prompt that could not be stitched even if a single token of each image and video were kept.

    Raises:
        PromptError: see `stitch`.
    """
    one = ImageRows(np.zeros((1, encoder.decoder.width), dtype=np.float32), np.zeros(1, dtype=np.int64))
    ids, visual = _in_order(encoder, text, [one] * images, [one] * videos)
    _check_length(len(ids), len(visual), max_new_tokens, encoder.decoder.context, None)


def _image_rows(rows: FloatArray | ImageRows) -> ImageRows:
    if isinstance(rows, ImageRows):
        return rows
    return ImageRows(rows, np.arange(len(rows), dtype=np.int64))


def _in_order(
    encoder: PromptEncoder, text: str, images: Sequence[ImageRows], videos: Sequence[ImageRows]
) -> tuple[list[int], list[ImageRows]]:
    """(the ids of a text, the images and videos in the order of their placeholders)."""
    if not text.strip():
        raise PromptError("the prompt is empty.")
    ids = encoder.ids_from_text(text)
    image, video = encoder.decoder.image_token_id, encoder.decoder.video_token_id
    found = MediaCount(ids.count(image), 0 if video is None else ids.count(video))
    check_placeholders(found, MediaCount(len(images), len(videos)), encoder.prompt)
    of_kind = {image: iter(images), video: iter(videos)}
    return ids, [next(of_kind[token]) for token in ids if token in encoder.placeholders]


def _expanded(
    encoder: PromptEncoder, ids: Sequence[int], visual: Sequence[ImageRows], *, start_counts: bool
) -> tuple[Int64Array, npt.NDArray[np.bool_]]:
    """(int64 [S], `ids` with a placeholder for each row; bool [S], which of them the prompt has).

    Rows of videos get the placeholder of images: a decoder need not tell them apart.
    """
    pictures = iter(visual)
    blocks: list[Int64Array] = []
    stays: list[npt.NDArray[np.bool_]] = []
    for index, token in enumerate(ids):
        if token not in encoder.placeholders:
            blocks.append(np.array([token], dtype=np.int64))
            stays.append(np.ones(1, dtype=bool))
            continue
        item = next(pictures)
        block = np.full(len(item.rows), encoder.decoder.image_token_id, dtype=np.int64)
        if start_counts:
            if index == 0 or ids[index - 1] in encoder.placeholders:
                raise PromptError("there is no word before an image, and the rule chose among that word too.")
            block[_is_start(item)] = ids[index - 1]
            stays[-1][:] = False
        blocks.append(block)
        stays.append(np.ones(len(block), dtype=bool))
    if not blocks:
        return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=bool)
    return np.concatenate(blocks), np.concatenate(stays)


def _is_start(item: ImageRows) -> npt.NDArray[np.bool_]:
    """bool [count], whether a row is the word before its picture."""
    if item.layout is None:
        raise PromptError("the word before an image is known by the layout of the image, and there is none.")
    found: npt.NDArray[np.bool_] = item.positions == item.layout.tokens
    return found


def _without_start(item: ImageRows) -> ImageRows:
    kept = ~_is_start(item)
    return ImageRows(item.rows[kept], item.positions[kept], item.layout)


def _with_newlines(item: ImageRows, newline: FloatArray) -> ImageRows:
    """The rows with a newline behind the last kept one of each row of the grid, where the region has newlines.

    A newline's position is -1.
    """
    if item.layout is None or not any(region.newlines for region in item.layout.regions):
        return item
    line = _lines_of(item.layout)[item.positions]
    if np.any(item.positions < 0) or np.any(np.diff(item.positions) <= 0):
        raise PromptError("newlines go behind rows that are in the order of the picture; these are not.")
    ends = np.flatnonzero((line >= 0) & (np.append(line[1:], -1) != line)) + 1
    rows = np.insert(item.rows, ends, newline.astype(item.rows.dtype), axis=0)
    return ImageRows(rows, np.insert(item.positions, ends, -1), item.layout)


def _lines_of(layout: ImageLayout) -> Int64Array:
    """int64 [N], the number of each token's row in the picture; -1 in regions without newlines."""
    parts, first = [], 0
    for region in layout.regions:
        rows, columns = region.grid
        if region.newlines:
            parts.append(np.repeat(np.arange(first, first + rows, dtype=np.int64), columns))
            first += rows
        else:
            parts.append(np.full(region.tokens, -1, dtype=np.int64))
    return np.concatenate(parts)


def _check_length(length: int, visual: int, max_new_tokens: int, context: int, following: int | None) -> None:
    """Refuse what is longer than the context; `following` is the position of the first new token, if not `length`."""
    used = max(length, following or 0)
    if used + max_new_tokens <= context:
        return
    room = context - used
    advice = f"Lower max_new_tokens to at most {room}." if room > 0 else "Shorten the prompt or lower the budget."
    if room <= 0 and used > length:
        advice = "Shorten the prompt, or give smaller images or fewer frames: pruning does not change positions."
    reach = "" if used == length else f" and reaches the position {used}"
    raise PromptError(
        f"the prompt has {length} tokens ({visual} of them visual){reach} and the answer may have {max_new_tokens}: "
        f"{used + max_new_tokens} are more than the context of {context}.",
        hint=advice,
    )
