"""The language model of a checkpoint as TensorRT-LLM's converter reads it, on the transformers that it is used with.

Those are versions 4: a config.json that transformers 5 writes has `rope_parameters`, which they do not know and pass
over, so that Mistral's and Qwen's rotary base would silently become 10000. So the fields are written by name.

Source: NVIDIA/TensorRT-LLM tensorrt_llm/models/llama/config.py and models/qwen/config.py, 0.16.0.dev2024121000 and
@0428c18 (LLaMAConfig.from_hugging_face, QWenConfig.from_hugging_face): the fields that they read.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from holov_export.errors import UnsupportedModelError
from holov_export.export.decoder_int4 import refuse_quantized
from holov_export.export.decoder_language import model_config
from holov_export.export.decoder_weights import HEAD, language_tensors, write_language_model

#: transformers' `model_type` -> (that of the converter, its class)
_CLASSES = {
    "llama": ("llama", "LlamaForCausalLM"),
    "mistral": ("mistral", "MistralForCausalLM"),
    # the language models of Qwen2-VL and Qwen2.5-VL are the same; the converter knows the older name
    "qwen2_5_vl_text": ("qwen2_vl", "Qwen2VLForConditionalGeneration"),
}
_FIELDS = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    *("vocab_size", "max_position_embeddings", "rms_norm_eps", "hidden_act", "bos_token_id", "eos_token_id"),
)
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json")
_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def write_language_checkpoint(checkpoint: Path, target: Path) -> None:
    """Write the language model of a vision-language checkpoint as a directory of its own.

    Args:
        checkpoint: a directory in safetensors. target: does not exist yet.

    Raises:
        CheckpointError: the checkpoint holds no language model or is damaged.
        UnsupportedModelError: another architecture, one that attends to a window, or quantised weights.
    """
    whole = model_config(checkpoint)
    refuse_quantized(whole, checkpoint.name, "TensorRT-LLM's converter, as it is called here,")
    text = whole.get_text_config()
    if text.model_type not in _CLASSES:
        raise UnsupportedModelError(
            f"the language model is a '{text.model_type}'; engines are built for {', '.join(_CLASSES)}."
        )
    window = getattr(text, "sliding_window", None)
    if window is not None and window < text.max_position_embeddings and getattr(text, "use_sliding_window", True):
        raise UnsupportedModelError(
            f"the language model attends to the last {window} tokens; this engine would attend to all."
        )
    tensors = language_tensors(checkpoint)
    target.mkdir()
    config = language_config(text, tied=HEAD not in tensors, dtype=_DTYPES.get(next(iter(tensors.values())).dtype))
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    for name in _TOKENIZER_FILES:
        if (checkpoint / name).is_file():
            shutil.copy(checkpoint / name, target / name)
    write_language_model(tensors, target)


def language_config(text: Any, *, tied: bool, dtype: str | None) -> dict[str, Any]:
    """config.json of a language model in the words of transformers 4.

    Args:
        text: transformers' configuration of it.
        tied: words go out through the table that they come in by.
        dtype: of the weights; None where it is none that torch has.
    """
    kind, architecture = _CLASSES[text.model_type]
    rope = _rope(text)
    config: dict[str, Any] = {name: getattr(text, name) for name in _FIELDS}
    config |= {
        "model_type": kind,
        "architectures": [architecture],
        "rope_theta": float(rope.get("rope_theta", 10000.0)),
        "rope_scaling": None,
        "tie_word_embeddings": tied,
        "torch_dtype": dtype or "float16",
        "attention_bias": bool(getattr(text, "attention_bias", False)),
    }
    head = getattr(text, "head_dim", None)
    if head:
        config["head_dim"] = int(head)
    if kind == "mistral":
        config["sliding_window"] = None  # left out, transformers 4 would make it 4096
    if kind == "qwen2_vl":
        config["rope_scaling"] = {"type": "mrope", "mrope_section": list(rope["mrope_section"])}
        # never built: weights are read by name. transformers wants one
        config["vision_config"] = {"depth": 0, "embed_dim": 8, "hidden_size": text.hidden_size, "num_heads": 1}
    elif rope.get("rope_type", "default") != "default":
        config["rope_scaling"] = {key: value for key, value in rope.items() if key != "rope_theta"}
    return config


def _rope(text: Any) -> dict[str, Any]:
    """The rotary settings, by the names of transformers 5."""
    found = getattr(text, "rope_parameters", None)
    if found:
        return dict(found)
    old = dict(getattr(text, "rope_scaling", None) or {})
    return {**old, "rope_theta": getattr(text, "rope_theta", 10000.0)}
