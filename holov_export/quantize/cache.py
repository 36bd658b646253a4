"""Ranges that a bundle keeps: read them, or make them and put them where they will be found.

The folder appears whole or not at all (`storage.atomic_folder`), and what a killed calibration has seen lies beside it
under a hidden name until then.
"""

from __future__ import annotations

import json
import tempfile
import zipfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import numpy.typing as npt
from pydantic import ValidationError

from holov_export.bundle import CALIBRATION, Bundle, labelled_file
from holov_export.errors import BundleError, IntegrityError, StorageError
from holov_export.quantize.observe import Advance, Tell, check_can_observe, names_of, observe, silent, unheard
from holov_export.quantize.ranges import SCHEMA, ChannelRange, Ranges, RangesRecord
from holov_export.recipes import NamedPicture, Recipe, recipe_sha256
from holov_export.runtime.engine_choice import graph_hashes
from holov_export.spec import Quantization
from holov_export.storage import FolderKind, atomic_folder

RECORD, CHANNELS = "ranges.json", "channels.npz"
_KIND = FolderKind(marker=RECORD, noun="calibration")
_AGAIN = "Delete the folder, or calibrate again: holov-export calibrate --again"


def ranges_folder(view: Bundle, recipe_name: str) -> Path:
    """BUNDLE/calibration/smoke-8, or smoke-8-scope, smoke-8-scope-video for a further graph."""
    return view.folder / CALIBRATION / labelled_file(view.label, recipe_name)


def sweep_file(view: Bundle, recipe_name: str, quantization: Quantization) -> Path:
    """BUNDLE/calibration/smoke-8.int8-tensorrt.jsonl: what a sensitivity sweep has measured; see `SweepJournal`."""
    folder = ranges_folder(view, recipe_name)
    smooth = "" if quantization.smoothing is None else f"-smooth-{quantization.smoothing:g}"
    return folder.with_name(f"{folder.name}.{quantization.type.value}-{quantization.engine}{smooth}.jsonl")


def calibrated(
    view: Bundle,
    recipe: Recipe,
    pictures: Sequence[NamedPicture],
    *,
    again: bool = False,
    threads: int | None = None,
    tell: Tell = silent,
    advance: Advance = unheard,
) -> Ranges:
    """The ranges that the bundle keeps, or if they are of something else or not there, new ones, which it keeps then.

    A run that is killed goes on with the next picture when it is started again; `again` does not change that.

    Args:
        view: a bundle that stands for one of its graphs.
        again: make new ones in any case.
        threads: CPU threads; None for one per core.
        tell: hears why kept ranges are not used, and what `observe` says.
        advance: hears how many further pictures are done.

    Raises:
        UsageError, CheckFailedError, EnvironmentFaultError: see `observe`; nothing is kept then.
        IntegrityError: what the bundle keeps is damaged.
        StorageError: the bundle cannot be written to, or another process calibrates it at the moment.
    """
    check_can_observe(view, pictures)
    kept = None if again else ranges_in(view, recipe, pictures, tell=tell)
    if kept is not None:
        advance(len(pictures))
        return kept
    folder = ranges_folder(view, recipe.name)
    _check_place(folder)
    partial = folder.with_name(f".{folder.name}.seen.npz")
    try:
        ranges = observe(view, recipe, pictures, partial=partial, threads=threads, tell=tell, advance=advance)
        with atomic_folder(folder, _KIND, overwrite=True) as work:
            write_ranges(ranges, work)
    except BaseException:
        with suppress(OSError):
            folder.parent.rmdir()  # stays where there is something in it
        raise
    with suppress(OSError):
        partial.unlink()
    return ranges


def ranges_in(
    view: Bundle, recipe: Recipe, pictures: Sequence[NamedPicture] | None = None, *, tell: Tell = silent
) -> Ranges | None:
    """The ranges that the bundle keeps for this graph and recipe; None if there are none.

    Args:
        pictures: what they must have been collected on; None if any will do, which is right for a recipe that names
            its pictures.
        tell: hears why ranges that are there are of something else.

    Raises:
        IntegrityError: they do not read.
    """
    folder = ranges_folder(view, recipe.name)
    if not folder.exists():
        return None
    ranges = read_ranges(folder)
    changed = _difference(ranges.record, view, recipe, pictures)
    if changed:
        tell(f"the ranges in {CALIBRATION}/{folder.name} are of {changed}")
        return None
    return ranges


def _difference(
    record: RangesRecord, view: Bundle, recipe: Recipe, pictures: Sequence[NamedPicture] | None
) -> str | None:
    """What a record is of, in words, if not of these."""
    if (record.graph_sha256, record.weights_sha256) != graph_hashes(view):
        return "another graph or other weights"
    if record.recipe_sha256 != recipe_sha256(recipe):
        return f"another '{recipe.name}': the recipe has changed"
    if pictures is not None and record.pictures != names_of(pictures):
        return "other pictures"
    return None


def read_ranges(folder: Path) -> Ranges:
    """The ranges in a folder.

    Raises:
        IntegrityError: a file is missing or damaged, or they are of a newer holov-export.
    """
    try:
        text = (folder / RECORD).read_text(encoding="utf-8")
        version = json.loads(text)["schema_version"]
        if version != SCHEMA:
            raise BundleError(f"'{folder}' has schema {version}, this holov-export reads {SCHEMA}.", hint=_AGAIN)
        record = RangesRecord.model_validate_json(text)
        with np.load(folder / CHANNELS, allow_pickle=False) as arrays:
            channels = {
                name: ChannelRange(_array(arrays, f"low{index}"), _array(arrays, f"high{index}"))
                for index, name in enumerate(record.tensors)
            }
    except FileNotFoundError as error:
        raise IntegrityError(f"'{folder}' has no {Path(str(error.filename)).name}.", hint=_AGAIN) from error
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise IntegrityError(f"{RECORD} in '{folder}' does not parse: {place}: {first['msg']}.", hint=_AGAIN) from error
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise IntegrityError(f"the ranges in '{folder}' are damaged: {error}", hint=_AGAIN) from error
    return Ranges(record, channels)


def _array(arrays: np.lib.npyio.NpzFile, name: str) -> npt.NDArray[np.float32]:
    """A row of finite float32 numbers.

    Raises:
        KeyError, ValueError: it is missing, or something else.
    """
    found: npt.NDArray[np.float32] = arrays[name]
    if found.dtype != np.float32 or found.ndim != 1 or not np.isfinite(found).all():
        raise ValueError(f"{name} in {CHANNELS} is no row of float32 numbers")
    return found


def write_ranges(ranges: Ranges, folder: Path) -> None:
    """Write both files into an empty folder, the record last."""
    arrays = {}
    for index, name in enumerate(ranges.record.tensors):
        found = ranges.channels[name]
        arrays[f"low{index}"], arrays[f"high{index}"] = found.low, found.high
    np.savez(folder / CHANNELS, **arrays)  # type: ignore[arg-type]
    (folder / RECORD).write_text(ranges.record.model_dump_json(indent=2) + "\n", encoding="utf-8")


def _check_place(folder: Path) -> None:
    """Refuse before minutes of work what could not be kept.

    Raises:
        StorageError: the bundle cannot be written to.
        IntegrityError: something else has the folder's name.
    """
    if folder.exists() and not (folder / RECORD).is_file():
        raise IntegrityError(f"'{folder}' has no {RECORD}.", hint="Delete it: ranges are kept there.")
    try:
        folder.parent.mkdir(exist_ok=True)
        tempfile.TemporaryFile(dir=folder.parent).close()
    except OSError as error:
        raise StorageError(
            f"cannot write to '{folder.parent}': {error.strerror}.",
            hint="Ranges are kept in the bundle: copy it to where it can be written.",
        ) from error
