#!/usr/bin/env python3
"""A server under everything at once, for some thousand requests: it must not fall, grow, or mix answers up.

Cycles of mixed requests (answers that are read and compared, clients that leave, slow readers, malformed JSON, bodies
of 100 MB, decompression bombs, paths out of the media folder) with a thousand requests at one moment at the end of
each. Every answer is compared with what the same picture, question and budget gave when nothing else was asked; the
random model answers each of them in other words. After each cycle the memory of the idle server is measured.

Exit code 1 if anything is not as it must be; the last lines say what.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import json
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

import httpx
import numpy as np
from machine import one_line, write_result
from PIL import Image
from serving_abuse import (
    bomb,
    escaping_urls,
    huge_body,
    leaving,
    malformed_bodies,
    post,
    slow_reading,
)
from serving_process import Reply, Scene, ServerProcess, chat_body, streamed, uri_of

PICTURES, BUDGETS, NEW_TOKENS = 12, (8, 20, 64), 12
QUESTIONS = ("what is this ?", "is this w100 ?")
QUEUE = 256
FLAT = 0.05
#: how often each kind comes
MIX = {"stream": 40, "whole": 20, "file": 5, "leave": 14, "slow": 4, "malformed": 8, "path": 5, "bomb": 3, "huge": 1}


@dataclass
class Tally:
    """What happened. `wrong` are sentences about what must not happen."""

    kinds: Counter[str] = field(default_factory=Counter)
    answered: int = 0
    compared: int = 0
    refused: int = 0
    wrong: list[str] = field(default_factory=list)

    def expect(self, true: bool, text: str) -> None:
        if not true:
            self.wrong.append(text)


class Soak:
    """One server and what is known about it."""

    def __init__(self, server: ServerProcess, model: str, folder: Path, outside: Path, seed: int) -> None:
        self.server, self.model, self.tally = server, model, Tally()
        self.dice = random.Random(seed)
        self.pngs = [png_of(index) for index in range(PICTURES)]
        self.scenes = {
            (index, question): Scene(uri_of(png), question)
            for index, png in enumerate(self.pngs)
            for question in QUESTIONS
        }
        self.truth: dict[tuple[int, str, int], str] = {}
        self.folder = folder
        (folder / "good.png").write_bytes(self.pngs[0])
        (folder / "link.png").symlink_to(outside)
        self.urls = escaping_urls(str(folder), str(outside))
        self.secret = outside.read_bytes()
        self.bombs = [bomb(30_000, 30_000), bomb(7_000, 7_000), self.pngs[1][:200]]
        self.malformed = malformed_bodies(self.body((0, QUESTIONS[0], 8), stream=False))

    def body(self, key: tuple[int, str, int], *, stream: bool) -> dict[str, Any]:
        index, question, budget = key
        return chat_body(self.model, self.scenes[index, question], stream=stream, max_tokens=NEW_TOKENS, budget=budget)

    def some_key(self) -> tuple[int, str, int]:
        return self.dice.randrange(PICTURES), self.dice.choice(QUESTIONS), self.dice.choice(BUDGETS)

    async def learn(self, client: httpx.AsyncClient) -> None:
        """The right answers, one at a time."""
        for index, question in self.scenes:
            for budget in BUDGETS:
                key = (index, question, budget)
                reply = await streamed(client, self.server.url, self.body(key, stream=True))
                if reply.status != 200:
                    raise SystemExit(f"the server does not answer: {reply}")
                self.truth[key] = reply.text

    def compare(self, key: tuple[int, str, int], text: str) -> None:
        self.tally.compared += 1
        self.tally.expect(text == self.truth[key], f"{key}: '{text}' instead of '{self.truth[key]}'")

    async def one(self, kind: str, client: httpx.AsyncClient) -> None:
        """A request of this kind."""
        self.tally.kinds[kind] += 1
        await getattr(self, f"do_{kind}")(client)

    async def do_stream(self, client: httpx.AsyncClient) -> None:
        key = self.some_key()
        self.judge(key, await streamed(client, self.server.url, self.body(key, stream=True)))

    def judge(self, key: tuple[int, str, int], reply: Reply) -> None:
        """An answer must be the right one; a busy server may refuse."""
        if reply.status == 429:
            self.tally.refused += 1
            return
        self.tally.expect(reply.status == 200, f"status {reply.status} for a good request")
        if reply.status == 200:
            self.tally.answered += 1
            self.compare(key, reply.text)

    async def do_whole(self, client: httpx.AsyncClient) -> None:
        await self.whole(self.some_key(), client)

    async def whole(self, key: tuple[int, str, int], client: httpx.AsyncClient, uri: str = "") -> None:
        body = self.body(key, stream=False)
        if uri:
            body["messages"][0]["content"][0]["image_url"]["url"] = uri
        status, content = await post(client, self.server.url, json.dumps(body).encode())
        text = json.loads(content)["choices"][0]["message"]["content"] if status == 200 else ""
        self.judge(key, Reply(status, text))

    async def do_file(self, client: httpx.AsyncClient) -> None:
        key = (0, self.dice.choice(QUESTIONS), self.dice.choice(BUDGETS))
        await self.whole(key, client, f"file://{self.folder}/good.png")

    async def do_leave(self, client: httpx.AsyncClient) -> None:
        await leaving(self.server.port, self.body(self.some_key(), stream=self.dice.random() < 0.8), self.dice)

    async def do_slow(self, client: httpx.AsyncClient) -> None:
        key = self.some_key()
        status, content = await slow_reading(self.server.port, self.body(key, stream=True), self.dice.uniform(0, 0.1))
        pieces = [json.loads(line[6:]) for line in content.split(b"\n") if line.startswith(b"data: {")]
        text = "".join(choice["delta"].get("content") or "" for item in pieces for choice in item.get("choices", ()))
        self.judge(key, Reply(status, text))

    async def do_malformed(self, client: httpx.AsyncClient) -> None:
        status, _ = await post(client, self.server.url, self.dice.choice(self.malformed))
        self.refuses("malformed JSON", status)

    async def do_path(self, client: httpx.AsyncClient) -> None:
        url = self.dice.choice(self.urls)
        status, content = await self.with_url(url, client)
        self.refuses(f"'{url[:40]}'", status)
        self.tally.expect(self.secret not in content and b"root:" not in content, f"'{url[:40]}' was read")

    async def do_bomb(self, client: httpx.AsyncClient) -> None:
        status, _ = await self.with_url(uri_of(self.dice.choice(self.bombs)), client)
        self.refuses("a bomb", status)

    async def with_url(self, url: str, client: httpx.AsyncClient) -> tuple[int, bytes]:
        body = self.body((0, QUESTIONS[0], 8), stream=self.dice.random() < 0.5)
        body["messages"][0]["content"][0]["image_url"]["url"] = url
        return await post(client, self.server.url, json.dumps(body).encode())

    async def do_huge(self, client: httpx.AsyncClient) -> None:
        says = self.dice.random() < 0.5
        status = await huge_body(client, self.server.url, 100_000_000, says=says)
        self.tally.expect(status in (0, 413, 429), f"status {status} for a body of 100 MB")

    def refuses(self, what: str, status: int) -> None:
        self.tally.expect(400 <= status < 500, f"status {status} for {what}")

    async def flood(self, count: int) -> Counter[int]:
        """So many at one moment: each is answered rightly or refused with 429, and none is lost."""
        limits = httpx.Limits(max_connections=None)
        statuses: Counter[int] = Counter()
        async with httpx.AsyncClient(timeout=180, limits=limits) as client:

            async def ask() -> None:
                key = self.some_key()
                reply = await streamed(client, self.server.url, self.body(key, stream=True))
                statuses[reply.status] += 1
                self.judge(key, reply)

            await asyncio.gather(*(ask() for _ in range(count)))
        self.tally.expect(statuses[200] >= QUEUE // 2, f"only {statuses[200]} of a flood were answered")
        self.tally.expect(statuses[429] > 0, "a flood was not refused")
        return statuses

    async def mixed(self, count: int, clients: int) -> None:
        kinds = self.dice.choices(list(MIX), list(MIX.values()), k=count)
        queue = iter(kinds)
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(timeout=180, limits=limits) as client:

            async def work() -> None:
                for kind in queue:
                    await self.one(kind, client)

            await asyncio.gather(*(work() for _ in range(clients)))


def watch(url: str, stop: Any, found: Any) -> None:
    with httpx.Client(timeout=60) as client:
        while not stop.wait(0.25):
            began = time.perf_counter()
            try:
                told = client.get(f"{url}/health").json()
            except (httpx.HTTPError, ValueError):
                found.put((None, 0))
                continue
            hand = sum(told[key] for key in ("queued", "seeing", "decoding"))
            found.put((time.perf_counter() - began, hand))
        found.put(None)


class Watch:
    def __init__(self, url: str) -> None:
        spawning = get_context("spawn")
        self._stop, self._found = spawning.Event(), spawning.Queue()
        self._process = spawning.Process(target=watch, args=(url, self._stop, self._found), daemon=True)
        self.seen: list[tuple[float | None, int]] = []

    def __enter__(self) -> Watch:
        self._process.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self.seen = list(iter(self._found.get, None))
        self._process.join()


def png_of(index: int) -> bytes:
    """A picture of coloured blobs like no other."""
    dots = np.random.default_rng(index).integers(0, 255, (6, 6, 3), np.uint8)
    found = io.BytesIO()
    Image.fromarray(dots).resize((150 + 7 * index, 130), Image.Resampling.BICUBIC).save(found, "PNG")
    return found.getvalue()


def exported(work: Path) -> Path:
    from serving_model import write_checkpoint

    bundle = work / "bundle-small"
    if not bundle.exists():
        write_checkpoint(work / "checkpoint-small", "small")
        line = [sys.executable, "-c", "from holov_export.cli import main; main()", "--no-verify"]
        line += ["--model", str(work / "checkpoint-small"), "--output", str(bundle)]
        subprocess.run(line, check=True, capture_output=True)
    return bundle


async def idle(server: ServerProcess) -> None:
    """Until nothing is in hand."""
    ends = time.monotonic() + 120
    async with httpx.AsyncClient(timeout=60) as client:
        while time.monotonic() < ends:
            found = (await client.get(f"{server.url}/health")).json()
            if not any(found[key] for key in ("queued", "seeing", "decoding")):
                break
            await asyncio.sleep(0.2)
    await asyncio.sleep(1)


async def soak(run: Soak, options: argparse.Namespace) -> dict[str, Any]:
    """All cycles; the curve of memory and what came of floods."""
    server, curve, floods = run.server, [], Counter()
    async with httpx.AsyncClient(timeout=60) as client:
        await run.learn(client)
    distinct = len(set(run.truth.values()))
    run.tally.expect(distinct >= 0.9 * len(run.truth), f"only {distinct} answers of {len(run.truth)} differ")
    for cycle in range(options.cycles):
        await run.mixed(options.requests // options.cycles, options.clients)
        floods += await run.flood(options.flood)
        await idle(server)
        curve.append({"rss_mb": round(server.rss / 1e6, 1), "files": server.files, "threads": server.threads})
        print(f"cycle {cycle + 1} of {options.cycles}: {curve[-1]}, {len(run.tally.wrong)} faults", flush=True)
    return {
        "curve": curve,
        "floods": {str(status): count for status, count in floods.items()},
        "truths": len(run.truth),
        "different_truths": distinct,
    }


def health_of(run: Soak, seen: list[tuple[float | None, int]]) -> dict[str, Any]:
    times = sorted(seconds for seconds, _ in seen if seconds is not None)
    run.tally.expect(len(times) == len(seen), f"/health was refused {len(seen) - len(times)} times")
    most = max(hand for _, hand in seen)
    run.tally.expect(most <= QUEUE, f"{most} jobs in hand")
    return {
        "most_jobs_in_hand": most,
        "health_p50_seconds": round(median(times), 4),
        "health_p99_seconds": round(times[int(0.99 * (len(times) - 1))], 3),
        "health_longest_seconds": round(times[-1], 3),
    }


def judged(run: Soak, found: dict[str, Any]) -> dict[str, Any]:
    """Look at memory and at the server's own books."""
    tally, metrics = run.tally, run.server.metrics()
    curve = [point["rss_mb"] for point in found["curve"]]
    settled = curve[len(curve) // 3 :]
    print(curve)
    growth = max(settled) / settled[0] - 1
    tally.expect(growth <= FLAT, f"memory grew by {growth:.1%} after the warm-up")
    files = [point["files"] for point in found["curve"]]
    tally.expect(max(files) - min(files) <= 8, f"open files: {files}")
    ended = {key.split('"')[1]: int(value) for key, value in metrics.items() if key.startswith("holov_requests_total")}
    tally.expect(int(metrics["holov_accepted_total"]) == sum(ended.values()), f"accepted jobs were lost: {ended}")
    tally.expect(not ended["failed"], f"{ended['failed']} jobs failed")
    in_hand = sum(value for key, value in metrics.items() if key.startswith("holov_jobs"))
    tally.expect(in_hand == 0, f"{in_hand:g} jobs are still in hand")
    return {**found, "growth_after_warm_up": round(growth, 4), "jobs": ended}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=6000, help="mixed ones, of all cycles together (6000)")
    parser.add_argument("--cycles", type=int, default=12, help="(12)")
    parser.add_argument("--flood", type=int, default=1000, help="requests at one moment, in each cycle (1000)")
    parser.add_argument("--clients", type=int, default=16, help="at once (16)")
    parser.add_argument("--decoder", default="auto", help="of the server (auto)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, help="keeps the bundle here (a temporary folder)")
    parser.add_argument("--json", type=Path, help="write the result here as well")
    options = parser.parse_args()
    print(one_line())
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="soak-serving-") as temporary:
        work, media = options.work or Path(temporary), Path(temporary) / "media"
        media.mkdir(parents=True)
        outside = Path(temporary) / "secret.png"
        outside.write_bytes(png_of(99))
        words = ["--media-folder", str(media), "--threads", "1", "--queue", str(QUEUE), "--decoder", options.decoder]
        with ServerProcess(exported(work), *words) as server:
            model = httpx.get(f"{server.url}/v1/models").json()["data"][0]["id"]
            run = Soak(server, model, media, outside, options.seed)
            with Watch(server.url) as watched:
                found = asyncio.run(soak(run, options))
            found |= health_of(run, watched.seen)
            found = judged(run, found)
            run.tally.expect("Traceback" not in server.log, f"the server's log:\n{server.log[-2000:]}")
        run.tally.expect(server.exit_code == 0, f"the server ended with {server.exit_code}")
    tally = run.tally
    result = {
        "minutes": round((time.perf_counter() - began) / 60, 1),
        "requests": {**tally.kinds, "flood": options.flood * options.cycles},
        "answers_compared": tally.compared,
        "refused_because_busy": tally.refused,
        **found,
        "faults": tally.wrong[:50],
    }
    print(json.dumps(result, indent=1))
    if options.json:
        write_result(options.json, result)
    print("\n".join(tally.wrong[:20]) or "nothing fell, nothing grew, every answer was its own")
    raise SystemExit(1 if tally.wrong else 0)


if __name__ == "__main__":
    main()
