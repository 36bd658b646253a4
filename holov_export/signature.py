"""The inputs and outputs of a vision graph: names, element types, shapes. Said once, here.

A graph is *packed* where pictures have unequal numbers of tokens: the tower sees the views of all pictures one after
another, and `source` says where each token of each picture comes from.

Shape words: B images, N tokens before selection, K budget, D width of the language model, H W pixels, V views,
P patches, R rows that the tower makes of all views.
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

#: of packed graphs: the row of the tower, and the crop, of each token; -1 where a picture has no more tokens
SOURCE = "source"
CROPS = "crops"
#: of Qwen2.5-VL: (row, column) of each patch, and how patches come together in windows and in views
PLACES = "places"
WINDOW_ROWS = "window_rows"
WINDOW_SLOTS = "window_slots"
VIEW_ROWS = "view_rows"
VIEW_SLOTS = "view_slots"

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
    return inputs, _outputs(tokens, width, dtype)


def views_signature(
    *, image_size: int, width: int, dtype: str
) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """(inputs, outputs) of a packed graph whose tower sees squares: tiles of pictures, frames of clips.

    `source` is the token's row among the R rows that the tower makes of all V views, those of one view after another;
    the views of a picture follow each other. A token whose source is -1 does not exist: a picture keeps
    min(quota, its tokens). `positions` are indices of the N axis, which is as long as the largest picture.

    Args: as of `vision_signature`.
    """
    inputs = (
        TensorSpec(PIXEL_VALUES, dtype, ("views", 3, image_size, image_size)),
        *_packed_inputs(),
    )
    return inputs, _outputs("tokens", width, dtype)


def patches_signature(
    *, patch_values: int, window_patches: int, width: int, dtype: str
) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """(inputs, outputs) of a packed graph whose tower sees patches, P of all views, in the order of the windows.

    `places` is each patch's (row, column) in its view. `window_rows` holds the patches of each window, -1 where a
    window has fewer, `view_rows` those of each view (the pictures, and the frames of clips); `window_slots` and
    `view_slots` are where each patch is found in these tables, flattened. `source` is a token's number in the order
    of the windows, R = P / patches of a token.

    Args:
        patch_values: numbers of one patch. window_patches: patches of a whole window.
        width, dtype: as of `vision_signature`.
    """
    inputs = (
        TensorSpec(PIXEL_VALUES, dtype, ("patches", patch_values)),
        TensorSpec(PLACES, "int64", ("patches", 2)),
        TensorSpec(WINDOW_ROWS, "int64", ("windows", window_patches)),
        TensorSpec(WINDOW_SLOTS, "int64", ("patches",)),
        TensorSpec(VIEW_ROWS, "int64", ("views", "longest")),
        TensorSpec(VIEW_SLOTS, "int64", ("patches",)),
        *_packed_inputs(),
    )
    return inputs, _outputs("tokens", width, dtype)


def _packed_inputs() -> tuple[TensorSpec, ...]:
    return (
        TensorSpec(SOURCE, "int64", ("batch", "tokens")),
        TensorSpec(CROPS, "int64", ("batch", "tokens")),
        TensorSpec(BUDGET, "int64", (1,)),
        TensorSpec(QUOTA, "int64", ("batch",)),
    )


def _outputs(tokens: int | str, width: int, dtype: str) -> tuple[TensorSpec, ...]:
    return (
        TensorSpec(VISUAL_TOKENS, dtype, ("batch", "budget", width)),
        TensorSpec(POSITIONS, "int64", ("batch", "budget")),
        TensorSpec(COUNTS, "int64", ("batch",)),
        TensorSpec(SALIENCY, "float32", ("batch", tokens)),
    )
