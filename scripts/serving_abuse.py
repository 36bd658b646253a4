"""What a server meets on the Internet: clients that leave, read slowly, lie, or want all of its memory.

Each function does one of these and says what came back: an HTTP status, or 0 where the connection ended.
"""

from __future__ import annotations

import asyncio
import base64
import json
import random
import struct
import zlib
from collections.abc import AsyncIterator
from typing import Any

import httpx

_READ_SECONDS = 120


def bomb(width: int, height: int) -> bytes:
    """A PNG that is small and says that it is large: black rows, 8 bits a pixel."""
    row = b"\x00" * (width + 1)
    packer = zlib.compressobj(9)
    packed = b"".join(packer.compress(row * min(512, height - top)) for top in range(0, height, 512)) + packer.flush()
    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        _chunk(*item) for item in ((b"IHDR", head), (b"IDAT", packed), (b"IEND", b""))
    )


def lying_png(width: int, height: int) -> bytes:
    """Says that it has few pixels and holds the data of many."""
    packed = zlib.compress(b"\x00" * 50_000_000, 9)
    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        _chunk(*item) for item in ((b"IHDR", head), (b"IDAT", packed), (b"IEND", b""))
    )


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def malformed_bodies(good: dict[str, Any]) -> list[bytes]:
    """None of them is a request."""
    text = json.dumps(good).encode()
    return [
        b"",
        b"{",
        b"null",
        b"[]",
        text[: len(text) // 2],
        text + b"}",
        b"\xff\xfe" + text,
        text.replace(b'"messages"', b'"massages"'),
        json.dumps({**good, "messages": []}).encode(),
        json.dumps({**good, "messages": "hello"}).encode(),
        json.dumps({**good, "max_tokens": -1}).encode(),
        json.dumps({**good, "max_tokens": 10**9}).encode(),
        json.dumps({**good, "temperature": 1e300}).encode(),
        json.dumps({**good, "budget": 0}).encode(),
        json.dumps({**good, "budget": 10**9}).encode(),
        json.dumps({**good, "budget": "many"}).encode(),
        json.dumps({**good, "n": 1000}).encode(),
        json.dumps({**good, "model": "../../etc/passwd"}).encode(),
        b'{"messages":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"a":' * 20_000 + b"1" + b"}" * 20_000,
    ]


def escaping_urls(folder: str, outside: str) -> list[str]:
    """Of files that are outside `folder` or none; `outside` is one that exists."""
    return [
        "file:///etc/passwd",
        f"file://{outside}",
        f"file:{outside}",
        f"file://{folder}/../{outside.rsplit('/', 1)[-1]}",
        f"file://{folder}/%2e%2e/{outside.rsplit('/', 1)[-1]}",
        f"file://{folder}/..%2f{outside.rsplit('/', 1)[-1]}",
        f"file://{folder}/%2e%2e%2f%2e%2e%2fetc/passwd",
        f"file://{folder}/link.png",
        f"file://{folder}/good.png%00.txt",
        f"file://localhost{folder}/../../../../../../etc/passwd",
        "file://evil.example/etc/passwd",
        "file:///dev/zero",
        "file:///proc/self/mem",
        f"file://{folder}",
        "http://127.0.0.1:1/x.png",
        "ftp://127.0.0.1/x.png",
        "data:image/png;base64,!!!!",
        "data:image/png;base64," + base64.b64encode(b"GIF89a nothing").decode(),
    ]


async def post(client: httpx.AsyncClient, url: str, body: bytes) -> tuple[int, bytes]:
    """Status and body of an answer to these bytes."""
    try:
        response = await client.post(
            f"{url}/v1/chat/completions", content=body, headers={"content-type": "application/json"}
        )
    except httpx.HTTPError:
        return 0, b""
    return response.status_code, response.content


async def huge_body(client: httpx.AsyncClient, url: str, size: int, *, says: bool) -> int:
    """A body of `size` bytes; the client says how long it is, or sends it in chunks without."""
    piece = b" " * (1 << 16)

    async def content() -> AsyncIterator[bytes]:
        for start in range(0, size, len(piece)):
            yield piece[: size - start]

    headers = {"content-type": "application/json", **({"content-length": str(size)} if says else {})}
    try:
        return (await client.post(f"{url}/v1/chat/completions", content=content(), headers=headers)).status_code
    except httpx.HTTPError:
        return 0


async def leaving(port: int, body: dict[str, Any], dice: random.Random) -> int:
    """Ask, read a little or nothing, and cut the connection. Returns the bytes that were read."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    content = json.dumps(body).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: application/json\r\n"
    writer.write(f"{head}Content-Length: {len(content)}\r\n\r\n".encode())
    cut = dice.choice(("in the body", "at once", "soon", "in the stream", "in the stream"))
    writer.write(content[: len(content) // 2] if cut == "in the body" else content)
    read = 0
    try:
        await writer.drain()
        if cut == "soon":
            await asyncio.sleep(dice.uniform(0, 0.05))
        for _ in range(dice.randint(1, 4) if cut == "in the stream" else 0):
            read += len(await asyncio.wait_for(reader.read(300), _READ_SECONDS))
    except OSError:
        pass
    writer.transport.abort()
    return read


async def slow_reading(port: int, body: dict[str, Any], pause: float) -> tuple[int, bytes]:
    """Ask, and read the answer a few bytes at a time through small buffers: status and content."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=512)
    content = json.dumps(body).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: application/json\r\n"
    writer.write(f"{head}Connection: close\r\nContent-Length: {len(content)}\r\n\r\n".encode() + content)
    found = b""
    try:
        while data := await asyncio.wait_for(reader.read(256), _READ_SECONDS):
            found += data
            await asyncio.sleep(pause)
    except OSError:
        return 0, found
    writer.close()
    return int(found.split(b" ", 2)[1]) if found.startswith(b"HTTP/") else 0, found
