"""What the methods that prune inside the language model are called, where they come from, and their settings.

Plain data: the command line lists it without torch. None of them is exported; `docs/inner-methods.md` says why.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pydantic import Field

from holov_export.policies import Frozen


class FastVSettings(Frozen):
    """FastV.

    Source: pkunlp-icler/FastV@d165972, `fast_v_agg_layer` 2 (the paper's K).

    Attributes:
        layer: K; layers 0..K-1 see all visual tokens, the rest the best `budget` of each image. It is not scaled to
            the depth, as the published code does not scale it between 7B and 13B.
    """

    layer: int = Field(default=2, ge=1)


class SparseVlmSettings(Frozen):
    """SparseVLM. Layers and numbers of kept tokens follow from the budget; see `schedule.sparsevlm_schedule`.

    Source: Gumpest/SparseVLMs@26a5f48 llava/model/language_model/modelling_sparse_llama.py, version "1_0".

    Attributes:
        recycle: merge a share of the dropped tokens into a few new ones (the published code does; its V2 does not).
        recycle_share: which share of the dropped tokens, those with the best scores. One more token is always taken.
        cluster_size: so many recycled tokens become one. One more cluster is always made.
    """

    recycle: bool = True
    recycle_share: float = Field(default=0.3, ge=0, le=1)
    cluster_size: int = Field(default=10, ge=1)


class PyramidDropSettings(Frozen):
    """PyramidDrop. Layers and ratios follow from the budget; see `schedule.pyramiddrop_schedule`.

    Source: Cooperx521/PyramidDrop@6444f30 llava/model/modeling_llama_pdrop.py.

    Attributes:
        budget_is: "average": the budget is the mean over all layers of the visual tokens that enter them; "last": it is
            what the last layers see, for decoders too shallow for the average to be reached.
    """

    budget_is: Literal["average", "last"] = "average"


class RefetchSettings(Frozen):
    """Refetch (HoloV's appendix D). The paper gives none of these values: all defaults and all choices are OURS.

    Attributes:
        layer: the layer (0-based) whose FFN is mixed; None for the middle one, depth // 2.
        alpha: share of the memory's answer: FFN(x) becomes alpha * delta + (1 - alpha) * FFN(x). 0 changes nothing.
        threshold: of uncertainty, in 0..1. The entropy of the tokens' distribution that the head reads from the state
            that enters `layer`, divided by the log of the vocabulary's size, must be above it. 1 never triggers.
        phi: of the products <x, z>: "model" for the activation of the model's own FFN (the paper's phi), or another.
        normalisation: of the pruned tokens z: "unit" divides each by its length, "none" leaves them.
        matched: scale delta to the length of FFN(x), so that alpha is a share of something of equal size. The paper's
            formula has no such step (False): a sum over hundreds of tokens then dwarfs the FFN.
    """

    layer: int | None = Field(default=None, ge=0)
    alpha: float = Field(default=0.1, ge=0, le=1)
    threshold: float = Field(default=0.5, ge=0, le=1)
    phi: Literal["model", "relu", "gelu"] = "model"
    normalisation: Literal["unit", "none"] = "unit"
    matched: bool = True


@dataclass(frozen=True)
class InnerMethod:
    """A method inside the language model, for people.

    Attributes:
        summary: one line for `holov-export methods`.
        source: where it comes from.
        settings: with their defaults.
        experimental: not a published algorithm that could be reproduced.
        exported: False for all; said so that nobody has to guess.
    """

    name: str
    summary: str
    source: str
    settings: Frozen
    experimental: bool = False
    exported: bool = False


INNER: dict[str, InnerMethod] = {
    method.name: method
    for method in (
        InnerMethod(
            "fastv",
            "after layer 2, the visual tokens that the last prompt token attends to most; original positions",
            "arXiv 2403.06764; pkunlp-icler/FastV modeling_llama.py@d165972",
            FastVSettings(),
        ),
        InnerMethod(
            "sparsevlm",
            "in three steps, what question words near the picture attend to; part of the rest merged; renumbered",
            "arXiv 2410.04417; Gumpest/SparseVLMs@26a5f48, version 1_0",
            SparseVlmSettings(),
        ),
        InnerMethod(
            "pyramiddrop",
            "at each quarter of the depth, a share of what the last prompt token attends to most; renumbered",
            "arXiv 2410.17247; Cooperx521/PyramidDrop@6444f30",
            PyramidDropSettings(),
        ),
        InnerMethod(
            "refetch",
            "pruned tokens come back as a memory of one FFN when the model is unsure; from Python and `evaluate`",
            "arXiv 2510.02912v2, appendix D; no code is published, all settings are ours",
            RefetchSettings(),
            experimental=True,
        ),
    )
}
