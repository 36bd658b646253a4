"""A question becomes the text that the model was trained on, through the model's own chat template.

Source of the environment: transformers 5.23 utils/chat_template_utils.py, so that templates from the hub behave alike.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from typing import Any, Literal, NamedTuple, NoReturn

from holov_export.errors import PromptError
from holov_export.extras import require
from holov_export.spec import PromptSpec

Message = dict[str, Any]


@dataclass(frozen=True)
class MediaCount:
    """How many images and videos there are, or placeholders of them."""

    images: int = 0
    videos: int = 0


class TurnPart(NamedTuple):
    """A piece of a turn: words, or the place of an image or a video."""

    kind: Literal["text", "image", "video"]
    text: str = ""


@dataclass(frozen=True)
class Turn:
    """What one side says in a conversation."""

    role: Literal["system", "user", "assistant"]
    parts: tuple[TurnPart, ...]

    @property
    def words(self) -> str:
        return "\n".join(part.text for part in self.parts if part.kind == "text")

    def count(self, kind: Literal["image", "video"]) -> int:
        """How many of its parts are images, or videos."""
        return sum(part.kind == kind for part in self.parts)


def prompt_from_turns(
    turns: Sequence[Turn], spec: PromptSpec, *, special_tokens: Mapping[str, str] | None = None
) -> str:
    """The rendered prompt of a conversation, ending where the next answer begins.

    Returns:
        Text with exactly one placeholder for each image and each video of the turns, in their order.

    Raises:
        PromptError: the last turn is not the user's or has no words, words contain a placeholder, or a template fails.
    """
    if not turns or turns[-1].role != "user":
        raise PromptError("a conversation ends with the user's turn.")
    if not turns[-1].words.strip():
        raise PromptError("the question is empty.")
    for turn in turns:
        if placeholders_in_text(turn.words, spec) != MediaCount():
            names = " or ".join(_placeholders(spec))
            raise PromptError(f"the words of a message contain {names}.", hint="Images and videos are parts.")
    given = MediaCount(sum(turn.count("image") for turn in turns), sum(turn.count("video") for turn in turns))
    tokens = special_tokens or {}
    text = _rendered([{"role": turn.role, "content": _content(turn)} for turn in turns], spec, tokens)
    if placeholders_in_text(text, spec) != given:
        # templates older than content lists take a string and know nothing of images
        text = _rendered([{"role": turn.role, "content": _plain(turn, spec)} for turn in turns], spec, tokens)
    check_placeholders(placeholders_in_text(text, spec), given, spec)
    return text


def _content(turn: Turn) -> list[Message]:
    return [{"type": "text", "text": part.text} if part.kind == "text" else {"type": part.kind} for part in turn.parts]


def _plain(turn: Turn, spec: PromptSpec) -> str:
    names = {"image": spec.image_placeholder, "video": spec.video_placeholder}
    return "\n".join(part.text if part.kind == "text" else names[part.kind] for part in turn.parts)


def prompt_from_question(
    question: str,
    spec: PromptSpec,
    *,
    images: int = 1,
    videos: int = 0,
    special_tokens: Mapping[str, str] | None = None,
) -> str:
    """The rendered prompt of one user turn, ending where the answer begins.

    Args:
        question: the user's words. Where it contains placeholders, the images or videos go there; else the template
            puts them where it wants them, images first.
        spec: the model's chat template and placeholders.
        images, videos: how many there are.
        special_tokens: "bos_token", "eos_token", ... as templates of other models read them.

    Returns:
        Text with exactly one placeholder for each image and each video.

    Raises:
        PromptError: an empty question, another number of placeholders than images or videos, or a template that fails.
    """
    names, given = _placeholders(spec), MediaCount(images, videos)
    placed = placeholders_in_text(question, spec)
    words = question
    for name in names:
        words = words.replace(name, "")
    if not words.strip():
        raise PromptError("the question is empty.")
    asked = MediaCount(images if placed.images else 0, videos if placed.videos else 0)
    if placed != asked:
        check_placeholders(placed, given, spec)
    left = MediaCount(images - asked.images, videos - asked.videos)
    tokens = special_tokens or {}
    if placed.images or placed.videos:
        question = _framed(question, spec, tokens)
    parts: list[Message] = [{"type": "image"}] * left.images + [{"type": "video"}] * left.videos
    parts.append({"type": "text", "text": question})
    text = _rendered([{"role": "user", "content": parts}], spec, tokens)
    if placeholders_in_text(text, spec) != given:
        # templates older than content lists take a string and know nothing of images
        lines = f"{spec.image_placeholder}\n" * left.images + f"{spec.video_placeholder}\n" * left.videos
        text = _rendered([{"role": "user", "content": lines + question}], spec, tokens)
    check_placeholders(placeholders_in_text(text, spec), given, spec)
    return text


def _placeholders(spec: PromptSpec) -> tuple[str, ...]:
    return tuple(name for name in (spec.image_placeholder, spec.video_placeholder) if name)


def placeholders_in_text(text: str, spec: PromptSpec) -> MediaCount:
    """How many placeholders of either kind a text has."""
    videos = text.count(spec.video_placeholder) if spec.video_placeholder else 0
    return MediaCount(text.count(spec.image_placeholder), videos)


def _framed(question: str, spec: PromptSpec, special_tokens: Mapping[str, str]) -> str:
    """The question with the words around its placeholders that the template puts around those of parts.

    Qwen2.5-VL has <|vision_start|> and <|vision_end|> there. A template that moves images to the front has none.
    """
    for kind, name in (("image", spec.image_placeholder), ("video", spec.video_placeholder)):
        if not name or name not in question:
            continue
        parts: list[Message] = [{"type": "text", "text": "[["}, {"type": kind}, {"type": "text", "text": "]]"}]
        found = re.search(
            rf"\[\[(.*?){re.escape(name)}(.*?)\]\]",
            _rendered([{"role": "user", "content": parts}], spec, special_tokens),
            flags=re.DOTALL,
        )
        before, after = (found[1].strip(), found[2].strip()) if found else ("", "")
        pieces = question.split(name)
        for index in range(len(pieces) - 1):
            if not pieces[index].endswith(before):
                pieces[index] += before
            if not pieces[index + 1].startswith(after):
                pieces[index + 1] = after + pieces[index + 1]
        question = name.join(pieces)
    return question


def check_placeholders(found: MediaCount, given: MediaCount, spec: PromptSpec) -> None:
    """Refuse a prompt whose placeholders are not as many as its images and its videos.

    Args:
        found: placeholders. given: images and videos.

    Raises:
        PromptError: says what is there and what is needed.
    """
    if found == given:
        return
    if given.videos and not spec.video_placeholder:
        raise PromptError(
            f"the prompt comes with {_counted(given.videos, 'video')}, and this model takes none.",
            hint="Give single frames as images.",
        )
    if (found.images or given.images) and (found.videos or given.videos):
        raise PromptError(
            f"the prompt has {found.images} {spec.image_placeholder} and {found.videos} {spec.video_placeholder}, and "
            f"it comes with {_counted(given.images, 'image')} and {_counted(given.videos, 'video')}.",
            hint=f"Write {spec.image_placeholder} once for each image and {spec.video_placeholder} for each video.",
        )
    if found.videos != given.videos:
        _refuse(found.videos, _counted(given.videos, "video"), spec.video_placeholder, "video")
    _refuse(found.images, _counted(given.images, "image"), spec.image_placeholder, "image")


def _refuse(placeholders: int, have: str, placeholder: str, noun: str) -> NoReturn:
    if placeholders == 0:
        raise PromptError(f"the prompt has no placeholder for {have}.", hint=f"Write {placeholder} where it belongs.")
    raise PromptError(
        f"the prompt has {_counted(placeholders, 'placeholder')} and {have}.",
        hint=f"Write {placeholder} once for each {noun}.",
    )


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _rendered(messages: list[Message], spec: PromptSpec, special_tokens: Mapping[str, str]) -> str:
    require("jinja2")
    import jinja2

    try:
        template = _compiled(spec.chat_template)
        return str(template.render(messages=messages, add_generation_prompt=True, **special_tokens))
    except jinja2.TemplateError as error:
        raise PromptError(f"the model's chat template failed: {error}") from error


@lru_cache(maxsize=16)
def _compiled(chat_template: str) -> Any:
    """The template in a sandbox: it comes from the hub, from a stranger."""
    import jinja2
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}` marks the assistant's words for training; here it only must not be an error."""

        tags = frozenset({"generation"})  # type: ignore[assignment]

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(value: object, ensure_ascii: bool = False, indent: int | None = None, sort_keys: bool = False) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = tojson  # jinja's own escapes for HTML
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda pattern: datetime.now().strftime(pattern)
    return environment.from_string(chat_template)
