"""Version numbers as they are compared."""

from __future__ import annotations

import re

from holov_export.errors import UsageError


def version_from_text(text: str) -> tuple[int, ...]:
    """(10, 3, 0, 30) from "10.3.0.30" or "10.3.0.post12"; what follows the leading numbers is ignored.

    Raises:
        UsageError: no number at the start.
    """
    found = re.match(r"\d+(\.\d+)*", text)
    if found is None:
        raise UsageError(f"'{text}' is no version number.", hint="It looks like 10.3 or 8.6.2.")
    return tuple(int(part) for part in found[0].split("."))
