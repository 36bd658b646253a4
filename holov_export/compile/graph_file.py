"""ONNX files without their weights: reading one, and writing the form that an older TensorRT reads."""

from __future__ import annotations

import contextlib
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from holov_export.bundle import VISION, read_manifest
from holov_export.compile.float_weights import write_float_weights
from holov_export.compile.lowering import all_graphs, lowered_for
from holov_export.errors import BundleError, StorageError, UsageError
from holov_export.extras import require

if TYPE_CHECKING:
    from onnx import ModelProto

#: no protobuf message is longer. Source: https://protobuf.dev/programming-guides/proto-limits/
LARGEST_PROTOBUF = 2**31 - 1
#: Linux ioctl: share the blocks of another file (btrfs, xfs). Source: include/uapi/linux/fs.h, FICLONE
_FICLONE = 0x40049409


def graph_path(path: Path) -> Path:
    """The ONNX file that a bundle or a path names.

    Raises:
        BundleError: a folder without vision.onnx.
        UsageError: nothing is there.
    """
    if path.is_dir():
        if not (path / VISION).is_file():
            read_manifest(path)
            raise BundleError(f"'{path}' has no {VISION}.", hint="Export the bundle again.")
        return path / VISION
    if not path.is_file():
        raise UsageError(f"'{path}' does not exist.", hint="Name a bundle or an ONNX file.")
    return path


def graph_from_file(path: Path) -> ModelProto:
    """The model as the file has it; weights in other files are not read and need not be there.

    Raises:
        UsageError: no ONNX model, truncated, or larger than a protobuf message can be.
        StorageError: the file cannot be read.
    """
    onnx = require("onnx")
    try:
        size = path.stat().st_size
        if size > LARGEST_PROTOBUF:
            raise UsageError(
                f"'{path}' has {size} bytes, more than a protobuf message can have ({LARGEST_PROTOBUF}).",
                hint="Save its weights outside: onnx.save(model, path, save_as_external_data=True)",
            )
        content = path.read_bytes()
    except OSError as error:
        raise StorageError(f"cannot read '{path}': {error.strerror}.") from error
    model: ModelProto = onnx.ModelProto()
    try:
        model.ParseFromString(content)
    except Exception as error:  # DecodeError lives in google.protobuf, which onnx brings and nothing else names
        raise UsageError(f"'{path}' is no ONNX model, or it is truncated.", hint="Export or copy it again.") from error
    if not model.ir_version or not model.graph.output:
        raise UsageError(f"'{path}' holds no ONNX graph.", hint="Name a bundle or an ONNX file.")
    return model


def weight_files(model: ModelProto) -> list[str]:
    """Places of the weight files, relative to the model's folder."""
    external = require("onnx").TensorProto.EXTERNAL
    found = set()
    for graph in all_graphs(model.graph):
        tensors = [
            *graph.initializer,
            *(item.t for node in graph.node for item in node.attribute if item.HasField("t")),
        ]
        for tensor in tensors:
            if tensor.data_location == external:
                found |= {entry.value for entry in tensor.external_data if entry.key == "location"}
    return sorted(found)


def write_lowered(source: Path, tensorrt: str, folder: Path) -> Path:
    """Write the form of an ONNX file that TensorRT `tensorrt` reads into `folder`, with its weights beside it.

    The weights become real files (ONNX Runtime and the ONNX checker refuse links), sharing blocks with the originals
    where the file system can. INT8 weights for TensorRT 8 become float32 in a further file.

    Args:
        source: the ONNX file; `folder` is made if it is missing, and must be another one than that of `source`.

    Returns:
        the written file, named as `source`.

    Raises:
        UsageError: see `graph_from_file` and `lowering.lowered_for`; or `folder` holds such files, or a weight file is
            missing or lies outside the model's folder.
        StorageError: not writable, or the disk is full.
    """
    model = graph_from_file(source)
    lowered = lowered_for(model, tensorrt)
    target, weights = folder / source.name, weight_files(model)
    new = sorted(set(weight_files(lowered)) - set(weights))
    for name in (source.name, *weights, *new):
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise UsageError(f"the weight file '{name}' lies outside the folder of the model.")
        if (folder / name).exists():
            raise UsageError(f"'{folder / name}' is there already.", hint="Name an empty folder with -o.")
    for name in weights:
        if not (source.parent / name).is_file():
            raise UsageError(f"the weight file '{source.parent / name}' is missing.", hint="Copy it beside the model.")
    written: list[Path] = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name in weights:
            written.append(folder / name)
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            _copy(source.parent / name, folder / name)
        written += [folder / name for name in new]
        write_float_weights(model, lowered, source.parent, folder)
        written.append(target)
        target.write_bytes(lowered.SerializeToString())
    except OSError as error:
        for path in written:
            path.unlink(missing_ok=True)
        raise StorageError(f"cannot write to '{folder}': {error.strerror}.", hint="Choose another -o.") from error
    return target


def _copy(source: Path, target: Path) -> None:
    """Copy a file, sharing its blocks where that is possible."""
    with source.open("rb") as old, target.open("wb") as new:
        if sys.platform.startswith("linux") and _shared(old.fileno(), new.fileno()):
            return
    shutil.copyfile(source, target)


def _shared(old: int, new: int) -> bool:
    import fcntl

    with contextlib.suppress(OSError):
        fcntl.ioctl(new, _FICLONE, old)
        return True
    return False
