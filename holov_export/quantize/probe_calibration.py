"""What a probe has to know of activations: their ranges, what smoothing does to them, and which channels stick out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from holov_export.extras import require
from holov_export.quantize.linears import Linear
from holov_export.quantize.outliers import Channels, outlier_channels
from holov_export.quantize.ranges import ChannelRange, Ranges
from holov_export.quantize.smooth import smoothed
from holov_export.spec import Quantization

if TYPE_CHECKING:
    from onnx import ModelProto


@dataclass(frozen=True)
class ProbeCalibration:
    """Of one graph.

    Attributes:
        ranges: after smoothing. factors: activation -> what its channels are multiplied by. outliers: activation ->
            channels that are not rounded.
    """

    ranges: Ranges | None
    factors: dict[str, npt.NDArray[np.float32]]
    outliers: dict[str, Channels]


def probe_calibration(
    source: Path,
    proto: ModelProto,
    linears: Sequence[Linear],
    chosen: Sequence[Linear],
    quantization: Quantization,
    ranges: Ranges | None,
) -> ProbeCalibration:
    """Smooth, and look for outliers in what is left, as the writers of the real graphs do."""
    smooths, by_row = ranges is not None and quantization.smoothing is not None, quantization.engine == "cpu"
    if not smooths and not by_row:
        return ProbeCalibration(ranges, {}, {})
    model, factors = require("onnx_ir").load(source), {}
    if ranges is not None and quantization.smoothing is not None:
        after, _ = smoothed(model, proto, linears, chosen, ranges, quantization.smoothing)
        factors = {
            name: _ratio(ranges.channels[name], new)
            for name, new in after.channels.items()
            if new is not ranges.channels[name]
        }
        ranges = after
    outliers = {}
    if by_row:
        values = {value.name: value for node in model.graph for value in node.outputs}
        wanted = {name for linear in chosen for name in linear.activations if name in values}
        outliers = {name: outlier_channels(values[name]) for name in wanted}
    return ProbeCalibration(ranges, factors, outliers)


def _ratio(before: ChannelRange, after: ChannelRange) -> npt.NDArray[np.float32]:
    """What each channel was multiplied by; 1 for a channel that is always zero."""
    far = np.abs(after.high) >= np.abs(after.low)  # a side that is not zero
    new, old = np.where(far, after.high, after.low), np.where(far, before.high, before.low)
    live = (new != 0) & (old != 0)
    return (np.where(live, new, 1) / np.where(live, old, 1)).astype(np.float32)
