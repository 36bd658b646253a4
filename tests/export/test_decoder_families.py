"""Decoders of Mistral and of Qwen2.5-VL's language model: names of weights, what is written and refused, parity."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from decoder_families import NAMES, checkpoint_of, decoder_of, spec_of
from safetensors.torch import load_file, save_file
from toys import write_toy_bundle
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from holov_export.bundle import Bundle
from holov_export.errors import CheckpointError, UnsupportedModelError
from holov_export.export import decoder_language
from holov_export.export.decoder_language import check_language_model, write_checkpoint
from holov_export.export.decoder_onnx import decoder_from_checkpoint
from holov_export.export.decoder_weights import EMBEDDING, HEAD, language_key, language_tensors
from holov_export.spec import DecoderPrecision, ModelSpec
from holov_export.verify import answers
from holov_export.verify.answers import compare_decoder, default_prompts

#: several exports; scripts/test-slow runs them
pytestmark = pytest.mark.slow

CLASSES = {
    "llava_next": "LlamaForCausalLM",
    "llava_next_mistral": "MistralForCausalLM",
    "qwen2_5_vl": "Qwen2_5_VLForConditionalGeneration",
    "qwen2_5_vl_tied": "Qwen2_5_VLForConditionalGeneration",
    "video_llava": "LlamaForCausalLM",
}


# ------------------------------------------------------------------------------------------------------- weights


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("model.embed_tokens.weight", EMBEDDING),  # Qwen's on the hub
        ("model.layers.0.self_attn.q_proj.bias", "model.layers.0.self_attn.q_proj.bias"),
        ("model.norm.weight", "model.norm.weight"),
        ("lm_head.weight", HEAD),
        ("visual.blocks.0.attn.qkv.weight", None),
        ("visual.merger.mlp.0.weight", None),
        ("model.language_model.layers.1.self_attn.k_proj.bias", "model.layers.1.self_attn.k_proj.bias"),
        ("model.visual.blocks.0.norm1.weight", None),
        ("language_model.model.layers.2.mlp.up_proj.weight", "model.layers.2.mlp.up_proj.weight"),
        ("image_tower.vision_model.encoder.layers.0.mlp.fc1.weight", None),
        ("video_tower.vision_model.encoder.layers.0.mlp.fc1.weight", None),
        ("model.video_tower.encoder.layers.0.mlp.fc1.weight", None),
        ("model.image_newline", None),
    ],
)
def test_names_of_the_families(key: str, name: str | None) -> None:
    assert language_key(key) == name


@pytest.mark.parametrize("style", ["hub", "model.language_model", "language_model.model"])
def test_every_layout_of_qwen_gives_the_same_tensors(style: str, tmp_path: Path) -> None:
    original = load_file(checkpoint_of("qwen2_5_vl") / "model.safetensors")
    assert "model.embed_tokens.weight" in original, "transformers writes the hub's layout"
    tensors = dict(original)
    if style != "hub":
        inside, head = {
            "model.language_model": ("model.language_model.", "lm_head."),
            "language_model.model": ("language_model.model.", "language_model.lm_head."),
        }[style]
        tensors = {
            key.replace("model.", inside, 1).replace("lm_head.", head, 1).replace("visual.", "model.visual.", 1): value
            for key, value in original.items()
        }
    save_file(tensors, tmp_path / "model.safetensors")
    found = language_tensors(tmp_path)
    assert set(found) == {key for key in original if not key.startswith("visual.")}
    assert found[HEAD].shape == tuple(original[HEAD].shape)


@pytest.mark.parametrize("name", NAMES)
def test_the_language_model_is_copied_bit_by_bit(name: str, tmp_path: Path) -> None:
    source, out = checkpoint_of(name), tmp_path / "language"
    write_checkpoint(source, out, language_tensors(source))
    kind = AutoModelForImageTextToText if name.startswith("qwen") else AutoModelForCausalLM
    copied = kind.from_pretrained(out, dtype="auto")
    assert type(copied).__name__ == CLASSES[name]
    state = copied.state_dict()
    inside = "model.language_model." if name.startswith("qwen") else "model."
    wanted = {language_key(key): value for key, value in load_file(source / "model.safetensors").items()}
    del wanted[None]
    found = {key.replace(inside, "model.", 1): value for key, value in state.items() if "visual" not in key}
    if HEAD not in wanted:
        assert torch.equal(found.pop(HEAD), wanted[EMBEDDING])
        assert copied.get_output_embeddings().weight is copied.get_input_embeddings().weight
    assert set(found) == set(wanted)
    assert all(torch.equal(found[key], value) for key, value in wanted.items())
    tower = sum(value.numel() for key, value in state.items() if "visual" in key)
    assert tower < 15_000, "the tower of no layers is nearly nothing"


# ----------------------------------------------------------------------------------------------------- the build


@pytest.mark.parametrize("name", NAMES)
def test_graphs(name: str) -> None:
    folder, spec = decoder_of(name), spec_of(name).decoder
    graph = onnx.load(folder / "model.onnx", load_external_data=False).graph
    inputs = {item.name: [axis.dim_value for axis in item.type.tensor_type.shape.dim] for item in graph.input}
    assert inputs["inputs_embeds"][-1] == spec.width
    assert sum(key.startswith("past_key_values.") for key in inputs) == 2 * spec.layers
    kinds = {node.op_type for node in graph.node}
    if spec.mrope_sections:
        assert inputs["position_ids"] == [3, 0, 0]
        assert "MRotaryEmbedding" in kinds
        sections = {
            tuple(attribute.ints)
            for node in graph.node
            for attribute in node.attribute
            if attribute.name == "mrope_section"
        }
        assert sections == {spec.mrope_sections}
        assert not (folder / "genai_config.json").exists()
    else:
        assert "position_ids" not in inputs
        config = json.loads((folder / "genai_config.json").read_text())["model"]
        assert config["type"] == "phi3v"
        assert config["eos_token_id"] == list(spec.eos_token_ids)
        assert "sliding_window" not in config["decoder"]
    windows = {
        attribute.i for node in graph.node for attribute in node.attribute if attribute.name == "local_window_size"
    }
    assert windows <= {-1}


# ------------------------------------------------------------------------------------------------------- refusals


def changed(name: str, tmp_path: Path, **text: object) -> Path:
    """A copy of the checkpoint with other fields in its text_config; without weights."""
    config = json.loads((checkpoint_of(name) / "config.json").read_text())
    config["text_config"].update(text)
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


@pytest.mark.parametrize("name", NAMES)
def test_what_is_exported_is_not_refused(name: str) -> None:
    check_language_model(checkpoint_of(name), spec_of(name).decoder)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("llava_next_mistral", {"sliding_window": 512}, "attends to the last 512 tokens"),
        ("qwen2_5_vl", {"use_sliding_window": True, "sliding_window": 64}, "attends to the last 64 tokens"),
        ("qwen2_5_vl", {"hidden_size": 80}, "heads are 20 wide"),
        ("llava_next_mistral", {"head_dim": 12}, "heads are 12 wide"),
        ("qwen2_5_vl", {"intermediate_size": 448}, r"'mlp\.gate_proj' is as wide as the vocabulary"),
        ("llava_next", {"model_type": "qwen2"}, "is a 'qwen2'; the embedded decoder is built for llama, mistral, qwen"),
    ],
)
def test_language_models_that_would_be_wrong(name: str, text: dict[str, object], message: str, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match=message) as caught:
        check_language_model(changed(name, tmp_path, **text), spec_of(name).decoder)
    assert "--no-decoder" in caught.value.hint


def test_a_window_that_no_sequence_outgrows_is_none(tmp_path: Path) -> None:
    source = checkpoint_of("llava_next_mistral")
    wide = changed("llava_next_mistral", tmp_path, sliding_window=2304)
    check_language_model(wide, spec_of("llava_next_mistral").decoder)
    write_checkpoint(wide, tmp_path / "out", language_tensors(source))
    assert AutoConfig.from_pretrained(tmp_path / "out").sliding_window is None


def test_a_window_is_refused_late_as_well(tmp_path: Path) -> None:
    source = shutil.copytree(checkpoint_of("llava_next_mistral"), tmp_path / "windowed")
    changed("llava_next_mistral", source, sliding_window=512)
    with pytest.raises(UnsupportedModelError, match="attends to the last 512 tokens"):
        decoder_from_checkpoint(
            source, tmp_path / "decoder", spec_of("llava_next_mistral").decoder, DecoderPrecision.FP32
        )
    assert not list(tmp_path.glob(".language-model-*"))


# --------------------------------------------------------------------------------------------------------- parity


def bundle_of(name: str, tmp_path: Path, llava_spec: ModelSpec, llava_checkpoint: Path) -> Bundle:
    """A bundle whose vision graph is a toy of another model: only its decoder is asked."""
    toy = write_toy_bundle(tmp_path / "bundle", llava_spec, llava_checkpoint, decoder=decoder_of(name))
    shutil.copy(checkpoint_of(name) / "tokenizer.json", toy.tokenizer)
    plan = toy.manifest.plan.model_copy(update={"model": spec_of(name)})
    return replace(toy, manifest=toy.manifest.model_copy(update={"plan": plan}))


@pytest.mark.parametrize("name", NAMES)
def test_decoders_are_compared_with_transformers(
    name: str, tmp_path: Path, llava_spec: ModelSpec, llava_checkpoint: Path
) -> None:
    bundle = bundle_of(name, tmp_path, llava_spec, llava_checkpoint)
    comparison, reason = compare_decoder(bundle, checkpoint_of(name))
    assert comparison is not None, reason
    prompts = 4 if spec_of(name).video.kind != "none" else 3
    assert (comparison.prompts, comparison.identical, comparison.passed) == (prompts, prompts, True)
    other = shutil.copytree(checkpoint_of(name), tmp_path / "other")
    tensors = load_file(other / "model.safetensors")
    key = next(key for key in tensors if key.endswith("layers.1.self_attn.v_proj.weight") and "tower" not in key)
    save_file({**tensors, key: -tensors[key]}, other / "model.safetensors", metadata={"format": "pt"})
    wrong, _ = compare_decoder(bundle, other)
    assert wrong is not None
    assert not wrong.passed


def test_a_lost_bias_is_found(tmp_path: Path, llava_spec: ModelSpec, llava_checkpoint: Path) -> None:
    bundle = bundle_of("qwen2_5_vl", tmp_path, llava_spec, llava_checkpoint)
    other = shutil.copytree(checkpoint_of("qwen2_5_vl"), tmp_path / "other")
    tensors = load_file(other / "model.safetensors")
    key = "model.layers.2.self_attn.k_proj.bias"
    save_file({**tensors, key: tensors[key] * 0}, other / "model.safetensors", metadata={"format": "pt"})
    comparison, _ = compare_decoder(bundle, other)
    assert comparison is not None
    assert not comparison.passed


def test_prompts_of_qwen_have_the_positions_of_pruned_pictures(
    tmp_path: Path, llava_spec: ModelSpec, llava_checkpoint: Path
) -> None:
    bundle = bundle_of("qwen2_5_vl", tmp_path, llava_spec, llava_checkpoint)
    table = language_tensors(checkpoint_of("qwen2_5_vl"))[EMBEDDING]
    prompts = default_prompts(bundle, table, 8)
    assert [prompt.counts for prompt in prompts] == [(16,), (16, 16), (), (16,)]
    for prompt in prompts:
        assert prompt.position_ids is not None
        assert prompt.next_position is not None
        seen = prompt.input_ids == prompt.image_token_id
        assert (prompt.position_ids[0] == prompt.position_ids[1]).all() == (not seen.any())
        np.testing.assert_array_equal(prompt.position_ids[0, ~seen], prompt.position_ids[2, ~seen])
        assert prompt.next_position == prompt.position_ids[0, -1] + 1


def test_genai_is_needed_only_where_it_is_used(
    tmp_path: Path, llava_spec: ModelSpec, llava_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answers, "is_installed", lambda name: name != "onnxruntime_genai")
    bundle = bundle_of("qwen2_5_vl", tmp_path, llava_spec, llava_checkpoint)
    assert compare_decoder(bundle, checkpoint_of("qwen2_5_vl"))[0] is not None
    plan = bundle.manifest.plan.model_copy(update={"model": spec_of("llava_next")})
    other = replace(bundle, manifest=bundle.manifest.model_copy(update={"plan": plan}))
    assert compare_decoder(other, checkpoint_of("llava_next")) == (None, "not installed: onnxruntime_genai")


def test_a_configuration_that_does_not_load(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "qwen2_5_vl", "text_config": {"hidden_size": "wide"}}')
    with pytest.raises(CheckpointError, match=r"config\.json of .* does not load"):
        check_language_model(tmp_path, spec_of("qwen2_5_vl").decoder)
    assert set(decoder_language.ARCHITECTURES) == {"llama", "mistral", "qwen2_5_vl_text"}
