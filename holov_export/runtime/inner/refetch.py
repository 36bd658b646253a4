"""Refetch, experimental: pruned visual tokens come back as a key-value memory of one layer's FFN.

    FFN(x) <- alpha * delta + (1 - alpha) * FFN(x),   delta = sum_i phi(<x, z_i>) z_i   over the pruned tokens z_i

Source: HoloV, arXiv 2510.02912v2, appendix D, for this formula. The paper gives neither the layer nor alpha nor what
triggers it, and no code is published: everything else here is ours, and is set in `RefetchSettings`. x is what the
FFN's first matrices read (behind the layer's second norm), and only the position that predicts the next token is mixed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import log
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from holov_export.errors import PromptError, UsageError
from holov_export.extras import require
from holov_export.runtime.decoder_hf import HfDecoder, check_llava
from holov_export.runtime.inner.layers import LlamaLayers
from holov_export.runtime.inner.methods import RefetchSettings
from holov_export.spec import DecoderSpec
from holov_export.tensors import FloatArray, Int64Array, StitchedPrompt

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class RefetchPrompt(StitchedPrompt):
    """A prompt of kept visual rows that carries the pruned ones too.

    Attributes:
        pruned: float [P, D], the pruned rows of all images; they are in no place of `input_ids`.
    """

    pruned: FloatArray = field(kw_only=True)


def refetch_prompt(prompt: StitchedPrompt, kept: Sequence[Int64Array]) -> RefetchPrompt:
    """Prune a prompt and keep what was pruned.

    Args:
        prompt: with all N rows of each image, in raster order.
        kept: of each image, positions among its N, as `VisualTokens.positions` has them; negative ones are padding.

    Raises:
        PromptError: another number of images, or a position that an image does not have, or has twice.
    """
    if len(kept) != len(prompt.counts):
        raise PromptError(f"kept positions of {len(kept)} images for a prompt with {len(prompt.counts)}.")
    stays = np.zeros(len(prompt.rows), dtype=bool)
    start, counts = 0, []
    for count, positions in zip(prompt.counts, kept, strict=True):
        real = positions[positions >= 0]
        if len(np.unique(real)) != len(real) or (len(real) and real.max() >= count):
            raise PromptError(f"kept positions must be distinct and below {count}, the rows of their image.")
        stays[start + real] = True
        counts.append(len(real))
        start += count
    of_text = prompt.input_ids != prompt.image_token_id
    in_prompt = of_text.copy()
    in_prompt[~of_text] = stays
    return RefetchPrompt(
        input_ids=prompt.input_ids[in_prompt],
        rows=prompt.rows[stays],
        counts=tuple(counts),
        image_token_id=prompt.image_token_id,
        text=prompt.text,
        pruned=prompt.rows[~stays],
    )


@dataclass(frozen=True)
class Refetched:
    """One step.

    Attributes:
        logits: float32 [V].
        uncertainty: entropy of what the head reads before the layer, over the log of V: 0..1.
        triggered: whether the memory was mixed in.
    """

    logits: Any
    uncertainty: float
    triggered: bool


@dataclass(frozen=True)
class _Going:
    """What a step goes on from."""

    cache: Any
    position: int
    memory: torch.Tensor


class RefetchDecoder(HfDecoder):
    """The transformers decoder with a memory of pruned tokens in one FFN. Experimental, and not exported.

    It takes a `RefetchPrompt`; a plain prompt has no memory and is decoded as by `HfDecoder`.

    Attributes:
        steps: of the latest answer, as far as it has been read.
    """

    def __init__(
        self,
        checkpoint: Path,
        spec: DecoderSpec,
        settings: RefetchSettings | None = None,
        *,
        provider: str = "auto",
        threads: int | None = None,
    ) -> None:
        """Load the checkpoint; see `HfDecoder`.

        Raises:
            UsageError: the layer of the settings is past the last.
        """
        check_llava(checkpoint)
        self._settings = settings or RefetchSettings()
        self._at = spec.layers // 2 if self._settings.layer is None else self._settings.layer
        if self._at >= spec.layers:
            raise UsageError(f"the refetch layer is {self._at}, the decoder has {spec.layers} (0..{spec.layers - 1}).")
        super().__init__(checkpoint, spec, provider=provider, threads=threads)
        LlamaLayers(self._model)  # refuses another architecture now and not at the first question
        self.steps: list[Refetched] = []
        self.name = f"refetch in {self.name}"

    def _check(self, prompt: StitchedPrompt) -> None:
        super()._check(prompt)
        pruned = _pruned_of(prompt)
        if len(pruned) and pruned.shape[1] != self._spec.width:
            raise PromptError(f"the pruned rows are {pruned.shape[1]} wide, the decoder takes {self._spec.width}.")

    def _prefilled(self, prompt: StitchedPrompt) -> tuple[Any, Any]:
        self.steps = []
        torch = self._torch
        embeds = self._embeds(prompt)
        pruned = np.ascontiguousarray(_pruned_of(prompt), dtype=np.float32)
        memory = torch.from_numpy(pruned).to(self._device, embeds.dtype)
        return self._step(embeds, _Going(LlamaLayers(self._model).new_cache(), 0, memory))

    def _step(self, embeds: Any, state: _Going) -> tuple[Any, Any]:
        torch, layers, hidden = self._torch, LlamaLayers(self._model), embeds
        end = state.position + embeds.shape[1]
        with torch.inference_mode():
            positions = torch.arange(state.position, end, device=self._device)
            uncertainty, triggered = 0.0, False
            for index in range(layers.depth):
                if index != self._at:
                    hidden = layers.run(index, hidden, positions, state.cache)
                    continue
                uncertainty = uncertainty_of_logits(layers.logits(hidden))
                triggered = len(state.memory) > 0 and uncertainty > self._settings.threshold
                hidden = layers.attended(index, hidden, positions, state.cache)
                memory = state.memory if triggered else state.memory[:0]
                hidden = hidden + mixed_ffn(layers.layer(index), hidden, memory, self._settings)
            logits = layers.logits(hidden).cpu().numpy()
        self.steps.append(Refetched(logits, uncertainty, triggered))
        return logits, _Going(state.cache, end, state.memory)


def _pruned_of(prompt: StitchedPrompt) -> FloatArray:
    return prompt.pruned if isinstance(prompt, RefetchPrompt) else prompt.rows[:0]


def uncertainty_of_logits(logits: torch.Tensor) -> float:
    """Entropy of the softmax of float32 [V] over log V: 0 for certain, 1 for a token as good as any other."""
    shares = logits.log_softmax(-1)
    return float(-(shares.exp() * shares).sum()) / log(len(logits))


def mixed_ffn(layer: Any, hidden: torch.Tensor, memory: torch.Tensor, settings: RefetchSettings) -> torch.Tensor:
    """[1, S, D]: the FFN's output with the memory mixed in at the last position.

    Args:
        layer: transformers' LLaMA layer.
        hidden: [1, S, D], what its second norm reads.
        memory: [P, D] pruned rows; with none the FFN's output is as it was.
        settings: alpha, phi, normalisation, matched.
    """
    x = layer.post_attention_layernorm(hidden)
    out: torch.Tensor = layer.mlp(x)
    if not len(memory):
        return out
    delta = memory_answer(x[0, -1], memory, _phi(layer, settings), settings)
    last = out[0, -1]
    if settings.matched:
        delta = delta * (last.norm() / delta.norm().clamp(min=1e-12))
    mixed = out.clone()
    mixed[0, -1] = settings.alpha * delta + (1 - settings.alpha) * last
    return mixed


def memory_answer(x: torch.Tensor, memory: torch.Tensor, phi: Any, settings: RefetchSettings) -> torch.Tensor:
    """[D]: sum of phi(<x, z_i>) z_i over memory [P, D] for x [D]."""
    if settings.normalisation == "unit":
        memory = memory / memory.norm(dim=1, keepdim=True).clamp(min=1e-12)
    weights: torch.Tensor = phi(memory @ x)
    return weights @ memory


def _phi(layer: Any, settings: RefetchSettings) -> Any:
    if settings.phi == "model":
        return layer.mlp.act_fn
    return getattr(require("torch").nn.functional, settings.phi)
