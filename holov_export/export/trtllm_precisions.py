"""Which types TensorRT-LLM stores weights, keys and values in, and the options of its two programs that ask for them.

`convert_checkpoint.py` rounds weights by themselves; with `--int8_kv_cache` it reads texts too, to set the scales of
keys and values. `quantize.py` reads texts for everything, and needs NVIDIA's ModelOpt and a GPU that holds the whole
model.

| weights | by | keys and values |
|---|---|---|
| float16, bfloat16 | convert; quantize (`full_prec`) for fp8 | int8, fp8 |
| int8, int4 | convert, weights only | int8 |
| int8_sq | quantize: SmoothQuant, activations too | int8 |
| int4_awq | quantize, weights only | int8, fp8 |
| w4a8_awq | quantize: 4-bit weights, fp8 activations | fp8 |
| fp8 | quantize | fp8, also by default |

Pairs that are not here are not documented by TensorRT-LLM and refused.

Source: NVIDIA/TensorRT-LLM examples/models/core/llama/README.md@076efc2 (INT8 KV cache, SmoothQuant, FP8, AWQ),
examples/quantization/quantize.py@059c97c, tensorrt_llm/quantization/quantize_by_modelopt.py@042c510
(quantize_and_export), docs/source/features/quantization.md@09d4c79 (Hardware Support Matrix); the options in older
versions: tests/trtllm_standin/commands.py.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

from holov_export.errors import UnknownNameError, UnsupportedModelError, UsageError
from holov_export.targets import EngineTarget

TrtllmWeights = Literal["float16", "bfloat16", "int8", "int4", "int8_sq", "int4_awq", "w4a8_awq", "fp8"]
TrtllmKvCache = Literal["auto", "int8", "fp8"]
#: weights that share a scale; quantize.py's own default
AWQ_BLOCK = 128
#: where the tensor cores know 8-bit floats
_FP8_SM = 89


@dataclass(frozen=True)
class _Way:
    """How weights of one type are made.

    Attributes:
        convert: options of convert_checkpoint.py; None where only quantize.py makes them.
        qformat: of quantize.py, "" where only the other makes them.
        kv: of keys and values, which program stores them so.
        sm: lowest compute capability of the GPU, without the dot.
    """

    convert: tuple[str, ...] | None = ()
    qformat: str = ""
    kv: dict[TrtllmKvCache, Literal["convert", "quantize"]] = field(default_factory=dict)
    sm: int = 0


_WAYS: dict[TrtllmWeights, _Way] = {
    "float16": _Way(qformat="full_prec", kv={"int8": "convert", "fp8": "quantize"}),
    "bfloat16": _Way(qformat="full_prec", kv={"int8": "convert", "fp8": "quantize"}),
    "int8": _Way(("--use_weight_only", "--weight_only_precision", "int8"), kv={"int8": "convert"}),
    "int4": _Way(("--use_weight_only", "--weight_only_precision", "int4"), kv={"int8": "convert"}),
    "int8_sq": _Way(None, "int8_sq", {"int8": "quantize"}),
    "int4_awq": _Way(None, "int4_awq", {"int8": "quantize", "fp8": "quantize"}),
    "w4a8_awq": _Way(None, "w4a8_awq", {"fp8": "quantize"}, sm=_FP8_SM),
    "fp8": _Way(None, "fp8", {"fp8": "quantize"}, sm=_FP8_SM),
}


@dataclass(frozen=True)
class PrecisionOptions:
    """What the first command is told.

    Attributes:
        quantizer: quantize.py makes it, else convert_checkpoint.py.
        options: of that program, `--dtype` among them.
        reads_texts: to set scales; from the hub unless it is told where they lie.
    """

    quantizer: bool
    options: tuple[str, ...]
    reads_texts: bool


def precision_options(
    weights: str, kv_cache: str, *, qwen: bool = False, target: EngineTarget | None = None
) -> PrecisionOptions:
    """The options for a type of weights and one of keys and values.

    Args:
        weights: one of `TrtllmWeights`. kv_cache: one of `TrtllmKvCache`.
        qwen: the language model is Qwen2.5-VL's.
        target: what the engine will run on, if that is known.

    Raises:
        UnknownNameError: no such weights, or no such keys and values.
        UsageError: a pair that TensorRT-LLM does not document, or that the target's GPU has not.
        UnsupportedModelError: for this language model the program would load the whole model to read texts.
    """
    for name, asked, known in (("weights", weights, TrtllmWeights), ("keys and values", kv_cache, TrtllmKvCache)):
        if asked not in get_args(known):
            raise UnknownNameError(f"unknown {name} '{asked}'.", hint=f"Known: {', '.join(get_args(known))}.")
    way = _WAYS[weights]  # type: ignore[index]
    if target is not None and target.sm < way.sm:
        able = [name for name, other in _WAYS.items() if other.sm <= target.sm]
        raise UsageError(
            f"'{weights}' computes in 8-bit floats, which begin with compute capability 8.9; {target.title} has "
            f"{target.compute_capability}.",
            hint=f"Choose one of {', '.join(able)}.",
        )
    if kv_cache != "auto" and kv_cache not in way.kv:
        others = f"{', '.join(way.kv)} or auto" if way.kv else "auto"
        raise UsageError(
            f"TensorRT-LLM documents no {kv_cache} keys and values beside '{weights}'.", hint=f"Choose {others}."
        )
    made = _options(weights, way, kv_cache)
    if qwen and made.reads_texts:
        what = weights if kv_cache == "auto" else f"{weights} with {kv_cache} keys and values"
        raise UnsupportedModelError(
            f"'{what}' is not planned for Qwen2.5-VL: TensorRT-LLM's program loads the whole model for it.",
            hint="Choose float16, bfloat16, int8 or int4, and leave --kv-cache out.",
        )
    return made


def _options(weights: str, way: _Way, kv_cache: str) -> PrecisionOptions:
    dtype = ("--dtype", "bfloat16" if weights == "bfloat16" else "float16")
    stored = "fp8" if weights == "fp8" else kv_cache
    by = way.kv.get(stored, "quantize" if way.convert is None else "convert")  # type: ignore[call-overload]
    if by == "convert":
        eight = ("--int8_kv_cache",) if stored == "int8" else ()
        return PrecisionOptions(False, (*dtype, *(way.convert or ()), *eight), reads_texts=bool(eight))
    block = ("--awq_block_size", str(AWQ_BLOCK)) if "awq" in way.qformat else ()
    kept = () if stored == "auto" else ("--kv_cache_dtype", stored)
    return PrecisionOptions(True, (*dtype, "--qformat", way.qformat, *block, *kept), reads_texts=True)


def precision_notes(weights: str, kv_cache: str, options: PrecisionOptions, target: EngineTarget | None) -> list[str]:
    """What a user should know about these types."""
    notes = []
    if options.reads_texts:
        program = "quantize.py" if options.quantizer else "convert_checkpoint.py"
        notes.append(
            f"{program} reads texts from the hub to set its scales; add --calib_dataset DIR where there is none"
        )
    if options.quantizer:
        notes.append("quantize.py needs nvidia-modelopt and a GPU that holds the whole model in 16 bits")
    if weights in ("fp8", "w4a8_awq") and target is None:
        notes.append(f"{weights} needs a GPU of compute capability 8.9 or newer; not Orin")
    if kv_cache == "fp8" and target is not None and target.sm < _FP8_SM:
        notes.append(
            f"TensorRT-LLM's table has fp8 keys and values on Ampere; {target.title} itself is not in it: int8 is the "
            "careful choice"
        )
    return notes
