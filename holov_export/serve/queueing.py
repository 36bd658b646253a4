"""Jobs on their way through a worker, each in exactly one place.

waiting --take--> (vision graph) --put--> seen --next_seen--> (decoding) --forget--> gone
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from threading import Condition, RLock

from holov_export.errors import BusyError
from holov_export.runtime.answer_stream import EarlierStages
from holov_export.runtime.media import Media, Seen
from holov_export.serve.jobs import Deliver, Event, Failed, Finished, Job
from holov_export.serve.limits import Limits

log = logging.getLogger(__name__)

_SHORTEST_RETRY, _LONGEST_RETRY = 1.0, 60.0
_MEMORY = 0.2  # weight of the newest interval between two ends


class Ticket:
    """A job that a worker has accepted.

    Attributes:
        job: what is wanted; without its images once they are seen, for they are large.
        weight: places that it takes in a vision batch; 0 without images and clips.
        accepted, taken: seconds on the worker's clock.
        budget: tokens that each of its images may keep; None until it is taken, and without images.
        alone: nothing else was in hand when it was accepted.
    """

    def __init__(
        self, job: Job, deliver: Deliver, accepted: float, weight: int, on_cancel: Callable[[Ticket], None], alone: bool
    ) -> None:
        self.job, self.weight, self.alone = job, weight, alone
        self.accepted, self.taken = accepted, accepted
        self.budget: int | None = None
        self._deliver: Deliver | None = deliver
        self._on_cancel = on_cancel
        self._lock = RLock()

    @property
    def waited(self) -> float:
        """Seconds until it was taken."""
        return self.taken - self.accepted

    @property
    def over(self) -> bool:
        """Whether its last event has been told, or it was cancelled."""
        return self._deliver is None

    def tell(self, event: Event) -> None:
        """Deliver an event, unless the job is over. No event comes once `cancel` has returned."""
        with self._lock:
            deliver = self._deliver
            if deliver is None:
                return
            if isinstance(event, (Finished, Failed)):
                self._deliver = None
            try:
                deliver(event)
            except Exception:  # what is wrong with one client must not end the worker
                log.exception("%s: an event could not be delivered", self.job.name)
                self.cancel()

    def cancel(self) -> None:
        """Nobody wants the answer any more. May be called from any thread, at any time and again."""
        with self._lock:
            if self._deliver is None:
                return
            self._deliver = None
        self._on_cancel(self)

    def forget_media(self) -> None:
        """Let go of the images."""
        job = self.job
        self.job = Job(job.name, job.text, Media(()), job.sampling, job.budget)


@dataclass(frozen=True)
class SeenJob:
    """A job whose images are seen, and the seconds that it took."""

    ticket: Ticket
    seen: Seen
    stages: EarlierStages


class JobQueue:
    """All jobs in hand. Every method may be called from any thread.

    Attributes:
        changed: is notified when there may be something to do. Its lock, which may be taken twice, guards everything
            here.
        version: grows with every such change.
    """

    def __init__(self, limits: Limits, clock: Callable[[], float], clip_weight: int = 1) -> None:
        """`clip_weight`: how many images of a vision batch a clip counts as."""
        self.version = 0
        self.changed = Condition(RLock())
        self._limits, self._clock, self._clip_weight = limits, clock, clip_weight
        self._patience = min(limits.queue_seconds, limits.request_seconds)
        self._waiting: deque[Ticket] = deque()
        self._seen: deque[SeenJob] = deque()
        self._live: set[Ticket] = set()
        self._cancelled: list[Ticket] = []
        self._closing = False
        self._last_end: float | None = None
        self._interval: float | None = None

    def _touch(self) -> None:
        self.version += 1
        self.changed.notify_all()

    def wake(self) -> None:
        """Let everybody who waits look around."""
        with self.changed:
            self._touch()

    def wait_for_change(self, version: int, seconds: float) -> None:
        """Return when something has changed since `version`, or a job is overdue, or after so long."""
        with self.changed:
            late = self._until_overdue()
            self.changed.wait_for(lambda: self.version != version, seconds if late is None else min(late, seconds))

    def submit(self, job: Job, deliver: Deliver) -> Ticket:
        """Accept a job.

        Raises:
            BusyError: as many are in hand as may be, or the server is stopping.
        """
        with self.changed:
            if self._closing:
                raise BusyError("the server is shutting down.", retry_after=_LONGEST_RETRY)
            if len(self._live) >= self._limits.queue:
                raise BusyError(
                    f"the queue is full: {len(self._live)} requests are in hand.", retry_after=self._retry_after()
                )
            weight = len(job.media.images) + self._clip_weight * len(job.media.videos)
            ticket = Ticket(job, deliver, self._clock(), weight, self._on_cancel, alone=not self._live)
            self._live.add(ticket)
            self._waiting.append(ticket)
            self._touch()
            return ticket

    def _retry_after(self) -> float:
        """Seconds until what is in hand will be answered, at the pace of late."""
        pace = 0.0 if self._interval is None else self._interval
        return min(max(pace * len(self._live), _SHORTEST_RETRY), _LONGEST_RETRY)

    def take(self, room: int) -> list[Ticket]:
        """The first jobs that wait, as many as have `room` images together; one with more only alone.

        Nobody overtakes: what does not fit ends the batch.
        """
        with self.changed:
            taken: list[Ticket] = []
            used = 0
            while self._waiting and used < room and not (used and used + self._waiting[0].weight > room):
                ticket = self._waiting.popleft()
                ticket.taken = self._clock()
                used += ticket.weight
                taken.append(ticket)
            return taken

    def put(self, seen: Sequence[SeenJob]) -> None:
        """These can be decoded."""
        with self.changed:
            self._seen.extend(item for item in seen if not item.ticket.over)
            self._touch()

    def next_seen(self) -> SeenJob | None:
        """The job whose answer begins next."""
        with self.changed:
            return self._seen.popleft() if self._seen else None

    def forget(self, ticket: Ticket) -> bool:
        """The job has ended. False if that was known."""
        with self.changed:
            if ticket not in self._live:
                return False
            self._live.remove(ticket)
            now = self._clock()
            if self._last_end is not None:
                interval = now - self._last_end
                known = interval if self._interval is None else self._interval
                self._interval = known + _MEMORY * (interval - known)
            # a pause in which there was nothing to do says nothing about the pace
            self._last_end = now if self._live else None
            self._touch()
            return True

    def _on_cancel(self, ticket: Ticket) -> None:
        """Take it out if it is here; what is being seen or decoded is dropped when the worker comes by."""
        with self.changed:
            if ticket not in self._live:
                return
            self._remove([ticket])
            self._cancelled.append(ticket)
            self._touch()

    def _remove(self, tickets: Sequence[Ticket]) -> None:
        self._waiting = deque(item for item in self._waiting if item not in tickets)
        self._seen = deque(item for item in self._seen if item.ticket not in tickets)

    def take_cancelled(self) -> list[Ticket]:
        """What was cancelled since the last call."""
        with self.changed:
            found, self._cancelled = self._cancelled, []
            return found

    def take_overdue(self) -> list[Ticket]:
        """Jobs that have waited too long for the vision graph or for a lane."""
        with self.changed:
            limit = self._clock() - self._patience
            late = []
            while self._waiting and self._waiting[0].accepted <= limit:
                late.append(self._waiting.popleft())
            while self._seen and self._seen[0].ticket.accepted <= limit:
                late.append(self._seen.popleft().ticket)
            return late

    def _until_overdue(self) -> float | None:
        """Seconds until a job is overdue; None if none waits."""
        first = [queue[0] for queue in (self._waiting, [item.ticket for item in self._seen]) if queue]
        if not first:
            return None
        return max(0.0, min(ticket.accepted for ticket in first) + self._patience - self._clock())

    @property
    def waiting(self) -> int:
        """Jobs that the vision graph has not seen."""
        return len(self._waiting)

    @property
    def seen(self) -> int:
        """Jobs whose decoding can begin."""
        return len(self._seen)

    @property
    def oldest_wait(self) -> float:
        """Seconds that the first of those that wait has waited."""
        with self.changed:
            return self._clock() - self._waiting[0].accepted if self._waiting else 0.0

    @property
    def newest_wait(self) -> float:
        """Seconds that the last of them has waited."""
        with self.changed:
            return self._clock() - self._waiting[-1].accepted if self._waiting else 0.0

    @property
    def live(self) -> int:
        """All jobs in hand."""
        return len(self._live)

    @property
    def closing(self) -> bool:
        return self._closing

    def stop_accepting(self) -> None:
        with self.changed:
            self._closing = True
            self._touch()

    def wait_until_empty(self, seconds: float) -> bool:
        """True once nothing is in hand."""
        with self.changed:
            return self.changed.wait_for(lambda: not self._live, timeout=seconds)

    def take_all(self) -> list[Ticket]:
        """Every job in hand; none waits any more, what is being seen or decoded is dropped when it is told its end."""
        with self.changed:
            self._waiting.clear()
            self._seen.clear()
            return list(self._live)
