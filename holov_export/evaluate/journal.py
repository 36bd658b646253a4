"""What was answered so far: an append-only file of JSON lines that a killed process leaves in a good state.

    {"schema_version": 1, "data": "<sha256>", "manifest": "<sha256>", ...}        the header: what the answers belong to
    {"method": "holov", "budget": 64, "question": "17", "text": "two", ...}       one answer a line

A line is written and flushed when its answer is there. A process that is killed leaves at most one torn line at the
end, which the next one cuts off. The file is locked while it is open.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from pydantic import ValidationError

from holov_export.errors import IntegrityError, StorageError, UsageError
from holov_export.policies import Frozen

JOURNAL = "journal.jsonl"
SCHEMA = 1

#: (method, budget): a cell of the table
CellKey = tuple[str, int]


class JournalHeader(Frozen):
    """What the answers of a journal depend on, beside method, budget and question.

    Attributes:
        data: hash of the dataset (`Dataset.sha256`). manifest: sha256 of the bundle's manifest.json.
        decoder: "genai", "ort" or "hf". provider: of ONNX Runtime and of the decoder, as asked for.
        checkpoint: sha256 of its config.json, "" without one.
        suffix: what follows every question. max_new_tokens: longest answer.
    """

    schema_version: int = SCHEMA
    data: str
    manifest: str
    decoder: str
    provider: str
    checkpoint: str
    suffix: str
    max_new_tokens: int


class JournalEntry(Frozen):
    """One answer.

    Attributes:
        question: its id. image: the first 16 hex digits of the sha256 of the image file.
        text: the answer as it was generated. visual_tokens: rows of the image in the prompt.
    """

    method: str
    budget: int
    question: str
    image: str
    text: str
    visual_tokens: int


#: what a header's fields are called in messages
_WORDS = {
    "schema_version": "the schema",
    "data": "the data",
    "manifest": "the bundle",
    "decoder": "--decoder",
    "provider": "--provider",
    "checkpoint": "the checkpoint",
    "suffix": "--prompt-suffix",
    "max_new_tokens": "--max-new-tokens",
}


class Journal:
    """An open journal. Make it with `open_journal`."""

    def __init__(self, path: Path, stream: IO[bytes], entries: list[JournalEntry]) -> None:
        self.path = path
        self._stream = stream
        self._entries: dict[CellKey, dict[str, JournalEntry]] = {}
        for entry in entries:
            self._note(entry)

    def cell(self, method: str, budget: int) -> dict[str, JournalEntry]:
        """Answers by question id."""
        return self._entries.get((method, budget), {})

    def entries(self) -> Iterator[JournalEntry]:
        """All answers."""
        for of_cell in self._entries.values():
            yield from of_cell.values()

    def add(self, entry: JournalEntry) -> None:
        """Append an answer; it survives the end of this process from here on.

        Raises:
            StorageError: the disk is full or gone.
        """
        line = entry.model_dump_json().encode() + b"\n"
        try:
            _write(self._stream, line)
        except OSError as error:
            raise StorageError(f"cannot write '{self.path}': {error.strerror}.") from error
        self._note(entry)

    def _note(self, entry: JournalEntry) -> None:
        self._entries.setdefault((entry.method, entry.budget), {})[entry.question] = entry


@contextmanager
def open_journal(folder: Path, header: JournalHeader, *, overwrite: bool = False) -> Iterator[Journal]:
    """Open the journal of a folder, or begin one; locked until the block ends.

    Args:
        folder: is made if need be.
        header: what the answers belong to.
        overwrite: begin anew whatever is there.

    Raises:
        UsageError: the journal belongs to something else; the message names what differs.
        IntegrityError: a line before the last does not parse.
        StorageError: another process has it open, or it cannot be written.
    """
    path = folder / JOURNAL
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # no buffer: what could not be written would be tried again on closing, and that error would hide the first
        stream = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o644), "r+b", buffering=0)
    except OSError as error:
        raise StorageError(f"cannot write '{path}': {error.strerror}.", hint="Choose another --output.") from error
    with stream:
        _lock(stream, folder)
        # after the lock: another process may have written until now
        entries = [] if overwrite else _read(path, stream, header)
        if entries is None or overwrite:
            entries = []
            _begin(path, stream, header)
        yield Journal(path, stream, entries)
        os.fsync(stream.fileno())


def _lock(stream: IO[bytes], folder: Path) -> None:
    """The operating system lets go of it when a process is killed."""
    if sys.platform == "win32":
        return
    import fcntl

    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise StorageError(
            f"another process is evaluating into '{folder}'.", hint="Wait for it to end, or choose another --output."
        ) from None


def _write(stream: IO[bytes], line: bytes) -> None:
    """Write a line, in one call of the operating system if it takes it whole; a line may be torn at the end only."""
    while line:
        line = line[stream.write(line) :]


def _begin(path: Path, stream: IO[bytes], header: JournalHeader) -> None:
    try:
        stream.seek(0)
        stream.truncate()
        _write(stream, _header_line(header))
        os.fsync(stream.fileno())
    except OSError as error:
        raise StorageError(f"cannot write '{path}': {error.strerror}.") from error


def _header_line(header: JournalHeader) -> bytes:
    return header.model_dump_json().encode() + b"\n"


def _read(path: Path, stream: IO[bytes], header: JournalHeader) -> list[JournalEntry] | None:
    """The answers of a journal, whose torn end is cut off; None if not even the header is whole."""
    content = stream.read()
    lines = content.split(b"\n")
    whole, torn = lines[:-1], lines[-1]
    if not whole:
        if _header_line(header).startswith(torn):
            return None
        raise UsageError(
            f"'{path}' is no journal of an evaluation.", hint="Choose another --output, or add --overwrite."
        )
    _check_header(path, whole[0], header)
    entries = []
    end = len(whole[0]) + 1
    for number, line in enumerate(whole[1:], start=2):
        try:
            entries.append(JournalEntry.model_validate_json(line))
        except ValidationError as error:
            if number == len(whole) and not torn:
                break  # a crash of the machine can leave the place of the last line without its content
            raise IntegrityError(
                f"line {number} of '{path}' does not parse: {error.errors()[0]['msg']}.",
                hint="Remove the line, or begin anew with --overwrite.",
            ) from error
        end += len(line) + 1
    stream.seek(end)
    stream.truncate()
    return entries


def _check_header(path: Path, line: bytes, header: JournalHeader) -> None:
    try:
        found = JournalHeader.model_validate_json(line)
    except ValidationError:
        raise UsageError(
            f"'{path}' is no journal that this holov-export reads (schema {SCHEMA}).",
            hint="Choose another --output, or begin anew with --overwrite.",
        ) from None
    differ = [words for name, words in _WORDS.items() if getattr(found, name) != getattr(header, name)]
    if differ:
        raise UsageError(
            f"'{path}' holds answers to something else: {', '.join(differ)} differ{'s' * (len(differ) == 1)}.",
            hint="Choose another --output, or begin anew with --overwrite, which forgets those answers.",
        )
