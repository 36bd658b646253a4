"""How tokens are drawn, as inputs of a request; each may be left out."""

from __future__ import annotations

from typing import Any

from holov_export.errors import UsageError
from holov_export.runtime.decoder import check_sampling
from holov_export.serve.triton.bridge import Bridge, texts_of
from holov_export.serve.triton.config_text import TensorConfig
from holov_export.tensors import SamplingSettings

STOP = "stop"
#: names are those of `SamplingSettings`
SAMPLING_INPUTS = (
    TensorConfig("max_new_tokens", "int32", (1,), optional=True),
    TensorConfig("temperature", "float32", (1,), optional=True),
    TensorConfig("top_k", "int32", (1,), optional=True),
    TensorConfig("top_p", "float32", (1,), optional=True),
    TensorConfig("seed", "int64", (1,), optional=True),
    TensorConfig(STOP, "string", (-1,), optional=True),
)


def sampling_from_request(bridge: Bridge, request: Any, longest: int) -> SamplingSettings:
    """The settings of a request; what it leaves out is as of `SamplingSettings`, greedy.

    Args:
        longest: answer that the server makes.

    Raises:
        UsageError: one is out of its range.
    """
    usual = SamplingSettings()
    stop = bridge.input(request, STOP)
    number = {
        tensor.name: None if (array := bridge.input(request, tensor.name)) is None else array.ravel()[0].item()
        for tensor in SAMPLING_INPUTS
        if tensor.name != STOP
    }
    settings = SamplingSettings(
        max_new_tokens=_or(number["max_new_tokens"], min(usual.max_new_tokens, longest)),
        temperature=_or(number["temperature"], usual.temperature),
        top_k=_or(number["top_k"], usual.top_k),
        top_p=_or(number["top_p"], usual.top_p),
        seed=number["seed"],
        stop=() if stop is None else tuple(texts_of(stop)),
    )
    check_sampling(settings)
    if settings.max_new_tokens > longest:
        raise UsageError(f"max_new_tokens is {settings.max_new_tokens}, this server makes at most {longest}.")
    return settings


def _or(value: Any, usual: Any) -> Any:
    return usual if value is None else value
