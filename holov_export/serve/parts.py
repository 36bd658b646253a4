"""Images and clips of a request: where they may come from, how large they may be, and what they are.

URL --bytes_from_data_url | file_from_url | remote--> bytes --checked_image | checked_clip--> CheckedMedia --> Media
"""

from __future__ import annotations

import base64
import binascii
import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import unquote, urlsplit

from holov_export.runtime.media import Media
from holov_export.runtime.picture_reader import check_size, image_from, opened
from holov_export.runtime.preprocess_video import check_takes_videos
from holov_export.runtime.video_reader import clip_from
from holov_export.serve.faults import refused
from holov_export.serve.limits import Limits
from holov_export.serve.wire import ChatRequest, ImagePart, TextPart
from holov_export.spec import ModelSpec

Kind = Literal["image", "video"]
#: a longer clip is refused: ten minutes at 60 frames a second. Looking through it takes a thread
MAX_CLIP_FRAMES = 36_000
_LONGEST_URL = 8192
#: first bytes of the files that are read. Source: WHATWG MIME Sniffing, section 6.1
_IMAGES = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"GIF87a", b"GIF89a")
_IMAGE_NAMES = "PNG, JPEG, WebP and GIF"


@dataclass(frozen=True)
class Reference:
    """A place of the request that names an image or a clip.

    Attributes:
        param: the place, for messages: "messages.0.content.1".
    """

    kind: Kind
    url: str
    param: str

    @property
    def scheme(self) -> str:
        return self.url[:16].partition(":")[0].lower()


@dataclass(frozen=True)
class CheckedMedia:
    """An image or clip that may be decoded.

    Attributes:
        source: the bytes of a file, or its path.
        pixels: that decoding makes at once; 0 for clips, which the worker decodes.
        size: (width, height) of a clip's upright frame; of an image it is known when it is decoded.
    """

    kind: Kind
    source: bytes | Path
    param: str
    pixels: int = 0
    size: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class DecodedMedia:
    """What goes to the worker, and the (width, height) of each upright image and then of each clip."""

    media: Media
    sizes: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Sources:
    """Where images and clips may come from.

    Attributes:
        folder: of `file:` URLs; None refuses them all.
        remote: `http:` and `https:` URLs of images are fetched.
    """

    folder: Path | None = None
    remote: bool = False


def references_from_request(request: ChatRequest, limits: Limits, model: ModelSpec) -> list[Reference]:
    """Images and clips in the order of the messages.

    Raises:
        FaultError: there are too many.
        UsageError: the model takes no clips.
    """
    found = []
    for index, message in enumerate(request.messages):
        for number, part in enumerate(message.parts):
            if isinstance(part, TextPart):
                continue
            kind: Kind = "image" if isinstance(part, ImagePart) else "video"
            url = part.image_url.url if isinstance(part, ImagePart) else part.video_url.url
            found.append(Reference(kind, url, f"messages.{index}.content.{number}.{kind}_url.url"))
    for kind, most in (("image", limits.images), ("video", limits.videos)):
        count = sum(item.kind == kind for item in found)
        if count > most:
            raise refused(f"the request has {count} {kind}s, more than {most}.", param="messages", code="too_many")
    if any(item.kind == "video" for item in found):
        check_takes_videos(model)
    return found


def check_reference(item: Reference, sources: Sources) -> None:
    """Refuse URLs of kinds that this server does not read.

    Raises:
        FaultError: says which it reads.
    """
    known = ["data:"] + (["file:"] if sources.folder else []) + (["http:", "https:"] if sources.remote else [])
    if item.scheme == "file" and sources.folder is None:
        reason = "this server reads no files: it was started without --media-folder"
    elif item.scheme in ("http", "https") and not sources.remote:
        reason = "this server fetches no URLs: it was started without --allow-remote"
    elif item.scheme in ("http", "https") and item.kind == "video":
        reason = "clips are not fetched"
    elif item.scheme not in ("data", "file", "http", "https"):
        reason = "that is no URL which this server reads"
    elif item.scheme != "data" and len(item.url) > _LONGEST_URL:
        reason = f"the URL has more than {_LONGEST_URL} characters"
    else:
        return
    raise refused(f"{reason}. Known here: {', '.join(known)}.", param=item.param, code="invalid_url")


def checked_from_reference(item: Reference, sources: Sources, limits: Limits) -> CheckedMedia:
    """Read and check what a `data:` or `file:` URL names. Takes time: not for an event loop.

    Raises:
        FaultError, ImageError: it is refused.
    """
    if item.scheme == "data":
        return checked_media(item, bytes_from_data_url(item), limits)
    assert sources.folder is not None
    path = path_from_file_url(item, sources.folder)
    if item.kind == "video":
        return checked_media(item, path, limits)
    return checked_media(item, _read(item, path, limits.body_bytes), limits)


def bytes_from_data_url(item: Reference) -> bytes:
    """The bytes of `data:TYPE;base64,...`. What they are is told by themselves, not by TYPE.

    Raises:
        FaultError: it is not base64, or empty.
    """
    head, comma, text = item.url.partition(",")
    if not comma or not head.lower().endswith(";base64"):
        raise refused("a data URL must be 'data:image/png;base64,...'.", param=item.param, code="invalid_url")
    text = unquote(text) if "%" in text else text
    try:
        data = base64.b64decode(
            "".join(text.split()) if any(sign in text for sign in " \n\r\t") else text, validate=True
        )
    except (binascii.Error, ValueError):
        raise refused("the data URL is not valid base64.", param=item.param, code="invalid_url") from None
    if not data:
        raise refused("the data URL is empty.", param=item.param, code="invalid_url")
    return data


def path_from_file_url(item: Reference, folder: Path) -> Path:
    """The regular file inside `folder`, links followed, that a URL names.

    Raises:
        FaultError: there is none. It is said in the same words whether something is outside or nowhere.
    """
    refusal = refused("there is no such file inside the media folder.", param=item.param, code="invalid_url")
    try:
        parts = urlsplit(item.url)
        path = Path(unquote(parts.path, errors="strict"))
        if parts.netloc not in ("", "localhost") or parts.query or parts.fragment or not path.is_absolute():
            raise refusal
        root = folder.resolve(strict=True)
        found = path.resolve(strict=True)
        if found.is_relative_to(root) and stat.S_ISREG(found.stat().st_mode):
            return found
    except (OSError, ValueError, RuntimeError):  # loops of links, NUL bytes, bytes that are no text
        pass
    raise refusal


def _read(item: Reference, path: Path, most: int) -> bytes:
    """The bytes of a regular file; what was put in its place since is not followed, and a pipe is not waited for."""
    try:
        number = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(number, "rb") as file:
            if not stat.S_ISREG(os.fstat(number).st_mode):
                raise OSError
            data = file.read(most + 1)
    except OSError:
        raise refused("the file cannot be read.", param=item.param, code="invalid_url") from None
    if len(data) > most:
        raise refused(f"the file has more than {most:,} bytes.", param=item.param, code="invalid_image")
    return data


def checked_media(item: Reference, source: bytes | Path, limits: Limits) -> CheckedMedia:
    """Look at the first bytes and the header.

    Raises:
        FaultError: no image that is read here. ImageError, VideoError: too large, broken.
    """
    if item.kind == "video":
        clip = clip_from(source, max_pixels=limits.pixels, max_frames=MAX_CLIP_FRAMES)
        return CheckedMedia("video", source, item.param, size=clip.size)
    assert isinstance(source, bytes)
    if not is_image(source):
        raise refused(
            f"the data is no image that is read here: {_IMAGE_NAMES}.", param=item.param, code="invalid_image"
        )
    with opened(source, "the image") as image:
        check_size(image.width, image.height, "the image", limits.pixels)
        return CheckedMedia("image", source, item.param, pixels=image.width * image.height)


def is_image(data: bytes) -> bool:
    """True of the first bytes of a PNG, JPEG, WebP or GIF."""
    return data.startswith(_IMAGES) or (data[:4] == b"RIFF" and data[8:12] == b"WEBP")


def decoded_from_checked(items: Sequence[CheckedMedia], limits: Limits) -> DecodedMedia:
    """Decode the images; clips stay files. Takes time and memory: not for an event loop.

    Raises:
        ImageError: one is broken.
    """
    images, videos, sizes = [], [], []
    for item in items:
        if item.kind == "image":
            image = image_from(item.source, max_pixels=limits.pixels)
            images.append(image)
            sizes.append(image.size)
    for item in items:
        if item.kind == "video":
            videos.append(item.source)
            sizes.append(item.size)
    return DecodedMedia(Media(tuple(images), tuple(videos)), tuple(sizes))
