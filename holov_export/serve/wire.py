"""Requests as the OpenAI API has them, read strictly: what this server cannot do is refused by name.

Source of names and ranges: openai-python 2 types/chat/completion_create_params.py. `top_k`, `budget`, `kept` and
`spread` are additions.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, JsonValue, Tag, ValidationError

from holov_export.runtime.packing import Spread
from holov_export.serve.faults import FaultError, refused
from holov_export.serve.limits import Limits
from holov_export.tensors import SamplingSettings

#: objects, lists and their members in one body, beside the commas of its texts: JSON of a few megabytes can be objects
#: of a few gigabytes
_MAX_VALUES = 100_000
_MAX_MESSAGES, _MAX_PARTS = 1000, 1000
#: tags that unions put into the place of an error
_TAGS = frozenset({"words", "parts"})
_DEFAULT_NEW_TOKENS = 256


class _Wire(BaseModel):
    """What a client sends: immutable; fields that are not known are left alone, as clients have many."""

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True, allow_inf_nan=False)


class MediaUrl(_Wire):
    """Where an image or a clip is. `detail` is read and has no effect: `budget` says how many tokens it gets."""

    url: str
    detail: Literal["auto", "low", "high"] | None = None


class TextPart(_Wire):
    """Words."""

    type: Literal["text"]
    text: str


class ImagePart(_Wire):
    """An image."""

    type: Literal["image_url"]
    image_url: MediaUrl


class VideoPart(_Wire):
    """A clip, as vLLM's server takes it; the OpenAI API has none."""

    type: Literal["video_url"]
    video_url: MediaUrl


Part = Annotated[TextPart | ImagePart | VideoPart, Field(discriminator="type")]


def _kind_of_content(value: Any) -> str:
    return "words" if isinstance(value, str) else "parts"


Content = Annotated[
    Annotated[str, Tag("words")]
    | Annotated[tuple[Part, ...], Field(min_length=1, max_length=_MAX_PARTS), Tag("parts")],
    Discriminator(_kind_of_content),
]


class Message(_Wire):
    """One turn. `developer` is the newer name of `system`."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Content
    tool_calls: JsonValue = None

    @property
    def parts(self) -> tuple[TextPart | ImagePart | VideoPart, ...]:
        """The content, a string as a single part."""
        return (TextPart(type="text", text=self.content),) if isinstance(self.content, str) else self.content


class StreamOptions(_Wire):
    """Attributes: include_usage: a further event at the end has the usage."""

    include_usage: bool = False


class _Neutral(_Wire):
    """Fields for what this server cannot do. They may be sent as long as they ask for nothing: see `_ASKS_NOTHING`."""

    n: JsonValue = None
    tools: JsonValue = None
    tool_choice: JsonValue = None
    functions: JsonValue = None
    function_call: JsonValue = None
    response_format: JsonValue = None
    logprobs: JsonValue = None
    top_logprobs: JsonValue = None
    logit_bias: JsonValue = None
    presence_penalty: JsonValue = None
    frequency_penalty: JsonValue = None
    repetition_penalty: JsonValue = None
    min_p: JsonValue = None
    audio: JsonValue = None
    modalities: JsonValue = None
    prediction: JsonValue = None
    web_search_options: JsonValue = None


#: besides null, which every field may be
_ASKS_NOTHING: dict[str, tuple[JsonValue, ...]] = {
    "n": (1,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "logit_bias": ({},),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "repetition_penalty": (1,),
    "min_p": (0,),
    "modalities": (["text"],),
}


class ChatRequest(_Neutral):
    """Body of POST /v1/chat/completions.

    Attributes:
        top_k: sample among so many tokens; 0 and -1 are all.
        budget: tokens of each image and clip; None leaves it to the server.
        kept: the answer says where the kept tokens are.
        spread: how the budget of a clip is spent, see `Session.ask`.
    """

    model: str
    messages: Annotated[tuple[Message, ...], Field(min_length=1, max_length=_MAX_MESSAGES)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    seed: int | None = None
    stop: str | Annotated[tuple[str, ...], Field(max_length=4)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    budget: Annotated[int, Field(ge=1)] | None = None
    kept: bool = False
    spread: Spread = "frames"


def _check_features(request: ChatRequest) -> None:
    """Refuse what is asked for and not there; silence would look like an answer to it."""
    for name in _Neutral.model_fields:
        value, harmless = getattr(request, name), _ASKS_NOTHING.get(name, ())
        if value is not None and value not in harmless:
            only = " or ".join(json.dumps(item) for item in harmless)
            hint = f"Leave it out{f' or send {only}' if only else ''}."
            raise refused(f"this server cannot do '{name}'. {hint}", param=name, code="unsupported_parameter")


def request_from_body(body: bytes, limits: Limits) -> ChatRequest:
    """Read a request.

    Raises:
        FaultError: 400, naming the field; 413 for more values than a request can need.
    """
    if sum(body.count(sign) for sign in (b",", b"[", b"{")) > _MAX_VALUES + limits.prompt_characters:
        raise refused("the body has too many values.", code="request_too_large", status=413)
    try:
        request = ChatRequest.model_validate_json(body)
    except ValidationError as error:
        raise _fault_from_validation(error) from None
    _check_features(request)
    _check_texts(request, limits)
    return request


def _fault_from_validation(error: ValidationError) -> FaultError:
    """The first thing that is wrong; what was sent is not repeated, it may be an image."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    if first["type"] == "json_invalid":
        return refused(f"the body is no JSON: {first['msg'].removeprefix('Invalid JSON: ')}.", code="invalid_json")
    place: list[str] = []
    for step in first["loc"]:
        if step not in _TAGS and (not place or place[-1] != str(step)):
            place.append(str(step))
    where = ".".join(place)
    return refused(f"{where or 'the body'}: {first['msg']}.", param=where or None, code="invalid_value")


def _check_texts(request: ChatRequest, limits: Limits) -> None:
    """Refuse what only all messages together show."""
    characters = 0
    for index, message in enumerate(request.messages):
        if message.tool_calls is not None:
            where = f"messages.{index}.tool_calls"
            raise refused("this server has no tools.", param=where, code="unsupported_parameter")
        for number, part in enumerate(message.parts):
            if isinstance(part, TextPart):
                characters += len(part.text)
            elif message.role != "user":
                where = f"messages.{index}.content.{number}"
                raise refused("only messages of the user have images and clips.", param=where, code="invalid_value")
    if characters > limits.prompt_characters:
        raise refused(
            f"the messages have {characters:,} characters, more than {limits.prompt_characters:,}.",
            param="messages",
            code="prompt_too_long",
        )


def sampling_from_request(request: ChatRequest, limits: Limits) -> SamplingSettings:
    """How tokens are drawn: greedy unless a temperature is named.

    Raises:
        FaultError: a longer answer than this server makes, or two lengths.
    """
    lengths = {"max_completion_tokens": request.max_completion_tokens, "max_tokens": request.max_tokens}
    given = {name: value for name, value in lengths.items() if value is not None}
    if len(set(given.values())) > 1:
        raise refused("max_tokens and max_completion_tokens differ; name one.", param="max_tokens")
    for name, value in given.items():
        if value > limits.new_tokens:
            raise refused(f"{name} is {value}, this server makes {limits.new_tokens} at most.", param=name)
    new_tokens = next(iter(given.values()), min(_DEFAULT_NEW_TOKENS, limits.new_tokens))
    stop = (request.stop,) if isinstance(request.stop, str) else request.stop or ()
    if "" in stop:
        raise refused("a stop string is empty.", param="stop", code="invalid_value")
    return SamplingSettings(
        max_new_tokens=new_tokens,
        temperature=request.temperature or 0.0,
        top_k=max(0, request.top_k or 0),
        top_p=1.0 if request.top_p is None else request.top_p,
        # clients send seeds of 64 bits, the decoders take 31
        seed=None if request.seed is None else request.seed % 2**31,
        stop=stop,
    )
