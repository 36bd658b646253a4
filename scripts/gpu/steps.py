"""Steps of a run on a machine that is lent by the minute: one that fails is noted, and the file is whole after each."""

from __future__ import annotations

import json
import os
import shlex
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from holov_export.verify.machine import this_machine, utc_now

T = TypeVar("T")


class Steps:
    """Results of a run. `found` is what the steps fill; `write` flushes it with the machine and the command."""

    def __init__(self, path: Path, minutes: float) -> None:
        self.path, self._minutes, self._start = path, minutes, time.monotonic()
        self._log: list[dict[str, Any]] = []
        self.found: dict[str, Any] = {}
        self._head = {"date": utc_now(), "command": command(), "minutes": minutes}
        self._head["machine"] = this_machine().model_dump(mode="json", exclude_none=True)

    @property
    def seconds_left(self) -> float:
        return self._minutes * 60 - (time.monotonic() - self._start)

    def run(self, name: str, action: Callable[[], T], *, needs: float = 0.0) -> T | None:
        """Do something, note how it ended, write the file. It is left out if fewer than `needs` seconds remain.

        Ctrl-C ends the run, after the file is written. Returns what `action` returns, None if it did not get there.
        """
        began, left = time.monotonic(), self.seconds_left
        entry: dict[str, Any] = {"step": name, "outcome": "done"}
        print(f"[{self._minutes * 60 - left:6.1f} s] {name}", file=sys.stderr, flush=True)
        try:
            if left >= needs:
                return action()
            entry |= {"outcome": "skipped", "reason": f"{left:.0f} s were left and it takes about {needs:.0f}"}
        except Exception as error:  # whatever a step raises must not lose the others
            entry |= {"outcome": "failed", "reason": f"{type(error).__name__}: {error}"}
            entry["where"] = [frame.name for frame in traceback.extract_tb(error.__traceback__)][-4:]
        except BaseException as error:
            entry |= {"outcome": "interrupted", "reason": type(error).__name__}
            raise
        finally:
            entry["seconds"] = round(time.monotonic() - began, 2)
            self._log.append(entry)
            self.write()
            if entry["outcome"] != "done":
                print(f"           {entry['outcome']}: {entry['reason']}", file=sys.stderr, flush=True)
        return None

    @property
    def failed(self) -> list[dict[str, Any]]:
        return [entry for entry in self._log if entry["outcome"] != "done"]

    def write(self) -> None:
        """Replace the file as a whole, so that a killed run leaves the last complete one."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        beside = self.path.with_name(self.path.name + ".part")
        beside.write_text(
            json.dumps({**self._head, **self.found, "steps": self._log}, indent=1) + "\n", encoding="utf-8"
        )
        os.replace(beside, self.path)


def command() -> str:
    """The command line without absolute paths."""
    words = [Path(word).name if Path(word).is_absolute() else word for word in sys.argv[1:]]
    return shlex.join([f"scripts/gpu/{Path(sys.argv[0]).stem}", *words])


def names(text: str) -> tuple[str, ...]:
    """("a", "b") of "a,b", for argparse."""
    return tuple(part.strip() for part in text.split(","))


def numbers(text: str) -> tuple[int, ...]:
    """(1, 4, 16) of "1,4,16", for argparse."""
    return tuple(int(part) for part in text.split(","))
