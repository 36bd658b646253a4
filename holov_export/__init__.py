"""Export a vision-language model so that an image costs 64 tokens instead of 576.

In Python:

    from holov_export import Session
    answer = Session.open("demo-holov-fp32").ask("photo.jpg", "which digit is red?", budget=16)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

__version__ = "0.1.0"
__all__ = ["Session", "__version__"]

if TYPE_CHECKING:
    from holov_export.runtime.session import Session


def __getattr__(name: str) -> object:
    """Import `Session` when it is first asked for: `import holov_export` stays cheap."""
    if name == "Session":
        from holov_export.runtime.session import Session

        return Session
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
