"""8-bit keys and values of the embedded decoder: the ranges, the scales, the graph, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from decoder_families import checkpoint_of, decoder_of, oracle_of, picture, scene, spec_of
from own_recipes import write_recipe

from holov_export.bundle import REPORTS, Bundle, open_bundle
from holov_export.cli import run
from holov_export.errors import CheckFailedError, EnvironmentFaultError, UsageError
from holov_export.export import decoder_onnx
from holov_export.export.checkpoint import spec_from_checkpoint
from holov_export.export.decoder_onnx import cache_options, check_cache_version, decoder_from_checkpoint
from holov_export.pipeline import CACHE_RANGES, DECODER_ANSWERS
from holov_export.policies import HolovPolicy
from holov_export.quantize.decoder_cache import CacheRanges, SeenIn, cache_ranges, write_scales
from holov_export.recipe_pictures import NamedPicture
from holov_export.recipes import recipe_from_name
from holov_export.request import CacheRequest, ExportRequest, plan_from_request
from holov_export.runtime.decoder import Decoder
from holov_export.runtime.decoder_genai import GenaiDecoder
from holov_export.runtime.decoder_ort import OrtDecoder
from holov_export.spec import DecoderPrecision, DecoderSpec, Precision
from holov_export.storage import sha256_of
from holov_export.tensors import SamplingSettings, StitchedPrompt

PROMPT_ALONE = SamplingSettings(max_new_tokens=1)
FAMILIES = ("llava_next", "llava_next_mistral", "qwen2_5_vl")


def prompt_of(family: str, seed: int = 0) -> StitchedPrompt:
    return scene(family, [picture(90, 70, seed)], []).stitched()


def float_decoder(family: str) -> OrtDecoder:
    return OrtDecoder(decoder_of(family), spec_of(family).decoder, provider="cpu", threads=1)


def scales_of(family: str, path: Path) -> Path:
    """From the prompts about three pictures."""
    found = [float_decoder(family).largest_stored(prompt_of(family, seed), PROMPT_ALONE) for seed in (0, 1, 2)]
    write_scales(path, *(np.max([pair[index] for pair in found], axis=0).tolist() for index in (0, 1)))
    return path


# ---------------------------------------------------------------------------------------------------------- ranges


@pytest.mark.parametrize("family", FAMILIES)
def test_ranges_are_those_of_transformers(family: str) -> None:
    """Of every layer, head and channel, for prompts with visual rows: keys after the rotary embedding, by pairs."""
    asked = scene(family, [picture(90, 70)], [])
    model = oracle_of(family).model
    with torch.no_grad():
        cache = model(**asked.asked.inputs, use_cache=True).past_key_values
    keys, values = float_decoder(family).largest_stored(asked.stitched(), PROMPT_ALONE)
    for layer, (key, value) in enumerate(zip(keys, values, strict=True)):
        turned, plain = cache.layers[layer].keys[0], cache.layers[layer].values[0]
        pairs = torch.stack(turned.chunk(2, dim=-1)).norm(dim=0).amax(dim=1).repeat(1, 2)
        np.testing.assert_allclose(key, pairs.flatten().numpy(), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(value, plain.abs().amax(dim=1).flatten().numpy(), rtol=1e-4, atol=1e-5)


def test_the_answer_counts_as_far_as_it_is_stored() -> None:
    decoder, prompt = float_decoder("llava_next"), prompt_of("llava_next")
    short, _ = decoder.largest_stored(prompt, PROMPT_ALONE)
    long, _ = decoder.largest_stored(prompt, SamplingSettings(max_new_tokens=12))
    assert (long >= short).all()
    assert (long > short).any()


def test_scales_have_room_and_a_floor_of_their_layer(tmp_path: Path) -> None:
    write_scales(tmp_path / "scales.json", [[127.0, 1.0, 254.0], [0.0, 0.0, 0.0]], [[1.27, 0.0, 12.7], [1.0, 1.0, 1.0]])
    found = json.loads((tmp_path / "scales.json").read_text(encoding="utf-8"))["scales"]
    np.testing.assert_allclose(found["k_scales"], [[1.25, 0.3125, 2.5], [1.0, 1.0, 1.0]])
    np.testing.assert_allclose(found["v_scales"], [[0.025, 0.025, 0.2], [2 / 127] * 3])


# ----------------------------------------------------------------------------------------------------------- graph


@pytest.mark.parametrize(
    ("family", "precision"),
    [
        ("llava_next", DecoderPrecision.FP32),
        ("qwen2_5_vl", DecoderPrecision.FP32),
        pytest.param("llava_next_mistral", DecoderPrecision.FP16, marks=pytest.mark.slow),
        pytest.param("llava_next", DecoderPrecision.INT4, marks=pytest.mark.slow),
        pytest.param("qwen2_5_vl", DecoderPrecision.FP16, marks=pytest.mark.slow),
    ],
)
def test_the_decoder_stores_int8_and_says_about_the_same(
    family: str, precision: DecoderPrecision, tmp_path: Path
) -> None:
    spec = spec_of(family).decoder.model_copy(update={"eos_token_ids": ()})
    scales = scales_of(family, tmp_path / "scales.json")
    decoder_from_checkpoint(checkpoint_of(family), tmp_path / "int8", spec, precision, cache_scales=scales)
    graph = onnx.load(str(tmp_path / "int8" / "model.onnx"), load_external_data=False).graph
    caches = [value for value in (*graph.input, *graph.output) if value.name.startswith(("past_key", "present"))]
    assert len(caches) == 4 * spec.layers
    check_scales(tmp_path / "int8", scales)
    assert {value.type.tensor_type.elem_type for value in caches} == {onnx.TensorProto.INT8}

    stored = OrtDecoder(tmp_path / "int8", spec, provider="cpu", threads=1)
    plain = OrtDecoder(decoder_of(family, precision), spec, provider="cpu", threads=1)
    unseen = prompt_of(family, seed=9)
    left, right = second_logits(stored, unseen), second_logits(plain, unseen)
    assert np.corrcoef(left, right)[0, 1] > 0.9
    assert not np.array_equal(left, right)
    with pytest.raises(EnvironmentFaultError, match="neither float32 nor float16"):
        stored.largest_stored(unseen, PROMPT_ALONE)
    if not spec.mrope_sections:
        genai: Decoder = GenaiDecoder(tmp_path / "int8", spec, provider="cpu", threads=1)
        settings = SamplingSettings(max_new_tokens=4)
        assert list(genai.stream(unseen, settings)) == list(stored.stream(unseen, settings))


def check_scales(folder: Path, scales: Path) -> None:
    """Those of the file are in the graph, at the attention of their layer."""
    wanted = json.loads(scales.read_text(encoding="utf-8"))["scales"]
    graph = onnx.load(str(folder / "model.onnx")).graph
    tensors = {item.name: onnx.numpy_helper.to_array(item) for item in graph.initializer}
    attention = [node for node in graph.node if node.op_type == "GroupQueryAttention"]
    assert len(attention) == len(wanted["k_scales"])
    for layer, node in enumerate(attention):
        assert f"past_key_values.{layer}.key" in node.input
        found = [tensors[name] for name in node.input if name.endswith(("k_scale", "v_scale"))]
        for tensor, key in zip(found, ("k_scales", "v_scales"), strict=True):
            np.testing.assert_allclose(tensor, wanted[key][layer], rtol=1e-6)


@pytest.mark.parametrize("family", ["llava_next", "qwen2_5_vl"])
def test_what_is_stored_is_what_transformers_stores(family: str, tmp_path: Path) -> None:
    """Numbers times scales, of every layer, head, token and channel, to half a step of its own scale.

    Of the first layer: those behind it read what is rounded.
    """
    spec = spec_of(family).decoder
    scales = scales_of(family, tmp_path / "scales.json")
    decoder_from_checkpoint(checkpoint_of(family), tmp_path / "int8", spec, DecoderPrecision.FP32, cache_scales=scales)
    asked = scene(family, [picture(90, 70)], [])
    with torch.no_grad():
        cache = oracle_of(family).model(**asked.asked.inputs, use_cache=True).past_key_values
    prompt, stored = asked.stitched(), OrtDecoder(tmp_path / "int8", spec, provider="cpu", threads=1)
    binding, caches = stored._binding(len(prompt) + 1)
    list(stored._tokens(prompt, PROMPT_ALONE, binding))
    found = json.loads(scales.read_text(encoding="utf-8"))["scales"]
    for kind, tensor in (("key", cache.layers[0].keys), ("value", cache.layers[0].values)):
        step = np.array(found[f"{kind[0]}_scales"][0]).reshape(spec.kv_heads, 1, spec.head_width)
        numbers = caches[f"past_key_values.0.{kind}"].numpy()[0, :, : len(prompt)]
        assert numbers.dtype == np.int8
        assert (np.abs(numbers * step - tensor[0].numpy()) <= 0.501 * step + 1e-5).all()


def second_logits(decoder: OrtDecoder, prompt: StitchedPrompt) -> np.ndarray:
    """Of the token behind the prompt's own, which reads what the prompt stored."""
    seen: list[np.ndarray] = []
    original = decoder._logits

    def watch(*asked: object) -> np.ndarray:
        seen.append(original(*asked))  # type: ignore[arg-type]
        if len(seen) == 1:  # both decoders go on with the same word
            first = np.zeros_like(seen[0])
            first[20] = 1.0
            return first
        return seen[-1]

    decoder._logits = watch  # type: ignore[method-assign, assignment]
    assert len(list(decoder.stream(prompt, SamplingSettings(max_new_tokens=2)))) == 2
    return seen[1]


# ------------------------------------------------------------------------------------------------------ the export


def test_an_export_from_end_to_end(
    llava_checkpoint: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--model", str(llava_checkpoint), "-o", str(tmp_path / "made"), "--decoder-kv-cache", "int8"]
    assert run([*words, "--recipe", write_recipe(tmp_path), "--pictures", str(pictures), "--no-verify"]) == 0
    bundle = open_bundle(tmp_path / "made")
    plan = bundle.manifest.plan
    assert (plan.decoder_kv_cache, plan.decoder_name) == ("int8", "fp32, int8 KV")
    ranges = CacheRanges.model_validate_json((bundle.folder / REPORTS / CACHE_RANGES).read_text(encoding="utf-8"))
    assert len(ranges.pictures) == 2
    assert ranges.questions == 0
    assert ranges.budgets == ("1/9", "all")
    decoder = plan.model.decoder
    assert np.array(ranges.keys).shape == (decoder.layers, decoder.kv_heads * decoder.head_width)
    assert np.array(ranges.values).shape == np.array(ranges.keys).shape
    capsys.readouterr()
    assert run(["inspect", str(bundle.folder)]) == 0
    assert "fp32, int8 KV" in capsys.readouterr().out
    photograph = str(next(pictures.glob("*.png")))
    for back_end in ("genai", "ort"):
        line = ["ask", str(bundle.folder), photograph, "what is shown?", "--decoder", back_end, "--provider", "cpu"]
        assert run([*line, "--max-new-tokens", "4"]) == 0
    assert run([*line, "--kv-cache", "int8"]) == 2
    assert "--decoder-kv-cache int8" in capsys.readouterr().err


@pytest.mark.slow
def test_the_demo_model_answers_as_before(tmp_path: Path) -> None:
    assert run(["--model", "demo", "-o", str(tmp_path / "made"), "--decoder-kv-cache", "int8"]) == 0
    found = json.loads((tmp_path / "made" / REPORTS / DECODER_ANSWERS).read_text(encoding="utf-8"))
    assert found["decoders"] == ["fp32 (transformers)", "fp32, int8 KV"]
    assert found["at"][0]["same"] == found["questions"] >= 3
    ranges = CacheRanges.model_validate_json((tmp_path / "made" / REPORTS / CACHE_RANGES).read_text(encoding="utf-8"))
    assert ranges.questions == found["questions"]
    parity = json.loads((tmp_path / "made" / REPORTS / "parity.json").read_text(encoding="utf-8"))
    assert parity["decoder"]["kv_cache"] == "int8"


def test_values_that_are_not_finite_are_named(
    complete_bundle: Bundle, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = OrtDecoder.largest_stored

    def broken(self: OrtDecoder, *asked: object) -> tuple[np.ndarray, np.ndarray]:
        keys, values = original(self, *asked)  # type: ignore[arg-type]
        values[1, 3] = np.inf
        return keys, values

    monkeypatch.setattr(OrtDecoder, "largest_stored", broken)
    path = next(pictures.glob("*.png"))
    named = NamedPicture(path.name, sha256_of(path), path)
    seen_in = SeenIn(recipe_from_name("smoke-8"), [named])
    with pytest.raises(CheckFailedError, match="the values of the decoder's layer 1 are not finite"):
        cache_ranges(complete_bundle, seen_in, threads=1)


# --------------------------------------------------------------------------------------------------------- refused


def test_combinations_that_make_no_sense_are_refused(llava_checkpoint: Path, tmp_path: Path) -> None:
    request = ExportRequest(
        model=str(llava_checkpoint),
        policy=HolovPolicy(),
        precision=Precision.FP32,
        decoder=DecoderPrecision.FP32,
        output=tmp_path / "made",
        decoder_kv_cache=CacheRequest(),
    )
    plan, _ = plan_from_request(request)
    assert plan.decoder_kv_cache == "int8"
    with pytest.raises(UsageError, match="no keys and values without a decoder"):
        plan_from_request(replace(request, decoder=None))
    with pytest.raises(UsageError, match="no bf16 vision graph runs"):
        plan_from_request(replace(request, precision=Precision.BF16, decoder=DecoderPrecision.FP16))


@pytest.mark.parametrize("version", ["0.14.1", "0.15.0.dev3"])
def test_an_old_builder_is_refused(version: str, tmp_path: Path) -> None:
    with pytest.raises(EnvironmentFaultError, match=r"builds no decoder with 8-bit keys") as caught:
        check_cache_version(version)
    assert "0.16" in str(caught.value.hint)
    assert cache_options(tmp_path / "scales.json", "0.16.0")[0] == "kv_cache_quant_scheme=int8_per_channel"


def test_an_old_runtime_is_told_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*asked: object, **more: object) -> None:
        raise RuntimeError("This is an invalid model. In Node (GroupQueryAttention)")  # as 1.24.4 says it

    monkeypatch.setattr("onnxruntime.InferenceSession", refuse)
    with pytest.raises(EnvironmentFaultError, match=r"cannot load the decoder.s model\.onnx") as caught:
        float_decoder("llava_next")
    assert "needs ONNX Runtime 1.25" in caught.value.hint


def test_a_builder_that_ignores_the_wish_is_noticed(
    llava_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoder_onnx, "cache_options", lambda scales, version: ())
    spec: DecoderSpec = spec_from_checkpoint(llava_checkpoint, "tiny").decoder
    with pytest.raises(CheckFailedError, match="asked for 8-bit keys and values and wrote others"):
        decoder_from_checkpoint(
            llava_checkpoint, tmp_path / "made", spec, DecoderPrecision.FP32, cache_scales=tmp_path / "none.json"
        )


def test_a_missing_picture_ends_it_before_the_export(
    llava_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--model", str(llava_checkpoint), "-o", str(tmp_path / "made"), "--decoder-kv-cache", "int8"]
    assert run([*words, "--recipe", write_recipe(tmp_path), "--pictures", str(tmp_path / "nowhere")]) != 0
    assert "nowhere" in capsys.readouterr().err
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("more", [["--recipe", "nonsense"], ["--recipe", "folder"], ["--no-decoder"]])
def test_a_dry_run_refuses_what_the_export_would(
    llava_checkpoint: Path, more: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["--model", str(llava_checkpoint), "--decoder-kv-cache", "int8", "--dry-run", *more]) == 2
    assert "internal error" not in capsys.readouterr().err


def test_a_question_that_is_too_long_ends_it_before_the_decoder_is_built(
    llava_checkpoint: Path,
    pictures: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(decoder_onnx, "_run_builder", lambda *asked: pytest.fail("it was built"))
    name = next(pictures.glob("*.png"))
    row = {"image": str(name), "question": "what " * 5000, "answers": ["one"]}
    (tmp_path / "data.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    words = ["--model", str(llava_checkpoint), "-o", str(tmp_path / "made"), "--decoder-kv-cache", "int8"]
    words += ["--recipe", write_recipe(tmp_path), "--pictures", str(pictures)]
    assert run([*words, "--questions", str(tmp_path / "data.jsonl")]) == 2
    assert "the question has" in capsys.readouterr().err
