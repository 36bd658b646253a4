"""The worker: every job gets its own events, and nothing that happens to one job happens to another.

Most tests drive `Worker.step` by hand and with a clock of their own, so that what is tested cannot be missed.
"""

from __future__ import annotations

import gc
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import pytest
from PIL import Image

from holov_export.bundle import Bundle
from holov_export.errors import BudgetError, BusyError, EnvironmentFaultError, ImageError, LateError, PromptError
from holov_export.runtime.media import Media
from holov_export.runtime.session import Session
from holov_export.serve.budget import BudgetController
from holov_export.serve.jobs import Event, Failed, Finished, Job, Piece, Seeing
from holov_export.serve.limits import BudgetRange, Limits
from holov_export.serve.metrics import BuildFacts, Load, PrometheusMetrics, Unobserved
from holov_export.serve.worker import Ticket, Worker
from holov_export.tensors import SamplingSettings, StitchedPrompt

LETTERS = range(70, 90)  # ids of the tiny tokenizer: the bytes A to T


class TellingDecoder:
    """Its answer says which rows it got, so answers that were mixed up differ. Counts what is open."""

    name = "telling"

    def __init__(self, lanes: int = 8, length: int = 5) -> None:
        self.lanes, self.length = lanes, length
        self.open = self.most_open = 0
        self.order: list[int] = []
        self.broken: Callable[[StitchedPrompt, int], Exception | None] = lambda prompt, number: None

    def stream(self, prompt: StitchedPrompt, sampling: SamplingSettings) -> Iterator[int]:
        return self._tokens(prompt, sampling)

    def _tokens(self, prompt: StitchedPrompt, sampling: SamplingSettings) -> Iterator[int]:
        self.open += 1
        self.most_open = max(self.open, self.most_open)
        try:
            for number in range(min(self.length, sampling.max_new_tokens)):
                error = self.broken(prompt, number)
                if error is not None:
                    raise error
                self.order.append(len(prompt.rows))
                weight = int(np.abs(prompt.rows).sum() * 1000) + len(prompt.rows)
                yield LETTERS[(weight // len(LETTERS) ** number) % len(LETTERS)]
        finally:
            self.open -= 1

    def close(self) -> None: ...


@dataclass
class Clock:
    now: float = 100.0

    def __call__(self) -> float:
        return self.now


@dataclass
class Client:
    """Keeps a job's events."""

    events: list[Event] = field(default_factory=list)
    ended: threading.Event = field(default_factory=threading.Event)

    def deliver(self, event: Event) -> None:
        assert not self.ended.is_set(), "nothing comes after the last event"
        self.events.append(event)
        if isinstance(event, (Finished, Failed)):
            self.ended.set()

    @property
    def last(self) -> Event:
        return self.events[-1]

    @property
    def text(self) -> str:
        return "".join(event.text for event in self.events if isinstance(event, Piece))

    @property
    def answer(self) -> Finished:
        assert isinstance(self.last, Finished), self.last
        return self.last

    @property
    def error(self) -> Exception:
        assert isinstance(self.last, Failed), self.last
        return self.last.error


class Bench:
    """A worker over the toy vision graph, driven by hand."""

    def __init__(self, bundle: Bundle, decoder: TellingDecoder, limits: Limits, budget: int = 7) -> None:
        self.decoder, self.clock = decoder, Clock()
        self.session = Session.open(bundle, decoder=decoder, provider="cpu", threads=1)
        self.metrics = PrometheusMetrics(BuildFacts("1", "tiny", "holov", "ort"))
        controller = BudgetController(BudgetRange(smallest=budget, largest=budget))
        self.worker = Worker(self.session, limits, controller, observe=self.metrics, clock=self.clock)

    def ask(
        self, *images: object, question: str = "what?", budget: int | None = None, new_tokens: int = 16
    ) -> tuple[Client, Ticket]:
        client = Client()
        return client, self.worker.submit(
            self.job(*images, question=question, budget=budget, new=new_tokens), client.deliver
        )

    def job(self, *images: object, question: str = "what?", budget: int | None = None, new: int = 16) -> Job:
        text = self.session.encoder.text_from_question(question, images=len(images))
        return Job("job", text, Media(list(images)), SamplingSettings(max_new_tokens=new), budget)  # type: ignore[arg-type]

    def run(self, steps: int = 1000) -> None:
        for _ in range(steps):
            if not self.worker.step():
                return
        raise AssertionError("it does not come to an end")

    def count(self, name: str, **labels: str) -> float:
        value = self.metrics._registry.get_sample_value(f"holov_{name}", labels)
        assert value is not None, name
        return float(value)


@pytest.fixture
def bench(toy_bundle: Bundle) -> Callable[..., Bench]:
    def made(decoder: TellingDecoder | None = None, budget: int = 7, **limits: float) -> Bench:
        return Bench(toy_bundle, decoder or TellingDecoder(), Limits.model_validate(limits), budget)

    return made


Maker = Callable[..., Bench]

# --------------------------------------------------------------------------------------------------- the usual way


def test_events_of_a_job_come_in_order(bench: Maker, photographs: list[Image.Image]) -> None:
    one = bench()
    client, _ = one.ask(photographs[0], photographs[1])
    one.clock.now += 0.5
    one.run()
    seeing, *pieces, finished = client.events
    assert isinstance(seeing, Seeing)
    assert (seeing.budget, seeing.batch, seeing.waited) == (7, 2, 0.5)
    assert [len(rows.rows) for rows in seeing.seen.images] == [7, 7]
    assert len(seeing.seen.regions) == 2
    assert pieces
    assert all(isinstance(piece, Piece) for piece in pieces)
    assert isinstance(finished, Finished)
    assert client.text == finished.generation.text != ""
    assert finished.generation.visual_tokens == (7, 7)
    assert (finished.ttft, finished.total) == (0.5, 0.5)
    assert one.worker.load() == Load(budget=7)


def test_answers_are_those_of_the_session(bench: Maker, photographs: list[Image.Image]) -> None:
    """Mixed budgets and numbers of images, all at once, against one at a time."""
    one = bench(TellingDecoder(lanes=3), vision_batch=4)
    wanted = [(photographs[:1], 3), (photographs[1:3], 5), ([], None), (photographs[3:], 64), (photographs[:3], None)]
    clients = [one.ask(*images, budget=budget)[0] for images, budget in wanted * 3]
    one.run()
    for (images, budget), client in zip(wanted * 3, clients, strict=True):
        alone = one.session.ask(images, "what?", budget=budget or 7) if images else None
        if alone is not None:
            assert client.answer.generation.text == alone.text
            assert client.answer.generation.visual_tokens == (budget or 7,) * len(images)
    assert len({client.answer.generation.text for client in clients}) == len(wanted), "they can be told apart"
    assert one.count("requests_total", outcome="finished") == 15


def test_jobs_without_images_skip_the_vision_graph(bench: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    one = bench()
    monkeypatch.setattr(one.session, "see_groups", lambda *args, **more: pytest.fail("it looked"))
    client, _ = one.ask(question="what is this")
    one.run()
    assert client.answer.generation.visual_tokens == ()
    assert isinstance(client.events[0], Seeing)
    assert client.events[0].batch == 0


# ------------------------------------------------------------------------------------------------------ batches


def test_what_waits_is_seen_in_one_run_with_mixed_quotas(bench: Maker, photographs: list[Image.Image]) -> None:
    one = bench(vision_batch=4)
    quick(one)
    clients = [one.ask(photographs[index], budget=budget)[0] for index, budget in enumerate((3, None, 9))]
    one.worker.step()
    batches = [client.events[0] for client in clients]
    assert [event.budget for event in batches if isinstance(event, Seeing)] == [3, 7, 9]
    assert [event.batch for event in batches if isinstance(event, Seeing)] == [3, 3, 3]
    assert one.count("vision_batch_images_bucket", le="4.0") - one.count("vision_batch_images_bucket", le="2.0") == 1
    assert one.count("visual_tokens_total", fate="kept") == 19
    assert one.count("visual_tokens_total", fate="pruned") == 3 * 64 - 19


def test_batches_keep_the_order_and_their_size(bench: Maker, photographs: list[Image.Image]) -> None:
    """2 + 2 images fit in four; the third job has three and waits, and nobody overtakes it; six go alone."""
    one = bench(vision_batch=4)
    quick(one)
    clients = [one.ask(*photographs[:count])[0] for count in (2, 2, 3, 1)]
    large, _ = one.ask(*photographs, *photographs[:2])
    one.run()
    sizes = [client.events[0].batch for client in (*clients, large) if isinstance(client.events[0], Seeing)]
    assert sizes == [4, 4, 4, 4, 6]


def test_slow_vision_runs_are_short(bench: Maker, photographs: list[Image.Image]) -> None:
    """Where an image takes longer than a run may, images are seen one at a time, between tokens of open answers."""
    one = bench(vision_batch=8)
    quick(one, seconds=0.3)
    clients = [one.ask(image)[0] for image in photographs]
    one.run()
    assert [client.events[0].batch for client in clients if isinstance(client.events[0], Seeing)] == [1, 1, 1, 1]


def test_no_more_is_seen_ahead_than_a_batch(bench: Maker, photographs: list[Image.Image]) -> None:
    """Rows are large: a hundred jobs that wait are a hundred jobs that are not seen."""
    one = bench(TellingDecoder(lanes=1, length=30), vision_batch=2)
    quick(one)
    clients = [one.ask(photographs[0], new_tokens=30)[0] for _ in range(20)]
    most = 0
    while one.worker.step():
        held = sum(bool(client.events) and len(client.events) == 1 for client in clients)
        most = max(most, held)
        assert one.worker.load().seeing <= 2
    assert most == 2
    assert all(client.answer for client in clients)


def test_one_bad_image_does_not_fail_its_batch(bench: Maker, photographs: list[Image.Image]) -> None:
    one = bench()
    quick(one)
    good, _ = one.ask(photographs[0])
    bad, _ = one.ask(b"no image at all")
    other, _ = one.ask(photographs[1])
    impossible, _ = one.ask(photographs[1], budget=1000)
    one.run()
    assert isinstance(bad.error, ImageError)
    assert isinstance(impossible.error, BudgetError) or impossible.answer.generation.visual_tokens == (64,)
    assert good.answer.generation.text == one.session.ask(photographs[0], "what?", budget=7).text
    assert other.answer.generation.text == one.session.ask(photographs[1], "what?", budget=7).text
    assert one.count("requests_total", outcome="refused") >= 1


def test_images_are_let_go_once_they_are_seen(bench: Maker, photographs: list[Image.Image]) -> None:
    one = bench()
    picture = photographs[0].copy()
    gone = weakref.ref(picture)
    client, _ = one.ask(picture)
    del picture
    one.worker.step()
    client.events.clear()
    gc.collect()
    assert gone() is None


# ------------------------------------------------------------------------------------------------------ decoding


def test_no_more_streams_than_lanes_and_limit(bench: Maker, photographs: list[Image.Image]) -> None:
    for lanes, streams, most in ((2, 8, 2), (8, 3, 3), (1, 1, 1)):
        one = bench(TellingDecoder(lanes=lanes), streams=streams)
        clients = [one.ask(photographs[0])[0] for _ in range(7)]
        one.run()
        assert one.decoder.most_open == most
        assert one.decoder.open == 0
        assert all(client.answer.generation.text for client in clients)


def test_running_answers_get_a_token_between_two_prefills(bench: Maker) -> None:
    one = bench(TellingDecoder(length=6))
    first, _ = one.ask(question="a")
    one.worker.step()
    for _ in range(3):
        one.ask(question="b")
    before = pieces_of(first)
    for number in range(1, 4):
        one.worker.step()
        assert one.worker.load().decoding == number + 1, "one answer more begins in each step"
        assert pieces_of(first) == before + number, "and the open ones get a token in each"


def test_answers_of_one_token_and_of_none(bench: Maker) -> None:
    for length, tokens in ((1, 1), (0, 0)):
        one = bench(TellingDecoder(length=length))
        client, _ = one.ask()
        one.run()
        assert len(client.answer.generation.token_ids) == tokens
        assert client.answer.generation.finish_reason == "stop"


def test_the_first_token_is_told_at_once_even_without_text(bench: Maker) -> None:
    """A client's own clock of the first token is right, although a character may need two tokens."""
    one = bench()
    client, _ = one.ask()
    one.worker.step()
    assert [type(event) for event in client.events] == [Seeing, Piece]


# --------------------------------------------------------------------------------------------------- what goes wrong


def test_an_error_in_one_answer_stays_there(bench: Maker, photographs: list[Image.Image]) -> None:
    one = bench()

    def broken(prompt: StitchedPrompt, number: int) -> Exception | None:
        return RuntimeError("out of memory") if len(prompt.rows) == 5 and number == 2 else None

    one.decoder.broken = broken
    bad, _ = one.ask(photographs[0], budget=5)
    good, _ = one.ask(photographs[0], budget=6)
    one.run()
    assert str(bad.error) == "out of memory"
    assert len([event for event in bad.events if isinstance(event, Piece)]) <= 2
    assert good.answer.generation.visual_tokens == (6,)
    assert one.decoder.open == 0
    assert one.count("requests_total", outcome="failed") == 1
    assert one.count("requests_total", outcome="finished") == 1


def test_a_prompt_that_does_not_fit_fails_its_job(bench: Maker, photographs: list[Image.Image]) -> None:
    one = bench()
    client = Client()
    one.worker.submit(Job("job", "no placeholder", Media([photographs[0]]), SamplingSettings()), client.deliver)
    other, _ = one.ask(photographs[0])
    one.run()
    assert isinstance(client.error, PromptError)
    assert other.answer


def test_a_decoder_that_is_broken_fails_all_and_the_worker_goes_on(bench: Maker) -> None:
    one = bench()
    clients = [one.ask()[0] for _ in range(3)]
    one.worker.step()
    one.decoder.broken = lambda prompt, number: EnvironmentFaultError("the engine is gone.")
    one.run()
    assert {type(client.error) for client in clients} == {EnvironmentFaultError}
    one.decoder.broken = lambda prompt, number: None
    after, _ = one.ask()
    one.run()
    assert after.answer
    assert one.worker.load().total == 0


def test_an_error_of_the_worker_itself_is_survived(bench: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    one = bench()
    client, _ = one.ask()
    with monkeypatch.context() as patch:
        patch.setattr(one.worker._budget, "choose", lambda *args, **more: 1 / 0)
        assert not one.worker.step()
    one.run()
    assert client.answer


def test_jobs_that_the_worker_itself_loses_are_told(
    bench: Maker, photographs: list[Image.Image], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An observer or a controller that is broken must not leave clients waiting."""
    made = bench()
    monkeypatch.setattr(made.worker._vision, "_tell", lambda *arguments: 1 / 0)
    client, _ = made.ask(photographs[0])
    made.worker.step()
    assert isinstance(client.error, ZeroDivisionError)
    assert made.worker.load().total == 0


def test_late_jobs_are_told_even_where_nothing_can_be_seen(
    bench: Maker, photographs: list[Image.Image], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = bench()
    monkeypatch.setattr(made.worker._vision, "step", lambda: 1 / 0)
    client, _ = made.ask(photographs[0])
    made.worker.step()
    assert not client.events
    made.clock.now += 1000
    made.worker.step()
    assert isinstance(client.error, LateError)


def test_a_client_whose_mailbox_is_broken_is_dropped(bench: Maker) -> None:
    one = bench()

    def deliver(event: Event) -> None:
        raise ValueError("no such client")

    one.worker.submit(one.job(), deliver)
    other, _ = one.ask()
    one.run()
    assert other.answer
    assert one.worker.load().total == one.decoder.open == 0


# ------------------------------------------------------------------------------------------------- limits and time


def test_a_full_queue_refuses_at_once_and_says_when(bench: Maker) -> None:
    one = bench(queue=3)
    clients = [one.ask()[0] for _ in range(3)]
    with pytest.raises(BusyError, match="queue is full: 3 requests") as refused:
        one.ask()
    assert refused.value.retry_after == 1.0
    assert one.count("rejected_total", reason="full") == 1
    one.run()
    assert all(client.answer for client in clients)
    one.ask()
    assert one.worker.load().queued == 1


def test_retry_after_follows_the_pace(bench: Maker) -> None:
    one = bench(TellingDecoder(lanes=1, length=1), queue=4)
    for _ in range(4):
        one.ask()
    while one.worker.load().total > 2:
        one.clock.now += 1.5
        one.worker.step()
    one.ask()
    one.ask()
    with pytest.raises(BusyError) as refused:
        one.ask()
    assert 4 * 1.5 <= refused.value.retry_after <= 4 * 3.0


def test_who_waits_too_long_is_told(bench: Maker) -> None:
    one = bench(TellingDecoder(lanes=1, length=100), queue_seconds=10, request_seconds=50, vision_batch=1)
    first, _ = one.ask(new_tokens=100)
    second, _ = one.ask()
    one.worker.step()
    one.clock.now += 9
    one.worker.step()
    assert not second.ended.is_set()
    one.clock.now += 1
    one.worker.step()
    assert isinstance(second.error, LateError)
    assert not first.ended.is_set(), "it does not wait, it runs"
    assert one.count("requests_total", outcome="late") == 1
    one.clock.now += 40
    one.worker.step()
    assert isinstance(first.error, LateError)
    assert "longer than 50 s" in str(first.error)
    assert one.decoder.open == 0
    assert one.worker.load().total == 0


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_cancelling_frees_everything_at_every_stage(bench: Maker, photographs: list[Image.Image], steps: int) -> None:
    one = bench(TellingDecoder(lanes=1, length=50), vision_batch=2)
    quick(one)
    clients = [one.ask(photographs[0], new_tokens=50) for _ in range(3)]
    for _ in range(steps):
        one.worker.step()
    told = [len(client.events) for client, _ in clients]
    for _, ticket in clients:
        ticket.cancel()
        ticket.cancel()
    one.run()
    assert [len(client.events) for client, _ in clients] == told, "nothing is told after cancel"
    assert one.decoder.open == 0
    assert one.worker.load().total == 0
    assert one.count("requests_total", outcome="cancelled") == 3
    after, _ = one.ask(photographs[0])
    one.run()
    assert after.answer
    one.worker.submit(one.job(), after.deliver).cancel()


def test_cancelling_an_answer_that_has_ended_does_nothing(bench: Maker) -> None:
    one = bench()
    client, ticket = one.ask()
    one.run()
    ticket.cancel()
    one.run()
    assert client.answer
    assert one.count("requests_total", outcome="cancelled") == 0


def test_cancelling_while_it_is_seen(
    bench: Maker, photographs: list[Image.Image], monkeypatch: pytest.MonkeyPatch
) -> None:
    one = bench()
    client, ticket = one.ask(photographs[0])
    look = one.session.see_groups

    def leaves(groups: list[Media], quota: list[int]) -> object:
        ticket.cancel()
        return look(groups, quota)

    monkeypatch.setattr(one.session, "see_groups", leaves)
    one.run()
    assert client.events == []
    assert one.worker.load().total == 0


# --------------------------------------------------------------------------------------------------- the real thread


@pytest.fixture
def running(toy_bundle: Bundle) -> Iterator[Callable[..., Worker]]:
    workers: list[Worker] = []

    def made(decoder: TellingDecoder, **limits: float) -> Worker:
        session = Session.open(toy_bundle, decoder=decoder, provider="cpu", threads=1)
        controller = BudgetController(BudgetRange(smallest=7, largest=7))
        worker = Worker(session, Limits.model_validate(limits), controller, observe=Unobserved())
        worker.start()
        workers.append(worker)
        return worker

    yield made
    for worker in workers:
        worker.close(0)


def test_many_clients_in_many_threads(
    running: Callable[..., Worker], toy_bundle: Bundle, photographs: list[Image.Image]
) -> None:
    """Some leave; everybody else gets the answer to its own picture and budget."""
    worker = running(TellingDecoder(lanes=4), queue=200)
    session = Session.open(toy_bundle, decoder=TellingDecoder(), provider="cpu", threads=1)
    text = session.encoder.text_from_question("what?", images=1)
    truth = {
        (index, budget): session.ask(image, "what?", budget=budget).text
        for index, image in enumerate(photographs)
        for budget in (2, 5, 9)
    }
    wrong: list[str] = []

    def client(number: int) -> None:
        for turn in range(10):
            index, budget = (number + turn) % 4, (2, 5, 9)[turn % 3]
            mine = Client()
            job = Job(f"{number}-{turn}", text, Media([photographs[index]]), SamplingSettings(), budget)
            ticket = worker.submit(job, mine.deliver)
            if (number + turn) % 5 == 0:
                ticket.cancel()
            elif not mine.ended.wait(20):
                wrong.append("no answer")
            elif mine.answer.generation.text != truth[index, budget]:
                wrong.append(f"{mine.answer.generation.text} instead of {truth[index, budget]}")

    threads = [threading.Thread(target=partial(client, number)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert wrong == []
    assert len(set(truth.values())) == 12
    worker.close(5)
    assert worker.load().total == 0


def test_closing_finishes_what_runs_and_refuses_what_comes(running: Callable[..., Worker]) -> None:
    worker = running(TellingDecoder(lanes=1, length=5))
    session = worker._session
    job = Job("job", session.encoder.text_from_question("a", images=0), Media(()), SamplingSettings())
    clients = [Client() for _ in range(5)]
    for client in clients:
        worker.submit(job, client.deliver)
    worker.close(10)
    assert all(client.answer for client in clients)
    with pytest.raises(BusyError, match="shutting down"):
        worker.submit(job, Client().deliver)


def test_closing_ends_what_is_not_done_in_time(running: Callable[..., Worker]) -> None:
    decoder = TellingDecoder(lanes=1, length=10_000)
    decoder.broken = lambda prompt, number: time.sleep(0.005)  # type: ignore[func-returns-value]
    worker = running(decoder)
    text = worker._session.encoder.text_from_question("a", images=0)
    clients = [Client() for _ in range(2)]
    for client in clients:
        worker.submit(Job("job", text, Media(()), SamplingSettings(max_new_tokens=400)), client.deliver)
    began = time.perf_counter()
    worker.close(0.1)
    assert time.perf_counter() - began < 2
    assert {type(client.error) for client in clients} == {BusyError}
    assert decoder.open == 0
    worker.close(0)


def test_an_idle_worker_notices_a_late_job_and_a_new_one_at_once(running: Callable[..., Worker]) -> None:
    worker = running(TellingDecoder())
    time.sleep(0.05)
    text = worker._session.encoder.text_from_question("a", images=0)
    client = Client()
    began = time.perf_counter()
    worker.submit(Job("job", text, Media(()), SamplingSettings()), client.deliver)
    assert client.ended.wait(5)
    assert time.perf_counter() - began < 0.5


def pieces_of(client: Client) -> int:
    """Tokens that the client has heard of."""
    counts = [event.tokens for event in client.events if isinstance(event, Piece)]
    return counts[-1] if counts else 0


def quick(one: Bench, seconds: float = 0.001) -> None:
    """As if an image took so long lately."""
    one.worker._vision._image_seconds = seconds
