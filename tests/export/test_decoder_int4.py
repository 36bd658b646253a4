"""int4 decoders: what the builder is told, checkpoints that come in 4 bits, and what would be read wrongly."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from checkpoints import TinyLlava, write_checkpoint
from decoder_families import checkpoint_of
from quantised_checkpoints import AWQ_ORDER, awq_tensors, gptq_tensors, packed, quantised_checkpoint, rounded
from safetensors.torch import load_file, save_file
from transformers import LlavaForConditionalGeneration

from holov_export.errors import CheckpointError, EnvironmentFaultError, UnsupportedModelError, UsageError
from holov_export.export.checkpoint import spec_from_checkpoint
from holov_export.export.decoder_int4 import builder_options, check_stored_int4, int4_settings, refuse_quantized
from holov_export.export.decoder_language import model_config
from holov_export.export.decoder_onnx import decoder_from_checkpoint
from holov_export.export.decoder_weights import language_tensors
from holov_export.runtime.decoder_genai import GenaiDecoder
from holov_export.spec import DecoderPrecision, Int4Settings
from holov_export.tensors import SamplingSettings, StitchedPrompt

INT4, FP32 = DecoderPrecision.INT4, DecoderPrecision.FP32
Method = Literal["awq", "gptq"]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose products have 192 and 320 inputs: an even and an odd number of groups of 64."""
    return write_checkpoint(tmp_path_factory.mktemp("int4") / "tiny", TinyLlava(width=192, mlp=320, layers=2))


@pytest.fixture(scope="module", params=["awq", "gptq"])
def stored(request: pytest.FixtureRequest, source: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(a checkpoint in 4 bits, the same one in float32)."""
    return quantised_checkpoint(source, tmp_path_factory.mktemp(request.param), request.param, size=32)


def prompt_of(count: int) -> StitchedPrompt:
    rows = (np.random.default_rng(count).standard_normal((count, 192)) * 0.3).astype(np.float32)
    return StitchedPrompt(np.array([1, 20, *([3] * count), 40, 50], np.int64), rows, (count,) if count else (), 3, "")


def logits_of(decoder: Path, prompt: StitchedPrompt) -> np.ndarray:
    """[S, V] of a prompt, by the graphs of a decoder's folder."""
    model, embedding = (
        onnxruntime.InferenceSession(str(decoder / name), providers=["CPUExecutionProvider"])
        for name in ("model.onnx", "embedding.onnx")
    )
    embeds = embedding.run(None, {"input_ids": prompt.input_ids[None], "image_features": prompt.rows})[0]
    empty = {item.name: np.zeros((1, 2, 0, 32), np.float32) for item in model.get_inputs() if "past" in item.name}
    feed = {"inputs_embeds": embeds, "attention_mask": np.ones((1, len(prompt)), np.int64), **empty}
    return np.asarray(model.run(["logits"], feed)[0][0])


def embeds_of(model: LlavaForConditionalGeneration, prompt: StitchedPrompt) -> torch.Tensor:
    ids = torch.from_numpy(prompt.input_ids)[None]
    embeds = model.get_input_embeddings()(ids).clone()
    embeds[0, ids[0] == 3] = torch.from_numpy(prompt.rows)
    return embeds


@torch.no_grad()
def reference_logits(model: LlavaForConditionalGeneration, prompt: StitchedPrompt) -> np.ndarray:
    return model(inputs_embeds=embeds_of(model, prompt)).logits[0].numpy()


@torch.no_grad()
def reference_tokens(model: LlavaForConditionalGeneration, prompt: StitchedPrompt, length: int) -> list[int]:
    embeds = embeds_of(model, prompt)
    out = model.generate(
        inputs_embeds=embeds, attention_mask=torch.ones(embeds.shape[:2]), max_new_tokens=length, do_sample=False
    )
    return [token for token in out[0].tolist() if token != 2]


def changed(folder: Path, target: Path, **entries: Any) -> Path:
    """A copy of a checkpoint whose quantization_config says something else; None takes an entry out."""
    shutil.copytree(folder, target)
    config = json.loads((target / "config.json").read_text())
    own = config.get("quantization_config", {}) | entries
    config["quantization_config"] = {key: value for key, value in own.items() if value is not None}
    (target / "config.json").write_text(json.dumps(config))
    return target


# ------------------------------------------------------------------------------------------------- the layouts


def test_packing_is_that_of_the_packages() -> None:
    """By hand: an int32 has number 0 in its lowest bits; AWQ takes the numbers in another order."""
    numbers = np.arange(8, dtype=np.int32)[None]
    assert packed(numbers)[0, 0] == 0x76543210
    assert packed(numbers, AWQ_ORDER)[0, 0] == 0x75316420
    assert packed(np.full((1, 8), 15, np.int32))[0, 0] == -1


@pytest.mark.parametrize("method", ["awq", "gptq"])
def test_packed_numbers_come_back(method: Method) -> None:
    weight = np.random.default_rng(0).standard_normal((48, 64)).astype(np.float32)
    made = rounded(weight, 32)
    tensors = (awq_tensors if method == "awq" else gptq_tensors)(made)
    words = tensors["qweight"].view(np.uint32) if method == "awq" else tensors["qweight"].T.view(np.uint32)
    eights = np.stack([(words >> np.uint32(4 * place)) & 15 for place in range(8)], axis=-1)
    if method == "awq":
        eights = eights[..., np.argsort(AWQ_ORDER)]
    flat = eights.reshape(len(words), -1).astype(np.int32)
    np.testing.assert_array_equal(flat if method == "awq" else flat.T, made.numbers)
    assert np.abs(made.weight - weight).max() <= 0.51 * made.scales.astype(np.float32).max()


# ------------------------------------------------------------------------------------------------- checkpoints


def test_a_checkpoint_in_4_bits_answers_as_its_rounded_weights_do(stored: tuple[Path, Path], tmp_path: Path) -> None:
    quantised, plain = stored
    model = spec_from_checkpoint(quantised, "int4")
    exact = Int4Settings(accuracy_level=1)  # 4 rounds activations too, which is another question
    decoder_from_checkpoint(quantised, tmp_path / "int4", model.decoder, INT4, int4=exact)
    reference = LlavaForConditionalGeneration.from_pretrained(plain, dtype=torch.float32).eval()
    for count in (0, 1, 24):
        prompt = prompt_of(count)
        found, wanted = logits_of(tmp_path / "int4", prompt), reference_logits(reference, prompt)
        assert np.abs(found - wanted).max() < 0.03 * wanted.std()  # the head is in 8 bits
        np.testing.assert_array_equal(found.argmax(-1), wanted.argmax(-1))
    decoder = GenaiDecoder(tmp_path / "int4", model.decoder, provider="cpu", threads=1)
    assert list(decoder.stream(prompt_of(24), SamplingSettings(max_new_tokens=12))) == reference_tokens(
        reference, prompt_of(24), 12
    )
    decoder.close()
    floats = sum(value.numel() * 4 for name, value in load_file(plain / "model.safetensors").items() if "proj" in name)
    assert (tmp_path / "int4" / "model.onnx.data").stat().st_size < 0.3 * floats


def test_settings_of_a_checkpoint_are_its_own(stored: tuple[Path, Path]) -> None:
    quantised, plain = stored
    method = quantised.name
    assert int4_settings(quantised, INT4) == Int4Settings(algorithm=method, block_size=32)  # type: ignore[arg-type]
    asked = Int4Settings(accuracy_level=1, block_size=128)
    assert int4_settings(quantised, INT4, asked) == Int4Settings(  # type: ignore[arg-type]
        algorithm=method, block_size=32, accuracy_level=1
    )
    assert int4_settings(plain, INT4) == Int4Settings() and int4_settings(plain, FP32) is None
    assert int4_settings(quantised, None) is None
    with pytest.raises(UsageError, match=rf"are of 4 bits \({method}\); the embedded decoder can only be int4"):
        int4_settings(quantised, FP32)
    with pytest.raises(UsageError, match="'k_quant' cannot round them again"):
        int4_settings(quantised, INT4, Int4Settings(algorithm="k_quant"))
    with pytest.raises(UsageError, match=f"is not quantised: '{method}' stands for"):
        int4_settings(plain, INT4, Int4Settings(algorithm=method))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("method", "entries", "said"),
    [
        ("awq", {"bits": 8}, "it has 8 bits"),
        ("awq", {"group_size": -1}, "-1 weights share a scale"),
        ("awq", {"version": "gemv"}, "laid out as 'gemv'"),
        ("awq", {"zero_point": False}, "no zero points"),
        ("awq", {"quant_method": "bitsandbytes"}, "quantised by 'bitsandbytes'"),
        ("gptq", {"desc_act": True}, "no neighbours"),
        ("gptq", {"checkpoint_format": "gptq_v2"}, "layout is 'gptq_v2'"),
        ("gptq", {"dynamic": {"+:.*down.*": {"bits": 8}}}, "differ in bits or group size"),
    ],
)
def test_what_the_builder_would_read_wrongly(
    method: Method, entries: dict[str, Any], said: str, source: Path, tmp_path: Path
) -> None:
    quantised, _ = quantised_checkpoint(source, tmp_path / "made", method)
    other = changed(quantised, tmp_path / "other", **entries)
    with pytest.raises(UnsupportedModelError, match=re.escape(said)) as caught:
        int4_settings(other, INT4)
    assert "--no-decoder" in caught.value.hint


def test_entries_that_may_be_missing(source: Path, tmp_path: Path) -> None:
    quantised, _ = quantised_checkpoint(source, tmp_path / "made", "awq")
    bare = changed(quantised, tmp_path / "bare", version=None, zero_point=None, modules_to_not_convert=None)
    assert int4_settings(bare, INT4) == Int4Settings(algorithm="awq")


def test_qwen_in_4_bits_is_refused(tmp_path: Path) -> None:
    other = changed(checkpoint_of("qwen2_5_vl"), tmp_path / "qwen", quant_method="awq", bits=4, group_size=32)
    with pytest.raises(UnsupportedModelError, match=r"loads Qwen2\.5-VL's language model as float only"):
        int4_settings(other, INT4)


def test_layers_left_in_float_and_damaged_ones(stored: tuple[Path, Path], tmp_path: Path) -> None:
    quantised, plain = stored
    settings = int4_settings(quantised, INT4)
    assert settings is not None
    tensors = load_file(quantised / "model.safetensors")
    stem = next(name.removesuffix(".qweight") for name in tensors if name.endswith("down_proj.qweight"))
    floats = load_file(plain / "model.safetensors")
    parts = {name: value for name, value in tensors.items() if name.startswith(f"{stem}.")}

    def told(change: dict[str, Any], drop: tuple[str, ...] = ()) -> None:
        folder = tmp_path / f"case{len(list(tmp_path.iterdir()))}"
        shutil.copytree(quantised, folder)
        kept = {name: value for name, value in (tensors | change).items() if name not in drop}
        save_file(kept, folder / "model.safetensors")
        check_stored_int4(language_tensors(folder), settings)

    told({})
    with pytest.raises(UnsupportedModelError, match=r"down_proj' was left in float"):
        told({f"{stem}.weight": floats[f"{stem}.weight"]}, drop=tuple(parts))
    with pytest.raises(CheckpointError, match=r"down_proj' has no qzeros"):
        told({}, drop=(f"{stem}.qzeros",))
    with pytest.raises(CheckpointError, match="with groups of 32"):
        told({f"{stem}.scales": tensors[f"{stem}.scales"][::2].contiguous()})


def test_only_float_weights_are_read_elsewhere(stored: tuple[Path, Path]) -> None:
    quantised, plain = stored
    refuse_quantized(model_config(plain), "plain", "x")
    with pytest.raises(UnsupportedModelError, match=rf"'q' are quantised \({quantised.name}\); x reads float ones"):
        refuse_quantized(model_config(quantised), "q", "x")


# ------------------------------------------------------------------------------------------------- the builder


@pytest.mark.parametrize(
    ("settings", "version", "prefix", "values"),
    [
        (Int4Settings(), "0.18.0", "", ("default", 32, 4)),
        (Int4Settings(), "0.15.0", "", ("default", 32, 4)),
        (Int4Settings(), "0.14.1", "int4_", ("default", 32, 4)),
        (Int4Settings(algorithm="k_quant", block_size=16), "0.11.4", "int4_", ("k_quant", 16, 4)),
        (Int4Settings(algorithm="k_quant_last"), "0.11.0", "int4_", ("k_quant_last", 32, 4)),
        (Int4Settings(algorithm="awq", block_size=128, accuracy_level=0), "0.18.0", "", ("k_quant_last", 128, 0)),
    ],
)
def test_words_of_each_version(settings: Int4Settings, version: str, prefix: str, values: tuple[str, int, int]) -> None:
    names = ("algo_config", "block_size", "accuracy_level")
    wanted = tuple(f"{prefix}{name}={value}" for name, value in zip(names, values, strict=True))
    assert builder_options(settings, version) == wanted


def test_a_builder_that_would_take_another_algorithm_is_refused() -> None:
    with pytest.raises(EnvironmentFaultError, match=r"0\.11\.0 does not know 'k_quant'"):
        builder_options(Int4Settings(algorithm="k_quant"), "0.11.0")


def test_odd_groups_are_refused_before_the_builder(source: Path) -> None:
    with pytest.raises(UsageError, match="192 inputs are 3 groups"):
        int4_settings(source, INT4, Int4Settings(algorithm="k_quant", block_size=64))
    assert int4_settings(source, INT4, Int4Settings(algorithm="k_quant", block_size=32)) is not None
    assert int4_settings(source, INT4, Int4Settings(block_size=64)) is not None


@pytest.mark.parametrize(
    ("algorithm", "head"),
    [
        ("k_quant_last", 8),
        pytest.param("rtn", 4, marks=pytest.mark.slow),
        pytest.param("k_quant", 4, marks=pytest.mark.slow),
    ],
)
def test_the_graph_is_rounded_as_asked(algorithm: str, head: int, source: Path, tmp_path: Path) -> None:
    model = spec_from_checkpoint(source, "int4")
    asked = Int4Settings(algorithm=algorithm, block_size=16, accuracy_level=1)  # type: ignore[arg-type]
    decoder_from_checkpoint(source, tmp_path / "decoder", model.decoder, INT4, int4=asked)
    graph = onnx.load(str(tmp_path / "decoder" / "model.onnx"), load_external_data=False).graph
    products = {
        node.name: {item.name: item.i for item in node.attribute}
        for node in graph.node
        if node.op_type == "MatMulNBits"
    }
    assert len(products) >= 9 and not [node.name for node in graph.node if node.op_type == "MatMul"]
    assert {item["block_size"] for item in products.values()} == {16}
    assert {item["accuracy_level"] for item in products.values()} == {1}
    bits = {("lm_head" in name): item["bits"] for name, item in products.items()}
    assert bits == {False: 4, True: head}
