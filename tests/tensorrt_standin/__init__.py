"""Stand-ins of five TensorRT versions and of cuda-python, for machines without a GPU.

    with tensorrt_standin.installed("8.6.0", gpu=FakeGpu(sm=90)) as trt:
        ...  # `import tensorrt` gives the stand-in; so does `from cuda.bindings import runtime`

A stand-in has exactly the names and signatures of its version (api.tsv) and fails on every other. What it acts, it acts
with real numbers: an engine runs its ONNX model in ONNX Runtime. What it knows but does not act raises
NotImplementedError. It proves that code calls what exists, in an order that TensorRT allows; it proves nothing about
speed, about precision, or about what a real builder makes of a graph.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from tensorrt_standin.api import VERSIONS
from tensorrt_standin.builder import Build, Builder
from tensorrt_standin.config import IBuilderConfig, IOptimizationProfile, ITimingCache
from tensorrt_standin.context import IExecutionContext
from tensorrt_standin.cuda_memory import Misuse
from tensorrt_standin.cuda_types import FakeGpu
from tensorrt_standin.engine import EngineInspector, ICudaEngine, IRuntimeConfig, Runtime
from tensorrt_standin.facade import Core
from tensorrt_standin.loggers import ILogger, Logger
from tensorrt_standin.network import ILayer, INetworkDefinition, ITensor
from tensorrt_standin.parser import OnnxParser, ParserError
from tensorrt_standin.refit import OnnxParserRefitter, Refitter, Weights
from tensorrt_standin.world import World

__all__ = ["VERSIONS", "Build", "FakeGpu", "Misuse", "World", "current", "installed"]

_worlds: list[World] = []


_CORES: tuple[type[Core], ...] = (
    Builder, EngineInspector, IBuilderConfig, ICudaEngine, IExecutionContext, ILayer, ILogger, INetworkDefinition,
    IOptimizationProfile, IRuntimeConfig, ITensor, ITimingCache, Logger, OnnxParser, OnnxParserRefitter, ParserError,
    Refitter, Runtime, Weights,
)  # fmt: skip


@contextmanager
def installed(
    version: str, *, gpu: FakeGpu | None = None, cuda_python: str | None = "bindings", probe: bool = True
) -> Iterator[ModuleType]:
    """`import tensorrt` and cuda-python give stand-ins inside; what was there before comes back afterwards.

    Args:
        version: one of VERSIONS.
        gpu: what there is; None: a machine without a driver, where making a Builder or Runtime is an AssertionError.
        cuda_python: "bindings" (cuda.bindings.runtime), "cudart" (cuda.cudart of older releases), None (not installed).
        probe: let `holov_export.gpu.probe` see the GPU, too.
    """
    world = World(version, gpu, {core.__name__: core for core in _CORES})
    modules = {
        "tensorrt": world.module,
        "tensorrt.tensorrt": world.module.tensorrt,
        **_cuda_modules(world, cuda_python),
    }
    hidden = [name for name in sys.modules if name.split(".")[0] in ("tensorrt", "cuda")]
    saved = {name: sys.modules.pop(name) for name in hidden}
    sys.modules.update(modules)
    restore = _patched_probe(gpu) if probe else None
    _worlds.append(world)
    try:
        yield world.module
    finally:
        _worlds.remove(world)
        if restore:
            restore()
        for name in [name for name in sys.modules if name.split(".")[0] in ("tensorrt", "cuda")]:
            del sys.modules[name]
        sys.modules.update(saved)


def current() -> World:
    """The innermost stand-in that is installed: its messages, builds, memory and leaks."""
    return _worlds[-1]


def _cuda_modules(world: World, cuda_python: str | None) -> dict[str, ModuleType | None]:
    if cuda_python is None:
        return {"cuda": None}  # an import of it fails
    package = ModuleType("cuda")
    package.__path__ = []
    if cuda_python == "cudart":
        package.cudart = world.cuda.module("cuda.cudart")
        return {"cuda": package, "cuda.cudart": package.cudart}
    bindings = ModuleType("cuda.bindings")
    bindings.__path__ = []
    bindings.runtime = world.cuda.module("cuda.bindings.runtime")
    package.bindings = bindings
    return {"cuda": package, "cuda.bindings": bindings, "cuda.bindings.runtime": bindings.runtime}


def _patched_probe(gpu: FakeGpu | None) -> Any:
    import holov_export.gpu as module

    before = module.probe
    found = (
        module.NoGpu("there is no CUDA driver (libcuda)")
        if gpu is None
        else module.Gpu(name=gpu.name, sm=gpu.sm, memory_bytes=gpu.memory, integrated=gpu.integrated, cuda="12.6")
    )
    module.probe = lambda: found

    def restore() -> None:
        module.probe = before

    return restore
