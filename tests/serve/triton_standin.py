"""What the models use of `triton_python_backend_utils`, in this process.

The names are those of the module that Triton 2.51 brings; scripts/check_triton runs the models in the real one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from holov_export.serve.triton.settings import ModelSettings

TRITONSERVER_RESPONSE_COMPLETE_FINAL = 1


class Tensor:
    """A named array."""

    def __init__(self, name: str, array: np.ndarray) -> None:
        self._name, self._array = name, array

    @classmethod
    def from_dlpack(cls, name: str, array: np.ndarray) -> Tensor:
        return cls(name, np.from_dlpack(array))

    def name(self) -> str:
        return self._name

    def as_numpy(self) -> np.ndarray:
        return self._array

    def __dlpack__(self, **given: Any) -> Any:
        return self._array.__dlpack__(**given)

    def __dlpack_device__(self) -> Any:
        return self._array.__dlpack_device__()


class TritonError:
    INTERNAL, INVALID_ARG, UNAVAILABLE = 1, 3, 4

    def __init__(self, message: str, code: int = INTERNAL) -> None:
        self._message, self._code = message, code

    def message(self) -> str:
        return self._message

    def code(self) -> int:
        return self._code


class InferenceResponse:
    def __init__(self, output_tensors: list[Tensor], error: TritonError | None = None) -> None:
        self._tensors, self._error = output_tensors, error

    def output_tensors(self) -> list[Tensor]:
        return self._tensors

    def has_error(self) -> bool:
        return self._error is not None

    def error(self) -> TritonError | None:
        return self._error

    def values(self) -> dict[str, np.ndarray]:
        """The outputs by name; for tests."""
        assert self._error is None, self._error.message()
        return {tensor.name(): tensor.as_numpy() for tensor in self._tensors}


class Sender:
    """Keeps what a model sends."""

    def __init__(self) -> None:
        self.sent: list[InferenceResponse] = []
        self.ended = 0
        self.gone = False

    def send(self, response: InferenceResponse, flags: int = 0) -> None:
        self.sent.append(response)
        self.ended += flags

    def is_cancelled(self) -> bool:
        return self.gone


class InferenceRequest:
    def __init__(
        self,
        values: Mapping[str, np.ndarray],
        name: str = "",
        wanted: Sequence[str] = ("text", "token_ids", "finish_reason"),
    ) -> None:
        self.wanted = wanted
        self.inputs = {key: Tensor(key, value) for key, value in values.items()}
        self.sender = Sender()
        self._name = name

    def get_response_sender(self) -> Sender:
        return self.sender

    def requested_output_names(self) -> list[str]:
        return list(self.wanted)

    def request_id(self) -> str:
        return self._name


class Logger:
    lines: ClassVar[list[str]] = []

    @classmethod
    def log_error(cls, message: str) -> None:
        cls.lines.append(message)

    log_info = log_error


def get_input_tensor_by_name(request: InferenceRequest, name: str) -> Tensor | None:
    return request.inputs.get(name)


def get_output_tensor_by_name(response: InferenceResponse, name: str) -> Tensor | None:
    return next((tensor for tensor in response.output_tensors() if tensor.name() == name), None)


def texts(*items: str | bytes, shape: tuple[int, ...] | None = None) -> np.ndarray:
    """A tensor of strings."""
    made = np.empty(len(items), dtype=np.object_)
    made[:] = [item.encode() if isinstance(item, str) else item for item in items]
    return made if shape is None else made.reshape(shape)


def arguments(settings: ModelSettings, folder: Path = Path("/nowhere")) -> dict[str, str]:
    """What `initialize` is given."""
    parameters = {key: {"string_value": value} for key, value in settings.parameters()}
    return {"model_config": json.dumps({"parameters": parameters}), "model_repository": str(folder)}
