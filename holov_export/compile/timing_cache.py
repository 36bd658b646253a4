"""What earlier builds measured of kernels, so that a rebuild takes seconds: one file for each target, TensorRT and GPU.

A cache is a convenience: one that is broken, foreign or cannot be written is mentioned and never stops a build.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

Tell = Callable[[str], None]


def cache_path(target: str, tensorrt: str, sm: int) -> Path:
    """$XDG_CACHE_HOME/holov-export/timing/h200-trt10.3.0-sm90.cache"""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "holov-export" / "timing" / f"{target}-trt{tensorrt}-sm{sm}.cache"


def attach_cache(config: Any, path: Path, tell: Tell) -> None:
    """Give the builder the cache at `path`, or an empty one to fill."""
    try:
        known = path.read_bytes()
    except FileNotFoundError:
        known = b""
    except OSError as error:
        tell(f"the timing cache '{path}' cannot be read ({error.strerror}); a new one is measured")
        known = b""
    if known and _attached(config, known):
        return
    if known:
        tell(f"the timing cache '{path}' is damaged or of another TensorRT or GPU; a new one is measured")
    _attached(config, b"")


def _attached(config: Any, known: bytes) -> bool:
    """Whether TensorRT takes these bytes for a cache of this machine."""
    try:
        cache = config.create_timing_cache(known)
        return cache is not None and bool(config.set_timing_cache(cache, False))
    except (RuntimeError, TypeError, ValueError):
        return False


def save_cache(config: Any, path: Path, tell: Tell) -> None:
    """Write what the builder knows now, in one step: a killed process leaves the old file."""
    cache = config.get_timing_cache()
    if cache is None:
        return
    work = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as stream:
            work = Path(stream.name)
            stream.write(cache.serialize())
        os.replace(work, path)
    except OSError as error:
        tell(f"the timing cache '{path}' cannot be written ({error.strerror}); the engine is not affected")
        if work is not None:
            work.unlink(missing_ok=True)
