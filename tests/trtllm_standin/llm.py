"""The LLM API of the PyTorch backend: registration, input processors, and models that really compute, on the CPU.

What it acts: the way of a prompt through generate_async (and that `prompt_token_ids` with rows but without a text loses
the rows), LLaVA-NeXT's own input processor, models that were registered from outside, which a worker process of its own
does not know, several requests in one step with their ids one behind the other, the count of rows that does not fit
when blocks are used again, streaming and abort.

Source of the rules: tensorrt_llm/llmapi/llm.py@4c05a74, inputs/registry.py@002f3cc, inputs/data.py@092f84d,
_torch/models/modeling_llava_next.py@b35ac1b, modeling_multimodal_utils.py (fuse_input_embeds), executor/result.py
@005bc84, llmapi/utils.py (TLLM_WORKER_USE_SINGLE_PROCESS), see `names.SOURCES`.
"""

from __future__ import annotations

import enum
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoTokenizer, LlamaForCausalLM, MistralForCausalLM

from trtllm_standin.names import bound, keywords
from trtllm_standin.records import record_class

MODELS = "tensorrt_llm._torch.models"
_LANGUAGES = {"LlamaForCausalLM": LlamaForCausalLM, "MistralForCausalLM": MistralForCausalLM}


@dataclass
class ApiWorld:
    """What a test sees of the stand-in.

    Attributes:
        llms: all that were made. inputs: what generate_async was given. aborted: numbers of requests.
        steps: of each step: how many requests it had.
    """

    version: str
    llms: list[Any] = field(default_factory=list)
    inputs: list[Any] = field(default_factory=list)
    aborted: list[int] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    processors: dict[type, type] = field(default_factory=dict)
    models: dict[str, type] = field(default_factory=dict)


def api_modules(world: ApiWorld, package: Any) -> dict[str, Any]:
    """The modules of `tensorrt_llm` that have these names, by their dotted name."""
    llmapi, inputs = ModuleType("tensorrt_llm.llmapi"), _inputs_module(world)
    llmapi.KvCacheConfig = record_class("llmapi.KvCacheConfig", world.version)
    fields = {item.name: None for item in keywords("LLM", world.version)}
    llmapi.TorchLlmArgs = type("TorchLlmArgs", (), {"model_fields": fields})
    package.LLM = llmapi.LLM = type("LLM", (_Llm,), {"_world": world})
    package.SamplingParams = llmapi.SamplingParams = record_class("SamplingParams", world.version)
    utils, auto, multimodal = (
        ModuleType(f"{MODELS}.{name}") for name in ("modeling_utils", "modeling_auto", "modeling_multimodal_utils")
    )
    utils.MODEL_CLASS_MAPPING = world.models

    def register_auto_model(name: str) -> Any:
        def decorated(model: type) -> type:
            world.models[name] = model
            return model

        return decorated

    utils.register_auto_model = register_auto_model
    auto.AutoModelForCausalLM = SimpleNamespace(from_config=LanguageModel)
    multimodal.fuse_input_embeds = fuse_input_embeds
    world.models["LlavaNextForConditionalGeneration"] = NativeNextModel
    world.processors[NativeNextModel] = type("LlavaNextInputProcessor", (_NativeNext, inputs.Base), {})
    parents = {name: ModuleType(name) for name in ("tensorrt_llm._torch", MODELS)}
    for parent in parents.values():
        parent.__path__ = []
    named = {module.__name__: module for module in (llmapi, inputs, utils, auto, multimodal)}
    return {"tensorrt_llm": package, **parents, **named}


# ------------------------------------------------------------------------------------------------------- registration


def _inputs_module(world: ApiWorld) -> Any:
    module = ModuleType("tensorrt_llm.inputs")
    module.MultimodalPlaceholderMetadata = record_class("inputs.MultimodalPlaceholderMetadata", world.version)
    module.MultimodalPlaceholderPlacement = enum.Enum("Placement", {"BEFORE_TEXT": 0, "AFTER_TEXT": 1})

    def register_input_processor(*args: Any, **named: Any) -> Any:
        given = bound("inputs.register_input_processor", world.version, args, named)
        if not issubclass(given["processor_cls"], module.BaseMultimodalInputProcessor):
            raise TypeError("no BaseMultimodalInputProcessor")

        def decorated(model: type) -> type:
            world.processors[model] = given["processor_cls"]
            if given.get("placeholder_metadata") is None:
                raise ValueError("A valid placeholder_metadata must be provided but got None")
            return model

        return decorated

    module.register_input_processor = register_input_processor
    module.Base = module.BaseMultimodalInputProcessor = _AbstractProcessor if world.version == "main" else _OldProcessor
    return module


class _OldProcessor:
    """1.2: nothing that must be there."""


class _AbstractProcessor(ABC):
    """After 1.2: properties that must be there, and methods that llm.py calls after rows were attached."""

    @property
    @abstractmethod
    def processor(self) -> Any: ...

    @property
    @abstractmethod
    def tokenizer(self) -> Any: ...

    @property
    @abstractmethod
    def config(self) -> Any: ...

    @property
    @abstractmethod
    def dtype(self) -> Any: ...


# -------------------------------------------------------------------------------------------------------------- models


class LanguageModel:
    """What AutoModelForCausalLM.from_config gives: transformers' model behind the interface of TensorRT-LLM's."""

    def __init__(self, model_config: Any) -> None:
        self.config = model_config.pretrained_config
        torch.manual_seed(0)
        self.inner = _LANGUAGES[self.config.architectures[0]](self.config).float().eval()
        self.model = SimpleNamespace(embed_tokens=self.inner.model.embed_tokens)
        self.model.embed_tokens.num_embeddings = self.config.vocab_size

    def load_weights(self, weights: dict[str, torch.Tensor]) -> None:
        known = {name: value for name, value in weights.items() if "rotary" not in name}
        tied = self.config.tie_word_embeddings
        missing, unexpected = self.inner.load_state_dict({k: v.float() for k, v in known.items()}, strict=False)
        missing = [name for name in missing if not (tied and name == "lm_head.weight")]
        if missing or unexpected:
            raise RuntimeError(f"weights missing: {missing[:3]}, unexpected: {list(unexpected)[:3]}")
        self.inner.tie_weights()

    def infer_max_seq_len(self) -> int:
        return int(self.config.max_position_embeddings)

    def forward(
        self,
        attn_metadata: Any,
        input_ids: Any = None,
        position_ids: Any = None,
        inputs_embeds: Any = None,
        return_context_logits: bool = False,
    ) -> torch.Tensor:
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("You must specify exactly one of input_ids and inputs_embeds")
        embeds = self.model.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if len(embeds) != sum(attn_metadata.seq_lens):
            raise RuntimeError("the step has another number of tokens")
        with torch.inference_mode():
            parts = embeds.split(attn_metadata.seq_lens)
            return torch.stack([self.inner(inputs_embeds=part[None]).logits[0, -1] for part in parts])


def fuse_input_embeds(
    embedding_layer: Any,
    input_ids: torch.Tensor,
    mm_embeds: list[torch.Tensor],
    mm_token_ids: torch.Tensor | None = None,
    text_token_indices: torch.Tensor | None = None,
    mm_token_indices: torch.Tensor | None = None,
) -> tuple[Any, Any]:
    """Words are looked up, the rest are rows."""
    if not mm_embeds:
        return input_ids, None
    rows = torch.cat(mm_embeds, dim=0)
    visual = input_ids >= embedding_layer.num_embeddings
    found = int(visual.sum()) if mm_token_indices is None else len(mm_token_indices)
    if found != len(rows):
        raise ValueError(
            f"Multimodal token count mismatch: found {found} image tokens in input_ids but received {len(rows)} image "
            "embeddings."
        )
    embeds = torch.empty(len(input_ids), rows.shape[-1])
    embeds[~visual] = embedding_layer(input_ids[~visual]).detach()
    embeds[visual] = rows.to(embeds.dtype)
    return None, embeds


class NativeNextModel:
    """TensorRT-LLM's own LLaVA-NeXT, as far as rows are given to it."""

    __module__ = f"{MODELS}.modeling_llava_next"

    def __init__(self, model_config: Any) -> None:
        text = model_config.pretrained_config.text_config
        text.architectures = text.architectures or [
            "MistralForCausalLM" if text.model_type == "mistral" else "LlamaForCausalLM"
        ]
        self.llm = LanguageModel(SimpleNamespace(pretrained_config=text))

    def load_weights(self, weights: dict[str, torch.Tensor]) -> None:
        renamed = {}
        for name, value in weights.items():
            for old, new in (("model.language_model.", "model."), ("language_model.", ""), ("lm_head.", "lm_head.")):
                if name.startswith(old):
                    renamed[new + name[len(old) :]] = value
                    break
        self.llm.load_weights(renamed)

    def __call__(self, attn_metadata: Any, input_ids: Any, position_ids: Any, **kwargs: Any) -> Any:
        rows = [item.multimodal_data["multimodal_embedding"] for item in kwargs["multimodal_params"]]
        ids, embeds = fuse_input_embeds(self.llm.model.embed_tokens, input_ids, rows)
        return self.llm.forward(attn_metadata, ids, position_ids, embeds)


class _NativeNext:
    """LLaVA-NeXT's input processor: tokenizes the text, one placeholder an image becomes as many ids as it has rows."""

    processor: Any = None
    dtype: Any = None
    config: Any = None
    tokenizer: Any = None

    def __init__(self, model_path: str, config: Any, tokenizer: Any, trust_remote_code: bool = True, **_: Any) -> None:
        self.model_config = config
        self.tokenizer = tokenizer

    def get_vocab_size(self) -> int:
        return int(self.model_config.text_config.vocab_size)

    def get_mm_token_ids(self) -> None: ...

    def get_mm_special_token_ids(self) -> None: ...

    def attach_multimodal_embeddings(self, inputs: Any, embedding: Any, params: Any) -> tuple[list[int], Any]:
        if not inputs.get("prompt"):
            raise ValueError("Text prompt is required but not provided")
        if "image" not in embedding:
            raise ValueError("Only image modality is supported for external multimodal embedding")
        features = embedding["image"]
        if isinstance(features, torch.Tensor):
            frames, length, _ = features.shape  # a bare [K, D] fails here
            features = [features.reshape(frames * length, -1)]
        if not all(item.dim() == 2 and len(item) for item in features):
            raise ValueError("cannot reshape")
        ids = self.tokenizer(inputs["prompt"]).input_ids
        placeholder = self.model_config.image_token_id
        assert features[0].shape[-1] == self.model_config.text_config.hidden_size
        assert ids.count(placeholder) == len(features), "All mm_ids_splits should be consumed"
        number, lengths = self.get_vocab_size(), iter([len(item) for item in features])
        fused: list[int] = []
        for token in ids:
            if token != placeholder:
                fused.append(token)
                continue
            length = next(lengths)
            fused += range(number, number + length)
            number += length
        return fused, {"multimodal_data": {"multimodal_embedding": torch.cat(list(features), dim=0)}}


# ----------------------------------------------------------------------------------------------------------------- LLM


class _Llm:
    """`tensorrt_llm.LLM`."""

    _world: ApiWorld

    def __init__(self, *args: Any, **named: Any) -> None:
        self.args = bound("LLM", self._world.version, args, named)
        folder = Path(self.args["model"])
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        architecture = config.architectures[0]
        model = self._world.models.get(architecture)
        single = os.environ.get("TLLM_WORKER_USE_SINGLE_PROCESS", "0") == "1"
        alone = single and self.args.get("tensor_parallel_size", 1) == 1
        if model is None or not (model.__module__.startswith("tensorrt_llm") or alone):
            raise RuntimeError(f"Unknown model architecture: {architecture}")
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        self.input_processor = self._world.processors[model](str(folder), config, tokenizer, trust_remote_code=True)
        self.model = model(SimpleNamespace(pretrained_config=config))
        self.model.load_weights(load_file(folder / "model.safetensors"))
        self.reuse = self.args["kv_cache_config"].enable_block_reuse is not False  # True where it is not given
        self.seen: set[tuple[int, ...]] = set()
        self.running: list[_Result] = []
        self.closed = False
        self._world.llms.append(self)

    def generate_async(self, *args: Any, **named: Any) -> Any:
        given = bound("LLM.generate_async", self._world.version, args, named)
        inputs, params = given["inputs"], given["sampling_params"]
        if self.closed:
            raise RuntimeError("LLM is shutting down")
        self._world.inputs.append(inputs)
        assert inputs.get("prompt") is not None or inputs.get("prompt_token_ids") is not None
        rows = inputs.get("multi_modal_embeddings")
        if not inputs.get("prompt") and rows:  # decoded, and the rows are not passed on
            inputs, rows = {"prompt": self.input_processor.tokenizer.decode(inputs["prompt_token_ids"])}, None
        extra = None
        if "prompt_token_ids" in inputs:
            ids = list(inputs["prompt_token_ids"])
        elif rows is not None:
            ids, extra = self.input_processor.attach_multimodal_embeddings(inputs, rows, params)
            if self._world.version == "main":
                self.input_processor.get_vocab_size()
                self.input_processor.get_mm_token_ids()
                self.input_processor.get_mm_special_token_ids()
        else:
            ids, extra = self.input_processor(inputs, params)
        if not all(type(token) is int for token in ids):
            raise TypeError("ids of a prompt must be int")
        result = _Result(self, len(self._world.inputs), ids, extra, params)
        self.running.append(result)
        return result

    def step(self) -> None:
        """One step of all that run: each prompt whole, with what it has of its answer."""
        here = [item for item in self.running if not item.finished]
        self._world.steps.append(len(here))
        sequences = [item.next_ids() for item in here]
        metadata = SimpleNamespace(
            num_contexts=len(here), num_generations=0, seq_lens=[len(sequence) for sequence in sequences]
        )
        params = [SimpleNamespace(multimodal_data=item.extra["multimodal_data"]) for item in here if item.extra]
        ids = torch.tensor([token for sequence in sequences for token in sequence], dtype=torch.int32)
        positions = torch.cat([torch.arange(len(sequence)) for sequence in sequences])
        with torch.inference_mode():
            logits = self.model(attn_metadata=metadata, input_ids=ids, position_ids=positions, multimodal_params=params)
        for item, row in zip(here, logits, strict=True):
            item.take(int(row.argmax()))

    def shutdown(self) -> None:
        self.closed = True


class _Result:
    """RequestOutput."""

    def __init__(self, llm: _Llm, number: int, ids: list[int], extra: Any, params: Any) -> None:
        self.llm, self.request_id, self.prompt_token_ids, self.extra, self.params = llm, number, ids, extra, params
        self.finished = False
        self.outputs = [SimpleNamespace(token_ids=[], token_ids_diff=[], finish_reason=None)]
        self.given = 0
        self.cached = llm.reuse and tuple(ids) in llm.seen
        llm.seen.add(tuple(ids))

    def next_ids(self) -> list[int]:
        whole = [*self.prompt_token_ids, *self.outputs[0].token_ids]
        return whole[-1:] if self.cached else whole

    def take(self, token: int) -> None:
        if self.params.top_k != 1:
            raise NotImplementedError("the stand-in is greedy")
        self.outputs[0].token_ids.append(token)
        ends = {self.params.end_id, *(self.params.stop_token_ids or ())}
        self.finished = token in ends or len(self.outputs[0].token_ids) >= self.params.max_tokens

    def __iter__(self) -> Iterator[_Result]:
        return self

    def __next__(self) -> _Result:
        if self.finished and self.given >= len(self.outputs[0].token_ids):
            raise StopIteration
        while self.given >= len(self.outputs[0].token_ids):
            self.llm.step()
        self.given = len(self.outputs[0].token_ids)
        return self

    def abort(self) -> None:
        self.llm._world.aborted.append(self.request_id)
        self.finished = True
        self.given = len(self.outputs[0].token_ids)
