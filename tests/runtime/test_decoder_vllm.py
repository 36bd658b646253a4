"""What goes into vLLM, and what does not. vLLM itself answers in scripts/check_vllm."""

from __future__ import annotations

import base64
import importlib.util
import io
import json
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from holov_export.errors import CheckpointError, MissingExtraError, PromptError, UnknownNameError, UsageError
from holov_export.runtime.decoder_vllm import VllmDecoder
from holov_export.runtime.vllm_inputs import (
    check_room,
    items_from_prompt,
    msgpack_from_value,
    npy_base64,
    rows_of_images,
    vllm_sampling,
    whole_prompt_rows,
    wire_base64,
)
from holov_export.runtime.vllm_language import language_name
from holov_export.spec import DecoderSpec, ModelSpec
from holov_export.tensors import SamplingSettings, StitchedPrompt

IMAGE, WIDTH = 3, 5


def prompt_of(*parts: int | list[int]) -> StitchedPrompt:
    """Token ids; a list is an image of as many rows as its only number says. Each row holds its own number."""
    ids = [token for part in parts for token in ([IMAGE] * part[0] if isinstance(part, list) else [part])]
    counts = tuple(part[0] for part in parts if isinstance(part, list))
    rows = np.repeat(np.arange(1, sum(counts) + 1, dtype=np.float32)[:, None], WIDTH, axis=1)
    return StitchedPrompt(np.array(ids, dtype=np.int64), rows, counts, IMAGE, "")


def unpacked(data: bytes) -> object:
    """One msgpack value, after the specification; extensions as (type, bytes)."""
    stream = io.BytesIO(data)
    value = _next(stream)
    assert not stream.read()
    return value


def _next(stream: io.BytesIO) -> Any:
    head = stream.read(1)[0]
    if head < 0x80:
        return head
    if head in (0xC2, 0xC3):
        return head == 0xC3
    if head == 0xCF:
        return struct.unpack(">Q", stream.read(8))[0]
    (size,) = struct.unpack(">I", stream.read(4))
    if head == 0xC9:
        return stream.read(1)[0], stream.read(size)
    if head == 0xDB:
        return stream.read(size).decode()
    if head == 0xDD:
        return [_next(stream) for _ in range(size)]
    assert head == 0xDF, hex(head)
    return {_next(stream): _next(stream) for _ in range(size)}


class TestItems:
    def test_an_item_begins_where_its_rows_stand(self) -> None:
        found = items_from_prompt(prompt_of(1, 7, [4], 8, [2], 9))
        assert [(item.offset, len(item.rows)) for item in found] == [(2, 4), (7, 2)]
        assert [item.rows[:, 0].tolist() for item in found] == [[1, 2, 3, 4], [5, 6]]

    def test_neighbouring_images_share_an_item(self) -> None:
        (found,) = items_from_prompt(prompt_of(1, [2], [3], 9))
        assert (found.offset, len(found.rows)) == (1, 5)

    def test_an_image_without_rows_has_none(self) -> None:
        assert items_from_prompt(prompt_of(1, [0], 9)) == []
        assert [item.offset for item in items_from_prompt(prompt_of(1, [0], 8, [1]))] == [2]

    def test_a_long_image_is_cut(self) -> None:
        found = items_from_prompt(prompt_of(1, [7], 9), longest=3)
        assert [(item.offset, item.rows[:, 0].tolist()) for item in found] == [
            (1, [1, 2, 3]),
            (4, [4, 5, 6]),
            (7, [7]),
        ]

    def test_only_the_same_rows_have_the_same_digest(self) -> None:
        first, second = items_from_prompt(prompt_of(1, [2], 8, [2]))
        assert first.digest == items_from_prompt(prompt_of(5, 6, [2]))[0].digest
        assert first.digest != second.digest
        halves = replace(prompt_of(1, [2]), rows=first.rows.astype(np.float16))
        assert items_from_prompt(halves)[0].digest != first.digest


class TestRows:
    def test_the_whole_prompt_has_the_rows_in_their_places(self) -> None:
        whole = whole_prompt_rows(prompt_of(1, [2], 8, [1]))
        assert whole[:, 0].tolist() == [1, 1, 2, 1, 3] and whole.shape == (5, WIDTH)
        assert whole.dtype == np.float32

    def test_a_zero_row_is_no_word(self) -> None:
        """vLLM's prefix cache knows a place by the token id, 0 for a row, and by the numbers that stand there."""
        prompt = replace(prompt_of(1, [1]), rows=np.zeros((1, WIDTH), dtype=np.float32))
        words = whole_prompt_rows(replace(prompt_of(1, 0), rows=np.zeros((0, WIDTH), dtype=np.float32)))
        assert not np.array_equal(whole_prompt_rows(prompt), words)

    def test_float16_stays_and_the_rest_becomes_float32(self) -> None:
        for given, kept in ((np.float16, np.float16), (np.float32, np.float32), (np.float64, np.float32)):
            prompt = replace(prompt_of(1, [2]), rows=np.ones((2, WIDTH), dtype=given))
            assert whole_prompt_rows(prompt).dtype == items_from_prompt(prompt)[0].rows.dtype == kept

    def test_images_have_their_own_rows_for_a_chat(self) -> None:
        found = rows_of_images(prompt_of(1, [2], [0], [1]))
        assert [rows[:, 0].tolist() for rows in found] == [[1, 2], [3]]

    def test_a_npy_file_holds_the_rows(self) -> None:
        rows = prompt_of([3]).rows[:, ::-1]
        found = np.load(io.BytesIO(base64.b64decode(npy_base64(rows))), allow_pickle=False)
        assert np.array_equal(found, rows)

    @pytest.mark.parametrize("kind", ["float32", "float16"])
    def test_the_wire_holds_the_rows(self, kind: str) -> None:
        rows = prompt_of([3]).rows.astype(kind)
        found: Any = unpacked(base64.b64decode(wire_base64(rows)))
        assert found["embedding"]["field"] == ["shared", {"keep_on_cpu": False, "batch_size": 1}]
        name, shape, (extension, data) = found["embedding"]["data"]
        assert (name, shape, extension) == (kind, [3, WIDTH], 3)
        assert np.array_equal(np.frombuffer(data, dtype=name).reshape(shape), rows)


def test_msgpack_gives_back_what_went_in() -> None:
    value = {"text": "naïve", "numbers": [0, 127, 128, 70000, 2**63], "flags": [True, False], "nothing": []}
    assert unpacked(msgpack_from_value(value)) == value
    assert unpacked(msgpack_from_value(b"\x00\xff")) == (3, b"\x00\xff")
    with pytest.raises(TypeError):
        msgpack_from_value(1.5)


def test_sampling_under_vllms_names(llava_spec: ModelSpec) -> None:
    spec = llava_spec.decoder
    sampling = SamplingSettings(
        max_new_tokens=9, temperature=0.5, top_k=4, top_p=0.9, seed=3, stop=["."], stop_token_ids=(90, 80)
    )
    found = vllm_sampling(spec, sampling)
    assert (found.max_tokens, found.temperature, found.top_k, found.top_p, found.seed) == (9, 0.5, 4, 0.9, 3)
    assert found.stop_token_ids == (*spec.eos_token_ids, 80, 90) and found.ignore_eos


def test_no_answer_is_cut_off_by_the_context() -> None:
    prompt = prompt_of(1, [6], 9)
    check_room(prompt, SamplingSettings(max_new_tokens=2), 10)
    with pytest.raises(PromptError, match="end at 11, vLLM's context at 10"):
        check_room(prompt, SamplingSettings(max_new_tokens=3), 10)


def test_names_of_language_tensors() -> None:
    inner = "layers.0.mlp.up_proj.weight"
    assert language_name(f"model.language_model.{inner}") == language_name(f"language_model.model.{inner}")
    assert language_name(f"language_model.model.{inner}") == f"model.{inner}"
    assert language_name("lm_head.weight") == language_name("language_model.lm_head.weight") == "lm_head.weight"
    for other in ("model.image_tower.pre_layrnorm.bias", "multi_modal_projector.linear_1.bias", "video_tower.x"):
        assert language_name(other) is None


class TestRefusals:
    def test_positions_that_are_three_numbers(self, llava_checkpoint: Path, llava_spec: ModelSpec) -> None:
        spec: DecoderSpec = llava_spec.decoder.model_copy(update={"mrope_sections": (2, 3, 3)})
        with pytest.raises(UsageError, match="M-RoPE"):
            VllmDecoder(llava_checkpoint, spec)

    def test_another_provider(self, llava_checkpoint: Path, llava_spec: ModelSpec) -> None:
        with pytest.raises(UnknownNameError, match="rocket"):
            VllmDecoder(llava_checkpoint, llava_spec.decoder, provider="rocket")

    @pytest.mark.parametrize("text", [None, "{", "[1]"])
    def test_no_checkpoint(self, text: str | None, tmp_path: Path, llava_spec: ModelSpec) -> None:
        if text is not None:
            (tmp_path / "config.json").write_text(text)
        with pytest.raises(CheckpointError, match=r"config\.json"):
            VllmDecoder(tmp_path, llava_spec.decoder)

    @pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed")
    def test_no_vllm(self, tmp_path: Path, llava_spec: ModelSpec) -> None:
        (tmp_path / "config.json").write_text(json.dumps({"architectures": ["LlavaForConditionalGeneration"]}))
        with pytest.raises(MissingExtraError, match="vllm"):
            VllmDecoder(tmp_path, llava_spec.decoder)
