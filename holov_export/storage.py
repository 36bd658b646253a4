"""Folders that appear whole or not at all: hashes, locks, atomic replacement, the refusals of the system in words.

A finished folder carries a marker file (a bundle its manifest, an engine its record). Writing goes into a hidden folder
beside the target, which is renamed at the end, so a killed writer leaves the old folder or none.
"""

from __future__ import annotations

import ctypes
import errno
import glob
import hashlib
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from holov_export.errors import BundleError, StorageError


@dataclass(frozen=True)
class FolderKind:
    """What a folder is: the file that every finished one holds, and words for messages.

    Attributes:
        marker: name of the file that makes a folder one of this kind.
        noun: what messages call it, "bundle".
    """

    marker: str
    noun: str

    @property
    def noun_with_article(self) -> str:
        return f"{'an' if self.noun[0] in 'aeiou' else 'a'} {self.noun}"


def sha256_of(path: Path) -> str:
    """Hex sha256 of a file, read in blocks of 4 MiB."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


@contextmanager
def atomic_folder(target: str | Path, kind: FolderKind, *, overwrite: bool = False) -> Iterator[Path]:
    """Give an empty folder to fill; when the block ends well, it becomes `target` by one rename.

    Args:
        target: where the finished folder will be; a symbolic link is followed and stays.
        kind: what the finished folder is.
        overwrite: replace one of its kind that is already there.

    Raises:
        BundleError: `target` exists and is of no such kind, or `overwrite` is False.
        StorageError: not writable, disk full, a mount point, or another process is writing to the same target.
    """
    target = _followed(target)
    check_target(target, kind, overwrite=overwrite)
    with _lock(target):
        with _storage_errors(target):
            _sweep(target, kind)
        check_target(target, kind, overwrite=overwrite)  # another process may have ended just before we took the lock
        with _storage_errors(target):
            work = Path(tempfile.mkdtemp(prefix=f".{target.name}.partial-", dir=target.parent))
            work.chmod(0o755)
        try:
            with _storage_errors(target):
                yield work
                _fsync_folder(work)
                _replace(work, target, kind)
        except BaseException:
            shutil.rmtree(work, ignore_errors=True)
            raise


def check_target(target: Path, kind: FolderKind, *, overwrite: bool) -> None:
    """Refuse early what `atomic_folder` would refuse.

    Raises:
        BundleError: `target` exists and is of no such kind, or `overwrite` is False.
        StorageError: it cannot be looked at, or is a mount point.
    """
    target = _followed(target)
    with _storage_errors(target):
        if not target.exists():
            return
        if os.path.ismount(target):
            raise StorageError(
                f"'{target}' is a mount point, and no finished folder can take its name.",
                hint=f"Name a folder inside it: --output {target / kind.noun}",
            )
        holds_something = not target.is_dir() or any(target.iterdir())
        is_finished = (target / kind.marker).is_file()
    if holds_something and not is_finished:
        raise BundleError(f"'{target}' exists and is not {kind.noun_with_article}.", hint="Choose another --output.")
    if holds_something and not overwrite:
        raise BundleError(f"'{target}' already holds {kind.noun_with_article}.", hint="Add --overwrite to replace it.")


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
        raise StorageError(f"another process is writing to '{target}'.", hint="Wait for it to end.")


def _sweep(target: Path, kind: FolderKind) -> None:
    """Tidy up after killed writers; the lock is ours, so nobody is writing there.

    One killed between the two renames of `_replace` has left the old folder beside an empty place: it goes back.
    """
    for state in ("replaced", "partial"):
        for stale in target.parent.glob(f".{glob.escape(target.name)}.{state}-*"):
            if stale.is_symlink() or not stale.is_dir():
                stale.unlink()
            elif state == "replaced" and not target.exists() and (stale / kind.marker).is_file():
                os.rename(stale, target)
            else:
                shutil.rmtree(stale, ignore_errors=True)


def _replace(work: Path, target: Path, kind: FolderKind) -> None:
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
            (old / kind.marker).unlink()  # first, so that no later sweep takes the rest for a finished folder
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
    """Whether a path is the target, something in it, a folder above it, or what a writer keeps beside it."""
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
