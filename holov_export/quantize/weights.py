"""Writes a graph whose weights may be in another graph's file already."""

from __future__ import annotations

import errno
import hashlib
import os
from pathlib import Path
from typing import TYPE_CHECKING

from holov_export.extras import require

if TYPE_CHECKING:
    import onnx_ir as ir

#: bytes up to which a tensor stays in the graph. Source: the default of onnx_ir.save
_SMALL = 256
#: bytes of its own that a graph over another one's weights holds itself; what is more gets a file
_OWN = 64 * 2**20


def save_with_weights(model: ir.Model, target: Path, share: Path | None) -> tuple[str, ...]:
    """Write `target`, and `<target>.data` with the weights that are nowhere else.

    Args:
        share: a graph in the same folder; what its weight file holds is read from there. Tensors are found by their
            bytes.

    Returns:
        names of what was written, the graph first.
    """
    onnx_ir = require("onnx_ir")
    values = [value for value in model.graph.initializers.values() if value.const_value is not None]
    if share is not None:
        values = _left_of(values, share)
    large = [value for value in values if _bytes(value) > _SMALL]
    files: tuple[str, ...] = (target.name,)
    if share is None or sum(_bytes(value) for value in large) > _OWN:
        values = [value for value in values if _bytes(value) <= _SMALL]
        _write_weights(large, target)
        files = (target.name, f"{target.name}.data")
    for value in values:
        if isinstance(value.const_value, onnx_ir.ExternalTensor):  # of the source, whose file is not the target's
            value.const_value = onnx_ir.Tensor(
                value.const_value.numpy(), dtype=value.const_value.dtype, name=value.name
            )
    onnx_ir.save(model, target)
    return files


def bytes_of(model: ir.Model) -> int:
    """Of all its weights, wherever they lie."""
    return sum(_bytes(value) for value in model.graph.initializers.values() if value.const_value is not None)


def _bytes(value: ir.Value) -> int:
    assert value.const_value is not None
    return int(value.const_value.nbytes)


def _write_weights(values: list[ir.Value], target: Path) -> None:
    """Move tensors into `<target>.data`, one at a time.

    Raises:
        OSError: with the number of a full disk where numpy forgot it.
    """
    tensors = [value.const_value for value in values if value.const_value is not None]
    convert = require("onnx_ir").external_data.convert_tensors_to_external
    try:
        written = convert(tensors, target.parent, f"{target.name}.data")
    except OSError as error:
        if error.errno is None:  # numpy's tofile forgets the number; a write that stops half-way is a full disk
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from error
        raise
    for value, tensor in zip(values, written, strict=True):
        value.const_value = tensor


def _left_of(values: list[ir.Value], share: Path) -> list[ir.Value]:
    """Let values read what the weight file of `share` holds; those that it does not hold come back."""
    onnx_ir = require("onnx_ir")
    shared = {}
    for value in onnx_ir.load(share).graph.initializers.values():
        if isinstance(value.const_value, onnx_ir.ExternalTensor):
            shared[_key_of(value.const_value)] = value.const_value
    left = []
    for value in values:
        tensor = value.const_value
        assert tensor is not None
        found = shared.get(_key_of(tensor)) if _bytes(value) > _SMALL else None
        if found is None:
            left.append(value)
            continue
        value.const_value = onnx_ir.ExternalTensor(
            found.location,
            found.offset,
            found.length,
            tensor.dtype,
            shape=onnx_ir.Shape(tensor.shape.numpy()),
            name=value.name or "",
            base_dir=share.parent,
        )
    return left


def _key_of(tensor: ir.TensorProtocol) -> tuple[str, str, bytes]:
    return tensor.dtype.name, str(tensor.shape), hashlib.sha256(tensor.tobytes()).digest()
