"""TensorRT-LLM's LLM API: prompts, models and refusals against a stand-in of two versions; transformers' tokens."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import trtllm_standin
from decoder_families import checkpoint_of, picture, scene, spec_of
from trtllm_standin import API_VERSIONS
from trtllm_standin.trial import prompt_of

from holov_export.errors import EnvironmentFaultError, PromptError, UnsupportedModelError, UsageError
from holov_export.runtime import decoder_trtllm_api, trtllm_llava
from holov_export.runtime.decoder import Decoder
from holov_export.runtime.decoder_hf import HfDecoder
from holov_export.runtime.decoder_trtllm_api import EMBEDDINGS, TOKEN_IDS, TrtllmApiDecoder
from holov_export.runtime.trtllm_llava import language_weights, register
from holov_export.spec import DecoderSpec, ModelSpec
from holov_export.tensors import SamplingSettings, StitchedPrompt

every_version = pytest.mark.parametrize("version", API_VERSIONS)
EIGHT = SamplingSettings(max_new_tokens=8)
NEXT = ("llava_next", "llava_next_mistral")


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TLLM_WORKER_USE_SINGLE_PROCESS", "set by the test")
    monkeypatch.delenv("TLLM_WORKER_USE_SINGLE_PROCESS")
    torch.set_num_threads(1)
    return


@pytest.fixture
def spec(llava_spec: ModelSpec) -> DecoderSpec:
    return llava_spec.decoder


@cache
def next_prompts(name: str) -> tuple[StitchedPrompt, ...]:
    """All tokens of a tiled picture, few of them, two pictures with few, words alone."""
    one, two = scene(name, [picture(90, 70)]), scene(name, [picture(150, 40), picture(60, 60, seed=2)])
    return one.stitched(), one.stitched([(0, 3, 20)]), two.stitched([(1,), (2, 5, 17)]), scene(name).stitched()


# ------------------------------------------------------------------------------------------------------ tokens


@every_version
def test_llava_tokens_are_those_of_transformers_whatever_k(
    version: str, llava_checkpoint: Path, spec: DecoderSpec
) -> None:
    prompts = [prompt_of(spec, *counts, seed=seed) for seed, counts in enumerate([(), (1,), (7, 3), (64,), (0, 5)])]
    reference = HfDecoder(llava_checkpoint, spec, provider="cpu", threads=1)
    expected = [list(reference.stream(prompt, EIGHT)) for prompt in prompts]
    with trtllm_standin.llm_api(version) as world:
        decoder: Decoder = TrtllmApiDecoder(llava_checkpoint, spec)
        streams = [decoder.stream(prompt, EIGHT) for prompt in prompts]
        firsts = [next(stream) for stream in streams]
        assert [[first, *stream] for first, stream in zip(firsts, streams, strict=True)] == expected
        assert max(world.steps) == len(prompts)  # their ids lay one behind the other in one step
        decoder.close()
        assert world.llms[0].closed
    assert decoder.name.startswith("tensorrt-llm ") and decoder.lanes == 64


@every_version
@pytest.mark.parametrize("name", NEXT)
def test_llava_next_tokens_are_those_of_transformers(version: str, name: str) -> None:
    spec = spec_of(name).decoder
    reference = HfDecoder(checkpoint_of(name), spec, provider="cpu", threads=1)
    with trtllm_standin.llm_api(version) as world:
        decoder = TrtllmApiDecoder(checkpoint_of(name), spec)
        for prompt in next_prompts(name):
            assert list(decoder.stream(prompt, EIGHT)) == list(reference.stream(prompt, EIGHT))
    rows = [item[EMBEDDINGS]["image"] for item in world.inputs if EMBEDDINGS in item]
    assert [[tuple(item.shape) for item in images] for images in rows] == [
        [(count, spec.width) for count in prompt.counts] for prompt in next_prompts(name)[:3]
    ]
    assert "prompt_token_ids" in world.inputs[3]


@every_version
def test_the_same_prompt_twice_has_the_same_answer(version: str, llava_checkpoint: Path, spec: DecoderSpec) -> None:
    with trtllm_standin.llm_api(version) as world:
        decoder = TrtllmApiDecoder(llava_checkpoint, spec)
        answers = [list(decoder.stream(prompt_of(spec, 5), EIGHT)) for _ in range(2)]
    assert answers[0] == answers[1] and len(answers[0]) == 8
    assert world.llms[0].args["kv_cache_config"].enable_block_reuse is False


@every_version
def test_the_model_is_made_with_names_of_the_version(version: str, llava_checkpoint: Path, spec: DecoderSpec) -> None:
    with trtllm_standin.llm_api(version) as world:
        TrtllmApiDecoder(llava_checkpoint, spec)
        args = dict(world.llms[0].args)
        assert os.environ["TLLM_WORKER_USE_SINGLE_PROCESS"] == "1"
    assert args.pop("kv_cache_config") is not None
    sizes = {"max_batch_size": 64, "max_num_tokens": 8192, "max_seq_len": spec.context}
    if version == "1.2":
        sizes["max_input_len"] = spec.context
    assert args == {
        "model": str(llava_checkpoint),
        "tensor_parallel_size": 1,
        "enable_chunked_prefill": False,
        **sizes,
    }


# ------------------------------------------------------------------------------------------------------ streams


@every_version
def test_closing_a_stream_aborts_its_request_and_no_other(
    version: str, llava_checkpoint: Path, spec: DecoderSpec
) -> None:
    with trtllm_standin.llm_api(version) as world:
        decoder = TrtllmApiDecoder(llava_checkpoint, spec)
        first, second = decoder.stream(prompt_of(spec, 3), EIGHT), decoder.stream(prompt_of(spec, 5), EIGHT)
        next(first), next(second)
        first.close()  # type: ignore[attr-defined]
        assert len(list(second)) == 7 and world.aborted == [1]


def test_end_tokens_end_an_answer_and_are_not_part_of_it(llava_checkpoint: Path, spec: DecoderSpec) -> None:
    with trtllm_standin.llm_api("1.2"):
        decoder = TrtllmApiDecoder(llava_checkpoint, spec)
        whole = list(decoder.stream(prompt_of(spec, 5), EIGHT))
        last = next(index for index, token in enumerate(whole) if token not in whole[:index] and index >= 1)
        stopped = replace(EIGHT, stop_token_ids=[whole[last]])
        assert list(decoder.stream(prompt_of(spec, 5), stopped)) == whole[:last]
        other = spec.model_copy(update={"eos_token_ids": (whole[last],)})
        decoder = TrtllmApiDecoder(llava_checkpoint, other)
        assert list(decoder.stream(prompt_of(spec, 5), EIGHT)) == whole[:last]


def test_sampling_settings(llava_checkpoint: Path, spec: DecoderSpec) -> None:
    with trtllm_standin.llm_api("1.2"):
        decoder = TrtllmApiDecoder(llava_checkpoint, spec)
        drawn = SamplingSettings(temperature=0.5, top_p=0.8, seed=4)
        given = [decoder._settings(item, frozenset({2, 9})) for item in (EIGHT, drawn, replace(drawn, seed=None))]
    greedy, seeded, free = given
    assert (greedy.top_k, greedy.temperature, greedy.top_p, greedy.seed) == (1, None, None, None)
    assert (greedy.end_id, greedy.stop_token_ids, greedy.detokenize) == (spec.eos_token_ids[0], [9], False)
    assert (seeded.top_k, seeded.temperature, seeded.top_p, seeded.seed) == (None, 0.5, 0.8, 4)
    assert free.seed is not None


def test_a_closed_decoder_answers_no_more(llava_checkpoint: Path, spec: DecoderSpec) -> None:
    with trtllm_standin.llm_api("1.2"):
        decoder = TrtllmApiDecoder(llava_checkpoint, spec)
        unborn = decoder.stream(prompt_of(spec, 3), EIGHT)
        decoder.close()
        decoder.close()
        with pytest.raises(EnvironmentFaultError, match="closed"):
            decoder.stream(prompt_of(spec, 3), EIGHT)
        with pytest.raises(EnvironmentFaultError, match="closed"):
            next(unborn)


# ------------------------------------------------------------------------------------------------------ refusals


def test_qwen_is_refused_with_the_reason() -> None:
    with pytest.raises(UnsupportedModelError, match="positions cannot be passed") as caught:
        TrtllmApiDecoder(checkpoint_of("qwen2_5_vl"), spec_of("qwen2_5_vl").decoder)
    assert "--decoder trtllm" in caught.value.hint


def test_video_llava_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="no Video-LLaVA"):
        TrtllmApiDecoder(checkpoint_of("video_llava"), spec_of("video_llava").decoder)


def test_several_gpus_are_for_models_that_workers_know(llava_checkpoint: Path, spec: DecoderSpec) -> None:
    with pytest.raises(UsageError, match="one GPU"):
        TrtllmApiDecoder(llava_checkpoint, spec, tensor_parallel=2)
    with pytest.raises(UsageError, match="at least 1"):
        TrtllmApiDecoder(llava_checkpoint, spec, tensor_parallel=0)
    with trtllm_standin.llm_api("1.2") as world:
        TrtllmApiDecoder(checkpoint_of("llava_next"), spec_of("llava_next").decoder, tensor_parallel=2)
        assert world.llms[0].args["tensor_parallel_size"] == 2
        assert "TLLM_WORKER_USE_SINGLE_PROCESS" not in os.environ


def test_an_image_without_rows_is_refused_where_the_text_names_it() -> None:
    name = "llava_next"
    two = scene(name, [picture(150, 40), picture(60, 60, seed=2)])
    with trtllm_standin.llm_api("1.2"):
        decoder = TrtllmApiDecoder(checkpoint_of(name), spec_of(name).decoder)
        with pytest.raises(PromptError, match="no visual rows"):
            decoder.stream(two.stitched([(), (1,)]), EIGHT)


def test_a_prompt_that_the_other_tokenizer_reads_otherwise_is_refused() -> None:
    name = "llava_next"
    prompt = next_prompts(name)[1]
    with trtllm_standin.llm_api("1.2") as world:
        decoder = TrtllmApiDecoder(checkpoint_of(name), spec_of(name).decoder)
        stream = decoder.stream(replace(prompt, text="the " + prompt.text), EIGHT)
        with pytest.raises(PromptError, match="another prompt of the same text"):
            next(stream)
        assert world.aborted == [1]


def test_an_older_version_is_refused(
    llava_checkpoint: Path, spec: DecoderSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    with trtllm_standin.llm_api("1.2"):
        monkeypatch.delattr(sys.modules["tensorrt_llm.inputs"], "BaseMultimodalInputProcessor")
        with pytest.raises(EnvironmentFaultError, match="takes no visual rows"):
            TrtllmApiDecoder(llava_checkpoint, spec)


# ------------------------------------------------------------------------------------------------------ LLaVA-1.5


@every_version
def test_registering_twice_keeps_the_first(version: str) -> None:
    with trtllm_standin.llm_api(version) as world:
        register()
        model = world.models[trtllm_llava.ARCHITECTURE]
        register()
        assert world.models[trtllm_llava.ARCHITECTURE] is model
        assert world.processors[model].__mro__[1] is trtllm_llava.LlavaRows


def processor_of(checkpoint: Path) -> Any:
    from transformers import AutoConfig, AutoTokenizer

    config = AutoConfig.from_pretrained(checkpoint)
    return trtllm_llava.LlavaRows(str(checkpoint), config, AutoTokenizer.from_pretrained(checkpoint))


def test_the_processor_reads_text_where_no_ids_are_given(llava_checkpoint: Path, spec: DecoderSpec) -> None:
    processor = processor_of(llava_checkpoint)
    rows = [torch.zeros(2, spec.width), torch.ones(3, spec.width)]
    ids, extra = processor.attach_multimodal_embeddings({"prompt": "<image> and <image> what?"}, {"image": rows}, None)
    assert [token for token in ids if token >= spec.vocab_size] == [spec.vocab_size + index for index in range(5)]
    assert torch.equal(extra["multimodal_data"]["multimodal_embedding"], torch.cat(rows))
    plain, nothing = processor({"prompt": "what?"}, None)
    assert nothing is None and plain == processor.tokenizer("what?").input_ids


@pytest.mark.parametrize(
    ("rows", "ids", "said"),
    [
        ([(2, 1)], None, "the model takes"),
        ([(2,)], None, "has the shape|have the shape"),
        ([(2, 0), (2, 0)], None, "1 places for 2 images"),
        ([(2, 0)], [5, 5, 5], "0 places for 2 visual rows"),
    ],
)
def test_the_processor_refuses_what_does_not_fit(
    rows: list[tuple[int, ...]], ids: list[int] | None, said: str, llava_checkpoint: Path, spec: DecoderSpec
) -> None:
    processor = processor_of(llava_checkpoint)
    tensors = [torch.zeros(*shape[:1], *(spec.width + extra for extra in shape[1:])) for shape in rows]
    given: dict[str, Any] = {"image": tensors} | ({} if ids is None else {TOKEN_IDS: ids})
    with pytest.raises(ValueError, match=said):
        processor.attach_multimodal_embeddings({"prompt": "<image> what?"}, given, None)
    with pytest.raises(ValueError, match="not pictures"):
        processor({"prompt": "<image>", "multi_modal_data": {"image": [1]}}, None)


def test_both_layouts_of_a_checkpoint_have_the_language_models_weights() -> None:
    old = {"language_model.model.norm.weight": 1, "language_model.lm_head.weight": 2, "vision_tower.x": 3}
    new = {"model.language_model.norm.weight": 1, "lm_head.weight": 2, "model.multi_modal_projector.x": 3}
    assert language_weights(old) == language_weights(new) == {"model.norm.weight": 1, "lm_head.weight": 2}


# ------------------------------------------------------------------------------------------------------ the stand-in


@pytest.mark.parametrize(
    ("part", "change", "said"),
    [
        ("EMBEDDINGS", "multimodal_embeddings", "another prompt"),  # as the types spell it: the rows are not read
        ("TOKEN_IDS", "token_ids", "places for"),  # then the text counts, and it has no image
    ],
)
def test_a_wrong_key_fails(
    part: str,
    change: str,
    said: str,
    llava_checkpoint: Path,
    spec: DecoderSpec,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(decoder_trtllm_api, part, change)
    with trtllm_standin.llm_api("1.2"):
        stream = TrtllmApiDecoder(llava_checkpoint, spec).stream(prompt_of(spec, 3), EIGHT)
        with pytest.raises((PromptError, EnvironmentFaultError), match=said):
            next(stream)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda rows: rows[:-1], "places for"),
        (lambda rows: rows[:, :-1], "the model takes"),
        (lambda rows: rows[None], "the model takes"),
    ],
)
def test_wrong_rows_fail(
    change: Callable[[Any], Any], said: str, llava_checkpoint: Path, spec: DecoderSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = TrtllmApiDecoder._tensor
    monkeypatch.setattr(TrtllmApiDecoder, "_tensor", lambda self, rows: change(whole(self, rows)))
    with trtllm_standin.llm_api("1.2"):
        stream = TrtllmApiDecoder(llava_checkpoint, spec).stream(prompt_of(spec, 3), EIGHT)
        with pytest.raises(EnvironmentFaultError, match=said):
            next(stream)


def test_block_reuse_would_break_the_count_of_rows(
    llava_checkpoint: Path, spec: DecoderSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The trap itself: the stand-in acts it, so that the test of the same prompt twice can fail."""
    with trtllm_standin.llm_api("1.2") as world:
        decoder = TrtllmApiDecoder(llava_checkpoint, spec)
        world.llms[0].reuse = True
        assert list(islice(decoder.stream(prompt_of(spec, 5), EIGHT), 3))
        with pytest.raises(EnvironmentFaultError, match="Multimodal token count mismatch"):
            list(decoder.stream(prompt_of(spec, 5), EIGHT))


def test_a_worker_of_its_own_does_not_know_our_model(
    llava_checkpoint: Path, spec: DecoderSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TLLM_WORKER_USE_SINGLE_PROCESS", "0")
    with trtllm_standin.llm_api("1.2"), pytest.raises(EnvironmentFaultError, match="Unknown model architecture"):
        TrtllmApiDecoder(llava_checkpoint, spec)


def test_ids_alone_with_rows_lose_the_rows(llava_checkpoint: Path, spec: DecoderSpec) -> None:
    prompt = prompt_of(spec, 3)
    with trtllm_standin.llm_api("1.2") as world:
        decoder = TrtllmApiDecoder(llava_checkpoint, spec)
        inputs = decoder._inputs(prompt)
        without = {"prompt_token_ids": [int(token) for token in prompt.input_ids], EMBEDDINGS: inputs[EMBEDDINGS]}
        result = world.llms[0].generate_async(without, sampling_params=decoder._settings(EIGHT, frozenset({2})))
        assert result.extra is None and np.max(result.prompt_token_ids) < spec.vocab_size
