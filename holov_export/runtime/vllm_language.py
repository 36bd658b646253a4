"""Models that vLLM lacks, but whose language model it has: the language model alone, made known under their name."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from holov_export.extras import require

#: the architecture in a checkpoint's config.json -> vLLM's class of its language model
LANGUAGE_ONLY = {"VideoLlavaForConditionalGeneration": "LlamaForCausalLM"}
#: what a name begins with in a checkpoint of transformers 4 or 5 -> in the language model's own checkpoint
_PREFIXES = (
    ("model.language_model.", "model."),
    ("language_model.model.", "model."),
    ("language_model.lm_head.", "lm_head."),
    ("lm_head.", "lm_head."),
)


def language_name(name: str) -> str | None:
    """The name of a tensor in the language model's own checkpoint; None if it is not of the language model."""
    for old, new in _PREFIXES:
        if name.startswith(old):
            return new + name.removeprefix(old)
    return None


def register_language_only(architecture: str) -> None:
    """Make vLLM load the language model of checkpoints of `architecture`, a key of `LANGUAGE_ONLY`.

    It is known in this process only, and in those that are forked from it.
    """
    registry = require("vllm").ModelRegistry
    base: Any = registry._try_load_model_cls(LANGUAGE_ONLY[architecture])

    class LanguageOnly(base):  # type: ignore[misc]
        """The language model of a checkpoint that has more in it."""

        def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
            whole = vllm_config.model_config
            text = vllm_config.with_hf_config(whole.hf_config.get_text_config(), architectures=[base.__name__])
            super().__init__(vllm_config=text, prefix=prefix)

        def load_weights(self, weights: Iterable[tuple[str, Any]]) -> set[str]:
            loaded: set[str] = super().load_weights(_language_tensors(weights))
            return loaded

    LanguageOnly.__name__ = LanguageOnly.__qualname__ = f"{architecture}Language"
    registry.register_model(architecture, LanguageOnly)


def _language_tensors(weights: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
    for name, tensor in weights:
        new = language_name(name)
        if new is not None:
            yield new, tensor
