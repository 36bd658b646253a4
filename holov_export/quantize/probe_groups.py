"""Products with weights that a sensitivity sweep switches together, and the patterns that name them."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from holov_export.quantize.linears import Linear, matches


@dataclass(frozen=True)
class ProbeGroup:
    """Products that are switched together.

    Attributes:
        name: a pattern for `Quantization.keep` that names these, and no other product that is quantised.
        linears: those that are quantised.
    """

    name: str
    linears: tuple[Linear, ...]


def groups_of(linears: Sequence[Linear], chosen: Sequence[Linear], *, whole_layers: bool = False) -> list[ProbeGroup]:
    """The linears of `chosen` by the part of a layer that they are in, or by layer; in the order of the graph.

    A name is the shortest end of the full one that is enough: "layers.3.mlp", "multi_modal_projector".
    """
    found: dict[str, list[Linear]] = {}
    for linear in chosen:
        found.setdefault(_stem(linear.name, whole_layers), []).append(linear)
    return [ProbeGroup(_short(stem, linears), tuple(members)) for stem, members in found.items()]


def _stem(name: str, whole_layers: bool) -> str:
    """A linear's name without its last part, or up to the number of its layer."""
    parts = name.split(".")
    end = len(parts) - 1
    if whole_layers:
        end = next((place + 1 for place, part in enumerate(parts[:-1]) if part.isdecimal()), end)
    return ".".join(parts[:end]) or name


def _short(stem: str, linears: Sequence[Linear]) -> str:
    parts = stem.split(".")
    named = [matches(stem, linear) for linear in linears]
    for start in range(len(parts) - 1, 0, -1):
        pattern = ".".join(parts[start:])
        if not parts[start].isdecimal() and [matches(pattern, linear) for linear in linears] == named:
            return pattern
    return stem


def patterns_of(kept: Collection[str], groups: Sequence[ProbeGroup], linears: Sequence[Linear]) -> tuple[str, ...]:
    """Patterns for `Quantization.keep` that name some groups: a layer of which everything is kept is named once.

    Args:
        kept: names of groups. groups: all of them. linears: of the whole graph.
    """
    chosen = [linear for group in groups for linear in group.linears]
    left = {linear.weight for group in groups if group.name in kept for linear in group.linears}
    found = []
    for layer in groups_of(linears, chosen, whole_layers=True):
        if all(linear.weight in left for linear in layer.linears):
            found.append(layer.name)
        else:
            members = {linear.weight for linear in layer.linears}
            parts = [group for group in groups if group.name in kept]
            found += [group.name for group in parts if any(linear.weight in members for linear in group.linears)]
    return tuple(found)
