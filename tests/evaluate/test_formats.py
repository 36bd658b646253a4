"""Small files of the true shape of each benchmark."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from evaluation_cases import write_picture, write_questions

from holov_export.errors import UsageError
from holov_export.evaluate.data import Dataset, check_pictures
from holov_export.evaluate.formats import dataset_from_path, format_of

PEOPLE = ["net", "net", "net", "netting", "net", "net", "mesh", "net", "net", "net"]


def write_json(path: Path, value: Any) -> Path:
    path.write_text(json.dumps(value), encoding="utf-8")
    return path


def vqav2(folder: Path, **changes: Any) -> tuple[Path, Path]:
    """(annotations, questions) as in the VQAv2 downloads."""
    head = {
        "info": {"description": "This is v2.0 of the VQA dataset.", "version": "2.0", "year": 2017},
        "license": {"name": "Creative Commons Attribution 4.0 International License"},
        "data_subtype": "val2014",
    }
    question = {"image_id": 262148, "question": "Where is he looking?", "question_id": 262148000}
    answers = [
        {"answer": answer, "answer_confidence": "yes", "answer_id": number}
        for number, answer in enumerate(PEOPLE, start=1)
    ]
    annotation = {
        "question_type": "none of the above",
        "multiple_choice_answer": "net",
        "answers": answers,
        "image_id": 262148,
        "answer_type": "other",
        "question_id": 262148000,
        **changes,
    }
    task = {"task_type": "Open-Ended", "data_type": "mscoco"}
    questions = write_json(folder / "questions.json", {**head, **task, "questions": [question]})
    annotations = write_json(folder / "annotations.json", {**head, "data_type": "mscoco", "annotations": [annotation]})
    write_picture(folder / "val2014" / "COCO_val2014_000000262148.jpg", 0)
    return annotations, questions


def test_vqav2(tmp_path: Path) -> None:
    annotations, questions = vqav2(tmp_path)
    for data, other in ((annotations, questions), (questions, annotations)):
        dataset = dataset_from_path(data, questions=other, images=tmp_path / "val2014")
        assert dataset.format == "vqav2"
        (question,) = dataset.questions
        assert (question.id, question.text, question.kind) == ("262148000", "Where is he looking?", "other")
        assert question.answers == tuple(PEOPLE)
        assert question.picture.name == question.group == "COCO_val2014_000000262148.jpg"
        check_pictures(dataset)


def test_vqav2_needs_both_files(tmp_path: Path) -> None:
    annotations, _ = vqav2(tmp_path)
    with pytest.raises(UsageError) as caught:
        dataset_from_path(annotations)
    assert "--questions" in caught.value.hint


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"question_id": 5}, "annotation 1: question 5 is not in questions.json"),
        ({"question_id": None}, "annotation 1: no whole number 'question_id'"),
        ({"answers": "net"}, "annotation 1: no list 'answers'"),
        ({"answers": [{"confidence": "yes"}]}, "annotation 1: 'answers' holds null"),
        ({"answers": []}, "annotation 1: 'answers' is empty"),
    ],
)
def test_vqav2_annotations_that_are_wrong(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    annotations, questions = vqav2(tmp_path, **changes)
    with pytest.raises(UsageError) as caught:
        dataset_from_path(annotations, questions=questions)
    assert words in caught.value.message


def gqa(folder: Path, **changes: Any) -> Path:
    question = {
        "semantic": [{"operation": "select", "dependencies": [], "argument": "scene"}],
        "entailed": ["02930160"],
        "equivalent": ["02930152"],
        "question": "Is it overcast?",
        "imageId": "2405722",
        "isBalanced": True,
        "groups": {"global": None, "local": "13-weather_overcast"},
        "answer": "no",
        "semanticStr": "select: scene->verify weather: overcast [0]",
        "annotations": {"answer": {}, "question": {}, "fullAnswer": {}},
        "types": {"detailed": "weatherVerify", "semantic": "global", "structural": "verify"},
        "fullAnswer": "No, it is clear.",
        **changes,
    }
    return write_json(folder / "testdev_balanced_questions.json", {"02930152": question})


def test_gqa(tmp_path: Path) -> None:
    dataset = dataset_from_path(gqa(tmp_path), images=tmp_path)
    (question,) = dataset.questions
    assert (dataset.format, question.id, question.text) == ("gqa", "02930152", "Is it overcast?")
    assert (question.answers, question.kind, question.picture.name) == (("no",), "verify", "2405722.jpg")
    assert question.picture.path == tmp_path / "2405722.jpg"


def test_gqa_that_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="question 02930152: no 'answer'"):
        dataset_from_path(gqa(tmp_path, answer=None))


def textvqa(folder: Path, **changes: Any) -> Path:
    row = {
        "question": "what is the brand of this camera?",
        "image_id": "003a8ae2ef43b901",
        "image_classes": ["Cassette deck", "Camera"],
        "flickr_original_url": "https://example.org/o.jpg",
        "image_width": 1024,
        "image_height": 664,
        "answers": ["nous les gosses", "dakota", "clos culombu", "dakota digital", *["dakota"] * 6],
        "question_tokens": ["what", "is"],
        "question_id": 34602,
        "set_name": "val",
        **changes,
    }
    head = {"dataset_type": "val", "dataset_name": "textvqa", "dataset_version": "0.5.1"}
    return write_json(folder / "TextVQA_0.5.1_val.json", {**head, "data": [row]})


def test_textvqa(tmp_path: Path) -> None:
    (question,) = dataset_from_path(textvqa(tmp_path)).questions
    assert (question.id, question.picture.name, len(question.answers)) == ("34602", "003a8ae2ef43b901.jpg", 10)


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"answers": None}, "question 1: no 'answers'"), ({"image_id": ""}, "question 1: no 'image_id'")],
)
def test_textvqa_that_is_wrong(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        dataset_from_path(textvqa(tmp_path, **changes))


def pope(folder: Path, *labels: object) -> Path:
    rows = [
        {
            "question_id": number,
            "image": "COCO_val2014_000000310196.jpg",
            "text": f"Is there a thing {number} in the image?",
            "label": label,
        }
        for number, label in enumerate(labels, start=1)
    ]
    path = folder / "coco_pope_random.json"  # JSON lines, as published
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize("labels", [("yes",), ("yes", "no", "yes")])
def test_pope(tmp_path: Path, labels: tuple[str, ...]) -> None:
    dataset = dataset_from_path(pope(tmp_path, *labels))
    assert (dataset.format, len(dataset.groups)) == ("pope", 1)
    assert [question.answers for question in dataset.questions] == [(label,) for label in labels]
    assert dataset.questions[0].text == "Is there a thing 1 in the image?"


def test_pope_that_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="line 2: the label is 'maybe'"):
        dataset_from_path(pope(tmp_path, "yes", "maybe"))


QUESTIONS = (
    "Is this photo taken in a hall? Please answer yes or no.\tYes\n"
    "Is this photo taken in a park? Please answer yes or no.\tNo\n"
)


def mme(folder: Path) -> Path:
    """Two tasks in the two ways of the release."""
    root = folder / "MME_Benchmark"
    write_picture(root / "existence" / "000000006040.jpg", 0)
    (root / "existence" / "000000006040.txt").write_text(QUESTIONS, encoding="utf-8")
    write_picture(root / "landmark" / "images" / "hall.png", 1)
    (root / "landmark" / "questions_answers_YN").mkdir()
    (root / "landmark" / "questions_answers_YN" / "hall.txt").write_text(QUESTIONS.rstrip("\n"), encoding="utf-8")
    (root / "readme.txt").write_text("Hello", encoding="utf-8")
    return root


def kinds(dataset: Dataset) -> list[tuple[str, str, tuple[str, ...]]]:
    return [(question.kind, question.pair, question.answers) for question in dataset.questions]


def test_mme(tmp_path: Path) -> None:
    dataset = dataset_from_path(mme(tmp_path))
    assert dataset.format == "mme"
    first, second = "existence/000000006040.jpg", "landmark/images/hall.png"
    assert kinds(dataset) == [
        ("existence", first, ("yes",)),
        ("existence", first, ("no",)),
        ("landmark", second, ("yes",)),
        ("landmark", second, ("no",)),
    ]
    assert dataset.questions[0].text == "Is this photo taken in a hall? Please answer yes or no."
    assert dataset.groups == (first, second)
    check_pictures(dataset)


def test_one_task_of_mme(tmp_path: Path) -> None:
    root = mme(tmp_path)
    assert [item[0] for item in kinds(dataset_from_path(root / "existence"))] == ["existence"] * 2
    assert [item[0] for item in kinds(dataset_from_path(root / "landmark"))] == ["landmark"] * 2


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("only one\tYes\n", "1 questions, expected 2"),
        ("a Yes\nb\tNo\n", "line 1 is not 'question<tab>Yes'"),
        ("a\tYes\nb\tperhaps\n", "line 2 is not"),
    ],
)
def test_mme_that_is_wrong(tmp_path: Path, text: str, words: str) -> None:
    root = mme(tmp_path)
    (root / "existence" / "000000006040.txt").write_text(text, encoding="utf-8")
    with pytest.raises(UsageError) as caught:
        dataset_from_path(root)
    assert f"existence/000000006040.txt: {words}" in caught.value.message


def test_mme_without_a_picture(tmp_path: Path) -> None:
    root = mme(tmp_path)
    (root / "existence" / "000000006040.jpg").unlink()
    with pytest.raises(UsageError, match="no picture '000000006040' beside it"):
        dataset_from_path(root)


def test_formats_are_recognised(tmp_path: Path) -> None:
    annotations, questions = vqav2(tmp_path)
    one_line = tmp_path / "one.jsonl"
    one_line.write_text('{"image": "a.png", "question": "?", "answers": "x"}', encoding="utf-8")
    found = {
        "vqav2": [annotations, questions],
        "gqa": [gqa(tmp_path)],
        "textvqa": [textvqa(tmp_path)],
        "pope": [pope(tmp_path, "yes")],
        "mme": [mme(tmp_path)],
        "jsonl": [write_questions(tmp_path), one_line],
    }
    for form, paths in found.items():
        assert [format_of(path) for path in paths] == [form] * len(paths)


def test_json_that_is_a_list_or_holds_a_huge_number(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="one JSON list"):
        dataset_from_path(write_json(tmp_path / "x.json", [{"image": "a.png", "question": "?", "answers": "x"}]))
    (tmp_path / "x.json").write_text('{"data": [' + "1" * 5000 + "]}", encoding="utf-8")
    with pytest.raises(UsageError, match=r"line 1: .*5000 digits"):
        dataset_from_path(tmp_path / "x.json")
    with pytest.raises(UsageError, match="a number that cannot be read"):
        dataset_from_path(tmp_path / "x.json", "textvqa")


def test_what_no_format_fits(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no format that is known"):
        dataset_from_path(write_json(tmp_path / "x.json", {"a": 1}))
    with pytest.raises(UsageError, match="has no list 'data'"):
        dataset_from_path(write_json(tmp_path / "x.json", {"a": 1}), "textvqa")
    (tmp_path / "broken.json").write_text('{"a": 1,\n', encoding="utf-8")
    with pytest.raises(UsageError, match="is no JSON: line 2"):
        dataset_from_path(tmp_path / "broken.json", "gqa")
    with pytest.raises(UsageError, match="no folder of MME tasks"):
        dataset_from_path(tmp_path / "broken.json", "mme")
    with pytest.raises(UsageError, match="is a folder"):
        dataset_from_path(tmp_path, "jsonl")
    with pytest.raises(UsageError, match="no folder of pictures"):
        dataset_from_path(tmp_path / "x.json", images=tmp_path / "none")
    with pytest.raises(UsageError, match="--questions is for vqav2 only"):
        dataset_from_path(textvqa(tmp_path), questions=tmp_path / "x.json")
    with pytest.raises(UsageError, match="holds no question"):
        dataset_from_path(write_json(tmp_path / "x.json", {"data": []}), "textvqa")
