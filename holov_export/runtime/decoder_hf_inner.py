"""The transformers decoder with pruning inside the language model: references for comparisons, not exported.

The prompt holds all N visual rows of each image; tokens leave between layers, so the layers' caches differ in length.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from holov_export.errors import BudgetError, UnknownNameError, UsageError
from holov_export.policies import Frozen
from holov_export.runtime.decoder_hf import HfDecoder, check_llava
from holov_export.runtime.inner.attention_rank import LastTokenRanking
from holov_export.runtime.inner.layers import LlamaLayers
from holov_export.runtime.inner.methods import (
    INNER,
    FastVSettings,
    PyramidDropSettings,
    SparseVlmSettings,
)
from holov_export.runtime.inner.rules import Boundary, InnerRule, choices_at
from holov_export.runtime.inner.schedule import (
    Schedule,
    fastv_schedule,
    pyramiddrop_schedule,
    sparsevlm_schedule,
)
from holov_export.runtime.inner.sparsevlm import SparseVlmRanking
from holov_export.runtime.inner.states import TokenStates, pruned, spans_of_prompt, states_from_embeds
from holov_export.spec import DecoderSpec
from holov_export.tensors import Int64Array, StitchedPrompt

#: what `inner_decoder` makes. `refetch` is not among them: it needs to be told which tokens were pruned
INNER_METHODS = ("fastv", "sparsevlm", "pyramiddrop")


@dataclass(frozen=True)
class Stage:
    """What one cut left.

    Attributes:
        layer: the first that sees fewer tokens.
        kept: int64 of each image: places in the prompt, rising; -1 for tokens merged out of others, behind them.
    """

    layer: int
    kept: tuple[Int64Array, ...]


@dataclass(frozen=True)
class Prefill:
    """A prompt that has gone through the layers.

    Attributes:
        logits: float32 [V], of the first new token.
        stages: the cuts.
        cache: transformers' `DynamicCache`, with layers of different lengths.
        next_positions: for the rotary embedding, of the next token in each layer.
    """

    logits: npt.NDArray[np.float32]
    stages: tuple[Stage, ...]
    cache: Any
    next_positions: tuple[int, ...]


@dataclass(frozen=True)
class _Going:
    """What a step goes on from: the cache, and the next position in each layer."""

    cache: Any
    positions: tuple[int, ...]


class InnerDecoder(HfDecoder):
    """A decoder that drops visual tokens between its layers. Make it with `inner_decoder`.

    Attributes:
        method: its name.
    """

    def __init__(
        self,
        checkpoint: Path,
        spec: DecoderSpec,
        method: str,
        rule: InnerRule,
        *,
        provider: str = "auto",
        threads: int | None = None,
    ) -> None:
        check_llava(checkpoint)
        super().__init__(checkpoint, spec, provider=provider, threads=threads)
        LlamaLayers(self._model)  # refuses another architecture now and not at the first question
        self._rule = rule
        self.method = method
        self.name = f"{method} in {self.name}"

    def schedule(self, tokens: int) -> Schedule:
        """How many visual tokens of an image of N `tokens` each layer sees.

        Raises:
            BudgetError: the image does not have the budget, or the method cannot reach it.
        """
        return self._rule.schedule(tokens, self._spec.layers)

    def prefill(self, prompt: StitchedPrompt) -> Prefill:
        """Send a prompt through the layers.

        Raises:
            PromptError, BudgetError: see `stream`.
        """
        self._check(prompt)
        with self._torch.inference_mode():
            return self._prefill(states_from_embeds(self._embeds(prompt), spans_of_prompt(prompt)))

    def _check(self, prompt: StitchedPrompt) -> None:
        super()._check(prompt)
        for span in spans_of_prompt(prompt):
            self.schedule(span.length)

    def _prefill(self, states: TokenStates) -> Prefill:
        layers = LlamaLayers(self._model)
        cache = layers.new_cache()
        schedules = [self.schedule(span.length) for span in states.spans]
        ranking = self._rule.ranking(states)
        stages, positions, before = [], [], states
        for layer in range(layers.depth):
            cuts = [schedule.cut_at(layer) for schedule in schedules]
            spans = zip(states.spans, cuts, strict=True)
            if any(cut is not None and cut.keep < span.length for span, cut in spans):
                choices = choices_at(layers, Boundary(layer, before, states), cuts, ranking)
                states = pruned(states, choices, renumber=ranking.renumber)
                stages.append(Stage(layer, _kept(states)))
            before = states
            hidden = layers.run(layer, states.hidden, states.positions, cache)
            states = TokenStates(hidden, states.positions, states.origin, states.spans)
            positions.append(int(states.positions[-1]) + 1)
        logits = layers.logits(states.hidden).cpu().numpy()
        return Prefill(logits, tuple(stages), cache, tuple(positions))

    def _prefilled(self, prompt: StitchedPrompt) -> tuple[Any, Any]:
        made = self.prefill(prompt)
        return made.logits, _Going(made.cache, made.next_positions)

    def _step(self, embeds: Any, state: _Going) -> tuple[Any, Any]:
        """The logits after one more token, which goes through all layers at the position each of them has reached."""
        layers, hidden = LlamaLayers(self._model), embeds
        with self._torch.inference_mode():
            for layer, position in enumerate(state.positions):
                place = self._torch.tensor([position], device=self._device)
                hidden = layers.run(layer, hidden, place, state.cache)
            logits = layers.logits(hidden).cpu().numpy()
        return logits, _Going(state.cache, tuple(position + 1 for position in state.positions))


def _kept(states: TokenStates) -> tuple[Int64Array, ...]:
    return tuple(states.origin[span.start : span.end].cpu().numpy() for span in states.spans)


def inner_decoder(
    checkpoint: Path,
    spec: DecoderSpec,
    method: str,
    budget: int,
    *,
    provider: str = "auto",
    threads: int | None = None,
    settings: Frozen | None = None,
) -> InnerDecoder:
    """A decoder that prunes inside the language model, for comparisons.

    Args:
        checkpoint: its directory.
        spec: of the language model.
        method: one of `INNER_METHODS`.
        budget: visual tokens of each image. FastV: what is left after layer K, the average over layers is higher.
            SparseVLM: names the published list (an average over layers at 576 tokens and 32 layers). PyramidDrop: the
            average over layers. `InnerDecoder.schedule` says what each layer sees.
        provider: see `HfDecoder`.
        threads: see `HfDecoder`.
        settings: of the method, of the class of `INNER[method].settings`; None for those.

    Raises:
        UnknownNameError: no such method.
        BudgetError: a budget below 1. One that an image does not have is refused when the image is there.
        UsageError: settings of another method.
        MissingExtraError, EnvironmentFaultError, CheckpointError: see `HfDecoder`.
    """
    if method not in INNER_METHODS:
        advice = "refetch is `inner.refetch.RefetchDecoder`. " if method == "refetch" else ""
        raise UnknownNameError(
            f"unknown method '{method}' inside the language model.", hint=f"{advice}Known: {', '.join(INNER_METHODS)}."
        )
    if budget < 1:
        raise BudgetError(f"the budget is {budget}, it must be at least 1.")
    rule = _rule(method, budget, settings or INNER[method].settings)
    return InnerDecoder(checkpoint, spec, method, rule, provider=provider, threads=threads)


def _rule(method: str, budget: int, settings: Frozen) -> InnerRule:
    if method == "fastv" and isinstance(settings, FastVSettings):
        return InnerRule(
            partial(fastv_schedule, budget=budget, settings=settings),
            lambda states: LastTokenRanking(ahead=False, renumber=False),
        )
    if method == "pyramiddrop" and isinstance(settings, PyramidDropSettings):
        return InnerRule(
            partial(pyramiddrop_schedule, budget=budget, settings=settings),
            lambda states: LastTokenRanking(ahead=True, renumber=True),
        )
    if method == "sparsevlm" and isinstance(settings, SparseVlmSettings):
        return InnerRule(
            partial(sparsevlm_schedule, budget=budget, settings=settings),
            partial(SparseVlmRanking, settings=settings),
        )
    raise UsageError(f"{type(settings).__name__} are not the settings of {method}.")
