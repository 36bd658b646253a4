"""Which names each version of TensorRT-LLM has, from the table beside this file, and what calls of them look like.

names.tsv: owner, name, and one column for each version. "arg": needed, by place or by name; "opt": may be left out;
"kw": may be left out, by name only; "method", "member", "field": it exists; "-": it does not.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

#: version -> where its names were read, in github.com/NVIDIA/TensorRT-LLM
SOURCES = {
    # __version__ 0.12.0.dev2024070200, as theapipoozaa/TensorRT-LLM@9dbc5b3 keeps it, and 0.12.0.dev2024080600, as
    # Qcompiler/MixQ_Tensorrt_LLM@06e3cbf keeps it: what 0.12.0 and 0.12.0-jetson were made from
    "0.12": "cpp/tensorrt_llm/pybind/executor/{bindings,executor}.cpp",
    # __version__ 0.16.0.dev2024121000, as laipaang/TensorRT-LLM@b171e87 keeps it
    "0.16": "cpp/tensorrt_llm/pybind/executor/{bindings,executor}.cpp",
    # the last versions with engines: request.cpp@007a750, request.cpp and executorConfig.cpp@008b2b8, executor.cpp
    # @1dd50d0; llmapi/llm.py@4c05a74, sampling_params.py@000a01d, _torch/models/modeling_llava_next.py@b35ac1b;
    # KvCacheConfig.dtype: docs/source/features/quantization.md@09d4c79
    "1.2": "cpp/tensorrt_llm/{pybind,nanobind}/executor, tensorrt_llm/llmapi, tensorrt_llm/inputs",
    # after the engines: inputs/registry.py@002f3cc and the parts of llmapi/llm.py of that time that pass rows on. What
    # LLM and SamplingParams take there was not read and is taken over from 1.2, without max_input_len
    "main": "tensorrt_llm/llmapi, tensorrt_llm/inputs",
}
VERSIONS = tuple(SOURCES)
#: those that run engines, those with the LLM API of the PyTorch backend
ENGINE_VERSIONS, API_VERSIONS = VERSIONS[:3], VERSIONS[2:]
_EXISTS = ("method", "member", "field")


@dataclass(frozen=True)
class Keyword:
    """One argument of a constructor or function."""

    name: str
    kind: str


@lru_cache
def rows() -> tuple[dict[str, str], ...]:
    """The lines of names.tsv."""
    with (Path(__file__).parent / "names.tsv").open(encoding="utf-8", newline="") as stream:
        return tuple(csv.DictReader(stream, delimiter="\t"))


def keywords(owner: str, version: str) -> tuple[Keyword, ...]:
    """The arguments that `owner` takes in a version, in their order."""
    found = [Keyword(row["name"], row[version]) for row in rows() if row["owner"] == owner]
    return tuple(item for item in found if item.kind not in (*_EXISTS, "-"))


def members(owner: str, version: str) -> tuple[str, ...]:
    """What `owner` has beside its arguments: methods as "name(arguments)", enum members, fields."""
    return tuple(row["name"] for row in rows() if row["owner"] == owner and row[version] in _EXISTS)


def exists(owner: str, version: str) -> bool:
    """Whether a version has `owner` at all."""
    return any(row["owner"] == owner and row[version] != "-" for row in rows())


def bound(owner: str, version: str, args: tuple[Any, ...], named: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call by name.

    Raises:
        TypeError: what pybind11 and nanobind raise: a name that is not there, one that is missing or given twice.
    """
    known = keywords(owner, version)
    by_place = [item.name for item in known if item.kind != "kw"]
    if len(args) > len(by_place):
        raise TypeError(f"{owner}(): incompatible function arguments: {len(args)} by place, {len(by_place)} may be.")
    values = dict(zip(by_place, args, strict=False))
    for name, value in named.items():
        if name not in {item.name for item in known}:
            raise TypeError(f"{owner}(): incompatible function arguments: TensorRT-LLM {version} has no '{name}'.")
        if name in values:
            raise TypeError(f"{owner}(): incompatible function arguments: '{name}' is given twice.")
        values[name] = value
    missing = [item.name for item in known if item.kind == "arg" and item.name not in values]
    if missing:
        raise TypeError(f"{owner}(): incompatible function arguments: {', '.join(missing)} missing.")
    return values
