"""Walks over ONNX graphs, for the tests of what an exported graph may look like."""

from __future__ import annotations

from collections.abc import Iterator

import onnx

#: inputs of an operator that give a shape, a size, a number of elements or an axis: host memory in TensorRT
SHAPE_INPUTS: dict[str, tuple[int, ...]] = {
    "ConstantOfShape": (0,),
    "Expand": (1,),
    "Loop": (0,),
    "Pad": (1, 3),
    "Range": (0, 1, 2),
    "ReduceMax": (1,),
    "ReduceMean": (1,),
    "ReduceSum": (1,),
    "Reshape": (1,),
    "Resize": (1, 2, 3),
    "Slice": (1, 2, 3, 4),
    "Split": (1,),
    "Squeeze": (1,),
    "Tile": (1,),
    "TopK": (1,),
    "Unsqueeze": (1,),
}
#: operators that read only the shape of their input
SHAPE_READERS = {"Shape", "Size"}
#: operators whose output has a shape that depends on values, or that branch
FORBIDDEN = {"Compress", "If", "NonMaxSuppression", "NonZero", "Scan", "SequenceMap", "StringSplit", "Unique"}


def bodies(model: onnx.ModelProto) -> Iterator[onnx.GraphProto]:
    """The graphs that nodes of the main graph hold."""
    for node in model.graph.node:
        yield from (attribute.g for attribute in node.attribute if attribute.g.node)


def producers(model: onnx.ModelProto) -> dict[str, onnx.NodeProto]:
    """Value name -> the node that makes it."""
    return {name: node for node in model.graph.node for name in node.output}


def shape_values(model: onnx.ModelProto) -> Iterator[str]:
    """Names of all values that decide a shape."""
    for node in model.graph.node:
        for index in SHAPE_INPUTS.get(node.op_type, ()):
            if index < len(node.input) and node.input[index]:
                yield node.input[index]


def sources_of(model: onnx.ModelProto, values: Iterator[str]) -> set[str]:
    """Graph inputs from which values are computed; what passes through the shape of a tensor is not followed."""
    made_by, inputs = producers(model), {value.name for value in model.graph.input}
    waiting, seen, found = list(values), set[str](), set[str]()
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        if name in inputs:
            found.add(name)
        elif name in made_by and made_by[name].op_type not in SHAPE_READERS:
            waiting.extend(value for value in made_by[name].input if value)
    return found


def ancestors_until(model: onnx.ModelProto, output: str, stop: str) -> list[onnx.NodeProto]:
    """Nodes that make `output`, back to and including the nearest nodes of the operator `stop`."""
    made_by, seen, waiting = producers(model), dict[str, onnx.NodeProto](), [output]
    while waiting:
        node = made_by.get(waiting.pop())
        if node is None or node.name in seen:
            continue
        seen[node.name] = node
        if node.op_type != stop and node.op_type not in SHAPE_READERS:
            waiting.extend(node.input)
    return list(seen.values())
