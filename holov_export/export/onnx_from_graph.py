"""From the torch module to `vision.onnx`: one graph, dynamic batch, dynamic budget, weights in a file beside it."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import logging
import os
import warnings
from collections.abc import Iterator
from pathlib import Path

import onnx_ir as ir
import torch

from holov_export import __version__
from holov_export.bundle import VISION
from holov_export.errors import ParityError
from holov_export.export.passes import clean
from holov_export.export.translations import translation_table
from holov_export.signature import TensorSpec
from holov_export.spec import ExportPlan
from holov_export.vision.families import VisionModule, example_inputs

_ONNX_DTYPES = {
    ir.DataType.FLOAT: "float32",
    ir.DataType.FLOAT16: "float16",
    ir.DataType.BFLOAT16: "bfloat16",
    ir.DataType.INT64: "int64",
}


def onnx_from_graph(module: VisionModule, plan: ExportPlan) -> ir.Model:
    """Export the vision module.

    The result's inputs and outputs are those of `signature.py`; the axes that are named there are dynamic.

    Raises:
        ParityError: the exporter produced other inputs, outputs or another opset than the plan says.
    """
    module = module.eval()
    model = _exported(module, plan)
    inputs, outputs = plan.signature
    clean(model, _axes(model, (*inputs, *outputs)))
    model.producer_name, model.producer_version = "holov-export", __version__
    model.graph.name = f"{plan.model.family}-vision-{plan.method}"
    _assert_signature(model, plan, inputs, outputs)
    return model


def save_vision(model: ir.Model, folder: Path, file: str = VISION) -> Path:
    """Write a graph and its weights (`vision.onnx` and `vision.onnx.data`) into `folder`."""
    path = folder / file
    try:
        ir.save(model, path, external_data=f"{file}.data")
    except OSError as error:
        if error.errno is None:  # numpy's tofile forgets the number; a write that stops half-way is a full disk
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from error
        raise
    return path


def save_beside(model: ir.Model, folder: Path, file: str, first: str = VISION) -> Path:
    """Write a further graph into a folder that has the graph `first`: it names the weights of that one's file.

    A weight is found by its bytes, not by its name. What is not there (the rule's own tables) is written into the
    graph itself.
    """
    shared = _weights_in(folder / first)
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if tensor is None:
            continue
        found = shared.get(_key_of(tensor))
        if found is not None:
            value.const_value = ir.ExternalTensor(
                found.location,
                found.offset,
                found.length,
                tensor.dtype,
                shape=ir.Shape(tensor.shape.numpy()),
                name=value.name or "",
                base_dir=folder,
            )
    path = folder / file
    ir.save(model, path)
    return path


def _weights_in(graph: Path) -> dict[tuple[str, str, bytes], ir.ExternalTensor]:
    """The tensors of the weight file beside a graph, by what they are."""
    values = ir.load(graph).graph.initializers.values()
    tensors = [value.const_value for value in values]
    return {_key_of(tensor): tensor for tensor in tensors if isinstance(tensor, ir.ExternalTensor)}


def _key_of(tensor: ir.TensorProtocol) -> tuple[str, str, bytes]:
    return tensor.dtype.name, str(tensor.shape), hashlib.sha256(tensor.tobytes()).digest()


def forget_graph(model: ir.Model) -> None:
    """Drop the weights of a model that has been saved: the exporter's leftovers keep its values alive."""
    for value in model.graph.initializers.values():
        value.const_value = None


def write_widened(source: Path, folder: Path) -> Path:
    """Write a bfloat16 graph again with float32 in place of bfloat16, weights unchanged in value.

    ONNX Runtime has no bfloat16 convolution for the CPU; this is the same graph with wider arithmetic, so that its
    nodes and weights can be checked where it cannot run itself.
    """
    model = ir.load(source)
    narrow, wide = ir.DataType.BFLOAT16, ir.DataType.FLOAT
    for value in model.graph.initializers.values():
        if value.dtype == narrow and value.const_value is not None:
            value.const_value = ir.Tensor(value.const_value.numpy().astype("float32"), name=value.name)
            value.type = ir.TensorType(wide)
    for node in model.graph:
        if node.op_type == "Cast" and node.attributes["to"].as_int() == narrow:
            node.attributes["to"] = ir.AttrInt64("to", wide)
        value_attribute = node.attributes.get("value")
        if node.op_type == "Constant" and value_attribute is not None and value_attribute.as_tensor().dtype == narrow:
            tensor = ir.Tensor(value_attribute.as_tensor().numpy().astype("float32"))
            node.attributes["value"] = ir.AttrTensor("value", tensor)
    for value in [*model.graph.inputs, *model.graph.outputs]:
        if value.dtype == narrow:
            value.type = ir.TensorType(wide)
    return save_vision(model, folder)


def _exported(module: VisionModule, plan: ExportPlan) -> ir.Model:
    inputs, outputs = plan.signature
    dynamic = torch.export.Dim.DYNAMIC
    with quiet_exporter():
        program = torch.onnx.export(
            module,
            example_inputs(plan),
            dynamo=True,
            opset_version=plan.opset,
            input_names=[spec.name for spec in inputs],
            output_names=[spec.name for spec in outputs],
            dynamic_shapes={
                spec.name: {index: dynamic for index, axis in enumerate(spec.shape) if isinstance(axis, str)}
                for spec in inputs
            },
            custom_translation_table=translation_table(plan.opset),
            optimize=True,
            verbose=False,
        )
    assert program is not None
    return program.model


@contextlib.contextmanager
def quiet_exporter() -> Iterator[None]:
    """The exporter prints and warns about packages that are not needed; errors are exceptions and get through."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.onnx._internal.exporter._registration")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), torch.no_grad():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _axes(model: ir.Model, specs: tuple[TensorSpec, ...]) -> dict[str, str]:
    """The exporter's names of dynamic axes -> those of the signature."""
    found: dict[str, str] = {}
    for value, spec in zip((*model.graph.inputs, *model.graph.outputs), specs, strict=True):
        assert value.shape is not None
        for axis, name in zip(value.shape, spec.shape, strict=True):
            symbol = getattr(axis, "value", axis)
            if isinstance(name, str) and isinstance(symbol, str):
                found.setdefault(symbol, name)
    return found


def _assert_signature(
    model: ir.Model, plan: ExportPlan, inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...]
) -> None:
    reached = model.opset_imports.get("")
    if reached != plan.opset or set(model.opset_imports) != {""}:
        raise ParityError(f"the exporter reached opsets {dict(model.opset_imports)}, the plan says {plan.opset}.")
    for side, values, specs in (("input", model.graph.inputs, inputs), ("output", model.graph.outputs, outputs)):
        found = tuple(_spec_of(value) for value in values)
        if found != specs:
            raise ParityError(f"the exported {side}s are {found}, the signature says {specs}.")


def _spec_of(value: ir.Value) -> TensorSpec:
    assert value.shape is not None
    assert value.dtype is not None
    assert value.name is not None
    axes = tuple(axis if isinstance(axis, int) else str(axis.value) for axis in value.shape)
    return TensorSpec(value.name, _ONNX_DTYPES.get(value.dtype, str(value.dtype)), axes)
