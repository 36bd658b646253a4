"""--target auto: the target that this GPU and this TensorRT are."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from holov_export.errors import EngineError
from holov_export.gpu import Gpu
from holov_export.targets import EngineTarget

#: words that many GPUs have in their names
_COMMON = {"nvidia", "geforce", "gpu", "jetson"}


@dataclass(frozen=True)
class Choice:
    """A target, and why it was taken."""

    target: EngineTarget
    reason: str


def target_for(gpu: Gpu, tensorrt: str, targets: Sequence[EngineTarget]) -> Choice:
    """The target of the same compute capability that runs this TensorRT; among several the one with the same name,
    then the one with the closest memory.

    Raises:
        EngineError: none of `targets` is of this compute capability, or none of those runs this TensorRT.
    """
    here = f"{gpu.name} (sm_{gpu.sm}, {gpu.memory_bytes / 2**30:.0f} GiB)"
    same = [target for target in targets if target.sm == gpu.sm]
    if not same:
        raise EngineError(
            f"no shipped target is for {here}.",
            hint="Write one of your own (engines/README.md) and name it: --target ./board.toml",
        )
    fitting = [target for target in same if target.tensorrt.holds(tensorrt)]
    if not fitting:
        ranges = ", ".join(f"{target.name}: {target.tensorrt}" for target in same)
        raise EngineError(
            f"no target for {here} runs TensorRT {tensorrt}: {ranges}.",
            hint="Write one of your own (engines/README.md) and name it: --target ./board.toml",
        )
    best = min(fitting, key=lambda target: _distance(gpu, target))
    others = [target.name for target in fitting if target is not best]
    passed = f"; closest in name and memory of {', '.join(sorted([best.name, *others]))}" if others else ""
    return Choice(best, f"{here}, TensorRT {tensorrt}{passed}")


def _distance(gpu: Gpu, target: EngineTarget) -> tuple[int, float, str]:
    """Smaller is closer: words of the name that the two do not share, difference in memory, the name for a tie."""
    common = _words(gpu.name) & _words(target.title)
    return -len(common), abs(gpu.memory_bytes / 2**30 - target.memory_gb), target.name


def _words(name: str) -> set[str]:
    return set(re.findall(r"[a-z0-9]+", name.lower())) - _COMMON
