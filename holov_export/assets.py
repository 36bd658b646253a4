"""Find the data that ships with the package: demo model and scenes, engine targets, calibration recipes.

In a wheel `engines/` and `calibration/` lie in `holov_export/data/`; in a checkout they lie at its top level.
"""

from __future__ import annotations

from pathlib import Path

from holov_export.errors import EnvironmentFaultError

_PACKAGE = Path(__file__).resolve().parent


def data_folder(name: str) -> Path:
    """The folder `name` ("demo-model", "demo-scenes", "engines", "calibration").

    Raises:
        EnvironmentFaultError: the installation is incomplete.
    """
    for candidate in (_PACKAGE / "data" / name, _PACKAGE.parent / name):
        if candidate.is_dir():
            return candidate
    raise EnvironmentFaultError(
        f"the folder '{name}' is missing from this installation of holov-export.",
        hint="Install it again: pip install --force-reinstall --no-deps holov-export",
    )
