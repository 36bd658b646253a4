"""Qwen2.5-VL in TensorRT-LLM engines: kept tokens have their own positions, by the angles of transformers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import trtllm_standin
from decoder_families import checkpoint_of, picture, scene, spec_of
from transformers import AutoConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLRotaryEmbedding
from trtllm_standin.trial import EngineTrial, counting, write_engine

from holov_export.errors import EnvironmentFaultError, PromptError, UnsupportedModelError
from holov_export.runtime import decoder_trtllm
from holov_export.runtime.decoder_trtllm import TrtllmDecoder
from holov_export.runtime.trtllm_prompts import extra_ids, facts_from_engine, position_delta, rotary_table
from holov_export.tensors import SamplingSettings, StitchedPrompt

NAME = "qwen2_5_vl"
FOUR = SamplingSettings(max_new_tokens=4)
KEPT = (1, 4, 5, 9)


@pytest.fixture(scope="module")
def prompts() -> list[StitchedPrompt]:
    """All tokens of a picture, few of them, few of another one, words alone."""
    whole = scene(NAME, [picture(200, 120)])
    other = scene(NAME, [picture(120, 200, seed=3)])
    return [whole.stitched(), whole.stitched([KEPT]), other.stitched([KEPT]), scene(NAME).stitched()]


@pytest.fixture
def engine(tmp_path: Path) -> Path:
    return write_engine(tmp_path / "engine", spec_of(NAME).decoder, EngineTrial())


def test_the_table_is_what_transformers_turns_keys_by(prompts: list[StitchedPrompt], engine: Path) -> None:
    spec = spec_of(NAME).decoder
    text = AutoConfig.from_pretrained(checkpoint_of(NAME)).get_text_config()
    facts = replace(facts_from_engine(engine / "engine"), rotary_base=text.rope_parameters["rope_theta"])
    rotary = Qwen2_5_VLRotaryEmbedding(text)
    for prompt in prompts:
        assert prompt.position_ids is not None
        cos, sin = rotary(torch.zeros(1), torch.tensor(prompt.position_ids)[:, None])
        half = facts.rotary_width // 2
        expected = np.stack([part[0, :, :half].numpy() for part in (cos, sin)], axis=-1)
        table = rotary_table(prompt, facts, spec.mrope_sections).reshape(facts.positions, half, 2)
        np.testing.assert_allclose(table[: len(prompt)], expected, atol=2e-6)
        assert np.all(table[len(prompt) :] == [1.0, 0.0])


def test_new_tokens_go_on_where_the_unpruned_prompt_would(prompts: list[StitchedPrompt]) -> None:
    whole, few, _, words = prompts
    assert position_delta(whole) < 0 < position_delta(few) + len(few) == position_delta(whole) + len(whole)
    assert position_delta(words) == 0


@pytest.mark.parametrize("version", ["0.16", "1.2"])
def test_requests_carry_a_table_each(version: str, prompts: list[StitchedPrompt], engine: Path) -> None:
    asked: list[Any] = []

    def language(item: Any) -> list[int]:
        asked.append(item)
        return counting(20)(item)

    spec = spec_of(NAME).decoder
    facts = facts_from_engine(engine / "engine")
    with trtllm_standin.engines(version, language) as world:
        decoder = TrtllmDecoder(engine, spec)
        streams = [decoder.stream(prompt, FOUR) for prompt in prompts]
        assert [next(stream) for stream in streams] == [20] * 4
        assert [list(stream) for stream in streams] == [[21, 22, 23]] * 4
    assert len(world.requests) == 4
    for item, prompt in zip(asked, prompts, strict=True):
        assert np.array_equal(item.rotary.numpy(), rotary_table(prompt, facts, spec.mrope_sections))
        assert item.delta == position_delta(prompt)
        assert (item.rows is None) == (not len(prompt.rows))
    # the older kernels read the first table for all that begin together: one prompt at a time there
    assert decoder.lanes == (1 if version == "0.16" else 4)
    assert world.executors[0].config.max_batch_size == decoder.lanes


def test_the_older_kernels_would_mix_tables_up(
    prompts: list[StitchedPrompt], engine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The trap itself: the stand-in acts it, so that the test above can fail."""
    asked: list[Any] = []
    whole = decoder_trtllm.make_executor

    def careless(api: Any, folder: Path, facts: Any) -> Any:
        executor = whole(api, folder, facts)
        executor.batch = 4
        return executor

    monkeypatch.setattr(decoder_trtllm, "make_executor", careless)
    with trtllm_standin.engines("0.16", lambda item: asked.append(item) or counting(20)(item)) as world:
        decoder = TrtllmDecoder(engine, spec_of(NAME).decoder)
        requests = [
            decoder_trtllm.request_from_parts(decoder._api, decoder._parts(prompt, frozenset({1})), FOUR)
            for prompt in prompts[:2]
        ]
        for request in requests:
            world.executors[0].enqueue_request(request)
        world.executors[0].await_responses()
    assert torch.equal(asked[0].rotary, asked[1].rotary)


def test_a_version_without_tables_is_refused(engine: Path) -> None:
    with trtllm_standin.engines("0.12", counting(20)), pytest.raises(UnsupportedModelError, match="positions of kept"):
        TrtllmDecoder(engine, spec_of(NAME).decoder)


def test_engine_and_model_must_count_positions_alike(engine: Path, tmp_path: Path) -> None:
    spec = spec_of(NAME).decoder
    plain = spec.model_copy(update={"mrope_sections": ()})
    with trtllm_standin.engines("1.2", counting(20)):
        with pytest.raises(UnsupportedModelError, match="positions are one number, the engine's are three"):
            TrtllmDecoder(engine, plain)
        with pytest.raises(UnsupportedModelError, match="positions are three numbers, the engine's are one"):
            TrtllmDecoder(write_engine(tmp_path / "plain", plain, EngineTrial()), spec)
        odd = spec.model_copy(update={"mrope_sections": (1, 1, 1)})
        with pytest.raises(UnsupportedModelError, match="do not fill"):
            TrtllmDecoder(engine, odd)


def test_a_prompt_without_positions_is_refused(prompts: list[StitchedPrompt], engine: Path) -> None:
    with trtllm_standin.engines("1.2", counting(20)):
        decoder = TrtllmDecoder(engine, spec_of(NAME).decoder)
        with pytest.raises(PromptError, match="needs positions"):
            decoder.stream(replace(prompts[1], position_ids=None), FOUR)


def test_the_same_rows_in_other_places_are_another_image(prompts: list[StitchedPrompt]) -> None:
    few = prompts[1]
    assert few.position_ids is not None
    places = np.flatnonzero(few.input_ids == few.image_token_id)
    moved = few.position_ids.copy()
    moved[2, places[-1]] += 1
    elsewhere = few.position_ids.copy()
    elsewhere[:, places[0] :] += 7  # the whole image further back
    longer = few.position_ids.copy()
    longer[:, places[-1] + 1 :] += 1  # a larger grid behind the same kept tokens
    numbers = [extra_ids(replace(few, position_ids=item))[places[0]] for item in (few.position_ids, moved, longer)]
    assert len(set(numbers)) == 3
    assert extra_ids(replace(few, position_ids=elsewhere))[places[0]] == numbers[0]


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (lambda table: table[:-2], "must be float32"),
        (lambda table: table.reshape(1, -1), "must be float32"),
        (lambda table: table.astype(np.float16), "must be float32"),
    ],
)
def test_a_wrong_table_fails(
    wrong: Callable[[Any], Any], said: str, prompts: list[StitchedPrompt], engine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoder_trtllm, "rotary_table", lambda *given: wrong(rotary_table(*given)))
    with trtllm_standin.engines("1.2", counting(20)):
        stream = TrtllmDecoder(engine, spec_of(NAME).decoder).stream(prompts[1], FOUR)
        with pytest.raises(EnvironmentFaultError, match=said):
            next(stream)
