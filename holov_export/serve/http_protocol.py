"""uvicorn's HTTP protocol, with clocks for clients that send or read too slowly.

Source of the names that are used: uvicorn 0.54 protocols/http/h11_impl.py (H11Protocol: app_state, cycle, transport,
on_response_complete). uvicorn has a clock for idle connections only.
"""

from __future__ import annotations

import asyncio
import socket
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

#: seconds from the end of one answer, or from the connection, to the whole head of the next request, or to the end of a
#: refused request's body
HEAD_SECONDS = 20.0
#: seconds after which a client that takes nothing, or is not there any more, is given up. Linux only
_UNTAKEN_SECONDS = 60
_PROBE_AFTER, _PROBE_EVERY, _PROBES = 30, 10, 3


class PatientProtocol(H11Protocol):
    """Cuts connections whose client is too slow; the application finds `abort` in the state of each request."""

    head_seconds = HEAD_SECONDS

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.app_state: dict[str, Any] = {**self.app_state, "abort": transport.abort}
        self._quiet_since = self.loop.time()
        self._clock = self.loop.call_later(self.head_seconds, self._look)
        plain = transport.get_extra_info("socket")
        if plain is not None and plain.family in (socket.AF_INET, socket.AF_INET6):
            _give_up_on_the_dead(plain)

    def connection_lost(self, exc: Exception | None) -> None:
        self._clock.cancel()
        super().connection_lost(exc)

    def on_response_complete(self) -> None:
        self._quiet_since = self.loop.time()
        super().on_response_complete()

    def _look(self) -> None:
        """Cut a connection that has had no request at work for too long."""
        busy = self.cycle is not None and not self.cycle.response_complete
        left = self.head_seconds if busy else self._quiet_since + self.head_seconds - self.loop.time()
        if left <= 0:
            self.transport.abort()
        else:
            self._clock = self.loop.call_later(left, self._look)


def _give_up_on_the_dead(connection: Any) -> None:
    """Let the system end connections whose other side is gone without a word, or takes no byte of what is sent."""
    options = (
        (socket.SOL_SOCKET, "SO_KEEPALIVE", 1),
        (socket.IPPROTO_TCP, "TCP_KEEPIDLE", _PROBE_AFTER),
        (socket.IPPROTO_TCP, "TCP_KEEPINTVL", _PROBE_EVERY),
        (socket.IPPROTO_TCP, "TCP_KEEPCNT", _PROBES),
        (socket.IPPROTO_TCP, "TCP_USER_TIMEOUT", _UNTAKEN_SECONDS * 1000),
    )
    for level, name, value in options:
        if hasattr(socket, name):
            connection.setsockopt(level, getattr(socket, name), value)
