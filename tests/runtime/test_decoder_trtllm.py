"""TensorRT-LLM engines: every call against a stand-in of three versions, tokens equal to transformers'."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import count, islice, zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import trtllm_standin
from trtllm_standin import ENGINE_VERSIONS, EngineWorld
from trtllm_standin.names import bound, rows
from trtllm_standin.trial import EngineTrial, HfLanguage, counting, prompt_of, rows_of, write_engine

from holov_export.errors import (
    BundleError,
    EnvironmentFaultError,
    MissingExtraError,
    PromptError,
    UsageError,
)
from holov_export.runtime import decoder_trtllm, trtllm_executor
from holov_export.runtime.decoder import Decoder
from holov_export.runtime.decoder_hf import HfDecoder
from holov_export.runtime.decoder_trtllm import TrtllmDecoder
from holov_export.runtime.trtllm_prompts import engine_ids, extra_ids
from holov_export.spec import DecoderSpec, ModelSpec
from holov_export.tensors import SamplingSettings

every_version = pytest.mark.parametrize("version", ENGINE_VERSIONS)
TWELVE = SamplingSettings(max_new_tokens=12)
_numbers = count()


@pytest.fixture
def spec(llava_spec: ModelSpec) -> DecoderSpec:
    return llava_spec.decoder


@pytest.fixture(scope="module")
def language(llava_checkpoint: Path, llava_spec: ModelSpec) -> HfLanguage:
    torch.set_num_threads(1)
    return HfLanguage(llava_checkpoint, llava_spec.decoder.vocab_size)


@contextmanager
def opened(
    version: str, language: Any, spec: DecoderSpec, tmp_path: Path, trial: EngineTrial | None = None
) -> Iterator[tuple[TrtllmDecoder, EngineWorld]]:
    folder = write_engine(tmp_path / f"engine-{next(_numbers)}", spec, trial or EngineTrial())
    with trtllm_standin.engines(version, language) as world:
        decoder = TrtllmDecoder(folder, spec)
        yield decoder, world
        decoder.close()


def turns(streams: list[Iterator[int]]) -> list[list[int]]:
    """All tokens of each, pulled in turn from one thread."""
    return [[token for token in line if token is not None] for line in zip(*zip_longest(*streams), strict=True)]


# ------------------------------------------------------------------------------------------------------ tokens


@every_version
def test_tokens_are_those_of_transformers_whatever_k(
    version: str, language: HfLanguage, llava_checkpoint: Path, spec: DecoderSpec, tmp_path: Path
) -> None:
    reference = HfDecoder(llava_checkpoint, spec, provider="cpu", threads=1)
    prompts = [
        prompt_of(spec, *counts, seed=seed) for seed, counts in enumerate([(), (1,), (7,), (64,), (3, 80), (64,)])
    ]
    expected = [list(reference.stream(prompt, TWELVE)) for prompt in prompts]
    assert len({tuple(tokens) for tokens in expected}) == len(prompts)
    with opened(version, language, spec, tmp_path) as (decoder, world):
        one_by_one = [list(decoder.stream(prompt, TWELVE)) for prompt in prompts]
        together = turns([decoder.stream(prompt, TWELVE) for prompt in prompts])
    assert one_by_one == together == expected
    assert len(world.executors) == 1 and decoder.lanes == 4


@every_version
def test_a_decoder_is_one_of_the_protocol(version: str, spec: DecoderSpec, tmp_path: Path) -> None:
    with opened(version, counting(20), spec, tmp_path) as (decoder, _):
        as_protocol: Decoder = decoder
        assert (
            as_protocol.name
            == {
                "0.12": "tensorrt-llm 0.12.0 (engine, float32)",
                "0.16": "tensorrt-llm 0.16.0 (engine, float32)",
                "1.2": "tensorrt-llm 1.2.1 (engine, float32)",
            }[version]
        )


@every_version
def test_two_images_of_equal_k_do_not_share_keys_and_values(
    version: str, language: HfLanguage, spec: DecoderSpec, tmp_path: Path
) -> None:
    first = prompt_of(spec, 9, seed=1)
    second = replace(first, rows=prompt_of(spec, 9, seed=2).rows)
    with opened(version, language, spec, tmp_path, EngineTrial(reuse=True)) as (decoder, world):
        answers = [list(decoder.stream(prompt, TWELVE)) for prompt in (first, second, first)]
    assert answers[0] == answers[2] != answers[1]
    # 0.12 cannot tell images apart, so nothing is used again there
    assert world.executors[0].reuse is (version != "0.12")
    if version != "0.12":
        assert len(world.executors[0].kept) == 2


@every_version
def test_an_engine_of_half_precision_gets_rows_of_its_own_type(version: str, spec: DecoderSpec, tmp_path: Path) -> None:
    prompt = prompt_of(spec, 4)
    half = replace(prompt, rows=prompt.rows.astype(np.float16))
    for dtype in ("float16", "bfloat16"):
        with opened(version, counting(20), spec, tmp_path, EngineTrial(dtype=dtype)) as (decoder, world):
            for item in (prompt, half):
                assert len(list(decoder.stream(item, TWELVE))) == 12
        assert [str(rows_of(request).dtype) for request in world.requests] == [f"torch.{dtype}"] * 2
        assert torch.equal(
            rows_of(world.requests[1]).float(), torch.tensor(half.rows).to(getattr(torch, dtype)).float()
        )


# ------------------------------------------------------------------------------------------------------ streams


@every_version
def test_requests_run_together_and_keep_their_tokens_for_their_own_next(
    version: str, spec: DecoderSpec, tmp_path: Path
) -> None:
    def by_length(asked: Any) -> list[int]:
        return [20 + len(asked.ids) + index for index in range(asked.length)]

    with opened(version, by_length, spec, tmp_path) as (decoder, world):
        first, second = (decoder.stream(prompt_of(spec, k), TWELVE) for k in (3, 5))
        next(first), next(second)
        assert list(islice(first, 9)) == [20 + 11 + index for index in range(1, 10)]
        steps = len(world.executors[0].running)
        assert list(second) == [20 + 13 + index for index in range(1, 12)] and steps == 2
        assert list(first) == [41, 42]


@every_version
def test_closing_a_stream_cancels_its_request_and_no_other(version: str, spec: DecoderSpec, tmp_path: Path) -> None:
    with opened(version, counting(20), spec, tmp_path) as (decoder, world):
        first, second = decoder.stream(prompt_of(spec, 3), TWELVE), decoder.stream(prompt_of(spec, 5), TWELVE)
        next(first), next(second)
        first.close()  # type: ignore[attr-defined]
        assert world.cancelled == [1]
        assert len(list(second)) == 11
        assert world.cancelled == [1]
        assert list(decoder.stream(prompt_of(spec, 5), TWELVE)) == list(range(20, 32))
        assert not decoder._answers


@every_version
def test_nothing_is_sent_before_the_first_next(version: str, spec: DecoderSpec, tmp_path: Path) -> None:
    with opened(version, counting(20), spec, tmp_path) as (decoder, world):
        stream = decoder.stream(prompt_of(spec, 3), TWELVE)
        assert world.requests == []
        next(stream)
        assert len(world.requests) == 1


@every_version
def test_end_tokens_end_an_answer_and_are_not_part_of_it(version: str, spec: DecoderSpec, tmp_path: Path) -> None:
    several = spec.model_copy(update={"eos_token_ids": (spec.eos_token_ids[0], 27)})
    with opened(version, counting(20), several, tmp_path) as (decoder, world):
        assert list(decoder.stream(prompt_of(several, 3), TWELVE)) == list(range(20, 27))
        stopped = replace(TWELVE, stop_token_ids=[23])
        assert list(decoder.stream(prompt_of(several, 3), stopped)) == [20, 21, 22]
        request = world.requests[-1]
        assert request.end_id == spec.eos_token_ids[0] and sorted(request.stop_words) == [[23], [27]]


@every_version
def test_an_error_of_the_executor_is_that_streams_alone(version: str, spec: DecoderSpec, tmp_path: Path) -> None:
    with opened(version, counting(20), spec, tmp_path) as (decoder, world):
        world.executors[0].build["max_input_len"] = 12  # less than config.json says: only the executor knows
        good, bad = decoder.stream(prompt_of(spec, 3), TWELVE), decoder.stream(prompt_of(spec, 30), TWELVE)
        next(good)
        with pytest.raises(EnvironmentFaultError, match=r"Prompt length \(38\) exceeds"):
            next(bad)
        assert len(list(good)) == 11 and not decoder._answers


@every_version
def test_a_closed_decoder_answers_no_more(version: str, spec: DecoderSpec, tmp_path: Path) -> None:
    with opened(version, counting(20), spec, tmp_path) as (decoder, world):
        stream, unborn = (decoder.stream(prompt_of(spec, 3), TWELVE) for _ in range(2))
        next(stream)
        decoder.close()
        decoder.close()
        assert world.executors[0].closed
        with pytest.raises(EnvironmentFaultError, match="closed"):
            decoder.stream(prompt_of(spec, 3), TWELVE)
        with pytest.raises(EnvironmentFaultError, match="closed"):
            next(unborn)
        with pytest.raises(EnvironmentFaultError, match="closed"):
            list(stream)


# ------------------------------------------------------------------------------------------------------ sampling


@every_version
def test_sampling_settings_have_the_names_of_the_version(version: str, spec: DecoderSpec, tmp_path: Path) -> None:
    drawn = SamplingSettings(max_new_tokens=5, temperature=0.7, top_p=0.9, seed=11)
    with opened(version, counting(20), spec, tmp_path) as (decoder, world):
        for settings in (TWELVE, drawn, replace(drawn, seed=None), replace(drawn, seed=None)):
            assert list(decoder.stream(prompt_of(spec, 2), settings))
        greedy, seeded, *free = (request.sampling_config for request in world.requests)
    name = "random_seed" if version == "0.12" else "seed"
    assert (greedy.beam_width, greedy.top_k, greedy.temperature) == (1, 1, None)
    assert (seeded.top_k, seeded.top_p, seeded.temperature, getattr(seeded, name)) == (0, 0.9, 0.7, 11)
    # left out, it would be 0 each time, and every answer the same
    seeds = [getattr(item, name) for item in free]
    assert None not in seeds and seeds[0] != seeds[1]
    length = [getattr(request, "max_tokens", None) or request.max_new_tokens for request in world.requests]
    assert length == [12, 5, 5, 5]


def test_a_top_k_that_would_be_cut_is_refused(spec: DecoderSpec, tmp_path: Path) -> None:
    with opened("1.2", counting(20), spec, tmp_path) as (decoder, _):
        with pytest.raises(UsageError, match="1025; TensorRT-LLM takes at most 1024"):
            decoder.stream(prompt_of(spec, 2), SamplingSettings(temperature=1, top_k=1025))
        assert len(list(decoder.stream(prompt_of(spec, 2), replace(TWELVE, temperature=1, top_k=1024)))) == 12


# ------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("counts", "new", "error", "said"),
    [
        ((161,), 4, PromptError, "161 visual rows; this engine was built for 160 a request"),
        ((100, 61), 4, PromptError, "161 visual rows"),
        ((160,), 200, UsageError, "answer may have 200; this engine was built for 300"),
    ],
)
def test_what_the_engine_has_no_room_for_is_refused_before_it_is_sent(
    counts: tuple[int, ...], new: int, error: type[Exception], said: str, spec: DecoderSpec, tmp_path: Path
) -> None:
    with opened("0.16", counting(20), spec, tmp_path) as (decoder, world):
        with pytest.raises(error, match=said):
            decoder.stream(prompt_of(spec, *counts), SamplingSettings(max_new_tokens=new))
        assert world.requests == []


def test_a_prompt_that_is_too_long_is_refused(spec: DecoderSpec, tmp_path: Path) -> None:
    with opened("0.16", counting(20), spec, tmp_path) as (decoder, _):
        with pytest.raises(PromptError, match=r"241 tokens; this engine was built for 240 \(max_input_len\)"):
            decoder.stream(prompt_of(spec, words=241), SamplingSettings(max_new_tokens=1))
        assert len(list(decoder.stream(prompt_of(spec, words=240), SamplingSettings(max_new_tokens=60)))) == 60


def test_rows_and_places_that_differ_are_refused(spec: DecoderSpec, tmp_path: Path) -> None:
    prompt = prompt_of(spec, 4)
    with (
        opened("0.16", counting(20), spec, tmp_path) as (decoder, _),
        pytest.raises(PromptError, match="4 image places, 3 visual rows"),
    ):
        decoder.stream(replace(prompt, rows=prompt.rows[:3]), TWELVE)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda config: config["pretrained_config"].update(vocab_size=400), "of another model"),
        (
            lambda config: config["build_config"].update(max_prompt_embedding_table_size=0),
            "without --max_multimodal_len",
        ),
        (lambda config: config["build_config"].update(max_batch_size=2), "disagree"),
        (lambda config: config.pop("build_config"), "does not describe a TensorRT-LLM engine: KeyError"),
        (lambda config: config["pretrained_config"].update(dtype="int8"), "its dtype is 'int8'"),
    ],
)
def test_an_engine_that_is_another_is_refused(
    change: Callable[[dict[str, Any]], object], said: str, spec: DecoderSpec, tmp_path: Path
) -> None:
    folder = write_engine(tmp_path / "other", spec, EngineTrial())
    path = folder / "engine" / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))
    with trtllm_standin.engines("0.16", counting(20)), pytest.raises(BundleError, match=said):
        TrtllmDecoder(folder, spec)


def test_without_tensorrt_llm_the_error_names_it(spec: DecoderSpec, tmp_path: Path) -> None:
    with pytest.raises(MissingExtraError, match="'tensorrt_llm' is not installed"):
        TrtllmDecoder(write_engine(tmp_path / "e", spec, EngineTrial()), spec)


def test_a_library_that_is_missing_is_named(spec: DecoderSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tensorrt_llm").mkdir()
    (tmp_path / "tensorrt_llm" / "__init__.py").write_text("raise ImportError('libnvinfer.so.10: cannot open')")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(EnvironmentFaultError, match=r"does not load here: libnvinfer\.so\.10"):
        TrtllmDecoder(write_engine(tmp_path / "e", spec, EngineTrial()), spec)


def test_a_version_that_runs_no_engines_is_refused(
    spec: DecoderSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_engine(tmp_path / "e", spec, EngineTrial())
    with trtllm_standin.engines("1.2", counting(20)):
        monkeypatch.delattr(sys.modules["tensorrt_llm.bindings.executor"], "Executor")
        with pytest.raises(EnvironmentFaultError, match="does not run engines: its bindings have no Executor"):
            TrtllmDecoder(folder, spec)


def test_a_load_that_fails_says_who_built_the_engine(
    spec: DecoderSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_engine(tmp_path / "e", spec, EngineTrial(version="0.12.0"))

    def fails(*_: object) -> None:
        raise RuntimeError("deserializeCudaEngine failed")

    monkeypatch.setattr(decoder_trtllm, "make_executor", fails)
    with (
        trtllm_standin.engines("1.2", counting(20)),
        pytest.raises(EnvironmentFaultError, match=r"which 0\.12\.0 built"),
    ):
        TrtllmDecoder(folder, spec)


@every_version
def test_an_engine_over_several_gpus_gets_workers(version: str, spec: DecoderSpec, tmp_path: Path) -> None:
    with opened(version, counting(20), spec, tmp_path, EngineTrial(world=2)) as (decoder, world):
        parallel = world.executors[0].config.parallel_config
        assert parallel.communication_mode.name == "ORCHESTRATOR" and parallel.communication_type.name == "MPI"
        assert parallel.orchestrator_config.is_orchestrator is True
        assert parallel.orchestrator_config.worker_executable_path.endswith("bin/executorWorker")
        assert len(list(decoder.stream(prompt_of(spec, 2), TWELVE))) == 12


# ------------------------------------------------------------------------------------------------------ numbers


def test_the_ith_placeholder_is_the_ith_id_behind_the_vocabulary(spec: DecoderSpec) -> None:
    prompt = prompt_of(spec, 3, 2)
    ids = np.array(engine_ids(prompt, spec.vocab_size))
    places = prompt.input_ids == spec.image_token_id
    assert ids[places].tolist() == [spec.vocab_size + index for index in range(5)]
    assert np.array_equal(ids[~places], prompt.input_ids[~places])


def test_an_extra_id_is_of_the_content_of_its_image(spec: DecoderSpec) -> None:
    prompt = prompt_of(spec, 3, 2)
    swapped = replace(prompt, rows=np.concatenate([prompt.rows[1:2], prompt.rows[:1], prompt.rows[2:]]))
    places = prompt.input_ids == spec.image_token_id
    numbers, others = np.array(extra_ids(prompt)), np.array(extra_ids(swapped))
    assert not numbers[~places].any() and all(0 < number < 2**63 for number in numbers[places])
    first, second = numbers[places][:3], numbers[places][3:]
    assert len(set(first)) == len(set(second)) == 1 and first[0] != second[0]
    assert others[places][0] != first[0] and others[places][3] == second[0]
    assert extra_ids(prompt) == extra_ids(replace(prompt, rows=prompt.rows.copy()))


# ------------------------------------------------------------------------------------------------------ the stand-in


def test_every_name_of_the_table_is_in_a_version_and_written_once() -> None:
    keys = [(row["owner"], row["name"]) for row in rows()]
    assert len(keys) == len(set(keys))
    kinds = {"arg", "opt", "kw", "method", "member", "field", "-"}
    for row in rows():
        cells = {row[version] for version in trtllm_standin.VERSIONS}
        assert cells <= kinds and cells != {"-"}, row


@every_version
@pytest.mark.parametrize("wrong", ["max_new_token", "tokens"])
def test_a_wrong_keyword_fails(
    version: str, wrong: str, spec: DecoderSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = trtllm_executor.executor_api
    monkeypatch.setattr(decoder_trtllm, "executor_api", lambda: replace(whole(), length=wrong))
    with (
        opened(version, counting(20), spec, tmp_path) as (decoder, _),
        pytest.raises(TypeError, match=f"has no '{wrong}'"),
    ):
        decoder.stream(prompt_of(spec, 2), TWELVE)


@pytest.mark.parametrize("version", ["0.12", "1.2"])
def test_the_length_keyword_of_another_version_fails(
    version: str, spec: DecoderSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = {"0.12": "max_tokens", "1.2": "max_new_tokens"}[version]
    whole = trtllm_executor.executor_api
    monkeypatch.setattr(decoder_trtllm, "executor_api", lambda: replace(whole(), length=other))
    with (
        opened(version, counting(20), spec, tmp_path) as (decoder, _),
        pytest.raises(TypeError, match=f"has no '{other}'"),
    ):
        decoder.stream(prompt_of(spec, 2), TWELVE)


def test_extra_ids_for_a_version_without_them_fail(
    spec: DecoderSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = trtllm_executor.executor_api
    monkeypatch.setattr(decoder_trtllm, "executor_api", lambda: replace(whole(), extra_ids=True))
    with (
        opened("0.12", counting(20), spec, tmp_path) as (decoder, _),
        pytest.raises(TypeError, match="has no 'input_token_extra_ids'"),
    ):
        decoder.stream(prompt_of(spec, 2), TWELVE)


@pytest.mark.parametrize(
    ("part", "value", "said"),
    [
        ("extra_ids", lambda prompt: [0], r"inputTokenExtraIds vector size \(1\)"),
        ("extra_ids", lambda prompt: [0.5] * len(prompt), "input_token_extra_ids"),
        ("engine_ids", lambda prompt, size: [size + 400] * len(prompt), "past the 4 rows"),
        ("engine_ids", lambda prompt, size: [np.int64(5)] * len(prompt), "non-negative integers"),
    ],
)
def test_a_wrong_number_fails(
    part: str,
    value: Callable[..., list[Any]],
    said: str,
    spec: DecoderSpec,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(decoder_trtllm, part, value)
    with opened("1.2", counting(20), spec, tmp_path) as (decoder, _):
        stream = decoder.stream(prompt_of(spec, 4), TWELVE)
        with pytest.raises((EnvironmentFaultError, AssertionError, TypeError), match=said):
            next(stream)


@pytest.mark.parametrize(
    ("shape", "said"),
    [
        (lambda rows: rows[None], "nbDims == 2"),
        (lambda rows: rows[:3], "past the 3 rows"),
        (lambda rows: rows.half(), "data type doesn't match"),
        (lambda rows: rows[:, :-1].contiguous(), "another width"),
        (lambda rows: rows.T.contiguous().T, "as it lies in memory"),
        (lambda rows: rows.repeat(50, 1), "larger than max prompt vocab size"),
    ],
)
def test_a_wrong_table_fails(
    shape: Callable[[torch.Tensor], torch.Tensor],
    said: str,
    spec: DecoderSpec,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = trtllm_executor.request_from_parts

    def mutated(api: Any, parts: Any, sampling: SamplingSettings) -> Any:
        return whole(api, replace(parts, rows=shape(parts.rows)), sampling)

    monkeypatch.setattr(decoder_trtllm, "request_from_parts", mutated)
    with opened("1.2", counting(20), spec, tmp_path) as (decoder, _):
        stream = decoder.stream(prompt_of(spec, 4), TWELVE)
        with pytest.raises((EnvironmentFaultError, AssertionError), match=said):
            next(stream)


def test_without_extra_ids_two_images_would_share_an_answer(
    language: HfLanguage, spec: DecoderSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The trap itself: the stand-in acts it, so that the test above can fail."""
    monkeypatch.setattr(decoder_trtllm, "extra_ids", lambda prompt: [0] * len(prompt))
    first = prompt_of(spec, 9, seed=1)
    second = replace(first, rows=prompt_of(spec, 9, seed=2).rows)
    with opened("1.2", language, spec, tmp_path, EngineTrial(reuse=True)) as (decoder, _):
        answers = [list(decoder.stream(prompt, TWELVE)) for prompt in (first, second)]
    assert answers[0] == answers[1]


def test_calls_by_place_follow_the_table() -> None:
    assert bound("Request", "0.12", ([1], 5), {}) == {"input_token_ids": [1], "max_new_tokens": 5}
    with pytest.raises(TypeError, match="by place"):
        bound("Request", "0.16", ([1], 5), {})
    with pytest.raises(TypeError, match="missing"):
        bound("Request", "1.2", ([1],), {})
    with pytest.raises(TypeError, match="given twice"):
        bound("Request", "1.2", ([1], 5), {"max_tokens": 6})
