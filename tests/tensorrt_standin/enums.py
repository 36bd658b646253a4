"""Enums as pybind11 makes them: `int(member)` but no `1 << member`, equal only to themselves, no iteration."""

from __future__ import annotations

from typing import Any, ClassVar

#: Bound with py::arithmetic, so they have an order; `|` and `<<` stay TypeErrors (seen in 8.6.0). Source: pyCore.cpp
_ORDERED = {"AllocatorFlag", "BuilderFlag", "EngineCapability", "ErrorCodeTRT", "NetworkDefinitionCreationFlag"}
_ORDERED |= {"QuantizationFlag", "SerializationFlag", "Severity", "TacticSource"}

#: Source: NvInferRuntimeBase.h, ILogger::Severity
SEVERITIES = {"INTERNAL_ERROR": 0, "ERROR": 1, "WARNING": 2, "INFO": 3, "VERBOSE": 4}


class _EnumType(type):
    """The type of an enum: unknown members fail with pybind11's words."""

    __members__: dict[str, Any]

    def __getattr__(cls, name: str) -> Any:
        raise AttributeError(f"type object 'tensorrt.tensorrt.{cls.__qualname__}' has no attribute '{name}'")


class EnumMember(metaclass=_EnumType):
    """One member; the subclasses are the enums."""

    __slots__ = ("_name", "_number")
    __members__: ClassVar[dict[str, Any]] = {}

    def __init__(self, value: int) -> None:
        """A number without a member is taken, too, as in pybind11."""
        if not hasattr(value, "__index__"):
            name = f"tensorrt.tensorrt.{type(self).__name__}"
            raise TypeError(
                "__init__(): incompatible constructor arguments. The following argument types are supported:\n"
                f"    1. {name}(value: int)\n\nInvoked with: {value!r}"
            )
        found = [member._name for member in type(self).__members__.values() if member._number == int(value)]
        _set(self, found[0] if found else "???", int(value))

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"'tensorrt.tensorrt.{type(self).__qualname__}' object has no attribute '{name}'")

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"'tensorrt.tensorrt.{type(self).__qualname__}' object has no attribute '{name}'")

    @property
    def name(self) -> str:
        return self._name

    @property
    def value(self) -> int:
        return int(self)

    def __int__(self) -> int:
        if self._number is None:
            raise AssertionError(f"the stand-in does not know the number of {self}")
        return self._number

    __index__ = __int__

    def __hash__(self) -> int:
        return hash(self._name if self._number is None else self._number)

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and (self._number, self._number or self._name) == (
            other._number,
            other._number or other._name,
        )

    def __str__(self) -> str:
        return f"{type(self).__name__}.{self._name}"

    def __repr__(self) -> str:
        return f"<{self}: {self._number}>"


def _set(member: EnumMember, name: str, number: int | None) -> None:
    object.__setattr__(member, "_name", name)
    object.__setattr__(member, "_number", number)


def enum_from_members(name: str, members: dict[str, int | None], *, old: bool = False) -> type[EnumMember]:
    """The enum class with its members.

    The parser's ErrorCode prints as its bare name (pyOnnx.cpp). In 8.6.0 that binding hits the attribute `name`
    instead, which is a method there (seen in its wheel).
    """
    space: dict[str, Any] = {"__slots__": (), "__module__": "tensorrt.tensorrt", "__members__": {}}
    if name == "ErrorCode" and old:
        space["name"] = lambda self: self._name
    elif name == "ErrorCode":
        space["__str__"] = space["__repr__"] = lambda self: self._name
    if name in _ORDERED:
        space |= {f"__{operator}__": _comparison(operator) for operator in ("lt", "le", "gt", "ge")}
    enum = _EnumType(name, (EnumMember,), space)
    enum.__hash__ = EnumMember.__hash__
    for member_name, number in members.items():
        member = enum.__new__(enum)
        _set(member, member_name, number)
        enum.__members__[member_name] = member
        setattr(enum, member_name, member)
    return enum


def _comparison(operator: str) -> Any:
    def compare(self: EnumMember, other: object) -> Any:
        if type(self) is not type(other):
            return NotImplemented
        return getattr(int(self), f"__{operator}__")(int(other))

    return compare
