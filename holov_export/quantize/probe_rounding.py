"""The rounding inside a branch of a probe: an activation as `quantize.qdq` rounds it, or as `quantize.cpu` does.

Both in float arithmetic: what comes out is the value that the rounded number stands for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from holov_export.quantize.cpu import SMALLEST_SCALE

if TYPE_CHECKING:
    from types import ModuleType

    from onnx import NodeProto

#: adds an initializer of that name, once, and returns the name
Constant = Callable[[str, Any], str]


@dataclass(frozen=True)
class FixedScale:
    """One scale for the whole activation, from a calibration: names of initializers."""

    scale: str
    zero: str


@dataclass(frozen=True)
class RowScales:
    """A scale for each row, found at run time.

    Attributes:
        around_zero: 127 steps to either side of zero; else 255 steps from the smallest value to the largest.
    """

    around_zero: bool


class Branch:
    """Nodes of a branch in work. Their outputs are named after the product that the branch replaces."""

    def __init__(self, onnx: ModuleType, product: NodeProto, constant: Constant) -> None:
        self.nodes: list[NodeProto] = []
        self._onnx = onnx
        self._name, self._stem = product.name, product.output[0]
        self._constant = constant

    def add(self, operator: str, inputs: Sequence[str], output: str, attributes: dict[str, int] | None = None) -> str:
        """A further node; returns the name of its output."""
        made = self._onnx.helper.make_node(
            operator, inputs, [f"{self._stem}.{output}"], name=f"{self._name}/{output}", **(attributes or {})
        )
        self.nodes.append(made)
        return f"{self._stem}.{output}"

    def rounded(self, value: str, how: FixedScale | RowScales) -> str:
        """What an activation's rounded numbers stand for."""
        if isinstance(how, FixedScale):
            small = self.add("QuantizeLinear", [value, how.scale, how.zero], "quantized")
            return self.add("DequantizeLinear", [small, how.scale, how.zero], "dequantized")
        axis = self._constant("rows.axis", np.array([-1], np.int64))
        return self._symmetric(value, axis) if how.around_zero else self._affine(value, axis)

    def _symmetric(self, value: str, axis: str) -> str:
        largest = self.add("ReduceMax", [self.add("Abs", [value], "size"), axis], "largest")
        scale = self._scale(largest, 127)
        steps = self.add("Round", [self.add("Div", [value, scale], "quotient")], "steps")
        return self.add("Mul", [self._between(steps, -128, 127), scale], "dequantized")

    def _affine(self, value: str, axis: str) -> str:
        none = self._number(0)
        high = self.add("Max", [self.add("ReduceMax", [value, axis], "high"), none], "top")
        low = self.add("Min", [self.add("ReduceMin", [value, axis], "low"), none], "bottom")
        scale = self._scale(self.add("Sub", [high, low], "span"), 255)
        below = self.add("Neg", [self.add("Div", [low, scale], "below")], "above")
        zero = self.add("Round", [below], "zero")
        steps = self.add("Round", [self.add("Div", [value, scale], "quotient")], "steps")
        places = self._between(self.add("Add", [steps, zero], "places"), 0, 255)
        return self.add("Mul", [self.add("Sub", [places, zero], "shifted"), scale], "dequantized")

    def _scale(self, span: str, steps: int) -> str:
        scale = self.add("Mul", [span, self._number(1 / steps)], "step")
        return self.add("Max", [scale, self._number(SMALLEST_SCALE)], "scale")

    def _between(self, value: str, low: int, high: int) -> str:
        return self.add("Clip", [value, self._number(low), self._number(high)], "saturated")

    def _number(self, value: float) -> str:
        return self._constant(f"rows.{value:g}", np.float32(value))
