"""Bodies, read with a limit and a clock, and the memory that all requests together may hold."""

from __future__ import annotations

import asyncio
from collections import deque

from starlette.requests import Request
from starlette.types import Receive

from holov_export.errors import BusyError, LateError
from holov_export.serve.faults import Fault, FaultError

#: seconds that a client may be silent in the middle of its body
SILENT_SECONDS = 15.0
#: a body that says it is larger than so many times the limit ends its connection; the rest of a smaller one is read and
#: thrown away, so that its client sees the answer and not a broken connection
_THROWN_AWAY = 8


class Shelf:
    """Memory for bodies. What does not fit is refused: who waits with half a body would block whoever waits too."""

    def __init__(self, capacity: int) -> None:
        """Args: capacity: bytes."""
        self._capacity, self._held = capacity, 0

    def put(self, amount: int) -> None:
        """Raises: BusyError: there is no room."""
        if self._held + amount > self._capacity:
            raise BusyError("too many bodies are being read at once.", retry_after=2.0)
        self._held += amount

    def take(self, amount: int) -> None:
        self._held -= amount


class Room:
    """Memory for decoded pictures. What does not fit waits, in the order of its arrival."""

    def __init__(self, capacity: int, seconds: float) -> None:
        """Args: capacity: pixels. seconds: the longest wait."""
        self._capacity, self._seconds = capacity, seconds
        self._free = capacity
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()

    async def enter(self, amount: int) -> Lease:
        """Room for `amount`; more than there is gets all of it.

        Raises:
            LateError: there was none for too long.
        """
        amount = min(amount, self._capacity)
        if self._waiting or amount > self._free:
            turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            entry = (amount, turn)
            self._waiting.append(entry)
            try:
                await asyncio.wait_for(asyncio.shield(turn), self._seconds)
            except asyncio.TimeoutError:
                self._forget(entry)
                raise LateError(f"there was no memory for the images for {self._seconds:g} s.") from None
            except BaseException:
                self._forget(entry)
                raise
        else:
            self._free -= amount
        return Lease(self, amount)

    def _forget(self, entry: tuple[int, asyncio.Future[None]]) -> None:
        """Somebody who waited has left; its turn may have come in the same moment."""
        amount, turn = entry
        if turn.done():
            self._free += amount
        else:
            self._waiting.remove(entry)
        self._admit()

    def leave(self, amount: int) -> None:
        """What `Lease.end` does."""
        self._free += amount
        self._admit()

    def _admit(self) -> None:
        while self._waiting and self._waiting[0][0] <= self._free:
            amount, turn = self._waiting.popleft()
            self._free -= amount
            turn.set_result(None)


class Lease:
    """Some of a `Room`; `end` may be called twice."""

    def __init__(self, room: Room, amount: int) -> None:
        self._room, self._amount = room, amount

    def end(self) -> None:
        amount, self._amount = self._amount, 0
        if amount:
            self._room.leave(amount)


class ClientLeftError(Exception):
    """Nobody waits for an answer any more."""


async def body_from_request(request: Request, most: int, seconds: float, shelf: Shelf) -> bytes:
    """Read a JSON body. The caller gives its length back to the shelf.

    Args:
        most: bytes. seconds: for all of it.

    Raises:
        FaultError: 413, 415 or 408. BusyError: no room. ClientLeftError: the client left.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise FaultError(Fault(415, "the body must be application/json.", code="unsupported_media_type"))
    if request.headers.get("content-encoding", "identity") != "identity":
        raise FaultError(Fault(415, "compressed bodies are not read.", code="unsupported_media_type"))
    said = int(request.headers.get("content-length", "0"))
    if said > most:
        raise _too_large(most, close=said > most * _THROWN_AWAY)
    parts: list[bytes] = []
    held = 0
    try:
        ends = asyncio.get_running_loop().time() + seconds
        while True:
            chunk, more = await _next_chunk(request.receive, ends)
            held += len(chunk)
            if held > most:
                held -= len(chunk)
                raise _too_large(most, close=True)
            parts.append(chunk)
            try:
                shelf.put(len(chunk))
            except BusyError:
                held -= len(chunk)
                raise
            if not more:
                return b"".join(parts)
    except BaseException:
        shelf.take(held)
        raise


async def _next_chunk(receive: Receive, ends: float) -> tuple[bytes, bool]:
    """(bytes, whether more come)."""
    left = min(SILENT_SECONDS, ends - asyncio.get_running_loop().time())
    try:
        message = await asyncio.wait_for(receive(), max(left, 0.001))
    except asyncio.TimeoutError:
        raise FaultError(Fault(408, "the body came too slowly.", code="timeout", close=True)) from None
    if message["type"] == "http.disconnect":
        raise ClientLeftError
    return message.get("body", b""), message.get("more_body", False)


def _too_large(most: int, *, close: bool) -> FaultError:
    return FaultError(Fault(413, f"the body has more than {most:,} bytes.", code="request_too_large", close=close))
