"""The language model of a checkpoint as ONNX Runtime GenAI's builder reads it: what is refused, and what is written.

LLaMA and Mistral become checkpoints of their own. The builder knows Qwen2.5-VL's language model only inside the whole
model, so that is written with a tower of no layers, which is not built.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from holov_export.errors import CheckpointError, UnsupportedModelError
from holov_export.export.decoder_weights import HEAD, NO_DECODER, StoredTensor, mistaken_head, write_language_model
from holov_export.extras import require
from holov_export.spec import DecoderSpec

#: the builder's name of each language model, by transformers' `model_type`
ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2_5_vl_text": "Qwen2_5_VLForConditionalGeneration",
}
_INSIDE = "qwen2_5_vl_text"
_UNCONVERTED = "modules_to_not_convert"
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)


def check_language_model(folder: Path, spec: DecoderSpec) -> None:
    """Refuse, from config.json alone, a language model that `decoder_from_checkpoint` would refuse later.

    Args:
        folder: a checkpoint directory; its weights need not be there.
        spec: of the language model.

    Raises:
        CheckpointError: config.json does not load.
        UnsupportedModelError: another architecture, or one that the builder would get wrong.
    """
    config = _checked(model_config(folder).get_text_config())
    check_placeholder(spec, config.vocab_size)
    head = _head_width(config)
    linears = {
        "self_attn.q_proj": config.num_attention_heads * head,
        "self_attn.k_proj": config.num_key_value_heads * head,
        "self_attn.v_proj": config.num_key_value_heads * head,
        "self_attn.o_proj": config.hidden_size,
        "mlp.gate_proj": config.intermediate_size,
        "mlp.up_proj": config.intermediate_size,
        "mlp.down_proj": config.hidden_size,
    }
    for name, width in linears.items():
        if width == config.vocab_size:
            raise mistaken_head(name, width)


def model_config(folder: Path) -> Any:
    """transformers' configuration of a checkpoint.

    Raises:
        CheckpointError: it does not load.
    """
    transformers = require("transformers")
    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
        config.get_text_config()
    except Exception as error:  # huggingface_hub's validation errors are none of Python's own
        raise CheckpointError(f"config.json of '{folder.name}' does not load: {error}") from error
    return config


def _checked(config: Any) -> Any:
    """The configuration of a language model that ONNX Runtime can run as it was trained."""
    if config.model_type not in ARCHITECTURES:
        raise UnsupportedModelError(
            f"the language model is a '{config.model_type}'; the embedded decoder is built for "
            f"{', '.join(ARCHITECTURES)}.",
            hint=NO_DECODER,
        )
    width = _head_width(config)
    if width % 8:  # it builds, and fails at the first token
        raise UnsupportedModelError(
            f"the attention heads are {width} wide; ONNX Runtime's GroupQueryAttention takes multiples of 8.",
            hint=NO_DECODER,
        )
    window = getattr(config, "sliding_window", None)
    if window is not None and window < config.max_position_embeddings:
        raise UnsupportedModelError(
            f"the language model attends to the last {window} tokens; the embedded decoder would attend to all.",
            hint=NO_DECODER,
        )
    return config


def _head_width(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def check_placeholder(spec: DecoderSpec, vocab_size: int) -> None:
    """Refuse a placeholder that has no row in the embedding table.

    Raises:
        UnsupportedModelError: names both numbers.
    """
    if not 0 <= spec.image_token_id < vocab_size:
        raise UnsupportedModelError(
            f"the image placeholder has id {spec.image_token_id}, the embedding table has {vocab_size} rows.",
            hint=NO_DECODER,
        )


def write_checkpoint(
    folder: Path, target: Path, tensors: Mapping[str, StoredTensor], quantization: Mapping[str, Any] | None = None
) -> None:
    """Write the language model of the checkpoint in `folder` as a directory that the builder can read.

    Args:
        folder: a checkpoint directory.
        target: does not exist yet.
        tensors: of the language model, see `decoder_weights.language_tensors`.
        quantization: `quantization_config` of a checkpoint in 4 bits; None for one in float.

    Raises:
        CheckpointError, UnsupportedModelError: see `check_language_model`.
    """
    whole = model_config(folder)
    text = _checked(whole.get_text_config())
    if hasattr(text, "sliding_window"):
        text.sliding_window = None  # one that no sequence outgrows
    # outer and inner configurations disagree; the weights do not
    text.tie_word_embeddings = whole.tie_word_embeddings = HEAD not in tensors
    config = text
    if text.model_type == _INSIDE:
        config = whole
        config.vision_config = _no_tower(whole.vision_config)
    config.architectures = [ARCHITECTURES[text.model_type]]
    if quantization:  # that of the outer configuration, which names parts that are not written
        config.quantization_config = {key: quantization[key] for key in quantization if key != _UNCONVERTED}
    target.mkdir()
    config.save_pretrained(target)
    for name in _TOKENIZER_FILES:
        if (folder / name).is_file():
            shutil.copy(folder / name, target / name)
    write_language_model(tensors, target)


def _no_tower(vision: Any) -> Any:
    """A tower of no layers that is a few numbers wide: transformers makes up the weights that a checkpoint lacks."""
    return type(vision)(
        depth=0, hidden_size=8, intermediate_size=8, num_heads=1, out_hidden_size=8, fullatt_block_indexes=[]
    )
