"""SparseVLM: question words that resemble the picture rate its tokens; some of what goes is merged into new tokens.

Source: Gumpest/SparseVLMs@26a5f48 llava/model/language_model/ (score.py, modelling_sparse_llama.py, utils.py), version
"1_0"; density peaks after Du et al. 2016. Two deviations: the published clustering adds noise of 1e-6 to the densities
against ties, here the lower index wins; and the code knows one image, here the text behind the last image rates each.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from holov_export.runtime.inner.layers import LlamaLayers
from holov_export.runtime.inner.methods import SparseVlmSettings
from holov_export.runtime.inner.rules import Boundary
from holov_export.runtime.inner.schedule import Cut, recycled
from holov_export.runtime.inner.states import Span, TokenStates

if TYPE_CHECKING:
    import torch


class SparseVlmRanking:
    """Scores by the attention that the raters pay in the layer that has just run, mean over heads and raters."""

    renumber = True

    def __init__(self, states: TokenStates, settings: SparseVlmSettings) -> None:
        """Choose the raters of each image, once, from what enters layer 0."""
        self._settings = settings
        self._raters = [text_raters(states, span) for span in states.spans]

    def scores(self, layers: LlamaLayers, boundary: Boundary) -> list[torch.Tensor]:
        """See `Ranking.scores`."""
        states = boundary.before
        found = []
        for span, raters in zip(states.spans, self._raters, strict=True):
            rows = layers.attention(boundary.layer - 1, states, raters + states.text_start)
            found.append(rows[:, span.start : span.end].mean(0))
        return found

    def merged(self, cut: Cut, dropped: torch.Tensor, scores: torch.Tensor) -> torch.Tensor | None:
        """See `Ranking.merged`: the best of the dropped tokens, clustered, each cluster its mean."""
        taken, clusters = recycled(len(dropped), self._settings)
        order = scores.sort(descending=True, stable=True).indices[:taken]
        return cluster_means(dropped[order], clusters)


def text_raters(states: TokenStates, span: Span) -> torch.Tensor:
    """int64 [r]: indices, from the end of the last image on, of the words that an image resembles above average.

    Each visual token spreads a softmax of its products over the words behind the images; a word's share is its mean
    over the visual tokens, and words above the mean share are raters. All words where none is above it (a single one).
    """
    visual, text = states.hidden[0, span.start : span.end], states.hidden[0, states.text_start :]
    share = (visual @ text.T).softmax(1).mean(0)
    above = (share > share.mean()).nonzero()[:, 0]
    return above if len(above) else share.argsort().sort().values


def cluster_means(rows: torch.Tensor, clusters: int) -> torch.Tensor:
    """float [clusters, D]: means of density-peak clusters of rows [n, D], from the most prominent centre on.

    A row's density is exp(-mean squared distance to its `clusters` nearest rows, itself included); its prominence is
    density times the distance to the nearest denser row. The most prominent rows are centres, the others join the
    nearest centre.
    """
    distance = (rows[:, None] - rows[None]).norm(dim=-1) / rows.shape[1] ** 0.5
    density = (-(distance.sort(1).values[:, :clusters] ** 2).mean(1)).exp()
    denser = density[None, :] > density[:, None]
    to_denser = distance.masked_fill(~denser, float(distance.max())).amin(1)
    centres = (to_denser * density).sort(descending=True, stable=True).indices[:clusters]
    member = distance[:, centres].argmin(1)
    member[centres] = member.new_tensor(range(clusters))
    belongs = (member[None, :] == member.new_tensor(range(clusters))[:, None]).to(rows.dtype)
    means: torch.Tensor = belongs @ rows / belongs.sum(1, keepdim=True)
    return means
