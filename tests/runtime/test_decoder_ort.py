"""Plain ONNX Runtime, ONNX Runtime GenAI and our use of transformers against transformers' own answers, by family."""

from __future__ import annotations

import shutil
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from decoder_families import checkpoint_of, clip, decoder_of, oracle_of, picture, scene, spec_of
from toys import write_toy_bundle

from holov_export.bundle import Bundle
from holov_export.errors import (
    BundleError,
    CheckpointError,
    EnvironmentFaultError,
    PromptError,
    UnknownNameError,
    UnsupportedModelError,
    UsageError,
)
from holov_export.runtime.decoder import Decoder
from holov_export.runtime.decoder_choice import DecoderOptions, decoder_maker, embedded_decoder
from holov_export.runtime.decoder_genai import GenaiDecoder
from holov_export.runtime.decoder_hf import HfDecoder
from holov_export.runtime.decoder_hf_inner import inner_decoder
from holov_export.runtime.decoder_ort import OrtDecoder, last_logits
from holov_export.runtime.inner.refetch import RefetchDecoder
from holov_export.spec import DecoderPrecision, ModelSpec
from holov_export.tensors import SamplingSettings, StitchedPrompt

NEW = 16
SETTINGS = SamplingSettings(max_new_tokens=NEW)
#: family -> (width, height) of images, (frames, width, height) of clips
SCENES: dict[str, list[tuple[list[tuple[int, int]], list[tuple[int, int, int]]]]] = {
    "llava_next": [([(90, 70)], []), ([(150, 40), (60, 200)], [])],
    "llava_next_mistral": [([(90, 70)], []), ([(180, 40), (60, 60)], [])],
    "qwen2_5_vl": [
        ([(200, 120)], []),
        ([(300, 60), (90, 260)], []),
        ([], [(7, 160, 90)]),
        ([(120, 200)], [(9, 90, 150)]),
        ([], []),
    ],
    "qwen2_5_vl_tied": [([(200, 120)], []), ([(120, 200)], [(5, 90, 150)])],
    "video_llava": [([(90, 70)], []), ([], [(8, 60, 80)]), ([(90, 70)], [(8, 60, 80)]), ([], [])],
}
CASES = [(name, index) for name, scenes in SCENES.items() for index in range(len(scenes))]
BACK_ENDS = ("ort", "hf", "genai")


@cache
def decoder(name: str, back_end: str) -> Decoder:
    if back_end == "hf":
        return HfDecoder(checkpoint_of(name), spec_of(name).decoder, provider="cpu", threads=1)
    kind = OrtDecoder if back_end == "ort" else GenaiDecoder
    return kind(decoder_of(name), spec_of(name).decoder, provider="cpu", threads=1)


def scene_of(name: str, index: int):  # type: ignore[no-untyped-def]
    images, videos = SCENES[name][index]
    return scene(
        name,
        [picture(width, height, seed) for seed, (width, height) in enumerate(images)],
        [clip(*shape, seed=seed) for seed, shape in enumerate(videos)],
    )


def answer(prompt: StitchedPrompt, name: str, back_end: str, settings: SamplingSettings = SETTINGS) -> list[int]:
    if back_end == "genai" and spec_of(name).decoder.mrope_sections:
        pytest.skip("GenAI does not run this language model")
    return list(decoder(name, back_end).stream(prompt, settings))


# ------------------------------------------------------------------------------------------------------- identity


@pytest.mark.parametrize(("name", "index"), CASES)
def test_whole_prompts_are_those_of_transformers(name: str, index: int) -> None:
    asked = scene_of(name, index)
    config = oracle_of(name).model.config
    wanted = asked.asked.inputs["input_ids"][0].numpy()
    if asked.videos:
        wanted = np.where(wanted == config.video_token_id, config.image_token_id, wanted)
    prompt = asked.stitched()
    np.testing.assert_array_equal(prompt.input_ids, wanted)
    embeds, positions, following = oracle_of(name)._whole(asked.asked.inputs)
    np.testing.assert_array_equal(prompt.rows, embeds[0].numpy()[wanted == config.image_token_id])
    if asked.images or asked.videos:  # of text alone transformers' positions are those of every language model
        assert (positions is None) == (prompt.position_ids is None)
        if positions is not None:
            np.testing.assert_array_equal(prompt.position_ids, positions[:, 0].numpy())
            assert prompt.next_position == following


@pytest.mark.parametrize("back_end", BACK_ENDS)
@pytest.mark.parametrize(("name", "index"), CASES)
def test_whole_prompts_are_answered_as_by_transformers(name: str, index: int, back_end: str) -> None:
    asked = scene_of(name, index)
    wanted = oracle_of(name).answer(asked.asked, NEW)
    assert len(set(wanted)) > 3, "a model that repeats itself would prove little"
    assert answer(asked.stitched(), name, back_end) == wanted


@pytest.mark.parametrize("share", [0.1, 0.4])
@pytest.mark.parametrize(("name", "index"), CASES)
def test_pruned_prompts_are_answered_as_by_transformers(name: str, index: int, share: float) -> None:
    asked = scene_of(name, index)
    dice = np.random.default_rng(3)
    kept = [
        np.sort(dice.choice(len(places), max(1, round(share * len(places))), replace=False)) for places in asked.places
    ]
    wanted = oracle_of(name).pruned_answer(asked.asked, asked.gone(kept), NEW)
    prompt = asked.stitched(kept)
    for back_end in BACK_ENDS:
        if back_end != "genai" or not spec_of(name).decoder.mrope_sections:
            assert answer(prompt, name, back_end) == wanted, back_end
    if asked.places:
        assert wanted != oracle_of(name).answer(asked.asked, NEW), "pruning should change something here"


@pytest.mark.parametrize("back_end", ["ort", "hf"])
def test_positions_matter(back_end: str) -> None:
    """A pruned prompt with the positions 0, 1, 2, ... or with those of another grid is answered differently."""
    asked = scene_of("qwen2_5_vl", 0)
    prompt = asked.stitched([range(0, len(asked.places[0]), 3)])
    assert prompt.position_ids is not None
    plain = np.tile(np.arange(len(prompt)), (3, 1))
    flipped = prompt.position_ids[[0, 2, 1]]
    answers = {
        tuple(answer(item, "qwen2_5_vl", back_end))
        for item in (
            prompt,
            replace(prompt, position_ids=plain, next_position=len(prompt)),
            replace(prompt, position_ids=flipped),
            replace(prompt, next_position=len(prompt)),
        )
    }
    assert len(answers) == 4


# ----------------------------------------------------------------------------------------------------- precisions


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "precision", "least"),
    [
        ("qwen2_5_vl", DecoderPrecision.INT4, 0.5),
        ("qwen2_5_vl_tied", DecoderPrecision.INT4, 0.5),
        ("qwen2_5_vl", DecoderPrecision.FP16, 0.9999),
        ("llava_next_mistral", DecoderPrecision.INT4, 0.5),
        ("video_llava", DecoderPrecision.FP16, 0.9999),
    ],
)
def test_other_precisions_run_on_the_cpu(name: str, precision: DecoderPrecision, least: float) -> None:
    folder = decoder_of(name, precision)
    smaller = {DecoderPrecision.FP16: 0.6, DecoderPrecision.INT4: 0.35}[precision]
    size = (decoder_of(name) / "model.onnx.data").stat().st_size
    assert (folder / "model.onnx.data").stat().st_size < smaller * size
    made = OrtDecoder(folder, spec_of(name).decoder, provider="cpu", threads=1)
    prompt = scene_of(name, 0).stitched()
    exact = decoder(name, "ort")
    assert isinstance(exact, OrtDecoder)
    assert np.corrcoef(first_logits(made, prompt), first_logits(exact, prompt))[0, 1] > least
    endless = OrtDecoder(folder, spec_of(name).decoder.model_copy(update={"eos_token_ids": ()}), provider="cpu")
    assert len(list(endless.stream(prompt, SETTINGS))) == NEW


def first_logits(made: OrtDecoder, prompt: StitchedPrompt) -> np.ndarray:
    seen: list[np.ndarray] = []
    original = made._logits

    def watch(*asked: object) -> np.ndarray:
        seen.append(original(*asked))  # type: ignore[arg-type]
        return seen[-1]

    made._logits = watch  # type: ignore[method-assign, assignment]
    next(made.stream(prompt, SETTINGS), None)
    made._logits = original  # type: ignore[method-assign]
    return seen[0]


def test_bfloat16_logits_are_read() -> None:
    values = torch.randn(1, 3, 5, generator=torch.Generator().manual_seed(0)).bfloat16()
    bits = values.view(torch.uint16).numpy()
    value = onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(bits, onnx.TensorProto.BFLOAT16)
    np.testing.assert_array_equal(last_logits(value), values[0, -1].float().numpy())


# --------------------------------------------------------------------------------------------------- the interface


def test_end_tokens_length_and_leaving_early() -> None:
    prompt = scene_of("qwen2_5_vl", 0).stitched()
    whole = answer(prompt, "qwen2_5_vl", "ort")
    for length in (1, 2, 5):
        assert answer(prompt, "qwen2_5_vl", "ort", replace(SETTINGS, max_new_tokens=length)) == whole[:length]
    stop = next(token for index, token in enumerate(whole) if index and token not in whole[:index])
    before = whole[: whole.index(stop)]
    assert answer(prompt, "qwen2_5_vl", "ort", replace(SETTINGS, stop_token_ids=(stop,))) == before
    early = decoder("qwen2_5_vl", "ort").stream(prompt, SETTINGS)
    assert next(early) == whole[0]
    early.close()  # type: ignore[attr-defined]
    assert answer(prompt, "qwen2_5_vl", "ort") == whole


def test_sampling_with_a_seed_is_that_of_transformers_decoder() -> None:
    prompt = scene_of("qwen2_5_vl", 0).stitched()
    warm = replace(SETTINGS, temperature=1.5, top_k=40, seed=7)
    first = answer(prompt, "qwen2_5_vl", "ort", warm)
    assert answer(prompt, "qwen2_5_vl", "ort", warm) == first
    assert answer(prompt, "qwen2_5_vl", "hf", warm) == first, "the same dice over the same logits"
    assert answer(prompt, "qwen2_5_vl", "ort", replace(warm, seed=8)) != first


def test_caches_stay_where_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every step is given the buffers of the first one, and no output of a cache is bound to another."""
    made = decoder("qwen2_5_vl", "ort")
    assert isinstance(made, OrtDecoder)
    places: list[list[int]] = []
    original = made._logits

    def watch(binding, *asked):  # type: ignore[no-untyped-def]
        found = original(binding, *asked)
        places.append([value.data_ptr() for value in binding.get_outputs()[:-1]])
        return found

    monkeypatch.setattr(made, "_logits", watch)
    tokens = list(made.stream(scene_of("qwen2_5_vl", 0).stitched(), SETTINGS))
    assert len(places) >= len(tokens) > 3
    assert len(places[0]) == 2 * spec_of("qwen2_5_vl").decoder.layers
    assert all(place == places[0] for place in places)


def test_graph_of_qwen_has_the_last_logits_only_and_no_genai_configuration() -> None:
    folder = decoder_of("qwen2_5_vl")
    graph = onnx.load(folder / "model.onnx", load_external_data=False).graph
    shapes = {item.name: [axis.dim_value for axis in item.type.tensor_type.shape.dim] for item in graph.output}
    assert shapes["logits"][1:] == [1, spec_of("qwen2_5_vl").decoder.vocab_size]
    assert not (folder / "genai_config.json").exists()
    assert not any("visual" in item.name for item in graph.initializer)


# ------------------------------------------------------------------------------------------------------- refusals


def test_prompts_without_positions() -> None:
    prompt = scene_of("qwen2_5_vl", 0).stitched()
    assert prompt.position_ids is not None
    wrong = (
        replace(prompt, position_ids=None),
        replace(prompt, next_position=None),
        replace(prompt, position_ids=prompt.position_ids[:, :-1]),
    )
    for back_end in ("ort", "hf"):
        for item in wrong:
            with pytest.raises(PromptError, match=rf"needs positions \[3, {len(prompt)}\]"):
                decoder("qwen2_5_vl", back_end).stream(item, SETTINGS)


@pytest.mark.parametrize("name", ["qwen2_5_vl", "llava_next"])
def test_answers_that_would_pass_the_end_of_the_context(name: str) -> None:
    prompt = scene_of(name, 0).stitched()
    spec = spec_of(name).decoder
    used = max(len(prompt), prompt.next_position or 0)
    short = spec.model_copy(update={"context": used + 4})
    made = OrtDecoder(decoder_of(name), short, provider="cpu", threads=1)
    assert len(list(made.stream(prompt, replace(SETTINGS, max_new_tokens=4)))) <= 4
    with pytest.raises(PromptError, match=f"end at {used + 5}, the context at {used + 4}"):
        made.stream(prompt, replace(SETTINGS, max_new_tokens=5))


def test_genai_is_refused_where_positions_are_three_numbers() -> None:
    qwen, next_ = spec_of("qwen2_5_vl").decoder, spec_of("llava_next").decoder
    assert (embedded_decoder("auto", qwen), embedded_decoder("auto", next_)) == ("ort", "genai")
    assert (embedded_decoder("ort", qwen), embedded_decoder("ort", next_)) == ("ort", "ort")
    assert embedded_decoder("genai", next_) == "genai"
    with pytest.raises(UsageError, match=r"M-RoPE.*where tokens were pruned they would be wrong") as caught:
        embedded_decoder("genai", qwen)
    assert "--decoder ort" in caught.value.hint
    with pytest.raises(UsageError, match="M-RoPE"):
        GenaiDecoder(decoder_of("qwen2_5_vl"), qwen)


def test_what_a_bundle_opens(llava_spec: ModelSpec, llava_checkpoint: Path, genai_folder: Path, tmp_path: Path) -> None:
    bundle = write_toy_bundle(tmp_path / "llava", llava_spec, llava_checkpoint, decoder=genai_folder)
    assert opened(bundle, "auto").startswith("onnxruntime-genai")
    assert opened(bundle, "genai").startswith("onnxruntime-genai")
    assert opened(bundle, "ort").startswith("onnxruntime 1")
    with pytest.raises(UnknownNameError, match="unknown decoder 'sglang'"):
        decoder_maker("sglang", bundle, DecoderOptions())
    with pytest.raises(UsageError, match="without a decoder"):
        opened(bundle, "none")
    plan = bundle.manifest.plan.model_copy(update={"model": spec_of("qwen2_5_vl")})
    qwen = replace(bundle, manifest=bundle.manifest.model_copy(update={"plan": plan}))
    shutil.copytree(decoder_of("qwen2_5_vl"), tmp_path / "llava" / "decoder", dirs_exist_ok=True)
    assert opened(qwen, "auto").startswith("onnxruntime 1")
    with pytest.raises(UsageError, match="M-RoPE"):
        decoder_maker("genai", qwen, DecoderOptions("cpu", 1))


def opened(bundle: Bundle, name: str) -> str:
    made = decoder_maker(name, bundle, DecoderOptions("cpu", 1))()
    made.close()
    return made.name


def test_folders_that_hold_no_decoder(tmp_path: Path) -> None:
    spec = spec_of("llava_next").decoder
    with pytest.raises(BundleError, match=r"has no model\.onnx"):
        OrtDecoder(tmp_path, spec)
    folder = shutil.copytree(decoder_of("llava_next"), tmp_path / "wrong")
    shutil.copy(folder / "embedding.onnx", folder / "model.onnx")
    with pytest.raises(BundleError, match=r"is no decoder of this package: it takes image_features, input_ids"):
        OrtDecoder(folder, spec, provider="cpu")
    (folder / "model.onnx").write_bytes(b"nonsense")
    with pytest.raises(EnvironmentFaultError, match=r"cannot load the decoder's model\.onnx"):
        OrtDecoder(folder, spec, provider="cpu")


def test_providers() -> None:
    folder, spec = decoder_of("llava_next"), spec_of("llava_next").decoder
    with pytest.raises(UnknownNameError, match="unknown provider 'tpu'"):
        OrtDecoder(folder, spec, provider="tpu")
    if torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    with pytest.raises(EnvironmentFaultError, match="no CUDA") as caught:
        OrtDecoder(folder, spec, provider="cuda")
    assert caught.value.exit_code == 3


def test_closed_decoder() -> None:
    made = OrtDecoder(decoder_of("llava_next"), spec_of("llava_next").decoder, provider="cpu")
    made.close()
    made.close()
    with pytest.raises(EnvironmentFaultError, match="closed"):
        made.stream(scene_of("llava_next", 0).stitched(), SETTINGS)


def test_methods_inside_the_language_model_are_for_llava(tmp_path: Path) -> None:
    for name in ("llava_next", "qwen2_5_vl", "video_llava"):
        spec = spec_of(name).decoder
        with pytest.raises(UnsupportedModelError, match=rf"references for LLaVA-1\.5, this is a '{name}'"):
            inner_decoder(checkpoint_of(name), spec, "fastv", 4, provider="cpu")
        with pytest.raises(UnsupportedModelError, match=rf"this is a '{name}'"):
            RefetchDecoder(checkpoint_of(name), spec, provider="cpu")
    shutil.copytree(checkpoint_of("llava_next"), tmp_path / "other")
    text = (tmp_path / "other" / "config.json").read_text()
    (tmp_path / "other" / "config.json").write_text(text.replace('"llava_next"', '"qwen3_vl"'))
    with pytest.raises(CheckpointError, match="is a 'qwen3_vl'"):
        HfDecoder(tmp_path / "other", spec_of("llava_next").decoder, provider="cpu")
