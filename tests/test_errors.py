"""The exception tree in the docstring of `errors` is the tree of the classes."""

from __future__ import annotations

import re

import pytest

from holov_export import errors
from holov_export.errors import HolovExportError

CLASSES = {
    name: member
    for name, member in vars(errors).items()
    if isinstance(member, type) and issubclass(member, HolovExportError)
}


def documented_tree() -> dict[str, str | None]:
    """Class name -> name of its parent, read off the indentation of the drawing."""
    parents: dict[str, str | None] = {}
    open_branches: list[tuple[int, str]] = []
    for line in (errors.__doc__ or "").splitlines():
        found = re.match(r"^([ │├└─]+)([A-Z]\w+Error)\b", line)
        if not found:
            continue
        column, name = len(found[1]), found[2]
        while open_branches and open_branches[-1][0] >= column:
            open_branches.pop()
        parents[name] = open_branches[-1][1] if open_branches else None
        open_branches.append((column, name))
    return parents


def test_docstring_draws_every_class_below_its_parent() -> None:
    drawn = documented_tree()
    assert set(drawn) == set(CLASSES)
    for name, parent in drawn.items():
        expected = Exception if parent is None else CLASSES[parent]
        assert CLASSES[name].__bases__ == (expected,), name


def test_docstring_states_the_exit_codes() -> None:
    stated = re.findall(r"([A-Z]\w+Error) \(exit code (\d)\)", errors.__doc__ or "")
    assert {name: int(code) for name, code in stated} == {
        "UsageError": 2,
        "CheckFailedError": 1,
        "EnvironmentFaultError": 3,
    }
    for name, code in stated:
        for member in CLASSES.values():
            if issubclass(member, CLASSES[name]):
                assert member.exit_code == int(code), member


def test_all_names_every_class_in_order() -> None:
    assert errors.__all__ == sorted(CLASSES)


@pytest.mark.parametrize("name", sorted(CLASSES))
def test_every_class_is_documented(name: str) -> None:
    assert CLASSES[name].__doc__


def test_text_is_the_message_and_then_the_hint() -> None:
    assert str(HolovExportError("it broke.", hint="Mend it.")) == "it broke. Mend it."
    assert str(HolovExportError("it broke.")) == "it broke."
