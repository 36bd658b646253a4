"""TensorRT-LLM's LLM API (PyTorch backend, TensorRT-LLM 1.1 and later), which runs the checkpoint itself.

Rows go in as `multi_modal_embeddings`. LLaVA-NeXT is TensorRT-LLM's own model; LLaVA-1.5, which it does not have, is
`trtllm_llava`. **It has not run on the real TensorRT-LLM**: names and rules are from its source, and tests check every
call against a stand-in that has them.

Source: NVIDIA/TensorRT-LLM tensorrt_llm/llmapi/llm.py@4c05a74, tensorrt_llm/inputs/registry.py@002f3cc,
tensorrt_llm/inputs/data.py@092f84d, tensorrt_llm/_torch/models/modeling_llava_next.py@b35ac1b,
tensorrt_llm/executor/result.py@005bc84, tensorrt_llm/sampling_params.py@000a01d, tensorrt_llm/llmapi/llm_args.py of 1.0
(max_input_len).
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from holov_export.errors import EnvironmentFaultError, PromptError, UnsupportedModelError, UsageError
from holov_export.extras import require
from holov_export.runtime.decoder import check_prompt, check_sampling, end_tokens
from holov_export.runtime.decoder_hf import family_of_checkpoint
from holov_export.runtime.decoder_kv_cache import KvCache, kv_cache_name
from holov_export.spec import DecoderSpec
from holov_export.tensors import FloatArray, SamplingSettings, StitchedPrompt

#: what llm.py reads. The types of inputs/data.py spell it `multimodal_embeddings`, which nothing reads
EMBEDDINGS = "multi_modal_embeddings"
#: ids of the whole prompt for `trtllm_llava`, beside the rows under "image"
TOKEN_IDS = "holov_token_ids"
#: requests at once; TensorRT-LLM's own default of 2048 reserves memory that a GPU with one model does not have
_LANES = 64
#: tokens of one step, all requests together, unless one prompt needs more. Source: llm_args.py (max_num_tokens)
_STEP_TOKENS = 8192
_SINGLE_PROCESS = "TLLM_WORKER_USE_SINGLE_PROCESS"
_OWN, _NATIVE = "llava", "llava_next"
_WRONG_POSITIONS = (
    "TensorRT-LLM's LLM API works the positions of visual tokens (M-RoPE) out of a grid that it makes up from their "
    "number, and positions cannot be passed: kept tokens would be in the wrong places."
)
#: families that are refused: (why, what to do)
_REASONS = {
    "qwen2_5_vl": (_WRONG_POSITIONS, "Choose --decoder ort, or an engine: --decoder trtllm."),
    "video_llava": ("TensorRT-LLM's LLM API has no Video-LLaVA.", "Choose an engine: --decoder trtllm."),
}


class TrtllmApiDecoder:
    """A checkpoint in TensorRT-LLM's PyTorch backend.

    Attributes:
        lanes: requests that run at once. More may be open; they wait.
    """

    def __init__(
        self, checkpoint: Path, spec: DecoderSpec, *, tensor_parallel: int = 1, kv_cache: KvCache = "auto"
    ) -> None:
        """Load the model.

        Args:
            checkpoint: a directory.
            spec: of the language model.
            tensor_parallel: over how many GPUs it is spread.
            kv_cache: "fp8" stores keys and values so; "auto" as the checkpoint says.

        Raises:
            CheckpointError: no checkpoint of a family that is known.
            UnsupportedModelError: a family that this API would run wrongly or has not.
            UsageError: tensor_parallel is below 1, LLaVA-1.5 over several GPUs, or another type of keys and values.
            MissingExtraError: TensorRT-LLM is not installed.
            EnvironmentFaultError: it is too old, or the model does not load here.
        """
        family = family_of_checkpoint(checkpoint)
        if family in _REASONS:
            reason, hint = _REASONS[family]
            raise UnsupportedModelError(f"the decoder 'trtllm-api' cannot answer here: {reason}", hint=hint)
        _check_gpus(family, tensor_parallel)
        stored = kv_cache_name("trtllm-api", kv_cache)
        if tensor_parallel == 1:
            # the worker in this process: one of its own would not know the model that is registered here
            os.environ.setdefault(_SINGLE_PROCESS, "1")
        self._api, version = _llm_api()
        self._torch = require("torch")
        if family == _OWN:
            from holov_export.runtime.trtllm_llava import register

            register()
        self._family, self._spec = family, spec
        self.lanes = _LANES
        self.name = f"tensorrt-llm {version} (LLM API)"
        sizes = {
            "max_batch_size": _LANES,
            "max_num_tokens": max(_STEP_TOKENS, spec.context),
            "max_seq_len": spec.context,
        }
        if self._api.has_input_length:  # 1024 where it is not given
            sizes["max_input_len"] = spec.context
        try:
            self._llm: Any = self._api.LLM(
                model=str(checkpoint),
                tensor_parallel_size=tensor_parallel,
                # rows given as such carry no hash, so equal made-up ids would pass for equal images
                kv_cache_config=self._api.KvCacheConfig(enable_block_reuse=False, dtype=stored or "auto"),
                enable_chunked_prefill=False,
                **sizes,
            )
        except (RuntimeError, ValueError, OSError) as error:
            raise EnvironmentFaultError(f"TensorRT-LLM {version} cannot load '{checkpoint.name}': {error}") from error

    def stream(self, prompt: StitchedPrompt, sampling: SamplingSettings) -> Iterator[int]:
        """See `Decoder.stream`. The first `next` sends the request."""
        check_prompt(prompt, self._spec)
        check_sampling(sampling)
        if self._llm is None:
            raise EnvironmentFaultError("the decoder is closed.")
        ends = end_tokens(self._spec, sampling)
        return self._tokens(prompt, self._inputs(prompt), self._settings(sampling, ends), ends)

    def _inputs(self, prompt: StitchedPrompt) -> dict[str, Any]:
        """What generate_async takes.

        Always the text when there are rows: with `prompt_token_ids` alone llm.py decodes them, and drops the rows.
        """
        if not len(prompt.rows):
            return {"prompt_token_ids": [int(token) for token in prompt.input_ids]}
        starts = np.cumsum([0, *prompt.counts])
        rows = [
            self._tensor(prompt.rows[start : start + count])
            for start, count in zip(starts, prompt.counts, strict=False)
        ]
        if self._family == _OWN:
            ids = [int(token) for token in prompt.input_ids]
            return {"prompt": prompt.text, EMBEDDINGS: {"image": rows, TOKEN_IDS: ids}}
        if not all(prompt.counts):
            raise PromptError(
                "an image of this prompt has no visual rows; TensorRT-LLM's LLaVA-NeXT takes only images that have.",
                hint="Give every image a budget of at least 1.",
            )
        return {"prompt": prompt.text, EMBEDDINGS: {"image": rows}}

    def _tensor(self, rows: FloatArray) -> Any:
        """torch [K, D]; a list of such is one image each, whatever their K. Cast to the model's type over there."""
        return self._torch.from_numpy(np.array(rows, dtype=np.float16 if rows.dtype == np.float16 else np.float32))

    def _settings(self, sampling: SamplingSettings, ends: frozenset[int]) -> Any:
        """TensorRT-LLM's SamplingParams. Greedy is top_k 1; a seed is always named, for its default is the same 0."""
        own = [token for token in self._spec.eos_token_ids if token in ends]
        first = own[0] if own else -1
        words: dict[str, Any] = {
            "end_id": first,
            "pad_id": first if self._spec.pad_token_id is None else self._spec.pad_token_id,
            "max_tokens": sampling.max_new_tokens,
            "stop_token_ids": sorted(ends - {first}) or None,
            "detokenize": False,
            "add_special_tokens": True,
        }
        if sampling.temperature == 0:
            words["top_k"] = 1
        else:
            words |= {
                "temperature": sampling.temperature,
                "top_k": sampling.top_k or None,
                "top_p": sampling.top_p,
                "seed": secrets.randbits(31) if sampling.seed is None else sampling.seed,
            }
        return self._api.SamplingParams(**words)

    def _tokens(
        self, prompt: StitchedPrompt, inputs: dict[str, Any], settings: Any, ends: frozenset[int]
    ) -> Iterator[int]:
        if self._llm is None:
            raise EnvironmentFaultError("the decoder is closed.")
        try:
            result = self._llm.generate_async(inputs, sampling_params=settings, streaming=True)
        except (RuntimeError, ValueError, AssertionError, NotImplementedError) as error:
            raise EnvironmentFaultError(f"TensorRT-LLM refused the request: {error}") from error
        try:
            self._check_ids(prompt, result.prompt_token_ids)
            seen = 0
            for step in self._steps(result):
                new = list(step.outputs[0].token_ids[seen:])  # the list may grow while its tokens are yielded
                seen += len(new)
                for token in new:
                    if token in ends:
                        return
                    yield int(token)
        finally:
            if not result.finished:
                result.abort()

    def _steps(self, result: Any) -> Iterator[Any]:
        """The result after each of its steps; one `next` waits for one step."""
        try:
            yield from result
        except (RuntimeError, ValueError) as error:
            raise EnvironmentFaultError(f"TensorRT-LLM failed: {error}") from error

    def _check_ids(self, prompt: StitchedPrompt, ids: list[int]) -> None:
        """Compare the prompt that TensorRT-LLM made with ours: it tokenizes LLaVA-NeXT's text by itself.

        Raises:
            PromptError: they differ in a word or in the number of rows.
        """
        given = np.asarray(ids, dtype=np.int64)
        ours = prompt.input_ids
        places = ours == prompt.image_token_id
        same = given.shape == ours.shape and bool(
            np.all(np.where(places, given >= self._spec.vocab_size, given == ours))
        )
        if not same:
            raise PromptError(
                f"TensorRT-LLM made another prompt of the same text: {len(given)} tokens instead of {len(ours)}, or "
                "other words.",
                hint="Is the checkpoint the one that the bundle was exported from? Or choose --decoder trtllm.",
            )

    def close(self) -> None:
        """Stop the model and release its memory."""
        llm, self._llm = self._llm, None
        if llm is not None:
            llm.shutdown()


def _check_gpus(family: str, tensor_parallel: int) -> None:
    if tensor_parallel < 1:
        raise UsageError(f"tensor_parallel is {tensor_parallel}, it must be at least 1.")
    if tensor_parallel > 1 and family == _OWN:
        raise UsageError(
            "LLaVA-1.5 runs on one GPU with 'trtllm-api': TensorRT-LLM does not have this model, and the processes "
            "that it starts for further GPUs do not know the one that holov-export registers.",
            hint="Spread an engine instead: holov-export compile BUNDLE --decoder trtllm --tensor-parallel N.",
        )


@dataclass(frozen=True)
class _LlmApi:
    """The classes of TensorRT-LLM's LLM API.

    Attributes:
        has_input_length: LLM takes max_input_len.
    """

    LLM: Any
    SamplingParams: Any
    KvCacheConfig: Any
    has_input_length: bool


def _llm_api() -> tuple[_LlmApi, str]:
    """(the API, its version).

    Raises:
        EnvironmentFaultError: an older TensorRT-LLM, whose LLM runs engines, or one that does not load.
    """
    try:  # its libraries may miss others of their own
        package = require("tensorrt_llm")
        llmapi = require("tensorrt_llm.llmapi")
        inputs = require("tensorrt_llm.inputs")
        found = hasattr(inputs, "BaseMultimodalInputProcessor") and hasattr(package, "LLM")
    except (ImportError, OSError) as error:
        raise EnvironmentFaultError(f"TensorRT-LLM does not load here: {error}") from error
    version = str(getattr(package, "__version__", "unknown"))
    if not found:
        raise EnvironmentFaultError(
            f"this TensorRT-LLM ({version}) takes no visual rows through its LLM API.",
            hint="It does from 1.1 on. Older ones run engines: --decoder trtllm.",
        )
    fields = getattr(getattr(llmapi, "TorchLlmArgs", None), "model_fields", {})
    return _LlmApi(package.LLM, package.SamplingParams, llmapi.KvCacheConfig, "max_input_len" in fields), version
