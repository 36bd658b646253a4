"""POST /v1/chat/completions: a body becomes a job, its events become an answer."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol, TypeVar
from uuid import uuid4

from starlette.requests import Request
from starlette.responses import Response

from holov_export.errors import BusyError
from holov_export.runtime.prompt import Turn, TurnPart
from holov_export.runtime.stitch import PromptEncoder, check_fit
from holov_export.serve.body import ClientLeftError, Lease, Room, Shelf, body_from_request
from holov_export.serve.faults import Fault, fault_from_error, refused, reply_of_fault, response_from_fault
from holov_export.serve.jobs import Deliver, Failed, Finished, Job, Piece, Seeing
from holov_export.serve.limits import Limits
from holov_export.serve.parts import (
    CheckedMedia,
    Reference,
    Sources,
    check_reference,
    checked_from_reference,
    checked_media,
    decoded_from_checked,
    references_from_request,
)
from holov_export.serve.remote import RemoteImages
from holov_export.serve.replies import Replies, event_from_json
from holov_export.serve.served import Served
from holov_export.serve.sse import EventStream, Mailbox, unless_gone
from holov_export.serve.wire import ChatRequest, TextPart, request_from_body, sampling_from_request
from holov_export.spec import ModelSpec

_T = TypeVar("_T")
#: bodies of the largest size, and pictures of the largest size, that may be in memory at once
_LARGEST_AT_ONCE = 8
#: the client has left, nobody reads this. Source of the number: nginx, NGX_HTTP_CLIENT_CLOSED_REQUEST
_LEFT = 499
#: why a request never became a job, by its status; any other is invalid
_REASONS = {408: "slow", 413: "too_large", 429: "full", 500: "failed", 503: "closing"}


class Cancellable(Protocol):
    """Of a `Ticket`, what answering needs."""

    def cancel(self) -> None: ...


class Answering(Protocol):
    """Of a `Worker`, what answering needs."""

    def submit(self, job: Job, deliver: Deliver) -> Cancellable: ...


@dataclass(frozen=True)
class ChatSettings:
    """How requests are read and answered.

    Attributes:
        upload_seconds: for a whole body. write_seconds: for a client to take a piece of its answer.
        decode_threads: images are decoded in so many threads.
    """

    limits: Limits = field(default_factory=Limits)
    sources: Sources = field(default_factory=Sources)
    upload_seconds: float = 60.0
    write_seconds: float = 30.0
    decode_threads: int = 2


@dataclass(frozen=True)
class _Ready:
    """A job, and what is needed to say its answer."""

    job: Job
    request: ChatRequest
    sizes: tuple[tuple[int, int], ...]


class Chat:
    """Answers requests.

    Attributes:
        draining: the server is shutting down; new requests are refused.
    """

    def __init__(
        self,
        worker: Answering,
        encoder: PromptEncoder,
        model: ModelSpec,
        served: Served,
        settings: ChatSettings,
        rejected: Callable[[str], None],
        remote: RemoteImages | None = None,
    ) -> None:
        """Args: rejected: is told why a request never became a job, in one of a few words."""
        limits = settings.limits
        self._worker, self._encoder, self._model, self._served = worker, encoder, model, served
        self._settings, self._limits = settings, limits
        self._rejected = rejected
        self._remote = remote or RemoteImages(limits.body_bytes)
        self._threads = ThreadPoolExecutor(settings.decode_threads, thread_name_prefix="decode")
        self._shelf = Shelf(limits.body_bytes * _LARGEST_AT_ONCE)
        self._room = Room(limits.pixels * _LARGEST_AT_ONCE, limits.queue_seconds)
        self._open = 0
        self.draining = False

    async def answer(self, request: Request) -> Response:
        """The endpoint."""
        name = f"chatcmpl-{uuid4().hex}"
        self._open += 1
        try:
            response = await self._answered(request, name)
        except ClientLeftError:
            response = Response(status_code=_LEFT)
        except Exception as error:
            response = response_from_fault(fault_from_error(error, draining=self.draining))
        finally:
            self._open -= 1
        response.headers["x-request-id"] = name
        return response

    async def _answered(self, request: Request, name: str) -> Response:
        try:
            ready, lease = await self._ready(request, name)
        except ClientLeftError:
            self._rejected("left")
            raise
        except Exception as error:
            self._rejected(_REASONS.get(fault_from_error(error, draining=self.draining).status, "invalid"))
            raise
        return await self._of_job(request, ready, lease)

    async def _ready(self, request: Request, name: str) -> tuple[_Ready, Lease]:
        """Read the body and make it a job; the memory of its pictures must be given back."""
        if self.draining:
            raise BusyError("the server is shutting down.", retry_after=5.0)
        if self._open > self._limits.queue:  # before its body takes memory; the worker counts those that wait there
            raise BusyError("too many requests.", retry_after=1.0)
        body = await body_from_request(request, self._limits.body_bytes, self._settings.upload_seconds, self._shelf)
        try:
            prepared = await unless_gone(request.receive, self._prepared(body, name))
        finally:
            self._shelf.take(len(body))
        if prepared is None:
            raise ClientLeftError
        return prepared

    async def _prepared(self, body: bytes, name: str) -> tuple[_Ready, Lease]:
        """The job of a body, and the memory that its pictures take."""
        wanted = await self._in_thread(partial(request_from_body, body, self._limits))
        self._check_names(wanted)
        sampling = sampling_from_request(wanted, self._limits)
        references = references_from_request(wanted, self._limits, self._model)
        for item in references:
            check_reference(item, self._settings.sources)
        checked = [await self._checked(item) for item in references]
        lease = await self._room.enter(sum(item.pixels for item in checked))
        try:
            decoded = await self._in_thread(partial(decoded_from_checked, checked, self._limits))
            text = await self._in_thread(partial(self._text, wanted, sampling.max_new_tokens))
        except BaseException:
            lease.end()
            raise
        job = Job(name, text, decoded.media, sampling, wanted.budget)
        return _Ready(job, wanted, decoded.sizes), lease

    def _check_names(self, wanted: ChatRequest) -> None:
        served = self._served
        if wanted.model != served.id:
            message = f"there is no model '{wanted.model[:100]}' here; this server has '{served.id}'."
            raise refused(message, param="model", code="model_not_found", status=404)
        if wanted.budget is not None and wanted.budget > served.largest_budget:
            message = f"the budget is {wanted.budget}, it must be in 1..{served.largest_budget}."
            raise refused(message, param="budget", code="invalid_budget")
        if wanted.spread != "frames":
            raise refused("this server spends the budget of a clip evenly over its frames.", param="spread")

    async def _checked(self, item: Reference) -> CheckedMedia:
        if item.scheme in ("http", "https"):
            data = await self._remote.fetch(item)
            return await self._in_thread(partial(checked_media, item, data, self._limits))
        return await self._in_thread(partial(checked_from_reference, item, self._settings.sources, self._limits))

    def _text(self, wanted: ChatRequest, new_tokens: int) -> str:
        """The rendered prompt; one that cannot fit is refused before it waits."""
        turns = turns_from_request(wanted)
        text = self._encoder.text_from_turns(turns)
        images, videos = (sum(turn.count(kind) for turn in turns) for kind in ("image", "video"))
        check_fit(self._encoder, text, images=images, videos=videos)
        return text

    async def _in_thread(self, work: Callable[[], _T]) -> _T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    async def _of_job(self, request: Request, ready: _Ready, lease: Lease) -> Response:
        """Hand the job in, and wait for what decides about the status: all of it, or of a stream the first event."""
        mailbox = Mailbox()
        try:
            ticket = self._worker.submit(ready.job, mailbox.deliver)
        except BaseException:
            lease.end()
            raise

        def end() -> None:
            ticket.cancel()
            lease.end()

        streamed = False
        try:
            answer = _Answer(mailbox, lease, self._replies(ready), partial(fault_from_error, draining=self.draining))
            first = await unless_gone(request.receive, answer.begun())
            if first is None:
                raise ClientLeftError
            if ready.request.stream and not isinstance(first, Failed):
                streamed = True
                return EventStream(answer.events(), end, self._settings.write_seconds)
            body = await unless_gone(request.receive, answer.whole())
            if body is None:
                raise ClientLeftError
            return Response(body, media_type="application/json")
        finally:
            if not streamed:
                end()

    def _replies(self, ready: _Ready) -> Replies:
        options = ready.request.stream_options
        return Replies(
            ready.job.name,
            int(time.time()),
            self._served.id,
            ready.sizes,
            kept=ready.request.kept,
            usage_chunk=options is not None and options.include_usage,
        )

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)


class _Answer:
    """The events of one job, as a whole answer or as a stream."""

    def __init__(
        self, mailbox: Mailbox, lease: Lease, replies: Replies, fault_of: Callable[[Exception], Fault]
    ) -> None:
        self._mailbox, self._lease, self._replies, self._fault_of = mailbox, lease, replies, fault_of
        self._seeing: Seeing | None = None
        self._first: Seeing | Piece | Finished | Failed | None = None

    async def begun(self) -> Seeing | Piece | Finished | Failed:
        """The first event; from then on the pictures are not needed."""
        self._first = await self._mailbox.next()
        self._lease.end()
        return self._first

    async def _next(self) -> Seeing | Piece | Finished | Failed:
        event, self._first = self._first, None
        event = event or await self._mailbox.next()
        if isinstance(event, Seeing):
            self._seeing = event
        return event

    async def whole(self) -> bytes:
        """The body of an answer that is not streamed; raises what the job failed with."""
        while True:
            event = await self._next()
            if isinstance(event, Failed):
                raise event.error
            if isinstance(event, Finished):
                return self._replies.completion(self._seeing, event)

    async def events(self) -> AsyncIterator[bytes]:
        """Server-sent events; a failure is one of them."""
        event = await self._next()
        yield self._replies.first(self._seeing)
        while True:
            if isinstance(event, Piece) and event.text:
                yield self._replies.piece(event.text)
            elif isinstance(event, Finished):
                for last in self._replies.last(self._seeing, event):
                    yield last
            elif isinstance(event, Failed):
                yield event_from_json(reply_of_fault(self._fault_of(event.error)).model_dump_json())
            if isinstance(event, (Finished, Failed)):
                yield b"data: [DONE]\n\n"
                return
            event = await self._next()


def turns_from_request(request: ChatRequest) -> tuple[Turn, ...]:
    """The conversation, as prompts are made of it."""
    turns = []
    for message in request.messages:
        parts = tuple(
            TurnPart("text", part.text)
            if isinstance(part, TextPart)
            else TurnPart("image" if part.type == "image_url" else "video")
            for part in message.parts
        )
        turns.append(Turn("system" if message.role == "developer" else message.role, parts))
    return tuple(turns)
