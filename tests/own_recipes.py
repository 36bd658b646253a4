"""A calibration recipe of the user's own, for a folder of four pictures."""

from __future__ import annotations

from pathlib import Path

#: limits that any quantisation keeps
LOOSE = "overlap = 0.0\ncosine = -1.0\nanswers = 0.0"
#: that none does
STRICT = "overlap = 1.0\ncosine = 1.0\nanswers = 1.0"


def write_recipe(folder: Path, limits: str = LOOSE) -> str:
    """Write it below `folder`; its path, as --recipe takes it."""
    folder.mkdir(exist_ok=True)
    path = folder / "own.toml"
    path.write_text(
        f'name = "own"\ntitle = "two and two"\nsource = "folder"\nalgorithm = "minmax"\nbudgets = ["1/9", "all"]\n'
        f"[folder]\ncount = 2\njudge = 2\n[limits]\n{limits}\n",
        encoding="utf-8",
    )
    return str(path)
