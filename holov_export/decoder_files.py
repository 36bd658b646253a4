"""A decoder made from a checkpoint for another runtime: a folder `decoders/<name>/` in a bundle, with a record.

    decoder.json     this record        language.gguf | engine/ | ...     what the runtime loads

The bundle's own manifest does not name them, as it names no engines: a bundle stays what was exported (ADR 0007).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError

from holov_export import storage
from holov_export.errors import BundleError, IntegrityError
from holov_export.policies import Frozen
from holov_export.storage import FolderKind, sha256_of

SCHEMA = 1
DECODERS = "decoders"
RECORD = "decoder.json"

_KIND = FolderKind(marker=RECORD, noun="decoder")

DecoderKind = Literal["llamacpp", "trtllm"]


class DecoderFile(Frozen):
    """One file of the folder: path relative to it (forward slashes), sha256 in hex, size in bytes."""

    path: str
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    bytes: int = Field(ge=0)


class DecoderSizes(Frozen):
    """The longest of everything that a decoder was built for.

    Attributes:
        batch: requests at once. images: of one request. budget: visual tokens of one image.
        multimodal: rows of the prompt table, all requests together: batch x images x budget.
        input: tokens of one prompt, its visual ones among them. sequence: of a prompt and its answer.
    """

    batch: int = Field(ge=1)
    images: int = Field(ge=1)
    budget: int = Field(ge=1)
    multimodal: int = Field(ge=1)
    input: int = Field(ge=1)
    sequence: int = Field(ge=1)


class DecoderRecord(Frozen):
    """decoder.json.

    Attributes:
        kind: the decoder that loads it.
        model: name of the bundle's model. width, vocab_size: of the language model, compared when it is opened.
        weights: how its weights are stored, in the runtime's own words: "f16", "Q4_K_M", "float16", "int4_awq".
        main: what the runtime is given: a file or folder below this one.
        sizes: what it was built for, where that is fixed at build time.
        commands: that made it, as they were run, each a list of words.
        tool: the program that made it and its version.
        created: UTC.
    """

    schema_version: int = SCHEMA
    kind: DecoderKind
    model: str
    width: int = Field(ge=1)
    vocab_size: int = Field(ge=1)
    weights: str
    main: str
    sizes: DecoderSizes | None = None
    commands: tuple[tuple[str, ...], ...] = ()
    files: tuple[DecoderFile, ...]
    tool: str
    created: str


@dataclass(frozen=True)
class DecoderFolder:
    """A decoder's folder and its record."""

    folder: Path
    record: DecoderRecord

    @property
    def main(self) -> Path:
        """What the runtime is given."""
        return self.folder / self.record.main


def decoder_folder(bundle: Path, kind: DecoderKind) -> Path:
    """Where a bundle's decoder of this kind lies."""
    return bundle / DECODERS / kind


def read_decoder(folder: Path, kind: DecoderKind) -> DecoderFolder:
    """Parse a decoder's record without looking at its files.

    Raises:
        BundleError: none there, one of another kind or of another schema.
        IntegrityError: the record does not parse.
    """
    hint = f"Make one with: holov-export compile BUNDLE --decoder {kind} --checkpoint DIR"
    try:
        text = (folder / RECORD).read_text(encoding="utf-8")
        version = json.loads(text)["schema_version"]
    except OSError:
        raise BundleError(f"'{folder}' holds no {kind} decoder.", hint=hint) from None
    except (ValueError, KeyError, TypeError) as error:
        raise IntegrityError(f"'{folder / RECORD}' does not parse: {error}", hint=hint) from error
    if version != SCHEMA:
        raise BundleError(f"'{folder}' has schema {version}, this holov-export reads {SCHEMA}.", hint=hint)
    try:
        record = DecoderRecord.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise IntegrityError(f"'{folder / RECORD}' does not parse: {place}: {first['msg']}.", hint=hint) from error
    if record.kind != kind:
        raise BundleError(f"'{folder}' holds a decoder for {record.kind}, not for {kind}.", hint=hint)
    return DecoderFolder(folder, record)


def verify_decoder(decoder: DecoderFolder, *, full: bool = True) -> None:
    """Compare every file with the record: sizes, and with `full` sha256.

    Raises:
        IntegrityError: names the first file that is missing, outside of the folder, of another size or hash.
    """
    root = decoder.folder.resolve()
    again = "Make it again: holov-export compile."
    for item in decoder.record.files:
        path = root / item.path
        if not path.resolve().is_relative_to(root):
            raise IntegrityError(f"{RECORD} names a file outside the decoder's folder: {item.path}.")
        if not path.is_file() or path.stat().st_size != item.bytes:
            raise IntegrityError(f"{item.path} of the {decoder.record.kind} decoder is missing or cut off.", hint=again)
        if full and sha256_of(path) != item.sha256:
            raise IntegrityError(f"{item.path} of the {decoder.record.kind} decoder was changed.", hint=again)


def files_in(folder: Path) -> tuple[DecoderFile, ...]:
    """Hash every file below `folder` except the record."""
    found = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / RECORD)
    return tuple(
        DecoderFile(path=path.relative_to(folder).as_posix(), sha256=sha256_of(path), bytes=path.stat().st_size)
        for path in found
    )


@contextmanager
def atomic_decoder_folder(folder: Path) -> Iterator[Path]:
    """`storage.atomic_folder` for a decoder; one that is already there is replaced when the new one is whole."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with storage.atomic_folder(folder, _KIND, overwrite=True) as work:
        yield work


def write_record(folder: Path, record: DecoderRecord) -> None:
    """Write decoder.json."""
    (folder / RECORD).write_text(record.model_dump_json(indent=2) + "\n", encoding="utf-8")


def decoders_in(bundle: Path) -> list[DecoderFolder]:
    """The decoders beside a bundle's manifest, by name."""
    kinds: Sequence[DecoderKind] = ("llamacpp", "trtllm")
    return [
        read_decoder(decoder_folder(bundle, kind), kind)
        for kind in kinds
        if (decoder_folder(bundle, kind) / RECORD).is_file()
    ]
