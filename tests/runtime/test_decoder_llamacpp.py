"""llama.cpp as a decoder: how prompts are cut up, how answers share steps and room, and, with llama.cpp, its tokens."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from checkpoints import TinyLlava, write_checkpoint

from holov_export.errors import (
    BundleError,
    EnvironmentFaultError,
    MissingExtraError,
    PromptError,
    UnknownNameError,
    UsageError,
)
from holov_export.export.checkpoint import spec_from_checkpoint
from holov_export.export.decoder_gguf import gguf_from_checkpoint
from holov_export.runtime import decoder_llamacpp, llamacpp_engine
from holov_export.runtime.decoder_hf import HfDecoder
from holov_export.runtime.decoder_llamacpp import LlamaCppDecoder, check_order, pieces_of
from holov_export.runtime.llamacpp_engine import EngineOptions
from holov_export.spec import DecoderSpec, ModelSpec
from holov_export.tensors import FloatArray, SamplingSettings, StitchedPrompt

IMAGE = 3
WIDTH, WORDS = 96, 416
TWELVE = SamplingSettings(max_new_tokens=12)


def prompt_of(*parts: int, seed: int = 0, width: int = WIDTH) -> StitchedPrompt:
    """A prompt of so many words, rows, words, rows, ..."""
    ids = [token for index, part in enumerate(parts) for token in ([IMAGE] if index % 2 else [20 + index]) * part]
    count = sum(parts[1::2])
    rows = (np.random.default_rng(seed).standard_normal((count, width)) * 0.3).astype(np.float32)
    return StitchedPrompt(np.array(ids, np.int64), rows, tuple(parts[1::2]), IMAGE, "")


# ------------------------------------------------------------------------------------------------- pieces and order


@pytest.mark.parametrize(
    ("parts", "pieces"),
    [
        ((4, 0), [(False, 0, 4)]),
        ((2, 3, 1), [(False, 0, 2), (True, 2, 5), (False, 5, 6)]),
        ((0, 3, 1), [(True, 0, 3), (False, 3, 4)]),
        ((1, 576, 2), [(False, 0, 1), (True, 1, 513), (True, 513, 577), (False, 577, 579)]),
        ((1, 2, 0, 3), [(False, 0, 1), (True, 1, 6)]),
    ],
)
def test_pieces_are_of_one_kind_and_short(parts: tuple[int, ...], pieces: list[tuple[bool, int, int]]) -> None:
    assert list(pieces_of(prompt_of(*parts))) == pieces


def test_positions_must_be_in_the_order_of_the_picture() -> None:
    words = np.tile(np.arange(3), (3, 1))
    picture = 3 + np.array([[0, 0, 0], [0, 0, 2], [1, 3, 0]])
    after = np.full((3, 1), 7)
    check_order(np.concatenate([words, picture, after], axis=1))
    for wrong in (picture[:, ::-1], picture[:, [0, 0, 1]]):
        with pytest.raises(PromptError, match="token 4 of the prompt has the position") as caught:
            check_order(np.concatenate([words, wrong, after], axis=1))
        assert "--decoder ort" in caught.value.hint
    with pytest.raises(PromptError, match="token 6"):
        check_order(np.concatenate([words, picture, after - 4], axis=1))


# --------------------------------------------------------------------------------------------------- steps and room


class CountingEngine:
    """Stands in for llama.cpp where what is asked of it matters: the next token is the number of cells of its lane.

    It refuses what llama.cpp refuses: positions that do not follow, more tokens than there are cells.
    """

    width, vocab_size, mrope = WIDTH, WORDS, False

    def __init__(self, file: Path, options: EngineOptions) -> None:
        self.options, self.cells = options, 0
        self.held: dict[int, int] = {}
        self.steps: list[list[int]] = []
        self.resized: list[tuple[int, list[int]]] = []
        self.fails = False
        self.closed = False
        self._last: list[int] = []

    def resize(self, cells: int, lanes: Sequence[int]) -> None:
        self.cells = cells
        self.resized.append((cells, list(lanes)))
        self.held = {lane: self.held[lane] for lane in lanes}

    def put_tokens(self, ids: np.ndarray, positions: np.ndarray, lanes: np.ndarray, wanted: np.ndarray) -> None:
        if self.fails:
            raise EnvironmentFaultError("llama.cpp failed with status -3")
        self._last = []
        for position, lane in zip(positions.tolist(), lanes.tolist(), strict=True):
            assert position == self.held.get(lane, 0)
            self.held[lane] = position + 1
            self._last.append(lane)
        assert sum(self.held.values()) <= self.cells
        self.steps.append(lanes.tolist())

    def put_rows(self, rows: np.ndarray, positions: np.ndarray, lanes: np.ndarray, wanted: np.ndarray) -> None:
        assert len(rows) == len(lanes)
        self.put_tokens(np.zeros(len(rows)), positions, lanes, wanted)

    def logits(self, index: int) -> FloatArray:
        found = np.zeros(WORDS, np.float32)
        found[self.held[self._last[index]] % WORDS] = 1.0
        return found

    def forget(self, lane: int) -> None:
        self.held.pop(lane, None)

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def counting(
    monkeypatch: pytest.MonkeyPatch, llava_spec: ModelSpec, tmp_path: Path
) -> Iterator[tuple[LlamaCppDecoder, CountingEngine]]:
    """A decoder of three lanes whose engine counts; no word ends an answer."""
    package = type("Package", (), {"__version__": "0", "llama_supports_gpu_offload": staticmethod(lambda: False)})
    monkeypatch.setattr(decoder_llamacpp, "llama_cpp", lambda: package)
    monkeypatch.setattr(decoder_llamacpp, "LlamaEngine", CountingEngine)
    (tmp_path / "language.gguf").touch()
    spec = llava_spec.decoder.model_copy(update={"eos_token_ids": ()})
    decoder = LlamaCppDecoder(tmp_path / "language.gguf", spec, threads=2, lanes=3)
    engine = decoder._engine
    assert isinstance(engine, CountingEngine)
    yield decoder, engine
    decoder.close()
    assert engine.closed


def test_open_answers_share_their_steps(counting: tuple[LlamaCppDecoder, CountingEngine]) -> None:
    decoder, engine = counting
    assert engine.options == EngineOptions(gpu=False, threads=2, exact=True, lanes=3)
    prompts = [prompt_of(2, 5, 1), prompt_of(3), prompt_of(1, 7)]
    streams = [decoder.stream(prompt, TWELVE) for prompt in prompts]
    found: list[list[int]] = [[next(stream)] for stream in streams]
    engine.steps.clear()
    for _ in range(11):
        for stream, tokens in zip(streams, found, strict=True):
            tokens.append(next(stream))
    assert engine.steps == [[0, 1, 2]] * 11, "one step for three tokens"
    assert found == [list(range(len(prompt), len(prompt) + 12)) for prompt in prompts]
    assert all(next(stream, None) is None for stream in streams)
    assert engine.held == {}


def test_room_is_made_once_for_an_answer_and_grows_with_the_open_ones(
    counting: tuple[LlamaCppDecoder, CountingEngine],
) -> None:
    decoder, engine = counting
    first = decoder.stream(prompt_of(8), TWELVE)
    assert engine.resized == [], "nothing happens before the first token"
    next(first)
    second = decoder.stream(prompt_of(5, 20), TWELVE)
    next(second)
    assert engine.resized == [(20, []), (57, [0])]
    third = decoder.stream(prompt_of(9), replace(TWELVE, max_new_tokens=1))
    assert list(third) == [9]
    assert engine.resized[2:] == [(114, [0, 1])], "twice as much, so that few answers pay for it"
    assert next(first) == 9
    second.close()  # type: ignore[attr-defined]
    assert set(engine.held) == {0}
    assert next(decoder.stream(prompt_of(4), TWELVE)) == 4
    assert len(engine.resized) == 3, "the lane and the room of the closed one are free again"


def test_answers_end_alone(counting: tuple[LlamaCppDecoder, CountingEngine]) -> None:
    decoder, engine = counting
    short = decoder.stream(prompt_of(5), replace(TWELVE, max_new_tokens=2))
    stopped = decoder.stream(prompt_of(6), replace(TWELVE, stop_token_ids=(8,)))
    long = decoder.stream(prompt_of(7), replace(TWELVE, max_new_tokens=5))
    found: list[list[int]] = [[], [], []]
    for _ in range(6):
        for tokens, stream in zip(found, (short, stopped, long), strict=True):
            token = next(stream, None)
            tokens += [] if token is None else [token]
    assert found == [[5, 6], [6, 7], [7, 8, 9, 10, 11]]
    assert engine.held == {}


def test_lanes_are_counted(counting: tuple[LlamaCppDecoder, CountingEngine]) -> None:
    decoder, _ = counting
    assert decoder.lanes == 3
    held = [decoder.stream(prompt_of(2), TWELVE) for _ in range(3)]
    for stream in held:
        next(stream)
    with pytest.raises(UsageError, match="3 answers are open"):
        next(decoder.stream(prompt_of(2), TWELVE))
    assert [next(stream) for stream in held] == [3, 3, 3]


def test_a_step_that_fails_ends_all_that_were_in_it(counting: tuple[LlamaCppDecoder, CountingEngine]) -> None:
    decoder, engine = counting
    first, second = (decoder.stream(prompt_of(4), TWELVE) for _ in range(2))
    next(first), next(second)
    engine.fails = True
    with pytest.raises(EnvironmentFaultError, match="status -3"):
        next(first)
    engine.fails = False
    with pytest.raises(EnvironmentFaultError, match="another answer's step failed"):
        next(second)
    assert engine.held == {}
    assert list(decoder.stream(prompt_of(4), replace(TWELVE, max_new_tokens=2))) == [4, 5]


# ------------------------------------------------------------------------------------------------------- refusals


def test_prompts_that_do_not_fit(counting: tuple[LlamaCppDecoder, CountingEngine]) -> None:
    decoder, _ = counting
    whole = prompt_of(4, 496)
    assert len(list(decoder.stream(whole, TWELVE))) == 12
    with pytest.raises(PromptError, match="end at 513, the context at 512"):
        decoder.stream(whole, replace(TWELVE, max_new_tokens=13))
    with pytest.raises(PromptError, match="image places"):
        decoder.stream(replace(whole, rows=whole.rows[1:]), TWELVE)
    with pytest.raises(UsageError, match="temperature"):
        decoder.stream(whole, replace(TWELVE, temperature=-1.0))
    open_one = decoder.stream(whole, TWELVE)
    next(open_one)
    decoder.close()
    with pytest.raises(EnvironmentFaultError, match="closed"):
        next(open_one)
    with pytest.raises(EnvironmentFaultError, match="closed"):
        decoder.stream(whole, TWELVE)


def test_what_a_decoder_is_not_made_of(llava_spec: ModelSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec, file = llava_spec.decoder, tmp_path / "language.gguf"
    with pytest.raises(UsageError, match="65 lanes"):
        LlamaCppDecoder(file, spec, lanes=65)
    with pytest.raises(BundleError, match="does not exist") as caught:
        LlamaCppDecoder(file, spec)
    assert "compile BUNDLE --decoder llamacpp" in caught.value.hint
    file.touch()
    with pytest.raises(UnknownNameError, match="unknown provider 'tensorrt'"):
        LlamaCppDecoder(file, spec, provider="tensorrt")
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    with pytest.raises(MissingExtraError, match="'llama_cpp' is not installed"):
        LlamaCppDecoder(file, spec)

    def broken(module: str) -> None:
        raise RuntimeError("Failed to load shared library: libcudart.so.12")

    monkeypatch.setattr(llamacpp_engine, "require", broken)
    with pytest.raises(EnvironmentFaultError, match=r"does not load: .*libcudart"):
        LlamaCppDecoder(file, spec)


def test_a_file_of_another_model_is_refused(
    counting: tuple[LlamaCppDecoder, CountingEngine], tmp_path: Path, llava_spec: ModelSpec
) -> None:
    other = llava_spec.decoder.model_copy(update={"vocab_size": 32064})
    with pytest.raises(BundleError, match=r"of another model: .*\(96, 416, False\), the bundle's are \(96, 32064"):
        LlamaCppDecoder(tmp_path / "language.gguf", other)
    with pytest.raises(EnvironmentFaultError, match="built without CUDA"):
        LlamaCppDecoder(tmp_path / "language.gguf", llava_spec.decoder, provider="cuda")


# ------------------------------------------------------------------------------------------- with llama.cpp itself


@pytest.fixture(scope="module")
def real(
    llava_checkpoint: Path, llava_spec: ModelSpec, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[LlamaCppDecoder, HfDecoder, Path]]:
    """The tiny LLaVA in llama.cpp and in transformers."""
    pytest.importorskip("llama_cpp", reason="scripts/check_llamacpp brings it")
    folder = tmp_path_factory.mktemp("gguf") / "llamacpp"
    file = gguf_from_checkpoint(llava_checkpoint, llava_spec, folder, "f32").main
    spec = llava_spec.decoder
    ours = LlamaCppDecoder(file, spec, provider="cpu", threads=1, lanes=4)
    yield ours, HfDecoder(llava_checkpoint, spec, provider="cpu", threads=1), file
    ours.close()


@pytest.mark.slow
@pytest.mark.parametrize("parts", [(6,), (2, 1, 3), (2, 64, 3), (1, 400), (0, 9, 2), (1, 5, 1, 7, 1), (1, 5, 0, 7, 1)])
def test_tokens_are_those_of_transformers(
    parts: tuple[int, ...], real: tuple[LlamaCppDecoder, HfDecoder, Path]
) -> None:
    ours, theirs, _ = real
    prompt, sampling = prompt_of(*parts), SamplingSettings(max_new_tokens=40)
    wanted = list(theirs.stream(prompt, sampling))
    assert list(ours.stream(prompt, sampling)) == wanted
    warm = replace(sampling, temperature=1.2, top_k=30, top_p=0.95, seed=11)
    assert list(ours.stream(prompt, warm)) == list(theirs.stream(prompt, warm)), "the same dice"


@pytest.mark.slow
def test_answers_that_are_open_at_once_keep_their_own_tokens(
    real: tuple[LlamaCppDecoder, HfDecoder, Path],
) -> None:
    _, theirs, file = real
    prompts = [prompt_of(2, 30, 3), prompt_of(4), prompt_of(1, 200, 2, seed=3)]
    wanted = [list(theirs.stream(prompt, TWELVE)) for prompt in prompts]
    fresh = LlamaCppDecoder(file, theirs._spec, provider="cpu", threads=1, lanes=3)  # its context has to grow
    streams = [fresh.stream(prompt, TWELVE) for prompt in prompts]
    found: list[list[int]] = [[] for _ in prompts]
    for turn in range(14):
        for index, stream in enumerate(streams[: turn + 1]):
            found[index] += [] if (token := next(stream, None)) is None else [token]
    for index, stream in enumerate(streams):
        found[index] += list(stream)
    assert found == wanted
    assert all(len(tokens) > 3 for tokens in wanted)
    fresh.close()


@pytest.mark.slow
def test_files_that_llama_cpp_does_not_load(
    real: tuple[LlamaCppDecoder, HfDecoder, Path], llava_spec: ModelSpec, tmp_path: Path
) -> None:
    spec: DecoderSpec = llava_spec.decoder
    whole = real[2].read_bytes()
    for name, content in (("nonsense", b"nonsense" * 9), ("cut", whole[: len(whole) // 2])):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(EnvironmentFaultError, match=f"llama.cpp cannot load '{name}': "):
            LlamaCppDecoder(tmp_path / name, spec, provider="cpu", threads=1)
    with pytest.raises(BundleError, match="of another model"):
        LlamaCppDecoder(real[2], spec.model_copy(update={"width": 128}), provider="cpu", threads=1)


# ------------------------------------------------------------------------------------------- keys and values in int8


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, DecoderSpec]:
    """A GGUF file of a model whose heads are 32 wide, one block of Q8_0."""
    pytest.importorskip("llama_cpp", reason="scripts/check_llamacpp brings it")
    folder = tmp_path_factory.mktemp("wide")
    checkpoint = write_checkpoint(folder / "checkpoint", TinyLlava(width=192, mlp=320))
    model = spec_from_checkpoint(checkpoint, "wide")
    return gguf_from_checkpoint(checkpoint, model, folder / "llamacpp", "f32").main, model.decoder


def heard(decoder: LlamaCppDecoder, prompt: StitchedPrompt) -> tuple[FloatArray, int]:
    """(logits of an answer's first token, bytes of the keys and values of its prompt)."""
    stream = decoder.stream(prompt, TWELVE)
    next(stream)
    engine = decoder._opened()
    assert isinstance(engine, llamacpp_engine.LlamaEngine)
    *_, (_, start, stop) = pieces_of(prompt)
    found = engine.logits(stop - start - 1)
    size = len(engine._state(0))
    stream.close()
    return found, size


@pytest.mark.slow
@pytest.mark.parametrize("rows", [0, 1, 64, 400])
def test_keys_and_values_in_int8_are_near_and_small(rows: int, wide: tuple[Path, DecoderSpec]) -> None:
    file, spec = wide
    prompt = prompt_of(2, rows, 3, width=192)
    made = [
        heard(LlamaCppDecoder(file, spec, provider="cpu", threads=1, exact=exact, kv_cache=kv_cache), prompt)
        for exact, kv_cache in ((True, "auto"), (False, "auto"), (None, "int8"))  # type: ignore[arg-type]
    ]
    (exact, _), (half, sixteen_bits), (eight, eight_bits) = made
    assert eight_bits < 0.6 * sixteen_bits
    near, nearer = (float(np.abs(other - exact).max() / exact.std()) for other in (eight, half))
    assert nearer < near < 0.15


@pytest.mark.slow
def test_answers_in_int8_that_are_open_at_once_keep_their_own_tokens(wide: tuple[Path, DecoderSpec]) -> None:
    file, spec = wide
    prompts = [prompt_of(2, 30, 3, width=192), prompt_of(4), prompt_of(1, 200, 2, seed=3, width=192)]
    alone = []
    for prompt in prompts:
        decoder = LlamaCppDecoder(file, spec, provider="cpu", threads=1, kv_cache="int8")
        alone.append(list(decoder.stream(prompt, TWELVE)))
        decoder.close()
    decoder = LlamaCppDecoder(file, spec, provider="cpu", threads=1, kv_cache="int8")  # its context has to grow
    streams = [decoder.stream(prompt, TWELVE) for prompt in prompts]
    first = [next(stream) for stream in streams]
    together = [[token, *stream] for token, stream in zip(first, streams, strict=True)]
    decoder.close()
    same = [sum(a == b for a, b in zip(*pair, strict=False)) for pair in zip(alone, together, strict=True)]
    assert [tokens[0] for tokens in alone] == first
    assert min(same) >= 8  # a step of three may round otherwise than one of one


@pytest.mark.slow
def test_llama_cpp_itself_refuses_heads_of_other_widths(
    real: tuple[LlamaCppDecoder, HfDecoder, Path], llava_spec: ModelSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoder_llamacpp, "EIGHT_BITS_BLOCK", 1)
    decoder = LlamaCppDecoder(real[2], llava_spec.decoder, provider="cpu", threads=1, kv_cache="int8")
    with pytest.raises(EnvironmentFaultError, match="does not divide n_embd_head_k=16"):
        next(decoder.stream(prompt_of(3), TWELVE))
    decoder.close()
