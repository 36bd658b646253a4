"""The metrics. Each is a ratio or an F1 of sums over questions, so that a bootstrap only has to add them up again.

A metric turns the answers into a few columns, one number a question each (`Metric.columns`); its value is a function
of the columns' sums (`Metric.value`). An exact match is right / asked; F1 needs true and false positives.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from holov_export.evaluate.answer_text import plain, vqa_normal, yes_or_no
from holov_export.evaluate.data import Dataset, Question

Array = npt.NDArray[np.float64]

#: Source: Biten et al., arXiv 1905.13648 and 1907.00490: answers below a similarity of one half count nothing
ANLS_THRESHOLD = 0.5
#: people that must agree with an answer. Source: Antol et al., arXiv 1505.00468, and visualqa.org/evaluation.html
VQA_AGREE = 3


@dataclass(frozen=True)
class Metric:
    """How good answers are.

    Attributes:
        name: for programs and `--metric`. title: for tables.
        columns: (questions, answers, answers of the unpruned run) -> float [Q, columns].
        value: sums of the columns [..., columns] -> [...]; NaN where it is not defined.
    """

    name: str
    title: str
    columns: Callable[[Sequence[Question], Sequence[str], Sequence[str]], Array]
    value: Callable[[Array], Array]


# ---------------------------------------------------------------------------------------------------- of one answer


def exact_match(answer: str, right: Sequence[str]) -> float:
    """1 if the answer is one of the right ones, compared as `plain` texts."""
    said = plain(answer)
    return float(any(said == plain(item) for item in right))


def vqa_accuracy(answer: str, right: Sequence[str]) -> float:
    """VQA accuracy: min(1, agreeing / 3), averaged over leaving out each person in turn.

    With fewer than four people, all of the others must agree instead of three of them; with one, the answer must be
    that one. All texts are compared as `vqa_normal`, those that everybody agrees on as well (the published script
    leaves these as they are, so that "Yes." could never be right).
    """
    said = vqa_normal(answer)
    agreeing = [vqa_normal(item) == said for item in right]
    if len(right) == 1:
        return float(agreeing[0])
    needed, total = min(VQA_AGREE, len(right) - 1), sum(agreeing)
    return sum(min(1.0, (total - mine) / needed) for mine in agreeing) / len(right)


def anls(answer: str, right: Sequence[str]) -> float:
    """Average normalised Levenshtein similarity of one answer: the best over the right ones, 0 below one half."""
    said = " ".join(answer.casefold().split())
    return max(_similarity(said, " ".join(item.casefold().split())) for item in right)


def _similarity(first: str, second: str) -> float:
    longest = max(len(first), len(second))
    if longest == 0:
        return 1.0
    similarity = 1 - edit_distance(first, second) / longest
    return similarity if similarity >= ANLS_THRESHOLD else 0.0


def edit_distance(first: str, second: str) -> int:
    """Levenshtein distance: insertions, deletions and substitutions, one each."""
    row = list(range(len(second) + 1))
    for i, left in enumerate(first, start=1):
        diagonal, row[0] = row[0], i
        for j, right in enumerate(second, start=1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (left != right))
    return row[-1]


# ---------------------------------------------------------------------------------------------------- over questions


def _ratio(sums: Array) -> Array:
    """First sum by the second; NaN where that is 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        found: Array = np.where(sums[..., 1] > 0, sums[..., 0] / sums[..., 1], np.nan)
    return found


def _f1(sums: Array) -> Array:
    """2 TP / (2 TP + FP + FN) of the sums TP, FP, FN."""
    return _ratio(np.stack([2 * sums[..., 0], 2 * sums[..., 0] + sums[..., 1] + sums[..., 2]], axis=-1))


def _mean_of(score: Callable[[str, Sequence[str]], float]) -> Callable[..., Array]:
    def columns(questions: Sequence[Question], answers: Sequence[str], reference: Sequence[str]) -> Array:
        scores = [score(answer, question.answers) for question, answer in zip(questions, answers, strict=True)]
        return np.stack([np.array(scores, dtype=np.float64), np.ones(len(scores))], axis=1)

    return columns


def _loyalty(questions: Sequence[Question], answers: Sequence[str], reference: Sequence[str]) -> Array:
    same = [plain(answer) == plain(other) for answer, other in zip(answers, reference, strict=True)]
    return np.stack([np.array(same, dtype=np.float64), np.ones(len(same))], axis=1)


def _verdicts(questions: Sequence[Question], answers: Sequence[str]) -> Array:
    """[Q, 5]: said yes and yes is right, said yes and no is, not yes though it is, right, unclear; 0 or 1 each."""
    rows = []
    for question, answer in zip(questions, answers, strict=True):
        said, truth = yes_or_no(answer), yes_or_no(question.answers[0])
        yes = said is True
        rows.append((yes and truth, yes and not truth, bool(truth) and not yes, said == truth, said is None))
    return np.array(rows, dtype=np.float64).reshape(len(rows), 5)


def _yes_no(*wanted: int) -> Callable[..., Array]:
    """Columns of `_verdicts`; -1 is a column of ones."""

    def columns(questions: Sequence[Question], answers: Sequence[str], reference: Sequence[str]) -> Array:
        found = _verdicts(questions, answers)
        found = np.concatenate([found, np.ones((len(found), 1))], axis=1)
        return found[:, list(wanted)]

    return columns


def _precision(questions: Sequence[Question], answers: Sequence[str], reference: Sequence[str]) -> Array:
    found = _verdicts(questions, answers)
    return np.stack([found[:, 0], found[:, 0] + found[:, 1]], axis=1)


def _recall(questions: Sequence[Question], answers: Sequence[str], reference: Sequence[str]) -> Array:
    found = _verdicts(questions, answers)
    return np.stack([found[:, 0], found[:, 0] + found[:, 2]], axis=1)


def _said_yes(questions: Sequence[Question], answers: Sequence[str], reference: Sequence[str]) -> Array:
    found = _verdicts(questions, answers)
    return np.stack([found[:, 0] + found[:, 1], np.ones(len(found))], axis=1)


def _accuracy_plus(questions: Sequence[Question], answers: Sequence[str], reference: Sequence[str]) -> Array:
    """A pair counts when all of it is right; its share of the sums is spread over its questions."""
    right = _verdicts(questions, answers)[:, 3] > 0
    size = Counter(question.pair for question in questions)
    correct = Counter(question.pair for question, good in zip(questions, right, strict=True) if good)
    rows = [(float(correct[item.pair] == size[item.pair]) / size[item.pair], 1 / size[item.pair]) for item in questions]
    return np.array(rows, dtype=np.float64).reshape(len(rows), 2)


LOYALTY = Metric("loyalty", "loyalty", _loyalty, _ratio)
_EXACT = Metric("exact", "exact match", _mean_of(exact_match), _ratio)
_VQA = Metric("vqa", "VQA accuracy", _mean_of(vqa_accuracy), _ratio)
_ANLS = Metric("anls", "ANLS", _mean_of(anls), _ratio)
_ACCURACY = Metric("yes-no", "yes/no accuracy", _yes_no(3, -1), _ratio)
_PLUS = Metric("accuracy-plus", "accuracy+ (both questions of a picture)", _accuracy_plus, _ratio)
_YES_NO = (
    _ACCURACY,
    Metric("precision", "precision of yes", _precision, _ratio),
    Metric("recall", "recall of yes", _recall, _ratio),
    Metric("f1", "F1 of yes", _yes_no(0, 1, 2), _f1),
    Metric("yes-share", "share of yes", _said_yes, _ratio),
    Metric("unclear", "neither yes nor no", _yes_no(4, -1), _ratio),
)
METRICS = (_EXACT, _VQA, _ANLS, *_YES_NO, _PLUS, LOYALTY)
#: no measures of quality: more is not better, so nothing is "kept" of them
DESCRIPTIONS = frozenset({"yes-share", "unclear"})
#: what a benchmark's own tables show
_CUSTOMARY = {"vqav2": "vqa", "textvqa": "vqa", "gqa": "exact", "pope": "f1", "mme": "yes-no"}


def metrics_for(dataset: Dataset) -> tuple[Metric, ...]:
    """The metrics that apply to a dataset, the customary one of its format first and loyalty last.

    Yes/no metrics apply if every answer is yes or no, VQA accuracy if some question has several answers, ANLS unless
    every answer is yes or no, accuracy+ to MME.
    """
    questions = dataset.questions
    binary = all(plain(answer) in ("yes", "no") for question in questions for answer in question.answers)
    binary = binary and all(len({plain(answer) for answer in question.answers}) == 1 for question in questions)
    found = [_EXACT]
    if any(len(question.answers) > 1 for question in questions):
        found.append(_VQA)
    found += list(_YES_NO) if binary else [_ANLS]
    if binary and all(question.pair for question in questions):
        found.append(_PLUS)
    first = _CUSTOMARY.get(dataset.format, "exact")
    found.sort(key=lambda metric: metric.name != first)
    return (*found, LOYALTY)
