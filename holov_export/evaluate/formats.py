"""Readers of the public benchmarks as people have them on disk.

| format | files | pictures |
| vqav2 | questions JSON and annotations JSON | COCO_val2014_000000000042.jpg |
| gqa | one JSON: id -> imageId, question, answer | n161313.jpg |
| textvqa | one JSON, version 0.5.1: data -> question, image_id, answers | 0a1b2c3d4e5f6a7b.jpg |
| pope | JSON lines: question_id, image, text, label | the name in `image` |
| mme | a folder a task with a .txt of two questions beside every picture | the same stem |
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from holov_export.errors import UsageError
from holov_export.evaluate.data import (
    Dataset,
    Picture,
    Question,
    answers_field,
    dataset_from_jsonl,
    dataset_from_questions,
    numbered_lines,
    object_from_json,
    refuse,
    text_field,
    text_from_file,
)

FORMATS = ("auto", "jsonl", "vqav2", "gqa", "textvqa", "pope", "mme")
_PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")


def dataset_from_path(
    path: Path, form: str = "auto", *, images: Path | None = None, questions: Path | None = None
) -> Dataset:
    """Read a benchmark.

    Args:
        path: the file, or the folder of MME. Of VQAv2 the annotations.
        form: one of `FORMATS`; "auto" looks at what is in the file.
        images: folder of the pictures; None for the file's own.
        questions: VQAv2: the questions JSON.

    Raises:
        UsageError: the file is of no such format, or things are wrong with it; they are named.
        StorageError: it cannot be read.
    """
    if images is not None and not images.is_dir():
        raise UsageError(f"'{images}' is no folder of pictures.", hint="Name it with --images.")
    form = format_of(path) if form == "auto" else form
    if questions is not None and form != "vqav2":
        raise UsageError(f"--questions is for vqav2 only, '{path.name}' is {form}.")
    if form == "vqav2":
        return _vqav2(path, questions, images or path.parent)
    if form == "mme":
        return _mme(path, images)
    if form == "jsonl":
        return dataset_from_jsonl(path, images)
    reader = {"gqa": _gqa, "textvqa": _textvqa, "pope": _pope}[form]
    return reader(path, images or path.parent)


def format_of(path: Path) -> str:
    """What a file or folder looks like, one of `FORMATS`.

    Raises:
        UsageError: it looks like none.
    """
    if path.is_dir():
        return "mme"
    text = text_from_file(path)
    try:
        whole = json.loads(text)
    except (ValueError, RecursionError):  # ValueError: no JSON, or a number of more digits than Python takes
        whole = None
    if isinstance(whole, list):
        raise UsageError(f"'{path.name}' is one JSON list.", hint="Write one JSON object a line, without the brackets.")
    if isinstance(whole, dict) and not {"image", "text", "question"} & set(whole):
        return _format_of_object(path, whole)
    lines = numbered_lines(text)
    try:
        first = object_from_json(lines[0][1]) if lines else {}
    except ValueError:
        first = {}
    if {"text", "label"} <= set(first):
        return "pope"
    # a broken first line too: the reader of JSON lines says what is wrong with each
    return "jsonl"


def _format_of_object(path: Path, whole: dict[str, Any]) -> str:
    if "annotations" in whole or "questions" in whole:
        return "vqav2"
    if isinstance(whole.get("data"), list):
        return "textvqa"
    first = next(iter(whole.values()), None)
    if isinstance(first, dict) and "imageId" in first:
        return "gqa"
    raise UsageError(
        f"'{path.name}' is JSON of no format that is known.", hint=f"Name one: --format {'|'.join(FORMATS[1:])}"
    )


def _objects(
    name: str, form: str, rows: Sequence[tuple[str, object]], question_from: Callable[[dict[str, Any], str], Question]
) -> Dataset:
    """A dataset of (where, row) pairs; what is wrong with any of them is said for all at once."""
    questions, problems = [], []
    for where, row in rows:
        try:
            if not isinstance(row, dict):
                raise ValueError("not a JSON object")
            questions.append(question_from(row, where))
        except ValueError as error:
            problems.append(f"{where}: {error}")
    refuse(name, problems)
    return dataset_from_questions(name, form, questions)


def _whole(path: Path) -> Any:
    try:
        return json.loads(text_from_file(path))
    except json.JSONDecodeError as error:
        raise UsageError(f"'{path}' is no JSON: line {error.lineno}: {error.msg}.") from None
    except ValueError as error:
        raise UsageError(f"'{path}' holds a number that cannot be read: {error}.") from None
    except RecursionError:
        raise UsageError(f"'{path}' is nested too deeply to be read.") from None


def _list_of(path: Path, key: str) -> list[Any]:
    whole = _whole(path)
    found = whole.get(key) if isinstance(whole, dict) else None
    if not isinstance(found, list):
        raise UsageError(f"'{path}' has no list '{key}'.")
    return found


def _number(row: dict[str, Any], name: str) -> int:
    value = row.get(name)
    if isinstance(value, bool) or not isinstance(value, (int, str)) or not str(value).isdigit():
        raise ValueError(f"no whole number '{name}'")
    return int(value)


def _identity(row: dict[str, Any], name: str) -> str:
    value = row.get(name)
    if isinstance(value, bool) or not isinstance(value, (int, str)) or value == "":
        raise ValueError(f"no '{name}'")
    return str(value)


# ---------------------------------------------------------------------------------------------------- VQAv2


def _vqav2(path: Path, questions: Path | None, images: Path) -> Dataset:
    """Source: https://visualqa.org/download.html, format of the questions and annotations."""
    if questions is None:
        raise UsageError(
            "VQAv2 keeps its questions and its answers in two files.",
            hint=f"Name both: {path.name} --questions v2_OpenEnded_mscoco_val2014_questions.json --images val2014",
        )
    whole = _whole(path)
    if isinstance(whole, dict) and "annotations" not in whole and "questions" in whole:
        path, questions = questions, path  # named the other way round
    asked: dict[int, dict[str, Any]] = {}
    problems = []
    for number, row in enumerate(_list_of(questions, "questions"), start=1):
        try:
            if not isinstance(row, dict):
                raise ValueError("not a JSON object")
            asked[_number(row, "question_id")] = row
        except ValueError as error:
            problems.append(f"{questions.name} question {number}: {error}")
    refuse(questions.name, problems)
    subset = str(_whole(questions).get("data_subtype", "val2014"))

    def question_from(row: dict[str, Any], where: str) -> Question:
        index = _number(row, "question_id")
        if index not in asked:
            raise ValueError(f"question {index} is not in {questions.name}")
        name = f"COCO_{subset}_{_number(asked[index], 'image_id'):012d}.jpg"
        said = row.get("answers")
        if not isinstance(said, list) or not all(isinstance(item, dict) for item in said):
            raise ValueError("no list 'answers'")
        answers = answers_field({"answers": [item.get("answer") for item in said]}, "answers")
        text = text_field(asked[index], "question")
        kind = str(row.get("answer_type", ""))
        return Question(str(index), Picture(name, images / name), text, answers, kind, name, where=where)

    rows = [(f"annotation {number}", row) for number, row in enumerate(_list_of(path, "annotations"), start=1)]
    return _objects(path.stem, "vqav2", rows, question_from)


# ----------------------------------------------------------------------------------------------- GQA, TextVQA, POPE


def _gqa(path: Path, images: Path) -> Dataset:
    """Source: https://cs.stanford.edu/people/dorarad/gqa/download.html, format of the questions."""
    whole = _whole(path)
    if not isinstance(whole, dict):
        raise UsageError(f"'{path}' is no GQA file: it is no JSON object.")

    def question_from(row: dict[str, Any], where: str) -> Question:
        name = f"{_identity(row, 'imageId')}.jpg"
        types = row.get("types")
        kind = str(types.get("structural", "")) if isinstance(types, dict) else ""
        answers = (text_field(row, "answer"),)
        index = where.removeprefix("question ")
        return Question(
            index, Picture(name, images / name), text_field(row, "question"), answers, kind, name, "", where
        )

    return _objects(path.stem, "gqa", [(f"question {key}", row) for key, row in whole.items()], question_from)


def _textvqa(path: Path, images: Path) -> Dataset:
    """Source: https://textvqa.org/dataset/, version 0.5.1."""

    def question_from(row: dict[str, Any], where: str) -> Question:
        name = f"{_identity(row, 'image_id')}.jpg"
        answers = answers_field(row, "answers")
        index = _identity(row, "question_id")
        return Question(index, Picture(name, images / name), text_field(row, "question"), answers, "", name, "", where)

    rows = [(f"question {number}", row) for number, row in enumerate(_list_of(path, "data"), start=1)]
    return _objects(path.stem, "textvqa", rows, question_from)


def _pope(path: Path, images: Path) -> Dataset:
    """Source: RUCAIBox/POPE output/coco/coco_pope_random.json; JSON lines whatever the name says."""
    rows: list[tuple[str, object]] = []
    problems = []
    for number, line in numbered_lines(text_from_file(path)):
        try:
            rows.append((f"line {number}", object_from_json(line)))
        except ValueError as error:
            problems.append(f"line {number}: {error}")
    refuse(path.name, problems)

    def question_from(row: dict[str, Any], where: str) -> Question:
        name = text_field(row, "image")
        label = text_field(row, "label").strip().lower()
        if label not in ("yes", "no"):
            raise ValueError(f"the label is '{label}', expected yes or no")
        index = _identity(row, "question_id")
        return Question(index, Picture(name, images / name), text_field(row, "text"), (label,), "", name, "", where)

    return _objects(path.stem, "pope", rows, question_from)


# ---------------------------------------------------------------------------------------------------- MME


def _mme(path: Path, images: Path | None) -> Dataset:
    """Source: arXiv 2306.13394, the release's folders: a task each, `picture.txt` beside `picture.jpg`.

    Some tasks keep them in `questions_answers_YN/` and `images/`. The folder of a single task is read as well.
    """
    if images is not None:
        raise UsageError("MME keeps its pictures beside the questions; leave --images out.")
    if not path.is_dir():
        raise UsageError(f"'{path}' is no folder of MME tasks.")
    files = sorted(file for file in path.glob("**/*.txt") if len(file.relative_to(path).parts) <= 3)
    # a text at the top is a read-me, unless the folder is that of one task
    files = [file for file in files if file.parent != path] or files
    questions, problems = [], []
    for file in files:
        try:
            questions += _mme_questions(path, file)
        except ValueError as error:
            problems.append(f"{file.relative_to(path).as_posix()}: {error}")
    refuse(path.name, problems)
    return dataset_from_questions(path.name, "mme", questions)


def _mme_questions(root: Path, file: Path) -> list[Question]:
    """The two questions about one picture. ValueError with what is wrong."""
    inside = file.relative_to(root).parts[:-1]
    task = next((part for part in inside if part != "questions_answers_YN"), root.name)
    folder = file.parent.parent / "images" if file.parent.name == "questions_answers_YN" else file.parent
    picture = next(
        (folder / f"{file.stem}{end}" for end in _PICTURES if (folder / f"{file.stem}{end}").is_file()), None
    )
    if picture is None:
        raise ValueError(f"no picture '{file.stem}' beside it")
    name = picture.relative_to(root).as_posix()
    lines = numbered_lines(text_from_file(file))
    if len(lines) != 2:
        raise ValueError(f"{len(lines)} questions, expected 2")
    found = []
    for number, line in lines:
        text, tab, answer = line.strip("\r\n").partition("\t")
        answer = answer.strip().lower()
        if not tab or not text.strip() or answer not in ("yes", "no"):
            raise ValueError(f"line {number} is not 'question<tab>Yes' or 'question<tab>No'")
        where = f"{file.relative_to(root).as_posix()} line {number}"
        found.append(
            Question(f"{name}#{number}", Picture(name, picture), text.strip(), (answer,), task, name, name, where)
        )
    return found
