"""Small passes over the exported graph (onnx_ir): readable names, no traces of the machine, weights as constants.

Each pass changes the model in place and can be read alone; `clean` runs them in the order that they need.
"""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx_ir as ir

_SCOPES = "pkg.torch.onnx.name_scopes"


def clean(model: ir.Model, axes: dict[str, str]) -> None:
    """All passes.

    Args:
        model: as the exporter returns it, still with the exporter's metadata.
        axes: symbolic axis names to replace ("s18" -> "batch").
    """
    scopes = _scopes_of(model)
    fold_transposed_weights(model)
    name_weights(model, scopes)
    free_loop_conditions(model)
    name_nodes(model, scopes)
    name_constants(model)
    type_loop_bodies(model)
    rename_axes(model, axes)
    strip_metadata(model)


def _scopes_of(model: ir.Model) -> dict[int, str]:
    """id(node) -> dotted path of the torch module that made it, "" for the outermost."""
    scopes = {}
    for node in model.graph:
        try:
            path = ast.literal_eval(node.metadata_props.get(_SCOPES, "[]"))
        except (ValueError, SyntaxError):
            path = []
        modules = [part for part in path[:-1] if part and not part.startswith("_")]
        scopes[id(node)] = modules[-1] if modules else ""
    return scopes


def fold_transposed_weights(model: ir.Model) -> None:
    """Replace Transpose(initializer) by an initializer that is stored transposed.

    The exporter's optimizer folds only small ones. The new tensor is lazy: the transposed copy lives while it is
    being written, so an export never holds the weights twice.
    """
    graph = model.graph
    folded: dict[tuple[str, tuple[int, ...]], ir.Value] = {}
    for node in list(graph):
        source = node.inputs[0] if node.op_type == "Transpose" else None
        if source is None or source.name not in graph.initializers or source.const_value is None:
            continue
        perm = (
            tuple(node.attributes["perm"].as_ints())
            if "perm" in node.attributes
            else tuple(reversed(range(len(source.const_value.shape))))
        )
        key = (str(source.name), perm)
        if key not in folded:
            folded[key] = _transposed_initializer(model, source, perm)
        ir.convenience.replace_all_uses_with(node.outputs[0], folded[key])
        graph.remove(node, safe=True)
    for name, value in list(graph.initializers.items()):
        if not value.uses():
            del graph.initializers[name]
            value.const_value = None  # the exporter keeps the value itself alive, so its weights must go


def _transposed_initializer(model: ir.Model, source: ir.Value, perm: tuple[int, ...]) -> ir.Value:
    tensor = source.const_value
    assert tensor is not None
    shape = ir.Shape([int(tensor.shape[axis]) for axis in perm])  # type: ignore[arg-type]
    name = f"{source.name}.transposed"

    def evaluate() -> ir.TensorProtocol:
        array = np.ascontiguousarray(tensor.numpy().transpose(perm))
        return ir.Tensor(array, dtype=tensor.dtype, shape=shape, name=name)

    lazy = ir.LazyTensor(evaluate, dtype=tensor.dtype, shape=shape, name=name)
    value = ir.Value(name=name, shape=shape, type=ir.TensorType(tensor.dtype), const_value=lazy)
    model.graph.register_initializer(value)
    return value


def name_weights(model: ir.Model, scopes: dict[int, str]) -> None:
    """Give each weight of a MatMul the name of its Linear module ("...q_proj.weight"), whatever folding called it.

    The feature layer uses its query projection twice, and the exporter's optimizer folds small weights once for each
    use: the second copy is dropped.
    """
    graph = model.graph
    named = dict(graph.initializers)
    for node in graph:
        if node.op_type != "MatMul" or not scopes.get(id(node)):
            continue
        weight = node.inputs[1]
        if weight is None or weight.name not in graph.initializers:
            continue
        wanted = f"{scopes[id(node)]}.weight"
        if weight.name == wanted:
            continue
        if wanted not in named:
            named[wanted] = weight
            weight.name = wanted
        elif _same_values(named[wanted], weight):
            copy = str(weight.name)
            ir.convenience.replace_all_uses_with(weight, named[wanted])
            del graph.initializers[copy]


def _same_values(left: ir.Value, right: ir.Value) -> bool:
    a, b = left.const_value, right.const_value
    if a is None or b is None or a.dtype != b.dtype or a.shape != b.shape:
        return False
    return bool(np.array_equal(a.numpy(), b.numpy()))


def name_nodes(model: ir.Model, scopes: dict[int, str]) -> None:
    """Name nodes "module/Operator", numbered where a module has several, and their outputs after them.

    A node without a scope (the optimizer made it) takes the scope of the node before it.
    """
    outputs = {id(value) for value in model.graph.outputs}
    seen: Counter[str] = Counter()
    scope = ""
    for node in model.graph.all_nodes():  # the bodies of loops after the loop
        scope = scopes.get(id(node)) or scope
        base = f"{scope.replace('.', '/')}/{node.op_type}".lstrip("/")
        node.name = base if not seen[base] else f"{base}_{seen[base]}"
        seen[base] += 1
        for index, value in enumerate(node.outputs):
            if id(value) not in outputs:
                value.name = f"{node.name}:{index}"


def name_constants(model: ir.Model) -> None:
    """Name what is neither a parameter nor a buffer after the first node that reads it ("module/Reshape#1")."""
    for value in list(model.graph.initializers.values()):
        uses = list(value.uses())
        if uses and "." not in str(value.name):
            value.name = f"{uses[0].node.name}#{uses[0].idx}"


def free_loop_conditions(model: ir.Model) -> None:
    """Let the body of a Loop that only counts say "go on" by a constant, and not by the condition it was handed.

    TensorRT's parser registers a body's condition only if the Loop is given one, and fails on a node that reads it.
    Source: onnx/onnx-tensorrt importers of Loop, 8.5-GA to 10.1-GA.
    """
    for node in list(model.graph.all_nodes()):
        if node.op_type != "Loop" or node.inputs[1] is not None:
            continue
        body = node.attributes["body"].as_graph()
        handed = body.outputs[0].producer()
        if handed is not None and handed.op_type == "Identity" and handed.inputs[0] is body.inputs[1]:
            constant = ir.node("Constant", [], {"value": ir.tensor(True)})
            body.insert_before(handed, constant)
            going, name = constant.outputs[0], body.outputs[0].name
            going.type, going.shape = body.outputs[0].type, body.outputs[0].shape
            body.outputs[0] = going
            body.remove(handed, safe=True)
            going.name = name


def type_loop_bodies(model: ir.Model) -> None:
    """Say the types of what a loop carries at the borders of its body, which functions leave open."""
    for node in model.graph.all_nodes():
        if node.op_type != "Loop":
            continue
        body = node.attributes["body"].as_graph()
        carried = len(body.inputs) - 2  # the step and the condition are in front; the condition alone on the other side
        for source, inside, result in zip(node.inputs[2:], body.inputs[2:], body.outputs[1 : carried + 1], strict=True):
            kind = None if source is None else source.type
            if kind is not None:
                inside.type = result.type = kind


def rename_axes(model: ir.Model, axes: dict[str, str]) -> None:
    """Rename symbolic axes of inputs and outputs, and forget the shapes in between.

    The exporter gives one axis several names inside the graph, which TensorRT takes for different axes.
    """
    for value in [*model.graph.inputs, *model.graph.outputs]:
        if value.shape is not None:
            value.shape = ir.Shape([axes.get(str(_plain(axis)), _plain(axis)) for axis in value.shape])
    kept = {id(value) for value in [*model.graph.inputs, *model.graph.outputs, *model.graph.initializers.values()]}
    for body in model.graph.subgraphs():  # ONNX Runtime wants the types of what goes into a loop's body and comes out
        kept |= {id(value) for value in [*body.inputs, *body.outputs]}
    for value in _values(model):
        if id(value) not in kept:
            value.shape = None
            value.type = None


def _plain(axis: Any) -> int | str:
    return axis if isinstance(axis, int) else str(getattr(axis, "value", axis))


def strip_metadata(model: ir.Model) -> None:
    """Remove stack traces, source paths and documentation strings; empty what the exporter wrote of itself."""
    model.metadata_props.clear()
    model.doc_string = None
    model.graph.metadata_props.clear()
    model.graph.doc_string = None
    for body in model.graph.subgraphs():
        body.metadata_props.clear()
        body.doc_string = None
    for node in model.graph.all_nodes():
        node.metadata_props.clear()
        node.doc_string = None
    for value in [*_values(model), *model.graph.inputs, *model.graph.initializers.values()]:
        value.metadata_props.clear()
        value.doc_string = None


def _values(model: ir.Model) -> Iterator[ir.Value]:
    """What nodes give out, those in the bodies of loops as well, and what a body takes in."""
    for node in model.graph.all_nodes():
        yield from node.outputs
    for body in model.graph.subgraphs():
        yield from body.inputs
