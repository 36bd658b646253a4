"""Which values are shape tensors: those that decide a shape.

A walk from every operand that sets a shape back towards the graph's inputs; Shape and Size end it, because they read
only the shape of what they are given. Source: TensorRT documentation, "Working with dynamic shapes", execution tensors
versus shape tensors.
"""

from __future__ import annotations

from collections.abc import Iterator

import onnx

#: operator -> its operands that are shapes; a negative number means "from that one on"
_SHAPE_OPERANDS = {
    "ConstantOfShape": (0,),
    "Expand": (1,),
    "OneHot": (1,),
    "Pad": (1,),
    "Range": (0, 1, 2),
    "Reshape": (1,),
    "Resize": (2, 3),
    "Slice": (1, 2, 3, 4),
    "Split": (1,),
    "Squeeze": (1,),
    "Tile": (1,),
    "TopK": (1,),
    "Unsqueeze": (1,),
    "ReduceL1": (1,),
    "ReduceL2": (1,),
    "ReduceMax": (1,),
    "ReduceMean": (1,),
    "ReduceMin": (1,),
    "ReduceProd": (1,),
    "ReduceSum": (1,),
    "ReduceSumSquare": (1,),
}
_READ_ONLY_THE_SHAPE = ("Shape", "Size")


def shape_tensors(graph: onnx.GraphProto) -> set[str]:
    """Names of the values that reach a shape: graph inputs, initializers and what nodes compute."""
    nodes = list(all_nodes(graph))
    producers = {name: node for node in nodes for name in node.output if name}
    aliases = dict(_body_inputs(nodes))
    todo = [
        node.input[place]
        for node in nodes
        for place in _SHAPE_OPERANDS.get(node.op_type, ())
        if place < len(node.input) and node.input[place]
    ]
    seen: set[str] = set()
    while todo:
        name = todo.pop()
        if name in seen or not name:
            continue
        seen.add(name)
        todo += aliases.get(name, [])
        node = producers.get(name)
        if node is not None and node.op_type not in _READ_ONLY_THE_SHAPE:
            todo += list(node.input)
    return seen


def all_nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """The nodes of the graph and of every body in it."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from all_nodes(attribute.g)


def _body_inputs(nodes: list[onnx.NodeProto]) -> Iterator[tuple[str, list[str]]]:
    """What each input of a loop's body is outside of it. Scan's bodies are left out: their inputs are slices."""
    for node in nodes:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH and node.op_type == "Loop":
                for place, item in enumerate(attribute.g.input):
                    # (iteration, condition, carried...) of the body beside (trips, condition, carried...) of the node
                    yield item.name, [node.input[place]] if place and place < len(node.input) else []
