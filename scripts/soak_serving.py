#!/usr/bin/env python3
"""Whether `holov-export serve` stays well under rude clients: right answers, right refusals, flat memory, exit code 0.

Starts the real server on 127.0.0.1 with a small queue, and asks every question once, one after the other. Then rounds
of clients that come all together: plain and streamed questions, whose texts must equal those first ones, between
clients that leave, that read slowly, and that send what must be refused. Two bursts: within the connections that the
server keeps, where only 200 and 429 may come, and of 1000 at once, where uvicorn's own plain 503 for too many
connections may come as well (see docs/serve.md).

Exit code 1 if anything was wrong.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import random
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from machine import one_line, write_result
from rich.console import Console
from rich.table import Table
from serving_process import Scene, ServerProcess, chat_body, demo_scenes, uri_of

BUDGETS = (16, 144)
FURTHER_QUESTION = "what is in the picture?"
QUEUE, BODY_BYTES, PIXELS = 64, 8 << 20, 4_000_000
#: uvicorn answers 503 to more connections than four times the queue and 64
BURST, BURST_WITHIN = 1000, 240
ROUNDS, CLIENTS = 6, (24, 32, 48, 64)
FLAT = 0.05
_PATH = "/v1/chat/completions"
_TRIES, _LONGEST_PAUSE = 40, 1.0


@dataclass(frozen=True)
class Bad:
    """A request that must be refused.

    Attributes:
        kind: its row of the table. statuses: one of these is right.
    """

    kind: str
    body: bytes
    statuses: tuple[int, ...] = (400,)
    content_type: str = "application/json"


@dataclass(frozen=True)
class Good:
    """A question, and its body without `stream`."""

    key: str
    body: dict[str, Any]


@dataclass
class Tally:
    """What came of all requests.

    Attributes:
        counts: by kind and status; 0 is a connection that the server ended.
        right: good requests that had their own answer. refusals: texts that were said to file URLs.
    """

    counts: Counter[tuple[str, int]] = field(default_factory=Counter)
    right: int = 0
    problems: list[str] = field(default_factory=list)
    refusals: set[str] = field(default_factory=set)

    def add(self, kind: str, status: int, allowed: tuple[int, ...], note: str = "") -> None:
        self.counts[kind, status] += 1
        if status not in allowed:
            self.problem(f"{kind}: status {status} {note[:200]}")

    def problem(self, text: str) -> None:
        self.problems.append(text)


@dataclass(frozen=True)
class Sample:
    """The server after a round."""

    after: str
    clients: int
    seconds: float
    rss_mb: float
    files: int
    threads: int


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, rows: bytes, *, before: bytes = b"") -> bytes:
    """A grey PNG; `rows` is what its pixels decompress to, `before` are chunks in front of them."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + before + chunk(b"IDAT", zlib.compress(rows, 9)) + chunk(b"IEND", b"")


def bombs() -> dict[str, bytes]:
    """Small files that are large once they are decoded."""
    text = chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(64 << 20), 9))
    return {
        "header of 50000x50000": png(50_000, 50_000, bytes(64)),
        "real 8000x8000": png(8000, 8000, bytes(8001 * 8000)),
        "text chunk of 64 MiB": png(8, 8, bytes(9 * 8), before=text),
        "GIF of 50000x50000": b"GIF89a" + struct.pack("<HH", 50_000, 50_000) + b"\x00\x00\x00;",
    }


def prepared_media(work: Path) -> Path:
    """The media folder: one good picture, and links to a picture beside the folder."""
    folder = work / "media"
    folder.mkdir()
    picture = png(84, 84, bytes(85 * 84))
    (work / "secret.png").write_bytes(picture)
    (folder / "good.png").write_bytes(picture)
    (folder / "inner").mkdir()
    (folder / "link.png").symlink_to(work / "secret.png")
    (folder / "out").symlink_to(work)
    (folder / "loop.png").symlink_to(folder / "loop.png")
    os.mkfifo(folder / "pipe.png")
    return folder


def outside_urls(folder: Path) -> list[str]:
    """What a client may not have, and what is not there; if one is let in, its picture is answered with 200."""
    up, name = folder.parent.as_posix(), folder.as_posix()
    inside = ("../secret.png", "%2e%2e/secret.png", "%2e%2e%2fsecret.png", "inner/../../secret.png", "..%5csecret.png")
    links = ("link.png", "out/secret.png", "loop.png", "pipe.png", "inner", "none.png", "good.png%00", "%ff.png")
    return [
        *(f"file://{name}/{end}" for end in (*inside, *links)),
        *(f"file://{path}" for path in ("/etc/passwd", "/proc/self/environ", f"{up}/secret.png", f"{name}-no/x.png")),
        f"file://elsewhere{name}/good.png",
        "file:good.png",
    ]


def bad_requests(good: dict[str, Any], folder: Path) -> list[Bad]:
    """Every kind of refusal that needs no client of its own.

    Args:
        good: a body that would be answered.
    """

    def changed(**fields: Any) -> bytes:
        return json.dumps({**good, **fields}).encode()

    def about(url: Any, times: int = 1) -> bytes:
        image = {"type": "image_url", "image_url": {"url": url}}
        text = {"type": "text", "text": FURTHER_QUESTION}
        return changed(messages=[{"role": "user", "content": [*[image] * times, text]}])

    whole = json.dumps(good).encode()
    broken = [whole[:-9], b"", b"\xff\xfe{", b"[" * 100_000, b"null", b'{"model": NaN}', whole + b"}", b"{'a': 1}"]
    wrong: list[dict[str, Any]] = [
        {"max_tokens": "many"},
        {"max_tokens": 0},
        {"max_tokens": 10**6},
        {"max_tokens": 1.5},
        {"budget": 0},
        {"budget": -(10**30)},
        {"budget": 10**6},
        {"budget": True},
        {"temperature": 9},
        {"temperature": "0"},
        {"stream": "yes"},
        {"stop": [1]},
        {"seed": []},
        {"messages": {}},
        {"messages": []},
        {"messages": [{"role": "user", "content": 7}]},
        {"messages": [{"role": "thief", "content": "x"}]},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]},
        {"messages": [{"role": "user", "content": [{"type": "smell", "smell": "x"}]}]},
        {"messages": [{"role": "user", "content": "x" * 200_000}]},
        {"model": None},
    ]
    asks: list[dict[str, Any]] = [
        {"n": 2},
        {"tools": [{}]},
        {"response_format": {"type": "json_object"}},
        {"logprobs": True},
    ]
    remote = ["http://127.0.0.1/x.png", "https://example.com/x.png", "HTTP://[::1]/x", "ftp://example.com/x", "x.png"]
    data = ["data:image/png;base64,!!!", "data:image/png;base64,", "data:,x", uri_of(b"no picture")]
    truncated = uri_of(png(300, 300, bytes(10)))
    return [
        *(Bad("malformed JSON", body, (400, 413) if len(body) == 100_000 else (400,)) for body in broken),
        *(Bad("wrong type or value", changed(**fields)) for fields in wrong),
        *(Bad("feature it does not have", changed(**fields)) for fields in asks),
        *(Bad("path outside", about(url)) for url in outside_urls(folder)),
        *(Bad("remote or odd URL", about(url)) for url in remote),
        *(Bad("no picture in data URL", about(url)) for url in (*data, truncated)),
        *(Bad(f"bomb: {name}", about(uri_of(data))) for name, data in bombs().items() for _ in range(4)),
        Bad("too many images", about(uri_of(png(8, 8, bytes(72))), 20)),
        Bad("unknown model", changed(model="gpt-none"), (404,)),
        Bad("not application/json", whole, (415,), "text/plain"),
        Bad("too many values", b'{"a": [' + b"0," * 1_000_000 + b"0]}", (413,)),
    ]


def text_of_events(lines: list[str]) -> str | None:
    """The text of a stream; None if it did not end well."""
    text, ended, done = "", False, False
    for line in lines:
        if line == "data: [DONE]":
            done = True
        elif line.startswith("data: "):
            event = json.loads(line[6:])
            for choice in event.get("choices", ()):
                text += choice["delta"].get("content") or ""
                ended = ended or choice["finish_reason"] is not None
    return text if ended and done else None


def without_chunks(data: bytes) -> bytes:
    """The body of a chunked answer."""
    found, rest = b"", data
    while rest:
        head, _, rest = rest.partition(b"\r\n")
        size = int(head or b"0", 16)
        found, rest = found + rest[:size], rest[size + 2 :]
        if size == 0:
            break
    return found


class Visitor:
    """All clients, and what comes of them."""

    def __init__(self, server: ServerProcess, good: list[Good], bad: list[Bad], seed: int) -> None:
        self.server, self.good = server, good
        self.tally, self.random = Tally(), random.Random(seed)
        self.bad = itertools.cycle(self.random.sample(bad, len(bad)))
        self.answers: dict[str, str] = {}
        self.http = self.client()

    def client(self) -> httpx.AsyncClient:
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=64, keepalive_expiry=2)
        return httpx.AsyncClient(base_url=self.server.url, timeout=180, limits=limits, trust_env=False)

    async def ask_sequentially(self) -> None:
        """What every later answer is compared with."""
        for item in self.good:
            reply = await self.http.post(_PATH, json=item.body)
            if reply.status_code != 200:
                raise SystemExit(f"the first question got {reply.status_code}: {reply.text[:300]}")
            self.answers[item.key] = reply.json()["choices"][0]["message"]["content"]

    async def plain(self, kind: str = "good, plain", allowed: tuple[int, ...] = (200,)) -> int:
        item = self.random.choice(self.good)
        # fields that nobody knows are left alone
        body = {**item.body, "user": "soak", "a_field_that_nobody_knows": [1]}
        reply = await self.http.post(_PATH, json=body)
        status = self.judged(kind, reply, allowed)
        if status == 200:
            self.compare(kind, item, reply.json()["choices"][0]["message"]["content"])
        return status

    async def streamed(self) -> int:
        item = self.random.choice(self.good)
        body = {**item.body, "stream": True, "kept": self.random.random() < 0.5}
        async with self.http.stream("POST", _PATH, json=body) as reply:
            if reply.status_code != 200:
                await reply.aread()
                return self.judged("good, streamed", reply, (200,))
            lines = [line async for line in reply.aiter_lines()]
        self.tally.add("good, streamed", 200, (200,))
        self.compare("good, streamed", item, text_of_events(lines))
        return 200

    def compare(self, kind: str, item: Good, text: str | None) -> None:
        if text == self.answers[item.key]:
            self.tally.right += 1
        else:
            self.tally.problem(f"{kind}: {item.key} was answered {text!r}, alone {self.answers[item.key]!r}")

    def judged(self, kind: str, reply: httpx.Response, allowed: tuple[int, ...]) -> int:
        """Count an answer; a 429 must say when to come again."""
        status = reply.status_code
        if status == 429:
            if not reply.headers.get("retry-after", "").isdigit():
                self.tally.problem(f"{kind}: 429 without Retry-After")
            allowed = (*allowed, 429)
        if status == 503 and reply.headers.get("content-type", "").startswith("application/json"):
            allowed = ()  # of the server itself, and not of uvicorn: it let somebody wait for too long
        self.tally.add(kind, status, allowed, reply.text)
        if 400 <= status < 500 and "error" not in reply.json():
            self.tally.problem(f"{kind}: {status} without an error: {reply.text[:200]}")
        return status

    async def refused(self) -> int:
        item = next(self.bad)
        reply = await self.http.post(_PATH, content=item.body, headers={"content-type": item.content_type})
        status = self.judged(item.kind, reply, item.statuses)
        if item.kind == "path outside" and status == 400:
            self.tally.refusals.add(reply.json()["error"]["message"])
        return status

    async def connected(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection("127.0.0.1", self.server.port)

    def head(self, *fields: str) -> bytes:
        lines = [f"POST {_PATH} HTTP/1.1", "Host: 127.0.0.1", "Content-Type: application/json", *fields]
        return ("\r\n".join(lines) + "\r\n\r\n").encode()

    async def leaving(self) -> int:
        """Leaves with half a body sent, before the answer, or in the middle of a stream; politely or not."""
        item, when = (
            self.random.choice(self.good),
            self.random.choice(("in its body", "before the answer", "in a stream")),
        )
        body = json.dumps({**item.body, "stream": when == "in a stream"}).encode()
        reader, writer = await self.connected()
        with suppress(ConnectionError, asyncio.TimeoutError):
            sent = body[: len(body) // 2] if when == "in its body" else body
            writer.write(self.head(f"Content-Length: {len(body)}") + sent)
            await writer.drain()
            if when == "in a stream":
                await asyncio.wait_for(reader.read(self.random.choice((1, 300))), 60)
            else:
                await asyncio.sleep(self.random.uniform(0, 0.05))
        if self.random.random() < 0.5:
            writer.transport.abort()
        writer.close()
        self.tally.add(f"leaves {when}", 0, (0,))
        return 0

    async def slow(self) -> int:
        """Takes a stream in small bites through a small buffer."""
        item = self.random.choice(self.good)
        body = json.dumps({**item.body, "stream": True, "kept": True}).encode()
        plain = socket.socket()
        plain.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        plain.setblocking(False)
        await asyncio.get_running_loop().sock_connect(plain, ("127.0.0.1", self.server.port))
        reader, writer = await asyncio.open_connection(sock=plain, limit=1024)
        writer.write(self.head(f"Content-Length: {len(body)}", "Connection: close") + body)
        found = b""
        while data := await asyncio.wait_for(reader.read(256), 120):
            found += data
            await asyncio.sleep(0.02)
        writer.close()
        top, _, rest = found.partition(b"\r\n\r\n")
        status = int(top.split(b" ", 2)[1])
        self.tally.add("good, slow reader", status, (200, 429), rest.decode(errors="replace"))
        if status == 200:
            text = text_of_events(without_chunks(rest).decode().splitlines())
            self.compare("good, slow reader", item, text)
        return status

    async def huge(self) -> int:
        """100 MB with their length or in chunks, or 12 MB; of 100 MB the connection may end before 413 is read."""
        name, size = self.random.choice(
            (("100 MB, length", 100 << 20), ("100 MB, chunks", 100 << 20), ("12 MB", 12 << 20))
        )
        chunked = name.endswith("chunks")
        reader, writer = await self.connected()
        reading = asyncio.ensure_future(reader.read(4096))
        block = b" " * (1 << 18)
        framed = b"%x\r\n%s\r\n" % (len(block), block) if chunked else block
        with suppress(ConnectionError):
            writer.write(self.head("Transfer-Encoding: chunked" if chunked else f"Content-Length: {size}"))
            for _ in range(size // len(block)):
                writer.write(framed)
                await writer.drain()
                if reading.done() and size > BODY_BYTES * 8:
                    break
        top = b""
        with suppress(ConnectionError):
            top = await asyncio.wait_for(reading, 60)
        writer.transport.abort()
        status = int(top.split(b" ", 2)[1]) if top.startswith(b"HTTP/1.1 ") else 0
        self.tally.add(f"body of {name}", status, (413, 429) if size < BODY_BYTES * 8 else (413, 429, 0))
        return status

    async def one(self) -> None:
        """One request of the mix; like a polite client it comes again after 429."""
        kinds: list[Callable[[], Awaitable[int]]] = [self.plain, self.streamed, self.leaving, self.slow, self.refused]
        ask = self.random.choices([*kinds, self.huge], weights=[26, 26, 12, 4, 29, 3])[0]
        for _ in range(_TRIES):
            try:
                if await ask() != 429:
                    return
            except (httpx.HTTPError, OSError, asyncio.TimeoutError) as error:
                self.tally.problem(f"{ask.__name__}: {type(error).__name__} {error}")
                return
            await asyncio.sleep(self.random.uniform(0.2, _LONGEST_PAUSE))
        self.tally.problem(f"{ask.__name__}: refused {_TRIES} times with 429")

    async def round(self, requests: int, clients: int, ends: float) -> None:
        left = iter(range(requests))

        async def client() -> None:
            for _ in left:
                if time.monotonic() > ends:
                    return
                await self.one()

        await asyncio.gather(*(client() for _ in range(clients)))

    async def burst(self, count: int) -> None:
        """All at once, each once."""
        kind = f"burst of {count}"
        over = count > BURST_WITHIN

        async def one() -> None:
            try:
                await self.plain(kind, (200, 503) if over else (200,))
            except httpx.HTTPError as error:
                self.tally.add(kind, 0, (0,) if over else (), type(error).__name__)

        await asyncio.gather(*(one() for _ in range(count)))
        if not self.tally.counts[kind, 429]:
            self.tally.problem(f"{kind}: nobody got 429")

    async def idle(self) -> None:
        """End all idle connections, and wait until nothing is in hand; that must not take long."""
        await self.http.aclose()
        await asyncio.sleep(0.5)
        self.http = self.client()
        load: dict[str, Any] = {}
        for _ in range(100):
            try:
                reply = await self.http.get("/health")
            except httpx.HTTPError as error:
                self.tally.problem(f"/health: {type(error).__name__} {error}")
                return
            load = reply.json()
            if reply.status_code == 200 and not (load["queued"] or load["seeing"] or load["decoding"]):
                return
            await asyncio.sleep(0.2)
        self.tally.problem(f"20 s after its last client the server still has something in hand: {load}")


def good_requests(model: str) -> list[Good]:
    """Every demo picture with every question and budget."""
    scenes = demo_scenes()
    questions = [*dict.fromkeys(item.question for item in scenes), FURTHER_QUESTION]
    return [
        Good(f"scene {number}, '{question}', {budget}", body)
        for number, scene in enumerate(scenes)
        for question in questions
        for budget in BUDGETS
        for body in [chat_body(model, Scene(scene.uri, question), stream=False, max_tokens=24, budget=budget)]
    ]


async def soak(server: ServerProcess, folder: Path, options: argparse.Namespace) -> tuple[Visitor, list[Sample]]:
    model = httpx.get(f"{server.url}/v1/models", timeout=30).json()["data"][0]["id"]
    good = good_requests(model)
    visitor = Visitor(server, good, bad_requests(good[0].body, folder), options.seed)
    await visitor.ask_sequentially()
    samples: list[Sample] = []

    def sample(after: str, clients: int, began: float) -> None:
        rss = round(server.rss / 1e6, 1)
        samples.append(Sample(after, clients, round(time.monotonic() - began, 1), rss, server.files, server.threads))
        print(f"{after}: {rss} MB", file=sys.stderr, flush=True)

    sample("start", 1, time.monotonic())
    ends = time.monotonic() + options.seconds
    for number in range(ROUNDS):
        if not server.alive or time.monotonic() > ends:
            break
        began, clients = time.monotonic(), CLIENTS[min(number, len(CLIENTS) - 1)]
        await visitor.round(options.requests // ROUNDS, clients, ends)
        if number in (0, ROUNDS // 2):  # memory after the second must be what it was after the first
            await visitor.burst(BURST_WITHIN)
            await visitor.burst(BURST)
        await visitor.idle()
        if not server.alive:
            break
        sample(f"round {number + 1}", clients, began)
    await visitor.http.aclose()
    return visitor, samples


def check_end(visitor: Visitor, samples: list[Sample], alive: bool, server: ServerProcess) -> float:
    """What only the end shows; comes back with the largest distance of the memory from the second round's."""
    tally = visitor.tally
    if not alive:
        tally.problem("the server died")
    if server.exit_code != 0:
        tally.problem(f"SIGTERM ended it with {server.exit_code}")
    if len(tally.refusals) > 1:
        tally.problem(f"file URLs are refused in different words: {sorted(tally.refusals)}")
    if "Traceback" in server.log or "internal error" in server.log:
        tally.problem(f"the server's log has a traceback: {server.log[-1500:]}")
    accepted = sum(
        count for (kind, status), count in tally.counts.items() if status == 200 and kind.startswith(("good", "burst"))
    )
    if accepted != tally.right:
        tally.problem(f"{accepted} good requests were accepted, {tally.right} had their answers")
    later = [item for item in samples if item.after.startswith("round")][1:]
    if len(later) < 2:
        tally.problem("too few rounds to see whether memory grows; give it more --seconds")
        return 0.0
    drift = max((abs(item.rss_mb / later[0].rss_mb - 1) for item in later), default=0.0)
    if drift > FLAT:
        tally.problem(f"memory moved by {drift:.1%} from the second round on")
    if later[-1].files > later[0].files + 8:
        tally.problem(f"open files grew from {later[0].files} to {later[-1].files}")
    return drift


def show(visitor: Visitor, samples: list[Sample], drift: float) -> None:
    console = Console(width=110)
    table = Table("kind", "status", "count", title=one_line())
    for (kind, status), count in sorted(visitor.tally.counts.items()):
        table.add_row(kind, str(status) if status else "ended", str(count))
    console.print(table)
    curve = Table("after", "clients", "s", "RSS, MB", "files", "threads")
    for item in samples:
        curve.add_row(
            item.after,
            str(item.clients),
            *(str(n) for n in (item.seconds, item.rss_mb)),
            str(item.files),
            str(item.threads),
        )
    console.print(curve)
    total = sum(visitor.tally.counts.values())
    console.print(f"{total} requests, {visitor.tally.right} answers as alone, memory within {drift:.1%} of round 2")
    for text, count in Counter(visitor.tally.problems).most_common(20):
        console.print(f"WRONG ({count}x): {text}", markup=False)


def allow_files() -> None:
    """A burst needs more than the usual 1024."""
    import resource

    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 8192) if hard > 0 else 8192, hard))


def bundle_of_demo(work: Path) -> Path:
    line = [sys.executable, "-c", "from holov_export.cli import main; main()", "--model", "demo"]
    bundle = work / "bundle"
    subprocess.run([*line, "--output", str(bundle), "--no-verify"], check=True, capture_output=True)
    return bundle


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, help="of the demo model [default: make one]")
    parser.add_argument("--requests", type=int, default=3000, help="of all rounds, without the bursts [3000]")
    parser.add_argument("--seconds", type=float, default=900, help="no new requests after so long [900]")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the result here")
    options = parser.parse_args()
    allow_files()
    work = Path(tempfile.mkdtemp(prefix="soak-")).resolve()
    try:
        bundle = options.bundle or bundle_of_demo(work)
        folder = prepared_media(work)
        limits = ["--queue", str(QUEUE), "--max-body", str(BODY_BYTES), "--max-pixels", str(PIXELS)]
        server = ServerProcess(bundle, *limits, "--request-timeout", "60s", "--media-folder", str(folder))
        found, alive = None, False
        try:
            with server:
                found = asyncio.run(soak(server, folder, options))
                alive = server.alive
        except SystemExit:  # a wrong exit code is one of the problems that are shown
            if found is None:
                raise
        assert found is not None
        visitor, samples = found
        drift = check_end(visitor, samples, alive, server)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    show(visitor, samples, drift)
    if options.json is not None:
        counts: dict[str, dict[str, int]] = {}
        for (kind, status), count in sorted(visitor.tally.counts.items()):
            counts.setdefault(kind, {})[str(status) if status else "ended"] = count
        result = {
            "limits": {"queue": QUEUE, "body_bytes": BODY_BYTES, "pixels": PIXELS},
            "requests": sum(visitor.tally.counts.values()),
            "answers_as_alone": visitor.tally.right,
            "counts": counts,
            "memory": [vars(item) for item in samples],
            "memory_drift": round(drift, 4),
            "exit_code": server.exit_code,
            "problems": visitor.tally.problems[:50],
        }
        write_result(options.json, result)
    return 1 if visitor.tally.problems else 0


if __name__ == "__main__":
    sys.exit(main())
