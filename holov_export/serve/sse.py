"""Events of a worker cross into the event loop, and go out to a client that may be slow or leave."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import suppress
from typing import Any, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from holov_export.serve.jobs import Event

_T = TypeVar("_T")


class Mailbox:
    """Events of one job, put in by the worker's threads and taken out in the event loop.

    It has no limit of its own: a job has no more events than its answer has tokens, and that number is limited.
    """

    def __init__(self) -> None:
        """Must be made in the event loop that takes the events out."""
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[Event] = asyncio.Queue()

    def deliver(self, event: Event) -> None:
        """For `Worker.submit`. A loop that has ended has nobody who would read it."""
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)

    async def next(self) -> Event:
        return await self._events.get()


async def gone(receive: Receive) -> None:
    """Returns when the client has left; its body has been read."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, _T]) -> _T | None:
    """What `work` returns, or None where the client leaves before; `work` is cancelled then."""
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(gone(receive))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


class EventStream(Response):
    """Server-sent events for a client that reads them; one that does not, or that leaves, ends them.

    The server's buffers of a connection are bounded, so sending waits for a slow client; it waits `write_seconds`.
    Then the connection is cut: closing it would wait for the client to take what is buffered.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[bytes], end: Callable[[], None], write_seconds: float) -> None:
        """Args: end: is called once nothing more is sent, whatever the reason."""
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._events, self._end, self._write_seconds = events, end, write_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await unless_gone(receive, self._send_all(send))
        except asyncio.TimeoutError:
            abort = scope.get("state", {}).get("abort")
            if abort is not None:
                abort()
            await asyncio.sleep(0)  # the server hears of it before this returns, and does not call it an error
        finally:
            self._end()

    async def _send_all(self, send: Send) -> None:
        async def out(message: dict[str, Any]) -> None:
            await asyncio.wait_for(send(message), self._write_seconds)

        await out({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async for event in self._events:
            await out({"type": "http.response.body", "body": event, "more_body": True})
        await out({"type": "http.response.body", "body": b"", "more_body": False})
