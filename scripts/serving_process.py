"""A real `holov-export serve` for load scripts: started on a free port of 127.0.0.1, and always stopped."""

from __future__ import annotations

import base64
import json
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import httpx
import psutil

from holov_export.assets import data_folder

_START_SECONDS, _STOP_SECONDS = 60, 60


class ServerProcess:
    """A context manager.

    Attributes:
        url: "http://127.0.0.1:PORT". exit_code: once it was stopped.
    """

    def __init__(self, bundle: Path, *options: str) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = int(probe.getsockname()[1])
        self.url = f"http://127.0.0.1:{self.port}"
        self.exit_code: int | None = None
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115  it lives as long as the process
        words = [str(bundle), "--host", "127.0.0.1", "--port", str(self.port), *options]
        line = [sys.executable, "-c", "from holov_export.cli import main; main()", "serve", *words]
        self._process = subprocess.Popen(line, stdout=self._log, stderr=subprocess.STDOUT)

    def __enter__(self) -> ServerProcess:
        ends = time.monotonic() + _START_SECONDS
        while time.monotonic() < ends and self.alive:
            try:
                if httpx.get(f"{self.url}/health", timeout=2).status_code == 200:
                    return self
            except httpx.HTTPError:
                time.sleep(0.1)
        self.stop()
        raise SystemExit(f"the server does not start:\n{self.log}")

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    @property
    def log(self) -> str:
        """What it has printed."""
        self._log.seek(0)
        return self._log.read()

    @property
    def rss(self) -> int:
        """Bytes of memory in use."""
        return int(psutil.Process(self._process.pid).memory_info().rss)

    @property
    def cpu_seconds(self) -> float:
        """What its threads have computed so far; unlike the clock it does not count what else the machine does."""
        times = psutil.Process(self._process.pid).cpu_times()
        return float(times.user + times.system)

    @property
    def files(self) -> int:
        """Open files and connections."""
        return int(psutil.Process(self._process.pid).num_fds())

    @property
    def threads(self) -> int:
        return int(psutil.Process(self._process.pid).num_threads())

    def metrics(self) -> dict[str, float]:
        """Every sample of /metrics by its name and labels."""
        found = {}
        for line in httpx.get(f"{self.url}/metrics", timeout=30).text.splitlines():
            if line and not line.startswith("#"):
                name, _, value = line.rpartition(" ")
                found[name] = float(value)
        return found

    def stop(self) -> None:
        """As an operator would: SIGTERM, and wait."""
        if self.alive:
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(_STOP_SECONDS)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        self.exit_code = self._process.returncode

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()
        if self.exit_code not in (0, None) and kind is None:
            raise SystemExit(f"the server ended with {self.exit_code}:\n{self.log[-3000:]}")


@dataclass(frozen=True)
class Scene:
    """A picture as a data URI, and a question about it."""

    uri: str
    question: str


def demo_scenes() -> list[Scene]:
    """The demo's held-out pictures with their questions."""
    folder = data_folder("demo-scenes")
    items = json.loads((folder / "questions.json").read_text(encoding="utf-8"))
    return [Scene(uri_of((folder / item["image"]).read_bytes()), item["question"]) for item in items]


def uri_of(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()


def chat_body(model: str, scene: Scene, *, stream: bool, max_tokens: int, budget: int | None) -> dict[str, Any]:
    """A request for /v1/chat/completions."""
    parts = [{"type": "image_url", "image_url": {"url": scene.uri}}, {"type": "text", "text": scene.question}]
    body = {"model": model, "messages": [{"role": "user", "content": parts}], "max_tokens": max_tokens}
    return {**body, "stream": stream, "temperature": 0, **({} if budget is None else {"budget": budget})}


@dataclass(frozen=True)
class Reply:
    """A streamed answer.

    Attributes:
        status: of HTTP; 0 where the connection failed, -1 where the stream ended early or with an error.
        text: the whole answer.
        first, total: seconds from the request to the first token and to the end, as the client sees them.
        server_first: the first as the server counts, from the queue on.
        budget: tokens of the image. tokens: of the answer.
    """

    status: int
    text: str = ""
    first: float = 0.0
    total: float = 0.0
    server_first: float = 0.0
    budget: int = 0
    tokens: int = 0


async def streamed(client: httpx.AsyncClient, url: str, body: dict[str, Any]) -> Reply:
    """Ask, and read the answer as it comes."""
    began = time.perf_counter()
    text, first, last = "", 0.0, None
    try:
        async with client.stream("POST", f"{url}/v1/chat/completions", json=body) as response:
            if response.status_code != 200:
                await response.aread()
                return Reply(response.status_code)
            async for line in response.aiter_lines():
                if not line.startswith("data: ") or line == "data: [DONE]":
                    continue
                chunk = json.loads(line[6:])
                if "error" in chunk:
                    return Reply(-1, text)
                for choice in chunk["choices"]:
                    piece = choice["delta"].get("content") or ""
                    if piece and not first:
                        first = time.perf_counter() - began
                    text += piece
                    if choice["finish_reason"]:
                        last = chunk
    except httpx.HTTPError:
        return Reply(0, text)
    total = time.perf_counter() - began
    if last is None:
        return Reply(-1, text)
    told = last["holov"]
    server_first = told["timings_ms"]["ttft"] / 1000
    return Reply(200, text, first or total, total, server_first, told["budget"], last["usage"]["completion_tokens"])
