"""Video files through PyAV: which frames there are, and those that are asked for."""

from __future__ import annotations

import io
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from PIL import Image

from holov_export.errors import HolovExportError, VideoError
from holov_export.extras import require
from holov_export.runtime.picture_reader import check_size

#: FFmpeg's readers of these files run in this process. Playlists and the like are not among them: they name other files
CONTAINERS = ("mov", "matroska", "avi", "mpegts", "mpeg", "flv", "asf", "ogg", "ivf")
_KNOWN = "MP4, MOV, MKV, WebM, AVI, MPEG, FLV, WMV and OGG are read."
#: a Matroska file whose last packet ends so much before what its header says is truncated: a share of it, and seconds
_MISSING_SHARE, _MISSING_SECONDS = 0.05, 1.0


@dataclass(frozen=True)
class ContainerFrames:
    """What a file says of its video, read without decoding more than the first frame.

    Attributes:
        total: frames that are shown.
        fps: on average; None if the file does not say.
        size: (width, height) of the upright first frame.
        times: when each frame is shown, ascending, in the file's own unit; empty if it does not say so of each.
        keys: those at which decoding can begin.
    """

    total: int
    fps: float | None
    size: tuple[int, int]
    times: tuple[int, ...]
    keys: tuple[int, ...]


def container_frames(source: str | Path | bytes, name: str, max_pixels: int, max_frames: int) -> ContainerFrames:
    """Look through a video file.

    Raises:
        VideoError: it is none, has no frames, is truncated, its frames or their number is too large.
        MissingExtraError: PyAV is not installed.
    """
    av = require("av")
    try:
        with _opened(av, source, name) as container:
            stream = _stream(container, name)
            check_size(stream.width, stream.height, name, max_pixels)
            times, keys = _packets(container, stream, name, max_frames)
            if not times:
                raise VideoError(f"{name} has no frames.")
            fps = _rate(stream, times)
        with _opened(av, source, name) as container:
            first = next(container.decode(_stream(container, name)), None)
            if first is None:
                raise VideoError(f"{name} has no frame that can be decoded.", hint="The file is damaged.")
            image = _image(first, name)
    except HolovExportError:
        raise
    except Exception as error:  # FFmpeg's readers let out whatever they meet in a broken file
        raise _undecodable(name, error) from error
    known = sorted({time for time in times if time is not None})
    if len(known) < len(times):
        return ContainerFrames(len(times), fps, image.size, (), ())
    keys.sort()
    if keys:  # a recording may begin between two key frames; nothing can be decoded before the first
        known = known[bisect_left(known, keys[0]) :]
    return ContainerFrames(len(known), fps, image.size, tuple(known), tuple(keys))


def images_from_container(
    source: str | Path | bytes, name: str, frames: ContainerFrames, indices: Sequence[int]
) -> Iterator[Image.Image]:
    """The frames of ascending indices, upright; what lies between is skipped where a key frame allows it.

    Raises:
        VideoError: a frame cannot be decoded, or the file ends before it.
    """
    found = 0
    for keys in (frames.keys, ()):  # the second time without seeking, for files whose index is wrong
        if found < len(indices):
            for image in _images(source, name, frames.times, keys, indices[found:]):
                yield image
                found += 1
    if found < len(indices):
        raise VideoError(
            f"{name} ends before its frame {indices[found]} of {frames.total}.",
            hint="The file is truncated or damaged.",
        )


def _images(
    source: str | Path | bytes, name: str, times: Sequence[int], keys: Sequence[int], indices: Sequence[int]
) -> Iterator[Image.Image]:
    """As many of the frames as are found."""
    av = require("av")
    try:
        with _opened(av, source, name) as container:
            stream = _stream(container, name)
            stream.thread_type = "AUTO"
            chosen = (
                _timed(container, stream, [times[index] for index in indices], keys)
                if times
                else _counted(container, stream, indices)
            )
            for frame in chosen:
                yield _image(frame, name)
    except HolovExportError:
        raise
    except Exception as error:  # see container_frames
        raise _undecodable(name, error) from error


def _opened(av: ModuleType, source: str | Path | bytes, name: str) -> Any:
    file = io.BytesIO(source) if isinstance(source, bytes) else str(Path(source).absolute())
    try:
        return av.open(file, container_options={"format_whitelist": ",".join(CONTAINERS), "protocol_whitelist": "file"})
    except PermissionError:
        raise VideoError(f"{name} cannot be read: permission denied.") from None
    except (av.error.InvalidDataError, ValueError) as error:
        raise VideoError(f"{name} is not a video that can be read.", hint=_KNOWN) from error


def _undecodable(name: str, error: Exception) -> VideoError:
    return VideoError(f"{name} cannot be decoded: {error}.", hint="The file is truncated or damaged.")


def _stream(container: Any, name: str) -> Any:
    stream = container.streams.best("video")
    if stream is None:
        raise VideoError(f"{name} has no video in it.")
    return stream


def _packets(container: Any, stream: Any, name: str, max_frames: int) -> tuple[list[int | None], list[int]]:
    """(when each frame is shown, those of them that are key frames), in the order of the file."""
    times: list[int | None] = []
    keys: list[int] = []
    seen, end = 0, 0.0
    for packet in container.demux():
        if packet.dts is None and packet.size == 0:  # the decoders' flush, no packet of the file
            continue
        if packet.pts is not None:
            end = max(end, float((packet.pts + (packet.duration or 0)) * packet.time_base))
        if packet.stream.index != stream.index:
            continue
        seen += 1
        if packet.size == 0 or packet.is_discard:
            continue
        times.append(packet.pts)
        if packet.is_keyframe and packet.pts is not None:
            keys.append(packet.pts)
        if len(times) > max_frames:
            raise VideoError(f"{name} is too long: it has more than {max_frames:,} frames.", hint="Cut it.")
    missing = _seconds_missing(container, end)
    if seen < stream.frames or missing:
        said = f"{seen} of {stream.frames} frames are there" if seen < stream.frames else f"{missing:.1f} s are missing"
        raise VideoError(f"{name} is truncated: {said}.")
    return times, keys


def _seconds_missing(container: Any, end: float) -> float:
    """How much of a Matroska file is not there; its header has no number of frames."""
    if not container.format.name.startswith("matroska") or not container.duration:
        return 0.0
    said = container.duration / 1e6
    missing = said - end + (container.start_time or 0) / 1e6
    return missing if missing > max(said * _MISSING_SHARE, _MISSING_SECONDS) else 0.0


def _rate(stream: Any, times: Sequence[int | None]) -> float | None:
    """Frames a second."""
    if stream.average_rate:
        return float(stream.average_rate)
    known = [time for time in times if time is not None]
    if len(known) < 2 or max(known) == min(known):
        return None
    return (len(known) - 1) / float((max(known) - min(known)) * stream.time_base)


def _timed(container: Any, stream: Any, times: Sequence[int], keys: Sequence[int]) -> Iterator[Any]:
    """Frames found by their times. Seeks where a key frame lies between the last frame and the next.

    Ends early where decoding went on behind the frame that was sought.
    """
    decoder = container.decode(stream)
    frame = next(decoder, None)
    for wanted in times:
        before = bisect_right(keys, wanted)
        if frame is not None and before and frame.pts < keys[before - 1]:
            container.seek(keys[before - 1], stream=stream)
            decoder = container.decode(stream)
            frame = next(decoder, None)
        if frame is not None and frame.pts > wanted:
            return
        while frame is not None and frame.pts < wanted:
            frame = next(decoder, None)
        if frame is None:
            return
        yield frame


def _counted(container: Any, stream: Any, indices: Sequence[int]) -> Iterator[Any]:
    """Frames found by counting."""
    wanted = set(indices)
    for index, frame in enumerate(container.decode(stream)):
        if index in wanted:
            yield frame
        if index >= indices[-1]:
            return


def _image(frame: Any, name: str) -> Image.Image:
    """RGB, turned as the file says (transformers' reader through PyAV does not turn)."""
    if frame.is_corrupt:
        raise VideoError(f"{name} has a damaged frame.", hint="The file is truncated or damaged.")
    pixels = frame.to_ndarray(format="rgb24")
    quarters, rest = divmod(frame.rotation, 90)
    return Image.fromarray(np.ascontiguousarray(np.rot90(pixels, 0 if rest else quarters)))
