"""Streaming text: pieces join to what the tokenizer decodes, characters stay whole, stop strings are found."""

from __future__ import annotations

import pytest
from checkpoints import byte_level_tokenizer, llama_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from holov_export.runtime.text_stream import TextStream

TOKENIZERS = {"llama": llama_tokenizer(), "byte-level": byte_level_tokenizer()}
EACH = pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS.keys())
LETTERS = st.one_of(st.sampled_from("the red one is 7 é🦕日\n  "), st.characters(exclude_categories=["Cs"]))


def pieces_of(tokenizer: Tokenizer, text: str, stop: tuple[str, ...] = ()) -> tuple[list[str], TextStream]:
    stream = TextStream(tokenizer, stop)
    pieces = [stream.push(token) for token in tokenizer.encode(text, add_special_tokens=False).ids]
    return [*pieces, stream.finish()], stream


@EACH
@settings(max_examples=150, deadline=None)
@given(text=st.text(alphabet=LETTERS))
def test_pieces_join_to_the_decoded_text(tokenizer: Tokenizer, text: str) -> None:
    pieces, _ = pieces_of(tokenizer, text)
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=True)


@EACH
def test_characters_stay_whole(tokenizer: Tokenizer) -> None:
    text = "a 🦕 and 日本 ok"
    pieces, _ = pieces_of(tokenizer, text)
    assert "".join(pieces) == text
    assert not any("�" in piece for piece in pieces)
    assert len([piece for piece in pieces if piece]) > 5, "it does stream"


@EACH
def test_spaces_survive(tokenizer: Tokenizer) -> None:
    pieces, _ = pieces_of(tokenizer, "the red one  is left")
    assert "".join(pieces) == "the red one  is left"


@EACH
def test_special_tokens_are_silent(tokenizer: Tokenizer) -> None:
    stream = TextStream(tokenizer)
    words = tokenizer.encode("the red one", add_special_tokens=False).ids
    ids = [4, *words[:3], 4, 3, *words[3:], 2]
    assert "".join([*map(stream.push, ids), stream.finish()]) == "the red one"


@EACH
def test_ids_outside_the_tokenizer_are_silent(tokenizer: Tokenizer) -> None:
    stream = TextStream(tokenizer)
    assert stream.push(415) + stream.finish() == ""


def test_bytes_that_never_become_a_character() -> None:
    tokenizer = TOKENIZERS["llama"]
    stream = TextStream(tokenizer)
    ids = [tokenizer.token_to_id(name) for name in ("<0xE2>", "<0x82>")]
    assert [stream.push(token) for token in ids] == ["", ""]
    assert stream.finish() == "��"


@EACH
@pytest.mark.parametrize(
    ("text", "stop", "wanted"),
    [
        ("the red one is left", ("one",), "the red "),
        ("the red one is left", ("d on",), "the re"),
        ("the red one is left", ("left", "red"), "the "),
        ("the red one is left", ("the",), ""),
        ("the red one is left", ("left of",), "the red one is left"),
        ("aaab the", ("aab",), "a"),
        ("ab🦕cd", ("🦕",), "ab"),
        ("one\n\ntwo", ("\n\n",), "one"),
    ],
)
def test_stop_strings(tokenizer: Tokenizer, text: str, stop: tuple[str, ...], wanted: str) -> None:
    pieces, stream = pieces_of(tokenizer, text, stop)
    assert "".join(pieces) == wanted
    assert stream.stopped == (wanted != text)
    assert stream.push(50) == "" or not stream.stopped


@EACH
@settings(max_examples=80, deadline=None)
@given(text=st.text(alphabet="ab ", min_size=1, max_size=14), stop=st.text(alphabet="ab ", min_size=1, max_size=4))
def test_stop_string_cuts_where_find_finds_it(tokenizer: Tokenizer, text: str, stop: str) -> None:
    pieces, _ = pieces_of(tokenizer, text, (stop,))
    whole = tokenizer.decode(tokenizer.encode(text, add_special_tokens=False).ids)
    assert "".join(pieces) == whole.split(stop)[0]
