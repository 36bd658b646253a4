"""The inputs and outputs of a vision graph: names, element types, shapes. Said once, here.

Shape words: B images, N tokens before selection, K budget, D width of the language model, H W pixels.
"""

from __future__ import annotations

from dataclasses import dataclass

PIXEL_VALUES = "pixel_values"
BUDGET = "budget"
QUOTA = "quota"
VISUAL_TOKENS = "visual_tokens"
POSITIONS = "positions"
COUNTS = "counts"
SALIENCY = "saliency"

INPUTS = (PIXEL_VALUES, BUDGET, QUOTA)
OUTPUTS = (VISUAL_TOKENS, POSITIONS, COUNTS, SALIENCY)


@dataclass(frozen=True)
class TensorSpec:
    """One graph input or output: its name, element type and shape (a string is a dynamic axis)."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


def vision_signature(
    *, image_size: int, tokens: int, width: int, dtype: str
) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """(inputs, outputs) of a vision graph.

    Args:
        image_size: H and W in pixels.
        tokens: N, patch tokens of one image.
        width: D, width of the language model.
        dtype: element type of pixels and tokens: "float32", "float16" or "bfloat16".

    `budget` is a shape value ([1], the size K of the token axis, clamped to 1..N in the graph); `quota` is data
    ([B], tokens wanted for each image, clamped to 1..K). Rows of `visual_tokens` at and past an image's count are
    zero, `positions` are -1 there; N is the CLS token, which `visionzip` keeps. Whatever decides which tokens stay is
    float32 in every precision.
    """
    inputs = (
        TensorSpec(PIXEL_VALUES, dtype, ("batch", 3, image_size, image_size)),
        TensorSpec(BUDGET, "int64", (1,)),
        TensorSpec(QUOTA, "int64", ("batch",)),
    )
    outputs = (
        TensorSpec(VISUAL_TOKENS, dtype, ("batch", "budget", width)),
        TensorSpec(POSITIONS, "int64", ("batch", "budget")),
        TensorSpec(COUNTS, "int64", ("batch",)),
        TensorSpec(SALIENCY, "float32", ("batch", tokens)),
    )
    return inputs, outputs
