"""Several prompts at once through GenAI: streams in turn, batches of unequal prompts, and what GenAI does not offer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import TinyLlava, write_checkpoint

from holov_export.errors import EnvironmentFaultError, UsageError
from holov_export.export.checkpoint import spec_from_checkpoint
from holov_export.export.decoder_onnx import decoder_from_checkpoint
from holov_export.runtime.decoder_genai import GenaiDecoder
from holov_export.spec import DecoderPrecision, DecoderSpec, ModelSpec
from holov_export.tensors import SamplingSettings, StitchedPrompt

PLACEHOLDER, PAD_WORD = 3, 4
SETTINGS = SamplingSettings(max_new_tokens=24)
#: of unequal length, in no order; within a batch of eight they are padded by a fifth
COUNTS = (60, 64, 57, 64, 50, 41, 64, 62)


def prompt_of(count: int, *, width: int = 96, seed: int = 0, tail: Sequence[int] = (40, 50)) -> StitchedPrompt:
    rows = (np.random.default_rng(1000 * seed + count).standard_normal((count, width)) * 0.3).astype(np.float32)
    ids = [1, 20 + seed, 30, *[PLACEHOLDER] * count, *tail]
    return StitchedPrompt(np.array(ids, np.int64), rows, (count,) if count else (), PLACEHOLDER, "")


class Watched(GenaiDecoder):
    """Notes how many prompts each generator was made for."""

    def __init__(self, *words: Any, **settings: Any) -> None:
        super().__init__(*words, **settings)
        self.sizes: list[int] = []

    def _generator(self, streams: Sequence[Any]) -> Any:
        made = super()._generator(streams)
        self.sizes.append(len(streams))
        return made


@pytest.fixture(scope="module")
def alone(genai_folder: Path, llava_spec: ModelSpec) -> Iterator[Watched]:
    made = Watched(genai_folder, llava_spec.decoder, provider="cpu", threads=1)
    yield made
    made.close()


@pytest.fixture(scope="module")
def batching_model(genai_folder: Path, llava_spec: ModelSpec) -> Iterator[Watched]:
    made = Watched(genai_folder, llava_spec.decoder, provider="cpu", threads=1, batch=8)
    yield made
    made.close()


@pytest.fixture
def batching(batching_model: Watched) -> Watched:
    batching_model.sizes.clear()
    return batching_model


def in_turn(streams: Sequence[Iterator[int]]) -> list[list[int]]:
    """The tokens of streams that are all open, one of each at a time."""
    found: list[list[int]] = [[] for _ in streams]
    going = set(range(len(streams)))
    while going:
        for index in sorted(going):
            token = next(streams[index], None)
            if token is None:
                going.discard(index)
            else:
                found[index].append(token)
    return found


def test_streams_pulled_in_turn_give_what_they_give_alone(alone: Watched) -> None:
    prompts = [prompt_of(count, seed=index) for index, count in enumerate((0, 64, 1, 16, 0))]
    wanted = [list(alone.stream(prompt, SETTINGS)) for prompt in prompts]
    assert len({tuple(tokens) for tokens in wanted}) == len(prompts)
    assert alone.lanes >= len(prompts)
    assert in_turn([alone.stream(prompt, SETTINGS) for prompt in prompts]) == wanted


def test_a_batch_of_unequal_prompts_gives_what_they_give_alone(alone: Watched, batching: Watched) -> None:
    prompts = [prompt_of(count, seed=index) for index, count in enumerate(COUNTS)]
    wanted = [list(alone.stream(prompt, SETTINGS)) for prompt in prompts]
    assert len({tuple(tokens) for tokens in wanted}) == len(prompts)
    assert in_turn([batching.stream(prompt, SETTINGS) for prompt in prompts]) == wanted
    assert batching.sizes == [len(COUNTS)]


def test_prompts_without_rows_and_with_one_share_a_batch(alone: Watched, batching: Watched) -> None:
    prompts = [prompt_of(count, seed=index) for index, count in enumerate((0, 1, 0, 2))]
    wanted = [list(alone.stream(prompt, SETTINGS)) for prompt in prompts]
    assert in_turn([batching.stream(prompt, SETTINGS) for prompt in prompts]) == wanted
    assert batching.sizes == [4]


def test_one_may_be_read_to_its_end_before_the_others_begin(alone: Watched, batching: Watched) -> None:
    prompts = [prompt_of(60, seed=seed) for seed in range(3)]
    streams = [batching.stream(prompt, SETTINGS) for prompt in prompts]
    assert [list(stream) for stream in reversed(streams)] == [
        list(alone.stream(prompt, SETTINGS)) for prompt in reversed(prompts)
    ]
    assert batching.sizes == [3]


def test_a_batch_ends_each_answer_at_its_own_length_and_stop(alone: Watched, batching: Watched) -> None:
    prompts = [prompt_of(60, seed=seed) for seed in range(4)]
    wanted = [list(alone.stream(prompt, SETTINGS)) for prompt in prompts]
    stop = wanted[2][7]
    settings = [
        SETTINGS,
        replace(SETTINGS, max_new_tokens=1),
        replace(SETTINGS, stop_token_ids=(stop,)),
        replace(SETTINGS, max_new_tokens=9),
    ]
    streams = [batching.stream(*pair) for pair in zip(prompts, settings, strict=True)]
    found = in_turn(streams)
    assert found == [wanted[0], wanted[1][:1], wanted[2][: wanted[2].index(stop)], wanted[3][:9]]
    assert batching.sizes == [4]


def test_streams_that_close_early_do_not_disturb_the_others(alone: Watched, batching: Watched) -> None:
    prompts = [prompt_of(60, seed=seed) for seed in range(4)]
    unread, left, dropped, stays = (batching.stream(prompt, SETTINGS) for prompt in prompts)
    unread.close()  # type: ignore[attr-defined]
    assert next(left) == next(alone.stream(prompts[1], SETTINGS))
    left.close()  # type: ignore[attr-defined]
    assert list(left) == []
    del dropped
    assert list(stays) == list(alone.stream(prompts[3], SETTINGS))
    assert batching.sizes == [3], "one was closed before the batch began"


def test_the_generator_goes_with_its_last_listener(batching: Watched) -> None:
    streams = [batching.stream(prompt_of(60, seed=seed), SETTINGS) for seed in range(2)]
    next(streams[0])
    batch, _ = streams[0]._place  # type: ignore[attr-defined]
    assert batch._generator is not None
    streams[0].close()  # type: ignore[attr-defined]
    assert batch._generator is not None
    assert len(list(streams[1])) > 0
    assert batch._generator is None and not batch._tokens


@pytest.mark.parametrize(
    ("why", "counts", "settings"),
    [
        ("too much padding", (64, 1), (SETTINGS, SETTINGS)),
        ("another temperature", (60, 60), (SETTINGS, replace(SETTINGS, temperature=0.5))),
        ("a seed repeats", (60, 60), (replace(SETTINGS, temperature=1.0, seed=1),) * 2),
        ("longest prompt and longest answer", (90, 70), (SETTINGS, replace(SETTINGS, max_new_tokens=430))),
    ],
)
def test_what_does_not_share_a_batch(
    batching: Watched, why: str, counts: tuple[int, int], settings: tuple[SamplingSettings, SamplingSettings]
) -> None:
    pairs = zip(counts, settings, strict=True)
    streams = [batching.stream(prompt_of(count), setting) for count, setting in pairs]
    for stream in streams:
        next(stream)
        stream.close()  # type: ignore[attr-defined]
    assert batching.sizes == [1, 1], why


def test_a_seed_repeats_beside_others(alone: Watched, batching: Watched) -> None:
    warm = replace(SETTINGS, temperature=1.5, seed=5)
    wanted = list(alone.stream(prompt_of(60), warm))
    streams = [batching.stream(prompt_of(60, seed=seed), warm) for seed in range(3)]
    assert in_turn(streams)[0] == wanted


def first_draws(decoder: Watched, sampling: SamplingSettings) -> np.ndarray:
    """int [25, 8]: the first tokens of eight equal prompts in a batch; 2 where that was the end token."""
    rounds = [in_turn([decoder.stream(prompt_of(2), sampling) for _ in range(8)]) for _ in range(25)]
    assert decoder.sizes == [8] * 25
    return np.array([[tokens[0] if tokens else 2 for tokens in row] for row in rounds])


def test_rows_of_a_batch_draw_for_themselves(batching: Watched) -> None:
    """At this temperature 416 words are about equally likely: rows that copied each other would agree every time."""
    draws = first_draws(batching, SamplingSettings(max_new_tokens=1, temperature=30.0))
    assert len(np.unique(draws)) > 60
    assert max(np.mean(draws[:, 0] == draws[:, row]) for row in range(1, 8)) < 0.3


def test_every_row_of_a_batch_draws_among_the_most_likely_only(batching: Watched) -> None:
    draws = first_draws(batching, SamplingSettings(max_new_tokens=1, temperature=30.0, top_k=3))
    assert len(np.unique(draws)) == 3
    assert all(len(np.unique(draws[:, row])) > 1 for row in range(8))


def test_a_prompt_may_end_with_the_models_pad(alone: Watched, batching: Watched) -> None:
    """GenAI takes pad ids at the end for padding; ours is no word."""
    ends, cut = prompt_of(60, tail=(40, PAD_WORD, PAD_WORD)), prompt_of(60, tail=(40,))
    wanted = list(alone.stream(ends, SETTINGS))
    assert wanted != list(alone.stream(cut, SETTINGS))
    assert in_turn([batching.stream(item, SETTINGS) for item in (ends, prompt_of(64))])[0] == wanted


def test_a_failure_reaches_every_stream_of_the_batch(batching: Watched) -> None:
    streams = [batching.stream(prompt_of(60, seed=seed), SETTINGS) for seed in range(2)]
    next(streams[0])
    batch, _ = streams[0]._place  # type: ignore[attr-defined]

    class Broken:
        def is_done(self) -> bool:
            raise RuntimeError("out of memory")

    batch._generator = Broken()
    next(streams[1])  # it was made before
    for stream in streams:
        with pytest.raises(EnvironmentFaultError, match="out of memory"):
            next(stream)
        assert list(stream) == []


def test_streams_of_a_closed_decoder(genai_folder: Path, llava_spec: ModelSpec) -> None:
    decoder = GenaiDecoder(genai_folder, llava_spec.decoder, provider="cpu", threads=1, batch=2)
    begun, waiting = decoder.stream(prompt_of(4), SETTINGS), decoder.stream(prompt_of(60), SETTINGS)
    next(begun)
    decoder.close()
    assert len(list(begun)) > 3
    with pytest.raises(EnvironmentFaultError, match="closed"):
        next(waiting)


@pytest.mark.parametrize("batch", [0, 33])
def test_batches_that_genai_does_not_take(genai_folder: Path, llava_spec: ModelSpec, batch: int) -> None:
    with pytest.raises(UsageError, match=r"in 1\.\.32"):
        GenaiDecoder(genai_folder, llava_spec.decoder, batch=batch)


def test_genai_still_offers_no_engine_and_no_rewinding(alone: Watched) -> None:
    """When this fails, GenAI has learnt something: see ADR 0013."""
    import onnxruntime_genai as genai

    with pytest.raises(RuntimeError, match="Expected a decoder-only model"):
        genai.Engine(alone._model)
    stream = alone.stream(prompt_of(4), SETTINGS)
    next(stream)
    batch, _ = stream._place  # type: ignore[attr-defined]
    with pytest.raises(RuntimeError, match="RewindTo is currently not supported for phi3v"):
        batch._generator.rewind_to(2)


# ---------------------------------------------------------------------------------------- a longer context, four bits


@pytest.fixture(scope="module")
def long_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A decoder of 128 numbers a token, which four-bit weights need, and room for 576 visual tokens."""
    sizes = TinyLlava(context=2048, width=128, heads=4)
    return write_checkpoint(tmp_path_factory.mktemp("checkpoints") / "long", sizes)


def opened(checkpoint: Path, precision: DecoderPrecision, folder: Path, batch: int) -> GenaiDecoder:
    spec: DecoderSpec = spec_from_checkpoint(checkpoint, "long").decoder
    if not folder.exists():
        decoder_from_checkpoint(checkpoint, folder, spec, precision)
    return GenaiDecoder(folder, spec, provider="cpu", threads=1, batch=batch)


@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 5])
def test_tokens_are_those_of_transformers_at_many_counts(long_checkpoint: Path, tmp_path: Path, batch: int) -> None:
    from runtime.test_decoders import generated
    from transformers import LlavaForConditionalGeneration

    reference = LlavaForConditionalGeneration.from_pretrained(long_checkpoint).eval()
    decoder = opened(long_checkpoint, DecoderPrecision.FP32, tmp_path / "fp32", batch)
    decoder._fits = lambda streams: True  # type: ignore[method-assign]  # the longest padding that there is
    prompts = [prompt_of(count, width=128, seed=index) for index, count in enumerate((0, 1, 64, 192, 576))]
    settings = SamplingSettings(max_new_tokens=64)
    wanted = [generated(reference, prompt, 64) for prompt in prompts]
    assert all(len(set(tokens)) > 5 for tokens in wanted)
    assert in_turn([decoder.stream(prompt, settings) for prompt in prompts]) == wanted


@pytest.mark.slow
def test_four_bits_give_the_same_alone_in_turn_and_together(long_checkpoint: Path, tmp_path: Path) -> None:
    alone = opened(long_checkpoint, DecoderPrecision.INT4, tmp_path / "int4", 1)
    together = opened(long_checkpoint, DecoderPrecision.INT4, tmp_path / "int4", 5)
    together._fits = lambda streams: True  # type: ignore[method-assign]
    prompts = [prompt_of(count, width=128, seed=index) for index, count in enumerate((0, 1, 64, 192, 576))]
    settings = SamplingSettings(max_new_tokens=64)
    wanted = [list(alone.stream(prompt, settings)) for prompt in prompts]
    assert len({tuple(tokens) for tokens in wanted}) == len(prompts)
    for decoder in (alone, together):
        assert in_turn([decoder.stream(prompt, settings) for prompt in prompts]) == wanted
