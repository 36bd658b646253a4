"""Plans of TensorRT-LLM engines, commands by the options of the real programs, a run with programs that check them."""

from __future__ import annotations

import json
import os
import stat
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import trtllm_standin
from checkpoints import TinyLlava, write_checkpoint
from decoder_families import checkpoint_of, spec_of
from quantised_checkpoints import quantised_checkpoint
from safetensors.torch import load_file
from transformers import AutoConfig, LlamaForCausalLM
from trtllm_standin.commands import OPTIONS, parsed
from trtllm_standin.trial import counting, prompt_of

from holov_export.decoder_files import read_decoder, verify_decoder
from holov_export.errors import (
    BudgetError,
    CheckpointError,
    EnvironmentFaultError,
    UnknownNameError,
    UnsupportedModelError,
    UsageError,
)
from holov_export.export import decoder_language_trtllm, decoder_trtllm
from holov_export.export.decoder_language_trtllm import language_config, write_language_checkpoint
from holov_export.export.decoder_trtllm import TrtllmPlan, build_trtllm, commands_text, trtllm_plan
from holov_export.export.trtllm_commands import EXAMPLES_VARIABLE, find_examples, sizes_from_budget
from holov_export.runtime.decoder_trtllm import TrtllmDecoder
from holov_export.spec import ModelSpec
from holov_export.targets import target_from_name
from holov_export.tensors import SamplingSettings

CONVERTED = ("float16", "bfloat16", "int8", "int4")
QUANTIZED = ("int8_sq", "int4_awq", "w4a8_awq", "fp8")
SIZES: dict[str, int] = {"batch": 3, "images": 2, "budget": 40, "text_tokens": 50, "new_tokens": 60}

#: what convert_checkpoint.py and trtllm-build leave behind, and nothing else: config.json has the sizes that were asked
CONVERTER = """
import json, pathlib, sys
from commands import parsed
words = parsed({program!r}, sys.argv[1:])
source = pathlib.Path(words["--model_dir"])
config = json.loads((source / "config.json").read_text())
assert list(source.glob("*.safetensors")), "no weights"
if {fail}:
    print("loading"); print("CUDA out of memory", file=sys.stderr); sys.exit(7)
out = pathlib.Path(words["--output_dir"]); out.mkdir()
(out / "config.json").write_text(json.dumps(config | {{"dtype": words["--dtype"]}}))
"""
BUILDER = """
import json, pathlib, sys
from commands import parsed
words = parsed("trtllm-build", sys.argv[1:])
config = json.loads((pathlib.Path(words["--checkpoint_dir"]) / "config.json").read_text())
model = {{"dtype": config["dtype"], "vocab_size": config["vocab_size"] + {more}, "hidden_size": config["hidden_size"],
          "num_attention_heads": config["num_attention_heads"], "position_embedding_type": "rope_gpt_neox",
          "max_position_embeddings": config["max_position_embeddings"], "mapping": {{"world_size": 1}}}}
build = {{"max_batch_size": int(words["--max_batch_size"]), "max_input_len": int(words["--max_input_len"]),
          "max_seq_len": int(words["--max_seq_len"]) - {less}, "max_num_tokens": int(words["--max_num_tokens"]),
          "max_prompt_embedding_table_size": int(words["--max_multimodal_len"]),
          "plugin_config": {{"use_paged_context_fmha": False}}}}
out = pathlib.Path(words["--output_dir"]); out.mkdir()
(out / "rank0.engine").write_bytes(b"engine")
(out / "config.json").write_text(json.dumps({{"version": "0.12.0", "pretrained_config": model, "build_config": build}}))
"""


def plan_of(model: ModelSpec, checkpoint: Path, **other: Any) -> TrtllmPlan:
    return trtllm_plan(model, checkpoint, **(SIZES | other))


def options(command: tuple[str, ...]) -> dict[str, str]:
    """Checked against the real program's options."""
    if command[0] == "trtllm-build":
        return parsed("trtllm-build", command[1:])
    assert command[0] == "python"
    path = Path(command[1])
    program = path.name if path.name == "quantize.py" else f"{path.parent.name}/{path.name}"
    return parsed(program, command[2:])


@pytest.fixture(autouse=True)
def nothing_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(EXAMPLES_VARIABLE, raising=False)


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """A folder of examples and a trtllm-build that check their options and leave what the real ones leave."""

    def made(*, layout: str = "models/core", fail: bool = False, more: int = 0, less: int = 0) -> Path:
        examples = tmp_path / "examples"
        for family in ("llama", "qwen"):
            script = examples / layout / family / "convert_checkpoint.py"
            script.parent.mkdir(parents=True)
            script.write_text(CONVERTER.format(program=f"{family}/convert_checkpoint.py", fail=fail))
        quantizer = examples / "quantization" / "quantize.py"
        quantizer.parent.mkdir(parents=True)
        quantizer.write_text(CONVERTER.format(program="quantize.py", fail=fail))
        build = tmp_path / "bin" / "trtllm-build"
        build.parent.mkdir()
        build.write_text(f"#!{sys.executable}\n" + BUILDER.format(more=more, less=less))
        build.chmod(build.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1] / "trtllm_standin"))
        monkeypatch.setenv("PATH", f"{build.parent}{os.pathsep}{os.environ['PATH']}")
        return examples

    return made


# ------------------------------------------------------------------------------------------------------ sizes


def test_sizes_are_those_that_the_budget_implies(llava_spec: ModelSpec) -> None:
    sizes = sizes_from_budget(llava_spec, **SIZES)
    assert (sizes.batch, sizes.images, sizes.budget) == (3, 2, 40)
    assert (sizes.multimodal, sizes.input, sizes.sequence) == (3 * 2 * 40, 50 + 80, 50 + 80 + 60)


def test_newlines_of_tiles_have_rows_of_their_own() -> None:
    model = spec_of("llava_next")
    tallest = max(height // model.clip.patch_size for height, _ in model.image.pinpoints)  # type: ignore[union-attr]
    sizes = sizes_from_budget(model, **(SIZES | {"images": 1, "budget": 30}))
    assert sizes.multimodal == 3 * (30 + tallest) and sizes.budget == 30
    assert sizes_from_budget(model, **(SIZES | {"images": 1, "budget": 2})).multimodal == 3 * 4


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        ({"budget": 0}, BudgetError, r"budget 0 is outside 1\.\.64"),
        ({"budget": 65}, BudgetError, r"outside 1\.\.64"),
        ({"batch": 0}, UsageError, "batch is 0"),
        ({"new_tokens": 0}, UsageError, "new_tokens is 0"),
        ({"text_tokens": 400}, UsageError, "are 540 tokens, more than the context of 512"),
        ({"weights": "int3"}, UnknownNameError, "unknown weights 'int3'"),
        ({"kv_cache": "int4"}, UnknownNameError, "unknown keys and values 'int4'"),
        ({"tensor_parallel": 4}, UsageError, "6 attention heads cannot be spread over 4"),
    ],
)
def test_a_plan_that_cannot_be_is_refused(
    change: dict[str, Any], error: type[Exception], said: str, llava_spec: ModelSpec, llava_checkpoint: Path
) -> None:
    with pytest.raises(error, match=said):
        plan_of(llava_spec, llava_checkpoint, **change)


# ------------------------------------------------------------------------------------------------------ commands


@pytest.mark.parametrize("weights", CONVERTED + QUANTIZED)
def test_commands_have_options_of_the_real_programs(
    weights: str, llava_spec: ModelSpec, llava_checkpoint: Path, tools: Callable[..., Path]
) -> None:
    plan = plan_of(llava_spec, llava_checkpoint, weights=weights, tensor_parallel=2, examples=tools())
    convert, build = (options(command) for command in plan.commands)
    assert convert["--tp_size"] == "2" and convert["--model_dir"] == "language"
    assert convert["--output_dir"] == build["--checkpoint_dir"]
    assert convert["--dtype"] == ("bfloat16" if weights == "bfloat16" else "float16")
    assert convert.get("--qformat") == (weights if weights in QUANTIZED else None)
    assert convert.get("--weight_only_precision") == (weights if weights in ("int8", "int4") else None)
    assert ("--use_weight_only" in convert) == (weights in ("int8", "int4"))
    assert convert.get("--awq_block_size") == ("128" if "awq" in weights else None)
    assert build["--gemm_plugin"] == {"bfloat16": "bfloat16", "fp8": "fp8"}.get(weights, "float16")
    numbers = {name: int(value) for name, value in build.items() if name.startswith("--max")}
    assert numbers == {
        "--max_batch_size": 3,
        "--max_input_len": 130,
        "--max_seq_len": 190,
        "--max_num_tokens": 390,
        "--max_multimodal_len": 240,
    }


@pytest.mark.parametrize(
    ("weights", "kv_cache", "wanted"),
    [
        ("float16", "auto", {}),
        ("float16", "int8", {"--int8_kv_cache": ""}),
        ("bfloat16", "fp8", {"--qformat": "full_prec", "--kv_cache_dtype": "fp8"}),
        ("int8", "int8", {"--int8_kv_cache": "", "--weight_only_precision": "int8"}),
        ("int4", "int8", {"--int8_kv_cache": "", "--weight_only_precision": "int4"}),
        ("int8_sq", "int8", {"--qformat": "int8_sq", "--kv_cache_dtype": "int8"}),
        ("int4_awq", "auto", {"--qformat": "int4_awq"}),
        ("int4_awq", "int8", {"--qformat": "int4_awq", "--kv_cache_dtype": "int8"}),
        ("w4a8_awq", "fp8", {"--qformat": "w4a8_awq", "--kv_cache_dtype": "fp8"}),
        ("fp8", "auto", {"--qformat": "fp8", "--kv_cache_dtype": "fp8"}),
        ("fp8", "fp8", {"--qformat": "fp8", "--kv_cache_dtype": "fp8"}),
    ],
)
def test_keys_and_values_are_stored_as_asked(
    weights: str,
    kv_cache: str,
    wanted: dict[str, str],
    llava_spec: ModelSpec,
    llava_checkpoint: Path,
    tools: Callable[..., Path],
) -> None:
    plan = plan_of(llava_spec, llava_checkpoint, weights=weights, kv_cache=kv_cache, examples=tools())
    found = options(plan.commands[0])
    about_kv = {"--int8_kv_cache", "--kv_cache_dtype", "--qformat"} & set(found)
    assert about_kv == {"--int8_kv_cache", "--kv_cache_dtype", "--qformat"} & set(wanted)
    assert wanted.items() <= found.items()
    assert plan.kv_cache == kv_cache
    reads = any("reads texts" in note for note in plan.notes)
    assert reads == bool({"--qformat", "--int8_kv_cache"} & set(found))


@pytest.mark.parametrize(
    ("weights", "kv_cache"),
    [("fp8", "int8"), ("int8", "fp8"), ("int4", "fp8"), ("int8_sq", "fp8"), ("w4a8_awq", "int8")],
)
def test_pairs_that_nobody_documents(
    weights: str, kv_cache: str, llava_spec: ModelSpec, llava_checkpoint: Path
) -> None:
    with pytest.raises(UsageError, match=f"documents no {kv_cache} keys and values beside '{weights}'") as caught:
        plan_of(llava_spec, llava_checkpoint, weights=weights, kv_cache=kv_cache)
    assert "auto" in caught.value.hint


@pytest.mark.parametrize("weights", CONVERTED + QUANTIZED)
@pytest.mark.parametrize("name", ["jetson-agx-orin-64gb", "l4", "a100-80gb"])
def test_a_gpu_without_8_bit_floats_is_refused_them(
    name: str, weights: str, llava_spec: ModelSpec, llava_checkpoint: Path
) -> None:
    target = target_from_name(name)
    if weights in ("fp8", "w4a8_awq") and target.sm < 89:
        with pytest.raises(UsageError, match=r"begin with compute capability 8\.9; .* has 8\.[07]") as caught:
            plan_of(llava_spec, llava_checkpoint, weights=weights, target=target)
        assert "int4_awq" in caught.value.hint and "fp8" not in caught.value.hint
        return
    plan = plan_of(llava_spec, llava_checkpoint, weights=weights, target=target)
    assert plan.target == name and not any("8.9" in note for note in plan.notes)


def test_fp8_keys_on_orin_come_with_a_word_of_care(llava_spec: ModelSpec, llava_checkpoint: Path) -> None:
    orin, ada = target_from_name("jetson-agx-orin-64gb"), target_from_name("l4")
    said = [
        [note for note in plan_of(llava_spec, llava_checkpoint, kv_cache="fp8", target=one).notes if "careful" in note]
        for one in (orin, ada)
    ]
    assert len(said[0]) == 1 and not said[1]


def test_a_quantised_checkpoint_is_refused(llava_checkpoint: Path, tmp_path: Path) -> None:
    quantised, _ = quantised_checkpoint(llava_checkpoint, tmp_path, "awq")
    with pytest.raises(UnsupportedModelError, match=r"are quantised \(awq\); TensorRT-LLM's converter"):
        write_language_checkpoint(quantised, tmp_path / "language")
    assert not (tmp_path / "language").exists()


def test_qwen_has_a_converter_of_its_own_and_no_calibration(tools: Callable[..., Path]) -> None:
    model, checkpoint = spec_of("qwen2_5_vl"), checkpoint_of("qwen2_5_vl")
    small = {"budget": 20, "examples": tools()}
    plan = plan_of(model, checkpoint, **small)
    assert plan.converter == "qwen" and options(plan.commands[0])["--dtype"] == "float16"
    with pytest.raises(UnsupportedModelError, match=r"not planned for Qwen2\.5-VL"):
        plan_of(model, checkpoint, weights="fp8", **small)
    with pytest.raises(UnsupportedModelError, match="'int8 with int8 keys and values' is not planned"):
        plan_of(model, checkpoint, weights="int8", kv_cache="int8", **small)
    assert options(plan_of(model, checkpoint, weights="int4", **small).commands[0])["--weight_only_precision"] == "int4"


@pytest.mark.parametrize("layout", ["models/core", "."])
def test_examples_are_found_in_both_layouts(
    layout: str,
    llava_spec: ModelSpec,
    llava_checkpoint: Path,
    tools: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    examples = tools(layout=layout)
    monkeypatch.setenv(EXAMPLES_VARIABLE, str(examples))
    plan = plan_of(llava_spec, llava_checkpoint)
    assert plan.examples == examples and Path(plan.commands[0][1]).is_file()


def test_a_folder_that_has_no_examples_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_examples() is None
    with pytest.raises(UsageError, match=r"no llama/convert_checkpoint.py"):
        find_examples(tmp_path)
    monkeypatch.setenv(EXAMPLES_VARIABLE, str(tmp_path))
    with pytest.raises(UsageError, match="no folder of TensorRT-LLM's examples"):
        find_examples()


def test_the_commands_can_be_read_without_tensorrt_llm(llava_spec: ModelSpec, llava_checkpoint: Path) -> None:
    text = commands_text(plan_of(llava_spec, llava_checkpoint, weights="int4_awq"))
    *notes, first, second = text.splitlines()
    assert all(note.startswith("# ") for note in notes) and any("$TRTLLM_EXAMPLES" in note for note in notes)
    assert first == (
        "python $TRTLLM_EXAMPLES/quantization/quantize.py --model_dir language --output_dir converted "
        "--dtype float16 --qformat int4_awq --awq_block_size 128 --tp_size 1"
    )
    assert second.startswith("trtllm-build --checkpoint_dir converted --output_dir engine --gemm_plugin float16 ")


def test_a_mutated_command_fails() -> None:
    with pytest.raises(ValueError, match="trtllm-build has no --max_multimodal_length"):
        parsed("trtllm-build", ["--max_multimodal_length", "4"])
    with pytest.raises(ValueError, match="must be one of"):
        parsed("llama/convert_checkpoint.py", ["--dtype", "fp16"])
    with pytest.raises(ValueError, match="no value"):
        parsed("quantize.py", ["--qformat"])
    assert all(OPTIONS[name] for name in OPTIONS)


# ------------------------------------------------------------------------------------------------------ a run


@pytest.mark.parametrize("weights", ["float16", "int4_awq"])
def test_a_build_leaves_a_decoder_that_can_be_opened(
    weights: str, llava_spec: ModelSpec, llava_checkpoint: Path, tools: Callable[..., Path], tmp_path: Path
) -> None:
    plan = plan_of(llava_spec, llava_checkpoint, weights=weights, examples=tools())
    said: list[str] = []
    folder = tmp_path / "bundle" / "decoders" / "trtllm"
    built = build_trtllm(plan, folder, tell=said.append)
    verify_decoder(built)
    record = read_decoder(folder, "trtllm").record
    assert built.main == folder / "engine" and (built.main / "rank0.engine").is_file()
    assert (record.tool, record.weights, record.sizes) == ("TensorRT-LLM 0.12.0", weights, plan.sizes)
    assert record.commands == plan.commands and [item.path for item in record.files] == [
        "engine/config.json",
        "engine/rank0.engine",
    ]
    assert len(said) == 3 and said[2].startswith("trtllm-build ")
    assert os.listdir(folder.parent) == ["trtllm"]
    with trtllm_standin.engines("0.12", counting(20)):
        decoder = TrtllmDecoder(folder, llava_spec.decoder)
        tokens = list(decoder.stream(prompt_of(llava_spec.decoder, 40, 40), SamplingSettings(max_new_tokens=5)))
    assert tokens == [20, 21, 22, 23, 24]


def test_a_second_build_replaces_the_first_and_a_failed_one_does_not(
    llava_spec: ModelSpec, llava_checkpoint: Path, tools: Callable[..., Path], tmp_path: Path
) -> None:
    folder = tmp_path / "trtllm"
    examples = tools()
    build_trtllm(plan_of(llava_spec, llava_checkpoint, examples=examples), folder, tell=lambda _: None)
    bigger = plan_of(llava_spec, llava_checkpoint, batch=4, examples=examples)
    build_trtllm(bigger, folder, tell=lambda _: None)
    assert read_decoder(folder, "trtllm").record.sizes == bigger.sizes
    for script in examples.rglob("convert_checkpoint.py"):
        script.write_text(CONVERTER.format(program="llama/convert_checkpoint.py", fail=True))
    with pytest.raises(EnvironmentFaultError) as caught:
        build_trtllm(plan_of(llava_spec, llava_checkpoint, examples=examples), folder, tell=lambda _: None)
    assert "convert_checkpoint.py failed (exit status 7)" in caught.value.message
    assert "CUDA out of memory" in caught.value.message
    assert read_decoder(folder, "trtllm").record.sizes == bigger.sizes
    assert sorted(path.name for path in folder.parent.iterdir() if path.name.startswith(".trtllm")) == []


@pytest.mark.parametrize(
    ("slip", "error", "said"),
    [
        ({"less": 1}, EnvironmentFaultError, "other sizes: max_seq_len 189 instead of 190"),
        ({"more": 8}, CheckpointError, "the engine has 424 words, the bundle's language model 416"),
    ],
)
def test_an_engine_that_is_not_what_was_asked_for_is_refused(
    slip: dict[str, int],
    error: type[Exception],
    said: str,
    llava_spec: ModelSpec,
    llava_checkpoint: Path,
    tools: Callable[..., Path],
    tmp_path: Path,
) -> None:
    plan = plan_of(llava_spec, llava_checkpoint, examples=tools(**slip))
    with pytest.raises(error, match=said):
        build_trtllm(plan, tmp_path / "trtllm", tell=lambda _: None)
    assert not (tmp_path / "trtllm").exists()


def test_missing_tools_are_named(
    llava_spec: ModelSpec,
    llava_checkpoint: Path,
    tools: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(EnvironmentFaultError, match=r"convert_checkpoint.py was not found") as caught:
        build_trtllm(plan_of(llava_spec, llava_checkpoint), tmp_path / "x", tell=lambda _: None)
    assert EXAMPLES_VARIABLE in caught.value.hint
    examples = tools()
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(EnvironmentFaultError, match="trtllm-build is not on the PATH"):
        build_trtllm(plan_of(llava_spec, llava_checkpoint, examples=examples), tmp_path / "x", tell=lambda _: None)
    assert not (tmp_path / "x").exists()


def test_an_engine_that_cannot_be_read_is_an_error(
    llava_spec: ModelSpec,
    llava_checkpoint: Path,
    tools: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plan = plan_of(llava_spec, llava_checkpoint, examples=tools())
    monkeypatch.setattr(decoder_trtllm, "_run", lambda *_: None)
    with pytest.raises(EnvironmentFaultError, match="left no engine that can be read"):
        build_trtllm(plan, tmp_path / "trtllm", tell=lambda _: None)


# ------------------------------------------------------------------------------------------------------ language


@pytest.mark.parametrize("name", ["llava_next", "llava_next_mistral", "video_llava"])
def test_the_language_model_alone_loads_in_transformers(name: str, tmp_path: Path) -> None:
    write_language_checkpoint(checkpoint_of(name), tmp_path / "language")
    config = json.loads((tmp_path / "language" / "config.json").read_text())
    assert config["model_type"] == ("mistral" if name.endswith("mistral") else "llama")
    text = AutoConfig.from_pretrained(checkpoint_of(name)).get_text_config()
    # what transformers 4 reads; it knows no rope_parameters
    assert config["rope_theta"] == text.rope_parameters["rope_theta"] and "rope_parameters" not in config
    assert AutoConfig.from_pretrained(tmp_path / "language").hidden_size == text.hidden_size


@pytest.mark.parametrize("name", ["llava_next_mistral", "qwen2_5_vl"])
def test_a_rotary_base_other_than_usual_is_kept(name: str) -> None:
    text = AutoConfig.from_pretrained(checkpoint_of(name)).get_text_config()
    text.rope_parameters = {**text.rope_parameters, "rope_theta": 1e6}
    assert language_config(text, tied=False, dtype="float16")["rope_theta"] == 1e6
    old = {"rope_theta": 5e5, "rope_scaling": {"mrope_section": [2, 3, 3], "type": "mrope"}}  # as transformers 4 has it
    names = {*decoder_language_trtllm._FIELDS, "model_type"}
    as_four = SimpleNamespace(**{item: getattr(text, item) for item in names}, **old)
    assert language_config(as_four, tied=False, dtype=None)["rope_theta"] == 5e5


def test_a_scaled_rotary_embedding_is_passed_on() -> None:
    text = AutoConfig.from_pretrained(checkpoint_of("llava_next")).get_text_config()
    text.rope_parameters = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
    scaling = language_config(text, tied=False, dtype="float16")["rope_scaling"]
    assert scaling == {"rope_type": "linear", "factor": 2.0}


def test_a_model_that_attends_to_a_window_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = AutoConfig.from_pretrained(checkpoint_of("llava_next_mistral"))
    whole.get_text_config().sliding_window = 16
    monkeypatch.setattr(decoder_language_trtllm, "model_config", lambda _: whole)
    with pytest.raises(UnsupportedModelError, match="last 16 tokens"):
        write_language_checkpoint(checkpoint_of("llava_next_mistral"), tmp_path / "language")
    whole.get_text_config().model_type = "gemma"
    with pytest.raises(UnsupportedModelError, match="is a 'gemma'"):
        write_language_checkpoint(checkpoint_of("llava_next_mistral"), tmp_path / "language")


def test_every_weight_of_the_language_model_is_written(tmp_path: Path, llava_checkpoint: Path) -> None:
    write_language_checkpoint(llava_checkpoint, tmp_path / "language")
    model = LlamaForCausalLM.from_pretrained(tmp_path / "language")
    (shard,) = (tmp_path / "language").glob("*.safetensors")
    assert set(load_file(shard)) == set(model.state_dict())


def test_tied_words_are_said_to_be(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "tied", TinyLlava(tied=True))
    write_language_checkpoint(checkpoint, tmp_path / "language")
    assert json.loads((tmp_path / "language" / "config.json").read_text())["tie_word_embeddings"] is True


def test_qwens_language_model_goes_by_the_name_that_the_converter_knows(tmp_path: Path) -> None:
    write_language_checkpoint(checkpoint_of("qwen2_5_vl"), tmp_path / "language")
    config = json.loads((tmp_path / "language" / "config.json").read_text())
    sections = list(spec_of("qwen2_5_vl").decoder.mrope_sections)
    assert config["model_type"] == "qwen2_vl" and config["architectures"] == ["Qwen2VLForConditionalGeneration"]
    assert config["rope_scaling"] == {"type": "mrope", "mrope_section": sections}
    (shard,) = (tmp_path / "language").glob("*.safetensors")
    names = set(load_file(shard))
    assert "model.layers.0.self_attn.q_proj.bias" in names and not any("visual" in name for name in names)


def test_a_checkpoint_without_a_language_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError):
        write_language_checkpoint(tmp_path, tmp_path / "language")
