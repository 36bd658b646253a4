"""`holov-export triton`: the repository is whole, says what the bundle says, and nothing else is overwritten."""

from __future__ import annotations

import json
import re
import runpy
import sys
from pathlib import Path
from typing import Any

import onnx
import pytest
from click.testing import CliRunner
from triton_standin import arguments

from holov_export.bundle import Bundle
from holov_export.cli.triton import triton_command
from holov_export.errors import BudgetError, BundleError, EngineError, UnknownNameError, UsageError
from holov_export.serve.triton import repository
from holov_export.serve.triton.config_text import DATA_TYPES, ModelConfig, TensorConfig, text_from_config
from holov_export.serve.triton.encoder_model import EncoderSettings, check_language_engine
from holov_export.serve.triton.graph_models import graph_config
from holov_export.serve.triton.repository import MARKER, RepositoryRequest, write_repository
from holov_export.serve.triton.settings import ModelSettings, settings_from_arguments

MODELS = ("holov_vision", "holov_prompt", "holov_decoder", "holov_answer", "holov_answer_once")
#: Source: NVIDIA/TensorRT-LLM triton_backend/all_models/multimodal/multimodal_encoders/config.pbtxt@4942c91
IFB_INPUTS = {
    "IMAGE": ("TYPE_FP16", [-1, -1, -1, -1]),
    "pixel_values": ("TYPE_FP16", [-1, -1, -1, -1]),
    "aspect_ratio_ids": ("TYPE_INT64", [-1]),
    "aspect_ratio_mask": ("TYPE_INT64", [-1, -1]),
    "cross_attention_mask": ("TYPE_INT64", [-1, -1, -1]),
    "max_tokens": ("TYPE_INT32", [1]),
    "image_sizes": ("TYPE_INT64", [2]),
    "is_video_input": ("TYPE_BOOL", [1]),
    "attention_mask": ("TYPE_INT64", [-1]),
    "image_grid_thw": ("TYPE_INT64", [3]),
    "vision_input_id": ("TYPE_INT32", [-1]),
}
IFB_OUTPUTS = {
    "OUT_PROMPT_EMBEDDING_TABLE": ("TYPE_FP16", [-1, -1]),
    "OUT_PROMPT_VOCAB_SIZE": ("TYPE_INT32", [1]),
    "ENCODER_INPUT_FEATURES": ("TYPE_FP16", [-1, -1]),
    "ENCODER_OUTPUT_LENGTHS": ("TYPE_INT32", [1]),
    "CROSS_ATTENTION_MASK": ("TYPE_BOOL", [-1, -1]),
    "SKIP_CROSS_ATTN_BLOCKS": ("TYPE_BOOL", [1]),
    "MROPE_ROTARY_COS_SIN": ("TYPE_FP32", [-1]),
    "MROPE_POSITION_DELTAS": ("TYPE_INT64", [1]),
}


@pytest.fixture
def answering(llava_checkpoint: Path) -> RepositoryRequest:
    """Answers by transformers, so that the bundle needs no decoder of its own."""
    return RepositoryRequest(ModelSettings(bundle="", decoder="hf", checkpoint=str(llava_checkpoint)))


def parsed(text: str) -> dict[str, list[Any]]:
    """A text protobuf as lists by name. Raises ValueError where a brace, a colon or a value is missing."""
    words = re.findall(r'"(?:[^"\\]|\\.)*"|[\w.-]+|[{}\[\]:,]', re.sub(r"^#.*$", "", text, flags=re.MULTILINE))
    assert "".join(words) == re.sub(r'\s+(?=(?:[^"]*"[^"]*")*[^"]*$)', "", re.sub(r"(?m)^#.*$", "", text))
    message, rest = _message(words)
    if rest:
        raise ValueError(f"behind the message: {rest[:3]}")
    return message


def _message(words: list[str]) -> tuple[dict[str, list[Any]], list[str]]:
    found: dict[str, list[Any]] = {}
    while words and words[0] != "}":
        name, mark, *words = words
        if mark == "{":
            value, words = _message(words)
            if not words:
                raise ValueError(f"'{name}' is not closed")
            words = words[1:]
        elif mark != ":":
            raise ValueError(f"'{name}' is followed by '{mark}'")
        elif words[0] == "[":
            end = words.index("]")
            value, words = [_value(word) for word in words[1:end] if word != ","], words[end + 1 :]
        else:
            value, words = _value(words[0]), words[1:]
        found.setdefault(name, []).append(value)
    return found, words


def _value(word: str) -> Any:
    if re.fullmatch(r"-?\d+", word):
        return int(word)
    return json.loads(word) if word[0] == '"' else word


def config_of(folder: Path, model: str) -> dict[str, list[Any]]:
    return parsed((folder / model / "config.pbtxt").read_text(encoding="utf-8"))


def tensors_of(config: dict[str, list[Any]], side: str) -> dict[str, tuple[str, list[int]]]:
    return {item["name"][0]: (item["data_type"][0], item["dims"][0]) for item in config[side]}


class TestHolov:
    def test_five_models_and_a_record(self, toy_bundle: Bundle, answering: RepositoryRequest, tmp_path: Path) -> None:
        record = write_repository(toy_bundle, answering, tmp_path / "models")
        assert record.models == MODELS
        files = {path.relative_to(tmp_path / "models").as_posix() for path in (tmp_path / "models").rglob("*.*")}
        assert files == {MARKER} | {f"{name}/{file}" for name in MODELS for file in ("config.pbtxt", "1/model.py")}

    def test_the_configurations_parse_and_name_their_folder(
        self, toy_bundle: Bundle, answering: RepositoryRequest, tmp_path: Path
    ) -> None:
        write_repository(toy_bundle, answering, tmp_path / "models")
        configs = {name: config_of(tmp_path / "models", name) for name in MODELS}
        assert [config["name"] for config in configs.values()] == [[name] for name in MODELS]
        assert [name for name in MODELS if "model_transaction_policy" in configs[name]] == [
            "holov_decoder",
            "holov_answer",
        ]
        vision = configs["holov_vision"]
        assert vision["max_batch_size"] == [8] and "dynamic_batching" in vision
        assert [item.get("allow_ragged_batch") for item in vision["input"]] == [["true"], ["true"]]
        width = toy_bundle.manifest.plan.model.decoder.width
        assert tensors_of(vision, "output")["tokens"] == ("TYPE_FP32", [-1, width])

    def test_what_one_model_gives_the_next_one_takes(
        self, toy_bundle: Bundle, answering: RepositoryRequest, tmp_path: Path
    ) -> None:
        write_repository(toy_bundle, answering, tmp_path / "models")
        vision, prompt, decoder, answer, once = (config_of(tmp_path / "models", name) for name in MODELS)
        given, taken = tensors_of(vision, "output"), tensors_of(prompt, "input")
        assert {name: taken[name] for name in given} == given
        given, taken = tensors_of(prompt, "output"), tensors_of(decoder, "input")
        assert {name: taken[name] for name in given if name != "text"} == {
            name: value for name, value in given.items() if name != "text"
        }
        assert answer["input"] == once["input"] and answer["output"] == once["output"]

    def test_the_model_file_finds_the_class_and_its_own_site_first(
        self,
        toy_bundle: Bundle,
        answering: RepositoryRequest,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        write_repository(toy_bundle, answering, tmp_path / "models")
        monkeypatch.setattr(sys, "path", list(sys.path))
        monkeypatch.setenv("HOLOV_EXPORT_SITE", str(tmp_path))
        found = runpy.run_path(str(tmp_path / "models/holov_vision/1/model.py"))
        assert found["TritonPythonModel"].__name__ == "VisionModel"
        installed = [place for place, path in enumerate(sys.path) if path.endswith("-packages")]
        assert sys.path.index(str(tmp_path)) < min(installed)

    def test_parameters_come_back_as_settings(
        self, toy_bundle: Bundle, answering: RepositoryRequest, tmp_path: Path
    ) -> None:
        write_repository(toy_bundle, answering, tmp_path / "models")
        pairs = config_of(tmp_path / "models", "holov_decoder")["parameters"]
        given = {pair["key"][0]: {"string_value": pair["value"][0]["string_value"][0]} for pair in pairs}
        found = settings_from_arguments({"model_config": json.dumps({"parameters": given})}, ModelSettings)
        assert found == answering.settings.model_copy(update={"bundle": str(toy_bundle.folder)})

    def test_a_copied_bundle_is_found_from_every_model(
        self, toy_bundle: Bundle, llava_checkpoint: Path, tmp_path: Path
    ) -> None:
        settings = ModelSettings(bundle="", decoder="hf", checkpoint=str(llava_checkpoint))
        write_repository(toy_bundle, RepositoryRequest(settings, copy_bundle=True), tmp_path / "models")
        place = next(
            pair["value"][0]["string_value"][0]
            for pair in config_of(tmp_path / "models", "holov_prompt")["parameters"]
            if pair["key"] == ["bundle"]
        )
        told = arguments(ModelSettings(bundle=place), tmp_path / "models/holov_prompt")
        assert settings_from_arguments(told, ModelSettings).opened().manifest == toy_bundle.manifest


class TestRefusals:
    def test_a_bundle_without_a_decoder(self, toy_bundle: Bundle, tmp_path: Path) -> None:
        with pytest.raises(BundleError, match="without a decoder"):
            write_repository(toy_bundle, RepositoryRequest(ModelSettings(bundle="")), tmp_path / "models")
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize(
        ("change", "error", "words"),
        [
            ({"layout": "nim"}, UnknownNameError, "unknown layout"),
            ({"budget": 3}, UsageError, "for the layout multimodal_ifb"),
            ({"layout": "onnxruntime", "copy_bundle": True}, UsageError, "no Python"),
            ({"layout": "tensorrt"}, EngineError, "these engines: none"),
            ({"layout": "multimodal_ifb", "budget": 65}, BudgetError, "1..64"),
        ],
    )
    def test_a_wrong_request_leaves_nothing(
        self,
        toy_bundle: Bundle,
        answering: RepositoryRequest,
        tmp_path: Path,
        change: dict[str, Any],
        error: type[Exception],
        words: str,
    ) -> None:
        request = RepositoryRequest(answering.settings, **change)
        with pytest.raises(error, match=words):
            write_repository(toy_bundle, request, tmp_path / "models")
        assert list(tmp_path.iterdir()) == []

    def test_a_folder_of_somebody_else_stays(
        self, toy_bundle: Bundle, answering: RepositoryRequest, tmp_path: Path
    ) -> None:
        (tmp_path / "resnet").mkdir()
        request = RepositoryRequest(answering.settings, overwrite=True)
        with pytest.raises(BundleError, match="is not a model repository"):
            write_repository(toy_bundle, request, tmp_path)
        assert (tmp_path / "resnet").is_dir()

    def test_a_failure_leaves_the_old_repository(
        self, toy_bundle: Bundle, answering: RepositoryRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        write_repository(toy_bundle, answering, tmp_path / "models")
        with pytest.raises(BundleError, match="Add --overwrite"):
            write_repository(toy_bundle, answering, tmp_path / "models")
        before = (tmp_path / "models/holov_answer/config.pbtxt").stat().st_mtime_ns

        def broken(config: ModelConfig, comment: str) -> str:
            if config.name == "holov_decoder":
                raise KeyboardInterrupt
            return text_from_config(config, comment)

        monkeypatch.setattr(repository, "text_from_config", broken)
        with pytest.raises(KeyboardInterrupt):
            write_repository(toy_bundle, RepositoryRequest(answering.settings, overwrite=True), tmp_path / "models")
        assert [path.name for path in tmp_path.iterdir()] == ["models"]
        assert (tmp_path / "models/holov_answer/config.pbtxt").stat().st_mtime_ns == before

    @pytest.mark.parametrize(("key", "value"), [("budgets", "3"), ("threads", "0"), ("verify", "never")])
    def test_a_wrong_parameter_is_named(self, key: str, value: str) -> None:
        told = {"model_config": json.dumps({"parameters": {
            "bundle": {"string_value": "b"}, key: {"string_value": value}}})}  # fmt: skip
        with pytest.raises(UsageError, match=f"the parameter '{key}'"):
            settings_from_arguments(told, ModelSettings)


class TestOtherLayouts:
    def test_the_encoder_has_the_names_of_the_pipeline(self, toy_bundle: Bundle, tmp_path: Path) -> None:
        request = RepositoryRequest(ModelSettings(bundle=""), "multimodal_ifb", budget=16, batch=4)
        write_repository(toy_bundle, request, tmp_path / "models")
        config = config_of(tmp_path / "models", "multimodal_encoders")
        assert list(tensors_of(config, "input").items()) == list(IFB_INPUTS.items())
        assert list(tensors_of(config, "output").items()) == list(IFB_OUTPUTS.items())
        assert all(item["optional"] == ["true"] for item in config["input"])
        assert config["output"][3]["reshape"] == [{"shape": [[]]}]
        assert config["max_batch_size"] == [4] and "model_transaction_policy" not in config
        visual = json.loads((tmp_path / "models/multimodal_encoders/visual_engine/config.json").read_text())
        assert visual["builder_config"]["model_type"] == "llava"

    @pytest.mark.parametrize(("table", "images", "good"), [(128, None, True), (256, 2, True), (256, None, False)])
    def test_the_encoder_refuses_an_engine_for_other_counts(
        self, tmp_path: Path, table: int, images: int | None, good: bool
    ) -> None:
        sizes = {"build_config": {"max_prompt_embedding_table_size": table, "max_batch_size": 8}}
        (tmp_path / "config.json").write_text(json.dumps(sizes))
        settings = EncoderSettings(bundle="", budget=16, gpt_model_path=str(tmp_path), max_num_images=images)
        if good:
            check_language_engine(settings)
            return
        with pytest.raises(EngineError, match="makes 32 ids for each image"):
            check_language_engine(settings)

    def test_the_graph_alone_is_described_as_it_is(self, toy_bundle: Bundle, tmp_path: Path) -> None:
        write_repository(toy_bundle, RepositoryRequest(ModelSettings(bundle=""), "onnxruntime"), tmp_path / "models")
        config = config_of(tmp_path / "models", "holov_vision_graph")
        model = onnx.load(tmp_path / "models/holov_vision_graph/1" / config["default_model_filename"][0])
        types = {1: "TYPE_FP32", 7: "TYPE_INT64"}
        for side, values in (("input", model.graph.input), ("output", model.graph.output)):
            wanted = {
                value.name: (
                    types[value.type.tensor_type.elem_type],
                    [axis.dim_value or -1 for axis in value.type.tensor_type.shape.dim],
                )
                for value in values
            }
            assert tensors_of(config, side) == wanted

    def test_tensorrt_reads_the_budget_as_a_shape(self, toy_bundle: Bundle) -> None:
        text = text_from_config(graph_config(toy_bundle, "tensorrt", instances=1, gpu=True))
        flags = {item["name"][0]: "is_shape_tensor" in item for item in parsed(text)["input"]}
        assert flags == {"pixel_values": False, "budget": True, "quota": False}
        assert parsed(text)["instance_group"] == [{"count": [1], "kind": ["KIND_GPU"], "gpus": [[0]]}]


def test_quotes_and_backslashes_survive() -> None:
    config = ModelConfig("m", "python", (TensorConfig("x", "bool", ()),), (), parameters=(("a", 'C:\\"é" # {'),))
    pair = parsed(text_from_config(config))["parameters"][0]
    assert pair["value"] == [{"string_value": ['C:\\"é" # {']}]
    assert set(DATA_TYPES) >= {"bool", "string", "float16", "float32"}


def test_the_command_writes_and_says_what(toy_bundle: Bundle, llava_checkpoint: Path, tmp_path: Path) -> None:
    words = [str(toy_bundle.folder), "-o", str(tmp_path / "models"), "--layout", "multimodal_ifb", "--budget", "8"]
    result = CliRunner().invoke(triton_command, [*words, "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["models"] == ["multimodal_encoders"]
    plain = CliRunner().invoke(triton_command, [*words, "--overwrite"])
    assert plain.exit_code == 0 and "takes the place" in plain.output
