"""The worker of a server: jobs in, events out, whatever happens to one of them."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from time import perf_counter

from holov_export.errors import BusyError
from holov_export.runtime.session import Session
from holov_export.serve.budget import BudgetController
from holov_export.serve.decode_loop import DecodeLoop
from holov_export.serve.jobs import Deliver, Job
from holov_export.serve.limits import Limits
from holov_export.serve.metrics import Load, Observer
from holov_export.serve.queueing import JobQueue, Ticket
from holov_export.serve.vision_loop import VisionLoop

__all__ = ["Load", "Ticket", "Worker"]

log = logging.getLogger(__name__)

_LONGEST_NAP = 1.0  # seconds
_JOIN_SECONDS = 10.0


class Worker:
    """Answers jobs with one session, which nobody else may use while it works.

    One thread does everything: see a batch, then one token for every open answer, and again. Two threads, one that sees
    and one that decodes, were tried and bring nothing on one machine: both want the same cores or the same GPU, and
    ONNX Runtime GenAI 0.18 keeps Python's lock while it prefills. In pairs of runs on a busy machine throughput was
    about the same and first tokens came later, because the graphs of later jobs ran beside the prefill of the
    first. One thread also shares nothing and repeats exactly. Decoders that run elsewhere go on while it sees.
    """

    def __init__(
        self,
        session: Session,
        limits: Limits,
        budget: BudgetController,
        *,
        observe: Observer,
        clock: Callable[[], float] = perf_counter,
    ) -> None:
        """Put a worker together; `start` sets it to work. `clock` is in seconds."""
        self._session, self._budget, self._observe = session, budget, observe
        video = session.bundle.manifest.plan.model.video
        clip_weight = video.frames if video.kind == "frames" else 1
        self._queue = JobQueue(limits, clock, clip_weight)
        self._decoding = DecodeLoop(session, self._queue, budget, observe, limits, clock)
        self._vision = VisionLoop(session, self._queue, budget, observe, limits.vision_batch, self._decoding, clock)
        self._thread: threading.Thread | None = None
        self._stopping = False

    def start(self) -> None:
        """Load what is not loaded yet, and begin.

        Raises:
            EnvironmentFaultError, BundleError: the decoder cannot be loaded here.
        """
        self._session.decoder, self._session.encoder  # noqa: B018  an error belongs to the caller, not to the first job
        self._thread = threading.Thread(target=self._work, name="worker", daemon=True)
        self._thread.start()

    def submit(self, job: Job, deliver: Deliver) -> Ticket:
        """Accept a job; its events go to `deliver`. May be called from any thread.

        Raises:
            BusyError: as many jobs are in hand as may be, or the worker is closing.
        """
        try:
            ticket = self._queue.submit(job, deliver)
        except BusyError:
            self._observe.rejected("closing" if self._queue.closing else "full")
            raise
        self._observe.accepted()
        return ticket

    def load(self) -> Load:
        """What is in hand. May be called from any thread."""
        queue = self._queue
        with queue.changed:
            seeing = self._vision.seeing + queue.seen
            return Load(queue.waiting, seeing, self._decoding.decoding, self._budget.budget)

    def step(self) -> bool:
        """See one batch if there is room for it, then make a token of every open answer. False if nothing was to do.

        What the worker's thread does again and again; never raises.
        """
        found = [self._guarded(each) for each in (self._vision.step, self._decoding.step)]
        self._observe.load(self.load())
        return any(found)

    @staticmethod
    def _guarded(step: Callable[[], bool]) -> bool:
        """Each job's errors are caught where they belong; what comes this far is an error of the worker itself.

        One side goes on when the other cannot: what nobody sees is at least told that it is late.
        """
        try:
            return step()
        except Exception:
            log.exception("the worker goes on after an internal error")
            return False

    def _work(self) -> None:
        while not self._stopping:
            version = self._queue.version
            if not self.step():
                self._queue.wait_for_change(version, _LONGEST_NAP)

    def close(self, drain_seconds: float) -> None:
        """Accept nothing more, give what is in hand so many seconds to end, and end the rest. May be called twice.

        The session is the caller's to close.
        """
        self._queue.stop_accepting()
        if self._thread is not None:
            self._queue.wait_until_empty(drain_seconds)
            self._stopping = True
            self._queue.wake()
            self._thread.join(_JOIN_SECONDS)
        self._decoding.stop()
        self._observe.load(self.load())
