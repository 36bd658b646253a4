"""The bundle: a folder with a manifest, the narrow waist between exporting, compiling and running.

    manifest.json  vision.onnx  vision.onnx.data  decoder/  tokenizer.json  newline.npy  reports/

A bundle can hold several vision graphs, one for each selection rule: `vision.onnx` and `vision-scope.onnx` name the
same weights. A model with a tower of its own for clips has further ones for that: `vision-video.onnx`.

Writing is atomic: everything goes into a hidden folder beside the target, which is renamed at the end, so a killed
export leaves the old bundle or none. Opening verifies sizes and sha256 hashes.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError

from holov_export import storage
from holov_export.errors import BundleError, IntegrityError, StorageError, UnknownNameError, UsageError
from holov_export.policies import Frozen
from holov_export.signature import TensorSpec
from holov_export.spec import ExportPlan, GraphPlan
from holov_export.storage import FolderKind, sha256_of

#: of manifest.json; 5 since vision graphs may be quantised
SCHEMA = 5
MANIFEST = "manifest.json"
VISION = "vision.onnx"
TOKENIZER = "tokenizer.json"
NEWLINE = "newline.npy"
DECODER = "decoder"
REPORTS = "reports"
ENGINES = "engines"
CALIBRATION = "calibration"

_KIND = FolderKind(marker=MANIFEST, noun="bundle")

ArtifactKind = Literal["vision", "weights", "decoder", "tokenizer", "newline", "report", "other"]


class Artifact(Frozen):
    """One file of the bundle: path relative to it (forward slashes), sha256 in hex, size in bytes."""

    path: str
    kind: ArtifactKind
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    bytes: int = Field(ge=0)


class Provenance(Frozen):
    """Who wrote the bundle: tool and library versions, UTC time."""

    tool: str
    created: str
    libraries: dict[str, str]


class GraphTensor(Frozen):
    """A graph input or output as the manifest records it."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


class Manifest(Frozen):
    """manifest.json."""

    schema_version: int
    plan: ExportPlan
    inputs: tuple[GraphTensor, ...]
    outputs: tuple[GraphTensor, ...]
    artifacts: tuple[Artifact, ...]
    provenance: Provenance


@dataclass(frozen=True)
class Bundle:
    """An opened bundle: its folder and its manifest.

    Attributes:
        manifest: of the folder; in a view (`of_method`, `of_part`) its plan is that of the one graph.
        graphs: all vision graphs of the folder, the default one first; made from the manifest.
        graph: file name of the vision graph that this object stands for.
    """

    folder: Path
    manifest: Manifest
    graphs: tuple[GraphPlan, ...] = ()
    graph: str = VISION

    def __post_init__(self) -> None:
        if not self.graphs:
            object.__setattr__(self, "graphs", self.manifest.plan.graphs)

    @property
    def methods(self) -> tuple[str, ...]:
        """Names of all vision graphs of the folder, the default one first."""
        return tuple(graph.name for graph in self.graphs)

    @property
    def method(self) -> str:
        """Name of the vision graph that this object stands for."""
        return self.manifest.plan.method

    @property
    def part(self) -> Literal["image", "video"]:
        """What the vision graph that this object stands for sees."""
        return self.manifest.plan.part

    @property
    def vision(self) -> Path:
        return self.folder / self.graph

    @property
    def weights(self) -> str:
        """File name of the weights that the vision graphs of this part share; a tiny graph has none outside of it."""
        return f"{graph_file('video') if self.part == 'video' else VISION}.data"

    @property
    def is_default(self) -> bool:
        """This object stands for the graph that runs when none is named."""
        return self.graph == VISION

    @property
    def label(self) -> str:
        """What tells this object's graph from the default one in names of files: "", "scope", "scope-video"."""
        return label_of(self.method if self.method != self.methods[0] else "", self.part)

    def of_method(self, name: str) -> Bundle:
        """The same bundle with another of its vision graphs; of a view as well.

        Raises:
            UnknownNameError: it holds no such graph; names those that it holds.
        """
        for graph in self.graphs:
            if graph.name == name:
                return self._view(self.manifest.plan.of_graph(graph))
        raise UnknownNameError(
            f"the bundle '{self.folder.name}' has no graph for '{name}'; it has {', '.join(self.methods)}.",
            hint=f"Export it with: --method {','.join(dict.fromkeys([*self.methods, name]))}",
        )

    def of_part(self, part: Literal["image", "video"]) -> Bundle:
        """The same bundle and rule with the graph that sees pictures, or the one that sees clips.

        Raises:
            UsageError: the model has no tower of its own for clips.
        """
        if part not in self.manifest.plan.parts:
            raise UsageError(f"'{self.manifest.plan.model.name}' has no vision graph for {part}s alone.")
        return self._view(self.manifest.plan.of_part(part))

    @property
    def views(self) -> tuple[Bundle, ...]:
        """The bundle once for each of its graphs, the default one first: those of pictures, then those of clips."""
        return tuple(
            self.of_method(method).of_part(part) for part in self.manifest.plan.parts for method in self.methods
        )

    @property
    def title(self) -> str:
        """What people call this object's graph: "holov", "holov, video"."""
        return self.method if len(self.manifest.plan.parts) == 1 else f"{self.method}, {self.part}"

    def _view(self, plan: ExportPlan) -> Bundle:
        inputs, outputs = (graph_tensors(side) for side in plan.signature)
        manifest = self.manifest.model_copy(update={"plan": plan, "inputs": inputs, "outputs": outputs})
        label = label_of(plan.method if plan.method != self.methods[0] else "", plan.part)
        return replace(self, manifest=manifest, graph=labelled_file(label, "vision", ".onnx"))

    @property
    def decoder(self) -> Path | None:
        """The ONNX Runtime GenAI folder, None if the bundle was exported without a decoder."""
        return self.folder / DECODER if self.manifest.plan.decoder is not None else None

    @property
    def tokenizer(self) -> Path:
        return self.folder / TOKENIZER

    @property
    def newline(self) -> Path | None:
        """The embedding that follows the rows of a picture, float32 [D]; None where rows have none."""
        return self.folder / NEWLINE if self.manifest.plan.keeps_newlines else None


def graph_tensors(specs: tuple[TensorSpec, ...]) -> tuple[GraphTensor, ...]:
    """Signature entries as the manifest stores them."""
    return tuple(GraphTensor(name=spec.name, dtype=spec.dtype, shape=spec.shape) for spec in specs)


def label_of(method: str, part: str) -> str:
    """What tells files of a graph apart: scope, video, scope-video; empty for pictures and the default rule."""
    return "-".join(word for word in (method, "video" if part == "video" else "") if word)


def labelled_file(label: str, stem: str, ending: str = "") -> str:
    """A file or folder of the graph with a label (`label_of`): "vision.onnx", "vision-scope-video.onnx"."""
    return graph_file(label, stem, ending) if label else f"{stem}{ending}"


def graph_file(name: str, stem: str = "vision", ending: str = ".onnx") -> str:
    """File name of a further graph: "vision-scope.onnx", "vision-holov-12-256-22.onnx"."""
    return f"{stem}-{re.sub('[^a-z0-9]+', '-', name)}{ending}"


# ---------------------------------------------------------------------------------------------------- reading


def read_manifest(folder: Path) -> Manifest:
    """Parse a bundle's manifest without looking at its other files.

    Raises:
        BundleError: not a bundle, a newer schema, or a manifest that does not parse.
    """
    path = folder / MANIFEST
    try:
        text = path.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        raise BundleError(
            f"'{folder}' is not a bundle: it has no {MANIFEST}.", hint="Write one with: holov-export --model MODEL"
        ) from None
    except UnicodeDecodeError as error:
        raise IntegrityError(f"{MANIFEST} is not text: the bundle is damaged.", hint="Export it again.") from error
    except OSError as error:
        raise StorageError(f"cannot read '{path}': {error.strerror}.") from error
    try:
        raw = json.loads(text)
        version = raw["schema_version"]
        if isinstance(version, int) and version > SCHEMA:
            raise BundleError(
                f"the bundle has schema {version}, this holov-export reads {SCHEMA}.",
                hint="Upgrade holov-export.",
            )
        if isinstance(version, int) and version < SCHEMA:
            raise BundleError(
                f"the bundle has schema {version}, written by an older holov-export; this one reads {SCHEMA}.",
                hint="Export it again.",
            )
        return Manifest.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        raise IntegrityError(
            f"{MANIFEST} does not parse: {'.'.join(map(str, first['loc']))}: {first['msg']}.",
            hint="Export the bundle again.",
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise IntegrityError(f"{MANIFEST} does not parse: {error}", hint="Export the bundle again.") from error


def open_bundle(folder: str | Path, *, verify: Literal["full", "size"] = "full") -> Bundle:
    """Open a bundle and verify its files.

    Args:
        folder: the bundle.
        verify: "full" compares sizes and sha256 of every file; "size" only sizes (for a bundle of many gigabytes
            that this process has verified before).

    Raises:
        BundleError: not a bundle, or of a newer schema.
        IntegrityError: a file is missing or differs from the manifest.
    """
    folder = Path(folder)
    bundle = Bundle(folder, read_manifest(folder))
    verify_artifacts(bundle, full=verify == "full")
    return bundle


def verify_artifacts(bundle: Bundle, *, full: bool = True) -> None:
    """Compare every file with the manifest.

    Raises:
        IntegrityError: names the first file that is missing, of another size, or of another hash.
    """
    root = bundle.folder.resolve()
    for item in bundle.manifest.artifacts:
        path = root / item.path
        if not path.resolve().is_relative_to(root):
            raise IntegrityError(f"the manifest names a file outside the bundle: {item.path}.")
        try:
            size = path.stat().st_size
        except OSError:
            raise IntegrityError(f"{item.path} is missing from the bundle.", hint="Export it again.") from None
        if size != item.bytes:
            raise IntegrityError(
                f"{item.path} has {size} bytes, the manifest says {item.bytes}.", hint="Export the bundle again."
            )
        if full and sha256_of(path) != item.sha256:
            raise IntegrityError(
                f"{item.path} differs from its sha256 in the manifest: it was changed after the export.",
                hint="Export the bundle again.",
            )


# ---------------------------------------------------------------------------------------------------- writing


def artifacts_in(folder: Path) -> tuple[Artifact, ...]:
    """Hash every file below `folder` except the manifest."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / MANIFEST)
    return tuple(
        Artifact(
            path=path.relative_to(folder).as_posix(),
            kind=_kind_of(path.relative_to(folder)),
            sha256=sha256_of(path),
            bytes=path.stat().st_size,
        )
        for path in files
    )


def _kind_of(path: Path) -> ArtifactKind:
    if path.parts[0] == DECODER:
        return "decoder"
    if path.parts[0] == REPORTS:
        return "report"
    if path.name == TOKENIZER:
        return "tokenizer"
    if path.name == NEWLINE:
        return "newline"
    if path.suffix == ".onnx":
        return "vision"
    return "weights" if path.name.endswith(".onnx.data") else "other"


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write manifest.json and flush it to disk."""
    with (folder / MANIFEST).open("w", encoding="utf-8") as stream:
        stream.write(manifest.model_dump_json(indent=2) + "\n")
        stream.flush()
        os.fsync(stream.fileno())


def provenance(tool_version: str, libraries: dict[str, str]) -> Provenance:
    """Provenance stamped with the present UTC time."""
    now = datetime.now(timezone.utc).replace(microsecond=0).isoformat()
    return Provenance(tool=f"holov-export {tool_version}", created=now, libraries=libraries)


@contextmanager
def atomic_folder(target: str | Path, *, overwrite: bool = False) -> Iterator[Path]:
    """`storage.atomic_folder` for a bundle."""
    with storage.atomic_folder(target, _KIND, overwrite=overwrite) as work:
        yield work


def check_target(target: Path, *, overwrite: bool) -> None:
    """`storage.check_target` for a bundle."""
    storage.check_target(target, _KIND, overwrite=overwrite)
