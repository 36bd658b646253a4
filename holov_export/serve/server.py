"""A server from a session: bind, load, warm up, listen, and end in order."""

from __future__ import annotations

import errno
import ipaddress
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from types import FrameType

import uvicorn
from PIL import Image

from holov_export import __version__
from holov_export.errors import BudgetError, EnvironmentFaultError
from holov_export.runtime.session import Session
from holov_export.serve.app import AppSettings, ServeApp, app_from
from holov_export.serve.budget import BudgetController
from holov_export.serve.http_protocol import PatientProtocol
from holov_export.serve.limits import BudgetRange
from holov_export.serve.metrics import BuildFacts, PrometheusMetrics
from holov_export.serve.served import Served, largest_budget, served_from_session
from holov_export.serve.worker import Worker
from holov_export.tensors import SamplingSettings

#: open connections for each request of the queue: refused ones and idle ones have a connection as well
_CONNECTIONS, _SPARE_CONNECTIONS = 4, 64
#: seconds after the end of draining for answers that are on their way out
_LAST_WORDS = 2
_BACKLOG = 2048
#: budgets of a controller when only its target is said: an eighteenth and a third of N, 32 and 192 of 576
_SMALLEST_SHARE, _LARGEST_SHARE = 18, 3


@dataclass(frozen=True)
class ServerSettings:
    """A server.

    Attributes:
        host, port: where it listens; port 0 lets the system choose.
        name: of the model in requests; None for its own.
        access_log: a line for each request.
    """

    app: AppSettings
    budgets: BudgetRange
    host: str = "127.0.0.1"
    port: int = 8080
    name: str | None = None
    access_log: bool = False
    tell: Callable[[str], None] = field(default=print, repr=False)


def budgets_for(
    session: Session, *, target: float | None, smallest: int | None, largest: int | None, budget: int | None
) -> BudgetRange:
    """What images get that come without a budget.

    Args:
        target: seconds to the first token; with it `smallest` and `largest`, without it `budget`. None of each is the
            usual one.

    Raises:
        BudgetError: outside 1..N.
    """
    most = largest_budget(session)
    if target is None:
        least = wanted = session.default_budget if budget is None else budget
    else:
        wanted = max(1, most // _LARGEST_SHARE, smallest or 0) if largest is None else largest
        least = min(wanted, max(1, most // _SMALLEST_SHARE)) if smallest is None else smallest
    for value in (least, wanted):
        if not 1 <= value <= most:
            raise BudgetError(f"the budget is {value}, it must be in 1..{most} (the tokens of one image).")
    if least > wanted:
        raise BudgetError(f"the smallest budget {least} is larger than the largest {wanted}.")
    return BudgetRange(target_ttft=target, smallest=least, largest=wanted)


def socket_for(host: str, port: int) -> socket.socket:
    """A socket that is bound and does not listen yet.

    Raises:
        EnvironmentFaultError: the port is in use or not allowed, or there is no such host.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except OSError as error:
        raise EnvironmentFaultError(f"there is no host '{host}': {error.strerror}.") from error
    made = socket.socket(family, kind, protocol)
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(address)
    except OSError as error:
        made.close()
        raise _no_port(host, port, error) from error
    return made


def _no_port(host: str, port: int, error: OSError) -> EnvironmentFaultError:
    if error.errno == errno.EADDRINUSE:
        hint = "Another program listens there. Choose another --port, or --port 0 for a free one."
        return EnvironmentFaultError(f"port {port} of {host} is in use.", hint=hint)
    hint = "Ports below 1024 need rights." if error.errno == errno.EACCES else ""
    return EnvironmentFaultError(f"cannot listen at {host}, port {port}: {error.strerror}.", hint=hint)


def url_of(bound: socket.socket) -> str:
    host, port = bound.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def is_loopback(bound: socket.socket) -> bool:
    return ipaddress.ip_address(bound.getsockname()[0].partition("%")[0]).is_loopback


def warm_up(session: Session, budget: int) -> None:
    """One short answer, so that the first client does not wait for what is loaded on first use."""
    picture = Image.linear_gradient("L").convert("RGB")
    session.ask(picture, "What is this?", budget=budget, sampling=SamplingSettings(max_new_tokens=2))


def serve(session: Session, settings: ServerSettings) -> None:
    """Serve until SIGTERM or SIGINT; then finish what has been accepted and return. A second signal ends the process.

    Must be called from the main thread. Closes the session.

    Raises:
        EnvironmentFaultError: it cannot listen, or this machine cannot load the decoder.
    """
    bound = socket_for(settings.host, settings.port)
    try:
        with session:
            warm_up(session, settings.budgets.largest)
            _serve_at(bound, session, settings)
    finally:
        bound.close()


def _serve_at(bound: socket.socket, session: Session, settings: ServerSettings) -> None:
    limits = settings.app.chat.limits
    served = served_from_session(session, settings.budgets, int(time.time()), settings.name)
    metrics = PrometheusMetrics(BuildFacts(__version__, served.model, served.method, served.engine))
    worker = Worker(session, limits, BudgetController(settings.budgets), observe=metrics)
    only_here = is_loopback(bound)
    app = app_from(worker, session, served, replace(settings.app, only_here=only_here), metrics)
    _allow_files()
    config = uvicorn.Config(
        app,
        http=PatientProtocol,
        ws="none",
        loop="asyncio",
        lifespan="off",
        log_config=None,
        log_level="info" if settings.access_log else "warning",
        access_log=settings.access_log,
        server_header=False,
        proxy_headers=False,
        backlog=_BACKLOG,
        limit_concurrency=limits.queue * _CONNECTIONS + _SPARE_CONNECTIONS,
        timeout_graceful_shutdown=int(limits.drain_seconds) + _LAST_WORDS,
    )
    server = SignalledServer(config, app, worker, limits.drain_seconds, lambda: settings.tell(_line(bound, served)))
    if settings.app.api_key is None and not only_here:
        settings.tell("warning: without --api-key everybody who reaches this address can ask.")
    worker.start()
    try:
        server.run(sockets=[bound])
    except OSError as error:
        raise _no_port(settings.host, settings.port, error) from error
    finally:
        server.finish()
        app.chat.close()


def _line(bound: socket.socket, served: Served) -> str:
    return f"{url_of(bound)}  {served.id}  {served.engine}"


def _allow_files() -> None:
    """As many connections as the system allows; the usual 1024 files are fewer than a full queue needs."""
    try:
        import resource
    except ImportError:  # Windows
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, max(soft, 65536)), hard))


class SignalledServer(uvicorn.Server):
    """uvicorn, which on the first signal lets the worker finish, and on the second ends the process.

    uvicorn alone would end with the signal after its shutdown; the exit code of an orderly end is 0.
    """

    def __init__(
        self, config: uvicorn.Config, app: ServeApp, worker: Worker, drain_seconds: float, on_ready: Callable[[], None]
    ) -> None:
        super().__init__(config)
        self._app, self._worker, self._drain_seconds = app, worker, drain_seconds
        self._on_ready = on_ready
        self._closing: threading.Thread | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._on_ready()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.should_exit:
            sys.stderr.flush()
            os._exit(128 + sig)  # threads are at work in native code; nothing else ends at once
        logging.getLogger("holov_export.serve").info("shutting down after %s", signal.Signals(sig).name)
        self.begin_to_end()

    def begin_to_end(self) -> None:
        """Accept nothing more; what has been accepted is answered. May be called from any thread."""
        self._app.chat.draining = True
        self.should_exit = True
        if self._closing is None:
            self._closing = threading.Thread(target=self._worker.close, args=(self._drain_seconds,), name="drain")
            self._closing.start()

    def finish(self) -> None:
        """Wait for the worker's end."""
        self.begin_to_end()
        assert self._closing is not None
        self._closing.join()
