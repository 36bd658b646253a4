"""The HTTP side of a server as an ASGI application."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from fastapi import FastAPI
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from holov_export.runtime.session import Session
from holov_export.serve.chat import Answering, Chat, ChatSettings
from holov_export.serve.faults import Fault, fault_from_error, response_from_fault
from holov_export.serve.guards import HostGuard, KeyGuard
from holov_export.serve.remote import RemoteImages
from holov_export.serve.served import ModelList, Served, entry_from_served

PAGE = Path(__file__).parent / "page"
_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
    ".png": "image/png",
}
#: the page is of this server only: no script, style or picture comes from elsewhere, and no other page shows it
_PAGE_HEADERS = {
    "content-security-policy": "default-src 'self'; img-src 'self' data: blob:; base-uri 'none'; "
    "frame-ancestors 'none'; form-action 'self'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}


class HttpMetrics(Protocol):
    """Of `PrometheusMetrics`, what the HTTP side needs."""

    content_type: str

    def rejected(self, reason: str) -> None: ...
    def responded(self, route: str, status: int) -> None: ...
    def text(self) -> bytes: ...


class LoadNow(Protocol):
    """How much there is to do; `budget` is what an image gets that comes now."""

    @property
    def queued(self) -> int: ...
    @property
    def seeing(self) -> int: ...
    @property
    def decoding(self) -> int: ...
    @property
    def budget(self) -> int: ...


class Working(Answering, Protocol):
    """Of a `Worker`, what the HTTP side needs."""

    def load(self) -> LoadNow: ...


@dataclass(frozen=True)
class AppSettings:
    """Who may ask, and how requests are read.

    Attributes:
        api_key: None lets everybody ask.
        origins: pages of other servers whose scripts may ask.
        only_here: the server is reached from this machine alone.
    """

    chat: ChatSettings = field(default_factory=ChatSettings)
    api_key: str | None = field(default=None, repr=False)
    origins: tuple[str, ...] = ()
    only_here: bool = False


class Health(BaseModel):
    """Body of /health."""

    status: str
    queued: int
    seeing: int
    decoding: int
    budget: int


class Counted:
    """Counts responses by the pattern of their route."""

    def __init__(self, app: ASGIApp, metrics: HttpMetrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def counting(message: Message) -> None:
            if message["type"] == "http.response.start":
                route = getattr(scope.get("route"), "path", "other")
                self._metrics.responded(route, message["status"])
            await send(message)

        await self._app(scope, receive, counting)


class ServeApp(FastAPI):
    """The application; `chat` is told when the server shuts down."""

    chat: Chat


def app_from(
    worker: Working,
    session: Session,
    served: Served,
    settings: AppSettings,
    metrics: HttpMetrics,
    *,
    page: Path = PAGE,
    remote: RemoteImages | None = None,
) -> ServeApp:
    """Put the application together.

    Args:
        worker: started. session: its session; only the tokenizer and the manifest are used here.
        metrics: for Prometheus.
        page: folder of the page's files.
        remote: what fetches images; None for that which asks public addresses only.
    """
    # no generated documentation: it loads scripts from elsewhere, and describes nothing that is read by hand here
    app = ServeApp(openapi_url=None, docs_url=None, redoc_url=None)
    app.chat = Chat(
        worker, session.encoder, session.bundle.manifest.plan.model, served, settings.chat, metrics.rejected, remote
    )
    app.add_api_route("/v1/chat/completions", app.chat.answer, methods=["POST"], response_model=None)
    _add_facts(app, worker, served, metrics)
    _add_page(app, page)
    app.add_exception_handler(HTTPException, _not_found)
    app.add_exception_handler(Exception, _internal)
    # the last one added is the first that a request meets: preflights have no key, and are answered before it matters
    if settings.api_key is not None:
        app.add_middleware(KeyGuard, key=settings.api_key)
    elif settings.only_here:
        app.add_middleware(HostGuard, origins=settings.origins)
    app.add_middleware(Counted, metrics=metrics)
    if settings.origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(settings.origins),
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["x-request-id", "retry-after"],
        )
    return app


def _add_facts(app: ServeApp, worker: Working, served: Served, metrics: HttpMetrics) -> None:
    entry = entry_from_served(served)

    async def models() -> Response:
        return Response(ModelList(data=[entry]).model_dump_json(), media_type="application/json")

    async def model(name: str) -> Response:
        if name != served.id:
            message = f"there is no model '{name[:100]}' here; this server has '{served.id}'."
            return response_from_fault(Fault(404, message, "model", "model_not_found"))
        return Response(entry.model_dump_json(), media_type="application/json")

    async def health() -> Response:
        load, draining = worker.load(), app.chat.draining
        body = Health(
            status="draining" if draining else "ready",
            queued=load.queued,
            seeing=load.seeing,
            decoding=load.decoding,
            budget=load.budget,
        )
        return Response(body.model_dump_json(), 503 if draining else 200, media_type="application/json")

    async def numbers() -> Response:
        return Response(metrics.text(), headers={"content-type": metrics.content_type})

    for path, endpoint in (
        ("/v1/models", models),
        ("/v1/models/{name:path}", model),
        ("/health", health),
        ("/metrics", numbers),
    ):
        app.add_api_route(path, endpoint, methods=["GET"], response_model=None)


def _add_page(app: ServeApp, folder: Path) -> None:
    """The page at / and its files at /page/NAME: those that lie in the folder now, and no path of a client's making."""
    files = {
        item.name: item.read_bytes()
        for item in (sorted(folder.iterdir()) if folder.is_dir() else ())
        if item.suffix in _TYPES and item.is_file()
    }

    async def file(name: str = "index.html") -> Response:
        if name not in files:
            raise HTTPException(404)
        return Response(files[name], headers={**_PAGE_HEADERS, "content-type": _TYPES[Path(name).suffix]})

    async def page() -> Response:
        return await file()

    app.add_api_route("/", page, methods=["GET"], response_model=None)
    app.add_api_route("/page/{name}", file, methods=["GET"], response_model=None)


async def _not_found(request: Request, error: Exception) -> Response:
    status = error.status_code if isinstance(error, HTTPException) else 404
    known = "POST /v1/chat/completions, GET /v1/models, /health, /metrics"
    response = response_from_fault(
        Fault(status, f"no {request.method} {request.url.path[:200]} here; there is {known}.", code="not_found")
    )
    if isinstance(error, HTTPException) and error.headers:
        response.headers.update(error.headers)
    return response


async def _internal(request: Request, error: Exception) -> Response:
    return response_from_fault(fault_from_error(error))
