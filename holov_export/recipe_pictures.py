"""The pictures of a recipe, found and checked before anything runs: in installed packages or in the user's folder."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from holov_export.errors import ImageError, IntegrityError, MissingExtraError, StorageError, UsageError
from holov_export.recipe_fields import FolderPictures, PackageFacts, PictureFile
from holov_export.runtime.picture_reader import image_from, readable_formats
from holov_export.storage import sha256_of

#: in a folder of fetched pictures: what each of them is, in the format of the command sha256sum
LOCK = "sha256.txt"
_LOCK_LINE = re.compile(r"([0-9a-f]{64}) [ *](.+)")
#: names that a message shows before "and N more"
_SHOWN = 4


@dataclass(frozen=True)
class NamedPicture:
    """A picture that was found: its name for people and records, the sha256 of its file, and where that is."""

    name: str
    sha256: str
    path: Path

    def image(self) -> Image.Image:
        """The picture as the runtime would see it: RGB, upright.

        Raises:
            IntegrityError: the file is no longer the one that was found.
            ImageError: it cannot be decoded.
            StorageError: it cannot be read.
        """
        if _hash_of(self.path) != self.sha256:
            raise IntegrityError(f"'{self.name}' was changed while it was in use.", hint="Start again.")
        return image_from(self.path)


@dataclass(frozen=True)
class RecipePictures:
    """Pictures that ranges are collected on, and others to judge by; no two have the same content."""

    calibrate: tuple[NamedPicture, ...]
    judge: tuple[NamedPicture, ...]


# ------------------------------------------------------------------------------------------- named pictures


def pictures_in_packages(
    files: Sequence[PictureFile], facts: Sequence[PackageFacts], recipe: str
) -> tuple[NamedPicture, ...]:
    """Files of installed packages, which are located and not imported.

    Raises:
        MissingExtraError: a package is not installed, or lacks a file.
        IntegrityError: a file differs from its sha256.
        StorageError: a file cannot be read.
    """
    known = {item.module: item for item in facts}
    folders = {module: _folders_of(module) for module in dict.fromkeys(item.package or "" for item in files)}
    absent = [known.get(module, PackageFacts(module=module)) for module, found in folders.items() if not found]
    if absent:
        raise MissingExtraError(
            f"the recipe '{recipe}' takes pictures from Python packages that are not installed: "
            f"{', '.join(item.module for item in absent)}.",
            hint=f"Run: pip install {' '.join(item.requirement for item in absent)}",
        )
    paths = {item: _in_folders(folders[item.package or ""], item.file) for item in files}
    wanted = _versions_hint([known[item.package] for item in files if item.package in known])
    gone = [item.name for item, path in paths.items() if path is None]
    if gone:
        raise MissingExtraError(
            f"the recipe '{recipe}' lacks {_some(gone)}: the installed packages do not ship {_it(gone)}.", hint=wanted
        )
    hint = wanted or "The recipe was made with another version of the package."
    return _checked_hashes([(item.name, item.sha256, path) for item, path in paths.items() if path], recipe, hint)


def pictures_of_files(files: Sequence[PictureFile], folder: Path, recipe: str) -> tuple[NamedPicture, ...]:
    """Named files of the user's folder; what the recipe has no sha256 of must be in the folder's `LOCK`.

    Raises:
        ImageError: a file is missing.
        UsageError: there is no folder; or neither recipe nor lock says what a file is.
        IntegrityError: a file differs from its sha256.
        StorageError: something cannot be read.
    """
    _check_folder(folder)
    fetch = f"In a checkout: scripts/fetch_calibration {recipe} {folder}"
    gone = [item.file for item in files if not (folder / item.file).is_file()]
    if gone:
        raise ImageError(f"'{folder}' lacks {_some(gone)}, of {len(files)} in the recipe '{recipe}'.", hint=fetch)
    hashes = locked_hashes(folder)
    wanted = [(item.name, item.sha256 or hashes.get(item.file), folder / item.file) for item in files]
    unknown = [name for name, sha256, _ in wanted if sha256 is None]
    if unknown:
        said = "does not name" if hashes else "is missing, which would say the sha256 of"
        raise UsageError(f"'{folder / LOCK}' {said} {_some(unknown)}.", hint=fetch)
    return _checked_hashes(wanted, recipe, f"Restore the file, or remove it and fetch it again. {fetch}")


def locked_hashes(folder: Path) -> dict[str, str]:
    """Name of a file -> its sha256, as the `LOCK` of a folder says; empty if there is none.

    Raises:
        UsageError: a line of it is not understood, or it says two things of one file.
        StorageError: it cannot be read.
    """
    path = folder / LOCK
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return {}
    except UnicodeDecodeError as error:
        raise UsageError(f"'{path}' is not UTF-8 text: {error.reason}.") from error
    except OSError as error:
        raise StorageError(f"cannot read '{path}': {error.strerror}.") from error
    hashes: dict[str, str] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        found = _LOCK_LINE.fullmatch(line)
        if found is None or hashes.setdefault(found[2], found[1]) != found[1]:
            what = "is no sha256 and name" if found is None else f"contradicts an earlier one about {found[2]}"
            raise UsageError(f"'{path}', line {number}, {what}.", hint="It is written as sha256sum writes it.")
    return hashes


def lock_from_hashes(hashes: Iterable[tuple[str, str]]) -> str:
    """The text of a `LOCK` from (name, sha256)."""
    return "".join(f"{sha256}  {name}\n" for name, sha256 in hashes)


def _folders_of(module: str) -> tuple[Path, ...]:
    """Where a package's files are; empty if it is not installed or is no package."""
    try:
        spec = importlib.util.find_spec(module)
    except (ModuleNotFoundError, ValueError):  # a finder that says no in this way; a module without a spec
        return ()
    return tuple(map(Path, (spec and spec.submodule_search_locations) or ()))


def _in_folders(folders: Sequence[Path], file: str) -> Path | None:
    return next((folder / file for folder in folders if (folder / file).is_file()), None)


def _versions_hint(facts: Iterable[PackageFacts]) -> str:
    said = dict.fromkeys(f"{item.requirement} {item.versions}" for item in facts if item.versions)
    return f"The recipe holds for {', '.join(said)}." if said else ""


def _checked_hashes(wanted: Sequence[tuple[str, str | None, Path]], recipe: str, hint: str) -> tuple[NamedPicture, ...]:
    found = tuple(NamedPicture(name, _hash_of(path), path) for name, _, path in wanted)
    pairs = zip(found, wanted, strict=True)
    changed = [
        f"{picture.name} has sha256 {picture.sha256[:12]}..., the recipe means {str(sha256)[:12]}..."
        for picture, (_, sha256, _) in pairs
        if picture.sha256 != sha256
    ]
    if changed:
        raise IntegrityError(
            f"{_some(changed, '; ')}: not {'the picture' if len(changed) == 1 else 'the pictures'} of '{recipe}'.",
            hint=hint,
        )
    return found


def _hash_of(path: Path) -> str:
    try:
        return sha256_of(path)
    except OSError as error:
        raise StorageError(f"cannot read '{path}': {error.strerror}.") from error


# ------------------------------------------------------------------------------------------- the user's pictures


def pictures_in_folder(folder: Path, wanted: FolderPictures, seed: int, recipe: str) -> RecipePictures:
    """Some pictures of a folder and of those in it, chosen by the seed and their names.

    What is hidden (a name that begins with a dot) is not looked at, and neither are files that are not called like
    pictures. Of files with the same content one counts.

    Raises:
        UsageError: there is no folder, or it has too few pictures.
        StorageError: something cannot be read.
    """
    _check_folder(folder)
    needed = wanted.count + wanted.judge
    names = _picture_names(folder)
    # ranked by a hash and not shuffled: a picture that is added moves few others
    names.sort(key=lambda name: hashlib.sha256(f"{seed}:{name}".encode("utf-8", "surrogateescape")).digest())
    chosen: dict[str, NamedPicture] = {}
    for name in names:
        if len(chosen) == needed:
            break
        sha256 = _hash_of(folder / name)
        chosen.setdefault(sha256, NamedPicture(name, sha256, folder / name))
    if len(chosen) < needed:
        copies = f" ({len(names) - len(chosen)} more are copies)" if len(names) > len(chosen) else ""
        raise UsageError(
            f"'{folder}' has {len(chosen) or 'no'} picture{'' if len(chosen) == 1 else 's'}{copies}, and the recipe "
            f"'{recipe}' needs {needed}: {wanted.count} for the ranges and {wanted.judge} others to judge by.",
            hint="Add pictures, or write a recipe that needs fewer ([folder] in calibration/README.md).",
        )
    pictures = tuple(chosen.values())
    return RecipePictures(pictures[: wanted.count], pictures[wanted.count :])


def _check_folder(folder: Path) -> None:
    if not folder.exists():
        raise UsageError(f"there is no folder '{folder}'.")
    if not folder.is_dir():
        raise UsageError(f"'{folder}' is a file, not a folder of pictures.")


def _picture_names(folder: Path) -> list[str]:
    """Paths of what is called like a picture, relative to the folder, forward slashes, sorted."""
    formats = readable_formats()
    endings = {ending for ending, kind in Image.registered_extensions().items() if kind in formats}
    names = []
    try:
        for inner, folders, files in os.walk(folder, onerror=_raise):
            folders[:] = [name for name in folders if not name.startswith(".")]
            names += [
                (Path(inner) / name).relative_to(folder).as_posix()
                for name in files
                if not name.startswith(".") and os.path.splitext(name)[1].lower() in endings
            ]
    except OSError as error:
        raise StorageError(f"cannot read '{error.filename}': {error.strerror}.") from error
    return sorted(names)


def _raise(error: OSError) -> None:
    raise error


# ------------------------------------------------------------------------------------------- what ranges need


def check_pictures(pictures: RecipePictures, recipe: str) -> None:
    """Decode every picture once, and refuse what would make ranges or a judgement worthless.

    Raises:
        ImageError: a picture cannot be decoded, has a single colour, or is there twice.
        IntegrityError, StorageError: see `NamedPicture.image`.
    """
    seen: dict[str, str] = {}
    for picture in (*pictures.calibrate, *pictures.judge):
        if (other := seen.setdefault(picture.sha256, picture.name)) != picture.name:
            raise ImageError(
                f"'{other}' and '{picture.name}' of the recipe '{recipe}' are the same picture.",
                hint="Ranges come from different pictures, and others judge them.",
            )
    for picture in (*pictures.calibrate, *pictures.judge):
        try:
            extrema = picture.image().getextrema()
        except ImageError as error:
            raise ImageError(f"the recipe '{recipe}' cannot use a picture: {error.message}", hint=error.hint) from error
        if all(low == high for low, high in extrema):  # type: ignore[misc] # RGB has three pairs
            raise ImageError(
                f"'{picture.name}' is a single colour, and ranges from it are worthless.",
                hint="Use photographs like those that the model will see.",
            )


def _some(names: Sequence[str], between: str = ", ") -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return between.join(names[:_SHOWN]) + more


def _it(names: Sequence[str]) -> str:
    return "it" if len(names) == 1 else "them"
