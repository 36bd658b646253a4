"""Clips from files, animations, folders, lists and arrays: what is known beforehand, and single frames of them."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt
from PIL import Image

from holov_export.errors import VideoError
from holov_export.runtime.picture_reader import (
    ImageSource,
    check_size,
    image_from,
    opened,
    readable_formats,
    upright_rgb,
)
from holov_export.runtime.video_container import container_frames, images_from_container

_T = TypeVar("_T")

VideoSource = str | Path | bytes | Image.Image | Sequence[ImageSource] | npt.NDArray[np.generic]

#: 8K is 33 M; a decoder keeps up to 16 frames, 1.5 bytes a pixel
MAX_FRAME_PIXELS = 36_000_000
#: nine hours at 30 frames a second. They are counted, but only those that are asked for are kept
MAX_FRAMES = 1_000_000
#: what Pillow reads as frames that follow each other; of other formats with several pictures the first is taken
ANIMATIONS = ("GIF", "WEBP", "PNG", "AVIF")
#: formats with marks of their own; Pillow takes many files for TGA
_SURE = (*ANIMATIONS, "JPEG", "MPO", "BMP", "TIFF", "JPEG2000")
#: a frame that says 0 is shown so long, as browsers do
_DEFAULT_MILLISECONDS = 100


@dataclass(frozen=True)
class Clip:
    """A clip that was looked through but not decoded.

    Attributes:
        name: for messages.
        total: frames.
        fps: frames a second, on average; None if its frames have no times.
        size: (width, height) of an upright frame.
        read: the frames of ascending indices.
    """

    name: str
    total: int
    fps: float | None
    size: tuple[int, int]
    read: Callable[[Sequence[int]], Iterator[Image.Image]]

    def frames(self, indices: Sequence[int] | npt.NDArray[np.integer]) -> Iterator[Image.Image]:
        """The frames of indices that do not descend, as RGB; one that is asked for again comes again.

        Raises:
            VideoError: a frame cannot be decoded, or its size is not that of the first.
        """
        wanted = [int(index) for index in indices]
        if any(not 0 <= index < self.total for index in wanted):
            raise ValueError(f"{self.name} has {self.total} frames, not those of {wanted}")
        distinct = sorted(set(wanted))
        images = self.read(distinct)
        for index in distinct:
            image = next(images)
            if image.size != self.size:
                raise VideoError(
                    f"{self.name} changes its size: frame {index} has {image.width} x {image.height} pixels, the first "
                    f"{self.size[0]} x {self.size[1]}."
                )
            for _ in range(wanted.count(index)):
                yield image


def frames_from(
    source: VideoSource,
    indices: Sequence[int],
    *,
    max_pixels: int = MAX_FRAME_PIXELS,
    max_frames: int = MAX_FRAMES,
) -> list[Image.Image]:
    """Single frames of a clip, upright RGB, in the order of `indices` (0-based).

    Raises:
        as of `clip_from`; ValueError: an index is past the end.
    """
    clip = clip_from(source, max_pixels=max_pixels, max_frames=max_frames)
    distinct = sorted(set(indices))
    images = dict(zip(distinct, clip.frames(distinct), strict=True))
    return [images[index] for index in indices]


def clip_from(source: VideoSource, *, max_pixels: int = MAX_FRAME_PIXELS, max_frames: int = MAX_FRAMES) -> Clip:
    """Look through a clip.

    Args:
        source: the path or bytes of a video file (through PyAV) or of an animation (GIF, WebP, APNG, AVIF; through
            Pillow), a folder of pictures in the natural order of their names (2 before 10), a list of pictures, or an
            array [T, H, W, 1, 3 or 4]. A single picture is a clip of one frame.
        max_pixels: refuse larger frames. max_frames: refuse clips that have more.

    Rotation in the file's header is applied, to pictures as `image_from` does; pixels that are not square stay as they
    are. A truncated file is recognised by the number of frames in its header, Matroska and WebM by their duration when
    more than a second is missing; MPEG transport streams say neither, and are as long as what is there.

    Raises:
        VideoError: it does not exist, is no video, is empty, truncated, or too large.
        ImageError: so with a picture of it.
        MissingExtraError: it is a video file, and PyAV is not installed.
    """
    name = _name_of(source)
    clip = _clip(source, name, max_pixels, max_frames)
    if clip.total > max_frames:
        raise VideoError(f"{name} is too long: {clip.total:,} frames are more than {max_frames:,}.", hint="Cut it.")
    return clip


def _clip(source: VideoSource, name: str, max_pixels: int, max_frames: int) -> Clip:
    if isinstance(source, (str, Path)) and Path(source).is_dir():
        return _clip_from_pictures(_pictures_in(Path(source)), name, max_pixels)
    if isinstance(source, Image.Image):
        if _decoded(lambda: _frames_of(source), name) > 1 and source.format in ANIMATIONS:
            raise VideoError("an opened animation cannot be read from its start.", hint="Give its path or its bytes.")
        return _clip_from_pictures([source], name, max_pixels)
    if isinstance(source, np.ndarray):
        if source.ndim != 4:
            raise VideoError(f"a video array has shape {source.shape}.", hint="Expected [T, H, W, 1, 3 or 4].")
        return _clip_from_pictures(source, name, max_pixels)
    if isinstance(source, (str, Path, bytes)):
        if not isinstance(source, bytes) and not Path(source).exists():
            raise VideoError(f"{name} does not exist.")
        if _is_picture(source):
            return _clip_from_animation(lambda: opened(source, name), name, max_pixels, max_frames)
        found = container_frames(source, name, max_pixels, max_frames)
        return Clip(
            name,
            found.total,
            found.fps,
            found.size,
            lambda indices: images_from_container(source, name, found, indices),
        )
    if isinstance(source, (list, tuple)):
        return _clip_from_pictures(source, name, max_pixels)
    raise VideoError(
        f"a video cannot be a {type(source).__name__}.", hint="Give a path, bytes, a list of pictures or an array."
    )


def _name_of(source: VideoSource) -> str:
    if isinstance(source, (str, Path)):
        return f"'{source}'"
    return f"the video ({len(source)} bytes)" if isinstance(source, bytes) else "the video"


def _pictures_in(folder: Path) -> list[Path]:
    """The pictures of a folder, by their endings, in the natural order of their names."""
    formats = readable_formats()
    endings = {ending for ending, kind in Image.registered_extensions().items() if kind in formats}
    found = [path for path in folder.iterdir() if path.suffix.lower() in endings and not path.name.startswith(".")]
    if not found:
        raise VideoError(f"'{folder}' holds no pictures.", hint="Give a folder of frames, or a video file.")
    return sorted(found, key=_natural)


def _natural(path: Path) -> tuple[list[tuple[int, str]], str]:
    parts = re.split(r"([0-9]+)", path.name.lower())
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in parts], path.name


def _clip_from_pictures(pictures: Sequence[ImageSource] | npt.NDArray[np.generic], name: str, max_pixels: int) -> Clip:
    if len(pictures) == 0:
        raise VideoError(f"{name} has no frames.")

    def read(indices: Sequence[int]) -> Iterator[Image.Image]:
        for index in indices:
            yield image_from(pictures[index], max_pixels=max_pixels)

    return Clip(name, len(pictures), None, next(read([0])).size, read)


def _is_picture(source: str | Path | bytes) -> bool:
    """True if Pillow knows the header; what is wrong with the picture is found later."""
    formats = [kind for kind in readable_formats() if kind in _SURE]
    try:
        Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=formats).close()
    except Image.DecompressionBombError:
        return True
    except Exception:
        return False
    return True


def _clip_from_animation(open_image: Callable[[], Image.Image], name: str, max_pixels: int, max_frames: int) -> Clip:
    """Args: open_image: opens the file anew; Pillow's readers are not good at going back."""
    image = open_image()
    check_size(image.width, image.height, name, max_pixels)
    total = _decoded(lambda: _frames_of(image), name) if image.format in ANIMATIONS else 1
    if total > max_frames:
        raise VideoError(f"{name} is too long: {total:,} frames are more than {max_frames:,}.", hint="Cut it.")

    def read(indices: Sequence[int]) -> Iterator[Image.Image]:
        still = open_image()
        for index in indices:
            yield _decoded(partial(_frame, still, index), name)

    first = next(read([0]))
    return Clip(name, total, _decoded(lambda: _rate(open_image(), total), name), first.size, read)


def _frames_of(image: Image.Image) -> int:
    return int(getattr(image, "n_frames", 1))


def _frame(image: Image.Image, index: int) -> Image.Image:
    image.seek(index)
    return upright_rgb(image.copy())


def _rate(image: Image.Image, total: int) -> float | None:
    """Frames a second, from how long each is shown; None for a single one."""
    shown = 0.0
    for index in range(total):
        image.seek(index)
        image.load()  # WebP's reader knows a frame's duration only then
        shown += float(image.info.get("duration") or _DEFAULT_MILLISECONDS)
    return total * 1000 / shown if total > 1 else None


def _decoded(work: Callable[[], _T], name: str) -> _T:
    """What `work` returns; what Pillow raises becomes a VideoError."""
    try:
        return work()
    except Exception as error:  # see picture_reader.image_from
        raise VideoError(f"{name} cannot be decoded: {error}.", hint="The file is truncated or damaged.") from error
