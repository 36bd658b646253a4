"""What a benchmark says about the machine it ran on, and how its result is written."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Any

from holov_export.verify.machine import this_machine, utc_now


def machine() -> dict[str, Any]:
    """CPU name, cores, memory, operating system, Python and library versions. No host name, no paths."""
    seen = this_machine()
    found = seen.model_dump(mode="json", exclude_none=True)
    return {**found, "libraries": {item.name: item.version for item in seen.libraries}}


def write_result(path: Path, result: dict[str, Any]) -> None:
    """Write a benchmark result with the machine, the command line and the UTC date in front."""
    head = {
        "date": utc_now(),
        "command": command(),
        "machine": machine(),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**head, **result}, indent=2) + "\n", encoding="utf-8")


def command() -> str:
    """The command line without absolute paths."""
    words = [Path(word).name if Path(word).is_absolute() else word for word in sys.argv[1:]]
    return shlex.join([f"scripts/{Path(sys.argv[0]).name}", *words])


def one_line() -> str:
    """The machine in one line, for the title of a table."""
    seen = machine()
    libraries = ", ".join(f"{name} {version}" for name, version in seen["libraries"].items())
    return f"{seen['cpu']}, {seen['cores']} cores, {seen['memory_gb']} GB, Python {seen['python']}, {libraries}"
