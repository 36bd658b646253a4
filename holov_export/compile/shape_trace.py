"""Where the values that decide shapes come from.

TensorRT computes shapes on the host, from *shape values*: dimensions of tensors, constants, and small integer inputs
given with the shapes of a request (`budget`). This traces every such value back and reports what else is on the way.

Source for the layers whose output can be a shape value, and for the limit on their size: NVIDIA/TensorRT
include/NvInfer.h, release/8.5 to release/11.1 (ITensor::isShapeTensor, ISliceLayer, IFillLayer, IGatherLayer and the
add... methods of INetworkDefinition). TensorRT 8.5 and later may accept more, by copying a value back from the GPU in
the middle of a request; that stalls the stream and cannot be captured as a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from holov_export.compile.graph_view import STANDARD_DOMAINS, GraphView, elements
from holov_export.compile.rewrites import label_of

if TYPE_CHECKING:
    from onnx import NodeProto

#: inputs of an operator that give a shape, a size or a number of elements
SHAPE_INPUTS: dict[str, tuple[int, ...]] = {
    "CenterCropPad": (1,),
    "ConstantOfShape": (0,),
    "Expand": (1,),
    "OneHot": (1,),
    "Pad": (1, 3),
    "Range": (0, 1, 2),
    "Reshape": (1,),
    "Resize": (2, 3),
    "Slice": (1, 2, 3, 4),
    "Split": (1,),
    "Squeeze": (1,),
    "Tile": (1,),
    "TopK": (1,),
    "Unsqueeze": (1,),
    "Upsample": (1,),
}
#: operators that read only the shape of their input
SHAPE_READERS = frozenset({"Shape", "Size"})
#: operators that become layers whose output can be a shape value
SHAPE_OPERATORS = frozenset(
    {
        *("Abs", "Add", "And", "Cast", "Ceil", "Clip", "Concat", "Constant", "ConstantOfShape", "Div", "Equal"),
        *("Expand", "Flatten", "Floor", "Gather", "Greater", "GreaterOrEqual", "Identity", "Less", "LessOrEqual"),
        *("Max", "Min", "Mod", "Mul", "Neg", "Not", "Or", "Pow", "Range", "ReduceMax", "ReduceMin", "ReduceProd"),
        *("ReduceSum", "Reshape", "Round", "Shape", "Sign", "Size", "Slice", "Squeeze", "Sub", "Sum", "Unsqueeze"),
        *("Where", "Xor"),
    }
)
_INTEGERS = frozenset({"INT32", "INT64", "BOOL", ""})


@dataclass(frozen=True)
class ShapeFault:
    """A value that decides a shape and should not.

    Attributes:
        view, node, index: the node whose input `index` decides a shape, and its graph.
        origin: what the value comes from, in words; "" if it is only too large.
        value: the name on the way that is at fault.
        elements: how many elements it has, where it is too large.
    """

    view: GraphView
    node: NodeProto
    index: int
    origin: str
    value: str
    elements: int = 0


def shape_faults(root: GraphView, limit: int) -> Iterator[ShapeFault]:
    """Every input that decides a shape and comes from something else than shape values, or passes more than `limit`."""
    sound: set[tuple[int, str]] = set()
    for view, node in root.walk():
        if node.domain not in STANDARD_DOMAINS:
            continue
        for index in SHAPE_INPUTS.get(node.op_type, ()):
            if index >= len(node.input) or not node.input[index] or _computes_data(view, node):
                continue
            fault = _fault_behind(view, node.input[index], limit, sound)
            if fault is not None:
                yield ShapeFault(view, node, index, *fault)


def _computes_data(view: GraphView, node: NodeProto) -> bool:
    """A float Range of fixed length is an ordinary tensor."""
    return node.op_type == "Range" and all(view.is_constant(name) for name in node.input)


def _fault_behind(view: GraphView, name: str, limit: int, sound: set[tuple[int, str]]) -> tuple[str, str, int] | None:
    """(origin, value, elements) of something behind `name` that is no shape value; None, and all noted as sound."""
    waiting, seen = [(view, name)], set[tuple[int, str]]()
    while waiting:
        around, item = waiting.pop()
        home = around.home_of(item)
        if home is None:
            continue  # a name that nothing makes: the file is invalid, and other tools say so better
        key = (id(home), item)
        if key in seen or key in sound:
            continue
        seen.add(key)
        fault = _own_fault(home, item, limit)
        if fault is not None:
            return fault
        maker = home.makers.get(item)
        if maker is not None and maker.op_type not in SHAPE_READERS:
            waiting.extend((home, value) for value in reversed(maker.input) if value)
    sound |= seen
    return None


def _own_fault(home: GraphView, name: str, limit: int) -> tuple[str, str, int] | None:
    if name in home.constants:
        return None
    maker, kind = home.makers.get(name), home.types.get(name, "")
    size = elements(home.shapes.get(name))
    if size is not None and size > limit and not home.is_constant(name):
        return "", name, size
    if maker is None:
        if home.outer is not None:
            return None if _carried(home, name) else (f"'{name}', which a loop carries", name, 0)
        if kind not in _INTEGERS:
            return f"the input '{name}' of type {kind}", name, 0
        return None if size is not None else (f"the input '{name}', whose size is not fixed", name, 0)
    if maker.op_type not in SHAPE_OPERATORS or maker.domain not in STANDARD_DOMAINS:
        return f"{maker.op_type} '{label_of(maker)}'", name, 0
    return None


def _carried(body: GraphView, name: str) -> bool:
    """True for what a body may use in shapes: the iteration number of a Loop."""
    owner = body.owner
    return owner is not None and owner.op_type == "Loop" and bool(body.graph.input) and name == body.graph.input[0].name
