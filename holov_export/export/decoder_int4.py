"""How an int4 decoder is rounded: what ONNX Runtime GenAI's builder is told, and checkpoints that come in 4 bits.

A checkpoint of AutoAWQ or AutoGPTQ keeps its own numbers: the builder repacks them and rounds nothing anew. Its head,
which such checkpoints leave in float, becomes 8 bits. What the builder would read wrongly is refused.

Source: onnxruntime_genai 0.11.0 and 0.11.4 to 0.18.0, models/builder.py, models/builders/base.py
(make_int4_algo_config, make_quant_init), models/quantized_model.py and models/loaders/{base,awq,gptq}.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

from holov_export.errors import CheckpointError, EnvironmentFaultError, UnsupportedModelError, UsageError
from holov_export.export.decoder_language import model_config
from holov_export.export.decoder_weights import NO_DECODER, StoredTensor
from holov_export.spec import DecoderPrecision, Int4Settings

__all__ = ["builder_options", "check_stored_int4", "int4_settings", "quantization_of", "refuse_quantized"]

#: of a checkpoint's own numbers; the builder's name for its own rounding is "default" (one pass of MLAS in C++; its
#: "rtn" is the same idea in numpy, slower, with other names in the graph)
_CHECKPOINTS = ("awq", "gptq")
_BUILDER_NAMES = {"rtn": "default", "awq": "k_quant_last", "gptq": "k_quant_last"}
_SIZES = get_args(Int4Settings.model_fields["block_size"].annotation)
#: options lost their prefix in this version; the old names go away some day
_BARE_NAMES = (0, 15)
#: older ones take "k_quant" for "default" without a word
_K_QUANT = (0, 11, 4)
_LINEAR = re.compile(r"^(model\.layers\.\d+\.(?:self_attn|mlp)\.\w+_proj)\.(.+)$")
_PARTS = {"awq": {"qweight", "qzeros", "scales"}, "gptq": {"qweight", "qzeros", "scales", "g_idx"}}


def int4_settings(
    folder: Path, precision: DecoderPrecision | None, asked: Int4Settings | None = None
) -> Int4Settings | None:
    """How the decoder of a checkpoint will be rounded, from its config.json alone.

    Args:
        folder: a checkpoint directory; its weights need not be there.
        precision: of the decoder; None for none.
        asked: by the user; None for the usual way. The block size of a checkpoint in 4 bits is its own.

    Returns:
        The settings of an int4 decoder, None for others.

    Raises:
        CheckpointError: config.json does not load.
        UsageError: the checkpoint's weights are of 4 bits and something else is asked for, or the other way round; or
            groups that the algorithm cannot pack.
        UnsupportedModelError: they are stored in a way that the builder does not read.
    """
    own = None if precision is None else _own(folder)
    if own is None:
        if asked is not None and asked.algorithm in _CHECKPOINTS:
            raise UsageError(
                f"'{folder.name}' is not quantised: '{asked.algorithm}' stands for a checkpoint that is.",
                hint="Choose rtn or one of k_quant, or name a checkpoint of AutoAWQ or AutoGPTQ.",
            )
        if precision is not DecoderPrecision.INT4:
            return None
        settings = asked or Int4Settings()
        _check_groups(model_config(folder).get_text_config(), settings)
        return settings
    if precision is not DecoderPrecision.INT4:
        raise UsageError(
            f"the weights of '{folder.name}' are of 4 bits ({own.algorithm}); the embedded decoder can only be int4.",
            hint="Add --decoder-precision int4, or leave the decoder out: --no-decoder",
        )
    if asked is not None and asked.algorithm not in (own.algorithm, "rtn"):
        raise UsageError(
            f"the weights of '{folder.name}' are of 4 bits already ({own.algorithm}), '{asked.algorithm}' cannot round "
            "them again.",
            hint=f"Choose {own.algorithm}, or export the checkpoint that it was made from.",
        )
    return own if asked is None else own.model_copy(update={"accuracy_level": asked.accuracy_level})


def _check_groups(text: Any, settings: Int4Settings) -> None:
    """Refuse groups that "k_quant" cannot pack: it puts two zero points in a byte and forgets a last single one.

    Seen with onnxruntime 1.31: the builder ends with "cannot reshape array".
    """
    if not settings.algorithm.startswith("k_quant"):
        return
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    for inputs in (text.hidden_size, text.num_attention_heads * head, text.intermediate_size):
        groups = -(-inputs // settings.block_size)
        if groups % 2:
            raise UsageError(
                f"{settings.algorithm} with groups of {settings.block_size}: {inputs} inputs are {groups} groups, "
                "and it packs them by twos.",
                hint="Choose a smaller block size, or the algorithm rtn.",
            )


def quantization_of(config: Any) -> dict[str, Any]:
    """`quantization_config` of transformers' configuration of a checkpoint; empty where it has none."""
    for part in (config, config.get_text_config()):
        found = getattr(part, "quantization_config", None)
        if found is not None:
            return dict(found if isinstance(found, dict) else found.to_dict())
    return {}


def refuse_quantized(config: Any, name: str, who: str) -> None:
    """Refuse a checkpoint in few bits where only float weights are read.

    Args:
        config: transformers' configuration. name: of the checkpoint. who: reads float weights only.

    Raises:
        UnsupportedModelError: says how the weights are stored.
    """
    found = quantization_of(config)
    if found:
        raise UnsupportedModelError(
            f"the weights of '{name}' are quantised ({found.get('quant_method', 'unknown')}); {who} reads float ones.",
            hint="Name the checkpoint that it was made from. --decoder vllm and hf load a quantised one as it is.",
        )


def _own(folder: Path) -> Int4Settings | None:
    """How the checkpoint itself is rounded; None for one in float.

    Raises:
        UnsupportedModelError: in a way that the builder does not read, or reads wrongly.
    """
    config = model_config(folder)
    found = quantization_of(config)
    if not found:
        return None
    method, bits, size = str(found.get("quant_method")), found.get("bits"), found.get("group_size")
    reason = _unreadable(method, found)
    if method not in _CHECKPOINTS:
        reason = f"it is quantised by '{method}'; read are {' and '.join(_CHECKPOINTS)}"
    elif bits != 4:
        reason = f"it has {bits} bits; 4 are read"
    elif size not in _SIZES:
        reason = f"{size} weights share a scale; read are {', '.join(map(str, _SIZES))}"
    elif getattr(config.get_text_config(), "model_type", "") == "qwen2_5_vl_text":
        reason = "the builder loads Qwen2.5-VL's language model as float only"
    if reason:
        raise UnsupportedModelError(f"'{folder.name}' cannot become an embedded decoder: {reason}.", hint=NO_DECODER)
    return Int4Settings.model_validate({"algorithm": method, "block_size": size})


def _unreadable(method: str, found: Mapping[str, Any]) -> str:
    """Why the builder would read numbers of `method` wrongly; "" where it does not."""
    if method == "awq" and str(found.get("version", "gemm")).lower() != "gemm":
        return f"its numbers are laid out as '{found['version']}'; read is 'gemm'"
    if method == "awq" and not found.get("zero_point", True):
        return "its groups have no zero points"
    if method == "gptq" and found.get("checkpoint_format", "gptq") != "gptq":
        return f"its layout is '{found['checkpoint_format']}'; read is 'gptq'"
    if method == "gptq" and found.get("dynamic"):
        return "its layers differ in bits or group size ('dynamic')"
    if method == "gptq" and found.get("desc_act"):
        return "its groups are no neighbours ('desc_act'), which ONNX Runtime's product does not know"
    return ""


def check_stored_int4(tensors: Mapping[str, StoredTensor], settings: Int4Settings) -> None:
    """Refuse a checkpoint in 4 bits whose tensors are not what its config.json says.

    Args:
        tensors: of the language model. settings: "awq" or "gptq"; others have nothing to check.

    Raises:
        UnsupportedModelError: some layers were left in float, which the builder takes for numbers of 4 bits.
        CheckpointError: tensors are missing, or of other shapes.
    """
    if settings.algorithm not in _CHECKPOINTS:
        return
    linears: dict[str, dict[str, StoredTensor]] = {}
    for name, tensor in tensors.items():
        match = _LINEAR.match(name)
        if match and match[2] != "bias":
            linears.setdefault(match[1], {})[match[2]] = tensor
    wanted = _PARTS[settings.algorithm]
    for name, parts in linears.items():
        if "weight" in parts:
            raise UnsupportedModelError(
                f"'{name}' was left in float ('modules_to_not_convert'); the builder reads all products of the "
                "language model's layers in 4 bits or none.",
                hint=NO_DECODER,
            )
        if not wanted <= set(parts):
            raise CheckpointError(f"'{name}' has no {', '.join(sorted(wanted - set(parts)))}.")
        _check_shapes(name, parts, settings)


def _check_shapes(name: str, parts: Mapping[str, StoredTensor], settings: Int4Settings) -> None:
    groups, outputs = parts["scales"].shape
    inputs = groups * settings.block_size
    shape = (inputs, outputs // 8) if settings.algorithm == "awq" else (inputs // 8, outputs)
    found = parts["qweight"].shape, parts["qzeros"].shape
    if found != (shape, (groups, outputs // 8)) or parts["qweight"].dtype != "I32":
        raise CheckpointError(
            f"'{name}' has numbers {list(found[0])} and zero points {list(found[1])} for scales [{groups}, {outputs}]: "
            f"that is not {settings.algorithm} with groups of {settings.block_size}."
        )


def builder_options(settings: Int4Settings, version: str) -> tuple[str, ...]:
    """`--extra_options` of GenAI's builder for an int4 decoder.

    Args:
        version: of onnxruntime-genai.

    Raises:
        EnvironmentFaultError: it is too old for the algorithm, and would take another one without a word.
    """
    number = tuple(int(part) for part in re.findall(r"\d+", version)[:3])
    if settings.algorithm == "k_quant" and number < _K_QUANT:
        raise EnvironmentFaultError(
            f"onnxruntime-genai {version} does not know 'k_quant'.",
            hint="Run: pip install --upgrade onnxruntime-genai. Or choose k_quant_last.",
        )
    prefix = "" if number >= _BARE_NAMES else "int4_"
    words = {
        "algo_config": _BUILDER_NAMES.get(settings.algorithm, settings.algorithm),
        "block_size": settings.block_size,
        "accuracy_level": settings.accuracy_level,
    }
    return tuple(f"{prefix}{name}={value}" for name, value in words.items())
