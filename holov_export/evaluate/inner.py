"""Rules that prune inside the language model of transformers: references in a table, in no bundle.

The graph gives all N rows and the decoder drops some of them between its layers. `refetch` is the exception: the rule
of the graph prunes before the language model, and the decoder gets the pruned rows back as a memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from holov_export.errors import BudgetError
from holov_export.runtime.decoder import Decoder
from holov_export.runtime.decoder_hf_inner import INNER_METHODS as PRUNING
from holov_export.runtime.decoder_hf_inner import inner_decoder
from holov_export.runtime.inner.methods import FastVSettings, PyramidDropSettings, SparseVlmSettings
from holov_export.runtime.inner.schedule import Schedule, fastv_schedule, pyramiddrop_schedule, sparsevlm_schedule
from holov_export.spec import DecoderSpec
from holov_export.tensors import Int64Array, SamplingSettings, StitchedPrompt

REFETCH = "refetch"
#: names for `--methods` with `--decoder hf`
INNER_METHODS = (*PRUNING, REFETCH)


def average_from_budget(method: str, budget: int, tokens: int, layers: int) -> float:
    """Visual tokens that a layer of the language model sees, mean over layers, under the published settings.

    Raises:
        BudgetError: the rule cannot reach the budget in so many layers.
    """
    schedule: Schedule
    if method == "fastv":
        schedule = fastv_schedule(tokens, layers, budget, FastVSettings())
    elif method == "sparsevlm":
        schedule = sparsevlm_schedule(tokens, layers, budget, SparseVlmSettings())
    elif method == "pyramiddrop":
        schedule = pyramiddrop_schedule(tokens, layers, budget, PyramidDropSettings())
    elif method == REFETCH:
        return float(budget)
    else:
        raise BudgetError(f"what '{method}' makes of a budget is not known here.")
    return schedule.average


class RefetchingDecoder:
    """`refetch` as a decoder of whole prompts: takes all N rows, and prunes them to `kept` before it answers.

    Attributes:
        kept: int64 [K], positions of the picture that is asked about next; set before each picture.
    """

    def __init__(self, checkpoint: Path, spec: DecoderSpec, *, provider: str, threads: int | None) -> None:
        from holov_export.runtime.inner.refetch import RefetchDecoder

        self._decoder = RefetchDecoder(checkpoint, spec, provider=provider, threads=threads)
        self.name, self.lanes = self._decoder.name, 1
        self.kept: Int64Array | None = None

    def stream(self, prompt: StitchedPrompt, sampling: SamplingSettings) -> Iterator[int]:
        """See `Decoder.stream`."""
        from holov_export.runtime.inner.refetch import refetch_prompt

        assert self.kept is not None
        return self._decoder.stream(refetch_prompt(prompt, [self.kept]), sampling)

    def close(self) -> None:
        """Release the model."""
        self._decoder.close()


def decoder_from_method(
    checkpoint: Path, spec: DecoderSpec, method: str, budget: int, *, provider: str, threads: int | None
) -> Decoder:
    """The decoder of a rule inside the language model.

    Raises:
        CheckpointError, MissingExtraError, EnvironmentFaultError: see `HfDecoder`.
    """
    if method == REFETCH:
        return RefetchingDecoder(checkpoint, spec, provider=provider, threads=threads)
    return inner_decoder(checkpoint, spec, method, budget, provider=provider, threads=threads)
