"""vision.onnx as an older TensorRT reads it: opset 17 for 8.5 and 8.6, without LayerNormalization for 8.5.

Works on the graph alone (`onnx.load(path, load_external_data=False)`): references to the weight file stay as they are,
so a lowered graph is written beside the same vision.onnx.data and no weight is read or copied. Only INT8 weights get a
file of their own, in float32; see `float_weights`.

Nothing passes in silence: a node whose operator changed after opset 17 is in a table of `rewrites` or an error that
names it, and every node of the result is compared with its schema of opset 17.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from holov_export.compile.float_weights import store_weights_as_float
from holov_export.compile.rewrites import (
    OLD_VALUES,
    REWRITES,
    WIDENED,
    GraphRewrite,
    Rewrite,
    attributes_of,
    decompose_layer_normalization,
    label_of,
    refuse,
)
from holov_export.errors import UsageError
from holov_export.extras import require
from holov_export.versions import version_from_text

if TYPE_CHECKING:
    from onnx import AttributeProto, GraphProto, ModelProto, NodeProto

Version = tuple[int, ...]

#: the opset that TensorRT 8.5 and 8.6 read at most. Source: onnx/onnx-tensorrt docs/operators.md, 8.5-GA and 8.6-GA
OPSET_OF_TENSORRT_8 = 17
#: the IR version of ONNX 1.12, the release that brought opset 17. Source: onnx/onnx docs/Versioning.md
IR_OF_OPSET_17 = 8
#: the oldest TensorRT that graphs are made for
OLDEST: Version = (8, 5)
#: TensorProto.COMPLEX128; the types after it are bfloat16, 8-bit floats and what is smaller
_LAST_OLD_TYPE = 15
_STANDARD = ("", "ai.onnx")


def tensorrt_version(text: str) -> Version:
    """(8, 6) from "8.6", (8, 5, 2, 2) from "8.5.2.2".

    Raises:
        UsageError: not a version number, or one before 8.5.
    """
    version = version_from_text(text)
    if version < OLDEST:
        raise UsageError(f"TensorRT {text} is too old.", hint="Engines are built from TensorRT 8.5 on.")
    return version


def lowered_for(model: ModelProto, tensorrt: str) -> ModelProto:
    """The graph that TensorRT `tensorrt` ("8.5.2", "10.3") is to be given: a new proto, `model` stays as it is.

    8.5 and 8.6 get opset 17 (an older one stays) and IR version 8, 8.5 gets LayerNormalization in parts; later versions
    get a copy. Lowering what has been lowered changes nothing.

    Args:
        model: best loaded without its weights. What is outside stays outside.
        tensorrt: the version that will parse the graph.

    Raises:
        UsageError: bfloat16 or another type that TensorRT 8 has not, scales that are no float32, or an operator that
            cannot be written in opset 17; the message names the node.
    """
    version = tensorrt_version(tensorrt)
    lowered = type(model)()
    lowered.CopyFrom(model)
    if version >= (9,):
        return lowered
    if lowered.functions:
        raise UsageError(
            f"the model has functions of its own ('{lowered.functions[0].name}'), which TensorRT 8 does not read.",
            hint="Inline them: onnx.inliner.inline_local_functions",
        )
    _refuse_young_types(lowered, tensorrt)
    opset = opset_of(lowered)
    types, ranks = inferred(lowered)
    _refuse_half_scales(lowered, types, tensorrt)
    store_weights_as_float(lowered.graph)
    taken = set(_names_in(lowered.graph))
    root = GraphRewrite(lowered.graph, types, ranks, {}, taken)
    if opset > OPSET_OF_TENSORRT_8:
        _rewrite(root, REWRITES, opset)
        _set_opset(lowered, OPSET_OF_TENSORRT_8)
        _check_against_schemas(lowered)
    if version < (8, 6):
        _rewrite(root, {"LayerNormalization": decompose_layer_normalization}, 0)
    _drop_unread_constants(lowered.graph)
    _lower_ir_version(lowered)
    return lowered


def opset_of(model: ModelProto) -> int:
    """The opset of the standard operators; 1 if the model names none, as ONNX has it."""
    return next((int(item.version) for item in model.opset_import if item.domain in _STANDARD), 1)


def inferred(model: ModelProto) -> tuple[dict[str, int], dict[str, int]]:
    """(element type, rank) of every value of the main graph that ONNX can infer without the weights."""
    onnx = require("onnx")
    try:
        graph = onnx.shape_inference.infer_shapes(model).graph
    except (onnx.shape_inference.InferenceError, ValueError, RuntimeError):
        graph = model.graph
    types = {tensor.name: tensor.data_type for tensor in graph.initializer}
    ranks = {tensor.name: len(tensor.dims) for tensor in graph.initializer}
    for value in (*graph.value_info, *graph.input, *graph.output):
        if value.type.HasField("tensor_type"):
            types[value.name] = value.type.tensor_type.elem_type
            if value.type.tensor_type.HasField("shape"):
                ranks[value.name] = len(value.type.tensor_type.shape.dim)
    return types, ranks


def subgraphs_of(node: NodeProto) -> Iterator[GraphProto]:
    """Bodies of a control-flow node."""
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs


def all_nodes(graph: GraphProto) -> Iterator[NodeProto]:
    """Every node, bodies included, each before the nodes of its bodies."""
    for node in graph.node:
        yield node
        for body in subgraphs_of(node):
            yield from all_nodes(body)


def all_graphs(graph: GraphProto) -> Iterator[GraphProto]:
    """A graph and every body in it."""
    yield graph
    for node in graph.node:
        for body in subgraphs_of(node):
            yield from all_graphs(body)


def _rewrite(rewrite: GraphRewrite, table: dict[str, Rewrite], opset: int) -> None:
    """Replace the nodes that `table` names, bodies first. `opset` is the one they are of; 0 if all are to go."""
    replaced: list[NodeProto] = []
    for node in rewrite.graph.node:
        for body in subgraphs_of(node):
            inner = GraphRewrite(body, rewrite.types, rewrite.ranks, rewrite.constants, rewrite.taken)
            _rewrite(inner, table, opset)
        changed = node.domain in _STANDARD and (opset == 0 or _since(node, opset) > OPSET_OF_TENSORRT_8)
        if changed and node.op_type in table:
            replaced += table[node.op_type](rewrite, node)
        else:
            if changed and opset:
                _drop_defaults(node, opset)
            replaced.append(node)
    kept = [type(node).FromString(node.SerializeToString()) for node in replaced]
    del rewrite.graph.node[:]
    rewrite.graph.node.extend(kept)


def _since(node: NodeProto, opset: int) -> int:
    """The opset that brought the form of the operator which `opset` has."""
    defs = require("onnx").defs
    try:
        return int(defs.get_schema(node.op_type, opset, "").since_version)
    except defs.SchemaError:
        refuse(node, f"the installed onnx does not know it in opset {opset}", "Upgrade: pip install -U onnx")


def _drop_defaults(node: NodeProto, opset: int) -> None:
    """Take away attributes that opset 17 does not know if they say what it does anyway.

    Raises:
        UsageError: the operator is in no table, or the attribute says something else.
    """
    onnx = require("onnx")
    if node.op_type not in WIDENED:
        refuse(node, f"it came or changed in opset {_since(node, opset)}, and no way back to opset 17 is known")
    new = onnx.defs.get_schema(node.op_type, opset, "")
    old = onnx.defs.get_schema(node.op_type, OPSET_OF_TENSORRT_8, "")
    for name, value in attributes_of(node).items():
        if name not in old.attributes:
            default = new.attributes[name].default_value
            if value != _value_of(default) and not (name == "dilations" and set(value) == {1}):
                refuse(node, f"opset 17 has no attribute '{name}'")
            node.attribute.remove(next(item for item in node.attribute if item.name == name))
        elif value not in OLD_VALUES.get((node.op_type, name), (value,)):
            refuse(node, f"opset 17 has no {name} '{value}'")


def _value_of(attribute: AttributeProto) -> Any:
    """Its Python value, None if it has none (an attribute without a default)."""
    if not attribute.type:
        return None
    value = require("onnx").helper.get_attribute_value(attribute)
    return value.decode() if isinstance(value, bytes) else value


def _check_against_schemas(model: ModelProto) -> None:
    """Compare each node with its schema of opset 17: that it exists, its inputs and its attributes; then all types."""
    onnx = require("onnx")
    for node in all_nodes(model.graph):
        if node.domain not in _STANDARD:
            continue
        try:
            schema = onnx.defs.get_schema(node.op_type, OPSET_OF_TENSORRT_8, "")
        except onnx.defs.SchemaError:
            refuse(node, "opset 17 does not have it")
        if len(node.input) > schema.max_input:
            refuse(node, f"it has {len(node.input)} inputs, in opset 17 at most {schema.max_input}")
        unknown = {attribute.name for attribute in node.attribute} - set(schema.attributes)
        if unknown:
            refuse(node, f"opset 17 has no attribute '{min(unknown)}'")
    try:
        onnx.shape_inference.infer_shapes(model, check_type=True)
    except (onnx.shape_inference.InferenceError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UsageError(f"the graph is not valid in opset 17: {reason}", hint="Export it with opset 17.") from error


def _refuse_young_types(model: ModelProto, tensorrt: str) -> None:
    """TensorRT 8 has no bfloat16, no 8-bit floats and no 4-bit integers.

    Raises:
        UsageError: names the first value of such a type.
    """
    types = require("onnx").TensorProto.DataType
    for name, dtype in _types_in(model.graph):
        if dtype <= _LAST_OLD_TYPE:
            continue
        word = types.Name(dtype).lower()
        hint = "Export with --fp16 instead." if word == "bfloat16" else "Export with --int8 instead."
        raise UsageError(f"'{name}' is {word}, which TensorRT {tensorrt} does not have.", hint=hint)


def _refuse_half_scales(model: ModelProto, types: dict[str, int], tensorrt: str) -> None:
    """Q/DQ nodes of opset 17 have float32 scales, and TensorRT 8 reads all scales as such.

    Source: onnx/onnx QuantizeLinear-13 and -19; onnx/onnx-tensorrt builtin_op_importers.cpp@8.6-GA.

    Raises:
        UsageError: names the first node with other scales.
    """
    half = require("onnx").TensorProto.FLOAT16
    for node in all_nodes(model.graph):
        if node.op_type in ("QuantizeLinear", "DequantizeLinear") and types.get(node.input[1]) == half:
            refuse(
                node,
                f"its scale is float16, which came with opset 19, and TensorRT {tensorrt} reads up to opset 17",
                "Export with --int8 and without --fp16: TensorRT 8 halves the rest by its FP16 flag.",
            )


def _types_in(graph: GraphProto) -> Iterator[tuple[str, int]]:
    """(name, element type) of all that says its type: inputs, outputs, weights, Cast and Constant nodes."""
    for inner in all_graphs(graph):
        for value in (*inner.input, *inner.output, *inner.value_info):
            yield value.name, value.type.tensor_type.elem_type
        for tensor in inner.initializer:
            yield tensor.name, tensor.data_type
        for node in inner.node:
            for attribute in node.attribute:
                if attribute.HasField("t"):
                    yield label_of(node), attribute.t.data_type
                elif node.op_type == "Cast" and attribute.name == "to":
                    yield label_of(node), attribute.i


def _names_in(graph: GraphProto) -> Iterator[str]:
    for inner in all_graphs(graph):
        yield from (item.name for item in (*inner.input, *inner.initializer, *inner.node))
        for node in inner.node:
            yield from node.output


def _set_opset(model: ModelProto, opset: int) -> None:
    for item in model.opset_import:
        if item.domain in _STANDARD:
            item.version = opset


def _drop_unread_constants(graph: GraphProto) -> None:
    """Remove initializers of the main graph that no node reads any more (axes that became attributes)."""
    read = {name for node in all_nodes(graph) for name in node.input}
    read |= {value.name for inner in all_graphs(graph) for value in inner.output}
    kept = [tensor for tensor in graph.initializer if tensor.name in read]
    if len(kept) < len(graph.initializer):
        copies = [type(tensor).FromString(tensor.SerializeToString()) for tensor in kept]
        del graph.initializer[:]
        graph.initializer.extend(copies)


def _lower_ir_version(model: ModelProto) -> None:
    """IR version 8, without what later ones added: metadata of nodes, values and tensors."""
    if model.ir_version <= IR_OF_OPSET_17:
        return
    model.ir_version = IR_OF_OPSET_17
    for graph in all_graphs(model.graph):
        for item in (graph, *graph.node, *graph.value_info, *graph.input, *graph.output, *graph.initializer):
            item.ClearField("metadata_props")
