from __future__ import annotations

import pytest

from holov_export.evaluate.answer_text import plain, vqa_normal, yes_or_no


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("  Two   Dogs. ", "two dogs"),
        ("\u201ctwo\u201d", "\u201ctwo\u201d"),
        ('"Two"', "two"),
        ("\uff14", "4"),
        ("STRASSE", "strasse"),
        ("stra\u00dfe", "strasse"),
        ("a dog", "a dog"),
        ("4.5", "4.5"),
        ("...", ""),
        ("", ""),
    ],
)
def test_plain(text: str, expected: str) -> None:
    assert plain(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The two dogs.", "2 dogs"),
        ("a cat, a dog", "cat dog"),  # a comma beside a space goes
        ("black/white", "black white"),  # punctuation between letters becomes a space
        ("1,000", "1000"),  # a comma in a number goes, and so does all other punctuation
        ("1,000-2", "10002"),
        ("3.5", "3.5"),
        ("yes.", "yes"),
        ("U.S.A.", "usa"),
        ("none", "0"),
        ("Ten", "10"),
        ("eleven", "eleven"),
        ("dont", "don't"),
        ("couldntve", "couldn't've"),
        ("couldn'tve", "couldn't've"),
        ("it\u2019s", "it's"),
        ("well", "well"),
        ("were", "were"),
        ("a\tb\nc", "b c"),
        ("what?!", "what"),
        ("the", ""),
    ],
)
def test_vqa_normal(text: str, expected: str) -> None:
    assert vqa_normal(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Yes", True),
        ("yes, there is no doubt", True),
        ("No.", False),
        ("there are no dogs, yes", False),
        ("nobody knows, not me", None),
        ("yesterday", None),
        ("", None),
        ("**YES**", True),
        ("_no_", False),
    ],
)
def test_the_first_yes_or_no_decides(text: str, expected: bool | None) -> None:
    assert yes_or_no(text) is expected
