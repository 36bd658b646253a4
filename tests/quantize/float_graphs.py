"""Float graphs to quantise, the ranges of their activations, and what they compute.

The ranges are taken here from the graph's own values, not by the package's calibration.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from holov_export.bundle import Bundle
from holov_export.quantize.linears import linears_of
from holov_export.quantize.ranges import ChannelRange, Ranges, RangesRecord, TensorRange
from holov_export.runtime.packing import packed_inputs
from holov_export.runtime.preprocess import pixels_from_pictures
from holov_export.runtime.runner import quota_array
from holov_export.spec import Quantization, QuantizedType

Array = npt.NDArray[np.generic]
Feed = dict[str, Array]
OUTPUTS = ("visual_tokens", "positions", "counts", "saliency")
INT8 = Quantization(type=QuantizedType.INT8, recipe="toy", algorithm="minmax")
FP8 = INT8.model_copy(update={"type": QuantizedType.FP8})


def run(
    graph: Path, feed: Feed, names: Sequence[str] = OUTPUTS, *, optimised: bool = False
) -> list[npt.NDArray[np.generic]]:
    """What ONNX Runtime computes, every node as the file has it unless `optimised`."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    if not optimised:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
    return list(session.run(list(names), feed))


def feed_of(bundle: Bundle, pictures: Sequence[Image.Image], budget: int) -> Feed:
    """The inputs of a bundle's graph for some pictures."""
    plan = bundle.manifest.plan
    pixels = pixels_from_pictures(list(pictures), plan.model)
    dtype = np.dtype(plan.precision.dtype)
    feed: Feed = {"pixel_values": np.ascontiguousarray(pixels.pixel_values, dtype=dtype)}
    quotas = quota_array(None, budget, len(pixels))
    if not plan.packed:
        return {**feed, "budget": np.array([budget], dtype=np.int64), "quota": quotas}
    packed = packed_inputs(pixels.layouts, plan, quotas, "frames")
    feed.update({array.name: array.values for array in packed.arrays})
    return {**feed, "budget": np.array([packed.budget], dtype=np.int64), "quota": packed.quota}


def ranges_of(graph: Path, feeds: Sequence[Feed]) -> Ranges:
    """Smallest and largest values of every activation that a product reads."""
    model = onnx.load(graph, load_external_data=False)
    names = list(dict.fromkeys(name for linear in linears_of(model) for name in linear.activations))
    known = {item.name for item in (*model.graph.output, *model.graph.input)}
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name not in known)
    probe = graph.with_name(f"probed-{graph.name}")
    probe.write_bytes(model.SerializeToString())
    runs = [run(probe, feed, names, optimised=True) for feed in feeds]
    probe.unlink()
    channels = {}
    for name, values in zip(names, zip(*runs, strict=True), strict=True):
        rows = np.concatenate([item.reshape(-1, item.shape[-1]).astype(np.float32) for item in values])
        channels[name] = ChannelRange(low=rows.min(axis=0), high=rows.max(axis=0))
    return ranges_from_channels(channels)


def ranges_from_channels(channels: dict[str, ChannelRange]) -> Ranges:
    record = RangesRecord(
        recipe="toy",
        recipe_sha256="0" * 64,
        graph_sha256="1" * 64,
        weights_sha256="2" * 64,
        algorithm="minmax",
        pictures=(("a.png", "3" * 64),),
        budgets=(4,),
        tensors={
            name: TensorRange(low=float(item.low.min()), high=float(item.high.max())) for name, item in channels.items()
        },
        created="2026-01-01T00:00:00Z",
        seconds=1.0,
    )
    return Ranges(record, channels)


#: a norm, as its node's name says it -> the ends of the names of the products that read it
_READERS = {
    "layer_norm1": ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"),
    "layer_norm2": ("mlp.fc1.weight",),
    "norm1": ("attn.qkv.weight",),
    "norm2": ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
}


def write_vivid(source: Path, target: Path, *, outliers: float = 15.0, seed: int = 0) -> Path:
    """A graph with weights as training leaves them: norms and biases of their own, and channels that stand out.

    Six channels of each norm are `outliers` times louder than the rest, and the products listen less to them. The
    products of the layers are drawn anew, large enough to count beside the residual stream.
    """
    model = onnx.load(source)
    draw = np.random.default_rng(seed)
    weights = {item.name: item for item in model.graph.initializer}
    sizes = {name: item.dims[0] for name, item in weights.items() if len(item.dims) == 1 and item.dims[0] > 1}
    products = {node.output[0] for node in model.graph.node if node.op_type == "MatMul"}

    for name, item in weights.items():
        if len(item.dims) == 2 and (".layers." in name or ".blocks." in name):
            spread = item.dims[1 if ".blocks." in name else 0] ** -0.5  # a Gemm's weight is stored transposed
            item.CopyFrom(numpy_helper.from_array(draw.normal(0, spread, item.dims).astype(np.float32), name))

    def replace(node: onnx.NodeProto, place: int, values: npt.NDArray[np.floating]) -> None:
        name = f"{node.name}#{place}.drawn"
        model.graph.initializer.append(numpy_helper.from_array(values.astype(np.float32), name))
        node.input[place] = name

    def draw_gain(node: onnx.NodeProto, place: int) -> None:
        factors = draw.uniform(0.5, 1.5, sizes[node.input[place]])
        loud = draw.choice(len(factors), 6, replace=False)
        factors[loud] *= outliers
        replace(node, place, factors)
        layer, _, norm = node.name.rpartition("/")[0].replace("/", ".").rpartition(".")
        for end in _READERS.get(norm, ()):
            item = weights[f"{layer}.{end}"]
            rows = numpy_helper.to_array(item).copy()
            rows[(slice(None), loud) if norm.startswith("norm") else loud] /= outliers
            item.CopyFrom(numpy_helper.from_array(rows, item.name))

    for node in model.graph.node:
        if node.op_type == "LayerNormalization":
            draw_gain(node, 1)
            replace(node, 2, draw.normal(0, 0.1, sizes[node.input[2]]))
        elif node.op_type == "Mul" and node.input[0] in sizes:  # the end of an RMS norm
            draw_gain(node, 0)
        elif node.op_type == "Add" and node.input[0] in products and node.input[1] in sizes:
            replace(node, 1, draw.normal(0, 0.2, sizes[node.input[1]]))
    used = {name for node in model.graph.node for name in node.input} | _names_in_bodies(model)
    kept = [item for item in model.graph.initializer if item.name in used]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
    onnx.save(model, target, save_as_external_data=True, location=f"{target.name}.data", size_threshold=256)
    return target


def _names_in_bodies(model: onnx.ModelProto) -> set[str]:
    graphs = [item.g for node in model.graph.node for item in node.attribute if item.HasField("g")]
    return {name for graph in graphs for node in graph.node for name in node.input}


def write_toy(
    target: Path,
    nodes: Sequence[onnx.NodeProto],
    weights: dict[str, npt.NDArray[np.floating]],
    *,
    inputs: Sequence[tuple[str, tuple[str | int, ...]]] = (("x", ("rows", 4)),),
    outputs: Sequence[str] = ("y",),
    dtype: int = TensorProto.FLOAT,
    opset: int = 18,
    external: bool = True,
) -> Path:
    """A graph of few nodes. Weights are stored in the type `dtype`; integers as they are."""
    tensors = []
    for name, values in weights.items():
        array = np.asarray(values)
        if array.dtype.kind == "f":
            array = array.astype(helper.tensor_dtype_to_np_dtype(dtype))
        tensors.append(numpy_helper.from_array(array, name))
    graph = helper.make_graph(
        nodes,
        "toy",
        [helper.make_tensor_value_info(name, dtype, shape) for name, shape in inputs],
        [onnx.ValueInfoProto(name=name) for name in outputs],
        tensors,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    model = onnx.shape_inference.infer_shapes(model)
    del model.graph.value_info[:]  # an exported graph has none
    if external:
        onnx.save(model, target, save_as_external_data=True, location=f"{target.name}.data", size_threshold=80)
    else:
        onnx.save(model, target)
    return target
