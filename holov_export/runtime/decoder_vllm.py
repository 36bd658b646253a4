"""vLLM in this process, over a checkpoint: the language model alone, which takes token ids and visual rows together.

vLLM's own way for images (`enable_mm_embeds`) is not taken: it stacks the rows of all images of a step, and where their
counts differ, in one request or between two that happen to run together, the whole engine ends (seen with 0.32). A
prompt of ids, rows and a mask that says which is which has no such rule, needs neither tokenizer nor image processor,
and leaves the vision tower unloaded.
"""

from __future__ import annotations

import itertools
import json
import os
from collections import deque
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, get_args

from holov_export.errors import (
    CheckpointError,
    EnvironmentFaultError,
    HolovExportError,
    UnknownNameError,
    UnsupportedModelError,
    UsageError,
)
from holov_export.extras import require
from holov_export.runtime.decoder import check_prompt, check_sampling
from holov_export.runtime.decoder_kv_cache import KvCache, kv_cache_name
from holov_export.runtime.vllm_inputs import check_room, check_vllm, vllm_sampling, whole_prompt_rows
from holov_export.runtime.vllm_language import LANGUAGE_ONLY, register_language_only
from holov_export.spec import DecoderSpec
from holov_export.tensors import SamplingSettings, StitchedPrompt

PROVIDERS = ("auto", "cpu", "cuda")
#: on a CPU vLLM would take nine tenths of all memory for keys and values; this is enough for so many full contexts
_CPU_CONTEXTS = 4
#: read by vLLM when it is imported or loads a model. Its messages go to standard output, where answers go too; and on a
#: CPU it would start a process for the model, whatever the engine's settings say.
_ENVIRONMENT = {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1"}


@dataclass
class _Lane:
    """What the engine has made for one stream and the stream has not yet yielded."""

    tokens: deque[int] = field(default_factory=deque)
    finished: bool = False
    fault: str = ""


class VllmDecoder:
    """A checkpoint's language model in vLLM. Open streams are decoded together, a step at a time.

    Attributes:
        context: longest prompt and answer together.
    """

    def __init__(
        self,
        checkpoint: Path,
        spec: DecoderSpec,
        *,
        provider: str = "auto",
        tensor_parallel: int = 1,
        cache_bytes: int | None = None,
        kv_cache: KvCache = "auto",
    ) -> None:
        """Load the language model.

        Args:
            checkpoint: directory of a Hugging Face checkpoint.
            spec: of its language model.
            provider: "cpu", "cuda", or "auto" for the one that this vLLM was built for.
            tensor_parallel: over how many devices the model is spread.
            cache_bytes: memory for keys and values; None for vLLM's choice on a GPU (nearly all that is free) and four
                full contexts on a CPU, where VLLM_CPU_KVCACHE_SPACE (in GiB) goes before.
            kv_cache: "fp8" or, on a GPU, "int8" stores keys and values so; "auto" in the type of the weights.

        Raises:
            UnknownNameError: another provider.
            UsageError: the language model is one that vLLM would run wrongly, or int8 keys and values on a CPU.
            CheckpointError, UnsupportedModelError: no checkpoint, or of a model that vLLM does not have.
            MissingExtraError: vLLM is not installed.
            EnvironmentFaultError: this vLLM is for another device or too old, or the model does not load here.
        """
        check_vllm(spec)
        stored = kv_cache_name("vllm", kv_cache)
        if provider not in PROVIDERS:
            raise UnknownNameError(f"unknown provider '{provider}'.", hint=f"Known: {', '.join(PROVIDERS)}.")
        config = _config(checkpoint)
        for name, value in _ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        self._vllm = require("vllm")
        self._torch = require("torch")
        self._spec = spec
        device = self._device(provider)
        self._check_version()
        self._check_model(checkpoint, config)
        self._check_stored(stored, device)
        if device == "cpu" and cache_bytes is None and not os.environ.get("VLLM_CPU_KVCACHE_SPACE"):
            size = 1 if stored else 4 if _is_float32(config) else 2
            cache_bytes = _CPU_CONTEXTS * spec.context * _values_of_token(spec) * size
        try:
            self._engine: Any = self._loaded(checkpoint, config, device, tensor_parallel, cache_bytes, stored or "auto")
        except Exception as error:  # vLLM's exceptions have no common base
            raise EnvironmentFaultError(
                f"vLLM {self._vllm.__version__} cannot load '{checkpoint.name}' on {device}: {error}"
            ) from error
        self.context = int(self._engine.model_config.max_model_len)
        self.lanes = int(self._engine.vllm_config.scheduler_config.max_num_seqs)
        self.name = f"vllm {self._vllm.__version__} ({device})"
        self._numbers = itertools.count()
        self._lanes: dict[str, _Lane] = {}

    @property
    def open_requests(self) -> int:
        """How many answers the engine is at work on."""
        return 0 if self._engine is None else int(self._engine.get_num_unfinished_requests())

    def _device(self, provider: str) -> str:
        """Which device this vLLM was built for."""
        platform = require("vllm.platforms").current_platform
        device = "cpu" if platform.is_cpu() else "cuda" if platform.is_cuda() else str(platform.device_name)
        if provider not in ("auto", device):
            raise EnvironmentFaultError(
                f"this vLLM ({self._vllm.__version__}) runs on {device}, not on {provider}.",
                hint="Install vLLM's build for it, or choose --provider auto.",
            )
        return device

    def _check_version(self) -> None:
        """An older vLLM would take the prompt, ignore the mask, and answer to nothing but ones."""
        prompt_type = require("vllm.inputs").EmbedsPrompt
        if "prompt_is_token_ids" not in prompt_type.__annotations__:
            raise EnvironmentFaultError(
                f"this vLLM ({self._vllm.__version__}) takes no prompts of token ids and rows together.",
                hint="Run: pip install --upgrade vllm",
            )

    def _check_model(self, checkpoint: Path, config: dict[str, Any]) -> None:
        """Refuse what vLLM has not; a model that it lacks, but whose language model it has, is made known to it."""
        names = config.get("architectures") or [""]
        if names[0] in LANGUAGE_ONLY:
            register_language_only(names[0])
        elif names[0] not in self._vllm.ModelRegistry.get_supported_archs():
            raise UnsupportedModelError(
                f"vLLM {self._vllm.__version__} has no '{names[0]}', which '{checkpoint.name}' is.",
                hint="Choose --decoder auto, or llamacpp.",
            )

    def _check_stored(self, stored: str | None, device: str) -> None:
        """Refuse a type of keys and values that this vLLM does not have.

        vLLM stores int8 in its Triton attention only, which is for GPUs.
        """
        if stored is None:
            return
        if device == "cpu" and stored.startswith("int8"):
            raise UsageError("vLLM stores keys and values in int8 on a GPU only.", hint="Choose --kv-cache fp8.")
        known = get_args(require("vllm.config.cache").CacheDType)
        if stored not in known:
            raise EnvironmentFaultError(
                f"this vLLM ({self._vllm.__version__}) stores no keys and values in '{stored}', only in "
                f"{', '.join(known)}.",
                hint="Run: pip install --upgrade vllm. Or choose --kv-cache fp8.",
            )

    def _loaded(
        self,
        checkpoint: Path,
        config: dict[str, Any],
        device: str,
        tensor_parallel: int,
        cache_bytes: int | None,
        stored: str,
    ) -> Any:
        """The engine in this process: in one of its own a script without a main guard would start itself again."""
        arguments = self._vllm.EngineArgs(
            model=str(checkpoint),
            # vLLM's "auto" would make float16 or bfloat16 of it
            dtype="float32" if _is_float32(config) else "auto",
            max_model_len=self._spec.context,
            tensor_parallel_size=tensor_parallel,
            distributed_executor_backend="uni" if tensor_parallel == 1 else "mp",
            kv_cache_memory_bytes=cache_bytes,
            kv_cache_dtype=stored,
            language_model_only=True,
            enable_prompt_embeds=True,
            skip_tokenizer_init=True,
            generation_config="vllm",
            enforce_eager=device == "cpu",  # compiling takes minutes there
            disable_log_stats=True,
            use_tqdm_on_load=False,
        )
        settings = arguments.create_engine_config()
        executor = require("vllm.v1.executor").Executor.get_class(settings)
        return self._vllm.LLMEngine(settings, executor, log_stats=False, multiprocess_mode=False)

    def stream(self, prompt: StitchedPrompt, sampling: SamplingSettings) -> Iterator[int]:
        """See `Decoder.stream`.

        Raises:
            PromptError: also where the prompt and its answer are longer than the context.
        """
        check_prompt(prompt, self._spec)
        check_sampling(sampling)
        if self._engine is None:
            raise EnvironmentFaultError("the decoder is closed.")
        check_room(prompt, sampling, self.context)
        return self._tokens(self._inputs(prompt), self._settings(sampling))

    def _inputs(self, prompt: StitchedPrompt) -> Any:
        """Token ids, rows and which of them counts in each place.

        Source of the names: vLLM 0.32 vllm/inputs/llm.py (`EmbedsPrompt`)
        """
        return {
            "prompt_token_ids": prompt.input_ids.tolist(),
            "prompt_embeds": self._torch.from_numpy(whole_prompt_rows(prompt)),
            "prompt_is_token_ids": (prompt.input_ids != prompt.image_token_id).tolist(),
        }

    def _settings(self, sampling: SamplingSettings) -> Any:
        settings = vllm_sampling(self._spec, sampling)
        return self._vllm.SamplingParams(
            **{**asdict(settings), "stop_token_ids": list(settings.stop_token_ids)},
            detokenize=False,
            output_kind=require("vllm.sampling_params").RequestOutputKind.DELTA,
        )

    def _tokens(self, inputs: Any, settings: Any) -> Iterator[int]:
        number, lane = str(next(self._numbers)), _Lane()
        ends = frozenset(settings.stop_token_ids)
        self._lanes[number] = lane
        try:
            self._add(number, inputs, settings)
            while True:
                while not lane.tokens and not lane.finished:
                    self._step()
                if not lane.tokens:
                    if lane.fault:
                        raise EnvironmentFaultError(lane.fault)
                    return
                token = lane.tokens.popleft()
                if token in ends:  # vLLM gives the token that ends an answer as well
                    return
                yield token
        finally:
            del self._lanes[number]
            if not lane.finished and self._engine is not None:
                self._engine.abort_request([number])

    def _add(self, number: str, inputs: Any, settings: Any) -> None:
        if self._engine is None:
            raise EnvironmentFaultError("the decoder is closed.")
        try:
            self._engine.add_request(number, inputs, settings)
        except Exception as error:  # vLLM's exceptions have no common base
            raise EnvironmentFaultError(f"vLLM refused the prompt: {error}") from error

    def _step(self) -> None:
        """One token more for every open stream, or a part of their prompts."""
        if self._engine is None:
            raise EnvironmentFaultError("the decoder is closed.")
        try:
            outputs = self._engine.step()
        except Exception as error:  # vLLM's exceptions have no common base
            # what the engine had going is lost, for all streams
            for lane in self._lanes.values():
                lane.finished, lane.fault = True, f"vLLM failed: {error}"
            self._shut_down()
            return
        for output in outputs:
            lane = self._lanes.get(output.request_id, _Lane())
            made = output.outputs[0]
            lane.tokens.extend(made.token_ids)
            lane.finished = output.finished
            if output.finished and made.finish_reason not in ("stop", "length"):
                lane.fault = f"vLLM ended the answer: {made.finish_reason}."

    def close(self) -> None:
        """Release the model. Streams that are open end with an error."""
        for lane in self._lanes.values():
            lane.tokens.clear()
            lane.finished, lane.fault = True, "the decoder is closed."
        self._shut_down()

    def _shut_down(self) -> None:
        if self._engine is None:
            return
        engine, self._engine = self._engine, None
        try:
            engine.engine_core.shutdown()
            require("vllm.distributed").cleanup_dist_env_and_memory()
        except HolovExportError:
            raise
        except Exception as error:  # vLLM's exceptions have no common base
            raise EnvironmentFaultError(f"vLLM did not shut down: {error}") from error


def _config(checkpoint: Path) -> dict[str, Any]:
    """A checkpoint's config.json.

    Raises:
        CheckpointError: there is none, or it is no JSON object.
    """
    path = checkpoint / "config.json"
    if not path.is_file():
        raise CheckpointError(f"'{checkpoint.name}' has no config.json.", hint="A Hugging Face model is expected.")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"config.json of '{checkpoint.name}' does not parse: {error}") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"config.json of '{checkpoint.name}' is no JSON object.")
    return config


def _is_float32(config: dict[str, Any]) -> bool:
    """Whether the weights are stored as float32. transformers 5 calls the entry dtype, 4 torch_dtype."""
    for part in (config, config.get("text_config") or {}):
        for key in ("dtype", "torch_dtype"):
            if part.get(key):
                return str(part[key]) == "float32"
    return False


def _values_of_token(spec: DecoderSpec) -> int:
    """Numbers in the keys and values of one token."""
    return 2 * spec.layers * spec.kv_heads * spec.head_width
