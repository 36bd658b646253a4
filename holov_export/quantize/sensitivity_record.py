"""What a sensitivity sweep found, and what it has measured so far.

    {"key": "<sha256>"}                                        the journal's first line: what the measurements belong to
    {"kept": ["layers.3.mlp"], "saliency_error": 0.01, ...}    one mixture of precisions a line

A line is written and flushed when a mixture was measured. A killed sweep leaves at most one torn line at the end.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import IO, Literal

from pydantic import ValidationError

from holov_export.bundle import Bundle
from holov_export.errors import StorageError
from holov_export.policies import Frozen
from holov_export.quantize.ranges import Ranges
from holov_export.recipes import Limits
from holov_export.runtime.engine_choice import graph_hashes
from holov_export.spec import Quantization
from holov_export.verify.vision_loss import PictureLoss, Size

#: of a Sensitivity
SCHEMA: Literal[1] = 1


class Measured(Frozen):
    """One mixture of precisions.

    Attributes:
        kept: groups that stayed in float, in the order of the graph; all others were quantised.
        saliency_error: relative L2 distance to the float graph's saliency, mean over pictures; None where any number is
            not finite.
        losses: of each picture at each budget.
    """

    kept: tuple[str, ...]
    saliency_error: float | None
    losses: tuple[PictureLoss, ...]


class GroupDamage(Frozen):
    """What one group does when it alone is quantised.

    Attributes:
        name: a pattern for `--keep`. linears: the products that are switched.
        share: of the multiplications of all products with weights.
        damage: in limits: 1 is about what the limits allow altogether. See `sensitivity.damage_of`.
        saliency_error: see `Measured`. overlap: the smallest share of kept positions in common that is judged (see
            `precision_report`); None where every budget keeps all. cosine: the smallest of a row that both kept.
    """

    name: str
    linears: tuple[str, ...]
    share: float
    damage: float
    saliency_error: float | None
    overlap: float | None
    cosine: float | None


class CurvePoint(Frozen):
    """Everything quantised but some groups.

    Attributes:
        kept: names of groups, the most harmful first.
        share: of the multiplications of all products with weights that are left in float, those that decide included.
        met: within the limits. saliency_error, overlap, cosine: see `GroupDamage`.
    """

    kept: tuple[str, ...]
    share: float
    met: bool
    saliency_error: float | None
    overlap: float | None
    cosine: float | None


class Sensitivity(Frozen):
    """Which groups must stay in float, by measurement.

    Attributes:
        method, part: of the graph. precision: of what is not quantised. quantization: what was measured.
        pictures: names and sha256. Those of the calibration: the gate judges by others.
        budgets: as asked for: numbers of tokens, or shares such as "1/9". limits: that were to be met.
        groups: the most harmful first.
        curve: in the order of how many groups are kept. Every point was measured; none is a sum.
        keep: for `Quantization.keep`: the smallest measured set that meets the limits, or the best one if none does;
            what the quantisation kept from the start included.
        met: whether the limits are met with it.
        runs: of the graph, those of an earlier, killed sweep included. seconds: wall time of this one.
    """

    schema_version: Literal[1] = SCHEMA
    method: str
    part: Literal["image", "video"]
    precision: str
    quantization: Quantization
    pictures: tuple[tuple[str, str], ...]
    budgets: tuple[int | str, ...]
    limits: Limits
    groups: tuple[GroupDamage, ...]
    curve: tuple[CurvePoint, ...]
    keep: tuple[str, ...]
    met: bool
    runs: int
    seconds: float


def sweep_key(
    view: Bundle,
    quantization: Quantization,
    ranges: Ranges | None,
    pictures: tuple[tuple[str, str], ...],
    sizes: tuple[Size, ...],
    groups: tuple[str, ...],
) -> str:
    """Hex sha256 of everything that a measurement depends on."""
    record = None if ranges is None else ranges.record.model_dump(mode="json", exclude={"created", "seconds"})
    parts = [
        graph_hashes(view),
        quantization.model_dump(mode="json"),
        record,
        pictures,
        [str(size) for size in sizes],
        groups,
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


class SweepJournal:
    """What was measured, by the groups that were kept; in a file if there is one."""

    def __init__(self, path: Path | None, key: str) -> None:
        """Read what is there, or begin anew where it belongs to something else or does not parse.

        Raises:
            StorageError: the file cannot be read or written.
        """
        self._path = path
        self._found: dict[tuple[str, ...], Measured] = {}
        if path is None:
            return
        header = json.dumps({"key": key}).encode()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            lines = path.read_bytes().split(b"\n") if path.is_file() else []
            if lines and lines[0] == header:
                self._found = {item.kept: item for item in _parsed(lines[1:-1])}
            whole = [item.model_dump_json().encode() for item in self._found.values()]
            work = path.with_name(f"{path.name}.new")
            work.write_bytes(b"".join(line + b"\n" for line in (header, *whole)))
            os.replace(work, path)
        except OSError as error:
            raise _refused(path, error) from error

    def __len__(self) -> int:
        return len(self._found)

    def find(self, kept: tuple[str, ...]) -> Measured | None:
        """What was measured with these groups in float."""
        return self._found.get(kept)

    def add(self, measured: Measured) -> None:
        """Note a measurement; it survives the end of this process from here on.

        Raises:
            StorageError: the disk is full or gone.
        """
        self._found[measured.kept] = measured
        if self._path is None:
            return
        try:
            with self._path.open("ab") as stream:
                _write(stream, measured.model_dump_json().encode() + b"\n")
        except OSError as error:
            raise _refused(self._path, error) from error


def _write(stream: IO[bytes], line: bytes) -> None:
    stream.write(line)
    stream.flush()
    os.fsync(stream.fileno())


def _parsed(lines: list[bytes]) -> list[Measured]:
    """Up to the first line that does not parse: what follows is measured again."""
    found = []
    for line in lines:
        try:
            found.append(Measured.model_validate_json(line))
        except ValidationError:
            break
    return found


def _refused(path: Path, error: OSError) -> StorageError:
    return StorageError(f"cannot write '{path}': {error.strerror}.", hint="Make room, or make the folder writable.")
