"""A small HTTP server that speaks as a vLLM server does, for the tests of our side. It holds no model.

Paths, fields and messages are those that vLLM 0.32 was seen to send; scripts/check_vllm asks a real one.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

DISABLED = "Scale-out endpoints are disabled. Restart vllm serve with --enable-scale-out to enable them."
NO_EMBEDS = "You must set `--enable-mm-embeds` to input `image_embeds` (parameter=image_embeds)"
UNTRUSTED = "Chat template is passed with request, but --trust-request-chat-template is not set."


@dataclass
class Behaviour:
    """How the server is set up and what it does with the next answers.

    Attributes:
        tokens: of every answer. finish: the last event's reason.
        prompt_ids: those it says that it saw, in a chat; None for what is meant.
        status, message: of a refusal, instead of an answer.
        error_after, cut_after, silent_after: tokens after which it reports an error, drops the connection, or waits.
        requests: (path, body, headers) of every POST that asks for an answer.
        left: set when a client goes before its answer ends.
    """

    width: int
    key: str | None = None
    embeds: bool = True
    scale_out: bool = True
    trusts: bool = True
    context: int = 512
    bos: str = "<s>"
    tokens: tuple[int, ...] = (11, 12, 13, 14)
    finish: str = "length"
    prompt_ids: list[int] | None = None
    status: int = 200
    message: str = ""
    error_after: int | None = None
    cut_after: int | None = None
    silent_after: int | None = None
    seconds: float = 0.0
    requests: list[tuple[str, dict[str, Any], dict[str, str]]] = field(default_factory=list)
    left: threading.Event = field(default_factory=threading.Event)
    over: threading.Event = field(default_factory=threading.Event)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    behaviour: Behaviour

    def log_message(self, *_: object) -> None:
        """Says nothing."""

    def do_GET(self) -> None:
        behaviour = self.behaviour
        if self._locked():
            return
        if self.path.endswith("/v1/models"):
            self._json(200, {"data": [{"id": "served", "max_model_len": behaviour.context}]})
        else:
            self._json(404, {"detail": "Not Found"})

    def do_POST(self) -> None:
        behaviour = self.behaviour
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self._locked():
            return None
        if self.path.endswith("/detokenize"):
            return self._json(200, {"prompt": behaviour.bos})
        generate = self.path.endswith("/inference/v1/generate")
        if generate and not behaviour.scale_out:
            return self._error(403, DISABLED)
        if generate and "token_ids" not in body:
            return self._error(400, "2 validation errors")
        if self.path.endswith("/v1/chat/completions") and not body.get("stream"):
            return self._error(400, self._canary())
        behaviour.requests.append((self.path, body, dict(self.headers)))
        if "chat_template" in body and not behaviour.trusts:
            return self._error(400, UNTRUSTED)
        if behaviour.status != 200:
            return self._error(behaviour.status, behaviour.message)
        return self._stream(body)

    def _canary(self) -> str:
        if not self.behaviour.embeds:
            return NO_EMBEDS
        return f"Image embedding [0] hidden dimension mismatch: got 1, but model expects {self.behaviour.width}."

    def _locked(self) -> bool:
        key = self.behaviour.key
        if key is None or self.headers.get("Authorization") == f"Bearer {key}":
            return False
        self._json(401, {"error": "Unauthorized"})
        return True

    def _error(self, status: int, message: str) -> None:
        self._json(status, {"error": {"message": message, "code": status}})

    def _json(self, status: int, body: dict[str, Any]) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _stream(self, body: dict[str, Any]) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        try:
            self._events(body)
        except OSError:
            self.behaviour.left.set()
        self.close_connection = True

    def _events(self, body: dict[str, Any]) -> None:
        behaviour = self.behaviour
        chat, plain = "messages" in body, "prompt" in body
        ids = body.get("token_ids") or body.get("prompt") or behaviour.prompt_ids
        if behaviour.prompt_ids is not None:
            ids = behaviour.prompt_ids
        if chat:  # what it saw comes in an event of its own
            self._event({"prompt_token_ids": ids, "choices": [{"delta": {"role": "assistant"}}]})
        for number, token in enumerate(behaviour.tokens):
            if number == behaviour.error_after:
                return self._event({"error": {"message": "EngineCore encountered an issue.", "code": 500}})
            if number == behaviour.cut_after:
                return self.connection.close()
            if number == behaviour.silent_after:
                behaviour.over.wait(10)
            last = number == len(behaviour.tokens) - 1
            choice: dict[str, Any] = {"token_ids": [token], "finish_reason": behaviour.finish if last else None}
            event: dict[str, Any] = {"choices": [choice]}
            if number == 0 and not chat:
                (choice if plain else event)["prompt_token_ids"] = ids
            self._event(event)
            time.sleep(behaviour.seconds)
        self._chunk(b"data: [DONE]\n\n")
        self._chunk(b"")
        return None

    def _event(self, event: dict[str, Any]) -> None:
        self._chunk(b"data: " + json.dumps(event).encode() + b"\n\n")

    def _chunk(self, data: bytes) -> None:
        self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
        self.wfile.flush()


@contextmanager
def serving(behaviour: Behaviour) -> Iterator[str]:
    """The address of a server that behaves so, on this machine."""
    handler = type("Handler", (_Handler,), {"behaviour": behaviour})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        behaviour.over.set()
        server.shutdown()
        server.server_close()
        thread.join(5)
