"""LLaVA-1.5 for TensorRT-LLM's PyTorch backend, which has only LLaVA-NeXT: a model and its input processor.

The model is the language model alone: visual rows come from the caller. `register` tells TensorRT-LLM of both, as its
documentation has it for models outside of its tree. **It has not run on the real TensorRT-LLM.**

Source: NVIDIA/TensorRT-LLM examples/llm-api/out_of_tree_example@eef8cda, tensorrt_llm/inputs/registry.py@002f3cc
(register_input_processor, create_input_processor, maybe_compute_mm_embed_cumsum), tensorrt_llm/_torch/models/
modeling_llava_next.py@b35ac1b (what a model must have), modeling_utils.py (register_auto_model) and
modeling_multimodal_utils.py@000a01d and newer (fuse_input_embeds).
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from holov_export.extras import require
from holov_export.runtime.decoder_trtllm_api import TOKEN_IDS

#: what a checkpoint's config.json calls the model
ARCHITECTURE = "LlavaForConditionalGeneration"
MODEL_TYPE = "llava"
_MODELS = "tensorrt_llm._torch.models"
#: names of the language model's weights: (prefix in the checkpoint, that of LlamaForCausalLM). Longest first
_PREFIXES = (
    ("model.language_model.", "model."),
    ("language_model.model.", "model."),
    ("language_model.lm_head.", "lm_head."),
    ("lm_head.", "lm_head."),
)


def register() -> None:
    """Make `tensorrt_llm.LLM` load LLaVA-1.5 checkpoints with the classes of this module. Again does nothing.

    Raises:
        MissingExtraError: TensorRT-LLM is not installed.
    """
    utils = require(f"{_MODELS}.modeling_utils")
    inputs = require("tensorrt_llm.inputs")
    known = utils.MODEL_CLASS_MAPPING.get(ARCHITECTURE)
    if known is not None and known.__module__ == __name__:
        return
    transformers = require("transformers")
    processor = type("HolovLlavaProcessor", (LlavaRows, inputs.BaseMultimodalInputProcessor), {})
    model = type(
        "HolovLlavaModel", (LlavaLanguage, transformers.PreTrainedModel), {"config_class": transformers.LlavaConfig}
    )
    placeholder = inputs.MultimodalPlaceholderMetadata(
        placeholder_map={"image": "<image>"},
        placeholder_placement=inputs.MultimodalPlaceholderPlacement.BEFORE_TEXT,
    )
    inputs.register_input_processor(processor, model_type=MODEL_TYPE, placeholder_metadata=placeholder)(model)
    utils.register_auto_model(ARCHITECTURE)(model)


class LlavaRows:
    """Text and visual rows become ids and rows: a placeholder of K rows becomes K ids from vocab_size on.

    It is joined with TensorRT-LLM's BaseMultimodalInputProcessor when it is registered.
    """

    def __init__(
        self,
        model_path: str,
        config: Any,
        tokenizer: Any,
        trust_remote_code: bool = True,
        **other: Any,  # TensorRT-LLM passes what other models need
    ) -> None:
        if tokenizer is None:
            tokenizer = require("transformers").AutoTokenizer.from_pretrained(model_path)
        self._config, self._tokenizer, self._model_path = config, tokenizer, model_path
        self._trust_remote_code, self._use_fast = trust_remote_code, True
        self._multimodal_hashing_supported: bool | None = False

    @property
    def processor(self) -> Any:
        """None: pictures are not processed here."""
        return None

    @property
    def tokenizer(self) -> Any:
        return self._tokenizer

    @property
    def config(self) -> Any:
        return self._config

    @property
    def dtype(self) -> Any:
        return getattr(self._config.text_config, "torch_dtype", None)

    def get_vocab_size(self) -> int:
        """Ids from here on are visual rows."""
        return int(self._config.text_config.vocab_size)

    def get_mm_token_ids(self) -> None:
        """None: visual rows are told by their ids."""

    def get_mm_special_token_ids(self) -> None:
        """None: nothing stands around an image."""

    def __call__(self, inputs: Mapping[str, Any], sampling_params: Any) -> tuple[list[int], None]:
        """A prompt of words alone."""
        if inputs.get("multi_modal_data"):
            raise ValueError("this LLaVA takes visual rows (multi_modal_embeddings), not pictures.")
        return [int(token) for token in self._tokenizer(inputs["prompt"]).input_ids], None

    def attach_multimodal_embeddings(
        self, inputs: Mapping[str, Any], multimodal_embedding: Mapping[str, Any], sampling_params: Any
    ) -> tuple[list[int], dict[str, Any]]:
        """(ids of the prompt, the rows of all its images one behind the other).

        Args:
            inputs: with "prompt".
            multimodal_embedding: "image": torch [K, D] of each image; `TOKEN_IDS`: the ids of the prompt with a
                placeholder for each row, where the caller knows them better than the tokenizer here.

        Raises:
            ValueError: rows and placeholders differ, or rows of another width.
        """
        rows: Sequence[Any] = multimodal_embedding["image"]
        width = int(self._config.text_config.hidden_size)
        for item in rows:
            if item.dim() != 2 or item.shape[1] != width:
                raise ValueError(f"an image's rows have the shape {tuple(item.shape)}, the model takes [K, {width}].")
        placeholder = int(getattr(self._config, "image_token_id", None) or self._config.image_token_index)
        ids = multimodal_embedding.get(TOKEN_IDS)
        if ids is None:
            ids = _repeated(
                list(self._tokenizer(inputs["prompt"]).input_ids), placeholder, [len(item) for item in rows]
            )
        together = require("torch").cat(list(rows), dim=0)
        count = sum(token == placeholder for token in ids)
        if count != len(together):
            raise ValueError(f"the prompt has {count} places for {len(together)} visual rows.")
        made_up = iter(range(self.get_vocab_size(), self.get_vocab_size() + count))
        fused = [next(made_up) if token == placeholder else int(token) for token in ids]
        return fused, {"multimodal_data": {"multimodal_embedding": together}}


def _repeated(ids: list[int], placeholder: int, counts: list[int]) -> list[int]:
    """The ids with each placeholder repeated once for each row of its image."""
    if ids.count(placeholder) != len(counts):
        raise ValueError(f"the text has {ids.count(placeholder)} places for {len(counts)} images.")
    remaining = iter(counts)
    return [token for one in ids for token in ([one] if one != placeholder else [one] * next(remaining))]


class LlavaLanguage:
    """LLaVA-1.5's language model, where ids from vocab_size on are visual rows.

    It is joined with transformers' PreTrainedModel when it is registered, as TensorRT-LLM's own models are.
    """

    llm: Any
    config: Any
    model_config: Any

    def __init__(self, model_config: Any, *args: Any, **kwargs: Any) -> None:  # as TensorRT-LLM calls its models
        super().__init__(model_config.pretrained_config)  # type: ignore[call-arg]
        if hasattr(self, "llm"):
            return
        language = copy.deepcopy(model_config)
        text = language.pretrained_config = model_config.pretrained_config.text_config
        if not text.architectures:
            text.architectures = ["LlamaForCausalLM"]
        self.llm = require(f"{_MODELS}.modeling_auto").AutoModelForCausalLM.from_config(language)
        self.model_config = model_config
        self.post_config()
        self.is_loaded = True

    def post_config(self) -> None:
        """TensorRT-LLM asks the model for the sizes of its language model."""
        self.config = self.llm.config
        self.model_config.pretrained_config = self.llm.config

    def infer_max_seq_len(self) -> int:
        return int(self.llm.infer_max_seq_len())

    def load_weights(self, weights: Mapping[str, Any]) -> None:
        """Of the whole checkpoint, those of the language model."""
        self.llm.load_weights(language_weights(weights))

    def forward(
        self,
        attn_metadata: Any,
        input_ids: Any = None,
        position_ids: Any = None,
        inputs_embeds: Any = None,
        return_context_logits: bool = False,
        **kwargs: Any,  # what else a step of TensorRT-LLM carries
    ) -> Any:
        """Logits of a step: prompts that begin, one behind the other, then one token of each that goes on."""
        starting = (kwargs.get("multimodal_params") or [])[: attn_metadata.num_contexts]
        rows = [params.multimodal_data["multimodal_embedding"] for params in starting]
        fuse = require(f"{_MODELS}.modeling_multimodal_utils").fuse_input_embeds
        known = inspect.signature(fuse).parameters
        places = {
            name: kwargs[name]
            for name in ("text_token_indices", "mm_token_indices")
            if name in known and name in kwargs
        }
        fused = fuse(self.llm.model.embed_tokens, input_ids, rows, **places)
        return self.llm.forward(attn_metadata, fused[0], position_ids, fused[1], return_context_logits)


def language_weights(weights: Mapping[str, Any]) -> dict[str, Any]:
    """The language model's weights under LlamaForCausalLM's names; both layouts that transformers has written."""
    found: dict[str, Any] = {}
    for name, value in weights.items():
        for prefix, own in _PREFIXES:
            if name.startswith(prefix):
                found[own + name[len(prefix) :]] = value
                break
    return found
