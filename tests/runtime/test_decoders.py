"""Every decoder against transformers' own `generate(inputs_embeds=...)` on the tiny checkpoint."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlavaForConditionalGeneration
from transformers.generation import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from holov_export.errors import BundleError, CheckpointError, EnvironmentFaultError, PromptError, UsageError
from holov_export.runtime.decoder import Decoder, check_sampling, token_from_logits
from holov_export.runtime.decoder_genai import GenaiDecoder
from holov_export.runtime.decoder_hf import HfDecoder
from holov_export.runtime.decoder_ort import OrtDecoder
from holov_export.spec import ModelSpec
from holov_export.tensors import SamplingSettings, StitchedPrompt

WIDTH, PLACEHOLDER = 96, 3
SETTINGS = SamplingSettings(max_new_tokens=40)


@pytest.fixture(scope="module")
def reference(llava_checkpoint: Path) -> LlavaForConditionalGeneration:
    torch.set_num_threads(1)
    return LlavaForConditionalGeneration.from_pretrained(llava_checkpoint).eval()


@pytest.fixture(scope="module", params=["genai", "ort", "hf"])
def decoder(
    request: pytest.FixtureRequest, llava_checkpoint: Path, genai_folder: Path, llava_spec: ModelSpec
) -> Iterator[Decoder]:
    made: Decoder
    if request.param == "genai":
        made = GenaiDecoder(genai_folder, llava_spec.decoder, provider="cpu", threads=1)
    elif request.param == "ort":
        made = OrtDecoder(genai_folder, llava_spec.decoder, provider="cpu", threads=1)
    else:
        made = HfDecoder(llava_checkpoint, llava_spec.decoder, provider="cpu", threads=1)
    yield made
    made.close()


def prompt_of(count: int, *, images: int = 1, dtype: str = "float32", seed: int = 0) -> StitchedPrompt:
    rows = (np.random.default_rng(seed + count).standard_normal((count * images, WIDTH)) * 0.3).astype(dtype)
    ids: list[int] = [1, 20, 30]
    for image in range(images):
        ids += [PLACEHOLDER] * count + [40 + image, 50]
    return StitchedPrompt(np.array(ids, np.int64), rows, (count,) * images, PLACEHOLDER, "")


def generated(reference: LlavaForConditionalGeneration, prompt: StitchedPrompt, length: int) -> list[int]:
    """Greedy ids by transformers, without the end token."""
    ids = torch.from_numpy(prompt.input_ids)[None]
    with torch.no_grad():
        embeds = reference.get_input_embeddings()(ids).clone()
        embeds[0, ids[0] == PLACEHOLDER] = torch.from_numpy(prompt.rows.astype(np.float32))
        mask = torch.ones_like(ids)
        out = reference.generate(inputs_embeds=embeds, attention_mask=mask, max_new_tokens=length, do_sample=False)
    found: list[int] = out[0].tolist()
    return found[: found.index(2)] if 2 in found else found


@pytest.mark.parametrize("count", [0, 1, 16, 64])
def test_greedy_tokens_are_those_of_transformers(
    decoder: Decoder, reference: LlavaForConditionalGeneration, count: int
) -> None:
    prompt = prompt_of(count)
    wanted = generated(reference, prompt, 40)
    assert len(set(wanted)) > 5, "a model that repeats itself would prove little"
    assert list(decoder.stream(prompt, SETTINGS)) == wanted


def test_several_images(decoder: Decoder, reference: LlavaForConditionalGeneration) -> None:
    prompt = prompt_of(7, images=3)
    assert list(decoder.stream(prompt, SETTINGS)) == generated(reference, prompt, 40)


def test_the_rows_matter_and_so_does_their_order(decoder: Decoder) -> None:
    prompt = prompt_of(16)
    answers = {tuple(decoder.stream(item, SETTINGS)) for item in (prompt, replace(prompt, rows=prompt.rows[::-1]))}
    assert len(answers) == 2


def test_half_precision_rows(decoder: Decoder) -> None:
    prompt = prompt_of(16, dtype="float16")
    whole = replace(prompt, rows=prompt.rows.astype(np.float32))
    assert list(decoder.stream(prompt, SETTINGS)) == list(decoder.stream(whole, SETTINGS))


def test_end_token_ends_and_is_not_yielded(decoder: Decoder, reference: LlavaForConditionalGeneration) -> None:
    wanted = generated(reference, prompt_of(16), 40)
    stop = wanted[5]
    before = wanted[: wanted.index(stop)]
    settings = replace(SETTINGS, stop_token_ids=(stop, 411))
    assert list(decoder.stream(prompt_of(16), settings)) == before


def test_length_is_kept(decoder: Decoder) -> None:
    whole = list(decoder.stream(prompt_of(16), SETTINGS))
    for length in (1, 2, 17):
        assert list(decoder.stream(prompt_of(16), replace(SETTINGS, max_new_tokens=length))) == whole[:length]


def test_stream_may_be_left_early_and_used_again(decoder: Decoder) -> None:
    whole = list(decoder.stream(prompt_of(16), SETTINGS))
    early = decoder.stream(prompt_of(16), SETTINGS)
    assert next(early) == whole[0]
    early.close()  # type: ignore[attr-defined]
    assert list(decoder.stream(prompt_of(16), SETTINGS)) == whole


def test_sampling_with_a_seed_can_be_repeated(decoder: Decoder) -> None:
    prompt = prompt_of(16)
    warm = replace(SETTINGS, temperature=1.5, seed=7)
    first = list(decoder.stream(prompt, warm))
    assert list(decoder.stream(prompt, warm)) == first
    others = {tuple(decoder.stream(prompt, replace(warm, seed=seed))) for seed in range(8, 12)}
    assert len(others | {tuple(first)}) == 5
    assert list(decoder.stream(prompt, SETTINGS)) == list(decoder.stream(prompt, replace(SETTINGS, seed=3)))


@pytest.mark.parametrize("settings", [{"top_k": 1}, {"top_p": 1e-6}])
def test_narrowest_sampling_is_greedy(decoder: Decoder, settings: dict[str, float]) -> None:
    greedy = list(decoder.stream(prompt_of(16), SETTINGS))
    sampling = replace(SETTINGS, temperature=1.0, seed=1, **settings)  # type: ignore[arg-type]
    assert list(decoder.stream(prompt_of(16), sampling)) == greedy


@pytest.mark.parametrize("settings", [{}, {"top_k": 3}, {"top_p": 0.5}, {"top_k": 40, "top_p": 0.7}])
def test_first_tokens_are_drawn_from_the_warped_distribution(
    decoder: Decoder, reference: LlavaForConditionalGeneration, settings: dict[str, float]
) -> None:
    """400 draws of one token against the exact distribution, by total variation."""
    draws = 400
    prompt = prompt_of(1)
    sampling = SamplingSettings(max_new_tokens=1, temperature=4.0, **settings)  # type: ignore[arg-type]
    wanted = warped(first_logits(reference, prompt), sampling)
    seen = np.zeros_like(wanted)
    for seed in range(draws):
        (token,) = list(decoder.stream(prompt, replace(sampling, seed=seed))) or (2,)
        seen[token] += 1 / draws
    support = wanted > 0
    assert not seen[~support].any(), "a token outside top-k or top-p was drawn"
    noise = 0.5 * np.sqrt(2 * wanted * (1 - wanted) / (np.pi * draws)).sum()  # what an exact sampler shows on average
    assert 0.5 * np.abs(seen - wanted).sum() < 2 * noise + 0.02


def first_logits(reference: LlavaForConditionalGeneration, prompt: StitchedPrompt) -> torch.Tensor:
    ids = torch.from_numpy(prompt.input_ids)[None]
    with torch.no_grad():
        embeds = reference.get_input_embeddings()(ids).clone()
        embeds[0, ids[0] == PLACEHOLDER] = torch.from_numpy(prompt.rows)
        return reference(inputs_embeds=embeds, attention_mask=torch.ones_like(ids)).logits[:, -1]


def warped(logits: torch.Tensor, sampling: SamplingSettings) -> np.ndarray:
    """[V], the exact distribution by transformers' own warpers."""
    ids = torch.zeros(1, 1, dtype=torch.long)
    scores = TemperatureLogitsWarper(sampling.temperature)(ids, logits)
    if sampling.top_k:
        scores = TopKLogitsWarper(sampling.top_k)(ids, scores)
    if sampling.top_p < 1:
        scores = TopPLogitsWarper(sampling.top_p)(ids, scores)
    return np.asarray(torch.softmax(scores.double(), -1)[0])


# ------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize("rows", [0, 15, 17])
def test_rows_that_do_not_fit_the_placeholders(decoder: Decoder, rows: int) -> None:
    prompt = prompt_of(16)
    wrong = replace(prompt, rows=np.zeros((rows, WIDTH), np.float32))
    with pytest.raises(PromptError, match=f"16 image places, {rows} visual rows"):
        decoder.stream(wrong, SETTINGS)


def test_rows_of_another_width(decoder: Decoder) -> None:
    wrong = replace(prompt_of(4), rows=np.zeros((4, 95), np.float32))
    with pytest.raises(PromptError, match="95 wide, the decoder takes 96"):
        decoder.stream(wrong, SETTINGS)


@pytest.mark.parametrize(
    "settings",
    [
        {"max_new_tokens": 0},
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"seed": -1},
        {"seed": 2**31},
    ],
)
def test_sampling_outside_its_ranges(decoder: Decoder, settings: dict[str, float]) -> None:
    (name,) = settings
    with pytest.raises(UsageError, match=name):
        decoder.stream(prompt_of(1), SamplingSettings(**settings))  # type: ignore[arg-type]


def test_empty_stop_string() -> None:
    with pytest.raises(UsageError, match="stop string is empty"):
        check_sampling(SamplingSettings(stop=("a", "")))
    with pytest.raises(UsageError, match="must be a list of strings"):
        check_sampling(SamplingSettings(stop="end"))


def test_cuda_that_is_not_there(llava_checkpoint: Path, genai_folder: Path, llava_spec: ModelSpec) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    for make in (GenaiDecoder, HfDecoder):
        folder = genai_folder if make is GenaiDecoder else llava_checkpoint
        with pytest.raises(EnvironmentFaultError, match="no CUDA") as caught:
            make(folder, llava_spec.decoder, provider="cuda")
        assert caught.value.exit_code == 3


def test_folders_that_hold_no_decoder(tmp_path: Path, llava_spec: ModelSpec) -> None:
    with pytest.raises(BundleError, match=r"has no genai_config\.json"):
        GenaiDecoder(tmp_path, llava_spec.decoder)
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        HfDecoder(tmp_path, llava_spec.decoder, provider="cpu")
    (tmp_path / "config.json").write_text('{"model_type": ')
    with pytest.raises(CheckpointError, match="transformers cannot load"):
        HfDecoder(tmp_path, llava_spec.decoder, provider="cpu")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="holds no safetensors weights"):
        HfDecoder(tmp_path, llava_spec.decoder, provider="cpu")


def test_pickled_weights_are_not_loaded(llava_checkpoint: Path, llava_spec: ModelSpec, tmp_path: Path) -> None:
    checkpoint = shutil.copytree(llava_checkpoint, tmp_path / "pickled")
    torch.save(load_file(checkpoint / "model.safetensors"), checkpoint / "pytorch_model.bin")
    (checkpoint / "model.safetensors").unlink()
    LlavaForConditionalGeneration.from_pretrained(checkpoint)  # transformers would take it
    with pytest.raises(CheckpointError, match=r"only pickled weights \(pytorch_model\.bin\)"):
        HfDecoder(checkpoint, llava_spec.decoder, provider="cpu")


def test_pickles_beside_safetensors_are_left_alone(
    llava_checkpoint: Path, llava_spec: ModelSpec, tmp_path: Path
) -> None:
    checkpoint = shutil.copytree(llava_checkpoint, tmp_path / "both")
    (checkpoint / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    decoder = HfDecoder(checkpoint, llava_spec.decoder, provider="cpu", threads=1)
    assert len(list(decoder.stream(prompt_of(4), SamplingSettings(max_new_tokens=3)))) == 3


def test_closed_decoder(llava_checkpoint: Path, genai_folder: Path, llava_spec: ModelSpec) -> None:
    for made in (GenaiDecoder(genai_folder, llava_spec.decoder), HfDecoder(llava_checkpoint, llava_spec.decoder)):
        made.close()
        made.close()
        with pytest.raises(EnvironmentFaultError, match="closed"):
            made.stream(prompt_of(1), SETTINGS)


def test_token_from_logits_follows_the_distribution() -> None:
    logits = np.random.default_rng(0).standard_normal(20).astype(np.float32) * 2
    dice = np.random.default_rng(1)
    for settings in ({}, {"top_k": 4}, {"top_p": 0.6}, {"top_k": 6, "top_p": 0.8}):
        sampling = SamplingSettings(temperature=0.7, **settings)  # type: ignore[arg-type]
        wanted = warped(torch.from_numpy(logits)[None], sampling)
        seen = np.bincount([token_from_logits(logits, sampling, dice) for _ in range(4000)], minlength=20) / 4000
        assert not seen[wanted == 0].any()
        assert 0.5 * np.abs(seen - wanted).sum() < 0.05
