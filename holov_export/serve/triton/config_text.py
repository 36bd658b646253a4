"""A model's configuration for Triton as text protobuf (config.pbtxt).

Source of the field names: triton-inference-server/common protobuf/model_config.proto (r24.10).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

#: element types as numpy calls them -> as a configuration does; "string" holds bytes
DATA_TYPES = {
    "bool": "TYPE_BOOL",
    "uint8": "TYPE_UINT8",
    "int32": "TYPE_INT32",
    "int64": "TYPE_INT64",
    "uint64": "TYPE_UINT64",
    "float16": "TYPE_FP16",
    "float32": "TYPE_FP32",
    "bfloat16": "TYPE_BF16",
    "string": "TYPE_STRING",
}


@dataclass(frozen=True)
class TensorConfig:
    """One input or output.

    Attributes:
        dtype: one of `DATA_TYPES`.
        dims: -1 for any length, without the axis of the requests' batch.
        optional: an input that a request may leave out.
        ragged: requests are batched although their shapes differ.
        shape_tensor: TensorRT reads it as a shape.
        reshaped: what the model itself sees instead of `dims`.
    """

    name: str
    dtype: str
    dims: tuple[int, ...]
    optional: bool = False
    ragged: bool = False
    shape_tensor: bool = False
    reshaped: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Batching:
    """Requests of different clients run together: so many at once, after waiting so long, from so long a queue."""

    largest: int
    delay_microseconds: int
    queue: int


@dataclass(frozen=True)
class ModelConfig:
    """config.pbtxt of one model.

    Attributes:
        backend: "python", "onnxruntime" or "tensorrt".
        batching: None for one request at a time, without an axis for batches.
        decoupled: a request gets any number of responses.
        instances: of the model on each device. device: "cpu", or "gpu" for the first one.
        parameters: that the model reads.
        file: of the model, where it is not named as the backend expects.
    """

    name: str
    backend: Literal["python", "onnxruntime", "tensorrt"]
    inputs: Sequence[TensorConfig]
    outputs: Sequence[TensorConfig]
    batching: Batching | None = None
    decoupled: bool = False
    instances: int = 1
    device: Literal["cpu", "gpu"] = "cpu"
    parameters: Sequence[tuple[str, str]] = ()
    file: str | None = None


def text_from_config(config: ModelConfig, comment: str = "") -> str:
    """The text of config.pbtxt; `comment` comes first."""
    lines = [f"# {line}".rstrip() for line in comment.splitlines()]
    lines += [f"name: {_quoted(config.name)}", f"backend: {_quoted(config.backend)}"]
    if config.file is not None:
        lines.append(f"default_model_filename: {_quoted(config.file)}")
    lines.append(f"max_batch_size: {config.batching.largest if config.batching else 0}")
    if config.batching:
        batching = config.batching
        lines += [
            "dynamic_batching {",
            f"  max_queue_delay_microseconds: {batching.delay_microseconds}",
            f"  default_queue_policy {{ max_queue_size: {batching.queue} }}",
            "}",
        ]
    if config.decoupled:
        lines.append("model_transaction_policy { decoupled: true }")
    for kind, tensors in (("input", config.inputs), ("output", config.outputs)):
        for tensor in tensors:
            lines += [f"{kind} {{", *(f"  {line}" for line in _tensor_lines(tensor)), "}"]
    kind = "KIND_GPU gpus: [ 0 ]" if config.device == "gpu" else "KIND_CPU"
    lines.append(f"instance_group {{ count: {config.instances} kind: {kind} }}")
    for key, value in config.parameters:
        lines.append(f"parameters {{ key: {_quoted(key)} value {{ string_value: {_quoted(value)} }} }}")
    return "\n".join(lines) + "\n"


def _tensor_lines(tensor: TensorConfig) -> list[str]:
    lines = [
        f"name: {_quoted(tensor.name)}",
        f"data_type: {DATA_TYPES[tensor.dtype]}",
        f"dims: [ {', '.join(map(str, tensor.dims))} ]",
    ]
    if tensor.reshaped is not None:
        lines.append(f"reshape {{ shape: [ {', '.join(map(str, tensor.reshaped))} ] }}")
    flags = (
        ("optional", tensor.optional),
        ("allow_ragged_batch", tensor.ragged),
        ("is_shape_tensor", tensor.shape_tensor),
    )
    return lines + [f"{name}: true" for name, is_set in flags if is_set]


def _quoted(text: str) -> str:
    """A string in quotes. JSON's escapes are protobuf's too, for text that has no control characters above U+FFFF."""
    return json.dumps(text, ensure_ascii=False)
