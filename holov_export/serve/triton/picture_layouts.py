"""Where a picture's tokens come from, as a text: what a vision model has to tell the one that stitches."""

from __future__ import annotations

import numpy as np
from pydantic import TypeAdapter, ValidationError

from holov_export.errors import UsageError
from holov_export.policies import Frozen
from holov_export.tensors import ImageLayout, Region


class LayoutText(Frozen):
    """What stitching reads of an `ImageLayout`."""

    tokens: int
    regions: tuple[Region, ...]


_LAYOUT = TypeAdapter(LayoutText)
_NOTHING = np.zeros(0, dtype=np.int64)


def text_from_layout(layout: ImageLayout | None) -> str:
    """JSON; "" where all pictures have the same square grid."""
    if layout is None:
        return ""
    return LayoutText(tokens=layout.tokens, regions=layout.regions).model_dump_json()


def layout_from_text(text: str) -> ImageLayout | None:
    """The layout again, without what only the tower reads.

    Raises:
        UsageError: it is none.
    """
    if not text:
        return None
    try:
        found = _LAYOUT.validate_json(text)
    except ValidationError as error:
        raise UsageError(f"a layout does not parse: {error.errors()[0]['msg']}.") from error
    source = np.arange(found.tokens, dtype=np.int64)
    places = np.zeros((0, 2), dtype=np.int64)
    return ImageLayout("image", found.tokens, found.tokens, source, found.regions, places, _NOTHING)
