"""Questions with their pictures and right answers, and the reader of this project's own JSON lines.

Every reader collects all that is wrong with a file and names the places before a single question is asked.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import io
import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import unquote_to_bytes

from PIL import Image

from holov_export.errors import StorageError, UsageError
from holov_export.runtime.preprocess import FORMATS, MAX_PIXELS

#: so many of the things that are wrong with a file are named one by one
_NAMED = 5


@dataclass(frozen=True)
class Picture:
    """An image that questions are about: a file, or the bytes of a data URI.

    Attributes:
        name: how messages, the journal and the bootstrap call it; two questions about one picture have the same.
    """

    name: str
    path: Path | None = None
    data: bytes | None = field(default=None, repr=False)

    def read(self) -> bytes:
        """The bytes of the image file.

        Raises:
            StorageError: the file cannot be read.
        """
        if self.data is not None:
            return self.data
        assert self.path is not None
        try:
            return self.path.read_bytes()
        except OSError as error:
            raise StorageError(f"cannot read the image '{self.path}': {error.strerror}.") from error


@dataclass(frozen=True)
class Question:
    """One question.

    Attributes:
        id: unique in the data.
        answers: the right ones; several are what several people said, or equally good forms.
        kind: the sort of question, "" where the data does not say.
        group: questions of one group are resampled together; by default the picture's name.
        pair: MME only: the two questions about one picture, which count together in accuracy+.
        where: "data.jsonl line 3", for messages.
    """

    id: str
    picture: Picture
    text: str
    answers: tuple[str, ...]
    kind: str = ""
    group: str = ""
    pair: str = ""
    where: str = ""


@dataclass(frozen=True)
class Dataset:
    """The questions of one file or folder, in its order.

    Attributes:
        name: of the file or folder, without its ending.
        format: which reader read it.
        total: questions that the file holds; `questions` may be the first of them.
        sha256: of all questions, answers and groups that the file holds, and of the names of the pictures.
    """

    name: str
    format: str
    questions: tuple[Question, ...]
    total: int
    sha256: str

    def first(self, limit: int | None) -> Dataset:
        """The first `limit` questions; the hash stays that of all, so that answers can be used again."""
        if limit is None:
            return self
        return Dataset(self.name, self.format, self.questions[:limit], self.total, self.sha256)

    @cached_property
    def pictures(self) -> dict[str, Picture]:
        """Each picture once, by name, in the order of the questions."""
        return {question.picture.name: question.picture for question in self.questions}

    @cached_property
    def groups(self) -> tuple[str, ...]:
        """The groups, each once."""
        return tuple(dict.fromkeys(question.group for question in self.questions))


def dataset_from_questions(name: str, form: str, questions: Sequence[Question]) -> Dataset:
    """A dataset with its hash.

    Raises:
        UsageError: there is no question, two have the same id, or one holds what is no text.
    """
    if not questions:
        raise UsageError(f"'{name}' holds no question.", hint=f"It was read as {form}; --format chooses another.")
    seen: dict[str, Question] = {}
    twice = []
    for question in questions:
        if question.id in seen:
            twice.append(f"{question.where}: the id '{question.id}' is that of {seen[question.id].where}")
        seen.setdefault(question.id, question)
    refuse(name, [*twice, *(f"{item.where}: half of a surrogate pair is no text" for item in questions if _torn(item))])
    digest = hashlib.sha256()
    for item in questions:
        said = [item.id, item.picture.name, item.text, list(item.answers), item.kind, item.group, item.pair]
        digest.update(json.dumps(said).encode() + b"\n")
    return Dataset(name, form, tuple(questions), len(questions), digest.hexdigest())


def _torn(question: Question) -> bool:
    """Whether half of a surrogate pair stands alone in it, which JSON may hold: no tokenizer and no UTF-8 file does."""
    try:
        for text in (question.id, question.picture.name, question.text, question.kind, question.group):
            text.encode()
        "".join(question.answers).encode()
    except UnicodeEncodeError:
        return True
    return False


def refuse(name: str, problems: Sequence[str]) -> None:
    """Raise if there are problems.

    Raises:
        UsageError: names the first ones, and how many there are.
    """
    if not problems:
        return
    more = f"\n  ... and {len(problems) - _NAMED} more" if len(problems) > _NAMED else ""
    listed = "".join(f"\n  {problem}" for problem in problems[:_NAMED])
    count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
    raise UsageError(f"'{name}' cannot be used: {count}.{listed}{more}")


def check_pictures(dataset: Dataset) -> None:
    """Look at the header of every picture, so that no run of hours ends at one that is missing or broken.

    Raises:
        UsageError: names the pictures that are missing or are no images, and who asks about the first.
    """
    asked_by: dict[str, Question] = {}
    for question in dataset.questions:
        asked_by.setdefault(question.picture.name, question)
    problems = []
    for question in asked_by.values():
        trouble = _trouble_with(question.picture)
        if trouble:
            problems.append(f"{question.where}: {trouble}")
    refuse(dataset.name, problems)


def _trouble_with(picture: Picture) -> str:
    if picture.path is None:
        return ""  # a data URI was looked at when its line was read
    try:
        missing = not picture.path.exists()
    except OSError as error:  # a name that is too long, a folder that may not be entered
        return f"the image '{picture.path}' cannot be read: {error.strerror}"
    if missing:
        return f"the image '{picture.path}' does not exist"
    return _trouble_in_header(picture.path)


def _trouble_in_header(source: Path | io.BytesIO) -> str:
    """Why `preprocess.image_from` would refuse an image, as far as its header tells; "" if it would not."""
    Image.init()
    name = f"'{source}'" if isinstance(source, Path) else "it"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit is checked right after
            with Image.open(source, formats=[kind for kind in FORMATS if kind in Image.OPEN]) as image:
                width, height = image.size
    except Exception as error:  # Pillow's readers let out whatever their parsers meet in a broken file
        return f"{name} is no image that can be read: {type(error).__name__}"
    if width * height > MAX_PIXELS:
        return f"{name} is too large: {width} x {height} pixels are more than {MAX_PIXELS:,}"
    return ""


def text_from_file(path: Path) -> str:
    """The text of a data file.

    Raises:
        UsageError: it does not exist, is a folder, or is not UTF-8 text.
        StorageError: it cannot be read.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UsageError(f"'{path}' does not exist.") from None
    except IsADirectoryError:
        raise UsageError(f"'{path}' is a folder.", hint="Only MME is read from a folder: --format mme") from None
    except UnicodeDecodeError as error:
        raise UsageError(f"'{path}' is not UTF-8 text (byte {error.start}).") from error
    except OSError as error:
        raise StorageError(f"cannot read '{path}': {error.strerror}.") from error


# ---------------------------------------------------------------------------------------------------- JSON lines


def dataset_from_jsonl(path: Path, images: Path | None = None) -> Dataset:
    """Read JSON lines: image, question, answers; optional id, kind, and scene or group. Other fields are ignored.

    Args:
        path: the file.
        images: folder that relative image paths start from; None for the file's own.

    Raises:
        UsageError: names the lines that are wrong.
        StorageError: the file cannot be read.
    """
    folder = images or path.parent
    questions, problems = [], []
    for number, line in numbered_lines(text_from_file(path)):
        where = f"line {number}"
        try:
            questions.append(_question_from_line(line, number, folder, where))
        except ValueError as error:
            problems.append(f"{where}: {error}")
    refuse(path.name, problems)
    return dataset_from_questions(path.stem, "jsonl", questions)


def numbered_lines(text: str) -> list[tuple[int, str]]:
    """(number from 1, line) of every line that is not blank. Only newlines end one: JSON may hold U+2028."""
    return [(number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]


def _question_from_line(line: str, number: int, folder: Path, where: str) -> Question:
    """Raises ValueError with what is wrong with it."""
    row = object_from_json(line)
    image = text_field(row, "image")
    if image.startswith("data:"):
        picture = picture_from_data_uri(image)
    else:  # "./a.png" and "a.png" are one picture, and one group
        picture = Picture(Path(image).as_posix(), folder / image)
    index, kind, group = (row.get(name) for name in ("id", "kind", "group"))
    group = row.get("scene") if group is None else group
    return Question(
        id=str(number if index is None else index),
        picture=picture,
        text=text_field(row, "question"),
        answers=answers_field(row, "answers"),
        kind="" if kind is None else str(kind),
        group=picture.name if group is None else str(group),
        where=where,
    )


def object_from_json(line: str) -> dict[str, Any]:
    """A JSON object; ValueError if it is none."""
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"no JSON: {error.msg} at column {error.colno}") from None
    except RecursionError:
        raise ValueError("no JSON that can be read: nested too deeply") from None
    if not isinstance(row, dict):
        raise ValueError("not a JSON object")
    return row


def text_field(row: dict[str, Any], name: str) -> str:
    """A string that is not blank; ValueError otherwise."""
    value = row.get(name)
    if value is None:
        raise ValueError(f"no '{name}'")
    if not isinstance(value, str):
        raise ValueError(f"'{name}' is no string")
    if not value.strip():
        raise ValueError(f"'{name}' is empty")
    return value


def answers_field(row: dict[str, Any], name: str) -> tuple[str, ...]:
    """One answer or a list of them; ValueError if there is none. Numbers are taken as their text."""
    value = row.get(name)
    if value is None:
        raise ValueError(f"no '{name}'")
    items = value if isinstance(value, list) else [value]
    if not items:
        raise ValueError(f"'{name}' is empty")
    for item in items:
        if isinstance(item, bool) or not isinstance(item, (str, int, float)):
            raise ValueError(f"'{name}' holds {json.dumps(item)[:40]}, expected strings")
    return tuple(str(item) for item in items)


def picture_from_data_uri(uri: str) -> Picture:
    """A picture from "data:image/png;base64,...". ValueError if it is no such thing.

    Its name is the hash of its bytes, so that the same picture in two lines is one.
    """
    head, comma, body = uri.partition(",")
    if not comma:
        raise ValueError("a data URI without a comma")
    try:
        packed = unquote_to_bytes(body)
        data = base64.b64decode(packed, validate=True) if head.endswith(";base64") else packed
    except (binascii.Error, ValueError) as error:
        raise ValueError(f"a data URI that does not decode: {error}") from None
    trouble = _trouble_in_header(io.BytesIO(data))
    if trouble:
        raise ValueError(f"a data URI that cannot be used: {trouble}")
    return Picture(f"data:{hashlib.sha256(data).hexdigest()[:16]}", data=data)
