"""Formulas against values worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest
from evaluation_cases import questions_of
from hypothesis import given
from hypothesis import strategies as st

from holov_export.evaluate.data import Dataset
from holov_export.evaluate.metrics import METRICS, anls, edit_distance, exact_match, metrics_for, vqa_accuracy

BY_NAME = {metric.name: metric for metric in METRICS}


def value(name: str, dataset: Dataset, answers: list[str], reference: list[str] | None = None) -> float:
    columns = BY_NAME[name].columns(dataset.questions, answers, reference or answers)
    assert columns.shape[0] == len(answers)
    return float(BY_NAME[name].value(columns.sum(axis=0)))


@pytest.mark.parametrize(
    ("answer", "right", "expected"),
    [("Two.", ["two"], 1), ("two", ["2"], 0), ("b", ["a", "b"], 1), ("", ["a"], 0), ("a dog", ["dog"], 0)],
)
def test_exact_match(answer: str, right: list[str], expected: float) -> None:
    assert exact_match(answer, right) == expected


@pytest.mark.parametrize(
    ("agreeing", "expected"),
    # leaving one of ten out, agreeing a times: a of the ten see a - 1, the others a; min(1, . / 3)
    [
        (0, 0.0),
        (1, 9 * (1 / 3) / 10),
        (2, (2 * 1 / 3 + 8 * 2 / 3) / 10),
        (3, (3 * 2 / 3 + 7) / 10),
        (4, 1.0),
        (10, 1.0),
    ],
)
def test_vqa_accuracy_of_ten_people(agreeing: int, expected: float) -> None:
    people = ["a dog"] * agreeing + ["cat"] * (10 - agreeing)
    assert vqa_accuracy("Dog", people) == pytest.approx(expected)


def test_the_known_values_of_vqa_accuracy() -> None:
    """0.3, 0.6 and 0.9 for one, two and three people, as the evaluation of VQA is known to give."""
    got = [vqa_accuracy("x", ["x"] * count + ["y"] * (10 - count)) for count in (1, 2, 3)]
    assert got == pytest.approx([0.3, 0.6, 0.9])


@pytest.mark.parametrize(
    ("answer", "people", "expected"),
    [
        ("two", ["2"], 1.0),
        ("three", ["2"], 0.0),
        ("x", ["x", "x"], 1.0),
        ("x", ["x", "y"], 0.5),  # without the one who agrees nobody does, without the other all do
        ("x", ["x", "x", "y"], (0.5 + 0.5 + 1) / 3),
        ("x", ["x", "x", "x", "y"], (3 * 2 / 3 + 1) / 4),
    ],
)
def test_vqa_accuracy_of_few_people(answer: str, people: list[str], expected: float) -> None:
    assert vqa_accuracy(answer, people) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("answer", "right", "expected"),
    [
        ("hello", ["hello"], 1.0),
        ("hallo", ["hello"], 0.8),
        ("Hello ", ["hello"], 1.0),
        ("abcd", ["abxy"], 0.5),  # exactly one half counts
        ("abc", ["axy"], 0.0),
        ("", ["hello"], 0.0),
        ("hallo", ["xxxxx", "hello"], 0.8),
    ],
)
def test_anls(answer: str, right: list[str], expected: float) -> None:
    assert anls(answer, right) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("first", "second", "distance"), [("kitten", "sitting", 3), ("", "abc", 3), ("abc", "", 3), ("flaw", "lawn", 2)]
)
def test_edit_distance(first: str, second: str, distance: int) -> None:
    assert edit_distance(first, second) == distance


@given(st.text("ab", max_size=6), st.text("ab", max_size=6), st.text("ab", max_size=6))
def test_edit_distance_is_a_metric(a: str, b: str, c: str) -> None:
    assert edit_distance(a, b) == edit_distance(b, a)
    assert (edit_distance(a, b) == 0) == (a == b)
    assert edit_distance(a, c) <= edit_distance(a, b) + edit_distance(b, c)


def test_yes_and_no_of_eight_answers() -> None:
    """TP 2, FN 2 (one of them unclear), FP 1, TN 2, one unclear whose truth is no."""
    truth = ["yes", "yes", "yes", "yes", "no", "no", "no", "no"]
    said = ["yes", "Yes, it is", "no", "maybe", "yes", "no", "No.", "perhaps"]
    dataset = questions_of([(str(index), [right]) for index, right in enumerate(truth)])
    assert value("yes-no", dataset, said) == pytest.approx(4 / 8)
    assert value("precision", dataset, said) == pytest.approx(2 / 3)
    assert value("recall", dataset, said) == pytest.approx(2 / 4)
    assert value("f1", dataset, said) == pytest.approx(2 * (2 / 3) * (1 / 2) / (2 / 3 + 1 / 2))
    assert value("yes-share", dataset, said) == pytest.approx(3 / 8)
    assert value("unclear", dataset, said) == pytest.approx(2 / 8)


def test_precision_without_a_yes_is_not_defined() -> None:
    dataset = questions_of([("a", ["yes"]), ("b", ["no"])])
    assert np.isnan(value("precision", dataset, ["no", "no"]))
    assert value("recall", dataset, ["no", "no"]) == 0
    assert value("f1", dataset, ["no", "no"]) == 0


def test_accuracy_plus_wants_both_of_a_picture() -> None:
    rows = [("a", ["yes"]), ("a", ["no"]), ("b", ["yes"]), ("b", ["no"])]
    dataset = questions_of(rows, "mme", pair="yes")
    assert value("accuracy-plus", dataset, ["yes", "no", "yes", "yes"]) == pytest.approx(1 / 2)
    assert value("yes-no", dataset, ["yes", "no", "yes", "yes"]) == pytest.approx(3 / 4)


def test_loyalty_compares_with_the_unpruned_answer_and_not_with_the_truth() -> None:
    dataset = questions_of([("a", ["x"]), ("b", ["x"]), ("c", ["x"])])
    assert value("loyalty", dataset, ["y", "X.", "x"], ["y", "x", "z"]) == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("rows", "form", "names"),
    [
        ([["two"]], "jsonl", ["exact", "anls", "loyalty"]),
        ([["two", "2"], ["x"]], "jsonl", ["exact", "vqa", "anls", "loyalty"]),
        ([["a"] * 10], "vqav2", ["vqa", "exact", "anls", "loyalty"]),
        (
            [["Yes"], ["no"]],
            "jsonl",
            ["exact", "yes-no", "precision", "recall", "f1", "yes-share", "unclear", "loyalty"],
        ),
        ([["yes"]], "pope", ["f1", "exact", "yes-no", "precision", "recall", "yes-share", "unclear", "loyalty"]),
        ([["yes"], ["maybe"]], "jsonl", ["exact", "anls", "loyalty"]),
        ([["yes", "no"]], "jsonl", ["exact", "vqa", "anls", "loyalty"]),  # people disagree, so there is no truth
    ],
)
def test_only_metrics_that_apply(rows: list[list[str]], form: str, names: list[str]) -> None:
    dataset = questions_of([(str(index), answers) for index, answers in enumerate(rows)], form)
    assert [metric.name for metric in metrics_for(dataset)] == names


def test_accuracy_plus_is_for_mme_alone() -> None:
    dataset = questions_of([("a", ["yes"]), ("a", ["no"])], "mme", pair="yes")
    names = [metric.name for metric in metrics_for(dataset)]
    assert names[0] == "yes-no" and "accuracy-plus" in names
