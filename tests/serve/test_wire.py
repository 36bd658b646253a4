"""Requests are read as the OpenAI API means them; what is wrong or missing here is refused by name."""

from __future__ import annotations

import json
from typing import Any

import pytest
from http_cases import image_part

from holov_export.errors import (
    BudgetError,
    BundleError,
    BusyError,
    EngineError,
    ImageError,
    LateError,
    MissingExtraError,
    NetworkError,
    PromptError,
    UsageError,
)
from holov_export.serve.faults import FaultError, fault_from_error, response_from_fault
from holov_export.serve.limits import Limits
from holov_export.serve.wire import ChatRequest, request_from_body, sampling_from_request
from holov_export.tensors import SamplingSettings

LIMITS = Limits(new_tokens=100, prompt_characters=1000)


def read(**fields: Any) -> ChatRequest:
    body = {"model": "m", "messages": [{"role": "user", "content": "hi"}], **fields}
    return request_from_body(json.dumps(body).encode(), LIMITS)


def fault_of(**fields: Any) -> tuple[int, str, str | None, str | None]:
    with pytest.raises(FaultError) as caught:
        sampling_from_request(read(**fields), LIMITS)
    fault = caught.value.fault
    return fault.status, fault.message, fault.param, fault.code


def test_words_and_parts_are_the_same() -> None:
    first = read(messages=[{"role": "user", "content": "hi"}])
    second = read(messages=[{"role": "user", "content": [{"type": "text", "text": "hi"}]}])
    assert first.messages[0].parts == second.messages[0].parts


def test_a_conversation_with_images() -> None:
    request = read(
        messages=[
            {"role": "developer", "content": "be short"},
            {"role": "user", "content": [image_part("data:x"), {"type": "text", "text": "a?"}], "name": "bob"},
            {"role": "assistant", "content": "b", "refusal": None, "tool_calls": None},
            {"role": "user", "content": [{"type": "video_url", "video_url": {"url": "file:///v"}}]},
        ]
    )
    assert [message.role for message in request.messages] == ["developer", "user", "assistant", "user"]
    assert [part.type for message in request.messages for part in message.parts] == [
        *("text", "image_url", "text", "text", "video_url")
    ]


def test_what_clients_send_along_is_left_alone() -> None:
    request = read(
        user="u", metadata={"a": "b"}, store=False, service_tier="auto", n=1, tools=[], tool_choice="auto",
        response_format={"type": "text"}, logprobs=False, presence_penalty=0.0, logit_bias={}, modalities=["text"],
        audio=None, stream_options=None,
    )  # fmt: skip
    assert sampling_from_request(request, LIMITS) == SamplingSettings(max_new_tokens=100)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("n", 2),
        ("tools", [{"type": "function", "function": {"name": "f"}}]),
        ("tool_choice", "required"),
        ("functions", [{"name": "f"}]),
        ("response_format", {"type": "json_schema", "json_schema": {"name": "s"}}),
        ("response_format", {"type": "json_object"}),
        ("logprobs", True),
        ("top_logprobs", 3),
        ("logit_bias", {"5": -100}),
        ("presence_penalty", 0.5),
        ("frequency_penalty", -1),
        ("min_p", 0.1),
        ("repetition_penalty", 1.1),
        ("audio", {"voice": "alloy", "format": "wav"}),
        ("modalities", ["text", "audio"]),
        ("prediction", {"type": "content", "content": "x"}),
        ("web_search_options", {}),
    ],
)
def test_what_is_not_there_is_refused_by_name(name: str, value: Any) -> None:
    status, message, param, code = fault_of(**{name: value})
    assert (status, param, code) == (400, name, "unsupported_parameter")
    assert f"'{name}'" in message


def test_tool_calls_of_earlier_turns_are_refused() -> None:
    turn = {"role": "assistant", "content": "x", "tool_calls": [{"id": "1"}]}
    status, message, param, _ = fault_of(messages=[{"role": "user", "content": "a"}, turn])
    assert (status, param) == (400, "messages.1.tool_calls")
    assert "tools" in message


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": [{"role": "robot", "content": "hi"}]}, "messages.0.role"),
        ({"messages": [{"role": "user"}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": []}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]}, "messages.0.content.0"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages.0.content.0.text"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "data:x"}]}]},
            "messages.0.content.0.image_url",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": 7}}]}]},
            "messages.0.content.0.image_url.url",
        ),
        ({"messages": [{"role": "system", "content": [image_part("data:x")]}]}, "messages.0.content.0"),
        ({"model": None}, "model"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": "5"}, "max_tokens"),
        ({"max_tokens": 101}, "max_tokens"),
        ({"max_completion_tokens": 101}, "max_completion_tokens"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens"),
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"seed": 1.5}, "seed"),
        ({"stop": list("abcde")}, "stop.parts"),
        ({"stop": ["a", ""]}, "stop"),
        ({"stream": "yes"}, "stream"),
        ({"budget": 0}, "budget"),
        ({"budget": 1.5}, "budget"),
        ({"kept": 1}, "kept"),
        ({"spread": "wide"}, "spread"),
    ],
)
def test_a_wrong_value_is_refused_with_its_place(fields: dict[str, Any], param: str) -> None:
    status, message, found, code = fault_of(**fields)
    assert status == 400
    assert message
    assert code in ("invalid_value", None)
    assert found is not None
    assert found == param or (param == "stop.parts" and found.startswith("stop"))


def test_an_image_is_not_repeated_in_a_message() -> None:
    _, message, _, _ = fault_of(messages=[{"role": "user", "content": {"url": "A" * 5000}}])
    assert len(message) < 300


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"", "invalid_json"),
        (b"{", "invalid_json"),
        (b'{"model": "\xff"}', "invalid_json"),
        (b'{"model": "\\ud800"}', "invalid_json"),
        (b"[" * 5000 + b"]" * 5000, "invalid_json"),
        (b'{"temperature": NaN}', "invalid_value"),
        (b"[]", "invalid_value"),
        (b"null", "invalid_value"),
    ],
)
def test_a_body_that_is_no_request(body: bytes, code: str) -> None:
    with pytest.raises(FaultError) as caught:
        request_from_body(body, LIMITS)
    assert (caught.value.fault.status, caught.value.fault.code) == (400, code)


def test_a_body_of_too_many_values_is_refused_before_it_is_read() -> None:
    with pytest.raises(FaultError) as caught:
        request_from_body(b'{"messages": [' + b"{}," * 200_000 + b"{}]}", LIMITS)
    assert caught.value.fault.status == 413


def test_a_long_prompt_is_refused() -> None:
    status, message, param, code = fault_of(messages=[{"role": "user", "content": "x" * 600}] * 2)
    assert (status, param, code) == (400, "messages", "prompt_too_long")
    assert "1,200" in message


def test_how_tokens_are_drawn() -> None:
    request = read(max_completion_tokens=5, temperature=0.5, top_p=0.9, top_k=-1, seed=2**40 + 3, stop="x")
    assert sampling_from_request(request, LIMITS) == SamplingSettings(5, 0.5, 0, 0.9, 3, ("x",))
    assert sampling_from_request(read(max_tokens=5, max_completion_tokens=5), LIMITS).max_new_tokens == 5
    assert sampling_from_request(read(), Limits(new_tokens=1000)).max_new_tokens == 256
    assert sampling_from_request(read(seed=-1), LIMITS).seed == 2**31 - 1


@pytest.mark.parametrize(
    ("error", "status", "kind"),
    [
        (UsageError("u"), 400, "invalid_request_error"),
        (ImageError("u"), 400, "invalid_request_error"),
        (BudgetError("u"), 400, "invalid_request_error"),
        (PromptError("u"), 400, "invalid_request_error"),
        (BusyError("u", retry_after=2.2), 429, "rate_limit_error"),
        (LateError("u"), 503, "server_error"),
        (MissingExtraError("u"), 501, "server_error"),
        (NetworkError("u"), 503, "server_error"),
        (BundleError("u"), 500, "server_error"),
        (EngineError("u"), 500, "server_error"),
        (ValueError("u"), 500, "server_error"),
    ],
)
def test_errors_become_the_right_status(error: Exception, status: int, kind: str) -> None:
    response = response_from_fault(fault_from_error(error))
    body = json.loads(bytes(response.body))["error"]
    assert response.status_code == status
    assert body["type"] == kind
    assert set(body) == {"message", "type", "param", "code"}
    assert (response.headers.get("retry-after") == "3") == (status == 429)


def test_internal_errors_are_not_told() -> None:
    fault = fault_from_error(RuntimeError("secret /path"))
    assert "secret" not in fault.message


def test_a_full_queue_while_shutting_down_is_503() -> None:
    assert fault_from_error(BusyError("u", retry_after=1), draining=True).status == 503
