"""Profiles of packed graphs: how long their axes become, from what a model's pictures and clips are.

A packed graph has more dynamic axes than batch and budget: the tower's views or patches, and the tokens of a row. Their
lengths follow from how many pictures a run has and from how large they are; so the profiles are derived here from the
target's batches and budgets and from the values of the specification.

Shape words: b pictures or clips of a run, T tokens of the largest of them, K budget.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from holov_export.engine import AxisSpan, ShapeProfile
from holov_export.errors import BudgetError, EngineError
from holov_export.spec import (
    ExportPlan,
    FramePairsSpec,
    FramesSpec,
    PatchImageSpec,
    Precision,
    QwenVisionSpec,
    TiledImageSpec,
)

#: the longest axis that TensorRT sorts, and every rule sorts the tokens of a picture.
#: Source: NvInfer.h, ITopKLayer::setK, of 8.6 to 11.1
LONGEST_SORT = 3840
#: T of an engine for pictures of any size where nobody says it: buffers grow with T, and attention with its square.
#: Source: the range that the README of Qwen/Qwen2.5-VL-7B-Instruct suggests for max_pixels, 1280 * 28 * 28
USUAL_TOKENS = 1280
#: of a target's memory, what one attention map of the largest run may take: TensorRT may hold several at once, if it
#: does not fuse them, beside weights and buffers. An assumption; nothing of this was measured
MAP_SHARE = 1 / 8
Three = tuple[int, int, int]


@dataclass(frozen=True)
class Largest:
    """What an engine is built for.

    Attributes:
        tokens: T. clip_frames: of a clip, for graphs that see pictures and clips; 0 for pictures alone.
    """

    tokens: int
    clip_frames: int = 0


def largest_of(plan: ExportPlan, max_tokens: int | None, clip_frames: int | None) -> Largest:
    """What was asked for, and what is usual where nothing was.

    Args:
        plan: of a packed graph.

    Raises:
        BudgetError: fewer tokens than the smallest picture or clip has, or frames where all clips have the same.
        EngineError: more tokens than TensorRT sorts.
    """
    patches, pairs = plan.model.image.kind == "patches", plan.model.video.kind == "pairs"
    if clip_frames is not None and not pairs:
        raise BudgetError(f"--clip-frames: '{plan.model.name}' takes no clips of unequal length.", hint="Leave it out.")
    sortable = LONGEST_SORT - plan.start_counts
    if max_tokens is None:
        return Largest(min(plan.tokens, sortable, USUAL_TOKENS if patches else sortable), clip_frames or 0)
    if max_tokens < _smallest(plan):
        raise BudgetError(
            f"--max-tokens {max_tokens}: what '{plan.model.name}' sees has {_smallest(plan)} tokens or more.",
            hint="Name the tokens of the largest picture.",
        )
    tokens = min(max_tokens, plan.tokens)
    if tokens > sortable:
        raise EngineError(
            f"--max-tokens {max_tokens}: TensorRT sorts {sortable} tokens at most.",
            hint=f"Name {sortable} or fewer; ONNX Runtime runs larger pictures: --engine ort.",
        )
    return Largest(tokens, clip_frames or 0)


def _smallest(plan: ExportPlan) -> int:
    """Tokens that every picture or clip has."""
    if plan.part == "video":
        return plan.tokens
    return plan.model.clip.tokens if isinstance(plan.model.image, TiledImageSpec) else 1


def within_memory(
    plan: ExportPlan, spans: Sequence[ShapeProfile], largest: Largest, usable_bytes: int
) -> tuple[ShapeProfile, ...]:
    """The target's batches, made smaller where their attention would not fit: it grows with the square of T."""
    most = max(1, int(usable_bytes * MAP_SHARE / _map_bytes(plan, largest)))
    return tuple(span.model_copy(update={"batch": tuple(min(size, most) for size in span.batch)}) for span in spans)


def _map_bytes(plan: ExportPlan, largest: Largest) -> int:
    """Of one layer's attention map for the largest picture or clip."""
    model, size = plan.model, 4 if plan.precision is Precision.FP32 else 2
    if isinstance(model.vision, QwenVisionSpec):
        sides = [(1, largest.tokens)]
        if largest.clip_frames:
            pairs, frame = _largest_clip(plan, largest)
            sides.append((pairs, frame))
        return max(views * (model.vision.unit * tokens) ** 2 for views, tokens in sides) * model.vision.heads * size
    views = model.video.frames if isinstance(model.video, FramesSpec) else plan.tokens // model.clip.tokens
    return views * model.clip.heads * (model.clip.tokens + 1) ** 2 * size


def _largest_clip(plan: ExportPlan, largest: Largest) -> tuple[int, int]:
    """(pairs of frames of the longest clip, tokens of the largest pair of a clip of several)."""
    image, video = plan.model.image, plan.model.video
    assert isinstance(image, PatchImageSpec) and isinstance(video, FramePairsSpec)  # others have no --clip-frames
    pairs = math.ceil(min(largest.clip_frames, video.max_frames) / image.temporal)
    frame = min(largest.tokens // 2, video.max_pixels // image.token_pixels**2)
    return min(pairs, largest.tokens), max(1, frame)


def packed_profiles(plan: ExportPlan, spans: Sequence[ShapeProfile], largest: Largest) -> tuple[ShapeProfile, ...]:
    """The profiles with all axes of the graph, each once.

    Pictures have unequal numbers of tokens, so the smallest budget is 1 whatever was asked for. A clip whose frames get
    equal quotas has a row for each frame; that is a profile of its own, for its rows are short and many.

    Args:
        spans: b and K, as the target or the user says them.
    """
    model, video, made = plan.model, plan.model.video, list[ShapeProfile]()
    for span in spans:
        if plan.part == "video" and isinstance(video, FramesSpec):
            made += _clips_of_frames(plan, video, span)
        elif isinstance(model.image, TiledImageSpec):
            made.append(_tiles(plan, model.image, span, largest))
        elif isinstance(model.image, PatchImageSpec) and isinstance(model.vision, QwenVisionSpec):
            made.append(_patches(model.vision, span, largest.tokens))
            if largest.clip_frames > model.image.temporal and largest.tokens > 1:
                made.append(_pairs(plan, model.vision, span, largest))
    return tuple(dict.fromkeys(made))


def _profile(rows: Three, budget: Three, row_tokens: Three, **axes: Three) -> ShapeProfile:
    """`axes` are those before "tokens", in the order of the graph's inputs."""
    usual, most = (min(wanted, tokens) for wanted, tokens in zip(budget[1:], row_tokens[1:], strict=True))
    spans = (*axes.items(), ("tokens", row_tokens))
    return ShapeProfile(
        batch=rows,
        budget=(1, usual, most),
        axes=tuple(AxisSpan(name=name, span=span) for name, span in spans),
    )


def _times(batch: Three, smallest: int, usual: int, largest: int) -> Three:
    return batch[0] * smallest, batch[1] * usual, batch[2] * largest


def _tiles(plan: ExportPlan, image: TiledImageSpec, span: ShapeProfile, largest: Largest) -> ShapeProfile:
    """LLaVA-NeXT: a picture is itself made small, and the tiles of one of the resolutions. Usual is the largest."""
    side = plan.model.clip.image_size
    tiles = [(height // side) * (width // side) for height, width in image.pinpoints]
    views = _times(span.batch, 1 + min(tiles), 1 + max(tiles), 1 + max(tiles))
    tokens = (plan.model.clip.tokens, largest.tokens, largest.tokens)
    return _profile(span.batch, span.budget, tokens, views=views)


def _clips_of_frames(plan: ExportPlan, video: FramesSpec, span: ShapeProfile) -> list[ShapeProfile]:
    """Video-LLaVA: every clip has the same frames and tokens; a row is a frame, or the whole clip."""
    frames, frame = video.frames, plan.tokens // video.frames
    views = _times(span.batch, frames, frames, frames)
    whole = _profile(span.batch, span.budget, (plan.tokens,) * 3, views=views)
    if not plan.policy.spreads:
        return [whole]
    share = (1, math.ceil(span.budget[1] / frames), math.ceil(span.budget[2] / frames))
    return [_profile(_times(span.batch, 1, frames, frames), share, (frame,) * 3, views=views), whole]


def _patches(vision: QwenVisionSpec, span: ShapeProfile, most: int) -> ShapeProfile:
    """Qwen2.5-VL's pictures. Usual is a square one of T tokens."""
    unit = vision.unit
    return _profile(
        span.batch,
        span.budget,
        (1, most, most),
        patches=_times(span.batch, unit, unit * most, unit * most),
        windows=_times(span.batch, 1, usual_windows(most, vision), most_windows(most, vision)),
        views=span.batch,
        longest=(unit, unit * most, unit * most),
    )


def _pairs(plan: ExportPlan, vision: QwenVisionSpec, span: ShapeProfile, largest: Largest) -> ShapeProfile:
    """Qwen2.5-VL's clips of two or more pairs of frames, T tokens together; one of a single pair is like a picture."""
    (pairs, frame), most, unit = _largest_clip(plan, largest), largest.tokens, vision.unit
    usual = max(1, min(most // pairs, frame))
    windows = max(count * most_windows(min(most // count, frame), vision) for count in range(2, pairs + 1))
    spread = pairs if plan.policy.spreads else 1
    return _profile(
        _times(span.batch, 1, spread, spread),
        (1, math.ceil(span.budget[1] / spread), span.budget[2]),
        (1, usual if plan.policy.spreads else usual * pairs, most),
        patches=_times(span.batch, unit, unit * usual * pairs, unit * most),
        windows=_times(span.batch, 1, pairs * usual_windows(usual, vision), windows),
        views=_times(span.batch, 1, pairs, pairs),
        longest=(unit, unit * usual, unit * frame),
    )


def usual_windows(tokens: int, vision: QwenVisionSpec) -> int:
    """Windows of a square view of at most so many tokens."""
    side = math.isqrt(tokens)
    return math.ceil(side / _window(vision)) ** 2


def most_windows(tokens: int, vision: QwenVisionSpec) -> int:
    """Windows that a view of at most so many tokens can have: thin views have more than square ones."""
    window = _window(vision)
    return max(
        math.ceil(rows / window) * math.ceil(tokens // rows / window) for rows in range(1, math.isqrt(tokens) + 1)
    )


def _window(vision: QwenVisionSpec) -> int:
    """Tokens of a whole window, down and across."""
    return vision.window_size // (vision.patch_size * vision.merge)
