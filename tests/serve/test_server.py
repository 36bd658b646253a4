"""Real connections: clients that leave, read or send slowly, ports, signals."""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import pytest
import uvicorn
from http_cases import PlainWorker, data_url, encoded, question, reciting_worker
from PIL import Image
from starlette.types import ASGIApp, Receive, Scope, Send

from holov_export.bundle import Bundle
from holov_export.cli import run
from holov_export.cli.serve import seconds, serve_command, size
from holov_export.errors import BudgetError, EnvironmentFaultError
from holov_export.runtime.session import Session
from holov_export.serve.app import AppSettings, app_from
from holov_export.serve.chat import ChatSettings
from holov_export.serve.http_protocol import PatientProtocol
from holov_export.serve.limits import BudgetRange, Limits
from holov_export.serve.metrics import BuildFacts, PrometheusMetrics
from holov_export.serve.served import Served
from holov_export.serve.server import budgets_for, is_loopback, socket_for, url_of
from holov_export.serve.sse import EventStream

PICTURE = Image.linear_gradient("L").resize((60, 40)).convert("RGB")
SERVED = Served("tiny-llava", 123, 64, 64, BudgetRange(smallest=7, largest=7), "holov", "tiny-llava", "engines")
SETTINGS = AppSettings(ChatSettings(Limits(body_bytes=100_000), upload_seconds=0.4))


def eventually(true: Callable[[], bool], within: float = 3.0) -> bool:
    ends = time.monotonic() + within
    while not true():
        if time.monotonic() > ends:
            return False
        time.sleep(0.01)
    return True


@contextmanager
def listening(app: ASGIApp) -> Iterator[int]:
    """The port of an application that is served as `serve` does it."""
    bound = socket_for("127.0.0.1", 0)
    port = bound.getsockname()[1]
    config = uvicorn.Config(app, http=PatientProtocol, ws="none", lifespan="off", log_config=None, log_level="critical")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, args=([bound],))
    thread.start()
    assert eventually(lambda: server.started)
    yield port
    server.should_exit = server.force_exit = True
    thread.join(5)
    assert not thread.is_alive()


@pytest.fixture(scope="module")
def shared(toy_bundle: Bundle) -> Iterator[tuple[PlainWorker, int]]:
    with reciting_worker(toy_bundle, "one two three four five six") as worker:
        metrics = PrometheusMetrics(BuildFacts("1", "m", "holov", "e"))
        with listening(app_from(worker, worker.session, SERVED, SETTINGS, metrics)) as port:  # type: ignore[arg-type]
            yield worker, port


@pytest.fixture
def served(shared: tuple[PlainWorker, int]) -> Iterator[tuple[PlainWorker, int]]:
    worker, _ = shared
    worker.jobs.clear()
    worker.tickets.clear()
    yield shared
    worker.gate.set()
    worker.step.set()


def request_bytes(body: Any) -> bytes:
    data = json.dumps(body).encode()
    head = "POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
    return f"{head}content-length: {len(data)}\r\n\r\n".encode() + data


def connected(port: int, data: bytes = b"") -> socket.socket:
    made = socket.create_connection(("127.0.0.1", port), timeout=5)
    made.sendall(data)
    return made


def everything(connection: socket.socket) -> bytes:
    data = b""
    while piece := connection.recv(65536):
        data += piece
    return data


# ------------------------------------------------------------------------------------------------ clients that leave


def test_leaving_cancels_an_answer_that_waits(served: tuple[PlainWorker, int]) -> None:
    worker, port = served
    worker.gate.clear()
    for stream in (False, True):
        worker.tickets.clear()
        connection = connected(port, request_bytes(question(stream=stream)))
        assert eventually(lambda: len(worker.tickets) == 1)
        assert not worker.tickets[0].cancelled.is_set()
        connection.close()
        assert worker.tickets[0].cancelled.wait(3)


def test_leaving_cancels_a_stream(served: tuple[PlainWorker, int]) -> None:
    worker, port = served
    worker.step.clear()
    connection = connected(port, request_bytes(question("what?", data_url(encoded(PICTURE)), stream=True)))
    assert b"200 OK" in connection.recv(65536)
    assert not worker.tickets[0].cancelled.is_set()
    connection.close()
    assert worker.tickets[0].cancelled.wait(3)


def test_pieces_arrive_as_they_are_made(served: tuple[PlainWorker, int]) -> None:
    worker, port = served
    worker.step.clear()
    with connected(port, request_bytes(question(stream=True))) as connection:
        first = connection.recv(65536)
        while b'"role"' not in first:
            first += connection.recv(65536)
        assert b"DONE" not in first
        worker.step.set()
        rest = b""
        while b"[DONE]" not in rest:
            rest += connection.recv(65536)


def test_leaving_in_the_middle_of_a_body(served: tuple[PlainWorker, int]) -> None:
    worker, port = served
    connected(port, request_bytes(question("x" * 5000))[:-100]).close()
    answer = connected(port, request_bytes(question()))
    assert b"200 OK" in answer.recv(65536)
    assert len(worker.jobs) == 1


# ------------------------------------------------------------------------------------------------- clients too slow


async def endless(scope: Scope, receive: Receive, send: Send) -> None:
    async def events() -> AsyncIterator[bytes]:
        while True:
            yield b"x" * 65536

    await EventStream(events(), ENDED.set, 0.2)(scope, receive, send)


ENDED = threading.Event()


def test_a_client_that_does_not_read_is_cut_off() -> None:
    ENDED.clear()
    with listening(endless) as port, connected(port, b"GET / HTTP/1.1\r\nhost: x\r\n\r\n") as connection:
        assert ENDED.wait(5)
        answer = everything(connection)  # what the system had buffered; then the connection is at its end
    assert b"200 OK" in answer
    assert not answer.endswith(b"0\r\n\r\n")


def test_a_slow_body_is_refused(served: tuple[PlainWorker, int]) -> None:
    _, port = served
    with connected(port, request_bytes(question())[:-10]) as connection:
        answer = everything(connection)
    assert b"408" in answer
    assert b"too slowly" in answer


def test_a_slow_head_is_cut_off(served: tuple[PlainWorker, int], monkeypatch: pytest.MonkeyPatch) -> None:
    _, port = served
    monkeypatch.setattr(PatientProtocol, "head_seconds", 0.2)
    for start in (b"", b"POST /v1/chat", request_bytes(question()) + b"GET /v1/models HTTP/1.1\r\nx: "):
        with connected(port, start) as connection:
            began = time.monotonic()
            assert everything(connection).count(b"HTTP/1.1") == (len(start) > 100)
            assert time.monotonic() - began < 3


def test_a_large_body_is_refused_before_it_comes(served: tuple[PlainWorker, int]) -> None:
    _, port = served
    head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
    with connected(port, head + b"content-length: 100000000\r\n\r\n") as connection:
        answer = everything(connection)
    assert b"413" in answer
    assert b"connection: close" in answer
    # one that is only a little too large is thrown away, and its client reads the answer
    client = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    for _ in range(2):
        client.request("POST", "/v1/chat/completions", b"x" * 500_000, {"content-type": "application/json"})
        response = client.getresponse()
        assert (response.status, json.loads(response.read())["error"]["code"]) == (413, "request_too_large")
    client.close()


# ----------------------------------------------------------------------------------------------- the way to a server


def test_a_port_in_use() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other, pytest.raises(EnvironmentFaultError, match="in use"):
        socket_for("127.0.0.1", other.getsockname()[1])
    with pytest.raises(EnvironmentFaultError, match="no host"):
        socket_for("no.such.host.invalid", 0)


def test_addresses() -> None:
    with socket_for("127.0.0.1", 0) as bound:
        assert is_loopback(bound)
        assert url_of(bound) == f"http://127.0.0.1:{bound.getsockname()[1]}"
    with socket_for("0.0.0.0", 0) as bound:
        assert not is_loopback(bound)


def test_budgets(toy_bundle: Bundle) -> None:
    session = Session.open(toy_bundle, decoder="none", provider="cpu", threads=1)

    def chosen(
        target: float | None = None, smallest: int | None = None, largest: int | None = None, budget: int | None = None
    ) -> tuple[int, int]:
        made = budgets_for(session, target=target, smallest=smallest, largest=largest, budget=budget)
        assert made.target_ttft == target
        return made.smallest, made.largest

    assert chosen() == (7, 7)
    assert chosen(budget=9) == (9, 9)
    assert chosen(0.1) == (3, 21)
    assert chosen(0.1, smallest=30) == (30, 30)
    assert chosen(0.1, largest=2) == (2, 2)
    assert chosen(0.1, 5, 6) == (5, 6)
    for wrong in ({"budget": 65}, {"target": 0.1, "largest": 65}, {"target": 0.1, "smallest": 9, "largest": 8}):
        with pytest.raises(BudgetError):
            chosen(**wrong)


def test_durations_and_sizes() -> None:
    context, param = click.Context(serve_command), serve_command.params[0]
    durations = [("150ms", 0.15), ("0.2s", 0.2), ("2m", 120), ("3", 3), (" 1 MIN", 60)]
    assert all(seconds(context, param, text) == pytest.approx(value) for text, value in durations)
    sizes = [("32MiB", 32 << 20), ("5mb", 5_000_000), ("2048", 2048), ("1 GB", 10**9)]
    assert all(size(context, param, text) == value for text, value in sizes)
    for wrong in ("", "fast", "-1s", "0", "1h", "1e3", "150 mss"):
        with pytest.raises(click.BadParameter):
            seconds(context, param, wrong)
    for wrong in ("", "1.5MB", "1023", "5TB", "-5"):
        with pytest.raises(click.BadParameter):
            size(context, param, wrong)


# ------------------------------------------------------------------------------------------------- the whole command


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "holov_export", "serve", *words]


@contextmanager
def process(bundle: Bundle, *words: str, **variables: str) -> Iterator[tuple[subprocess.Popen[str], int, str]]:
    """A server in a process of its own, its port and what it said."""
    started = subprocess.Popen(
        command(str(bundle.folder), "--port", "0", "--provider", "cpu", "--threads", "1", *words),
        stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env={**os.environ, **variables},
    )  # fmt: skip
    try:
        assert started.stderr is not None
        lines = []
        while not (found := re.search(r"http://127\.0\.0\.1:(\d+)", line := started.stderr.readline())):
            lines.append(line)
            assert line, "".join(lines)
        yield started, int(found[1]), "".join([*lines, line])
    finally:
        started.kill()
        started.communicate()


def test_the_command_serves_and_ends_in_order(answering_bundle: Bundle) -> None:
    with process(answering_bundle, "--max-new-tokens", "4000", HOLOV_EXPORT_API_KEY="s3cret") as (server, port, said):
        assert "tiny-llava" in said
        assert "onnxruntime-genai" in said
        assert "s3cret" not in said
        client = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
        headers = {"content-type": "application/json", "authorization": "Bearer s3cret"}

        def post(body: Any, **more: str) -> tuple[int, Any]:
            client.request("POST", "/v1/chat/completions", json.dumps(body), {**headers, **more})
            response = client.getresponse()
            return response.status, json.loads(response.read())

        status, answer = post(question("what?", data_url(encoded(PICTURE)), budget=5, max_tokens=8))
        assert (status, answer["holov"]["visual_tokens"]) == (200, [5])
        assert answer["usage"]["completion_tokens"] <= 8
        assert post(question(), authorization="Bearer other")[0] == 401
        # what has been accepted is answered, after the signal too
        body = question("go on", data_url(encoded(PICTURE)), stream=True, max_tokens=60)
        client.request("POST", "/v1/chat/completions", json.dumps(body), headers)
        response = client.getresponse()
        server.send_signal(signal.SIGTERM)
        assert response.read().endswith(b"data: [DONE]\n\n")
        assert server.wait(15) == 0
        assert server.stderr is not None
        assert "Traceback" not in server.stderr.read()


def test_a_wrong_start_says_why(answering_bundle: Bundle, tmp_path: Path) -> None:
    """In this process: each start of another one costs seconds."""
    bundle = str(answering_bundle.folder)
    (tmp_path / "empty").write_text("\n")
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        assert run(["serve", bundle, "--port", port]) == 3
    assert run(["serve", bundle, "--budget", "65"]) == 2
    assert run(["serve", bundle, "--max-budget", "9"]) == 2
    assert run(["serve", bundle, "--target-ttft", "1s", "--budget", "9"]) == 2
    assert run(["serve", bundle, "--target-ttft", "soon"]) == 2
    assert run(["serve", bundle, "--media-folder", str(tmp_path / "no")]) == 2
    assert run(["serve", bundle, "--api-key", "a", "--api-key-file", "b"]) == 2
    assert run(["serve", bundle, "--api-key-file", str(tmp_path / "empty")]) == 2
    assert run(["serve", bundle, "--api-key-file", str(tmp_path / "no")]) == 3
    assert run(["serve", str(tmp_path)]) == 2


def test_the_event_stream_ends_when_its_client_leaves() -> None:
    """Without a server: the receiving side says so while the sending side waits."""

    async def scenario() -> tuple[list[str], bool]:
        sent, ended = [], False

        async def never() -> AsyncIterator[bytes]:
            await asyncio.Event().wait()
            yield b""

        async def receive() -> dict[str, Any]:
            await asyncio.sleep(0.01)
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            sent.append(message["type"])

        def end() -> None:
            nonlocal ended
            ended = True

        await asyncio.wait_for(EventStream(never(), end, 1.0)({"type": "http"}, receive, send), 2)  # type: ignore[arg-type]
        return sent, ended

    assert asyncio.run(scenario()) == (["http.response.start"], True)
