"""The GGUF file of a language model: its tensors beside the checkpoint's, its metadata, and what is refused."""

from __future__ import annotations

import errno
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from checkpoints import TinyLlava, write_checkpoint
from family_checkpoints import write_family
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from holov_export.decoder_files import RECORD, DecoderFolder, read_decoder, verify_decoder
from holov_export.errors import (
    CheckFailedError,
    CheckpointError,
    MissingExtraError,
    StorageError,
    UnknownNameError,
    UnsupportedModelError,
)
from holov_export.export import decoder_gguf, gguf_tensors
from holov_export.export.checkpoint import spec_from_checkpoint
from holov_export.export.decoder_gguf import FILE, WEIGHTS, checked_config, gguf_from_checkpoint
from holov_export.export.decoder_weights import language_key
from holov_export.export.gguf_tensors import rope_factors
from holov_export.spec import ModelSpec

HEADS = {"q_proj": 6, "k_proj": 2}


def file_of(decoder: DecoderFolder) -> tuple[dict[str, Any], dict[str, Any]]:
    """(metadata, tensors) by name."""
    reader = gguf.GGUFReader(decoder.main)
    return {key: field.contents() for key, field in reader.fields.items()}, {item.name: item for item in reader.tensors}


def values_of(item: Any) -> np.ndarray:
    shape = tuple(int(axis) for axis in reversed(item.shape))
    return gguf.quants.dequantize(item.data, item.tensor_type).reshape(shape)


def language_of(checkpoint: Path) -> dict[str, torch.Tensor]:
    tensors = load_file(checkpoint / "model.safetensors")
    return {name: value for key, value in tensors.items() if (name := language_key(key)) is not None}


def changed(checkpoint: Path, target: Path, dtype: torch.dtype | None = None, **text: object) -> Path:
    """A copy with weights of another type and other settings of its language model."""
    shutil.copytree(checkpoint, target)
    if dtype is not None:
        tensors = {key: value.to(dtype) for key, value in load_file(target / "model.safetensors").items()}
        save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((target / "config.json").read_text())
    config["text_config"].update(text)
    (target / "config.json").write_text(json.dumps(config))
    return target


# ------------------------------------------------------------------------------------------------------- tensors


def test_every_weight_is_in_the_file(llava_checkpoint: Path, llava_spec: ModelSpec, tmp_path: Path) -> None:
    decoder = gguf_from_checkpoint(llava_checkpoint, llava_spec, tmp_path / "llamacpp", "f32")
    _, found = file_of(decoder)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, llava_spec.decoder.layers)
    original = language_of(llava_checkpoint)
    assert len(found) == len(original) == 3 + 9 * llava_spec.decoder.layers
    for key, tensor in original.items():
        values = values_of(found[names.get_name(key, try_suffixes=(".weight",))])
        for part, heads in HEADS.items():
            if f".{part}." in key:  # pair by pair, as transformers' halves of each head
                values = np.stack([values.reshape(heads, 8, 2, 96)[:, :, side] for side in (0, 1)], axis=1)
                values = values.reshape(heads * 16, 96)
        assert np.array_equal(values, tensor.numpy()), key


@pytest.mark.parametrize(("weights", "kind"), [("f16", "F16"), ("bf16", "BF16"), ("q8_0", "Q8_0")])
def test_matrices_are_rounded_and_vectors_are_not(
    llava_checkpoint: Path, llava_spec: ModelSpec, tmp_path: Path, weights: str, kind: str
) -> None:
    decoder = gguf_from_checkpoint(llava_checkpoint, llava_spec, tmp_path / "llamacpp", weights)
    metadata, found = file_of(decoder)
    assert metadata["general.file_type"] == WEIGHTS[weights]
    kinds = {name: item.tensor_type.name for name, item in found.items()}
    assert {kinds[name] for name in kinds if "norm" in name} == {"F32"}
    assert {kinds[name] for name in kinds if "norm" not in name} == {kind}
    head = language_of(llava_checkpoint)["lm_head.weight"].numpy()
    assert np.abs(values_of(found["output.weight"]) - head).max() < np.abs(head).max() / 100
    if weights == "f16":
        assert np.array_equal(values_of(found["output.weight"]), head.astype(np.float16).astype(np.float32))


def test_blocks_of_rows_give_the_same_file(
    llava_checkpoint: Path, llava_spec: ModelSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = gguf_from_checkpoint(llava_checkpoint, llava_spec, tmp_path / "whole", "q8_0")
    monkeypatch.setattr(gguf_tensors, "_BLOCK", 1000)
    parts = gguf_from_checkpoint(llava_checkpoint, llava_spec, tmp_path / "parts", "q8_0")
    assert whole.main.read_bytes() == parts.main.read_bytes()


def test_bfloat16_stays_as_it_is(llava_checkpoint: Path, llava_spec: ModelSpec, tmp_path: Path) -> None:
    checkpoint = changed(llava_checkpoint, tmp_path / "bf16", torch.bfloat16)
    _, found = file_of(gguf_from_checkpoint(checkpoint, llava_spec, tmp_path / "llamacpp", "bf16"))
    head = language_of(checkpoint)["lm_head.weight"]
    assert np.array_equal(found["output.weight"].data.view(np.uint16), head.view(torch.uint16).numpy())


def test_rows_that_blocks_of_32_do_not_fill_stay_float16(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "odd", TinyLlava(mlp=150, layers=1, tied=True))
    spec = spec_from_checkpoint(checkpoint, "odd")
    _, found = file_of(gguf_from_checkpoint(checkpoint, spec, tmp_path / "llamacpp", "q8_0"))
    assert found["blk.0.ffn_down.weight"].tensor_type.name == "F16"
    assert found["blk.0.ffn_up.weight"].tensor_type.name == "Q8_0"
    assert "output.weight" not in found, "the embedding table is the head"


def test_values_that_float16_cannot_hold(llava_checkpoint: Path, llava_spec: ModelSpec, tmp_path: Path) -> None:
    checkpoint = changed(llava_checkpoint, tmp_path / "large")
    tensors = load_file(checkpoint / "model.safetensors")
    key = next(key for key in tensors if "lm_head" in key)
    tensors[key][3, 5] = 1e5
    save_file(tensors, checkpoint / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UnsupportedModelError, match=r"'lm_head\.weight' has values that float16") as caught:
        gguf_from_checkpoint(checkpoint, llava_spec, tmp_path / "llamacpp", "f16")
    assert "bf16" in caught.value.hint
    assert not (tmp_path / "llamacpp").exists()


# ------------------------------------------------------------------------------------------------------- metadata


def test_metadata_and_record(llava_checkpoint: Path, llava_spec: ModelSpec, tmp_path: Path) -> None:
    said: list[str] = []
    folder = tmp_path / "bundle" / "decoders" / "llamacpp"
    decoder = gguf_from_checkpoint(llava_checkpoint, llava_spec, folder, "f32", tell=said.append)
    metadata, _ = file_of(decoder)
    wanted = {
        "general.architecture": "llama",
        "general.name": llava_spec.name,
        "tokenizer.ggml.model": "no_vocab",
        "llama.vocab_size": 416,
        "llama.context_length": 512,
        "llama.embedding_length": 96,
        "llama.block_count": 3,
        "llama.feed_forward_length": 160,
        "llama.attention.head_count": 6,
        "llama.attention.head_count_kv": 2,
        "llama.attention.key_length": 16,
        "llama.rope.dimension_count": 16,
        "llama.rope.freq_base": 10000.0,
        "llama.attention.layer_norm_rms_epsilon": pytest.approx(1e-5),
    }
    assert {key: metadata[key] for key in wanted} == wanted
    record = read_decoder(folder, "llamacpp").record
    assert record == decoder.record
    assert (record.width, record.vocab_size, record.weights, record.main) == (96, 416, "f32", FILE)
    assert [item.path for item in record.files] == [FILE] == [p.name for p in folder.iterdir() if p.name != RECORD]
    verify_decoder(decoder)
    assert said == ["writing 30 tensors as F32", "hashing"]


def test_qwen_has_sections_and_biases_and_no_pairs(tmp_path: Path) -> None:
    checkpoint = write_family(tmp_path / "qwen", "qwen2_5_vl", layers=1)
    spec = spec_from_checkpoint(checkpoint, "qwen")
    metadata, found = file_of(gguf_from_checkpoint(checkpoint, spec, tmp_path / "llamacpp", "f32"))
    arch = metadata["general.architecture"]
    assert metadata[f"{arch}.rope.dimension_sections"] == [4, 6, 6, 0]
    assert metadata[f"{arch}.rope.freq_base"] == 1e6
    assert metadata[f"{arch}.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-6)
    original = language_of(checkpoint)
    for part in ("q", "k", "v"):
        for what in ("weight", "bias"):
            ours = values_of(found[f"blk.0.attn_{part}.{what}"])
            assert np.array_equal(ours, original[f"model.layers.0.self_attn.{part}_proj.{what}"].numpy())


ROPES: dict[str, dict[str, object]] = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
}


@pytest.mark.parametrize("kind", ROPES)
def test_scaled_rotary_angles(kind: str, llava_checkpoint: Path, llava_spec: ModelSpec, tmp_path: Path) -> None:
    rope = {"rope_theta": 500.0, **ROPES[kind]}
    checkpoint = changed(llava_checkpoint, tmp_path / kind, rope_parameters=rope)
    metadata, found = file_of(gguf_from_checkpoint(checkpoint, llava_spec, tmp_path / "llamacpp", "f16"))
    assert metadata["llama.rope.freq_base"] == 500.0
    if kind == "llama3":
        assert "llama.rope.scaling.type" not in metadata
        config = LlamaConfig(hidden_size=96, num_attention_heads=6, rope_parameters=rope)
        scaled = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")[0].numpy()
        plain = 500.0 ** -(np.arange(0, 16, 2) / 16)
        assert np.allclose(plain / values_of(found["rope_freqs.weight"]), scaled, rtol=1e-6)
        assert len({*np.round(plain / scaled, 3).tolist()} - {1.0, 8.0}) >= 1, "some are blended"
        return
    assert metadata["llama.rope.scaling.type"] == kind
    assert metadata["llama.rope.scaling.factor"] == 4.0
    if kind == "yarn":
        assert metadata["llama.rope.scaling.original_context_length"] == 128
        assert metadata["llama.rope.scaling.yarn_beta_fast"] == 32.0


def test_plain_rotary_angles_have_no_factors() -> None:
    assert rope_factors({"rope_type": "default", "rope_theta": 10000.0}, 16) is None


# ------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("text", "error", "words"),
    [
        ({"model_type": "qwen3"}, UnsupportedModelError, "is a 'qwen3'"),
        ({"model_type": "mistral", "sliding_window": 64}, UnsupportedModelError, "the last 64 tokens"),
        ({"hidden_act": "gelu"}, UnsupportedModelError, "activation is 'gelu'"),
        ({"num_hidden_layers": 2}, CheckpointError, "of another model"),
        ({"intermediate_size": 161}, CheckpointError, "of another model"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, UnsupportedModelError, "scaled by 'dynamic'"),
        (
            {"rope_parameters": {**ROPES["yarn"], "attention_factor": 1.5}},
            UnsupportedModelError,
            "the setting 'attention_factor'",
        ),
        ({"rope_parameters": {**ROPES["yarn"], "truncate": False}}, UnsupportedModelError, "the setting 'truncate'"),
    ],
)
def test_configurations_that_llama_cpp_would_read_otherwise(
    text: dict[str, object],
    error: type[Exception],
    words: str,
    llava_checkpoint: Path,
    llava_spec: ModelSpec,
    tmp_path: Path,
) -> None:
    checkpoint = changed(llava_checkpoint, tmp_path / "other", **text)
    with pytest.raises(error, match=words):
        checked_config(checkpoint, llava_spec.decoder)


@pytest.mark.parametrize(
    ("key", "value", "error", "words"),
    [
        ("layers.1.self_attn.v_proj.weight", None, CheckpointError, "lacks 'model.layers.1.self_attn.v_proj.weight'"),
        ("norm.weight", torch.ones(95), CheckpointError, r"has the shape \(95,\)"),
        ("norm.weight", torch.ones(96, dtype=torch.float64), UnsupportedModelError, "stored as F64"),
        ("layers.0.self_attn.q_norm.weight", torch.ones(16), UnsupportedModelError, "llama.cpp's 'llama' has none"),
    ],
)
def test_tensors_that_do_not_fit(
    key: str,
    value: torch.Tensor | None,
    error: type[Exception],
    words: str,
    llava_checkpoint: Path,
    llava_spec: ModelSpec,
    tmp_path: Path,
) -> None:
    checkpoint = changed(llava_checkpoint, tmp_path / "other")
    tensors = load_file(checkpoint / "model.safetensors")
    name = next(name for name in tensors if name.endswith("model.norm.weight")).replace("norm.weight", key)
    tensors.pop(name, None)
    if value is not None:
        tensors[name] = value
    save_file(tensors, checkpoint / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(error, match=words):
        gguf_from_checkpoint(checkpoint, llava_spec, tmp_path / "llamacpp", "f16")


def test_weights_and_packages_that_are_not_there(
    llava_checkpoint: Path, llava_spec: ModelSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UnknownNameError, match="unknown weights 'int4'") as caught:
        gguf_from_checkpoint(llava_checkpoint, llava_spec, tmp_path / "llamacpp", "int4")
    assert "q4_k_m" in caught.value.hint
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    with pytest.raises(MissingExtraError, match="'llama_cpp' is not installed"):
        gguf_from_checkpoint(llava_checkpoint, llava_spec, tmp_path / "llamacpp", "q4_0")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(MissingExtraError, match="'gguf' is not installed"):
        gguf_from_checkpoint(llava_checkpoint, llava_spec, tmp_path / "llamacpp", "f16")


def test_a_full_disk_leaves_the_decoder_that_is_there(
    llava_checkpoint: Path, llava_spec: ModelSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = gguf_from_checkpoint(llava_checkpoint, llava_spec, tmp_path / "llamacpp", "f32")

    def full(tensor: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(decoder_gguf, "data_from_tensor", full)
    with pytest.raises(StorageError, match="the disk is full"):
        gguf_from_checkpoint(llava_checkpoint, llava_spec, tmp_path / "llamacpp", "f16")
    assert read_decoder(tmp_path / "llamacpp", "llamacpp").record == before.record
    verify_decoder(before)
    assert [path.name for path in tmp_path.iterdir()] == ["llamacpp"]


# ------------------------------------------------------------------------------------- llama.cpp's own quantizer


@pytest.mark.slow
def test_blocks_of_8_bits_are_those_of_llama_cpp(llava_checkpoint: Path, llava_spec: ModelSpec, tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp", reason="scripts/check_llamacpp brings it")
    ours = gguf_from_checkpoint(llava_checkpoint, llava_spec, tmp_path / "ours", "q8_0")
    whole = gguf_from_checkpoint(llava_checkpoint, llava_spec, tmp_path / "whole", "f32")
    decoder_gguf._quantize(whole.main, tmp_path / "theirs.gguf", "q8_0")
    theirs = {item.name: item for item in gguf.GGUFReader(tmp_path / "theirs.gguf").tensors}
    _, found = file_of(ours)
    assert set(found) == set(theirs)
    for name, item in found.items():
        assert item.tensor_type == theirs[name].tensor_type
        assert np.array_equal(item.data, theirs[name].data), name


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["q4_0", "q4_k_m"])
def test_weights_of_4_bits(weights: str, llava_checkpoint: Path, llava_spec: ModelSpec, tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp", reason="scripts/check_llamacpp brings it")
    decoder = gguf_from_checkpoint(llava_checkpoint, llava_spec, tmp_path / "llamacpp", weights)
    assert [path.name for path in sorted(decoder.folder.iterdir())] == [RECORD, FILE]
    assert decoder.record.commands[0][-3:] == ("language-F16.gguf", FILE, str(WEIGHTS[weights]))
    whole = gguf_from_checkpoint(llava_checkpoint, llava_spec, tmp_path / "whole", "f16")
    assert decoder.main.stat().st_size < 0.55 * whole.main.stat().st_size
    verify_decoder(decoder)


@pytest.mark.slow
def test_what_the_quantizer_says_when_it_fails(tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp", reason="scripts/check_llamacpp brings it")
    (tmp_path / "source.gguf").write_bytes(b"GGUF" + bytes(64))
    with pytest.raises(CheckFailedError, match=r"quantizer failed \(exit status 1\)"):
        decoder_gguf._quantize(tmp_path / "source.gguf", tmp_path / "target.gguf", "q4_0")
