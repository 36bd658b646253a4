"""What every tower with a selection in it is: a torch module whose inputs and outputs are those of `signature.py`."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn


class VisionModule(nn.Module):
    """A torch module that is exported as a vision graph.

    Attributes:
        forward: the inputs of the graph, by their names in `signature.py` and in their order -> its outputs in theirs.
        features_of: the inputs before the budget -> float32 [B, N, ..], what the rule reads of each token (of a plain
            encoder and of rules that read none: the feature layer's rows); for comparisons.
    """

    forward: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]
    features_of: Callable[..., Tensor]
