"""What a calibration has seen so far, and the file that it is kept in, so that a killed one goes on.

The file is written after each picture, beside its place and then renamed. It carries a key of what was asked; a file of
another key, or one that does not read, is no file.
"""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from holov_export.errors import StorageError
from holov_export.quantize.histograms import BINS, Histogram

_HEAD, _LOW, _HIGH, _TOPS, _COUNTS = "head", "low", "high", "tops", "counts"


@dataclass
class Seen:
    """What an activation's values were.

    Attributes:
        low, high: float32 [width], of each channel (last axis).
        histogram: of all values; None where the algorithm needs none.
    """

    low: npt.NDArray[np.float32]
    high: npt.NDArray[np.float32]
    histogram: Histogram | None


@dataclass
class Progress:
    """Where a calibration is.

    Attributes:
        done: pictures that are in `seen`. seconds: wall time that they took.
        seen: name of an activation -> its values.
    """

    done: int
    seconds: float
    seen: dict[str, Seen]


def write_progress(path: Path, key: str, progress: Progress) -> None:
    """Replace the file in one step.

    Raises:
        StorageError: it cannot be written.
    """
    arrays: dict[str, npt.NDArray[np.generic]] = {}
    seen = progress.seen.values()
    head = {"key": key, "done": progress.done, "seconds": progress.seconds, "names": list(progress.seen)}
    arrays[_HEAD] = np.frombuffer(json.dumps(head).encode(), dtype=np.uint8)
    for index, item in enumerate(seen):
        arrays[f"{_LOW}{index}"], arrays[f"{_HIGH}{index}"] = item.low, item.high
    histograms = [item.histogram for item in seen if item.histogram is not None]
    if histograms:
        arrays[_TOPS] = np.array([item.top for item in histograms])
        arrays[_COUNTS] = np.stack([item.counts for item in histograms])
    beside = path.with_name(f"{path.name}.new")
    try:
        with beside.open("wb") as stream:
            np.savez(stream, **arrays)  # type: ignore[arg-type]
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(beside, path)
    except OSError as error:
        raise StorageError(
            f"cannot write '{path}': {error.strerror}.", hint="Make room, or copy the bundle to where there is some."
        ) from error


def read_progress(path: Path, key: str, tell: Callable[[str], None]) -> Progress:
    """What the file says, or the beginning; `tell` hears of a file that does not read."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            head = json.loads(arrays[_HEAD].tobytes())
            if head["key"] != key:
                return Progress(0, 0.0, {})
            return Progress(int(head["done"]), float(head["seconds"]), _seen(arrays, head["names"]))
    except FileNotFoundError:
        return Progress(0, 0.0, {})
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile, zipfile.LargeZipFile) as error:
        tell(f"what an earlier run has left in {path.name} is damaged ({error}); it begins anew")
        return Progress(0, 0.0, {})


def _seen(arrays: np.lib.npyio.NpzFile, names: Sequence[str]) -> dict[str, Seen]:
    """Every activation of the file.

    Raises:
        KeyError, ValueError: an array is missing or of another shape.
    """
    tops = arrays.get(_TOPS)
    counts = arrays.get(_COUNTS)
    if counts is not None and counts.shape != (len(names), BINS):
        raise ValueError(f"{counts.shape} bins")
    seen = {}
    for index, name in enumerate(names):
        histogram = None
        if tops is not None and counts is not None:
            histogram = Histogram(float(tops[index]), counts[index].astype(np.int64))
        seen[name] = Seen(arrays[f"{_LOW}{index}"], arrays[f"{_HIGH}{index}"], histogram)
    return seen
