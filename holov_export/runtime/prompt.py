"""A question becomes the text that the model was trained on, through the model's own chat template.

Source of the environment: transformers 5.23 utils/chat_template_utils.py, so that templates from the hub behave alike.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime
from functools import lru_cache
from typing import Any

from holov_export.errors import PromptError
from holov_export.extras import require
from holov_export.spec import PromptSpec

Message = dict[str, Any]


def prompt_from_question(
    question: str, spec: PromptSpec, *, images: int = 1, special_tokens: Mapping[str, str] | None = None
) -> str:
    """The rendered prompt of one user turn, ending where the answer begins.

    Args:
        question: the user's words. Where it contains the image placeholder, the images go there; else the template
            puts them where it wants them.
        spec: the model's chat template and placeholder.
        images: how many there are.
        special_tokens: "bos_token", "eos_token", ... as templates of other models read them.

    Returns:
        Text with exactly one placeholder for each image.

    Raises:
        PromptError: an empty question, another number of placeholders than images, or a template that fails.
    """
    placed = question.count(spec.image_placeholder)
    if not question.replace(spec.image_placeholder, "").strip():
        raise PromptError("the question is empty.")
    if placed:
        check_placeholders(placed, images, spec.image_placeholder)
    parts: list[Message] = [{"type": "image"}] * (0 if placed else images)
    parts.append({"type": "text", "text": question})
    text = _rendered([{"role": "user", "content": parts}], spec, special_tokens or {})
    if text.count(spec.image_placeholder) != images:
        # templates older than content lists take a string and know nothing of images
        lines = f"{spec.image_placeholder}\n" * (0 if placed else images)
        text = _rendered([{"role": "user", "content": lines + question}], spec, special_tokens or {})
    check_placeholders(text.count(spec.image_placeholder), images, spec.image_placeholder)
    return text


def check_placeholders(placeholders: int, images: int, placeholder: str) -> None:
    """Refuse a prompt whose placeholders are not as many as its images.

    Raises:
        PromptError: names both numbers.
    """
    if placeholders == images:
        return
    have = f"{images} image{'' if images == 1 else 's'}"
    if placeholders == 0:
        raise PromptError(f"the prompt has no placeholder for {have}.", hint=f"Write {placeholder} where it belongs.")
    raise PromptError(
        f"the prompt has {placeholders} placeholder{'' if placeholders == 1 else 's'} and {have}.",
        hint=f"Write {placeholder} once for each image.",
    )


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
