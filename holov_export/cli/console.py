"""Where the command line writes: results to stdout, everything else to stderr."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.table import Table

from holov_export.pipeline import Tell

#: progress and errors
ERR = Console(stderr=True, highlight=False)
#: results; in a file or a pipe, lines are as long as they need to be
OUT = Console(highlight=False, width=None if sys.stdout.isatty() else 200)


def print_json(value: Any) -> None:
    """One JSON document on stdout."""
    sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def say(message: str) -> None:
    """A line on stderr."""
    ERR.print(message, markup=False, soft_wrap=True)


def table(*columns: str, title: str = "") -> Table:
    """A plain table; a column whose name ends in '>' is right-aligned."""
    made = Table(title=title or None, box=None, pad_edge=False, title_justify="left", header_style="bold")
    for column in columns:
        made.add_column(column.rstrip(">"), justify="right" if column.endswith(">") else "left")
    return made


@contextmanager
def progress() -> Iterator[Tell]:
    """Show steps on stderr: a spinner and the time of each on a terminal, one line a step elsewhere."""
    start = step_start = time.perf_counter()
    current = ""

    def close() -> None:
        if current:
            ERR.print(f"  {current}  [dim]{time.perf_counter() - step_start:.1f} s[/dim]")

    with ERR.status("") as status:

        def tell(message: str) -> None:
            nonlocal current, step_start
            close()
            current, step_start = message, time.perf_counter()
            status.update(message)

        yield tell
        close()
    ERR.print(f"[dim]  {time.perf_counter() - start:.1f} s in all[/dim]")


def size_text(size: int) -> str:
    """Bytes for people: 4.7 MB."""
    value = float(size)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000 or unit == "GB":
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    raise AssertionError("unreachable")
