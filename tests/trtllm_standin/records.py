"""Classes and enums of the bindings, made from the table of names: they hold what they are given and know no other."""

from __future__ import annotations

import enum
from typing import Any

from trtllm_standin.names import bound, keywords, members


def record_class(owner: str, version: str) -> type:
    """A class with the constructor of a version; its arguments are attributes, on the class as well."""
    names = tuple(item.name for item in keywords(owner, version))

    def made(self: Any, *args: Any, **named: Any) -> None:
        self._values = dict.fromkeys(names) | bound(owner, version, args, named)

    def set_one(self: Any, name: str, value: Any) -> None:
        if name == "_values":
            object.__setattr__(self, name, value)
        elif name in names:
            self._values[name] = value
        else:
            raise AttributeError(f"'{owner}' object has no attribute '{name}' in TensorRT-LLM {version}")

    def reader(name: str) -> property:
        return property(lambda self: self._values[name])

    body = {name: reader(name) for name in names}
    return type(owner, (), {"__init__": made, "__setattr__": set_one, **body})


def enum_class(owner: str, version: str) -> type:
    """An enum with the members of a version."""
    return enum.Enum(owner, {name: index for index, name in enumerate(members(owner, version))})
