"""Activation ranges of one vision graph, as a calibration found them and a bundle keeps them.

    BUNDLE/calibration/<recipe>/ranges.json  channels.npz        of the default graph
    BUNDLE/calibration/<recipe>-scope/...                        of a further one (`bundle.labelled_file`)

The folder lies beside the manifest, as engines do (ADR 0007): the bundle stays what was exported.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from holov_export.policies import Frozen
from holov_export.quantize.linears import Linear
from holov_export.recipes import Algorithm

#: of ranges.json
SCHEMA = 1
#: a channel is an outlier whose largest value is more than so many times that of the activation's median channel.
#: Source: Dettmers et al., LLM.int8(), arXiv 2208.07339, whose outliers are values above 6; here relative to the others
OUTLIER = 6.0


class TensorRange(Frozen):
    """What an activation's values are taken to lie between; finite, low <= high."""

    low: float
    high: float


class RangesRecord(Frozen):
    """ranges.json.

    Attributes:
        recipe: name, recipe_sha256: of its canonical JSON (`recipes.recipe_sha256`).
        graph_sha256, weights_sha256: what was run; ranges of another graph are refused.
        algorithm: how `tensors` were found.
        pictures: names and sha256 of what was seen, in order.
        tensors: name of an activation -> its range. The activations are the inputs of the products with weights.
        created: UTC. seconds: wall time.
    """

    schema_version: int = SCHEMA
    recipe: str
    recipe_sha256: str
    graph_sha256: str
    weights_sha256: str
    algorithm: Algorithm
    pictures: tuple[tuple[str, str], ...]
    budgets: tuple[int, ...]
    tensors: dict[str, TensorRange]
    created: str
    seconds: float


@dataclass(frozen=True)
class ChannelRange:
    """Smallest and largest value of each channel (last axis) of an activation, float32 [width] each."""

    low: npt.NDArray[np.float32]
    high: npt.NDArray[np.float32]


@dataclass(frozen=True)
class Ranges:
    """A record and, for every one of its tensors, the ranges of the channels."""

    record: RangesRecord
    channels: dict[str, ChannelRange]


class NamedRange(Frozen):
    """An activation's range, and the product that reads it: `linear` is the weight's name, which people know."""

    activation: str
    linear: str
    low: float
    high: float

    @property
    def largest(self) -> float:
        """The largest absolute value, which a symmetric scale comes from."""
        return max(abs(self.low), abs(self.high))


class RangesSummary(Frozen):
    """What a calibration has found, in a few numbers.

    Attributes:
        activations: how many. widest, narrowest: by the largest absolute value.
        outlier_channels: see `OUTLIER`; of all activations together. outlier_activations: that have any.
        channels: of all activations together.
    """

    activations: int
    widest: NamedRange
    narrowest: NamedRange
    channels: int
    outlier_channels: int
    outlier_activations: int


def summary_of(ranges: Ranges, linears: Sequence[Linear]) -> RangesSummary:
    """The summary of ranges of a graph with these products."""
    readers = {name: linear.name for linear in reversed(linears) for name in linear.activations}
    found = [
        NamedRange(activation=name, linear=readers.get(name, ""), low=item.low, high=item.high)
        for name, item in ranges.record.tensors.items()
    ]
    outliers = [outlier_channels(ranges.channels[item.activation]) for item in found]
    return RangesSummary(
        activations=len(found),
        widest=max(found, key=lambda item: item.largest),
        narrowest=min(found, key=lambda item: item.largest),
        channels=sum(len(channels) for channels in outliers),
        outlier_channels=sum(int(channels.sum()) for channels in outliers),
        outlier_activations=sum(bool(channels.any()) for channels in outliers),
    )


def outlier_channels(channels: ChannelRange) -> npt.NDArray[np.bool_]:
    """bool [width]: the channels that stick out, see `OUTLIER`."""
    largest = np.maximum(np.abs(channels.low), np.abs(channels.high))
    found: npt.NDArray[np.bool_] = largest > OUTLIER * np.median(largest)
    return found
