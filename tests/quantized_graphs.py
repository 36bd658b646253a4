"""Q/DQ graphs made by hand on top of exported ones, without a calibration.

All products with weights are quantised but those that decide; activations have one scale that nobody measured.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from holov_export.bundle import Bundle, artifacts_in, atomic_folder, open_bundle, write_manifest
from holov_export.compile.deciding_part import deciding_part, weight_of
from holov_export.compile.graph_view import view_of
from holov_export.compile.precision_pins import element_types
from holov_export.spec import QUANTIZED_OPSET, Quantization, QuantizedType, opset_of

INT8, FP8 = QuantizedType.INT8, QuantizedType.FP8
#: of all activations
STEP = 0.05
_NUMPY = {INT8: np.int8, FP8: ml_dtypes.float8_e4m3fn}
_LARGEST = {INT8: 127.0, FP8: 448.0}

Wanted = Callable[[onnx.NodeProto], bool]


def quantization_of(kind: QuantizedType) -> Quantization:
    """What a plan says of such a graph."""
    return Quantization(type=kind, recipe="by-hand", recipe_sha256="0" * 64, algorithm="minmax")


def quantized(model: onnx.ModelProto, kind: QuantizedType, wanted: Wanted | None = None) -> onnx.ModelProto:
    """A copy whose products with weights are quantised.

    Args:
        model: with its weights. wanted: the products; None for those that TensorRT is given.
    """
    made = onnx.ModelProto()
    made.CopyFrom(model)
    view, types = view_of(model), element_types(model)
    deciding = deciding_part(view, types).weights
    floats = TensorProto.FLOAT
    nodes: list[onnx.NodeProto] = []
    for node in made.graph.node:
        weight = weight_of(view, node) if node.op_type != "Conv" else ""
        if weight and (weight not in deciding if wanted is None else wanted(node)):
            floats = types[weight]
            around = _activation(made.graph, node, kind, floats) + _weight(made.graph, node, weight, kind, floats)
            for pair in around:
                if not any(pair.output[0] in other.output for other in nodes):  # two products may share it
                    nodes.append(pair)
        nodes.append(node)
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del made.graph.node[:]
    made.graph.node.extend(copies)
    constants = {tensor.name for tensor in made.graph.initializer}  # some have the types of before
    notes = [item for item in made.graph.value_info if item.name not in constants]
    del made.graph.value_info[:]
    made.graph.value_info.extend(notes)
    if kind is FP8 or floats != TensorProto.FLOAT:
        opset = made.opset_import[0]
        opset.version = max(opset.version, QUANTIZED_OPSET)
        made.ir_version = max(made.ir_version, 9)
    return made


def _activation(graph: onnx.GraphProto, node: onnx.NodeProto, kind: QuantizedType, floats: int) -> list[onnx.NodeProto]:
    name = node.input[0]
    scale = _constant(graph, f"{name}/scale", np.asarray(STEP, helper.tensor_dtype_to_np_dtype(floats)))
    zero = _constant(graph, f"zero/{kind.value}", np.zeros((), _NUMPY[kind]))
    inner, outer = f"{name}/quantized", f"{name}/dequantized"
    node.input[0] = outer
    return [
        helper.make_node("QuantizeLinear", [name, scale, zero], [inner], name=f"{name}/QuantizeLinear"),
        helper.make_node("DequantizeLinear", [inner, scale, zero], [outer], name=f"{name}/DequantizeLinear"),
    ]


def _weight(
    graph: onnx.GraphProto, node: onnx.NodeProto, weight: str, kind: QuantizedType, floats: int
) -> list[onnx.NodeProto]:
    outer = f"{weight}/dequantized"
    node.input[1] = outer
    tensor = next(item for item in graph.initializer if item.name == weight)
    if tensor.data_type in (TensorProto.INT8, TensorProto.FLOAT8E4M3FN):
        return []  # a weight that two products share
    axis = 0 if any(item.name == "transB" and item.i for item in node.attribute) else 1
    values = numpy_helper.to_array(tensor).astype(np.float32)
    scales = np.maximum(np.abs(values).max(axis=1 - axis), 1e-3) / _LARGEST[kind]
    quotients = values / np.expand_dims(scales, 1 - axis)
    integers = (np.rint(quotients) if kind is INT8 else quotients).astype(_NUMPY[kind])
    tensor.CopyFrom(numpy_helper.from_array(integers, weight))
    scale = _constant(graph, f"{weight}/scale", scales.astype(helper.tensor_dtype_to_np_dtype(floats)))
    zero = _constant(graph, f"{weight}/zero", np.zeros(scales.shape, _NUMPY[kind]))
    return [
        helper.make_node(
            "DequantizeLinear", [weight, scale, zero], [outer], name=f"{weight}/DequantizeLinear", axis=axis
        )
    ]


def _constant(graph: onnx.GraphProto, name: str, array: np.ndarray) -> str:
    if not any(tensor.name == name for tensor in graph.initializer):
        graph.initializer.append(numpy_helper.from_array(array, name))
    return name


def quantized_bundle(bundle: Bundle, folder: Path, kind: QuantizedType) -> Bundle:
    """A copy of a bundle whose vision graphs are quantised; nothing else is in it."""
    plan = bundle.manifest.plan
    plan = plan.model_copy(
        update={"quantization": quantization_of(kind), "opset": opset_of(plan.precision, quantization_of(kind))}
    )
    with atomic_folder(folder) as work:
        for view in bundle.views:
            model = quantized(onnx.load(str(view.vision)), kind)
            data = f"{view.graph}.data"
            onnx.save_model(
                model, str(work / view.graph), save_as_external_data=True, location=data, size_threshold=256
            )
        manifest = bundle.manifest.model_copy(update={"plan": plan, "artifacts": artifacts_in(work)})
        write_manifest(work, manifest)
    return open_bundle(folder)
