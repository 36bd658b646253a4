"""What a server's worker tells of itself, and its form for Prometheus."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from holov_export.extras import require

#: how a job ends: answered; wrong by its own fault; late; the client left; the server stopped; anything else
Outcome = Literal["finished", "refused", "late", "cancelled", "stopped", "failed"]
#: why a request never became a job; further ones are counted by the HTTP side
Rejection = Literal["full", "closing"]

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.15, 0.25, 0.5, 0.75, 1.0, 1.5, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
_STAGE_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128)
_TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)


@dataclass(frozen=True)
class Load:
    """What a worker has in hand.

    Attributes:
        queued: jobs that no vision graph has seen yet.
        seeing: jobs in the vision graph, or seen and waiting for their decoding to begin.
        decoding: answers being made.
        budget: tokens that an image gets now when its request asks for none.
    """

    queued: int = 0
    seeing: int = 0
    decoding: int = 0
    budget: int = 0

    @property
    def total(self) -> int:
        return self.queued + self.seeing + self.decoding


@dataclass(frozen=True)
class Stages:
    """Seconds of the stages of one answer; None for what it never came to."""

    queue: float | None = None
    stitch: float | None = None
    setup: float | None = None
    prefill: float | None = None
    decode: float | None = None


class Observer(Protocol):
    """What the worker tells, from its threads. Every call returns at once and raises nothing."""

    def accepted(self) -> None: ...

    def rejected(self, reason: Rejection | str) -> None:
        """A request that never became a job."""
        ...

    def load(self, load: Load) -> None: ...

    def saw(self, *, images: int, kept: Sequence[int], pruned: Sequence[int], preprocess: float, vision: float) -> None:
        """One run of the vision graph.

        Args:
            images: and clips in the batch.
            kept, pruned: visual tokens of each.
            preprocess, vision: seconds.
        """
        ...

    def first_token(self, *, ttft: float, budget: int | None) -> None:
        """`budget` is None for a job without images."""
        ...

    def ended(self, outcome: Outcome, *, total: float, prompt_tokens: int, new_tokens: int, stages: Stages) -> None: ...


class Unobserved:
    """An observer that forgets everything."""

    def accepted(self) -> None: ...

    def rejected(self, reason: Rejection | str) -> None: ...

    def load(self, load: Load) -> None: ...

    def saw(
        self, *, images: int, kept: Sequence[int], pruned: Sequence[int], preprocess: float, vision: float
    ) -> None: ...

    def first_token(self, *, ttft: float, budget: int | None) -> None: ...

    def ended(self, outcome: Outcome, *, total: float, prompt_tokens: int, new_tokens: int, stages: Stages) -> None: ...


@dataclass(frozen=True)
class BuildFacts:
    """What the server is, as labels of `holov_build_info`."""

    version: str
    model: str
    method: str
    engine: str


class PrometheusMetrics:
    """An observer whose numbers Prometheus can read. It has a registry of its own: several servers fit in a process."""

    #: of what `text` returns
    content_type: str

    def __init__(self, facts: BuildFacts | None = None) -> None:
        """Make the metrics; without `facts` there is no `holov_build_info`.

        Raises:
            MissingExtraError: prometheus_client is not installed.
        """
        self._client = require("prometheus_client")
        self.content_type = str(self._client.CONTENT_TYPE_LATEST)
        self._registry: Any = self._client.CollectorRegistry()
        if facts is not None:
            build = self._gauge("build_info", "What runs here; always 1.", ("version", "model", "method", "engine"))
            build.labels(facts.version, facts.model, facts.method, facts.engine).set(1)
        self._accepted = self._counter("accepted", "Requests that became jobs.")
        self._rejected = self._counter("rejected", "Requests that never became jobs.", ("reason",))
        self._http = self._counter("http_responses", "HTTP responses.", ("route", "status"))
        self._ended = self._counter("requests", "Jobs that have ended.", ("outcome",))
        self._jobs = self._gauge("jobs", "Jobs in hand.", ("stage",))
        self._budget = self._gauge("budget_tokens", "Tokens that an image gets now when its request asks for none.")
        self._visual = self._counter("visual_tokens", "Visual tokens before decoding.", ("fate",))
        self._tokens = self._counter("tokens", "Tokens of prompts (visual ones included) and answers.", ("kind",))
        self._batch = self._histogram("vision_batch_images", "Images and clips of one vision run.", _SIZES)
        self._chosen = self._histogram("chosen_budget_tokens", "Tokens that each image of a job could keep.", _TOKENS)
        self._ttft = self._histogram("ttft_seconds", "From acceptance to the first token, waiting included.", _SECONDS)
        self._total = self._histogram("answer_seconds", "From acceptance to the end of finished answers.", _SECONDS)
        self._stage = self._histogram("stage_seconds", "Of each stage.", _STAGE_SECONDS, ("stage",))
        self._name_known_labels()

    def _name_known_labels(self) -> None:
        """Give every label that is known a zero: a rate needs a point before the first event."""
        for outcome in ("finished", "refused", "late", "cancelled", "stopped", "failed"):
            self._ended.labels(outcome)
        for reason in ("full", "closing"):
            self._rejected.labels(reason)
        for fate in ("kept", "pruned"):
            self._visual.labels(fate)
        for kind in ("prompt", "answer"):
            self._tokens.labels(kind)
        self.load(Load())

    def _counter(self, name: str, text: str, labels: Sequence[str] = ()) -> Any:
        return self._client.Counter(f"holov_{name}", text, labels, registry=self._registry)

    def _gauge(self, name: str, text: str, labels: Sequence[str] = ()) -> Any:
        return self._client.Gauge(f"holov_{name}", text, labels, registry=self._registry)

    def _histogram(self, name: str, text: str, buckets: Sequence[float], labels: Sequence[str] = ()) -> Any:
        return self._client.Histogram(f"holov_{name}", text, labels, registry=self._registry, buckets=buckets)

    def accepted(self) -> None:
        """See `Observer`."""
        self._accepted.inc()

    def rejected(self, reason: Rejection | str) -> None:
        """See `Observer`. The HTTP side has reasons of its own: few and fixed ones, for each makes a time series."""
        self._rejected.labels(reason).inc()

    def responded(self, route: str, status: int) -> None:
        """An HTTP response; `route` is the pattern, never a path that a client made up."""
        self._http.labels(route, str(status)).inc()

    def load(self, load: Load) -> None:
        """See `Observer`."""
        self._jobs.labels("queued").set(load.queued)
        self._jobs.labels("seeing").set(load.seeing)
        self._jobs.labels("decoding").set(load.decoding)
        self._budget.set(load.budget)

    def saw(self, *, images: int, kept: Sequence[int], pruned: Sequence[int], preprocess: float, vision: float) -> None:
        """See `Observer`."""
        self._batch.observe(images)
        self._visual.labels("kept").inc(sum(kept))
        self._visual.labels("pruned").inc(sum(pruned))
        self._stage.labels("preprocess").observe(preprocess)
        self._stage.labels("vision").observe(vision)

    def first_token(self, *, ttft: float, budget: int | None) -> None:
        """See `Observer`."""
        self._ttft.observe(ttft)
        if budget is not None:
            self._chosen.observe(budget)

    def ended(self, outcome: Outcome, *, total: float, prompt_tokens: int, new_tokens: int, stages: Stages) -> None:
        """See `Observer`."""
        self._ended.labels(outcome).inc()
        if outcome == "finished":
            self._total.observe(total)
        self._tokens.labels("prompt").inc(prompt_tokens)
        self._tokens.labels("answer").inc(new_tokens)
        for name in ("queue", "stitch", "setup", "prefill", "decode"):
            seconds = getattr(stages, name)
            if seconds is not None:
                self._stage.labels(name).observe(seconds)

    def text(self) -> bytes:
        """All metrics in Prometheus' text format."""
        written: bytes = self._client.generate_latest(self._registry)
        return written
