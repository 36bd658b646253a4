"""The rules of the readiness check as data: `data/readiness/*.toml`, read once."""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from holov_export.assets import data_folder
from holov_export.errors import EnvironmentFaultError
from holov_export.policies import Frozen
from holov_export.versions import version_from_text

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Severity = Literal["error", "warning", "note"]
Version = tuple[int, ...]


class _Ranged(Frozen):
    """Something that is asked for from one TensorRT version on and before another."""

    since: str = Field(default="8.5", alias="from")
    before: str | None = None

    def applies(self, version: Version) -> bool:
        """True for the versions of the range; "8.6" counts as 8.6.0."""
        return version >= version_from_text(self.since) and (
            self.before is None or version < version_from_text(self.before)
        )


class Rule(_Ranged):
    """One rule of rules.toml; see the words at its top."""

    id: str
    severity: Severity
    message: str
    way_out: str
    sources: tuple[str, ...] = Field(min_length=1)
    limits: dict[str, int] = Field(default_factory=dict)

    def limit(self, version: Version) -> int:
        """The number that holds for a version."""
        return _in_force(self.limits, version) or 0


class AttributePattern(_Ranged):
    """Every value of `name` is one of `allowed`; an empty `allowed` forbids the attribute."""

    operator: str
    name: str
    allowed: tuple[int | float | str, ...]
    source: str


class InputPattern(_Ranged):
    """Something about input `index` of an operator."""

    operator: str
    index: int
    allowed: tuple[int, ...] = ()
    source: str


class CountPattern(_Ranged):
    """An operator has at most `count` inputs, or outputs that are read."""

    operator: str
    count: int
    source: str


class FormPattern(_Ranged):
    """A form of an operator that is read although its opset is above the documented range."""

    operator: str
    opset: int
    source: str


class IntegerOperators(Frozen):
    """Operators of a domain that multiply integers, or choose scales at run time."""

    domain: str
    operators: tuple[str, ...]
    source: str


class RuleBook(Frozen):
    """All data of the check.

    Attributes:
        rules: in the order of the file.
        types: element type -> the first TensorRT that has it.
        operators: operator -> version -> the types that are documented from that version on.
        integer: operators of graphs that were quantised for another engine.
        also: types beyond those, from the parser's source.
        never: operators that no version has.
    """

    rules: tuple[Rule, ...]
    types: dict[str, str]
    attribute: tuple[AttributePattern, ...]
    constant: tuple[InputPattern, ...]
    inputs: tuple[CountPattern, ...]
    outputs: tuple[CountPattern, ...]
    rank: tuple[InputPattern, ...]
    form: tuple[FormPattern, ...]
    integer: tuple[IntegerOperators, ...]
    operators: dict[str, dict[str, str]]
    also: dict[str, dict[str, str]]
    never: frozenset[str]
    sources: tuple[str, ...]

    def is_integer_operator(self, domain: str, operator: str) -> bool:
        """True for an operator that only graphs quantised for another engine have."""
        return any(item.domain == domain and operator in item.operators for item in self.integer)

    def first_with(self, operator: str) -> str | None:
        """The first TensorRT whose parser has an operator, None if none has."""
        rows = self.operators.get(operator)
        return min(rows, key=version_from_text) if rows else None

    def type_exists(self, kind: str, version: Version) -> bool:
        """True if a TensorRT has an element type ("FLOAT16")."""
        return kind in self.types and version_from_text(self.types[kind]) <= version

    def types_of(self, operator: str, version: Version) -> frozenset[str]:
        """Types that an operator takes in a version, in the words of operators.toml ("FP16"); empty if unsupported."""
        documented = _in_force(self.operators.get(operator, {}), version)
        if documented is None:
            return frozenset()
        return frozenset(documented.split()) | frozenset(
            (_in_force(self.also.get(operator, {}), version) or "").split()
        )


def _in_force(rows: dict[str, Any], version: Version) -> Any:
    """The value of the last row that is not newer than a version."""
    reached = [key for key in rows if version_from_text(key) <= version]
    return rows[max(reached, key=version_from_text)] if reached else None


@functools.cache
def rule_book() -> RuleBook:
    """The rules that ship with the package.

    Raises:
        EnvironmentFaultError: the files are missing or damaged.
    """
    folder = data_folder("readiness")
    raw: dict[str, Any] = {}
    try:
        for name in ("rules", "patterns", "operators"):
            raw.update(_parsed(folder / f"{name}.toml"))
        raw["rules"] = raw.pop("rule")
        return RuleBook.model_validate(raw)
    except (OSError, ValueError, KeyError, ValidationError) as error:
        raise EnvironmentFaultError(
            f"the rules of the readiness check are damaged: {error}",
            hint="Install again: pip install --force-reinstall --no-deps holov-export",
        ) from error


def _parsed(path: Path) -> dict[str, Any]:
    return tomllib.loads(path.read_text(encoding="utf-8"))
