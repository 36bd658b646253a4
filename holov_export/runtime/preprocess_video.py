"""Clips to pixels: which frames are taken, and what they become.

Source: transformers 5.23 video_processing_qwen2_vl.py (sample_frames, resize, patchify), video_utils.py (sampled_fps)
and the model page of Video-LLaVA (eight frames at `np.arange(0, total, total / 8)`). transformers' video processors
need torchvision; here each frame is resized by Pillow, as their image processors do. That differs from torchvision by
one level of 255 at most, at one value in 250 (torchvision 0.28, three photographs).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from holov_export.errors import ImageError, UsageError, VideoError
from holov_export.runtime.preprocess_patches import (
    patch_layout,
    patch_size_of,
    patch_specs,
    patches_from_frames,
    resized_planes,
    window_order,
)
from holov_export.runtime.preprocess_squares import normalisation_table, planes_from_pixels, resized_and_cropped
from holov_export.runtime.video_reader import (
    MAX_FRAME_PIXELS,
    MAX_FRAMES,
    Clip,
    VideoSource,
    clip_from,
    frames_from,
)
from holov_export.spec import FramePairsSpec, FramesSpec, ModelSpec, PatchImageSpec
from holov_export.tensors import CropBox, FloatArray, ImageLayout, Int64Array, PixelBatch, Region

__all__ = [
    "MAX_FRAMES",
    "MAX_FRAME_PIXELS",
    "Clip",
    "VideoSource",
    "check_takes_videos",
    "clip_from",
    "frames_from",
    "joined_batches",
    "pixels_from_videos",
]


def pixels_from_videos(
    videos: Sequence[VideoSource],
    model: ModelSpec,
    *,
    max_pixels: int = MAX_FRAME_PIXELS,
    max_frames: int = MAX_FRAMES,
) -> PixelBatch:
    """Preprocess clips as the model's own video processor would.

    A clip with fewer frames than the model wants is no error: Video-LLaVA takes some of them several times, Qwen2.5-VL
    repeats the last one of an odd number; so a single picture is a clip that stands still. Frames without times (a
    folder, a list, an array) are taken as sampled already: Qwen2.5-VL uses all of them, up to its `max_frames`, and
    puts them 1 / fps seconds apart.

    Args:
        max_pixels: refuse clips whose frames are larger.
        max_frames: refuse clips that have more frames. Only the frames that are used are kept in memory.

    Returns:
        float32 [V, 3, H, W] or [P, values of a patch], those of one clip after another, and the layouts. A region is a
        frame, or a pair of frames; `seconds` of all pairs is their distance, also of the first.

    Raises:
        VideoError: a clip is refused (see `clip_from`), or there is none.
        ImageError: one of its pictures is refused.
        MissingExtraError: PyAV is needed and not installed.
        UsageError: the model takes no clips.
    """
    check_takes_videos(model)
    if len(videos) == 0:
        raise VideoError("there is no video.")
    pixels, boxes, sizes, layouts = [], [], [], []
    for source in videos:
        clip = clip_from(source, max_pixels=max_pixels, max_frames=max_frames)
        if isinstance(model.video, FramesSpec):
            made, box, layout = _frames(clip, model.video, model, max_pixels)
        else:
            assert isinstance(model.video, FramePairsSpec)  # check_takes_videos asked
            made, box, layout = _pairs(clip, model.video, model)
        pixels.append(made)
        boxes.append(box)
        sizes.append(clip.size)
        layouts.append(layout)
    return PixelBatch(np.concatenate(pixels), tuple(boxes), tuple(sizes), tuple(layouts))


def check_takes_videos(model: ModelSpec) -> None:
    """Refuse clips for a model that takes none.

    Raises:
        UsageError: it takes none.
    """
    if model.video.kind == "none":
        raise UsageError(f"'{model.name}' takes no videos.", hint="Give single frames as images.")


def joined_batches(first: PixelBatch, second: PixelBatch) -> PixelBatch:
    """Pictures and clips that go into one packed graph together.

    Raises:
        ValueError: one of them is not packed, or their pixels have different shapes.
    """
    for batch in (first, second):
        if not batch.layouts:
            raise ValueError("only batches of packed graphs can be joined")
    shapes = first.pixel_values.shape[1:], second.pixel_values.shape[1:]
    if shapes[0] != shapes[1]:
        raise ValueError(f"pixels of shapes {shapes[0]} and {shapes[1]} cannot be joined")
    return PixelBatch(
        np.concatenate([first.pixel_values, second.pixel_values]),
        first.boxes + second.boxes,
        first.sizes + second.sizes,
        first.layouts + second.layouts,
    )


def _frames(clip: Clip, spec: FramesSpec, model: ModelSpec, max_pixels: int) -> tuple[FloatArray, CropBox, ImageLayout]:
    """A fixed number of frames, each a square."""
    # the step is a float: fewer frames than wanted are repeated evenly. Source: see the top of the module
    chosen = np.arange(0, clip.total, clip.total / spec.frames)[: spec.frames].astype(np.int64)
    table = normalisation_table(spec.image)
    planes, regions = [], []
    for index, frame in zip(chosen, clip.frames(chosen), strict=True):
        pixels, box = resized_and_cropped(frame, spec.image, max_pixels)
        planes.append(planes_from_pixels(pixels, table))
        regions.append(Region(model.clip.grid, box, cls=spec.cls, frame=int(index)))
    rows = len(planes) * (model.clip.tokens + spec.cls)
    layout = ImageLayout(
        kind="video",
        rows=len(planes),
        tower_rows=rows,
        source=np.arange(rows, dtype=np.int64),
        regions=tuple(regions),
        places=np.zeros((0, 2), dtype=np.int64),
        windows=np.zeros(0, dtype=np.int64),
    )
    return np.stack(planes), regions[0].box, layout


def _pairs(clip: Clip, spec: FramePairsSpec, model: ModelSpec) -> tuple[FloatArray, CropBox, ImageLayout]:
    """Frames sampled in time, `temporal` of which share their patches."""
    image, vision = patch_specs(model)
    chosen = sampled_frames(clip.total, clip.fps, spec, image.temporal)
    seconds = image.temporal / (len(chosen) / clip.total * (clip.fps or spec.fps))
    size = _frame_size(clip, len(chosen), spec, image)
    rows, columns = size[1] // image.token_pixels, size[0] // image.token_pixels
    box = CropBox(0, 0, *clip.size)
    chosen = np.append(chosen, np.repeat(chosen[-1:], -len(chosen) % image.temporal))
    order, _ = window_order(rows, columns, vision)
    table = normalisation_table(image)
    frames = (resized_planes(frame, size, image, table) for frame in clip.frames(chosen))
    firsts = chosen[:: image.temporal]
    patches = len(order) * vision.unit
    pixels = np.empty((len(firsts) * patches, vision.patch_values), dtype=np.float32)
    for pair in range(len(firsts)):
        together = [next(frames) for _ in range(image.temporal)]
        pixels[pair * patches : (pair + 1) * patches] = patches_from_frames(together, image, order)
    regions = tuple(Region((rows, columns), box, frame=int(index), seconds=seconds) for index in firsts)
    return pixels, box, patch_layout("video", regions, vision)


def sampled_frames(total: int, fps: float | None, spec: FramePairsSpec, temporal: int) -> Int64Array:
    """int64 [frames]: which of `total` frames are taken, evenly spaced.

    transformers rounds the places to float32 before it cuts them off; so does this. Where its `arange` makes one place
    too many, behind the last frame, this does not. A clip of fewer frames than a patch has is taken whole; transformers
    fails there.

    Args:
        fps: frames a second of the clip; None if its frames have no times.
        temporal: frames of a patch; as many of a longer clip are a multiple of it.
    """
    most = min(spec.max_frames, total) // temporal * temporal
    if fps is None:
        wanted = total if total <= spec.max_frames else most
    else:
        wanted = math.floor(min(max(total / fps * spec.fps, spec.min_frames), most) / temporal) * temporal
    wanted = wanted or total
    places = (np.arange(wanted) * (total / wanted)).astype(np.float32)
    return np.minimum(places.astype(np.int64), total - 1)


def _frame_size(clip: Clip, count: int, spec: FramePairsSpec, image: PatchImageSpec) -> tuple[int, int]:
    """(width, height) of each of `count` frames."""
    try:
        return patch_size_of(clip.size, image, (spec.min_pixels, spec.frame_pixels(count)))
    except ImageError as error:
        raise VideoError(f"{clip.name} cannot be used: {error.message}", hint=error.hint) from None
