"""The application over a plain worker: answers, streams, refusals and what belongs to whom."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from http_cases import PlainWorker, data_url, encoded, image_part, question, reciting_worker
from PIL import Image
from starlette.testclient import TestClient

from holov_export.bundle import Bundle
from holov_export.errors import LateError, UsageError
from holov_export.runtime.preprocess import pixels_from_pictures
from holov_export.serve.app import AppSettings, app_from
from holov_export.serve.chat import ChatSettings
from holov_export.serve.limits import BudgetRange, Limits
from holov_export.serve.metrics import BuildFacts, PrometheusMetrics
from holov_export.serve.parts import Sources
from holov_export.serve.served import Served

TEXT = "one two three"
PICTURE = Image.linear_gradient("L").resize((60, 40)).convert("RGB")
URL = data_url(encoded(PICTURE))
LIMITS = Limits(body_bytes=100_000, queue=3, new_tokens=50)
SERVED = Served("tiny-llava", 123, 64, 64, BudgetRange(smallest=7, largest=7), "holov", "tiny-llava", "engines")


@pytest.fixture(scope="module")
def bundle_worker(toy_bundle: Bundle) -> Iterator[PlainWorker]:
    with reciting_worker(toy_bundle, TEXT) as worker:
        yield worker


@pytest.fixture
def worker(bundle_worker: PlainWorker) -> PlainWorker:
    bundle_worker.jobs.clear()
    bundle_worker.tickets.clear()
    bundle_worker.failure, bundle_worker.most = None, 100
    return bundle_worker


def client_of(
    worker: PlainWorker, settings: AppSettings | None = None, page: Path = Path("nowhere"), host: str = "testserver"
) -> TestClient:
    metrics = PrometheusMetrics(BuildFacts("1", "m", "holov", "e"))
    made = settings or AppSettings(ChatSettings(LIMITS))
    app = app_from(worker, worker.session, SERVED, made, metrics, page=page)  # type: ignore[arg-type]
    return TestClient(app, base_url=f"http://{host}", raise_server_exceptions=False)


@pytest.fixture
def client(worker: PlainWorker) -> TestClient:
    return client_of(worker)


def ask(client: TestClient, body: dict[str, Any], **more: Any) -> Any:
    return client.post("/v1/chat/completions", json=body, **more)


def events_of(text: str) -> list[Any]:
    lines = [line for line in text.split("\n\n") if line]
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line[6:]) for line in lines[:-1]]


# ------------------------------------------------------------------------------------------------------- answers


def test_an_answer(client: TestClient, worker: PlainWorker) -> None:
    response = ask(client, question("what?", URL, max_tokens=40))
    body = response.json()
    assert response.status_code == 200
    assert (body["object"], body["model"]) == ("chat.completion", "tiny-llava")
    assert body["id"] == response.headers["x-request-id"] == worker.jobs[0].name
    assert body["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": TEXT, "refusal": None},
            "logprobs": None,
            "finish_reason": "stop",
        }
    ]
    usage, holov = body["usage"], body["holov"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert usage["completion_tokens"] == len(worker.session.decoder.ids)  # type: ignore[attr-defined]
    assert (holov["budget"], holov["visual_tokens"]) == (7, [7])
    assert list(holov["timings_ms"]) == [
        *("queue", "preprocess", "vision", "stitch", "setup", "prefill", "decode", "ttft", "total")
    ]
    assert holov["timings_ms"]["total"] >= holov["timings_ms"]["ttft"] > 0
    assert "kept" not in holov


def test_what_reaches_the_worker(client: TestClient, worker: PlainWorker) -> None:
    other = Image.new("RGB", (10, 20), "red")
    body = question("ignored", temperature=0.5, top_p=0.25, top_k=3, seed=4, stop=["two"], budget=9)
    body["messages"] = [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": [image_part(URL), {"type": "text", "text": "first"}]},
        {"role": "assistant", "content": "yes"},
        {"role": "user", "content": [{"type": "text", "text": "second"}, image_part(data_url(encoded(other)))]},
    ]
    answer = ask(client, body).json()
    (job,) = worker.jobs
    assert [image.size for image in job.media.images] == [(60, 40), (10, 20)]  # type: ignore[union-attr]
    assert job.text.count("<image>") == 2
    places = [job.text.index(words) for words in ("be brief", "first", "yes", "second")]
    assert places == sorted(places)
    assert job.budget == 9
    sampling = job.sampling
    assert (sampling.max_new_tokens, sampling.temperature, sampling.top_k, sampling.seed) == (50, 0.5, 3, 4)
    assert answer["choices"][0]["message"]["content"] == "one "
    assert answer["holov"]["visual_tokens"] == [9, 9]


def test_length_ends_an_answer(client: TestClient) -> None:
    choice = ask(client, question(max_tokens=2)).json()["choices"][0]
    assert choice["finish_reason"] == "length"
    assert TEXT.startswith(choice["message"]["content"])


def test_a_stream(client: TestClient) -> None:
    response = ask(client, question("what?", URL, stream=True))
    assert response.headers["content-type"].startswith("text/event-stream")
    events = events_of(response.text)
    assert {event["object"] for event in events} == {"chat.completion.chunk"}
    assert {event["id"] for event in events} == {response.headers["x-request-id"]}
    deltas = [event["choices"][0]["delta"] for event in events]
    assert deltas[0] == {"role": "assistant", "content": "", "refusal": None}
    assert "".join(delta.get("content") or "" for delta in deltas) == TEXT
    assert deltas[-1] == {}
    assert [event["choices"][0]["finish_reason"] for event in events] == [None] * (len(events) - 1) + ["stop"]
    assert all("usage" not in event and "holov" not in event for event in events[:-1])
    assert events[-1]["usage"]["completion_tokens"] > 0
    assert events[-1]["holov"]["visual_tokens"] == [7]


def test_a_stream_with_usage(client: TestClient) -> None:
    events = events_of(ask(client, question(stream=True, stream_options={"include_usage": True})).text)
    assert [event["usage"] for event in events[:-1]] == [None] * (len(events) - 1)
    assert events[-1]["choices"] == []
    assert events[-1]["usage"]["total_tokens"] > 0
    assert events[-2]["choices"][0]["finish_reason"] == "stop"
    assert "timings_ms" in events[-1]["holov"]


@pytest.mark.parametrize("stream", [False, True])
def test_kept_tokens_are_shown_where_they_are(client: TestClient, worker: PlainWorker, stream: bool) -> None:
    response = ask(client, question("what?", URL, kept=True, budget=5, stream=stream))
    holov = events_of(response.text)[0]["holov"] if stream else response.json()["holov"]
    (kept,) = holov["kept"]
    assert (kept["size"], kept["tokens"], kept["of"]) == ([60, 40], 5, 64)
    assert list(holov["timings_ms"])[:3] == ["queue", "preprocess", "vision"]
    # the toy graph keeps the first five: the left of the top row of what the model sees
    box = pixels_from_pictures([PICTURE], worker.session.bundle.manifest.plan.model).boxes[0]
    side = (box.right - box.left) / 8
    assert kept["boxes"] == [
        pytest.approx([box.left + index * side, box.top, box.left + (index + 1) * side, box.top + side], abs=0.02)
        for index in range(5)
    ]


def test_a_question_without_images(client: TestClient) -> None:
    body = ask(client, {"model": "tiny-llava", "messages": [{"role": "user", "content": "hi"}]}).json()
    assert body["choices"][0]["message"]["content"] == TEXT
    assert body["holov"]["visual_tokens"] == []


# ------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("body", "status", "param", "code"),
    [
        (question(model="gpt-4"), 404, "model", "model_not_found"),
        (question("what?", URL, budget=65), 400, "budget", "invalid_budget"),
        (question("what?", "data:x"), 400, "messages.0.content.0.image_url.url", "invalid_url"),
        (question("what?", "http://127.0.0.1/x"), 400, "messages.0.content.0.image_url.url", "invalid_url"),
        (question("what?", *[URL] * 9), 400, "messages", "too_many"),
        (question("an <image> in words", URL), 400, "messages", "invalid_prompt"),
        (question(" "), 400, "messages", "invalid_prompt"),
        (question("word " * 3000), 400, "messages", "invalid_prompt"),
        (question(tools=[{"type": "function"}]), 400, "tools", "unsupported_parameter"),
        (question(spread="clip"), 400, "spread", None),
    ],
)
def test_a_wrong_request_is_refused_and_never_becomes_a_job(
    client: TestClient, worker: PlainWorker, body: dict[str, Any], status: int, param: str, code: str | None
) -> None:
    for stream in (False, True):
        response = ask(client, {**body, "stream": stream})
        error = response.json()["error"]
        assert (response.status_code, error["param"], error["code"]) == (status, param, code)
        assert error["type"] == "invalid_request_error"
    assert worker.jobs == []


def test_broken_bodies(client: TestClient) -> None:
    def post(content: Any, kind: str = "application/json", **headers: str) -> tuple[int, str]:
        headers["content-type"] = kind
        response = client.post("/v1/chat/completions", content=content, headers=headers)
        return response.status_code, response.json()["error"]["code"]

    assert post(b"{") == (400, "invalid_json")
    assert post(b"\xff\xfe") == (400, "invalid_json")
    assert post(b"{}", "text/plain") == (415, "unsupported_media_type")
    assert post(b"{}", **{"content-encoding": "gzip"}) == (415, "unsupported_media_type")
    assert post(b"x" * 100_001) == (413, "request_too_large")
    assert post(iter([b"x" * 60_000] * 3)) == (413, "request_too_large")
    assert post(iter([b'{"model', b'": 1}'])) == (400, "invalid_value")


def test_a_full_queue(client: TestClient, worker: PlainWorker) -> None:
    worker.most = 0
    response = ask(client, question(stream=True))
    assert (response.status_code, response.headers["retry-after"]) == (429, "3")
    assert response.json()["error"]["type"] == "rate_limit_error"


@pytest.mark.parametrize(
    ("failure", "status"), [(LateError("too late."), 503), (UsageError("no."), 400), (OSError("disk /secret"), 500)]
)
def test_failures_before_the_first_event_have_their_status(
    client: TestClient, worker: PlainWorker, failure: Exception, status: int
) -> None:
    worker.failure = failure
    for stream in (False, True):
        response = ask(client, question("what?", URL, stream=stream))
        assert response.status_code == status
        assert "secret" not in response.text


def test_a_failure_in_the_middle_is_an_event(
    client: TestClient, worker: PlainWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise LateError("it took too long.")

    monkeypatch.setattr(worker.session, "answer_stream", broken)
    events = events_of(ask(client, question("what?", URL, stream=True)).text)
    assert events[0]["choices"][0]["delta"]["role"] == "assistant"
    assert events[-1]["error"]["message"] == "it took too long."
    assert ask(client, question("what?", URL)).status_code == 503


def test_while_shutting_down(client: TestClient, worker: PlainWorker) -> None:
    assert client.get("/health").json() == {
        "status": "ready", "queued": 0, "seeing": 0, "decoding": 0, "budget": 7
    }  # fmt: skip
    client.app.chat.draining = True  # type: ignore[attr-defined]
    health = client.get("/health")
    assert (health.status_code, health.json()["status"]) == (503, "draining")
    response = ask(client, question())
    assert (response.status_code, response.json()["error"]["code"]) == (503, "shutting_down")
    assert worker.jobs == []


def test_files_of_the_media_folder(worker: PlainWorker, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(encoded(PICTURE))
    client = client_of(worker, AppSettings(ChatSettings(LIMITS, Sources(tmp_path))))
    assert ask(client, question("what?", f"file://{tmp_path}/a.png")).status_code == 200
    assert ask(client, question("what?", f"file://{tmp_path}/../a.png")).status_code == 400


# --------------------------------------------------------------------------------------------------- other pages


def test_models(client: TestClient) -> None:
    listed = client.get("/v1/models").json()
    assert (listed["object"], len(listed["data"])) == ("list", 1)
    entry = listed["data"][0]
    assert client.get("/v1/models/tiny-llava").json() == entry
    assert (entry["id"], entry["object"], entry["created"]) == ("tiny-llava", "model", 123)
    assert entry["holov"] == {
        "tokens": 64,
        "default_budget": 7,
        "budget_range": [7, 7],
        "largest_budget": 64,
        "target_ttft_ms": None,
        "method": "holov",
        "model": "tiny-llava",
        "engine": "engines",
    }
    missing = client.get("/v1/models/a/b")
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "model_not_found")


def test_what_is_not_there(client: TestClient) -> None:
    for path in ("/v1/completions", "/docs", "/openapi.json", "/page/index.html", "/page/..%2fapp.py", "/"):
        response = client.get(path)
        assert (response.status_code, response.json()["error"]["code"]) == (404, "not_found")
    assert client.get("/v1/chat/completions").status_code == 405


def test_the_page_and_its_files(worker: PlainWorker, tmp_path: Path) -> None:
    (tmp_path / "index.html").write_text("<p>page")
    (tmp_path / "page.js").write_text("let a;")
    (tmp_path / "notes.txt").write_text("private")
    client = client_of(worker, page=tmp_path)
    assert client.get("/").text == client.get("/page/index.html").text == "<p>page"
    script = client.get("/page/page.js")
    assert script.headers["content-type"] == "text/javascript; charset=utf-8"
    assert script.headers["content-security-policy"].startswith("default-src 'self'; img-src 'self' data: blob:;")
    for path in ("/page/notes.txt", "/page/%2e%2e%2fapp.py", "/page/", "/page/deep/page.js"):
        assert client.get(path).status_code == 404


def test_metrics_count_responses_by_route(client: TestClient, worker: PlainWorker) -> None:
    ask(client, question())
    ask(client, question(n=2))
    client.get("/v1/models/no/such")
    client.get("/a/random/path")
    response = client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    assert 'holov_http_responses_total{route="/v1/chat/completions",status="200"} 1.0' in response.text
    assert 'holov_http_responses_total{route="/v1/chat/completions",status="400"} 1.0' in response.text
    assert 'holov_http_responses_total{route="/v1/models/{name:path}",status="404"} 1.0' in response.text
    assert 'holov_http_responses_total{route="other",status="404"} 1.0' in response.text
    assert 'holov_rejected_total{reason="invalid"} 1.0' in response.text
    assert "random" not in response.text


# ----------------------------------------------------------------------------------------------------- who may ask


def test_a_key_protects_all_but_health_and_page(worker: PlainWorker, tmp_path: Path) -> None:
    (tmp_path / "index.html").write_text("x")
    settings = AppSettings(ChatSettings(LIMITS), api_key="s3cret")
    assert "s3cret" not in repr(settings)
    client = client_of(worker, settings, tmp_path)
    for path in ("/health", "/", "/page/index.html"):
        assert client.get(path).status_code == 200
    for headers in (
        {},
        {"authorization": "Bearer s3cre"},
        {"authorization": "Basic s3cret"},
        {"authorization": "s3cret"},
    ):
        for path in ("/v1/models", "/metrics", "/other", "//v1/models", "/page/../v1/models"):
            response = client.get(path, headers=headers)
            assert (response.status_code, response.json()["error"]["code"]) == (401, "invalid_api_key")
        assert ask(client, question(), headers=headers).status_code == 401
    good = {"authorization": "Bearer s3cret"}
    assert client.get("/metrics", headers=good).status_code == 200
    assert ask(client, question(), headers=good).status_code == 200
    assert len(worker.jobs) == 1


def test_scripts_of_other_pages_are_refused_unless_named(worker: PlainWorker) -> None:
    ask_first = {"origin": "https://page.test", "access-control-request-method": "POST"}
    path = "/v1/chat/completions"
    closed = client_of(worker).options(path, headers=ask_first)
    assert closed.status_code == 405
    assert "access-control-allow-origin" not in closed.headers
    settings = AppSettings(ChatSettings(LIMITS), api_key="k", origins=("https://page.test",))
    client = client_of(worker, settings)
    opened = client.options(path, headers={**ask_first, "access-control-request-headers": "authorization"})
    assert (opened.status_code, opened.headers["access-control-allow-origin"]) == (200, "https://page.test")
    other = client.options(path, headers={**ask_first, "origin": "https://other.test"})
    assert "access-control-allow-origin" not in other.headers
    refused = client.get("/v1/models", headers={"origin": "https://page.test"})
    assert (refused.status_code, refused.headers["access-control-allow-origin"]) == (401, "https://page.test")


@pytest.mark.parametrize(
    ("host", "status"),
    [("127.0.0.1:8080", 200), ("localhost", 200), ("app.localhost", 200), ("[::1]:8080", 200), ("page.test", 200),
     ("evil.test", 403), ("localhost.evil.test", 403), ("127.0.0.1.evil.test", 403)],
)  # fmt: skip
def test_a_server_of_one_machine_answers_to_its_own_names(worker: PlainWorker, host: str, status: int) -> None:
    settings = AppSettings(ChatSettings(LIMITS), only_here=True, origins=("https://page.test",))
    client = client_of(worker, settings)
    assert client.get("/v1/models", headers={"host": host}).status_code == status
    keyed = client_of(worker, replace(settings, api_key="k"))
    headers = {"host": host, "authorization": "Bearer k"}
    assert keyed.get("/v1/models", headers=headers).status_code == 200


def test_pictures_give_their_memory_back(worker: PlainWorker) -> None:
    """Twelve of the largest pictures, one after the other, where eight fit at once."""
    settings = AppSettings(ChatSettings(replace_limits(pixels=2400, queue_seconds=1.0)))
    client = client_of(worker, settings)
    began = time.monotonic()
    for index in range(12):
        assert ask(client, question("what?", URL, stream=index % 2 == 0, max_tokens=1)).status_code == 200
    assert time.monotonic() - began < 5


def replace_limits(**changes: Any) -> Limits:
    return Limits.model_validate({**LIMITS.model_dump(), **changes})
