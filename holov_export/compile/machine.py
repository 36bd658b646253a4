"""This machine as a compiler: its GPU and its TensorRT, and whether they are those of a target."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from holov_export.errors import EngineError, HardwareError
from holov_export.extras import require
from holov_export.gpu import Gpu, require_gpu
from holov_export.targets import EngineTarget, list_targets


@dataclass(frozen=True)
class Machine:
    """The GPU and the module `tensorrt`."""

    gpu: Gpu
    trt: Any

    @property
    def tensorrt(self) -> str:
        return str(self.trt.__version__)


def this_machine() -> Machine:
    """What is here. The driver is asked before TensorRT is loaded: without one TensorRT would end the process.

    Raises:
        HardwareError: no GPU, or a TensorRT that does not load.
        MissingExtraError: no TensorRT.
    """
    gpu = require_gpu()
    try:
        return Machine(gpu, require("tensorrt"))
    except ImportError as error:  # a library beside it is missing; the error names it
        raise HardwareError(
            f"TensorRT is installed and does not load: {error}.", hint="Install the CUDA library that it names."
        ) from error


def check_gpu(target: EngineTarget, gpu: Gpu, known: Sequence[EngineTarget] | None = None) -> None:
    """Refuse a GPU that is not the target's.

    Args:
        known: the targets to suggest from; None for those that ship with the package.

    Raises:
        EngineError: another compute capability.
    """
    if gpu.sm == target.sm:
        return
    fitting = [item.name for item in (list_targets() if known is None else known) if item.sm == gpu.sm]
    hint = f"Targets for sm_{gpu.sm}: {', '.join(fitting)}." if fitting else f"No shipped target is sm_{gpu.sm}."
    raise EngineError(
        f"the target '{target.name}' is sm_{target.sm}, this GPU is {gpu.name} (sm_{gpu.sm}).",
        hint=f"{hint} engines/README.md shows how to write one of your own.",
    )
