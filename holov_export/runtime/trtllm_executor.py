"""What TensorRT-LLM's executor is called in its versions 0.12 (also 0.12.0-jetson) to 1.2. All differences are here.

| | 0.12 | from 0.13 on | later |
|---|---|---|---|
| length of an answer | `max_new_tokens` | `max_tokens` | |
| seed | `random_seed` | `seed` | |
| numbers that tell images apart | none | `input_token_extra_ids` | |
| rotary table | none | none | `mrope_rotary_sin_cos`, then `mrope_rotary_cos_sin` |

They are told apart by what the classes have, not by version numbers: names changed between development versions.

Source: NVIDIA/TensorRT-LLM cpp/tensorrt_llm/pybind/executor/bindings.cpp (0.12.0.dev2024070200, @0396172 of 0.13/0.14,
0.16.0.dev2024121000), pybind/executor/request.cpp@007a750, nanobind/executor/request.cpp@008b2b8, and executor.cpp
beside them; tensorrt_llm/runtime/model_runner_cpp.py of 0.12.0.dev2024080600. None of it has run here.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from holov_export.errors import EnvironmentFaultError, UsageError
from holov_export.extras import require
from holov_export.runtime.trtllm_prompts import EngineFacts
from holov_export.tensors import SamplingSettings

#: more is cut with a warning. Source: cpp/tensorrt_llm/kernels/samplingTopKKernels.h (TOP_K_MAX)
TOP_K_MAX = 1024
_NEEDED = ("Executor", "ExecutorConfig", "KvCacheConfig", "ModelType", "OutputConfig", "PromptTuningConfig")
_NEEDED_TOO = ("Request", "SamplingConfig")
_OLD_TABLE, _NEW_TABLE = "mrope_rotary_sin_cos", "mrope_rotary_cos_sin"


@dataclass(frozen=True)
class ExecutorApi:
    """`tensorrt_llm.bindings.executor` and how this version spells what differs.

    Attributes:
        package: where tensorrt_llm lies.
        length, seed: names of the keywords.
        extra_ids: it can tell images apart. Without, keys and values must not be used again.
        rotary: keyword of the rotary table, None where it takes none.
    """

    module: Any
    version: str
    package: Path
    length: str
    seed: str
    extra_ids: bool
    rotary: str | None

    @property
    def mixes_rotary_tables(self) -> bool:
        """Of requests that begin in one step, these versions look all tables but the first up in the wrong place.

        Source: unfusedAttentionKernels_2_template.h, 0.16.0.dev2024121000: the offset of a request in the tables lacks
        the factor half_rotary_dim, which versions with the later keyword have.
        """
        return self.rotary == _OLD_TABLE


def executor_api() -> ExecutorApi:
    """Import the bindings and look at what they have.

    Raises:
        MissingExtraError: TensorRT-LLM is not installed.
        EnvironmentFaultError: it does not load, or it runs no engines any more.
    """
    try:  # its libraries may miss others of their own
        package = require("tensorrt_llm")
        module = require("tensorrt_llm.bindings.executor")
    except (ImportError, OSError) as error:
        raise EnvironmentFaultError(f"TensorRT-LLM does not load here: {error}") from error
    version = str(getattr(package, "__version__", "unknown"))
    missing = [name for name in (*_NEEDED, *_NEEDED_TOO) if not hasattr(module, name)]
    if missing:
        raise EnvironmentFaultError(
            f"this TensorRT-LLM ({version}) does not run engines: its bindings have no {', '.join(missing)}.",
            hint="Engines need TensorRT-LLM 1.2 or older. Newer ones: --decoder trtllm-api --checkpoint DIR.",
        )
    table = getattr(module, "MropeConfig", None)
    return ExecutorApi(
        module=module,
        version=version,
        package=Path(str(package.__file__)).parent,
        length="max_tokens" if hasattr(module.Request, "max_tokens") else "max_new_tokens",
        seed="seed" if hasattr(module.SamplingConfig, "seed") else "random_seed",
        extra_ids=hasattr(module.PromptTuningConfig, "input_token_extra_ids"),
        rotary=None if table is None else _NEW_TABLE if hasattr(table, _NEW_TABLE) else _OLD_TABLE,
    )


def make_executor(api: ExecutorApi, engine: Path, facts: EngineFacts) -> Any:
    """An executor that runs an engine; requests are batched in flight.

    An engine over several GPUs is run by worker processes that the executor starts (its "orchestrator" mode), so that
    no mpirun is needed.

    Source: examples/bindings/executor/example_advanced.py, 0.16.0.dev2024121000.
    """
    trtllm = api.module
    serial = facts.mrope and api.mixes_rotary_tables
    config = trtllm.ExecutorConfig(
        max_beam_width=1,
        # without the numbers that tell images apart, two images of equally many rows would share keys and values
        kv_cache_config=trtllm.KvCacheConfig(enable_block_reuse=facts.reuse and api.extra_ids),
        max_batch_size=1 if serial else facts.batch,
    )
    if facts.world > 1:
        worker = api.package / "bin" / "executorWorker"
        config.parallel_config = trtllm.ParallelConfig(
            communication_type=trtllm.CommunicationType.MPI,
            communication_mode=trtllm.CommunicationMode.ORCHESTRATOR,
            orchestrator_config=trtllm.OrchestratorConfig(is_orchestrator=True, worker_executable_path=str(worker)),
        )
    return trtllm.Executor(engine, trtllm.ModelType.DECODER_ONLY, config)


@dataclass(frozen=True)
class EngineRequest:
    """What an engine is asked.

    Attributes:
        ids: [S], visual rows as vocab_size + i. extra: [S], or None where this version takes none.
        rows: [R, D] of the engine's element type, as a torch tensor; None for a prompt of words alone.
        rotary, delta: see `trtllm_prompts`; None where positions are plain numbers.
        ends: token ids that end the answer, the first one the model's own.
    """

    ids: list[int]
    extra: list[int] | None
    rows: Any | None
    rotary: npt.NDArray[np.float32] | None
    delta: int
    ends: tuple[int, ...]


def request_from_parts(api: ExecutorApi, parts: EngineRequest, sampling: SamplingSettings) -> Any:
    """The executor's request: streaming, new tokens only.

    Raises:
        UsageError: top_k is larger than the executor's.
    """
    trtllm = api.module
    words: dict[str, Any] = {api.length: sampling.max_new_tokens}
    if parts.rows is not None:
        table: dict[str, Any] = {"embedding_table": parts.rows}
        if parts.extra is not None:
            table["input_token_extra_ids"] = parts.extra
        words["prompt_tuning_config"] = trtllm.PromptTuningConfig(**table)
    if parts.rotary is not None:
        assert api.rotary is not None  # the decoder refused the engine otherwise
        angles = require("torch").from_numpy(parts.rotary)
        words["mrope_config"] = trtllm.MropeConfig(**{api.rotary: angles, "mrope_position_deltas": parts.delta})
    if len(parts.ends) > 1:
        words["stop_words"] = [[token] for token in parts.ends[1:]]
    return trtllm.Request(
        input_token_ids=parts.ids,
        streaming=True,
        sampling_config=_sampling(api, sampling),
        output_config=trtllm.OutputConfig(exclude_input_from_output=True),
        end_id=parts.ends[0] if parts.ends else None,
        **words,
    )


def _sampling(api: ExecutorApi, sampling: SamplingSettings) -> Any:
    """Greedy is top_k 1. A seed is always named: without one every request has seed 0 and draws alike."""
    if sampling.temperature == 0:
        return api.module.SamplingConfig(beam_width=1, top_k=1)
    if sampling.top_k > TOP_K_MAX:
        raise UsageError(f"top_k is {sampling.top_k}; TensorRT-LLM takes at most {TOP_K_MAX}, or 0 for all.")
    words: dict[str, Any] = {
        "top_k": sampling.top_k,
        "top_p": sampling.top_p,  # never left out: 0 for both would be greedy
        "temperature": sampling.temperature,
        api.seed: secrets.randbits(31) if sampling.seed is None else sampling.seed,
    }
    return api.module.SamplingConfig(beam_width=1, **words)
