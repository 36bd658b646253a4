"""A worker that answers one job after the other in one thread, and requests for it."""

from __future__ import annotations

import base64
import io
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

from PIL import Image
from toys import RecitingDecoder

from holov_export.bundle import Bundle
from holov_export.errors import BusyError
from holov_export.runtime.session import Session
from holov_export.serve.jobs import Deliver, Failed, Finished, Job, Piece, Seeing


@dataclass(frozen=True)
class Load:
    queued: int = 0
    seeing: int = 0
    decoding: int = 0
    budget: int = 7


class Ticket:
    def __init__(self) -> None:
        self.cancelled = threading.Event()

    def cancel(self) -> None:
        self.cancelled.set()

    def wait_for(self, gate: threading.Event) -> None:
        """Until it is open, but not when nobody wants the answer any more."""
        while not gate.wait(0.01) and not self.cancelled.is_set():
            pass


@dataclass
class PlainWorker:
    """Has a session's answers; `gate` holds every job until it is set, `step` every token."""

    session: Session
    budget: int = 7
    most: int = 100
    gate: threading.Event = field(default_factory=threading.Event)
    step: threading.Event = field(default_factory=threading.Event)
    jobs: list[Job] = field(default_factory=list)
    tickets: list[Ticket] = field(default_factory=list)
    failure: Exception | None = None

    def __post_init__(self) -> None:
        self.gate.set()
        self.step.set()
        self._thread = ThreadPoolExecutor(1)

    def submit(self, job: Job, deliver: Deliver) -> Ticket:
        if len(self.jobs) >= self.most:
            raise BusyError("the queue is full.", retry_after=2.5)
        ticket = Ticket()
        self.jobs.append(job)
        self.tickets.append(ticket)
        self._thread.submit(self._work, job, deliver, ticket, perf_counter())
        return ticket

    def load(self) -> Load:
        return Load(queued=len(self.jobs), budget=self.budget)

    def close(self, drain_seconds: float = 0) -> None:
        self._thread.shutdown(cancel_futures=not drain_seconds)

    def _work(self, job: Job, deliver: Deliver, ticket: Ticket, began: float) -> None:
        ticket.wait_for(self.gate)
        try:
            if self.failure is not None:
                raise self.failure
            budget = job.budget or self.budget
            waited = perf_counter() - began
            count = len(job.media.images) + len(job.media.videos)
            (seen,), stages = self.session.see_groups([job.media], [budget] * count)
            deliver(Seeing(budget, seen, waited, stages.preprocess, stages.vision, count))
            stream = self.session.answer_stream(
                seen.images, job.text, videos=seen.videos, sampling=job.sampling, raw=True, stages=stages
            )
            ttft = 0.0
            for piece in stream:
                ttft = ttft or perf_counter() - began
                ticket.wait_for(self.step)
                if ticket.cancelled.is_set():
                    stream.close()
                    return
                deliver(Piece(piece, len(stream.token_ids)))
            deliver(Finished(stream.generation(), ttft, perf_counter() - began))
        except Exception as error:
            deliver(Failed(error))


@contextmanager
def reciting_worker(bundle: Bundle, text: str) -> Iterator[PlainWorker]:
    """A worker whose answers are `text`."""
    plain = Session.open(bundle, decoder="none", provider="cpu", threads=1)
    ids = plain.encoder.tokenizer.encode(text, add_special_tokens=False).ids
    with Session.open(bundle, decoder=RecitingDecoder(ids), provider="cpu", threads=1) as session:
        worker = PlainWorker(session)
        yield worker
        worker.close()


def encoded(image: Image.Image, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def data_url(data: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def image_part(url: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


def question(words: str = "what is this?", *urls: str, **more: Any) -> dict[str, Any]:
    """A request with one message: images, then words."""
    parts = [*map(image_part, urls), {"type": "text", "text": words}]
    return {"model": "tiny-llava", "messages": [{"role": "user", "content": parts}], **more}
