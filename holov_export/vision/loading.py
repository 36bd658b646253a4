"""Fill a module with the tensors of a checkpoint, and give their memory back; nothing here knows a family."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from holov_export.errors import CheckpointError
from holov_export.spec import Precision
from holov_export.vision.weights import SafetensorsReader

TORCH_DTYPES = {Precision.FP32: torch.float32, Precision.FP16: torch.float16, Precision.BF16: torch.bfloat16}

Module = TypeVar("Module", bound=nn.Module)


class _NoMemory(TorchFunctionMode):
    """`torch.empty`, which torch's layers make their parameters with, takes no memory; other tensors are real.

    With the device "meta" for everything the tables of the selection rules, which no checkpoint has, would be lost.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        named = dict(kwargs or {})
        if func is torch.empty and named.get("device") is None:
            named["device"] = "meta"
        return func(*args, **named)


def as_stored(name: str, tensor: Tensor) -> Tensor:
    """The tensor has the shape in which the checkpoint stores it."""
    return tensor


def module_from_checkpoint(
    build: Callable[[], Module],
    reader: SafetensorsReader,
    precision: Precision,
    names: Callable[[str], list[str]],
    shaped: Callable[[str, Tensor], Tensor] = as_stored,
) -> Module:
    """The module that `build` makes, with the checkpoint's own weights in `precision`.

    Reads only the tensors that it needs, one after another. Parameters take no memory before they are read.

    Args:
        build: makes the module.
        names: from the name of a parameter to how checkpoints may spell it.
        shaped: from the name of a parameter and a stored tensor to a view of it in the parameter's shape.

    Raises:
        CheckpointError: a tensor is missing or of another shape.
    """
    with _NoMemory():
        module = build().eval()
    state = {}
    for name, parameter in module.named_parameters():
        tensor = shaped(name, reader.read(names(name)))
        if tensor.shape != parameter.shape:
            raise CheckpointError(
                f"tensor '{name}' has shape {tuple(tensor.shape)}, config.json says {tuple(parameter.shape)}."
            )
        state[name] = tensor.to(TORCH_DTYPES[precision])
    module.load_state_dict(state, assign=True, strict=True)
    return module.requires_grad_(False)


def forget_weights(module: nn.Module) -> None:
    """Give the memory of a module's weights back to the operating system; the module is of no use afterwards.

    Dropping the module is not enough: the exporter keeps its parameters alive, and the C library keeps freed blocks of
    this size for itself.
    """
    for parameter in module.parameters():
        parameter.data = torch.empty(0, dtype=parameter.dtype)
    gc.collect()
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):  # a C library without malloc_trim
            ctypes.CDLL(None).malloc_trim(0)
