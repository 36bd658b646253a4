"""The bundle: a folder with a manifest, the narrow waist between exporting, compiling and running.

    manifest.json  vision.onnx  vision.onnx.data  decoder/  tokenizer.json  reports/

Writing is atomic: everything goes into a hidden folder beside the target, which is renamed at the end, so a killed
export leaves the old bundle or none. Opening verifies sizes and sha256 hashes.
"""

from __future__ import annotations

import ctypes
import errno
import glob
import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import IO, Literal

from pydantic import Field, ValidationError

from holov_export.errors import BundleError, IntegrityError, StorageError
from holov_export.spec import ExportPlan, Frozen

SCHEMA = 1
MANIFEST = "manifest.json"
VISION = "vision.onnx"
TOKENIZER = "tokenizer.json"
DECODER = "decoder"
REPORTS = "reports"

ArtifactKind = Literal["vision", "weights", "decoder", "tokenizer", "report", "other"]


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
    """An opened bundle: its folder and its manifest."""

    folder: Path
    manifest: Manifest

    @property
    def vision(self) -> Path:
        return self.folder / VISION

    @property
    def decoder(self) -> Path | None:
        """The ONNX Runtime GenAI folder, None if the bundle was exported without a decoder."""
        return self.folder / DECODER if self.manifest.plan.decoder is not None else None

    @property
    def tokenizer(self) -> Path:
        return self.folder / TOKENIZER


def sha256_of(path: Path) -> str:
    """Hex sha256 of a file, read in blocks of 4 MiB."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


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
                f"the bundle has schema {version}, this holov-export reads up to {SCHEMA}.",
                hint="Upgrade: pip install -U holov-export",
            )
        return Manifest.model_validate_json(text)
    except (ValueError, KeyError, TypeError, ValidationError) as error:
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
    """Give an empty folder to fill; when the block ends well, it becomes `target` by one rename.

    Args:
        target: where the finished folder will be; a symbolic link is followed and stays.
        overwrite: replace a bundle that is already there.

    Raises:
        BundleError: `target` exists and is no bundle, or `overwrite` is False.
        StorageError: not writable, disk full, a mount point, or another export is writing to the same target.
    """
    target = _followed(target)
    check_target(target, overwrite=overwrite)
    with _lock(target):
        with _storage_errors(target):
            _sweep(target)
        check_target(target, overwrite=overwrite)  # another export may have ended just before we took the lock
        with _storage_errors(target):
            work = Path(tempfile.mkdtemp(prefix=f".{target.name}.partial-", dir=target.parent))
            work.chmod(0o755)
        try:
            with _storage_errors(target):
                yield work
                _fsync_folder(work)
                _replace(work, target)
        except BaseException:
            shutil.rmtree(work, ignore_errors=True)
            raise


def check_target(target: Path, *, overwrite: bool) -> None:
    """Refuse early what `atomic_folder` would refuse.

    Raises:
        BundleError: `target` exists and is no bundle, or `overwrite` is False.
        StorageError: it cannot be looked at, or is a mount point.
    """
    target = _followed(target)
    with _storage_errors(target):
        if not target.exists():
            return
        if os.path.ismount(target):
            raise StorageError(
                f"'{target}' is a mount point, and no finished folder can take its name.",
                hint=f"Name a folder inside it: --output {target / 'bundle'}",
            )
        holds_something = not target.is_dir() or any(target.iterdir())
        is_bundle = (target / MANIFEST).is_file()
    if holds_something and not is_bundle:
        raise BundleError(f"'{target}' exists and is not a bundle.", hint="Choose another --output.")
    if holds_something and not overwrite:
        raise BundleError(f"'{target}' already holds a bundle.", hint="Add --overwrite to replace it.")


def _followed(target: str | Path) -> Path:
    """The absolute place that `target` names. A rename would replace a symbolic link and not what it points to.

    Raises:
        StorageError: a link to itself, or into a folder that does not exist (a disk that is not mounted, perhaps).
    """
    place = Path(os.path.realpath(target))
    with _storage_errors(place):
        if place.is_symlink():
            raise StorageError(f"'{target}' is a symbolic link to itself.", hint="Choose another --output.")
        if Path(target).is_symlink() and not place.parent.is_dir():
            raise StorageError(
                f"'{target}' points to '{place}', and '{place.parent}' is not a folder.",
                hint="Mount or make it, or choose another --output.",
            )
    return place


@contextmanager
def _lock(target: Path) -> Iterator[None]:
    """Hold the lock file beside `target`. The operating system lets go of it when a process is killed.

    Parent folders that are made for it are removed again if the block fails and nothing is in them.

    Raises:
        StorageError: another process holds it, or it cannot be made.
    """
    with _storage_errors(target):
        made = [folder for folder in target.parents if not folder.exists()]
    try:
        with _storage_errors(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            lock = (target.parent / f".{target.name}.lock").open("a")
        with lock:
            _take_lock(lock, target)
            try:
                yield
            finally:
                Path(lock.name).unlink(missing_ok=True)
    except BaseException:
        with suppress(OSError):
            for folder in made:
                folder.rmdir()
        raise


def _take_lock(lock: IO[str], target: Path) -> None:
    if sys.platform == "win32":
        return
    import fcntl

    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # whoever held it may have removed the file between our open and our lock; then a third may hold a new one
        held = os.path.samestat(os.fstat(lock.fileno()), os.stat(lock.name))
    except OSError:
        held = False
    if not held:
        raise StorageError(f"another export is writing to '{target}'.", hint="Wait for it to end.")


def _sweep(target: Path) -> None:
    """Tidy up after killed exports; the lock is ours, so nobody is writing there.

    An export killed between the two renames of `_replace` has left the old bundle beside an empty place: it goes back.
    """
    for kind in ("replaced", "partial"):
        for stale in target.parent.glob(f".{glob.escape(target.name)}.{kind}-*"):
            if stale.is_symlink() or not stale.is_dir():
                stale.unlink()
            elif kind == "replaced" and not target.exists() and (stale / MANIFEST).is_file():
                os.rename(stale, target)
            else:
                shutil.rmtree(stale, ignore_errors=True)


def _replace(work: Path, target: Path) -> None:
    """Put `work` in the place of `target`; the old folder, if any, is removed once the new one is safe on the disk."""
    old: Path | None = None
    if not target.exists():
        os.rename(work, target)
    elif _exchange(work, target):
        old = work
    else:
        old = work.with_name(work.name.replace(".partial-", ".replaced-"))
        os.rename(target, old)
        try:
            os.rename(work, target)
        except BaseException:
            os.rename(old, target)
            raise
    _fsync_path(target.parent)
    if old is not None:
        with suppress(OSError):
            (old / MANIFEST).unlink()  # first, so that no later sweep takes the rest for a bundle
        shutil.rmtree(old, ignore_errors=True)


def _exchange(first: Path, second: Path) -> bool:
    """Swap two folders in one step (Linux renameat2 RENAME_EXCHANGE). False where that does not exist."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    at_cwd, exchange = -100, 2
    result: int = rename(at_cwd, os.fsencode(first), at_cwd, os.fsencode(second), exchange)
    return result == 0


def _fsync_folder(folder: Path) -> None:
    for path in folder.rglob("*"):
        _fsync_path(path)
    _fsync_path(folder)


def _fsync_path(path: Path) -> None:
    if sys.platform == "win32":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


_REASONS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "permission denied",
    errno.EPERM: "permission denied",
    errno.EFBIG: "a file is larger than the limit",
    errno.ENOTDIR: "a part of the path is not a folder",
    errno.EEXIST: "a part of the path is not a folder",
    errno.ENAMETOOLONG: "the name is too long",
    errno.EBUSY: "it is a mount point or in use",
    errno.EXDEV: "the folder that is there lies on another file system or in a lower layer and cannot be renamed",
    errno.EIO: "the disk reports an input/output error",
}
#: these say something about the file that they name, which may be one that is only read
_OF_THE_FILE = (errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST)


@contextmanager
def _storage_errors(target: Path) -> Iterator[None]:
    """Turn the operating system's refusals to write `target` into StorageError."""
    before = _identity(target)
    try:
        yield
    except OSError as error:
        names = [os.fsdecode(name) for name in (error.filename, error.filename2) if not isinstance(name, int | None)]
        foreign = [name for name in names if not _belongs_to(Path(os.path.abspath(name)), target)]
        if error.errno not in _REASONS or (foreign and error.errno in _OF_THE_FILE):
            raise
        unchanged = _identity(target) == before
        raise StorageError(
            f"cannot write '{foreign[0] if foreign else target}': {_REASONS[error.errno]}.",
            hint="Nothing was changed; choose another --output." if unchanged else f"Look at '{target.parent}'.",
        ) from error


def _belongs_to(path: Path, target: Path) -> bool:
    """Whether a path is the target, something in it, a folder above it, or what an export keeps beside it."""
    beside = path.parts[len(target.parts) - 1 : len(target.parts)]
    hidden = path.is_relative_to(target.parent) and any(part.startswith(f".{target.name}.") for part in beside)
    return path.is_relative_to(target) or target.is_relative_to(path) or hidden


def _identity(path: Path) -> tuple[int, int] | None:
    """What tells one folder from another that takes its name; None where there is none."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino
