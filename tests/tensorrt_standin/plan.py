"""The bytes of an engine: what TensorRT checks before it loads one, and the ONNX model that the stand-in runs."""

from __future__ import annotations

import hashlib
import json
import struct
from dataclasses import asdict, dataclass, field

import onnx
from onnx import numpy_helper

_MAGIC = b"ftrt"
_STRIP_FROM = 64  # bytes; smaller initializers are part of the graph's meaning (shapes, axes)


@dataclass
class Binding:
    """One input or output of the engine. `dtype` is TensorRT's name; `host`: a shape tensor in host memory."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    is_input: bool
    host: bool = False


@dataclass
class Range:
    """What a profile allows of one input: three shapes, or three lists of values for a shape tensor."""

    low: tuple[int, ...]
    opt: tuple[int, ...]
    high: tuple[int, ...]


@dataclass
class Plan:
    """A built engine.

    Attributes:
        flags: names of BuilderFlag.
        profiles: one for each profile: input name -> shapes.
        values: one for each profile: shape tensor name -> values.
        stripped: names of the weights that are not in `model`.
    """

    version: str
    gpu: str
    sm: int
    name: str
    flags: list[str]
    strongly_typed: bool
    hardware_compatibility: str
    verbosity: str
    aux_streams: int
    bindings: list[Binding]
    profiles: list[dict[str, Range]]
    values: list[dict[str, Range]]
    profile_sharing: bool
    layers: list[dict[str, object]]
    weight_bytes: int
    stripped: list[str] = field(default_factory=list)
    model: bytes = b""


def bytes_from_plan(plan: Plan) -> bytes:
    header = asdict(plan)
    header.pop("model")
    text = json.dumps(header).encode()
    body = struct.pack("<Q", len(text)) + text + plan.model
    return _MAGIC + struct.pack("<Q", len(body)) + hashlib.sha256(body).digest() + body


def plan_from_bytes(data: bytes) -> Plan:
    """The plan.

    Raises:
        ValueError: these are not the bytes of a whole plan; the text is TensorRT's.
    """
    if data[:4] != _MAGIC:
        raise ValueError("Serialization assertion magicTagRead == kMAGIC_TAG failed.Magic tag does not match")
    body = data[44:]
    if (
        len(data) < 44
        or len(body) != struct.unpack("<Q", data[4:12])[0]
        or hashlib.sha256(body).digest() != data[12:44]
    ):
        raise ValueError("Serialization assertion sizeRead == size of the archive failed.")
    length = struct.unpack("<Q", body[:8])[0]
    header = json.loads(body[8 : 8 + length])
    header["bindings"] = [Binding(**{**item, "shape": tuple(item["shape"])}) for item in header["bindings"]]
    for key in ("profiles", "values"):
        header[key] = [{name: _range(item) for name, item in profile.items()} for profile in header[key]]
    return Plan(**header, model=body[8 + length :])


def _range(item: dict[str, list[int]]) -> Range:
    return Range(tuple(item["low"]), tuple(item["opt"]), tuple(item["high"]))


def strip_weights(model: onnx.ModelProto) -> tuple[bytes, list[str]]:
    """The model without its large weights, and their names."""
    light = onnx.ModelProto()
    light.CopyFrom(model)
    stripped = []
    for item in light.graph.initializer:
        if len(numpy_helper.to_array(item).tobytes()) >= _STRIP_FROM:
            stripped.append(item.name)
            for part in ("raw_data", "float_data", "int64_data", "int32_data", "double_data"):
                item.ClearField(part)
    return light.SerializeToString(), stripped


def put_weights(model: bytes, weights: dict[str, onnx.TensorProto]) -> bytes:
    """The model with those initializers replaced."""
    proto = onnx.load_model_from_string(model)
    for item in proto.graph.initializer:
        if item.name in weights:
            item.CopyFrom(weights[item.name])
    return proto.SerializeToString()
