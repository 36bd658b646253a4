"""Activation ranges of one vision graph, as a calibration found them and a bundle keeps them.

    BUNDLE/calibration/<recipe>/ranges.json  channels.npz        of the default graph
    BUNDLE/calibration/<recipe>-scope/...                        of a further one (`bundle.labelled_file`)

The folder lies beside the manifest, as engines do (ADR 0007): the bundle stays what was exported.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from holov_export.policies import Frozen
from holov_export.recipes import Algorithm

#: of ranges.json
SCHEMA = 1


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
