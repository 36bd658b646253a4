"""The side of a worker that sees: what waits becomes one mixed-quota run of the vision graph."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from holov_export.runtime.answer_stream import EarlierStages
from holov_export.runtime.media import Seen
from holov_export.runtime.session import Session
from holov_export.serve.budget import BudgetController
from holov_export.serve.decode_loop import DecodeLoop
from holov_export.serve.jobs import Seeing
from holov_export.serve.metrics import Observer
from holov_export.serve.queueing import JobQueue, SeenJob, Ticket

log = logging.getLogger(__name__)

_NOTHING = Seen((), (), ())
_LONGEST_RUN = 0.1  # seconds
_MEMORY = 0.3  # weight of the newest run


class VisionLoop:
    """Takes jobs from the queue and puts them back seen, in batches as large as pay.

    A batch runs at once when a job waits, without waiting for more: what arrives meanwhile is the next batch. While it
    runs nobody gets a token, so it takes about a tenth of a second at most, by the time that an image took lately: a
    GPU sees many images in that time, a CPU one or two, and gains nothing by more. Nothing is seen while something
    seen waits for a lane, so no more than a batch of rows is held (an image of a 7B model at 576 tokens is 9 MB), and
    budgets are chosen late. Where batches pay, one is seen ahead while all lanes are taken.
    """

    def __init__(
        self,
        session: Session,
        queue: JobQueue,
        budget: BudgetController,
        observe: Observer,
        batch: int,
        decoding: DecodeLoop,
        clock: Callable[[], float],
    ) -> None:
        """`batch`: most images of one run."""
        self._session, self._queue, self._budget, self._observe = session, queue, budget, observe
        self._batch, self._decoding, self._clock = batch, decoding, clock
        self._image_seconds: float | None = None
        #: jobs that are in the vision graph
        self.seeing = 0

    @property
    def room(self) -> int:
        """Images that may be seen now."""
        if self._queue.seen:
            return 0
        fitting = 1 if self._image_seconds is None else int(_LONGEST_RUN / max(self._image_seconds, 1e-6))
        size = min(max(fitting, 1), self._batch)
        return size if size > 1 or self._decoding.has_lane else 0

    def step(self) -> bool:
        """See one batch. False if nothing waits, or there is no room."""
        with self._queue.changed:
            room = self.room
            if not self._queue.waiting or not room:
                return False
            budget = self._budget.choose(
                self._clock(),
                waiting=self._queue.waiting,
                oldest_wait=self._queue.oldest_wait,
                newest_wait=self._queue.newest_wait,
                alone=self._queue.live == 1,
            )
            tickets = self._queue.take(room)
            self.seeing = len(tickets)
        try:
            for ticket in tickets:
                ticket.budget = ticket.job.budget or budget
            # those without images need not wait for the graph
            plain = [ticket for ticket in tickets if not ticket.weight]
            self._put(plain, [_NOTHING] * len(plain), EarlierStages(), 0)
            self._see([ticket for ticket in tickets if ticket.weight])
        except Exception as error:  # of the worker itself; nobody else knows of these jobs
            for ticket in tickets:
                self._decoding.fail(ticket, error)
        finally:
            self.seeing = 0
        return True

    def _see(self, tickets: Sequence[Ticket]) -> None:
        """One run for all; where it fails, one for each, so that the others get their answers."""
        if not tickets:
            return
        quota: list[int] = []
        for ticket in tickets:
            media = ticket.job.media
            quota.extend([ticket.budget or 1] * (len(media.images) + len(media.videos)))
        try:
            seen, stages = self._session.see_groups([ticket.job.media for ticket in tickets], quota)
        except Exception as error:
            if len(tickets) == 1:
                self._decoding.fail(tickets[0], error)
                return
            log.warning("a batch of %d jobs failed (%s); they go on one by one", len(tickets), error)
            for ticket in tickets:
                self._see([ticket])
            return
        self._time((stages.preprocess + stages.vision) / len(quota))
        self._put(tickets, seen, stages, len(quota))

    def _time(self, seconds: float) -> None:
        known = seconds if self._image_seconds is None else self._image_seconds
        self._image_seconds = known + _MEMORY * (seconds - known)

    def _put(self, tickets: Sequence[Ticket], seen: Sequence[Seen], stages: EarlierStages, images: int) -> None:
        """Tell each job what was seen, and let it be decoded."""
        if images:
            self._tell(seen, stages, images)
        for ticket, item in zip(tickets, seen, strict=True):
            ticket.forget_media()
            ticket.tell(
                Seeing(
                    budget=ticket.budget or 0,
                    seen=item,
                    waited=ticket.waited,
                    preprocess=stages.preprocess,
                    vision=stages.vision,
                    batch=images,
                )
            )
        self._queue.put([SeenJob(*pair, stages) for pair in zip(tickets, seen, strict=True)])

    def _tell(self, seen: Sequence[Seen], stages: EarlierStages, images: int) -> None:
        kept: list[int] = []
        whole: list[int] = []
        for item in seen:
            kept.extend(len(rows.rows) for rows in (*item.images, *item.videos))
            whole.extend(sum(region.tokens for region in regions) for regions in item.regions)
        pruned = [most - some for most, some in zip(whole, kept, strict=True)]
        self._observe.saw(images=images, kept=kept, pruned=pruned, preprocess=stages.preprocess, vision=stages.vision)
