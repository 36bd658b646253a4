from __future__ import annotations

import base64
import json
from pathlib import Path

import pytest
from evaluation_cases import write_picture, write_questions

from holov_export.errors import UsageError
from holov_export.evaluate.data import check_pictures, dataset_from_jsonl

ROW = {"image": "a.png", "question": "what?", "answers": ["x"]}


def dataset_of(folder: Path, *rows: object):
    write_picture(folder / "a.png", 0)
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (folder / "data.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return dataset_from_jsonl(folder / "data.jsonl")


def test_what_a_line_may_hold(tmp_path: Path) -> None:
    write_picture(tmp_path / "a.png", 0)
    uri = "data:image/png;base64," + base64.b64encode((tmp_path / "a.png").read_bytes()).decode()
    dataset = dataset_of(
        tmp_path,
        ROW,
        {**ROW, "answers": "x", "kind": "k", "scene": 7, "source": ["ignored"]},
        {**ROW, "answers": ["x", 4], "group": "g", "id": 12},
        {**ROW, "image": uri},
        {**ROW, "image": uri, "question": "and?"},
    )
    one, two, three, four, five = dataset.questions
    assert (one.id, one.answers, one.kind, one.group, one.where) == ("1", ("x",), "", "a.png", "line 1")
    assert (two.answers, two.kind, two.group) == (("x",), "k", "7")
    assert (three.answers, three.group, three.id) == (("x", "4"), "g", "12")
    assert four.picture == five.picture and four.picture.read() == (tmp_path / "a.png").read_bytes()
    assert list(dataset.pictures) == ["a.png", four.picture.name]
    assert dataset.groups == ("a.png", "7", "g", four.picture.name)
    check_pictures(dataset)


def test_blank_lines_and_a_byte_order_mark_are_no_trouble(tmp_path: Path) -> None:
    write_picture(tmp_path / "a.png", 0)
    (tmp_path / "data.jsonl").write_bytes(b"\xef\xbb\xbf\r\n" + json.dumps(ROW).encode() + b"\r\n\r\n")
    assert [item.where for item in dataset_from_jsonl(tmp_path / "data.jsonl").questions] == ["line 2"]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ("{", "no JSON"),
        ("[1]", "not a JSON object"),
        ("1", "not a JSON object"),
        ('{"answers": [' + "1" * 5000 + "]}", "5000 digits"),
        ("[" * 100_000, "no JSON"),
        ({"question": "?", "answers": ["x"]}, "no 'image'"),
        ({**ROW, "question": " "}, "'question' is empty"),
        ({**ROW, "question": 3}, "'question' is no string"),
        ({**ROW, "answers": []}, "'answers' is empty"),
        ({**ROW, "answers": None}, "no 'answers'"),
        ({**ROW, "answers": [["x"]]}, "expected strings"),
        ({**ROW, "answers": [True]}, "expected strings"),
        ({**ROW, "answers": {"a": 1}}, "expected strings"),
        ({**ROW, "image": "data:image/png;base64"}, "without a comma"),
        ({**ROW, "image": "data:image/png;base64,!!"}, "does not decode"),
        ({**ROW, "image": "data:image/png;base64,AAAA"}, "is no image that can be read"),
    ],
)
def test_a_bad_line_is_named_with_its_number(tmp_path: Path, row: object, words: str) -> None:
    with pytest.raises(UsageError, match=rf"1 problem\.\n  line 2: .*{words}"):
        dataset_of(tmp_path, ROW, row, ROW)


def test_all_bad_lines_are_counted_and_the_first_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        dataset_of(tmp_path, *["{"] * 7)
    assert "7 problems" in caught.value.message
    assert "line 5" in caught.value.message and "line 6" not in caught.value.message
    assert "and 2 more" in caught.value.message


def test_null_is_what_is_left_out(tmp_path: Path) -> None:
    nothing = {"id": None, "kind": None, "group": None}
    one, two = dataset_of(tmp_path, {**ROW, **nothing}, {**ROW, **nothing, "scene": 7}).questions
    assert (one.id, one.kind, one.group) == ("1", "", "a.png")
    assert (two.id, two.kind, two.group) == ("2", "", "7")


def test_one_picture_written_in_two_ways_is_one_group(tmp_path: Path) -> None:
    dataset = dataset_of(tmp_path, ROW, {**ROW, "image": "./a.png"})
    assert dataset.groups == ("a.png",) == tuple(dataset.pictures)


@pytest.mark.parametrize("field", ["question", "answers", "id", "kind", "group", "image"])
def test_half_of_a_surrogate_pair_is_refused(tmp_path: Path, field: str) -> None:
    with pytest.raises(UsageError, match=r"1 problem\.\n  line 2: half of a surrogate pair"):
        dataset_of(tmp_path, ROW, {**ROW, field: "is there a \ud800?"})
    dataset_of(tmp_path, ROW, {**ROW, field: "\U0001f600"})


def test_an_id_twice(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"line 2: the id 'q' is that of line 1"):
        dataset_of(tmp_path, {**ROW, "id": "q"}, {**ROW, "id": "q"})


@pytest.mark.parametrize("content", [b"", b"\n\n"])
def test_no_question(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "data.jsonl").write_bytes(content)
    with pytest.raises(UsageError, match="holds no question"):
        dataset_from_jsonl(tmp_path / "data.jsonl")


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="does not exist"):
        dataset_from_jsonl(tmp_path / "none.jsonl")
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe{}")
    with pytest.raises(UsageError, match="not UTF-8"):
        dataset_from_jsonl(tmp_path / "binary.jsonl")


def test_every_missing_or_broken_picture_is_found(tmp_path: Path) -> None:
    path = write_questions(tmp_path, pictures=3)
    (tmp_path / "picture_0.png").unlink()
    (tmp_path / "picture_2.png").write_bytes(b"no picture")
    with pytest.raises(UsageError) as caught:
        check_pictures(dataset_from_jsonl(path))
    assert "2 problems" in caught.value.message
    assert "line 1: the image" in caught.value.message and "does not exist" in caught.value.message
    assert "line 5: " in caught.value.message and "is no image that can be read" in caught.value.message


def test_a_picture_whose_name_the_system_does_not_take(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"line 1: the image .* cannot be read: File name too long"):
        check_pictures(dataset_of(tmp_path, {**ROW, "image": "n" * 3000}))


def test_a_picture_that_preprocessing_would_refuse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_questions(tmp_path, pictures=2, each=1)
    (tmp_path / "picture_0.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n")
    with pytest.raises(UsageError, match=r"line 1: .* is no image that can be read"):
        check_pictures(dataset_from_jsonl(path))  # Pillow knows EPS, and would start Ghostscript
    write_picture(tmp_path / "picture_0.png", 0)
    monkeypatch.setattr("holov_export.evaluate.data.MAX_PIXELS", 3000)
    with pytest.raises(UsageError, match="too large: 56 x 56 pixels are more than 3,000"):
        check_pictures(dataset_from_jsonl(path))


def test_a_limit_keeps_the_hash_and_a_change_does_not(tmp_path: Path) -> None:
    path = write_questions(tmp_path)
    dataset = dataset_from_jsonl(path)
    assert dataset.first(None) is dataset
    first = dataset.first(2)
    assert (len(first.questions), first.total, first.sha256) == (2, 6, dataset.sha256)
    text = path.read_text(encoding="utf-8")
    for old, new in (('"one"', '"ten"'), ("shown", "drawn"), ('"kind": "a"', '"kind": "c"')):
        path.write_text(text.replace(old, new, 1), encoding="utf-8")
        assert dataset_from_jsonl(path).sha256 != dataset.sha256
    path.write_text(text, encoding="utf-8")
    assert dataset_from_jsonl(path).sha256 == dataset.sha256
