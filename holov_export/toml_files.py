"""TOML files that people write become checked values, or an error that names the file, the key and its line."""

from __future__ import annotations

import difflib
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from holov_export.errors import StorageError, UnknownNameError, UsageError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Value = TypeVar("Value", bound=BaseModel)

#: what pydantic would say of a program's arguments, said of a file
_WORDS = {"missing": "missing", "extra_forbidden": "unknown key"}


@dataclass(frozen=True)
class FileKind:
    """What a folder of TOML files holds, and words for messages.

    Attributes:
        noun: "target", "recipe".
        readme: the document that explains every field.
        own: how a file of one's own might be called, "./board.toml".
        lister: the command that lists those that ship; "" where a message names them itself.
    """

    noun: str
    readme: str
    own: str
    lister: str = ""


def names_in(folder: Path) -> tuple[str, ...]:
    """Names of a folder's TOML files without their endings, sorted."""
    return tuple(sorted(path.stem for path in folder.glob("*.toml")))


def path_from_name(name_or_path: str, folder: Path, kind: FileKind) -> Path:
    """The file of a name of `folder`, or the path itself if it ends in .toml; that file need not be there.

    Raises:
        UnknownNameError: no such name.
    """
    if name_or_path.endswith(".toml"):
        return Path(os.path.expanduser(name_or_path))  # Path's own raises for ~nobody
    names = names_in(folder)
    if name_or_path in names:
        return folder / f"{name_or_path}.toml"
    begun = [name for name in names if name_or_path and name.startswith(name_or_path)]
    close = dict.fromkeys([*begun, *difflib.get_close_matches(name_or_path, names, n=3, cutoff=0.5)])
    meant = f"Did you mean: {', '.join(list(close)[:3])}? " if close else ""
    listed = kind.lister or f"There are {', '.join(names)}"
    raise UnknownNameError(
        f"unknown {kind.noun} '{name_or_path}'.",
        hint=f"{meant}{listed}; a file of your own is named by its path: {kind.own}",
    )


def value_from_file(path: Path, model: type[Value], kind: FileKind) -> Value:
    """Read one TOML file.

    Raises:
        UnknownNameError: there is no such file.
        UsageError: it does not parse or a value in it is wrong; the message names file, key and line.
        StorageError: it cannot be read.
    """
    text = _text_of(path, kind)
    try:
        raw = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise UsageError(f"'{path}' is not TOML: {error}.", hint=f"{kind.readme} shows a {kind.noun} file.") from error
    try:
        return model.model_validate(raw)
    except ValidationError as error:
        raise UsageError(
            f"'{path}' is no usable {kind.noun}: {'; '.join(_problem(item, text) for item in _causes(error))}.",
            hint=f"{kind.readme} explains every field.",
        ) from error


def _text_of(path: Path, kind: FileKind) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")  # some editors put a byte order mark in front
    except (FileNotFoundError, NotADirectoryError):
        raise UnknownNameError(
            f"there is no {kind.noun} file '{path}'.",
            hint=f"{kind.lister}." if kind.lister else f"{kind.readme} shows how to write one.",
        ) from None
    except IsADirectoryError:
        raise UsageError(f"'{path}' is a folder, not a {kind.noun} file.") from None
    except UnicodeDecodeError as error:
        raise UsageError(f"'{path}' is not UTF-8 text: {error.reason}.", hint="Save it as UTF-8.") from error
    except OSError as error:
        raise StorageError(f"cannot read '{path}': {error.strerror}.") from error


def _causes(error: ValidationError) -> list[Any]:
    """Pydantic's errors without those of a list that is too short only because its entries were refused."""
    found: list[Any] = error.errors()
    inner = [item["loc"] for item in found]
    return [
        item
        for item in found
        if item["type"] != "too_short"
        or not any(len(loc) > len(item["loc"]) and loc[: len(item["loc"])] == item["loc"] for loc in inner)
    ]


def _problem(item: Any, text: str) -> str:
    """One error of pydantic in words: "rates.fp16 (line 14): Input should be greater than 0"."""
    location = list(item["loc"])
    said = _WORDS.get(item["type"]) or str(item["msg"]).removeprefix("Value error, ")
    if not location:
        return said
    line = _line_of(text, location)
    shown = ".".join(str(part + 1) if isinstance(part, int) else part for part in location)
    return f"{shown}{f' (line {line})' if line else ''}: {said}"


def _line_of(text: str, location: list[str | int]) -> int | None:
    """1-based line of a key, or of the innermost table on the way to it; None if not even that is written."""
    names = [part for part in location if isinstance(part, str)]
    entry = next((part for part in location if isinstance(part, int)), 0)
    table: list[str] = []
    entries: dict[str, int] = {}
    best: tuple[int, int | None] = (0, None)
    for number, line in enumerate(text.splitlines(), start=1):
        if header := re.match(r"\s*\[\[?\s*([\w.-]+)\s*\]", line):
            table = path = header[1].split(".")
            entries[table[0]] = entries.get(table[0], -1) + (line.lstrip().startswith("[[") or len(table) == 1)
        elif key := re.match(r"\s*([\w-]+(?:\.[\w-]+)*)\s*=", line):
            path = table + key[1].split(".")
        else:
            continue
        in_entry = not table or entries[table[0]] == entry
        if in_entry and path == names[: len(path)] and len(path) > best[0]:
            best = (len(path), number)
    return best[1]
