"""Conversations become prompts as transformers renders them."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoProcessor

from holov_export.errors import PromptError
from holov_export.runtime.prompt import Turn, TurnPart, prompt_from_question, prompt_from_turns
from holov_export.spec import ModelSpec, PromptSpec

IMAGE = TurnPart("image")


def said(text: str) -> TurnPart:
    return TurnPart("text", text)


CONVERSATIONS = [
    (Turn("user", (IMAGE, said("what is this?"))),),
    (Turn("user", (said("compare"), IMAGE, said("with"), IMAGE)),),
    (
        Turn("system", (said("answer in one word"),)),
        Turn("user", (IMAGE, said("what is this?"))),
        Turn("assistant", (said("a cat"),)),
        Turn("user", (said("and what is this?"), IMAGE)),
    ),
    (Turn("user", (said("hello"),)),),
]


@pytest.mark.parametrize("turns", CONVERSATIONS, ids=["question", "two images", "four turns", "words"])
def test_it_is_what_transformers_renders(
    turns: tuple[Turn, ...], llava_checkpoint: Path, llava_spec: ModelSpec
) -> None:
    processor = AutoProcessor.from_pretrained(llava_checkpoint)
    messages = [
        {
            "role": turn.role,
            "content": [
                {"type": "text", "text": part.text} if part.kind == "text" else {"type": "image"} for part in turn.parts
            ],
        }
        for turn in turns
    ]
    expected = processor.apply_chat_template(messages, add_generation_prompt=True)
    assert prompt_from_turns(turns, llava_spec.prompt) == expected


def test_one_turn_is_a_question(llava_spec: ModelSpec) -> None:
    turn = Turn("user", (IMAGE, IMAGE, said("what is this?")))
    assert prompt_from_turns([turn], llava_spec.prompt) == prompt_from_question(
        "what is this?", llava_spec.prompt, images=2
    )


def test_a_template_that_knows_no_parts_gets_placeholders() -> None:
    spec = PromptSpec(chat_template="{% for m in messages %}[{{ m.role }}: {{ m.content }}]{% endfor %}>")
    turns = (
        Turn("user", (IMAGE, said("one"))),
        Turn("assistant", (said("two"),)),
        Turn("user", (said("three"), IMAGE)),
    )
    assert prompt_from_turns(turns, spec) == "[user: <image>\none][assistant: two][user: three\n<image>]>"


@pytest.mark.parametrize(
    ("turns", "why"),
    [
        ((), "ends with the user's turn"),
        ((Turn("user", (said("a"),)), Turn("assistant", (said("b"),))), "ends with the user's turn"),
        ((Turn("user", (IMAGE, said(" "))),), "question is empty"),
        ((Turn("user", (IMAGE, said("see <image>"))),), "words of a message contain <image>"),
        ((Turn("system", (said("<image>"),)), Turn("user", (said("a"),))), "words of a message contain <image>"),
    ],
)
def test_refusals(turns: tuple[Turn, ...], why: str, llava_spec: ModelSpec) -> None:
    with pytest.raises(PromptError, match=why):
        prompt_from_turns(turns, llava_spec.prompt)


def test_a_picture_that_the_template_loses_is_an_error() -> None:
    spec = PromptSpec(chat_template="{{ messages[-1].content if messages[-1].content is string else '' }}")
    turns = (Turn("user", (IMAGE, said("one"))), Turn("user", (said("two"),)))
    with pytest.raises(PromptError, match="placeholder"):
        prompt_from_turns(turns, spec)
