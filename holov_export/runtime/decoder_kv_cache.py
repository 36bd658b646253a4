"""What a decoder's keys and values are stored in, and which back end can store them in 8 bits.

| decoder | int8 | fp8 |
|---|---|---|
| `llamacpp` | Q8_0, with flash attention | has none |
| `vllm` | `int8_per_token_head`, on a GPU | `fp8`, E4M3 |
| `trtllm-api` | warned about and not done (1.2) | `fp8` |
| `trtllm` | fixed when the engine is built | fixed when the engine is built |
| `vllm-server` | the server's own setting | the server's own setting |
| `genai`, `ort` | the graph's own, see `export --decoder-kv-cache` | no kernel on a CPU |
| `hf` | the reference stays exact | the reference stays exact |

Source: ggml-org/llama.cpp src/llama-context.cpp at 0c1e570 (llama_init_from_model); vLLM 0.32 vllm/config/cache.py
(CacheDType), v1/attention/backends/{flash_attn,triton_attn,cpu_attn}.py (supported_kv_cache_dtypes); TensorRT-LLM 1.2
tensorrt_llm/llmapi/llm_args.py (KvCacheConfig.dtype, sync_quant_config_with_kv_cache_config_dtype).
"""

from __future__ import annotations

from typing import Literal

from holov_export.errors import UnknownNameError, UsageError

KvCache = Literal["auto", "int8", "fp8"]
KV_CACHES: tuple[KvCache, ...] = ("auto", "int8", "fp8")
#: those that take another type when they are loaded, and what they call it
TAKES: dict[str, dict[KvCache, str]] = {
    "llamacpp": {"int8": "Q8_0"},
    "vllm": {"int8": "int8_per_token_head", "fp8": "fp8"},
    "trtllm-api": {"fp8": "fp8"},
}
#: (why not, what to do instead)
_EMBEDDED = (
    "what the embedded decoder stores is in its graph",
    "It is int8 in bundles exported with --decoder-kv-cache int8, see `inspect`. Or choose --decoder llamacpp or vllm.",
)
_INSTEAD: dict[str, tuple[str, str]] = {
    "llamacpp": ("llama.cpp has no 8-bit floats", "Choose --kv-cache int8."),
    "trtllm-api": ("TensorRT-LLM's LLM API takes no int8 there", "Choose --kv-cache fp8, or --decoder trtllm."),
    "trtllm": (
        "an engine stores what it was built for",
        "Build it so: holov-export compile BUNDLE --decoder trtllm --kv-cache int8 (or fp8)",
    ),
    "vllm-server": ("the server decides", "Start it with: vllm serve ... --kv-cache-dtype fp8"),
    "auto": _EMBEDDED,
    "genai": _EMBEDDED,
    "ort": _EMBEDDED,
    "hf": ("transformers is the reference and stays exact", "Choose --decoder llamacpp or vllm."),
}


def kv_cache_name(decoder: str, kv_cache: str) -> str | None:
    """What the back end calls the type; None for its own choice.

    Args:
        decoder: one of `decoder_choice.DECODERS`.
        kv_cache: "auto", "int8" or "fp8".

    Raises:
        UnknownNameError: another type.
        UsageError: the back end cannot store it; says why and what to use.
    """
    if kv_cache not in KV_CACHES:
        raise UnknownNameError(f"unknown type of keys and values '{kv_cache}'.", hint=f"Known: {', '.join(KV_CACHES)}.")
    if kv_cache == "auto":
        return None
    known = TAKES.get(decoder, {})
    if kv_cache in known:
        return known[kv_cache]
    reason, hint = _INSTEAD.get(decoder, ("it has no keys and values", "Choose --decoder llamacpp or vllm."))
    raise UsageError(f"the decoder '{decoder}' cannot store keys and values in {kv_cache}: {reason}.", hint=hint)
