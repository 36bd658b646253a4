#!/usr/bin/env python3
"""Loads the pictures of a calibration recipe whose pictures are on the web.

    scripts/fetch_calibration coco-512 DIR        then: holov-export calibrate BUNDLE --recipe coco-512 --pictures DIR

Pictures that are there and whole are not loaded again, so a run that was interrupted goes on where it stopped. When all
are there, `DIR/sha256.txt` says what each of them is; calibrations compare with it, and so does a later run of this
script. A picture that differs from it is named and left alone: remove it to load it again. The recipe names the licence
of its pictures; read that first.

Ends with status 0 if all pictures are there, 1 if one differs from its sha256, 2 if the recipe has no addresses, 3 if
one could not be loaded.
"""

from __future__ import annotations

import argparse
import http.client
import os
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from holov_export.errors import HolovExportError, ImageError, IntegrityError, NetworkError, StorageError, UsageError
from holov_export.recipe_pictures import LOCK, lock_from_hashes, locked_hashes
from holov_export.recipes import PictureFile, Recipe, recipe_from_name
from holov_export.runtime.picture_reader import image_from
from holov_export.storage import sha256_of

#: seconds without a byte
TIMEOUT = 30
TRIES = 3
#: no photograph of a calibration is larger
MOST_BYTES = 64 << 20
#: connections at once: polite to a free server
WORKERS = 4
#: so many failures are no pictures that are gone but a network that is: the rest is not tried
GIVE_UP = 8


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", help="a name of calibration/ or a TOML file")
    parser.add_argument("folder", type=Path, help="where the pictures go; it is made if needed")
    parser.add_argument("--base-url", help="load them from here: a mirror; the names are appended")
    arguments = parser.parse_args()
    try:
        fetch(recipe_from_name(arguments.recipe), arguments.folder, arguments.base_url)
    except HolovExportError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("Interrupted; the same command goes on.", file=sys.stderr)
        return 130
    return 0


def fetch(recipe: Recipe, folder: Path, base_url: str | None) -> None:
    """Load what is missing, then write the lock.

    Raises:
        UsageError: the recipe names no address, or the lock is damaged.
        IntegrityError: pictures differ from their sha256.
        NetworkError, StorageError: pictures could not be loaded or written.
    """
    address = base_url or recipe.fetch
    if recipe.source != "files" or address is None:
        raise UsageError(f"the recipe '{recipe.name}' names no address that pictures could be loaded from.")
    if not address.startswith(("http://", "https://")):
        raise UsageError(f"'{address}' is no address of the web.")
    files = (*recipe.calibrate, *recipe.judge)
    known = locked_hashes(folder)
    print(f"{len(files)} pictures, licence: {recipe.licence or 'see the recipe'}", file=sys.stderr)
    hashes: dict[str, str] = {}
    problems: list[HolovExportError] = []
    pool = ThreadPoolExecutor(WORKERS)
    try:
        tasks = [pool.submit(_fetched, item, folder, address, known.get(item.file)) for item in files]
        for count, (item, task) in enumerate(zip(files, tasks, strict=True), start=1):
            try:
                hashes[item.file] = task.result()
            except HolovExportError as error:
                problems.append(error)
                if len(problems) == GIVE_UP:
                    break
            _tell(count, len(files))
    finally:
        pool.shutdown(cancel_futures=True)
    if problems:
        raise _one_of(problems)
    # names of other recipes in the same folder stay
    _write(folder / LOCK, lock_from_hashes(sorted({**known, **hashes}.items())).encode())
    print(f"{len(files)} pictures in {folder}, described by {LOCK}", file=sys.stderr)


def _fetched(item: PictureFile, folder: Path, address: str, locked: str | None) -> str:
    """The sha256 of a picture that is in the folder afterwards."""
    path = folder / item.file
    wanted = item.sha256 or locked
    if not path.is_file() or (wanted is None and not _is_whole(path)):
        data = _loaded(urllib.parse.urljoin(address.rstrip("/") + "/", urllib.parse.quote(item.file)))
        try:
            image_from(data)
        except ImageError as error:
            raise NetworkError(f"{item.file} did not arrive as a picture: {error.message}") from error
        _write(path, data)
    sha256 = sha256_of(path)
    if wanted not in (None, sha256):
        raise IntegrityError(
            f"'{path}' has sha256 {sha256[:12]}..., not {str(wanted)[:12]}...",
            hint="It was changed here or where it came from; remove it to load it again.",
        )
    return sha256


def _is_whole(path: Path) -> bool:
    try:
        image_from(path)
    except ImageError:
        return False
    return True


def _loaded(url: str) -> bytes:
    """What is at an address; faults of a moment are tried again."""
    problem: Exception | None = None
    for attempt in range(TRIES):
        time.sleep(attempt)
        try:
            return _loaded_once(url)
        except (OSError, http.client.HTTPException) as error:
            problem = error
            if isinstance(error, urllib.error.HTTPError) and error.code < 500:
                break
    raise NetworkError(f"{url} could not be loaded: {problem}.")


def _loaded_once(url: str) -> bytes:
    with urllib.request.urlopen(url, timeout=TIMEOUT) as answer:
        data: bytes = answer.read(MOST_BYTES + 1)
        if len(data) > MOST_BYTES:
            raise NetworkError(f"{url} is larger than {MOST_BYTES >> 20} MiB, so it is no picture of a calibration.")
        if answer.length:  # of what the server announced, this did not come
            raise http.client.IncompleteRead(data, answer.length)
    return data


def _write(path: Path, data: bytes) -> None:
    """Whole or not at all: under the final name there is never half a picture."""
    part = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(data)
        os.replace(part, path)
    except OSError as error:
        raise StorageError(f"cannot write '{path}': {error.strerror}.") from error


def _one_of(problems: list[HolovExportError]) -> HolovExportError:
    """All problems in one, of the class of the worst: what differs, then what is missing."""
    worst = next((item for item in problems if isinstance(item, IntegrityError)), problems[0])
    shown = "\n".join(map(str, problems))
    count = f"{len(problems)} pictures are missing or differ" + (
        ", and the rest was not tried" * (len(problems) == GIVE_UP)
    )
    hint = f"{count}. {LOCK} was not written; the same command goes on."
    return type(worst)(f"{shown}\n{hint}")


def _tell(count: int, total: int) -> None:
    if sys.stderr.isatty():
        print(f"\r{count}/{total}", end="\n" if count == total else "", file=sys.stderr, flush=True)
    elif count % 100 == 0 or count == total:
        print(f"{count}/{total}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
