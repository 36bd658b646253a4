"""The side of a worker that decodes: several answers open at once, pulled in turn."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

from holov_export.errors import BusyError, LateError, UsageError
from holov_export.runtime.answer_stream import AnswerStream
from holov_export.runtime.session import Session
from holov_export.serve.budget import BudgetController
from holov_export.serve.jobs import Failed, Finished, Piece
from holov_export.serve.limits import Limits
from holov_export.serve.metrics import Observer, Outcome, Stages
from holov_export.serve.queueing import JobQueue, SeenJob, Ticket

log = logging.getLogger(__name__)


@dataclass
class Lane:
    """An answer that is being made. `first` is when its first token came."""

    ticket: Ticket
    stream: AnswerStream
    first: float | None = None


class DecodeLoop:
    """Makes answers of jobs that are seen.

    One step gives a lane to at most one new answer, which prefills, and then one token to every open answer. So an open
    answer waits for at most one prefill between two tokens, and the next new one for one token of each open answer:
    those are at most `lanes`, and a token costs far less than a prefill.
    """

    def __init__(
        self,
        session: Session,
        queue: JobQueue,
        budget: BudgetController,
        observe: Observer,
        limits: Limits,
        clock: Callable[[], float],
    ) -> None:
        self._session, self._queue, self._budget = session, queue, budget
        self._observe, self._limits, self._clock = observe, limits, clock
        self._lanes: list[Lane] = []

    @property
    def decoding(self) -> int:
        """Answers that are being made."""
        return len(self._lanes)

    @property
    def has_lane(self) -> bool:
        """Whether one more answer may be begun."""
        return len(self._lanes) < min(self._limits.streams, self._session.decoder.lanes)

    def step(self) -> bool:
        """One token for every open answer. False if nothing was to do."""
        self.sweep()
        item = self._queue.next_seen() if self.has_lane else None
        if item is not None:
            self._begin(item)
        open_lanes = list(self._lanes)
        for lane in open_lanes:
            self._pull(lane)
        return item is not None or bool(open_lanes)

    def sweep(self) -> None:
        """Drop what was cancelled, and what is late."""
        for ticket in self._queue.take_cancelled():
            lane = next((lane for lane in self._lanes if lane.ticket is ticket), None)
            self._end(ticket, lane, "cancelled")
        for ticket in self._queue.take_overdue():
            waited = self._clock() - ticket.accepted
            self.fail(ticket, LateError(f"the request has waited {waited:.1f} s.", hint="Try again later."))
        limit = self._limits.request_seconds
        for lane in list(self._lanes):
            if self._clock() - lane.ticket.accepted >= limit:
                self.fail(lane.ticket, LateError(f"the answer took longer than {limit:g} s."), lane)

    def _begin(self, item: SeenJob) -> None:
        """Open an answer; its first token comes with the next pull."""
        ticket, seen = item.ticket, item.seen
        if ticket.over:
            return
        try:
            stream = self._session.answer_stream(
                seen.images,
                ticket.job.text,
                videos=seen.videos,
                sampling=ticket.job.sampling,
                raw=True,
                stages=item.stages,
            )
        except Exception as error:
            self.fail(ticket, error)
            return
        self._lanes.append(Lane(ticket, stream))

    def _pull(self, lane: Lane) -> None:
        """One token. What goes wrong concerns this answer; a decoder that is broken fails the others at their turn."""
        ticket, stream = lane.ticket, lane.stream
        if ticket.over:
            return  # the next sweep closes it
        try:
            piece = next(stream)
        except StopIteration:
            piece = ""
        except Exception as error:
            self.fail(ticket, error, lane)
            return
        if lane.first is None:
            lane.first = self._clock()
            self._had_first(lane, lane.first - ticket.accepted)
            ticket.tell(Piece(piece, len(stream.token_ids)))
        elif piece:
            ticket.tell(Piece(piece, len(stream.token_ids)))
        if stream.ended:
            now = self._clock()
            ttft = lane.first - ticket.accepted
            generation = stream.generation()
            self._end(ticket, lane, "finished")
            ticket.tell(Finished(generation, ttft, now - ticket.accepted))

    def _had_first(self, lane: Lane, ttft: float) -> None:
        ticket = lane.ticket
        with self._queue.changed:
            self._budget.observe(
                self._clock(),
                ttft=ttft,
                waited=ticket.waited,
                budget=ticket.budget if ticket.weight and ticket.job.budget is None else None,
                waiting=self._queue.waiting + self._queue.seen,
                alone=ticket.alone and self._queue.live == 1,
            )
        self._observe.first_token(ttft=ttft, budget=ticket.budget if ticket.weight else None)

    def fail(self, ticket: Ticket, error: Exception, lane: Lane | None = None) -> None:
        """End a job with an error."""
        outcome = outcome_of(error)
        if outcome == "failed":
            log.error("%s failed", ticket.job.name, exc_info=error)
        self._end(ticket, lane, outcome)
        ticket.tell(Failed(error))

    def _end(self, ticket: Ticket, lane: Lane | None, outcome: Outcome) -> None:
        """Free what a job holds and count it, once."""
        prompt_tokens = new_tokens = 0
        stages = Stages(queue=ticket.waited)
        if lane is not None:
            self._lanes.remove(lane)
            try:
                lane.stream.close()
            except Exception:
                log.exception("%s: its stream does not close", ticket.job.name)
            prompt_tokens, new_tokens = len(lane.stream.prompt), len(lane.stream.token_ids)
            if lane.stream.prefilled:
                times = lane.stream.generation().timings
                stages = Stages(stages.queue, times.stitch, times.setup, times.prefill, times.decode)
        if self._queue.forget(ticket):
            total = self._clock() - ticket.accepted
            self._observe.ended(outcome, total=total, prompt_tokens=prompt_tokens, new_tokens=new_tokens, stages=stages)

    def stop(self) -> None:
        """End everything in hand: the server is stopping."""
        error = BusyError("the server is shutting down.", retry_after=5.0)
        for lane in list(self._lanes):
            self.fail(lane.ticket, error, lane)
        for ticket in self._queue.take_all():
            self.fail(ticket, error)


def outcome_of(error: Exception) -> Outcome:
    """How a job ends that fails with this."""
    if isinstance(error, UsageError):
        return "refused"
    if isinstance(error, LateError):
        return "late"
    return "stopped" if isinstance(error, BusyError) else "failed"
