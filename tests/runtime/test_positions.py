"""M-RoPE positions against transformers' Qwen2_5_VLModel.get_rope_index on the unpruned prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import pytest
import torch
from layouts import clip_layout, grid_layout
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLModel

from holov_export.errors import PromptError
from holov_export.runtime.positions import mrope_positions
from holov_export.tensors import ImageLayout, ImageRows, Int64Array

IMAGE, VIDEO, MERGE = 5, 6, 2


@dataclass(frozen=True)
class Item:
    """A picture, or a clip of several frames that are `seconds` apart."""

    rows: int
    columns: int
    frames: int = 0
    seconds: float = 0.0

    @property
    def token(self) -> int:
        return VIDEO if self.frames else IMAGE

    @property
    def layout(self) -> ImageLayout:
        if self.frames:
            return clip_layout(self.frames, self.rows, self.columns, self.seconds)
        return grid_layout(self.rows, self.columns)


Prompt = Sequence[int | Item]

#: numbers are words
PROMPTS: dict[str, Prompt] = {
    "text alone": (11,),
    "one image": (3, Item(4, 6), 5),
    "wide image": (3, Item(1, 40), 5),
    "tall image": (2, Item(37, 2), 1),
    "one token": (1, Item(1, 1), 1),
    "nothing before": (Item(3, 5), 4),
    "nothing behind": (4, Item(3, 5)),
    "two images": (3, Item(4, 6), 2, Item(7, 3), 9),
    "one video": (3, Item(2, 4, 5, 1.0), 5),
    "long steps": (3, Item(2, 2, 6, 3.7), 5),
    "short steps": (3, Item(2, 2, 9, 2 / 23.976), 5),
    "thirds": (3, Item(2, 2, 40, 1 / 3), 5),
    "one pair": (3, Item(2, 2, 1, 1.0), 5),
    "image and video": (3, Item(4, 6), 2, Item(3, 5, 4, 0.5), 9),
    "video and image": (3, Item(3, 5, 4, 0.5), 2, Item(4, 6), 9),
    "two videos": (1, Item(3, 5, 4, 0.5), 2, Item(2, 9, 6, 2.5), 9),
    "long prompt": (900, Item(26, 37), 700, Item(8, 12, 30, 1.3), 400, Item(40, 11), 300),
}


@cache
def model(tokens_per_second: int) -> Qwen2_5_VLModel:
    """Only its configuration is read."""
    config = Qwen2_5_VLConfig(
        text_config={
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "vocab_size": 64,
        },
        vision_config={
            "depth": 1,
            "hidden_size": 16,
            "num_heads": 1,
            "out_hidden_size": 32,
            "spatial_merge_size": MERGE,
            "tokens_per_second": tokens_per_second,
        },
    )
    with torch.device("meta"):
        return Qwen2_5_VLModel(config)


def reference(prompt: Prompt, tokens_per_second: int) -> tuple[Int64Array, int]:
    """([3, S], next) of the unpruned prompt."""
    types: list[int] = []
    grids: dict[int, list[list[int]]] = {IMAGE: [], VIDEO: []}
    seconds = []
    for piece in prompt:
        if isinstance(piece, int):
            types += [0] * piece
            continue
        grids[piece.token].append([max(1, piece.frames), piece.rows * MERGE, piece.columns * MERGE])
        types += [2 if piece.frames else 1] * piece.layout.tokens
        if piece.frames:
            seconds.append(piece.seconds)
    positions, delta = model(tokens_per_second).get_rope_index(
        torch.zeros(1, len(types), dtype=torch.long),
        torch.tensor([types]),
        image_grid_thw=torch.tensor(grids[IMAGE]) if grids[IMAGE] else None,
        video_grid_thw=torch.tensor(grids[VIDEO]) if grids[VIDEO] else None,
        second_per_grid_ts=torch.tensor(seconds) if seconds else None,
    )
    return positions[:, 0].numpy(), int(delta) + len(types)


def ids_of(prompt: Prompt) -> list[int]:
    ids: list[int] = []
    for piece in prompt:
        ids += [20] * piece if isinstance(piece, int) else [piece.token]
    return ids


def found(prompt: Prompt, kept: Sequence[Int64Array], tokens_per_second: int = 2) -> tuple[Int64Array, int]:
    items = [piece for piece in prompt if isinstance(piece, Item)]
    visual = [
        ImageRows(np.zeros((len(positions), 1), np.float32), positions, item.layout)
        for item, positions in zip(items, kept, strict=True)
    ]
    return mrope_positions(ids_of(prompt), visual, {IMAGE, VIDEO}, tokens_per_second=tokens_per_second)


def everything(prompt: Prompt) -> list[Int64Array]:
    return [np.arange(piece.layout.tokens) for piece in prompt if isinstance(piece, Item)]


@pytest.mark.parametrize("tokens_per_second", [2, 4, 25])
@pytest.mark.parametrize("name", PROMPTS)
def test_unpruned_prompts(name: str, tokens_per_second: int) -> None:
    prompt = PROMPTS[name]
    wanted, following = reference(prompt, tokens_per_second)
    positions, after = found(prompt, everything(prompt), tokens_per_second)
    np.testing.assert_array_equal(positions, wanted)
    assert positions.dtype == np.int64
    assert after == following


@pytest.mark.parametrize("share", [0.0, 0.11, 0.5])
@pytest.mark.parametrize("name", PROMPTS)
def test_kept_tokens_and_the_words_behind_them_stay_where_they_were(name: str, share: float) -> None:
    prompt, dice = PROMPTS[name], np.random.default_rng(7)
    kept = [
        np.sort(dice.choice(len(places), max(1, round(share * len(places))), replace=False))
        for places in everything(prompt)
    ]
    wanted, following = reference(prompt, 2)
    stays, at, pictures = [], 0, iter(kept)
    for piece in prompt:
        length = piece if isinstance(piece, int) else piece.layout.tokens
        stays.append(at + (np.arange(length) if isinstance(piece, int) else next(pictures)))
        at += length
    positions, after = found(prompt, kept)
    np.testing.assert_array_equal(positions, wanted[:, np.concatenate(stays)])
    assert after == following


def test_rows_in_any_order() -> None:
    prompt = PROMPTS["one image"]
    wanted, _ = reference(prompt, 2)
    positions, _ = found(prompt, [np.array([20, 3, 11])])
    np.testing.assert_array_equal(positions[:, 3:6], wanted[:, [23, 6, 14]])


def test_zero_rows_are_where_the_last_token_was_and_the_word_before_where_it_is() -> None:
    prompt = PROMPTS["two images"]
    wanted, following = reference(prompt, 2)
    positions, after = found(prompt, [np.array([2, 24, -1]), np.array([21, 0, -1, -1])])
    columns = [0, 1, 2, 5, 2, 26, 27, 28, 28, 29, 49, 49, *range(50, 59)]
    np.testing.assert_array_equal(positions, wanted[:, columns])
    assert after == following


def test_places_that_a_picture_does_not_have() -> None:
    for places in ([25], [-2]):
        with pytest.raises(PromptError, match=r"outside 0\.\.23"):
            found(PROMPTS["one image"], [np.array(places)])
    with pytest.raises(PromptError, match="where in a picture each of its rows lies"):
        mrope_positions([1, IMAGE], [ImageRows(np.zeros((1, 4)), np.zeros(1, np.int64))], {IMAGE}, tokens_per_second=2)
