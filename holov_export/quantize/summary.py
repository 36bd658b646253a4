"""What writing a quantised graph did."""

from __future__ import annotations

from holov_export.policies import Frozen


class QuantizedSummary(Frozen):
    """Of one graph.

    Attributes:
        quantized: names of the linears that were quantised (`Linear.name`), in the order of the graph.
        deciding: those that stay because they decide which tokens stay. kept: those that the user keeps.
        smoothed: those whose input was smoothed.
        opset: of the written graph.
        files: names of what was written, the graph first; a graph over another one's weights may have no more.
        bytes_before, bytes_after: of all weights, wherever they lie.
    """

    quantized: tuple[str, ...]
    deciding: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()
    smoothed: tuple[str, ...] = ()
    opset: int
    files: tuple[str, ...]
    bytes_before: int
    bytes_after: int
