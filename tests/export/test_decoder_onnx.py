"""Building the GenAI decoder: the weights' names, the graphs, the configuration, and what is refused."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from checkpoints import TinyLlava, write_checkpoint
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlavaForConditionalGeneration

from holov_export.errors import CheckFailedError, CheckpointError, UnsupportedModelError, UsageError
from holov_export.export import decoder_language, decoder_onnx
from holov_export.export.checkpoint import spec_from_checkpoint
from holov_export.export.decoder_onnx import check_language_model, check_precision, decoder_from_checkpoint
from holov_export.export.decoder_weights import (
    EMBEDDING,
    HEAD,
    array_from_tensor,
    check_head_width,
    language_key,
    language_tensors,
    write_language_model,
)
from holov_export.runtime.decoder_genai import GenaiDecoder
from holov_export.spec import DecoderPrecision, ModelSpec
from holov_export.tensors import SamplingSettings, StitchedPrompt


def prompt_of(count: int, width: int = 96) -> StitchedPrompt:
    rows = (np.random.default_rng(count).standard_normal((count, width)) * 0.3).astype(np.float32)
    return StitchedPrompt(np.array([1, 20, *([3] * count), 40, 50], np.int64), rows, (count,), 3, "")


def genai_tokens(folder: Path, model: ModelSpec, count: int, length: int = 24) -> list[int]:
    decoder = GenaiDecoder(folder, model.decoder, provider="cpu", threads=1)
    return list(decoder.stream(prompt_of(count), SamplingSettings(max_new_tokens=length)))


def reference_tokens(checkpoint: Path, count: int, length: int = 24) -> list[int]:
    model = LlavaForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32).eval()
    prompt = prompt_of(count)
    ids = torch.from_numpy(prompt.input_ids)[None]
    with torch.no_grad():
        embeds = model.get_input_embeddings()(ids).clone()
        embeds[0, ids[0] == 3] = torch.from_numpy(prompt.rows)
        out = model.generate(
            inputs_embeds=embeds, attention_mask=torch.ones_like(ids), max_new_tokens=length, do_sample=False
        )
    return [token for token in out[0].tolist() if token != 2]


# ------------------------------------------------------------------------------------------------------- weights


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("language_model.model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.weight"),
        ("language_model.model.embed_tokens.weight", EMBEDDING),
        ("language_model.lm_head.weight", HEAD),
        ("model.language_model.embed_tokens.weight", EMBEDDING),
        ("model.language_model.norm.weight", "model.norm.weight"),
        ("model.language_model.model.norm.weight", "model.norm.weight"),
        ("model.language_model.lm_head.weight", HEAD),
        ("language_model.layers.3.self_attn.q_proj.weight", "model.layers.3.self_attn.q_proj.weight"),
        ("lm_head.weight", HEAD),
        ("model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.weight"),
        ("vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight", None),
        ("model.vision_tower.encoder.layers.0.mlp.fc1.weight", None),
        ("multi_modal_projector.linear_1.weight", None),
        ("model.multi_modal_projector.linear_1.weight", None),
        ("image_newline", None),
    ],
)
def test_names_of_every_transformers_version(key: str, name: str | None) -> None:
    assert language_key(key) == name


def renamed(checkpoint: Path, target: Path, style: str, dtype: torch.dtype = torch.float32, shards: int = 1) -> Path:
    """A copy of the checkpoint whose tensors have another version's names, another type, and lie in shards."""
    shutil.copytree(checkpoint, target)
    tensors = {key: value.to(dtype) for key, value in load_file(target / "model.safetensors").items()}
    (target / "model.safetensors").unlink()
    if style == "model.language_model":
        for key in list(tensors):
            new = key.replace("language_model.model.", "model.language_model.").replace(
                "language_model.lm_head", "lm_head"
            )
            new = new if key.startswith("language_model.") else f"model.{key}"
            tensors[new] = tensors.pop(key)
    names = sorted(tensors)
    weight_map = {}
    for shard in range(shards):
        part = {name: tensors[name] for name in names[shard::shards]}
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        save_file(part, target / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(part, file))
    (target / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return target


@pytest.mark.parametrize("style", ["language_model.model", "model.language_model"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_language_model_is_copied_bit_by_bit(
    llava_checkpoint: Path, tmp_path: Path, style: str, dtype: torch.dtype
) -> None:
    checkpoint = renamed(llava_checkpoint, tmp_path / "renamed", style, dtype, shards=3)
    out = tmp_path / "llama"
    decoder_language.write_checkpoint(checkpoint, out, language_tensors(checkpoint))
    copied = AutoModelForCausalLM.from_pretrained(out, dtype="auto")
    assert type(copied).__name__ == "LlamaForCausalLM"
    original = load_file(llava_checkpoint / "model.safetensors")
    state = copied.state_dict()
    wanted = {key.removeprefix("language_model."): value for key, value in original.items() if "language_model" in key}
    assert set(state) == set(wanted)
    assert all(torch.equal(state[key], wanted[key].to(dtype)) for key in wanted)


def test_embedding_table_is_read_as_stored(llava_checkpoint: Path, tmp_path: Path) -> None:
    checkpoint = renamed(llava_checkpoint, tmp_path / "bf16", "language_model.model", torch.bfloat16, shards=2)
    bits = array_from_tensor(language_tensors(checkpoint)[EMBEDDING])
    original = load_file(llava_checkpoint / "model.safetensors")["language_model.model.embed_tokens.weight"]
    assert bits.dtype == np.uint16
    assert np.array_equal(bits, original.bfloat16().view(torch.uint16).numpy())


def test_checkpoints_that_are_damaged(llava_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no safetensors"):
        language_tensors(tmp_path)
    whole = (llava_checkpoint / "model.safetensors").read_bytes()
    for content in (b"", b"pickle" * 9, whole[: len(whole) // 2], *map(with_header, HEADERS)):
        (tmp_path / "model.safetensors").write_bytes(content)
        with pytest.raises(CheckpointError, match=r"shard model\.safetensors is truncated or damaged"):
            language_tensors(tmp_path)
    save_file({"vision_tower.x": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="holds no language model"):
        language_tensors(tmp_path)


def with_header(header: bytes) -> bytes:
    """A safetensors file of a header and eight bytes of data."""
    return len(header).to_bytes(8, "little") + header + bytes(8)


HEADERS = (
    b'{"lm_head.weight": nonsense}',
    b"\xff\xfe",
    b"[]",
    b'["lm_head.weight"]',
    b'{"lm_head.weight": 3}',
    b'{"lm_head.weight": ["F32"]}',
    b'{"lm_head.weight": {"dtype": "F32"}}',
    b'{"lm_head.weight": {"dtype": "F32", "shape": [1], "data_offsets": [0]}}',
    b'{"lm_head.weight": {"dtype": "F32", "shape": 1, "data_offsets": [0, 4]}}',
    b'{"lm_head.weight": {"dtype": "F32", "shape": [3], "data_offsets": [0, 12]}}',
    b'{"lm_head.weight": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}}',
    b'{"lm_head.weight": {"dtype": "F32", "shape": [1], "data_offsets": [8, 4]}}',
    b'{"norm.weight": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}',
)


@pytest.mark.parametrize("header", HEADERS)
def test_damaged_shards_of_an_index(header: bytes, tmp_path: Path) -> None:
    """safetensors reads a single file's header, this module those that an index names; both say the same."""
    index = {"weight_map": {"lm_head.weight": "a.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "a.safetensors").write_bytes(with_header(header))
    with pytest.raises(CheckpointError, match=r"shard a\.safetensors is truncated or damaged"):
        language_tensors(tmp_path)


@pytest.mark.parametrize("file", ["../elsewhere.safetensors", "none.safetensors"])
def test_shards_that_an_index_names_and_that_are_not_there(file: str, tmp_path: Path) -> None:
    (tmp_path / "checkpoint").mkdir()
    save_file({"lm_head.weight": torch.zeros(1)}, tmp_path / "elsewhere.safetensors")
    index = {"weight_map": {"lm_head.weight": file}}
    (tmp_path / "checkpoint" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="is missing from the checkpoint"):
        language_tensors(tmp_path / "checkpoint")


def test_a_corrupt_index_and_pickles_are_refused_as_by_the_vision_tower(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(CheckpointError, match="only pickled weights"):
        language_tensors(tmp_path)
    for text in ("[]", "{", '{"weight_map": 3}'):
        (tmp_path / "model.safetensors.index.json").write_text(text)
        with pytest.raises(CheckpointError, match=r"model\.safetensors\.index\.json does not parse"):
            language_tensors(tmp_path)


def test_a_second_file_changes_nothing(llava_checkpoint: Path, tmp_path: Path) -> None:
    checkpoint = shutil.copytree(llava_checkpoint, tmp_path / "two")
    others = {key: value + 1 for key, value in load_file(checkpoint / "model.safetensors").items()}
    save_file(others, checkpoint / "zz-consolidated.safetensors")
    save_file({"language_model.model.layers.0.lora": torch.zeros(1)}, checkpoint / "adapter_model.safetensors")
    wanted, found = language_tensors(llava_checkpoint), language_tensors(checkpoint)
    assert list(found) == list(wanted)
    assert {tensor.shard.name for tensor in found.values()} == {"model.safetensors"}
    np.testing.assert_array_equal(array_from_tensor(found[EMBEDDING]), array_from_tensor(wanted[EMBEDDING]))


def test_shards_of_the_vision_tower_are_not_opened(llava_checkpoint: Path, tmp_path: Path) -> None:
    checkpoint = shutil.copytree(llava_checkpoint, tmp_path / "split")
    tensors = load_file(checkpoint / "model.safetensors")
    (checkpoint / "model.safetensors").unlink()
    words = {key: value for key, value in tensors.items() if language_key(key)}
    save_file(words, checkpoint / "words.safetensors")
    weight_map = {key: "words.safetensors" if key in words else "gone.safetensors" for key in tensors}
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert len(language_tensors(checkpoint)) == len(words)


def test_two_tensors_of_one_name(tmp_path: Path) -> None:
    tensors = {"lm_head.weight": torch.zeros(4, 2), "language_model.lm_head.weight": torch.ones(4, 2)}
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"several tensors for 'lm_head\.weight'"):
        language_tensors(tmp_path)


def test_shard_that_shrinks_while_it_is_copied(llava_checkpoint: Path, tmp_path: Path) -> None:
    shutil.copy(llava_checkpoint / "model.safetensors", tmp_path / "model.safetensors")
    tensors = language_tensors(tmp_path)
    with (tmp_path / "model.safetensors").open("r+b") as stream:
        stream.truncate(400_000)
    (tmp_path / "out").mkdir()
    with pytest.raises(CheckpointError, match="truncated"):
        write_language_model(tensors, tmp_path / "out")


# ------------------------------------------------------------------------------------------------------ the build


def test_folder_is_complete_and_says_nothing_of_this_machine(genai_folder: Path, llava_checkpoint: Path) -> None:
    names = {path.name for path in genai_folder.iterdir()}
    assert {"genai_config.json", "model.onnx", "model.onnx.data", "embedding.onnx", "vision.onnx"} <= names
    private = [str(genai_folder.parent), str(llava_checkpoint.parent), str(Path.home()), sys.prefix, "language-model-"]
    for path in genai_folder.iterdir():
        content = path.read_bytes()
        assert not [word for word in private if word.encode() in content], path.name
    assert not list(genai_folder.parent.glob(".language-model-*")), "the temporary checkpoint is gone"


def test_configuration(genai_folder: Path, llava_spec: ModelSpec) -> None:
    config = json.loads((genai_folder / "genai_config.json").read_text())
    model = config["model"]
    assert model["type"] == "phi3v"
    assert model["eos_token_id"] == [2]
    assert (model["bos_token_id"], model["pad_token_id"]) == (1, 4)
    assert model["context_length"] == config["search"]["max_length"] == llava_spec.decoder.context
    assert model["decoder"]["session_options"]["provider_options"] == []


@pytest.mark.parametrize("rows", [0, 1, 5])
def test_embedding_graph_puts_rows_in_the_places(genai_folder: Path, llava_checkpoint: Path, rows: int) -> None:
    session = onnxruntime.InferenceSession(str(genai_folder / "embedding.onnx"), providers=["CPUExecutionProvider"])
    table = load_file(llava_checkpoint / "model.safetensors")["language_model.model.embed_tokens.weight"].numpy()
    ids = np.array([[1, 3, 3, 20, 3, 3, 3, 30]], np.int64)  # five placeholders
    features = np.random.default_rng(0).standard_normal((rows, 96)).astype(np.float32)
    (embeds,) = session.run(None, {"input_ids": ids, "image_features": features})
    wanted = table[ids[0]]
    wanted[np.flatnonzero(ids[0] == 3)[:rows]] = features
    np.testing.assert_array_equal(embeds[0], wanted)


def test_a_sampled_placeholder_does_not_stop_decoding(genai_folder: Path) -> None:
    """During decoding there are no rows, and the model may produce the placeholder itself."""
    session = onnxruntime.InferenceSession(str(genai_folder / "embedding.onnx"), providers=["CPUExecutionProvider"])
    feed = {"input_ids": np.array([[3]], np.int64), "image_features": np.zeros((0, 96), np.float32)}
    assert session.run(None, feed)[0].shape == (1, 1, 96)


def test_large_tables_lie_beside_the_graph(
    genai_folder: Path, llava_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoder_onnx, "EXTERNAL_BYTES", 1000)
    path = tmp_path / "embedding.onnx"
    decoder_onnx._write_embedding_graph(path, language_tensors(llava_checkpoint)[EMBEDDING], 3, onnx.TensorProto.FLOAT)
    assert path.stat().st_size < 5000
    assert (tmp_path / "embedding.onnx.data").stat().st_size >= 416 * 96 * 4
    feed = {"input_ids": np.array([[1, 3, 9]], np.int64), "image_features": np.ones((1, 96), np.float32)}
    outside, inside = (
        onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"]).run(None, feed)[0]
        for file in (path, genai_folder / "embedding.onnx")
    )
    np.testing.assert_array_equal(outside, inside)


def test_checkpoint_in_half_precision_keeps_a_small_table(
    llava_checkpoint: Path, llava_spec: ModelSpec, tmp_path: Path
) -> None:
    checkpoint = renamed(llava_checkpoint, tmp_path / "half", "model.language_model", torch.bfloat16, shards=2)
    decoder_from_checkpoint(checkpoint, tmp_path / "decoder", llava_spec.decoder, DecoderPrecision.FP32)
    assert (tmp_path / "decoder" / "embedding.onnx").stat().st_size < 416 * 96 * 2 + 5000
    assert genai_tokens(tmp_path / "decoder", llava_spec, 8) == reference_tokens(checkpoint, 8)


def test_tied_embeddings(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "tied", TinyLlava(tied=True))
    assert HEAD not in language_tensors(checkpoint)
    model = spec_from_checkpoint(checkpoint, "tied")
    decoder_from_checkpoint(checkpoint, tmp_path / "decoder", model.decoder, DecoderPrecision.FP32)
    wanted = reference_tokens(checkpoint, 8)
    assert genai_tokens(tmp_path / "decoder", model, 8) == wanted


@pytest.mark.parametrize("precision", [DecoderPrecision.FP16, DecoderPrecision.INT4])
def test_other_precisions_run_on_the_cpu(
    llava_checkpoint: Path, llava_spec: ModelSpec, genai_folder: Path, tmp_path: Path, precision: DecoderPrecision
) -> None:
    folder = tmp_path / precision.value
    decoder_from_checkpoint(llava_checkpoint, folder, llava_spec.decoder, precision)
    exact = genai_tokens(genai_folder, llava_spec, 16)
    found = genai_tokens(folder, llava_spec, 16)
    assert len(found) == len(exact)
    assert found[0] == exact[0], "the first token is far enough from the second for four bits"
    smaller = {DecoderPrecision.FP16: 0.55, DecoderPrecision.INT4: 0.3}[precision]
    size = (genai_folder / "model.onnx.data").stat().st_size
    assert (folder / "model.onnx.data").stat().st_size < smaller * size


# ------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(("precision", "provider"), [("bf16", "cpu"), ("fp32", "tpu")])
def test_pairs_that_cannot_run(precision: str, provider: str, tmp_path: Path, llava_spec: ModelSpec) -> None:
    with pytest.raises(UsageError, match=r"cannot be bf16 on cpu|unknown provider 'tpu'"):
        decoder_from_checkpoint(tmp_path, tmp_path / "d", llava_spec.decoder, DecoderPrecision(precision), provider)
    check_precision(DecoderPrecision.BF16, "cuda")


@pytest.mark.parametrize("sizes", [TinyLlava(vocab=480, mlp=480), TinyLlava(vocab=432, mlp=432, layers=1)])
def test_another_linear_as_wide_as_the_vocabulary_is_refused(tmp_path: Path, sizes: TinyLlava) -> None:
    checkpoint = write_checkpoint(tmp_path / "clash", sizes)
    model = spec_from_checkpoint(checkpoint, "clash")
    with pytest.raises(
        UnsupportedModelError, match=r"gate_proj.weight' is as wide as the vocabulary|up_proj.weight' is"
    ):
        decoder_from_checkpoint(checkpoint, tmp_path / "decoder", model.decoder, DecoderPrecision.FP32)
    assert not (tmp_path / "decoder").exists()


def test_other_sizes_pass_the_guard(llava_checkpoint: Path) -> None:
    check_head_width(language_tensors(llava_checkpoint), 416)


def test_specification_of_another_model(llava_checkpoint: Path, llava_spec: ModelSpec, tmp_path: Path) -> None:
    wide = llava_spec.decoder.model_copy(update={"width": 97})
    with pytest.raises(CheckpointError, match=r"96 wide.*says 97"):
        decoder_from_checkpoint(llava_checkpoint, tmp_path / "d", wide, DecoderPrecision.FP32)
    far = llava_spec.decoder.model_copy(update={"image_token_id": 416})
    with pytest.raises(UnsupportedModelError, match="has id 416, the embedding table has 416 rows"):
        decoder_from_checkpoint(llava_checkpoint, tmp_path / "d", far, DecoderPrecision.FP32)


def test_another_architecture(llava_checkpoint: Path, llava_spec: ModelSpec, tmp_path: Path) -> None:
    shutil.copytree(llava_checkpoint, tmp_path / "other")
    config = json.loads((tmp_path / "other" / "config.json").read_text())
    config["text_config"] = {"model_type": "gemma", "hidden_size": 96, "vocab_size": 416}
    (tmp_path / "other" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedModelError, match="language model is a 'gemma'"):
        decoder_from_checkpoint(tmp_path / "other", tmp_path / "d", llava_spec.decoder, DecoderPrecision.FP32)


def test_attention_heads_that_onnxruntime_does_not_take(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "narrow", TinyLlava(width=120, layers=1))
    model = spec_from_checkpoint(checkpoint, "narrow")
    with pytest.raises(UnsupportedModelError, match="heads are 20 wide"):
        decoder_from_checkpoint(checkpoint, tmp_path / "decoder", model.decoder, DecoderPrecision.FP32)


@pytest.mark.parametrize(
    ("text_config", "message"),
    [
        ({"model_type": "gemma"}, "language model is a 'gemma'"),
        ({"hidden_size": 120, "head_dim": None}, "heads are 20 wide"),
        ({"head_dim": 12}, "heads are 12 wide"),
        ({"vocab_size": 3}, "has id 3, the embedding table has 3 rows"),
        ({"intermediate_size": 416}, r"'mlp\.gate_proj' is as wide as the vocabulary \(416\)"),
        ({"head_dim": 208, "num_attention_heads": 2, "num_key_value_heads": 1}, r"'self_attn\.q_proj' is as wide"),
        ({"head_dim": 208, "num_key_value_heads": 2}, r"'self_attn\.k_proj' is as wide"),
        ({"hidden_size": 416, "num_attention_heads": 4, "num_key_value_heads": 4}, r"'self_attn\.o_proj' is as wide"),
    ],
)
def test_the_configuration_alone_is_enough_to_refuse(
    llava_checkpoint: Path, llava_spec: ModelSpec, tmp_path: Path, text_config: dict[str, object], message: str
) -> None:
    config = json.loads((llava_checkpoint / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config))
    check_language_model(tmp_path, llava_spec.decoder)  # there are no weights
    config["text_config"].update(text_config)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedModelError, match=message) as caught:
        check_language_model(tmp_path, llava_spec.decoder)
    assert "--no-decoder" in caught.value.hint


@pytest.mark.parametrize("sizes", [TinyLlava(vocab=480, mlp=480), TinyLlava(width=120, layers=1)])
def test_what_is_refused_early_is_refused_late_as_well(tmp_path: Path, sizes: TinyLlava) -> None:
    checkpoint = write_checkpoint(tmp_path / "refused", sizes)
    decoder = spec_from_checkpoint(checkpoint, "refused").decoder
    with pytest.raises(UnsupportedModelError, match=r"as wide as the vocabulary|heads are 20 wide"):
        check_language_model(checkpoint, decoder)
    with pytest.raises(UnsupportedModelError, match=r"as wide as the vocabulary|heads are 20 wide"):
        decoder_from_checkpoint(checkpoint, tmp_path / "decoder", decoder, DecoderPrecision.FP32)


def test_a_configuration_that_does_not_load(llava_spec: ModelSpec, tmp_path: Path) -> None:
    for text in (None, "{", '{"model_type": "x"}', '{"model_type": "llava", "text_config": {"hidden_size": 7}}'):
        if text is not None:
            (tmp_path / "config.json").write_text(text)
        with pytest.raises(CheckpointError, match=r"config\.json of .* does not load"):
            check_language_model(tmp_path, llava_spec.decoder)


def test_failing_builder_is_quoted(
    llava_checkpoint: Path, llava_spec: ModelSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nseq 1 100\necho 'ValueError: no such layer' >&2\nexit 3\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    with pytest.raises(
        CheckFailedError, match=r"(?s)failed \(exit status 3\).*\n100\nValueError: no such layer"
    ) as caught:
        decoder_from_checkpoint(llava_checkpoint, tmp_path / "d", llava_spec.decoder, DecoderPrecision.FP32)
    assert len(str(caught.value).splitlines()) < 15
    assert not list(tmp_path.glob(".language-model-*"))
