"""What each TensorRT version offers, read from two tables beside this file.

api.tsv: every public name of the Python bindings, in which version it is, and its newest signature. Read off NVIDIA's
own binding packages.
enum_values.tsv: the number of every enum member. 8.6.0 read off its wheel; the others from the headers of
github.com/NVIDIA/TensorRT at the tags v10.3.0, v10.13.3, v10.16 and v11.1 (the newest 11.x that is tagged; for 11.4.0
unverified beyond that). "?" is a number that no header there says.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

VERSIONS = ("8.6.0", "10.3.0", "10.13.3", "10.16.1", "11.4.0")
_HERE = Path(__file__).parent

#: Overloads that the table gives as (*args, **kwargs): name -> ((first version, signature), ...). A call must fit one.
#: Source: 8.6.0's docstrings; python/src/infer/pyCore.cpp and pyFoundationalTypes.cpp of the tags above.
_OVERLOADS: dict[str, tuple[tuple[str, str], ...]] = {
    "Builder.build_serialized_network": (
        ("8.6.0", "(self: Builder, network: INetworkDefinition, config: IBuilderConfig) -> IHostMemory"),
        ("10.13.3", "(self: Builder, network: INetworkDefinition, config: IBuilderConfig, kernel_text: object)"),
    ),
    "ICudaEngine.create_execution_context": (
        ("8.6.0", "(self: ICudaEngine) -> IExecutionContext"),
        ("10.3.0", "(self: ICudaEngine, strategy: ExecutionContextAllocationStrategy = STATIC) -> IExecutionContext"),
        ("10.13.3", "(self: ICudaEngine, runtime_config: IRuntimeConfig = None) -> IExecutionContext"),
    ),
    **{
        f"ICudaEngine.{method}": (
            ("8.6.0", "(self: ICudaEngine, name: str)"),
            ("8.6.0", "(self: ICudaEngine, name: str, profile_index: int)"),
        )
        for method in (
            "get_tensor_bytes_per_component",
            "get_tensor_components_per_element",
            "get_tensor_format",
            "get_tensor_format_desc",
            "get_tensor_vectorized_dim",
        )
    },
    "IExecutionContext.set_input_shape": (("8.6.0", "(self: IExecutionContext, name: str, shape: Dims) -> bool"),),
    "Refitter.set_named_weights": (
        ("8.6.0", "(self: Refitter, name: str, weights: Weights) -> bool"),
        ("10.3.0", "(self: Refitter, name: str, weights: Weights, location: TensorLocation) -> bool"),
    ),
    "Runtime.deserialize_cuda_engine": (
        ("8.6.0", "(self: Runtime, serialized_engine: buffer) -> ICudaEngine"),
        ("10.3.0", "(self: Runtime, stream_reader: IStreamReader) -> ICudaEngine"),
        ("10.13.3", "(self: Runtime, stream_reader_v2: IStreamReaderV2) -> ICudaEngine"),
    ),
}


@dataclass(frozen=True)
class Parameter:
    """One argument of a signature: its name, the text of its type, the text of its default."""

    name: str
    annotation: str
    default: str | None = None


@dataclass(frozen=True)
class Signature:
    """A method's arguments without `self`, and its text for error messages."""

    text: str
    parameters: tuple[Parameter, ...]


@dataclass(frozen=True)
class Api:
    """The names of one version.

    Attributes:
        version: "8.6.0".
        members: class name (or "" for the module) -> names in it.
        signatures: "Class.method" -> what may be called; empty where the table has (*args, **kwargs) and no more.
        methods: "Class.method" of everything that is a method; the other members are properties or enum members.
        enums: enum name -> member -> number; None where no header says it.
    """

    version: str
    members: dict[str, tuple[str, ...]]
    signatures: dict[str, tuple[Signature, ...]]
    methods: frozenset[str]
    enums: dict[str, dict[str, int | None]]


@lru_cache
def api(version: str) -> Api:
    """The API of one of VERSIONS."""
    if version not in VERSIONS:
        raise ValueError(f"there is no stand-in of TensorRT {version}; there are {', '.join(VERSIONS)}")
    members: dict[str, list[str]] = {"": []}
    signatures: dict[str, tuple[Signature, ...]] = {}
    methods = set()
    for row in table("api.tsv"):
        name = row["name"]
        if row[version] != "y":
            continue
        owner, _, member = name.rpartition(".")
        members.setdefault(owner, []).append(member)
        if not owner and name[0].isupper():
            members.setdefault(name, [])
        text = row["signature (newest version that has it)"]
        if text and member not in ("name", "value"):
            methods.add(name)
            signatures[name] = _signatures(name, text, version)
    return Api(
        version,
        {owner: tuple(names) for owner, names in members.items()},
        signatures,
        frozenset(methods),
        _enums(version),
    )


def table(name: str) -> list[dict[str, str]]:
    """The rows of a table in this folder."""
    with (_HERE / name).open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))


def older(version: str, other: str) -> bool:
    """Whether `version` came before `other`."""
    return [int(part) for part in version.split(".")] < [int(part) for part in other.split(".")]


def _enums(version: str) -> dict[str, dict[str, int | None]]:
    enums: dict[str, dict[str, int | None]] = {}
    for row in table("enum_values.tsv"):
        enum, _, member = row["member"].rpartition(".")
        if row[version] != "-":
            enums.setdefault(enum, {})[member] = None if row[version] == "?" else int(row[version])
    return enums


def _signatures(name: str, text: str, version: str) -> tuple[Signature, ...]:
    if name in _OVERLOADS:
        texts = [text for first, text in _OVERLOADS[name] if not older(version, first)]
    elif "(*args, **kwargs)" in text:
        return ()
    else:
        texts = [text[text.index("(") :]]
    return tuple(Signature(text, _parameters(text)) for text in texts)


def _parameters(text: str) -> tuple[Parameter, ...]:
    """The parameters of "(self: A, x: list[int] = None) -> B", without self."""
    inside = text[1 : _closing(text)]
    parameters = []
    for part in _split(inside):
        name, _, rest = part.partition(":")
        annotation, equals, default = rest.partition(" = ")
        if name.strip() not in ("self", "/"):
            parameters.append(Parameter(name.strip(), annotation.strip(), default.strip() if equals else None))
    return tuple(parameters)


def _closing(text: str) -> int:
    depth = 0
    for place, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if not depth:
            return place
    raise ValueError(f"no closing parenthesis in {text!r}")


def _split(text: str) -> list[str]:
    """At the commas outside of brackets."""
    parts, depth, start = [], 0, 0
    for place, letter in enumerate(text):
        depth += (letter in "([<") - (letter in ")]>")
        if letter == "," and not depth:
            parts.append(text[start:place])
            start = place + 1
    return [part for part in (*parts, text[start:]) if part.strip()]
