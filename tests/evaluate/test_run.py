"""Asking for real: toy graphs, a tiny language model in GenAI, and what is counted on the way."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from evaluation_cases import with_graphs as bundle_with_graphs
from evaluation_cases import write_picture, write_questions

from holov_export.bundle import Bundle
from holov_export.errors import EnvironmentFaultError, ImageError, PromptError, UsageError
from holov_export.evaluate import run as run_module
from holov_export.evaluate.data import Dataset, dataset_from_jsonl, dataset_from_questions
from holov_export.evaluate.journal import JOURNAL, Journal, open_journal
from holov_export.evaluate.plan import Plan, plan_from_bundle
from holov_export.evaluate.run import (
    AskSettings,
    ask_all,
    cells_by_engine,
    check_images,
    check_prompts,
    header_of,
    unanswered,
)
from holov_export.runtime.decoder import Decoder
from holov_export.runtime.decoder_hf_inner import inner_decoder
from holov_export.runtime.inner.refetch import RefetchDecoder, RefetchPrompt
from holov_export.runtime.preprocess import pixels_from_images
from holov_export.runtime.runner_ort import OrtRunner
from holov_export.runtime.session import Session
from holov_export.tensors import SamplingSettings, StitchedPrompt

SETTINGS = AskSettings(provider="cpu", threads=1, max_new_tokens=4)


@pytest.fixture(scope="module")
def bundle(answering_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return bundle_with_graphs(answering_bundle, tmp_path_factory.mktemp("runs") / "two", ["cls-topk"])


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    return dataset_from_jsonl(write_questions(tmp_path / "data", pictures=3, each=2))


@pytest.fixture
def plan(bundle: Bundle) -> Plan:
    return plan_from_bundle(bundle, (), (64, 16, 4))


class Count:
    """Runs of each graph, prompts, and decoders that were loaded and closed."""

    def __init__(self) -> None:
        self.runs: Counter[tuple[str, int]] = Counter()
        self.prompts = 0
        self.loaded = 0
        self.closed = 0
        self.fail_after: int | None = None


class KilledError(Exception):
    """Stands for the end of the process between two answers."""


@pytest.fixture
def count(monkeypatch: pytest.MonkeyPatch) -> Count:
    found = Count()
    real_run, real_maker = OrtRunner.run, run_module.decoder_maker

    class Counting:
        name = "counting"
        lanes = 1

        def __init__(self, decoder: Decoder) -> None:
            self.decoder = decoder

        def stream(self, prompt: StitchedPrompt, sampling: SamplingSettings) -> Iterator[int]:
            if found.fail_after is not None and found.prompts >= found.fail_after:
                raise KilledError
            found.prompts += 1
            return self.decoder.stream(prompt, sampling)

        def close(self) -> None:
            found.closed += 1
            self.decoder.close()

    def run(self, pixels, budget, quota=None, *, saliency=None):
        found.runs[self.graph_name, budget] += 1
        return real_run(self, pixels, budget, quota, saliency=saliency)

    def init(self, bundle: Bundle, **settings: object) -> None:
        real_init(self, bundle, **settings)
        self.graph_name = bundle.vision.name

    def maker(*arguments):
        make = real_maker(*arguments)

        def made():
            found.loaded += 1
            return Counting(make())

        return made

    real_init = OrtRunner.__init__
    monkeypatch.setattr(OrtRunner, "__init__", init)
    monkeypatch.setattr(OrtRunner, "run", run)
    monkeypatch.setattr(run_module, "decoder_maker", maker)
    return found


def asked(bundle: Bundle, dataset: Dataset, plan: Plan, folder: Path, settings: AskSettings = SETTINGS) -> Journal:
    with open_journal(folder, header_of(bundle, dataset, settings)) as journal:
        ask_all(bundle, dataset, plan, settings, journal)
        return journal


def test_each_picture_runs_once_a_rule_and_budget_and_one_decoder_is_shared(
    bundle: Bundle, dataset: Dataset, plan: Plan, tmp_path: Path, count: Count
) -> None:
    journal = asked(bundle, dataset, plan, tmp_path / "out")
    first, second = "vision.onnx", "vision-cls-topk.onnx"
    assert count.runs == {
        **{(first, budget): 3 for budget in (64, 16, 4)},
        **{(second, budget): 3 for budget in (16, 4)},
    }
    assert (count.prompts, count.loaded, count.closed) == (5 * 6, 1, 1)
    assert unanswered(plan, dataset, journal) == 0
    assert {entry.visual_tokens for entry in journal.cell("cls-topk", 16).values()} == {16}


def test_answers_are_those_of_a_session_and_of_the_right_graph(
    bundle: Bundle, dataset: Dataset, plan: Plan, tmp_path: Path
) -> None:
    journal = asked(bundle, dataset, plan, tmp_path / "out")
    texts: dict[str, list[str]] = {}
    for method in bundle.methods:
        with Session.open(bundle, method=method, provider="cpu", threads=1) as session:
            for question in dataset.questions:
                answer = session.ask(
                    question.picture.path, question.text, budget=16, sampling=SamplingSettings(max_new_tokens=4)
                )
                assert journal.cell(method, 16)[question.id].text == answer.text
                texts.setdefault(method, []).append(answer.text)
    assert texts["holov"] != texts["cls-topk"], "the two graphs must answer differently, or this shows nothing"


def test_a_session_answers_from_rows(bundle: Bundle, dataset: Dataset) -> None:
    picture = dataset.questions[0].picture.path
    with Session.open(bundle, provider="cpu", threads=1) as session:
        rows = [session.see(picture, budget=16).rows(0)]
        answer = session.answer(rows, "what is this?", sampling=SETTINGS.sampling)
        whole = session.ask(picture, "what is this?", budget=16, sampling=SETTINGS.sampling)
        assert (answer.token_ids, answer.prompt_tokens) == (whole.token_ids, whole.prompt_tokens)
        assert answer.timings.preprocess == answer.timings.vision == 0 < answer.timings.ttft
        with pytest.raises(PromptError, match="empty"):
            session.answer(rows, " ")
        with pytest.raises(PromptError, match="2 placeholders and 1 image"):
            session.answer(rows, "<image> or <image>?", raw=True)
    with pytest.raises(EnvironmentFaultError, match="closed"):
        session.answer(rows, "what is this?")


def test_a_second_run_asks_nothing_and_loads_nothing(
    bundle: Bundle, dataset: Dataset, plan: Plan, tmp_path: Path, count: Count
) -> None:
    asked(bundle, dataset, plan, tmp_path / "out")
    before = (tmp_path / "out" / JOURNAL).read_bytes()
    count.runs.clear()
    count.prompts = count.loaded = 0
    asked(bundle, dataset, plan, tmp_path / "out")
    assert (count.prompts, count.loaded, dict(count.runs)) == (0, 0, {})
    assert (tmp_path / "out" / JOURNAL).read_bytes() == before


@pytest.mark.parametrize("killed_after", [0, 1, 7, 13, 29])
def test_what_was_answered_is_not_asked_again(
    bundle: Bundle, dataset: Dataset, plan: Plan, tmp_path: Path, count: Count, killed_after: int
) -> None:
    whole = asked(bundle, dataset, plan, tmp_path / "whole")
    count.prompts, count.fail_after = 0, killed_after
    with pytest.raises(KilledError):
        asked(bundle, dataset, plan, tmp_path / "out")
    assert count.closed == count.loaded
    count.fail_after = None
    journal = asked(bundle, dataset, plan, tmp_path / "out")
    assert count.prompts == 30
    assert list(journal.entries()) == list(whole.entries())


def test_more_budgets_and_questions_use_the_answers_that_there_are(
    bundle: Bundle, dataset: Dataset, tmp_path: Path, count: Count
) -> None:
    few = dataset.first(2)
    asked(bundle, few, plan_from_bundle(bundle, ("holov",), (16,)), tmp_path / "out")
    assert count.prompts == 4
    count.prompts = 0
    asked(bundle, dataset, plan_from_bundle(bundle, ("cls-topk", "holov"), (16,)), tmp_path / "out")
    # of the unpruned run and of holov the 4 that are missing, and 6 of cls-topk
    assert count.prompts == 14


def test_questions_of_a_picture_that_do_not_follow_each_other(bundle: Bundle, tmp_path: Path, count: Count) -> None:
    path = write_questions(tmp_path / "data", pictures=2, each=2)
    lines = path.read_text(encoding="utf-8").splitlines()
    path.write_text("\n".join([lines[0], lines[2], lines[1], lines[3]]), encoding="utf-8")
    asked(bundle, dataset_from_jsonl(path), plan_from_bundle(bundle, ("holov",), (16,)), tmp_path / "out")
    assert set(count.runs.values()) == {2}


def test_a_picture_that_changed_since(bundle: Bundle, dataset: Dataset, plan: Plan, tmp_path: Path) -> None:
    asked(bundle, dataset, plan, tmp_path / "out")
    write_picture(tmp_path / "data" / "picture_1.png", seed=99)
    with open_journal(tmp_path / "out", header_of(bundle, dataset, SETTINGS)) as journal:
        with pytest.raises(UsageError, match=r"picture_1\.png' is not the one"):
            check_images(dataset, journal)
        check_images(dataset.first(2), journal)  # those about the first picture still hold


def test_a_truncated_picture_is_named(bundle: Bundle, dataset: Dataset, plan: Plan, tmp_path: Path) -> None:
    """Its header is whole, so it is found only when it is its turn; what was answered before stays."""
    path = tmp_path / "data" / "picture_1.png"
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(ImageError, match=r"line 3, 'picture_1\.png': .* cannot be decoded"):
        asked(bundle, dataset, plan, tmp_path / "out")
    with open_journal(tmp_path / "out", header_of(bundle, dataset, SETTINGS)) as journal:
        assert set(journal.cell("holov", 64)) == {"1", "2"}


def test_the_suffix_is_a_line_of_its_own_and_changes_the_header(bundle: Bundle, dataset: Dataset) -> None:
    settings = AskSettings(suffix="Answer shortly.")
    question = dataset.questions[0]
    assert settings.prompt(question) == f"{question.text}\nAnswer shortly."
    assert SETTINGS.prompt(question) == question.text
    assert header_of(bundle, dataset, settings) != header_of(bundle, dataset, AskSettings())


def test_a_question_too_long_for_the_context_is_found_before_any_is_asked(bundle: Bundle, tmp_path: Path) -> None:
    path = write_questions(tmp_path / "data", pictures=2, each=1)
    text = path.read_text(encoding="utf-8").replace("what is red 1", "what is red " * 200 + "1")
    path.write_text(text, encoding="utf-8")
    with pytest.raises(PromptError, match=r"line 2: the question has \d+ tokens"):
        check_prompts(bundle, dataset_from_jsonl(path), SETTINGS)


def test_the_context_is_used_to_its_last_token(bundle: Bundle, dataset: Dataset) -> None:
    """What `check_prompts` lets pass can be answered, and what it refuses could not."""
    first, outcomes = dataset.questions[0], []
    with Session.open(bundle, provider="cpu", threads=1) as session:
        for words in range(1, 500):
            question = replace(first, text="7 " * words)
            length = len(session.encoder.ids_from_text(session.encoder.text_from_question(question.text)))
            if abs(length + 63 + 1 - 512) > 1:  # 64 rows take one placeholder's place, one new token follows
                continue
            rows = [session.see(first.picture.path, budget=64).rows(0)]
            try:
                check_prompts(bundle, dataset_from_questions("one", "jsonl", [question]), SETTINGS)
            except PromptError:
                outcomes.append("refused")
                with pytest.raises(PromptError):
                    session.answer(rows, question.text)
            else:
                outcomes.append("answered")
                assert session.answer(rows, question.text).prompt_tokens == length + 63
    assert outcomes == ["answered", "answered", "refused"]


def test_cells_that_one_graph_and_decoder_can_answer(bundle: Bundle) -> None:
    plan = plan_from_bundle(bundle, ("cls-topk", "holov"), (64, 16, 4))
    together = [[cell.asked for cell in cells] for cells in cells_by_engine(plan.to_ask())]
    assert together == [
        [("holov", 64), ("holov", 16), ("holov", 4)],
        [("cls-topk", 16), ("cls-topk", 4)],
    ]
    for cells in cells_by_engine(plan.to_ask()):
        assert len({cell.graph for cell in cells}) == 1


class TestInsideTheLanguageModel:
    """transformers on the checkpoint, with rules that prune between its layers."""

    @pytest.fixture
    def settings(self, llava_checkpoint: Path) -> AskSettings:
        return AskSettings("hf", llava_checkpoint, provider="cpu", threads=1, max_new_tokens=4)

    def test_their_answers_are_those_of_the_decoder_alone(
        self, bundle: Bundle, dataset: Dataset, tmp_path: Path, settings: AskSettings, llava_checkpoint: Path
    ) -> None:
        few = dataset.first(2)
        plan = plan_from_bundle(bundle, ("fastv",), (48,), decoder="hf")
        journal = asked(bundle, few, plan, tmp_path / "out", settings)
        spec = bundle.manifest.plan.model.decoder
        decoder = inner_decoder(llava_checkpoint, spec, "fastv", 48, provider="cpu", threads=1)
        with Session.open(bundle, decoder=decoder, provider="cpu", threads=1) as session:
            for question in few.questions:
                sampling = SamplingSettings(max_new_tokens=4)
                answer = session.ask(question.picture.path, question.text, budget=64, sampling=sampling)
                assert journal.cell("fastv", 48)[question.id].text == answer.text
        assert {entry.visual_tokens for entry in journal.cell("fastv", 48).values()} == {64}

    def test_refetch_gets_what_the_graph_prunes(
        self, bundle: Bundle, dataset: Dataset, tmp_path: Path, settings: AskSettings, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        prompts: list[RefetchPrompt] = []
        real = RefetchDecoder.stream

        def stream(self, prompt, sampling):
            prompts.append(prompt)
            return real(self, prompt, sampling)

        monkeypatch.setattr(RefetchDecoder, "stream", stream)
        few = dataset.first(3)  # two about one picture, one about the next
        plan = plan_from_bundle(bundle, ("refetch",), (16,), decoder="hf")
        journal = asked(bundle, few, plan, tmp_path / "out", settings)
        assert {entry.visual_tokens for entry in journal.cell("refetch", 16).values()} == {16}
        with OrtRunner(bundle.of_method("holov"), provider="cpu", threads=1) as runner:
            for question, prompt in zip(few.questions, prompts, strict=True):
                pixels = pixels_from_images([question.picture.read()], bundle.manifest.plan.model.image)
                assert np.array_equal(prompt.rows, runner.run(pixels, 16).rows(0))
                together = np.concatenate([prompt.rows, prompt.pruned])
                whole = runner.run(pixels, 64).rows(0)
                assert sorted(map(tuple, together.tolist())) == sorted(map(tuple, whole.tolist()))
