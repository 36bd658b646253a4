"""A compiled engine: a folder `engines/<target>/` in a bundle, with a record of what it was built from and with what.

    engine.json     this record        vision.engine   TensorRT's plan        layers.json   TensorRT's layer report

The bundle's own manifest does not name engines: a bundle stays what was exported, and each board adds its folder.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from pydantic import Field, ValidationError

from holov_export import storage
from holov_export.errors import BundleError, EngineError, IntegrityError
from holov_export.gpu import Gpu
from holov_export.policies import Frozen
from holov_export.spec import Precision, QuantizedType
from holov_export.storage import FolderKind, sha256_of
from holov_export.versions import version_from_text

#: of engine.json; 2 since profiles may have further axes, 3 since graphs may be quantised. Records of schemas 1 and 2
#: are those of graphs that have none, and that are not
SCHEMA = 3
_READABLE = (1, 2, SCHEMA)
RECORD = "engine.json"
ENGINE = "vision.engine"
LAYERS = "layers.json"

NetworkWords = Literal[
    "strongly-typed", "fp16-flag", "fp16-flag, pins preferred", "int8-flag", "int8-flag, pins preferred", "fp32"
]

_KIND = FolderKind(marker=RECORD, noun="engine")


class AxisSize(NamedTuple):
    """How long an axis is in one run."""

    name: str
    size: int


class AxisSizes(NamedTuple):
    """How long all dynamic axes are in one run.

    Attributes:
        batch: B, rows of the graph's batch. budget: K.
        further: of packed graphs, in the order of the graph's inputs; see `signature`.
    """

    batch: int
    budget: int
    further: tuple[AxisSize, ...] = ()

    @property
    def all(self) -> tuple[AxisSize, ...]:
        """Every axis by its name in the signature."""
        return (AxisSize("batch", self.batch), AxisSize("budget", self.budget), *self.further)

    def of(self, axis: str) -> int:
        """The length of an axis by its name in the signature; there must be such an axis."""
        return next(size for name, size in self.all if name == axis)


class AxisSpan(Frozen):
    """Smallest, usual and largest length of a dynamic axis, which the signature has by this name."""

    name: str
    span: tuple[int, int, int]


class ShapeProfile(Frozen):
    """One optimisation profile: smallest, usual and largest length of every dynamic axis. min <= opt <= max.

    Attributes:
        batch: rows of the graph's batch: pictures; of packed graphs also clips, or frames of them.
        budget: tokens of a row.
        axes: further ones of packed graphs, in the order of the graph's inputs.
    """

    batch: tuple[int, int, int]
    budget: tuple[int, int, int]
    axes: tuple[AxisSpan, ...] = ()

    @property
    def corners(self) -> tuple[AxisSizes, AxisSizes, AxisSizes]:
        """All axes at their smallest, usual and largest."""
        smallest, usual, largest = (
            AxisSizes(self.batch[at], self.budget[at], tuple(AxisSize(axis.name, axis.span[at]) for axis in self.axes))
            for at in range(3)
        )
        return smallest, usual, largest

    def holds(self, sizes: AxisSizes) -> bool:
        """Whether the engine runs these sizes in this profile."""
        smallest, _, largest = self.corners
        return all(smallest.of(name) <= size <= largest.of(name) for name, size in sizes.all)


class BuiltWith(Frozen):
    """What built an engine. A plan runs on this GPU architecture with this TensorRT, unless made compatible.

    Attributes:
        tensorrt: full version. cuda: the driver's. gpu: the driver's name of it. sm: compute capability.
        network: how precision was given: by the graph's types and Q/DQ nodes, or by the builder's flags FP16, or INT8
            and FP16 (TensorRT 8).
        system: operating system and processor, "Linux aarch64": a plan belongs to its platform.
    """

    tensorrt: str
    cuda: str
    gpu: str
    sm: int
    system: str
    network: NetworkWords
    version_compatible: bool = False
    hardware_compatibility: Literal["none", "ampere_plus", "same_compute_capability"] = "none"
    weight_streaming: bool = False
    stripped: bool = False
    refittable: bool = False


class EngineRecord(Frozen):
    """engine.json.

    Attributes:
        target: name of the target that it was compiled for.
        precision: of what is not quantised. quantized: of the factors of quantised products, None if there are none.
        graph_sha256: of the bundle's graph: vision.onnx, or a further one. weights_sha256: of its vision.onnx.data.
        opset: of the graph as TensorRT got it.
        sha256, bytes: of vision.engine.
        build_seconds: wall time of the build.
        created: UTC.
    """

    schema_version: int
    target: str
    precision: Precision
    quantized: QuantizedType | None = None
    opset: int
    profiles: tuple[ShapeProfile, ...] = Field(min_length=1)
    graph_sha256: str
    weights_sha256: str
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    bytes: int = Field(ge=1)
    built_with: BuiltWith
    build_seconds: float
    created: str

    @property
    def precision_name(self) -> str:
        """What people call it: "fp16", "int8", "fp16-int8"."""
        return precision_words(self.precision, self.quantized)


def precision_words(precision: Precision, quantized: QuantizedType | None) -> str:
    """What people call the precision of an engine, as `ExportPlan.precision_name` does of a graph."""
    if quantized is None:
        return precision.value
    return quantized.value if precision is Precision.FP32 else f"{precision.value}-{quantized.value}"


@dataclass(frozen=True)
class Engine:
    """An engine folder and its record."""

    folder: Path
    record: EngineRecord

    @property
    def plan(self) -> Path:
        return self.folder / ENGINE


def read_engine(folder: Path) -> Engine:
    """Parse an engine's record without looking at the plan.

    Raises:
        BundleError: no engine there, or one of another schema.
        IntegrityError: the record does not parse.
    """
    try:
        text = (folder / RECORD).read_text(encoding="utf-8")
        version = json.loads(text)["schema_version"]
    except OSError:
        raise BundleError(f"'{folder}' holds no engine.", hint="Build one with: holov-export compile BUNDLE") from None
    except (ValueError, KeyError, TypeError) as error:
        raise IntegrityError(
            f"'{folder / RECORD}' does not parse: {error}", hint="Compile the engine again, or delete its folder."
        ) from error
    if version not in _READABLE:
        raise BundleError(
            f"the engine's record has schema {version}, this holov-export reads {SCHEMA}.",
            hint="Compile the engine again.",
        )
    try:
        return Engine(folder, EngineRecord.model_validate_json(text))
    except ValidationError as error:
        first = error.errors()[0]
        raise IntegrityError(
            f"'{folder / RECORD}' does not parse: {'.'.join(map(str, first['loc']))}: {first['msg']}.",
            hint="Compile the engine again, or delete its folder.",
        ) from error


def engines_in(folder: Path) -> list[Engine]:
    """The engines whose records lie in `folder`/<target>/, by name.

    Folders without a record are no engines, nor are hidden ones: a killed build may have left one (see `storage`).
    """
    if not folder.is_dir():
        return []
    found = (path for path in sorted(folder.iterdir()) if not path.name.startswith("."))
    return [read_engine(path) for path in found if (path / RECORD).is_file()]


def check_engine(
    engine: Engine, gpu: Gpu, tensorrt: str, *, graph_sha256: str, weights_sha256: str, full: bool = True
) -> None:
    """Refuse an engine that must not reach TensorRT: another GPU, TensorRT or graph, or a changed file.

    Args:
        full: compare the plan's sha256, not its size alone.

    Raises:
        EngineError: built for another GPU or by another TensorRT, or from another graph or other weights.
        IntegrityError: the plan is missing, of another size or of another hash.
    """
    check_machine(engine.record, gpu, tensorrt)
    check_graph(engine.record, graph_sha256=graph_sha256, weights_sha256=weights_sha256)
    check_plan(engine, full=full)


def check_graph(record: EngineRecord, *, graph_sha256: str, weights_sha256: str) -> None:
    """Refuse an engine that was built from another graph or other weights.

    Raises:
        EngineError: it was.
    """
    if (record.graph_sha256, record.weights_sha256) != (graph_sha256, weights_sha256):
        raise EngineError(
            f"the engine '{record.target}' was built from another graph than this bundle's.",
            hint="Compile the bundle again.",
        )


def check_machine(record: EngineRecord, gpu: Gpu, tensorrt: str) -> None:
    """Refuse an engine that was built for another GPU or by another TensorRT, from its record alone.

    Raises:
        EngineError: says which.
    """
    built = record.built_with
    again = f"Compile it here: holov-export compile BUNDLE --target {record.target}"
    if built.system != system_name():
        raise EngineError(
            f"the engine '{record.target}' was built on {built.system}, this is {system_name()}.", hint=again
        )
    if not _same_architecture(built, gpu):
        raise EngineError(
            f"the engine '{record.target}' was built on {built.gpu} (sm_{built.sm}), this GPU is {gpu.name} "
            f"(sm_{gpu.sm}).",
            hint=again,
        )
    if not _same_tensorrt(built, tensorrt):
        raise EngineError(
            f"the engine '{record.target}' was built by TensorRT {built.tensorrt}, this machine has {tensorrt}.",
            hint=again,
        )


def system_name() -> str:
    """This operating system and processor, "Linux x86_64"."""
    return f"{platform.system()} {platform.machine()}"


def _same_architecture(built: BuiltWith, gpu: Gpu) -> bool:
    """Source: TensorRT developer guide, "Hardware Compatibility": not for integrated GPUs (JetPack)."""
    if built.hardware_compatibility == "ampere_plus" and not gpu.integrated:
        return gpu.sm >= 80
    return built.sm == gpu.sm


def _same_tensorrt(built: BuiltWith, tensorrt: str) -> bool:
    """Plans need the version that built them; version-compatible ones that or a newer one, up to the next major.

    Source: TensorRT developer guide, "Version Compatibility": supported pairs are 8 -> 10 and 10 -> 11.
    """
    if not built.version_compatible:
        return built.tensorrt == tensorrt
    ours, theirs = version_from_text(tensorrt), version_from_text(built.tensorrt)
    return ours >= theirs and (ours[0] == theirs[0] or (theirs[0], ours[0]) in {(8, 9), (8, 10), (9, 10), (10, 11)})


def check_plan(engine: Engine, *, full: bool = True) -> None:
    """Compare vision.engine with the record: its size, and with `full` its sha256.

    Raises:
        IntegrityError: it is missing, of another size or of another hash.
    """
    try:
        size = engine.plan.stat().st_size
    except OSError:
        raise IntegrityError(f"{ENGINE} is missing from '{engine.folder}'.", hint="Compile it again.") from None
    if size != engine.record.bytes:
        raise IntegrityError(
            f"{ENGINE} of '{engine.record.target}' has {size} bytes, its record says {engine.record.bytes}.",
            hint="Compile the engine again.",
        )
    if full and sha256_of(engine.plan) != engine.record.sha256:
        raise IntegrityError(
            f"{ENGINE} of '{engine.record.target}' differs from its sha256: it was changed after the build.",
            hint="Compile the engine again.",
        )


@contextmanager
def atomic_engine_folder(folder: Path) -> Iterator[Path]:
    """`storage.atomic_folder` for an engine; one that is already there is replaced when the new one is whole."""
    with storage.atomic_folder(folder, _KIND, overwrite=True) as work:
        yield work


def write_record(folder: Path, record: EngineRecord) -> None:
    """Write engine.json."""
    (folder / RECORD).write_text(record.model_dump_json(indent=2) + "\n", encoding="utf-8")
