"""transformers' LLaMA, one layer at a time, with a cache whose layers may have different lengths."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from holov_export.errors import UnsupportedModelError
from holov_export.extras import require
from holov_export.runtime.inner.states import TokenStates

if TYPE_CHECKING:
    import torch


class LlamaLayers:
    """The layers of a LLaVA model's LLaMA. Call its methods under `torch.inference_mode`.

    Attributes:
        depth: number of layers.
    """

    def __init__(self, model: Any) -> None:
        """Take the language model out of transformers' `LlavaForConditionalGeneration`.

        Raises:
            UnsupportedModelError: its language model is no LLaMA.
        """
        self._llama = model.model.language_model
        self._head = model.lm_head
        kind = self._llama.config.model_type
        if kind != "llama":
            raise UnsupportedModelError(f"pruning inside the language model knows LLaMA, this is '{kind}'.")
        self.depth = len(self._llama.layers)

    def layer(self, index: int) -> Any:
        """transformers' layer."""
        return self._llama.layers[index]

    def new_cache(self) -> Any:
        """An empty `DynamicCache`."""
        return require("transformers").DynamicCache(config=self._llama.config)

    def rotary(self, hidden: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(cos, sin) [1, S, width of a head] of positions [S]."""
        cos, sin = self._llama.rotary_emb(hidden, position_ids=positions[None])
        return cos, sin

    def mask(self, hidden: torch.Tensor) -> Any:
        """What transformers' attention takes for a causal prompt: None where the implementation is causal by itself.

        Positions are not passed: transformers would take gaps in them for the borders of packed sequences. Neither is
        the cache: this is for a prefill, whose layers have empty ones.
        """
        if hidden.shape[1] == 1:
            return None  # one token sees everything that is cached
        masks = require("transformers.masking_utils")
        return masks.create_causal_mask(self._llama.config, hidden, attention_mask=None, past_key_values=None)

    def run(self, index: int, hidden: torch.Tensor, positions: torch.Tensor, cache: Any) -> torch.Tensor:
        """[1, S, D]: the output of a layer, which appends S entries to its part of the cache."""
        out: torch.Tensor = self.layer(index)(
            hidden,
            attention_mask=self.mask(hidden),
            position_ids=positions[None],
            past_key_values=cache,
            use_cache=True,
            position_embeddings=self.rotary(hidden, positions),
        )
        return out

    def attended(self, index: int, hidden: torch.Tensor, positions: torch.Tensor, cache: Any) -> torch.Tensor:
        """[1, S, D]: what the FFN of a layer reads before its norm, the attention's output added to `hidden`."""
        layer = self.layer(index)
        out, _ = layer.self_attn(
            hidden_states=layer.input_layernorm(hidden),
            attention_mask=self.mask(hidden),
            position_ids=positions[None],
            past_key_values=cache,
            use_cache=True,
            position_embeddings=self.rotary(hidden, positions),
        )
        added: torch.Tensor = hidden + out
        return added

    def attention(self, index: int, states: TokenStates, queries: torch.Tensor) -> torch.Tensor:
        """float32 [Q, S]: rows of a layer's causal attention, mean over heads, recomputed without the rest of the map.

        Args:
            index: of the layer.
            states: what enters it, S tokens.
            queries: int64 [Q], indices of the asking tokens.
        """
        attention, hidden = self.layer(index).self_attn, self.layer(index).input_layernorm(states.hidden[0])
        rotate = require("transformers.models.llama.modeling_llama").apply_rotary_pos_emb
        q = attention.q_proj(hidden).unflatten(-1, (-1, attention.head_dim)).transpose(0, 1)[None]
        k = attention.k_proj(hidden).unflatten(-1, (-1, attention.head_dim)).transpose(0, 1)[None]
        q, k = rotate(q, k, *self.rotary(hidden, states.positions))
        k = k.repeat_interleave(attention.num_key_value_groups, dim=1)
        scores = (q[0, :, queries] @ k[0].transpose(1, 2)).float() * attention.scaling
        places = queries.new_tensor(range(hidden.shape[0]))
        scores = scores.masked_fill(places[None, None, :] > queries[None, :, None], float("-inf"))
        rows: torch.Tensor = scores.softmax(-1).mean(0)
        return rows

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """float32 [V]: of the token after the last of [1, S, D]."""
        out: torch.Tensor = self._head(self._llama.norm(hidden[0, -1])).float()
        return out
