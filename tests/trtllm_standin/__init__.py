"""Stand-ins of TensorRT-LLM: its engines' executor in three versions and its LLM API in two. Nothing of it is NVIDIA's.

    with trtllm_standin.engines("0.12", language) as world:
        ...  # `import tensorrt_llm.bindings.executor` gives the stand-in

They have exactly the names of a version (names.tsv), check what they are given as the real ones do, and answer with a
real language model on the CPU. They prove that code calls what exists, with arguments of the right kind, shape and
number; they prove nothing about speed or precision, or about what the source does not say.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from trtllm_standin.executor import Asked, EngineWorld, Language, executor_module
from trtllm_standin.llm import ApiWorld, api_modules
from trtllm_standin.names import API_VERSIONS, ENGINE_VERSIONS, VERSIONS

__all__ = [
    "API_VERSIONS",
    "ENGINE_VERSIONS",
    "VERSIONS",
    "ApiWorld",
    "Asked",
    "EngineWorld",
    "Language",
    "engines",
    "llm_api",
]


@contextmanager
def engines(version: str, language: Language) -> Iterator[EngineWorld]:
    """`import tensorrt_llm` gives a version that runs engines."""
    world = EngineWorld(version, language)
    package, bindings = _package(version), ModuleType("tensorrt_llm.bindings")
    bindings.__path__ = []
    package.bindings, bindings.executor = bindings, executor_module(world)
    modules = {"tensorrt_llm": package, "tensorrt_llm.bindings": bindings}
    with _installed({**modules, "tensorrt_llm.bindings.executor": bindings.executor}):
        yield world


@contextmanager
def llm_api(version: str) -> Iterator[ApiWorld]:
    """`import tensorrt_llm` gives a version with the LLM API of the PyTorch backend."""
    world = ApiWorld(version)
    with _installed(api_modules(world, _package(version))):
        yield world


def _package(version: str) -> Any:
    package = ModuleType("tensorrt_llm")
    package.__path__, package.__file__ = [], str(Path(__file__).parent / "nowhere" / "__init__.py")
    package.__version__ = {"0.12": "0.12.0", "0.16": "0.16.0", "1.2": "1.2.1", "main": "1.4.0rc1"}[version]
    return package


@contextmanager
def _installed(modules: Mapping[str, Any]) -> Iterator[None]:
    before = {name: module for name, module in sys.modules.items() if name.split(".")[0] == "tensorrt_llm"}
    for name in before:
        del sys.modules[name]
    sys.modules.update(modules)
    try:
        yield
    finally:
        for name in [name for name in sys.modules if name.split(".")[0] == "tensorrt_llm"]:
            del sys.modules[name]
        sys.modules.update(before)
