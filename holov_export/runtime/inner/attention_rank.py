"""FastV and PyramidDrop: what the last token of the prompt attends to, in the layer before the cut or in the one after.

Source: pkunlp-icler/FastV@d165972 modeling_llama.py (the in-place branch); Cooperx521/PyramidDrop@6444f30
modeling_llama_pdrop.py (`pdrop_rank_drop`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from holov_export.runtime.inner.layers import LlamaLayers
from holov_export.runtime.inner.rules import Boundary
from holov_export.runtime.inner.schedule import Cut

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class LastTokenRanking:
    """Scores by one row of attention, mean over heads.

    Attributes:
        ahead: False for the attention of the layer that has just run (FastV); True for that of the layer that comes,
            recomputed from its queries and keys before it runs (PyramidDrop).
        renumber: see `Ranking`; False for FastV, True for PyramidDrop.
    """

    ahead: bool
    renumber: bool

    def scores(self, layers: LlamaLayers, boundary: Boundary) -> list[torch.Tensor]:
        """See `Ranking.scores`."""
        states = boundary.after if self.ahead else boundary.before
        index = boundary.layer if self.ahead else boundary.layer - 1
        last = states.positions.new_tensor([len(states.positions) - 1])
        row = layers.attention(index, states, last)[0]
        return [row[span.start : span.end] for span in states.spans]

    def merged(self, cut: Cut, dropped: torch.Tensor, scores: torch.Tensor) -> torch.Tensor | None:
        """Nothing: these methods drop."""
        return None
