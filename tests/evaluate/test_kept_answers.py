"""The same questions to two bundles: what stays the same, what stays right, and who cannot be asked."""

from __future__ import annotations

import shutil
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from evaluation_cases import questions_of, write_picture, write_questions

from holov_export.bundle import MANIFEST, Bundle
from holov_export.errors import BudgetError, PromptError, UsageError
from holov_export.evaluate.data import Dataset, Picture, Question, dataset_from_jsonl, dataset_from_questions
from holov_export.evaluate.intervals import resamples_of
from holov_export.evaluate.kept_answers import (
    SHOWN,
    Answers,
    answers_of,
    demo_questions,
    kept_answers,
    kept_from_answers,
    obstacle_of,
    questions_at_hand,
)
from holov_export.evaluate.plan import Cell
from holov_export.evaluate.run import AskSettings
from holov_export.quantize.precision_report import AnswersKept
from holov_export.runtime.session import Session
from holov_export.spec import CheckpointSource, DecoderPrecision, Precision
from holov_export.tensors import SamplingSettings

SETTINGS = AskSettings(provider="cpu", threads=1, max_new_tokens=4)
#: right answers of eight questions in four groups, and what two bundles said
RIGHT = ["a", "b", "c", "d", "e", "f", "g", "h"]
BEFORE = ["a", "b", "c", "d", "e", "x", "g", "x"]  # 6 right
AFTER = ["a", "B.", "c", "y", "e", "f", "g", "x"]  # 6 right; two differ, "B." is the same text


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    return dataset_from_jsonl(write_questions(tmp_path / "data", pictures=3, each=2))


def made(*texts: list[str], decoder: str = "fp32") -> Answers:
    cells = tuple(Cell("holov", 16 * (n + 1), ("holov", 16 * (n + 1)), "holov", 16) for n in range(len(texts)))
    return Answers(decoder, cells, tuple(map(tuple, texts)))


class TestFigures:
    @pytest.fixture
    def questions(self) -> Dataset:
        return questions_of([(f"group {index // 2}", [answer]) for index, answer in enumerate(RIGHT)])

    def test_loyalty_accuracy_and_what_is_kept(self, questions: Dataset) -> None:
        found = kept_from_answers(questions, made(BEFORE), made(AFTER, decoder="int4"))
        (at,) = found.at
        assert (found.questions, found.pictures, found.metric, found.decoders) == (
            8,
            4,
            "exact match",
            ("fp32", "int4"),
        )
        assert (at.budget, at.same, at.loyalty.value) == (16, 6, 0.75)
        assert at.before is not None and at.after is not None and at.kept is not None
        assert (at.before.value, at.after.value, at.kept.value) == (0.75, 0.75, 1.0)
        assert found.data == "made" and found.sha256 == questions.sha256

    def test_intervals_draw_whole_groups(self, questions: Dataset) -> None:
        (at,) = kept_from_answers(questions, made(BEFORE), made(AFTER)).at
        same = np.array([1.0, 1, 1, 0, 1, 0, 1, 1]).reshape(4, 2).sum(1)
        drawn = (resamples_of([str(n) for n in range(4)]).times @ same) / 8
        low, high = np.quantile(drawn, [0.025, 0.975])
        assert (at.loyalty.low, at.loyalty.high) == (pytest.approx(low), pytest.approx(high))
        assert low < 0.75 < high

    def test_all_the_same_is_no_interval(self, questions: Dataset) -> None:
        (at,) = kept_from_answers(questions, made(BEFORE), made(BEFORE)).at
        assert (at.loyalty.value, at.loyalty.low, at.loyalty.high) == (1.0, None, None)
        assert at.kept is not None and at.kept.value == 1.0

    def test_nothing_right_before_leaves_no_ratio(self, questions: Dataset) -> None:
        (at,) = kept_from_answers(questions, made(["z"] * 8), made(AFTER)).at
        assert at.kept is None
        assert at.before is not None and at.before.value == 0.0

    def test_budgets_stay_apart_and_the_worst_is_found(self, questions: Dataset) -> None:
        found = kept_from_answers(questions, made(BEFORE, BEFORE), made(BEFORE, AFTER))
        assert [item.same for item in found.at] == [8, 6]
        assert found.worst.budget == 32

    def test_pairs_that_differ_are_shown_first(self, questions: Dataset) -> None:
        found = kept_from_answers(questions, made(BEFORE, BEFORE), made(BEFORE, AFTER))
        assert len(found.examples) == SHOWN < 16
        assert [(pair.before, pair.after, pair.same, pair.budget) for pair in found.examples[:3]] == [
            ("d", "y", False, 32),
            ("x", "f", False, 32),
            ("a", "a", True, 16),
        ]
        assert found.examples[0].right == ("d",)

    def test_without_right_answers_only_loyalty_is_told(self) -> None:
        asked = [Question(str(n), Picture(str(n), data=b""), "?", (), group=str(n)) for n in range(8)]
        found = kept_from_answers(dataset_from_questions("open", "jsonl", asked), made(BEFORE), made(AFTER))
        (at,) = found.at
        assert (found.metric, at.before, at.after, at.kept) == ("", None, None, None)
        assert at.same == 6

    def test_written_and_read_again(self, questions: Dataset) -> None:
        found = kept_from_answers(questions, made(BEFORE), made(AFTER))
        assert AnswersKept.model_validate_json(found.model_dump_json()) == found


class TestAsking:
    def test_a_bundle_is_loyal_to_itself(self, answering_bundle: Bundle, dataset: Dataset) -> None:
        found = kept_answers(answering_bundle, answering_bundle, dataset, SETTINGS, (16, 4))
        assert [(item.budget, item.same, item.loyalty.value) for item in found.at] == [(16, 6, 1.0), (4, 6, 1.0)]
        assert all(pair.same and pair.before for pair in found.examples)

    def test_answers_are_those_of_a_session(self, answering_bundle: Bundle, dataset: Dataset) -> None:
        found = answers_of(answering_bundle, dataset, SETTINGS, (16,))
        with Session.open(answering_bundle, provider="cpu", threads=1) as session:
            for question, text in zip(dataset.questions, found.texts[0], strict=True):
                sampling = SamplingSettings(max_new_tokens=4)
                assert text == session.ask(question.picture.path, question.text, budget=16, sampling=sampling).text

    def test_another_graph_answers_otherwise(self, answering_bundle: Bundle, dataset: Dataset, tmp_path: Path) -> None:
        """Other weights in the toy graph, and no manifest on disk: a bundle that is being made has none yet."""
        import onnx
        from onnx import numpy_helper

        folder = Path(shutil.copytree(answering_bundle.folder, tmp_path / "other"))
        (folder / MANIFEST).unlink()
        graph = onnx.load(str(folder / "vision.onnx"))
        for item in graph.graph.initializer:
            if item.name == "weights":
                item.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(item) * -2.0, "weights"))
        onnx.save(graph, str(folder / "vision.onnx"))
        found = kept_answers(answering_bundle, Bundle(folder, answering_bundle.manifest), dataset, SETTINGS, (16,))
        assert found.at[0].same < 6
        assert not found.examples[0].same

    def test_shares_are_of_the_tokens_and_none_is_asked_twice(self, answering_bundle: Bundle, dataset: Dataset) -> None:
        found = answers_of(answering_bundle, dataset.first(1), SETTINGS, (Fraction(1, 4), 16, Fraction(1)))
        assert [cell.budget for cell in found.cells] == [16, 64]
        usual = kept_answers(answering_bundle, answering_bundle, dataset.first(1), SETTINGS)
        assert [item.budget for item in usual.at] == [7]  # a ninth of 64

    @pytest.mark.parametrize("size", [0, 65, Fraction(0), Fraction(3, 2)])
    def test_a_budget_that_does_not_exist(self, answering_bundle: Bundle, dataset: Dataset, size: int) -> None:
        with pytest.raises(BudgetError):
            answers_of(answering_bundle, dataset, SETTINGS, (size,))

    def test_progress_counts_answers(self, answering_bundle: Bundle, dataset: Dataset) -> None:
        told: list[str] = []
        counted: list[int] = []
        kept_answers(
            answering_bundle, answering_bundle, dataset, SETTINGS, (4,), tell=told.append, advance=counted.append
        )
        assert sum(counted) == 12
        assert told == ["holov at 4 tokens"] * 2

    def test_a_bundle_without_a_decoder(self, answering_bundle: Bundle, toy_bundle: Bundle, dataset: Dataset) -> None:
        with pytest.raises(UsageError, match="'toy' has no decoder"):
            kept_answers(answering_bundle, toy_bundle, dataset, SETTINGS)

    def test_a_question_that_is_too_long_is_refused_before_any_is_asked(
        self, answering_bundle: Bundle, tmp_path: Path
    ) -> None:
        picture = Picture("p", write_picture(tmp_path / "p.png", 0))
        long = dataset_from_questions("long", "jsonl", [Question("1", picture, "what? " * 600, ("a",), where="line 1")])
        told: list[str] = []
        with pytest.raises(PromptError, match="line 1"):
            kept_answers(answering_bundle, answering_bundle, long, SETTINGS, tell=told.append)
        assert told == []


class TestWhatIsAtHand:
    def test_the_shipped_scenes_for_the_demo_model(self, toy_bundle: Bundle) -> None:
        source = CheckpointSource(kind="bundled", name="demo")
        plan = toy_bundle.manifest.plan.model_copy(update={"source": source})
        demo = Bundle(toy_bundle.folder, toy_bundle.manifest.model_copy(update={"plan": plan}))
        found, reason = questions_at_hand(demo.manifest.plan)
        assert found == demo_questions() and reason == ""
        assert len(demo_questions().questions) == len(demo_questions().pictures) == 3
        for question in demo_questions().questions:
            assert question.answers and question.picture.read()[:4] == b"\x89PNG"

    def test_none_for_others(self, toy_bundle: Bundle) -> None:
        assert questions_at_hand(toy_bundle.manifest.plan) == (None, "no questions at hand")

    def test_the_users_own(self, toy_bundle: Bundle, tmp_path: Path) -> None:
        path = write_questions(tmp_path / "data", pictures=2, each=1)
        found, reason = questions_at_hand(toy_bundle.manifest.plan, path)
        assert found is not None and len(found.questions) == 2 and reason == ""
        (tmp_path / "data" / "picture_1.png").unlink()
        with pytest.raises(UsageError, match=r"picture_1\.png' does not exist"):
            questions_at_hand(toy_bundle.manifest.plan, path)

    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            ({}, ""),
            ({"decoder": None}, "has no decoder"),
            ({"decoder": DecoderPrecision.INT4}, ""),
            ({"decoder": DecoderPrecision.BF16}, "bf16 decoder"),
            ({"precision": Precision.BF16}, "bf16 vision graph"),
            ({"decoder_provider": "cuda"}, "was built for cuda"),
            ({"decoder_provider": "cuda", "decoder": DecoderPrecision.FP16}, ""),
        ],
    )
    def test_who_cannot_be_asked(self, answering_bundle: Bundle, changes: dict[str, object], words: str) -> None:
        plan = answering_bundle.manifest.plan.model_copy(update=changes)
        found = obstacle_of(
            Bundle(answering_bundle.folder, answering_bundle.manifest.model_copy(update={"plan": plan}))
        )
        assert words in found and bool(words) == bool(found)
