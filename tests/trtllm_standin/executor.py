"""The executor of the bindings: it checks what it is given as the real one does; a real language model answers.

What it acts: in-flight batching (each wait is one step of all requests that fit), streaming, cancelling, errors as
responses, keys and values used again between prompts whose ids and extra ids are the same (so that two images that
share them get one answer), and, in the versions that have it, the slip by which prompts that begin in one step look
their rotary tables up in the wrong place (here: in the first one's).

Source of the rules: cpp/include/tensorrt_llm/batch_manager/llmRequest.h (constructor, validate, initialize,
createResult), cpp/tensorrt_llm/batch_manager/promptTuningBuffers.cpp@2868d79 (validate), cpp/tensorrt_llm/kernels/
unfusedAttentionKernels_2_template.h, tensorrt_llm/builder.py (mrope_rotary_sin_cos_size), see `names.SOURCES`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

from trtllm_standin.names import exists, members
from trtllm_standin.records import enum_class, record_class

RECORDS = (
    *("ExecutorConfig", "KvCacheConfig", "MropeConfig", "OrchestratorConfig", "OutputConfig", "ParallelConfig"),
    *("PromptTuningConfig", "Request", "SamplingConfig"),
)
ENUMS = ("ModelType", "CommunicationType", "CommunicationMode")


@dataclass(frozen=True)
class Asked:
    """What the language model of an engine is asked: ids, and rows for those from vocab_size on.

    Attributes:
        ids: [S]. rows: float [R, D] or None. rotary: float32 [positions * width] or None. delta: of new positions.
    """

    ids: tuple[int, ...]
    rows: torch.Tensor | None
    rotary: torch.Tensor | None
    delta: int
    length: int


#: greedy answer of a language model, endless: at least `length` tokens
Language = Callable[[Asked], list[int]]


@dataclass
class _Open:
    number: int
    request: Any
    tokens: list[int] = field(default_factory=list)
    sent: int = 0
    started: bool = False


@dataclass
class EngineWorld:
    """What a test sees of the stand-in.

    Attributes:
        language: answers. executors: all that were made. requests: all that were enqueued.
    """

    version: str
    language: Language
    executors: list[Any] = field(default_factory=list)
    requests: list[Any] = field(default_factory=list)
    cancelled: list[int] = field(default_factory=list)


def executor_module(world: EngineWorld) -> ModuleType:
    """`tensorrt_llm.bindings.executor` of a version."""
    module = ModuleType("tensorrt_llm.bindings.executor")
    for owner in RECORDS:
        if exists(owner, world.version):
            setattr(module, owner, record_class(owner, world.version))
    for owner in ENUMS:
        setattr(module, owner, enum_class(owner, world.version))
    module.Executor = type("Executor", (_Executor,), {"_world": world, "_module": module})
    return module


class _Executor:
    """See the module's docstring."""

    _world: EngineWorld
    _module: Any

    def __init__(self, model_path: Any, model_type: Any, executor_config: Any) -> None:
        if not isinstance(model_path, Path | str):
            raise TypeError("Executor(): model_path")
        if model_type is not self._module.ModelType.DECODER_ONLY:
            raise RuntimeError("the engine is decoder only")
        if not isinstance(executor_config, self._module.ExecutorConfig):
            raise TypeError("Executor(): executor_config")
        config = json.loads((Path(model_path) / "config.json").read_text())
        self.model, self.build = config["pretrained_config"], config["build_config"]
        self.config = executor_config
        self.batch = min(executor_config.max_batch_size or self.build["max_batch_size"], self.build["max_batch_size"])
        self.reuse = bool(executor_config.kv_cache_config and executor_config.kv_cache_config.enable_block_reuse)
        if self.reuse and not self.build["plugin_config"]["use_paged_context_fmha"]:
            raise RuntimeError("KV cache reuse needs an engine with paged context FMHA")
        if self.model["mapping"]["world_size"] > 1 and not executor_config.parallel_config:
            raise RuntimeError("MPI size 1 is not the engine's world size")
        self.waiting: list[_Open] = []
        self.running: list[_Open] = []
        self.errors: list[Any] = []
        self.kept: dict[tuple[tuple[int, int], ...], Asked] = {}
        self.closed = False
        self._world.executors.append(self)

    def enqueue_request(self, request: Any) -> int:
        if self.closed:
            raise RuntimeError("the executor was shut down")
        if not isinstance(request, self._module.Request):
            raise TypeError("enqueue_request(): request")
        self._world.requests.append(request)
        item = _Open(len(self._world.requests), request)
        if not request.streaming:
            raise NotImplementedError("the stand-in streams only")
        self.waiting.append(item)
        return item.number

    def cancel_request(self, *args: Any, **named: Any) -> None:
        (number,) = (*args, *named.values())
        if set(named) - {"id"} or type(number) is not int:
            raise TypeError("cancel_request(): id")
        self._world.cancelled.append(number)
        self.waiting = [item for item in self.waiting if item.number != number]
        self.running = [item for item in self.running if item.number != number]

    def can_enqueue_requests(self) -> bool:
        return not self.closed

    def shutdown(self) -> None:
        self.closed = True

    def await_responses(self, timeout: timedelta | None = None) -> list[Any]:
        if timeout is not None and not isinstance(timeout, timedelta):
            raise TypeError("await_responses(): timeout")
        responses = []
        starting = []
        while self.waiting and len(self.running) < self.batch:
            item = self.waiting.pop(0)
            try:
                self.check(item.request)
            except RuntimeError as error:
                responses.append(self.response(item, error=str(error)))
                continue
            starting.append(item)
            self.running.append(item)
        for item in starting:
            item.tokens = self.answer(item.request, starting[0].request)
        for item in list(self.running):
            item.sent += 1
            new = item.tokens[item.sent - 1 : item.sent]
            final = item.sent >= len(item.tokens)
            if final:
                self.running.remove(item)
            responses.append(self.response(item, new, final=final))
        return responses

    def check(self, request: Any) -> None:
        """What llmRequest.h and promptTuningBuffers.cpp refuse."""
        ids, tuning = request.input_token_ids, request.prompt_tuning_config
        if not all(type(token) is int and token >= 0 for token in ids):
            raise RuntimeError("input token ids must be non-negative integers")
        if len(ids) > min(self.build["max_input_len"], self.build["max_num_tokens"]):
            raise RuntimeError(f"Prompt length ({len(ids)}) exceeds maximum input length")
        rows = 0
        if tuning is not None:
            self.check_table(tuning, len(ids))
            rows = int(tuning.embedding_table.shape[0])
        vocabulary = self.model["vocab_size"]
        if any(token >= vocabulary + rows for token in ids):  # the real one reads what lies behind the table
            raise AssertionError(f"an id is past the {rows} rows of the prompt table")
        self.check_rotary(request)

    def check_table(self, tuning: Any, length: int) -> None:
        table = tuning.embedding_table
        if not isinstance(table, torch.Tensor):
            raise TypeError("PromptTuningConfig(): embedding_table is no torch.Tensor")
        if table.dim() != 2:
            raise RuntimeError("Assertion failed: mPromptEmbeddingTable.value()->getShape().nbDims == 2")
        if not table.is_contiguous():
            raise AssertionError("the table is read as it lies in memory")
        if table.shape[0] > self.build["max_prompt_embedding_table_size"] // self.build["max_batch_size"]:
            raise RuntimeError("Prompt vocab size is larger than max prompt vocab size")
        if str(table.dtype) != f"torch.{self.model['dtype']}":
            raise RuntimeError("Request embedding table data type doesn't match model weight data type.")
        if table.shape[1] != self.model["hidden_size"]:
            raise RuntimeError("the rows have another width")
        extra = getattr(tuning, "input_token_extra_ids", None)
        if extra is not None and len(extra) != length:
            raise RuntimeError(f"inputTokenExtraIds vector size ({len(extra)}) must be the same as input token vector")
        if extra is not None and not all(type(number) is int and 0 <= number < 1 << 64 for number in extra):
            raise TypeError("PromptTuningConfig(): input_token_extra_ids")
        if self.reuse and extra is None:
            raise RuntimeError("Input token extra ids must be provided when enabling kv cache reuse with prompt table")

    def check_rotary(self, request: Any) -> None:
        rotary = getattr(request, "mrope_config", None)
        if (self.model["position_embedding_type"] == "mrope") != (rotary is not None):
            raise RuntimeError("mrope_config does not fit the engine")
        if rotary is None:
            return
        table = self.table_of(rotary)
        size = self.model["max_position_embeddings"] * self.model["rotary_embedding_dim"]
        if table.dtype != torch.float32 or table.shape != (size,):
            raise RuntimeError(f"the rotary table must be float32 [{size}], it is {table.dtype} {tuple(table.shape)}")
        if type(rotary.mrope_position_deltas) is not int:
            raise TypeError("MropeConfig(): mrope_position_deltas")

    @staticmethod
    def table_of(rotary: Any) -> Any:
        return (
            getattr(rotary, "mrope_rotary_cos_sin", None)
            if hasattr(rotary, "mrope_rotary_cos_sin")
            else (rotary.mrope_rotary_sin_cos)
        )

    def answer(self, request: Any, first: Any) -> list[int]:
        """The tokens that the request will get, its end token and stop words among them."""
        tuning, rotary = request.prompt_tuning_config, getattr(request, "mrope_config", None)
        if rotary is not None and hasattr(rotary, "mrope_rotary_sin_cos"):
            table = self.table_of(first.mrope_config)
        else:
            table = None if rotary is None else self.table_of(rotary)
        length = getattr(request, "max_tokens", None) or request.max_new_tokens
        length = min(length, self.build["max_seq_len"] - len(request.input_token_ids))
        asked = Asked(
            ids=tuple(request.input_token_ids),
            rows=None if tuning is None else tuning.embedding_table.clone(),
            rotary=table,
            delta=0 if rotary is None else rotary.mrope_position_deltas,
            length=length,
        )
        if self.reuse:
            extra = getattr(tuning, "input_token_extra_ids", None) or [0] * len(asked.ids)
            asked = self.kept.setdefault(tuple(zip(asked.ids, extra, strict=True)), asked)
        ends = {request.end_id, *(words[0] for words in request.stop_words or ())}
        tokens = self._world.language(asked)[:length]
        stops = [index for index, token in enumerate(tokens) if token in ends]
        return tokens[: stops[0] + 1] if stops else tokens

    def response(self, item: _Open, tokens: list[int] | None = None, *, final: bool = True, error: str = "") -> Any:
        values = {"is_final": final, "output_token_ids": [tokens or []], "finish_reasons": []}
        result = SimpleNamespace(**{name: values[name] for name in members("Result", self._world.version)})
        return SimpleNamespace(
            request_id=item.number, has_error=lambda: bool(error), error_msg=error, result=None if error else result
        )
