"""Images and clips come from where they may, and are what they say."""

from __future__ import annotations

import asyncio
import http.server
import io
import json
import os
import struct
import threading
import zlib
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from http_cases import data_url, encoded, image_part
from PIL import Image

from holov_export.errors import BusyError, HolovExportError, ImageError, LateError, UsageError, VideoError
from holov_export.serve.body import Room, Shelf
from holov_export.serve.faults import FaultError
from holov_export.serve.limits import Limits
from holov_export.serve.parts import (
    Reference,
    Sources,
    check_reference,
    checked_from_reference,
    decoded_from_checked,
    references_from_request,
)
from holov_export.serve.remote import RemoteImages, is_public
from holov_export.serve.wire import ChatRequest
from holov_export.spec import ModelSpec

LIMITS = Limits(pixels=10_000, body_bytes=200_000, images=2)
NOWHERE = Sources()
PICTURE = Image.fromarray(np.arange(40 * 30 * 3, dtype=np.uint8).reshape(30, 40, 3))


def image(url: str) -> Reference:
    return Reference("image", url, "p")


def read(url: str, sources: Sources = NOWHERE) -> Image.Image:
    check_reference(image(url), sources)
    decoded = decoded_from_checked([checked_from_reference(image(url), sources, LIMITS)], LIMITS)
    found = decoded.media.images[0]
    assert isinstance(found, Image.Image)
    assert decoded.sizes == (found.size,)
    return found


def refusal(url: str, sources: Sources = NOWHERE) -> str:
    with pytest.raises((FaultError, HolovExportError)) as caught:
        read(url, sources)
    assert isinstance(caught.value, (FaultError, UsageError))
    return str(caught.value)


# ---------------------------------------------------------------------------------------------------------- data:


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF"])
def test_images_of_four_formats(kind: str) -> None:
    found = read(data_url(encoded(PICTURE, kind), "image/whatever"))
    assert (found.size, found.mode) == ((40, 30), "RGB")


def test_a_png_keeps_every_bit() -> None:
    np.testing.assert_array_equal(np.asarray(read(data_url(encoded(PICTURE)))), np.asarray(PICTURE))


def test_exif_rotation_is_applied() -> None:
    exif = Image.Exif()
    exif[274] = 6
    buffer = io.BytesIO()
    PICTURE.save(buffer, "JPEG", exif=exif)
    assert read(data_url(buffer.getvalue())).size == (30, 40)


@pytest.mark.parametrize("kind", ["BMP", "TIFF", "ICO", "PPM"])
def test_other_formats_are_refused(kind: str) -> None:
    assert "PNG, JPEG, WebP and GIF" in refusal(data_url(encoded(PICTURE, kind)))


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("data:image/png;base64,", "empty"),
        ("data:image/png;base64,!!!!", "not valid base64"),
        ("data:image/png;base64,AAA", "not valid base64"),
        ("data:image/png,AAAA", "must be"),
        ("data:", "must be"),
        ("", "no URL"),
        ("blob:x", "no URL"),
        ("ftp://example.com/a.png", "no URL"),
        ("javascript:alert(1)", "no URL"),
        ("/etc/passwd", "no URL"),
        (data_url(b"hello there, no image"), "no image"),
        (data_url(encoded(PICTURE)[:200]), "damaged"),
        (data_url(encoded(PICTURE)[:20]), "image"),
        ("file:///etc/passwd", "--media-folder"),
        ("FILE:///etc/passwd", "--media-folder"),
        ("http://127.0.0.1/a.png", "--allow-remote"),
        ("https://example.com/a.png", "--allow-remote"),
    ],
)
def test_what_is_no_image_is_refused(url: str, words: str) -> None:
    assert words in refusal(url)


def test_white_space_and_percent_signs_within_base64() -> None:
    url = data_url(encoded(PICTURE))
    assert read(url[:60] + "\n " + url[60:]).size == (40, 30)
    assert read(url.replace("+", "%2B").replace("=", "%3D")).size == (40, 30)


def bomb(side: int) -> bytes:
    """A PNG of a few kilobytes that says it has side x side pixels."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + chunk(b"IDAT", zlib.compress(bytes(100_000)))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("side", [101, 5000, 60_000])
def test_too_many_pixels_are_refused_from_the_header(side: int) -> None:
    item = image(data_url(bomb(side)))
    with pytest.raises(ImageError, match="too large"):
        checked_from_reference(item, Sources(), LIMITS)


def test_pixels_are_counted_before_they_are_made() -> None:
    assert checked_from_reference(image(data_url(encoded(PICTURE))), Sources(), LIMITS).pixels == 1200


# ---------------------------------------------------------------------------------------------------------- file:


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """media/inside.png, a link out of it, a pipe, a folder; and secret.png beside it."""
    media = tmp_path / "media"
    (media / "deep").mkdir(parents=True)
    (media / "inside.png").write_bytes(encoded(PICTURE))
    (media / "a b.png").write_bytes(encoded(PICTURE))
    (media / "large.png").write_bytes(encoded(PICTURE) + bytes(300_000))
    (tmp_path / "secret.png").write_bytes(encoded(PICTURE))
    (tmp_path / "media-more").mkdir()
    (tmp_path / "media-more" / "x.png").write_bytes(encoded(PICTURE))
    (media / "out.png").symlink_to(tmp_path / "secret.png")
    (media / "in.png").symlink_to(media / "inside.png")
    (media / "loop.png").symlink_to(media / "loop.png")
    os.mkfifo(media / "pipe.png")
    return media


def test_files_of_the_folder(folder: Path) -> None:
    sources = Sources(folder)
    for url in (
        f"file://{folder}/inside.png",
        f"file://localhost{folder}/inside.png",
        f"file://{folder}/a%20b.png",
        f"file://{folder}/deep/../inside.png",
        f"file://{folder}/in.png",
    ):
        assert read(url, sources).size == (40, 30)


@pytest.mark.parametrize(
    "end",
    [
        "/../secret.png",
        "/%2e%2e/secret.png",
        "/..%2Fsecret.png",
        "/deep/../../secret.png",
        "/out.png",
        "/loop.png",
        "/pipe.png",
        "/deep",
        "/nowhere.png",
        "/inside.png%00.txt",
        "/%ff",
        "/" + "a" * 300,
        "-more/x.png",
        "/inside.png?x",
        "",
    ],
)
def test_what_is_not_in_the_folder_is_refused_in_the_same_words(folder: Path, end: str) -> None:
    assert refusal(f"file://{folder}{end}", Sources(folder)) == "there is no such file inside the media folder."


@pytest.mark.parametrize(
    "url", ["file:inside.png", "file://host/inside.png", "file://inside.png", "file:////x", "file:"]
)
def test_other_file_urls_are_refused(folder: Path, url: str) -> None:
    assert "inside the media folder" in refusal(url, Sources(folder))


def test_a_large_file_is_refused(folder: Path) -> None:
    assert "more than 200,000 bytes" in refusal(f"file://{folder}/large.png", Sources(folder))


# --------------------------------------------------------------------------------------------------------- clips


def test_clips(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (40, 30), (index * 60, 0, 0)) for index in range(3)]
    buffer = io.BytesIO()
    frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:])
    item = Reference("video", data_url(buffer.getvalue(), "video/gif"), "p")
    checked = checked_from_reference(item, Sources(), LIMITS)
    assert (checked.size, checked.pixels) == ((40, 30), 0)
    decoded = decoded_from_checked([checked], LIMITS)
    assert (len(decoded.media.images), decoded.media.videos) == (0, (buffer.getvalue(),))
    with pytest.raises(VideoError):
        checked_from_reference(Reference("video", data_url(b"#EXTM3U\nfile:///etc/passwd"), "p"), Sources(), LIMITS)
    with pytest.raises(FaultError, match="not fetched"):
        check_reference(Reference("video", "https://example.com/a.mp4", "p"), Sources(remote=True))


def test_numbers_of_images_and_clips(llava_spec: ModelSpec) -> None:
    def request(*parts: dict[str, object]) -> ChatRequest:
        body = {"model": "m", "messages": [{"role": "user", "content": list(parts)}]}
        return ChatRequest.model_validate_json(json.dumps(body))

    found = references_from_request(request(image_part("data:a"), image_part("data:b")), LIMITS, llava_spec)
    assert [(item.url, item.param) for item in found] == [
        ("data:a", "messages.0.content.0.image_url.url"),
        ("data:b", "messages.0.content.1.image_url.url"),
    ]
    with pytest.raises(FaultError, match="3 images, more than 2"):
        references_from_request(request(*[image_part("data:a")] * 3), LIMITS, llava_spec)
    with pytest.raises(UsageError, match="takes no videos"):
        references_from_request(request({"type": "video_url", "video_url": {"url": "data:"}}), LIMITS, llava_spec)


# --------------------------------------------------------------------------------------------------------- http:


@dataclass
class Site:
    """A server of images, and what it was asked."""

    port: int = 0
    asked: list[tuple[str, str]] = field(default_factory=list)


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    found = Site()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            found.asked.append((self.path, self.headers["host"]))
            kind, _, rest = self.path[1:].partition("/")
            if kind == "to":
                self.send_response(302)
                self.send_header("location", "http://" + rest if rest else self.path)
                self.end_headers()
                return
            if kind == "slow":
                threading.Event().wait(1)
            body = {"html": b"<html>" * 10, "large": encoded(PICTURE) + bytes(300_000)}.get(kind, encoded(PICTURE))
            self.send_response(404 if kind == "none" else 200)
            if kind != "large":
                self.send_header("content-length", str(len(body)))
            self.end_headers()
            with suppress(OSError):
                self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    found.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    yield found
    server.shutdown()
    server.server_close()
    thread.join()


async def to_here(host: str, port: int) -> Sequence[str]:
    """Every name is this machine, but for those that are said to be private."""
    return ["10.0.0.1"] if host == "private.test" else ["127.0.0.1"]


def fetched(url: str, *, trusting: bool = True, seconds: float = 10) -> bytes:
    images = RemoteImages(
        200_000,
        seconds=seconds,
        resolve=to_here,
        may_ask=(lambda address: address == "127.0.0.1") if trusting else is_public,
    )
    return asyncio.run(images.fetch(image(url)))


def test_an_image_is_fetched_by_its_name(site: Site) -> None:
    assert fetched(f"http://pictures.test:{site.port}/ok") == encoded(PICTURE)
    assert site.asked[-1] == ("/ok", f"pictures.test:{site.port}")
    assert fetched(f"http://pictures.test:{site.port}/to/other.test:{site.port}/ok") == encoded(PICTURE)
    assert site.asked[-1] == ("/ok", f"other.test:{site.port}")


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("html", "no image"),
        ("large", "more than 200,000 bytes"),
        ("none", "answered 404"),
        ("slow", "took more than"),
        ("to", "redirects more than 3 times"),
        ("to/private.test/x", "not a public one"),
        ("to/user:word@pictures.test/x", "only plain http"),
    ],
)
def test_what_is_not_fetched(site: Site, path: str, words: str) -> None:
    url = f"http://pictures.test:{site.port}/{path}"
    with pytest.raises(FaultError, match=words):
        fetched(url, seconds=0.2 if path == "slow" else 10)


def test_this_machine_is_never_asked(site: Site) -> None:
    before = len(site.asked)
    for host in ("pictures.test", "127.0.0.1"):
        with pytest.raises(FaultError, match="not a public one"):
            fetched(f"http://{host}:{site.port}/ok", trusting=False)
    assert len(site.asked) == before


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "0.0.0.0", "100.64.0.1", "224.0.0.1",
        "255.255.255.255", "::1", "::", "fe80::1%eth0", "fc00::1", "ff02::1", "::ffff:127.0.0.1", "::ffff:10.0.0.1",
        "64:ff9b::7f00:1", "2002:7f00:1::", "2001:db8::1", "localhost", "",
    ],
)  # fmt: skip
def test_addresses_that_are_not_public(address: str) -> None:
    assert not is_public(address)


def test_addresses_that_are_public() -> None:
    assert all(map(is_public, ["8.8.8.8", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808"]))


# -------------------------------------------------------------------------------------------------------- memory


def test_room_is_given_in_the_order_of_arrival() -> None:
    async def run() -> list[str]:
        room, order = Room(10, 5), list[str]()
        first = await room.enter(8)

        async def wait(name: str, amount: int) -> None:
            lease = await room.enter(amount)
            order.append(name)
            lease.end()

        tasks = [asyncio.create_task(wait("large", 500))]
        await asyncio.sleep(0)
        tasks.append(asyncio.create_task(wait("small", 1)))
        left = asyncio.create_task(wait("left", 1))
        await asyncio.sleep(0)
        left.cancel()
        first.end()
        first.end()
        await asyncio.gather(*tasks)
        (await asyncio.wait_for(room.enter(10), 1)).end()
        return order

    assert asyncio.run(run()) == ["large", "small"]


def test_nobody_waits_for_room_forever() -> None:
    async def run() -> None:
        room = Room(10, 0.02)
        lease = await room.enter(10)
        with pytest.raises(LateError):
            await room.enter(1)
        lease.end()
        await room.enter(10)

    asyncio.run(run())


def test_bodies_beyond_the_shelf_are_refused() -> None:
    shelf = Shelf(10)
    shelf.put(8)
    with pytest.raises(BusyError):
        shelf.put(3)
    shelf.take(8)
    shelf.put(10)
