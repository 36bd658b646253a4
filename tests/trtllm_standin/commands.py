"""The options of TensorRT-LLM's programs, as far as engines of one kind need them, and a reader that knows no other.

Source: examples/{llama,qwen}/convert_checkpoint.py, examples/quantization/quantize.py, tensorrt_llm/commands/build.py
and tensorrt_llm/plugin/plugin.py, 0.16.0.dev2024121000. build.py and plugin.py of 0.12.0.dev2024080600, build.py of
@65f1d15 and examples/models/core/llama/convert_checkpoint.py@368f8f2 have the same ones of these.

--int8_kv_cache: examples/llama/convert_checkpoint.py@04a2cac and examples/models/core/llama/convert_checkpoint.py
@368f8f2; the Qwen converter was not read for it. --qformat, --awq_block_size and --kv_cache_dtype of quantize.py have
the same values in WhiteD2125/TensorRT-LLM@6ad7cf1 (0.10.0.dev2024043000), chiendb97/TensorRT-LLM@04b7e6b (0.14 and
before) and NVIDIA/TensorRT-LLM@059c97c (1.x, which has "nvfp4" as well).
"""

from __future__ import annotations

from collections.abc import Sequence

_DTYPES = ("auto", "float16", "bfloat16", "float32")
_GEMM = ("auto", "float16", "float32", "bfloat16", "int32", "fp8", "disable")
#: stands for an option without a value
FLAG = ("",)
#: program -> option -> what its value may be; an empty tuple: anything
OPTIONS: dict[str, dict[str, tuple[str, ...]]] = {
    "llama/convert_checkpoint.py": {
        "--model_dir": (),
        "--output_dir": (),
        "--tp_size": (),
        "--pp_size": (),
        "--dtype": _DTYPES,
        "--use_weight_only": FLAG,
        "--weight_only_precision": ("int8", "int4", "int8_gptq", "int4_gptq", "int4_awq"),
        "--int8_kv_cache": FLAG,
        "--calib_dataset": (),
        "--load_model_on_cpu": FLAG,
        "--workers": (),
    },
    "qwen/convert_checkpoint.py": {
        "--model_dir": (),
        "--output_dir": (),
        "--tp_size": (),
        "--pp_size": (),
        "--dtype": _DTYPES,
        "--use_weight_only": FLAG,
        "--weight_only_precision": ("int8", "int4", "int4_gptq"),
        "--load_model_on_cpu": FLAG,
        "--workers": (),
    },
    "quantize.py": {
        "--model_dir": (),
        "--output_dir": (),
        "--device": ("cuda", "cpu"),
        "--calib_dataset": (),
        "--dtype": _DTYPES,
        "--qformat": ("fp8", "int8_sq", "int4_awq", "w4a8_awq", "int8_wo", "int4_wo", "full_prec"),
        "--tp_size": (),
        "--pp_size": (),
        "--awq_block_size": (),
        "--kv_cache_dtype": ("int8", "fp8"),
        "--calib_size": (),
        "--batch_size": (),
    },
    "trtllm-build": {
        "--checkpoint_dir": (),
        "--output_dir": (),
        "--max_batch_size": (),
        "--max_input_len": (),
        "--max_seq_len": (),
        "--max_num_tokens": (),
        "--max_beam_width": (),
        "--max_multimodal_len": (),
        "--max_prompt_embedding_table_size": (),
        "--gemm_plugin": _GEMM,
        "--workers": (),
    },
}


def parsed(program: str, words: Sequence[str]) -> dict[str, str]:
    """The options of a command line by name; "" for those without a value.

    Raises:
        ValueError: one that the program does not have, has no such value, or has its value missing.
    """
    found: dict[str, str] = {}
    rest = list(words)
    while rest:
        name = rest.pop(0)
        if name not in OPTIONS[program]:
            raise ValueError(f"{program} has no {name}")
        choices = OPTIONS[program][name]
        if choices == FLAG:
            found[name] = ""
            continue
        if not rest or rest[0].startswith("--"):
            raise ValueError(f"{program}: no value for {name}")
        found[name] = rest.pop(0)
        if choices and found[name] not in choices:
            raise ValueError(f"{program}: {name} must be one of {', '.join(choices)}, not {found[name]}")
    return found
