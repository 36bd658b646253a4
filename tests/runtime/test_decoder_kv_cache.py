"""Keys and values in 8 bits: which decoder takes what, what it is called there, and what is refused before loading."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import trtllm_standin
from PIL import Image

from holov_export.bundle import Bundle
from holov_export.cli import run
from holov_export.errors import EnvironmentFaultError, MissingExtraError, UnknownNameError, UsageError
from holov_export.runtime import decoder_vllm
from holov_export.runtime.decoder_choice import DECODERS, DecoderOptions, decoder_maker
from holov_export.runtime.decoder_kv_cache import KV_CACHES, TAKES, kv_cache_name
from holov_export.runtime.decoder_llamacpp import LlamaCppDecoder
from holov_export.runtime.decoder_trtllm_api import TrtllmApiDecoder
from holov_export.runtime.decoder_vllm import VllmDecoder
from holov_export.spec import ModelSpec


def test_every_decoder_takes_a_type_or_says_why_not() -> None:
    assert set(TAKES) <= set(DECODERS)
    for decoder in DECODERS:
        assert kv_cache_name(decoder, "auto") is None
        for kv_cache in KV_CACHES[1:]:
            if kv_cache in TAKES.get(decoder, {}):
                assert kv_cache_name(decoder, kv_cache) == TAKES[decoder][kv_cache]
                continue
            with pytest.raises(UsageError, match=f"'{decoder}' cannot store keys and values in {kv_cache}: ") as caught:
                kv_cache_name(decoder, kv_cache)
            assert caught.value.hint
    with pytest.raises(UnknownNameError, match="'int4'"):
        kv_cache_name("vllm", "int4")


@pytest.mark.parametrize("decoder", ["auto", "genai", "ort", "hf", "trtllm", "vllm-server", "none"])
def test_a_decoder_without_it_is_refused_before_anything_is_loaded(decoder: str, toy_bundle: Bundle) -> None:
    with pytest.raises(UsageError, match="cannot store keys and values in int8"):
        decoder_maker(decoder, toy_bundle, DecoderOptions(kv_cache="int8", url="http://nowhere"))


def test_ask_refuses_it(toy_bundle: Bundle, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    picture = tmp_path / "p.png"
    Image.new("RGB", (8, 8)).save(picture)
    assert run(["ask", str(toy_bundle.folder), str(picture), "?", "--kv-cache", "fp8"]) == 2
    assert "cannot store keys and values in fp8" in capsys.readouterr().err


def test_llama_cpp_needs_heads_of_whole_blocks(llava_spec: ModelSpec, tmp_path: Path) -> None:
    (tmp_path / "language.gguf").touch()
    narrow, wide = llava_spec.decoder, llava_spec.decoder.model_copy(update={"head_width": 64})
    with pytest.raises(UsageError, match=r"heads are 16 wide; in int8 llama\.cpp stores multiples of 32"):
        LlamaCppDecoder(tmp_path / "language.gguf", narrow, kv_cache="int8")
    with pytest.raises(UsageError, match="are not exact"):
        LlamaCppDecoder(tmp_path / "language.gguf", wide, kv_cache="int8", exact=True)
    with pytest.raises(UsageError, match=r"llama\.cpp has no 8-bit floats"):
        LlamaCppDecoder(tmp_path / "language.gguf", wide, kv_cache="fp8")


@pytest.mark.parametrize("version", trtllm_standin.API_VERSIONS)
def test_tensorrt_llm_is_told(version: str, llava_checkpoint: Path, llava_spec: ModelSpec) -> None:
    with trtllm_standin.llm_api(version) as world:
        for kv_cache, name in (("auto", "auto"), ("fp8", "fp8")):
            TrtllmApiDecoder(llava_checkpoint, llava_spec.decoder, kv_cache=kv_cache).close()  # type: ignore[arg-type]
            assert world.llms[-1].args["kv_cache_config"].dtype == name
        with pytest.raises(UsageError, match="takes no int8"):
            TrtllmApiDecoder(llava_checkpoint, llava_spec.decoder, kv_cache="int8")


# -------------------------------------------------------------------------------------------------------- vLLM

#: CacheDType of vLLM 0.32 vllm/config/cache.py and of 0.9.0
NEW = ("auto", "float16", "bfloat16", "fp8", "fp8_e4m3", "fp8_e5m2", "int8_per_token_head", "fp8_per_token_head")
OLD = ("auto", "fp8", "fp8_e4m3", "fp8_e5m2")


class Engines:
    """vLLM as far as a decoder is made with it; keeps the arguments of its engine."""

    __version__ = "0.32"
    ModelRegistry = SimpleNamespace(get_supported_archs=lambda: ["LlavaForConditionalGeneration"])

    def __init__(self, device: str, types: tuple[str, ...]) -> None:
        self.device, self.types, self.arguments = device, types, {}

    def EngineArgs(self, **named: Any) -> Any:  # noqa: N802
        self.arguments = named
        return SimpleNamespace(create_engine_config=lambda: None)

    def LLMEngine(self, *_: Any, **__: Any) -> Any:  # noqa: N802
        scheduler = SimpleNamespace(max_num_seqs=4)
        return SimpleNamespace(
            model_config=SimpleNamespace(max_model_len=512),
            vllm_config=SimpleNamespace(scheduler_config=scheduler),
        )

    def module(self, name: str) -> Any:
        from typing import Literal

        platform = SimpleNamespace(is_cpu=lambda: self.device == "cpu", is_cuda=lambda: self.device == "cuda")
        executor = SimpleNamespace(get_class=lambda settings: None)
        return {
            "vllm": self,
            "torch": SimpleNamespace(),
            "vllm.platforms": SimpleNamespace(current_platform=platform),
            "vllm.inputs": SimpleNamespace(EmbedsPrompt=SimpleNamespace(__annotations__={"prompt_is_token_ids": 1})),
            "vllm.config.cache": SimpleNamespace(CacheDType=Literal[self.types]),  # type: ignore[valid-type]
            "vllm.v1.executor": SimpleNamespace(Executor=executor),
        }[name]


def vllm_arguments(
    monkeypatch: pytest.MonkeyPatch, checkpoint: Path, model: ModelSpec, device: str, types: tuple[str, ...], kv: str
) -> dict[str, Any]:
    engines = Engines(device, types)
    monkeypatch.setattr(decoder_vllm, "require", engines.module)
    VllmDecoder(checkpoint, model.decoder, kv_cache=kv)  # type: ignore[arg-type]
    return engines.arguments


def test_vllm_is_told(monkeypatch: pytest.MonkeyPatch, llava_checkpoint: Path, llava_spec: ModelSpec) -> None:
    def told(device: str, types: tuple[str, ...], kv: str) -> dict[str, Any]:
        return vllm_arguments(monkeypatch, llava_checkpoint, llava_spec, device, types, kv)

    assert told("cuda", OLD, "auto")["kv_cache_dtype"] == "auto"
    assert told("cuda", OLD, "fp8")["kv_cache_dtype"] == "fp8"
    assert told("cuda", NEW, "int8")["kv_cache_dtype"] == "int8_per_token_head"
    plain, small = told("cpu", NEW, "auto"), told("cpu", NEW, "fp8")
    assert plain["kv_cache_memory_bytes"] == 4 * small["kv_cache_memory_bytes"]  # the checkpoint is float32
    with pytest.raises(EnvironmentFaultError, match="stores no keys and values in 'int8_per_token_head', only in auto"):
        told("cuda", OLD, "int8")
    with pytest.raises(UsageError, match="on a GPU only"):
        told("cpu", NEW, "int8")


def test_vllm_is_not_needed_to_refuse(llava_checkpoint: Path, llava_spec: ModelSpec) -> None:
    with pytest.raises(UnknownNameError):
        VllmDecoder(llava_checkpoint, llava_spec.decoder, kv_cache="q8")  # type: ignore[arg-type]
    with pytest.raises((MissingExtraError, EnvironmentFaultError)):
        VllmDecoder(llava_checkpoint, llava_spec.decoder, kv_cache="fp8")
