"""The engines that can run a bundle's vision graph, by name."""

from __future__ import annotations

from typing import Literal

from holov_export.bundle import Bundle
from holov_export.errors import UnknownNameError, UsageError
from holov_export.runtime.runner import Runner
from holov_export.runtime.runner_ort import OrtRunner

#: "ort" is ONNX Runtime over the graph itself, "tensorrt" the bundle's compiled engine
ENGINES = ("ort", "tensorrt")


def runner_from_bundle(
    bundle: Bundle,
    *,
    engine: str = "ort",
    target: str | None = None,
    provider: str = "auto",
    threads: int | None = None,
    verify: Literal["full", "size"] = "full",
) -> Runner:
    """What runs the vision graph.

    Args:
        bundle: an opened bundle.
        engine: one of `ENGINES`.
        target: for "tensorrt": which of the bundle's engines; None for the only one that fits.
        provider: for "ort": "cpu", "cuda", "tensorrt" or "auto".
        threads: for "ort": CPU threads within one operator.
        verify: for "tensorrt": "full" compares the plan's sha256, "size" only its size.

    Raises:
        UnknownNameError: another engine or provider.
        UsageError: a target without "tensorrt".
        EngineError, IntegrityError: no engine that fits, or one that was changed.
        EnvironmentFaultError: this machine lacks what was asked for.
    """
    if engine not in ENGINES:
        raise UnknownNameError(f"unknown engine '{engine}'.", hint=f"Known: {', '.join(ENGINES)}.")
    if engine == "ort":
        if target is not None:
            raise UsageError(f"target '{target}': ONNX Runtime runs the graph, no target's engine.", hint=_HINT)
        return OrtRunner(bundle, provider=provider, threads=threads)
    from holov_export.runtime.runner_trt import TrtRunner

    return TrtRunner(bundle, target=target, verify=verify)


_HINT = "Add --engine tensorrt."
