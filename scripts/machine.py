"""What a benchmark says about the machine it ran on, and how its result is written."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shlex
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

LIBRARIES = ("torch", "transformers", "onnx", "onnxscript", "onnxruntime", "onnxruntime-genai", "numpy", "safetensors")


def machine() -> dict[str, Any]:
    """CPU name, cores, memory, operating system, Python and library versions. No host name, no paths."""
    return {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "libraries": _versions(),
    }


def write_result(path: Path, result: dict[str, Any]) -> None:
    """Write a benchmark result with the machine, the command line and the UTC date in front."""
    head = {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
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


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _versions() -> dict[str, str]:
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
