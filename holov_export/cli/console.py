"""Where the command line writes: results to stdout, everything else to stderr.

Neither console reads markup: folders and pictures may be called `b[/v2]`. What has a style is a `Text`.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO

from rich.console import Console
from rich.table import Table
from rich.text import Text

from holov_export.pipeline import Tell


def let_go(stream: TextIO) -> None:
    """Send what is still written to a stream nowhere, its buffer included: whoever read it has gone."""
    with suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


class _Results(Console):
    """Nobody reads the results: the command ends (rich would end the process with 1)."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


class _Progress(Console):
    """Nobody reads the progress: an export of an hour goes on."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        let_go(sys.stderr)


#: wider than any line: in a file or a pipe, lines are as long as they need to be
_UNLIMITED = 1_000_000

#: progress and errors
ERR = _Progress(stderr=True, highlight=False, markup=False, emoji=False)
#: results
OUT = _Results(highlight=False, markup=False, emoji=False, width=None if sys.stdout.isatty() else _UNLIMITED)


def print_json(value: Any) -> None:
    """One JSON document on stdout."""
    sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def say(message: str) -> None:
    """A line on stderr."""
    ERR.print(message, soft_wrap=True)


def table(*columns: str, title: str = "") -> Table:
    """A plain table; a column whose name ends in '>' is right-aligned. What is too long is broken, never cut."""
    made = Table(title=title or None, box=None, pad_edge=False, title_justify="left", header_style="bold")
    for column in columns:
        made.add_column(column.rstrip(">"), justify="right" if column.endswith(">") else "left", overflow="fold")
    return made


@contextmanager
def progress() -> Iterator[Tell]:
    """Show steps on stderr: a spinner and the time of each on a terminal, one line a step elsewhere."""
    start = step_start = time.perf_counter()
    current = ""

    def close() -> None:
        if current:
            ERR.print(Text.assemble(f"  {current}  ", (f"{time.perf_counter() - step_start:.1f} s", "dim")))

    with ERR.status("") as status:

        def tell(message: str) -> None:
            nonlocal current, step_start
            close()
            current, step_start = message, time.perf_counter()
            status.update(Text(message))

        yield tell
        close()
    ERR.print(Text(f"  {time.perf_counter() - start:.1f} s in all", "dim"))


def size_text(size: int) -> str:
    """Bytes for people: 4.7 MB."""
    value = float(size)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000 or unit == "GB":
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    raise AssertionError("unreachable")
