"""The questions behind the rules about opsets and operators; `type_checks` and `shape_checks` have the others.

A check gets a `Question` and yields a `Hit` for each thing that the rule is about; the rule's own text says it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from holov_export.compile.graph_view import STANDARD_DOMAINS, GraphView, attribute
from holov_export.compile.readiness_rules import Rule, RuleBook, Version
from holov_export.compile.rewrites import REWRITES, WIDENED
from holov_export.extras import require

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

#: operators that a graph has no more once it has been lowered
_LOWERED = frozenset({*REWRITES, "LayerNormalization"})


@dataclass(frozen=True)
class Question:
    """What a check looks at.

    Attributes:
        model: as that TensorRT would be given it. view: the same, indexed.
        opset: of the standard operators. version, tensorrt: the TensorRT asked for, as numbers and as text.
        folder: where the model's file lies, None for a model that is only in memory.
        refusal: (reason, hint) why the graph could not be lowered for it, or None.
    """

    rule: Rule
    book: RuleBook
    model: ModelProto
    view: GraphView
    opset: int
    version: Version
    tensorrt: str
    folder: Path | None = None
    refusal: tuple[str, str] | None = None

    @property
    def limit(self) -> int:
        return self.rule.limit(self.version)

    def standard_nodes(self) -> Iterator[tuple[GraphView, NodeProto]]:
        """(graph, node) of the standard operators, bodies included."""
        return ((view, node) for view, node in self.view.walk() if node.domain in STANDARD_DOMAINS)


@dataclass(frozen=True)
class Hit:
    """One thing that a rule is about.

    Attributes:
        node: where, or None for the graph as a whole.
        facts: what the words in braces of the rule's text mean.
        source: a source closer than the rule's own.
    """

    node: NodeProto | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    source: str = ""


Check = Callable[[Question], Iterator[Hit]]


# ------------------------------------------------------------------------------------------------ opset and operators


def cannot_lower(ask: Question) -> Iterator[Hit]:
    if ask.refusal is not None:
        yield Hit(facts={"reason": ask.refusal[0], "hint": ask.refusal[1]})


def opset_too_old(ask: Question) -> Iterator[Hit]:
    if ask.opset < ask.limit:
        yield Hit(facts={"opset": ask.opset, "limit": ask.limit})


def opset_above_range(ask: Question) -> Iterator[Hit]:
    if ask.opset > ask.limit and ask.refusal is None and not any(_young_forms(ask)):
        yield Hit(facts={"opset": ask.opset, "limit": ask.limit})


def operator_form(ask: Question) -> Iterator[Hit]:
    if ask.refusal is None:
        for node, since in _young_forms(ask):
            yield Hit(node, {"since": since, "limit": ask.limit})


def _young_forms(ask: Question) -> Iterator[tuple[NodeProto, int]]:
    """(node, opset) of operators whose form, and not only their types, changed after the documented range."""
    if ask.opset <= ask.limit:
        return
    later = {(form.operator, form.opset) for form in ask.book.form if form.applies(ask.version)}
    for _, node in ask.standard_nodes():
        since = _changed_form(node.op_type, ask.opset, ask.limit)
        if since and node.op_type not in WIDENED and (node.op_type, since) not in later:
            yield node, since


@functools.cache
def _changed_form(operator: str, opset: int, limit: int) -> int:
    """The opset that gave an operator other inputs or attributes than it has in opset `limit`; 0 if none did.

    0 as well for an operator that is younger than `limit`: whether TensorRT has it is another rule.
    """
    defs = require("onnx").defs
    try:
        new, old = defs.get_schema(operator, opset, ""), defs.get_schema(operator, limit, "")
    except defs.SchemaError:
        return 0
    forms = [([item.name for item in schema.inputs], set(schema.attributes)) for schema in (new, old)]
    return int(new.since_version) if forms[0] != forms[1] else 0


def operator_unsupported(ask: Question) -> Iterator[Hit]:
    functions = {(item.domain, item.name) for item in ask.model.functions}
    for _, node in ask.standard_nodes():
        if (node.domain, node.op_type) in functions or ask.book.types_of(node.op_type, ask.version):
            continue
        if ask.refusal is not None and node.op_type in _LOWERED:
            continue  # another node keeps this one from being lowered
        if ask.book.is_integer_operator(node.domain, node.op_type):
            continue  # another rule says what it is of
        first = ask.book.first_with(node.op_type)
        if first is not None:
            when = f"from {first} on"
        else:
            when = "no version up to 11.1 has it" if node.op_type in ask.book.never else "no support matrix names it"
        yield Hit(node, {"when": when})


def custom_operator(ask: Question) -> Iterator[Hit]:
    functions = {(item.domain, item.name) for item in ask.model.functions}
    for _, node in ask.view.walk():
        if node.domain in STANDARD_DOMAINS or ask.book.is_integer_operator(node.domain, node.op_type):
            continue
        if (node.domain, node.op_type) not in functions:
            yield Hit(node, {"domain": node.domain})


def local_functions(ask: Question) -> Iterator[Hit]:
    for function in ask.model.functions:
        yield Hit(facts={"function": function.name})


def attribute_value(ask: Question) -> Iterator[Hit]:
    for pattern in ask.book.attribute:
        if not pattern.applies(ask.version):
            continue
        for _, node in ask.standard_nodes():
            value = attribute(node, pattern.name) if node.op_type == pattern.operator else None
            if value is None:
                continue
            values = value if isinstance(value, list | tuple) else [value]
            if not pattern.allowed or any(item not in pattern.allowed for item in values):
                allowed = " or ".join(str(item) for item in pattern.allowed) or "no such attribute"
                said = "(a tensor)" if hasattr(value, "DESCRIPTOR") else value
                yield Hit(node, {"name": pattern.name, "value": said, "allowed": allowed}, pattern.source)


def input_not_constant(ask: Question) -> Iterator[Hit]:
    for pattern in ask.book.constant:
        if not pattern.applies(ask.version):
            continue
        for view, node in ask.standard_nodes():
            if node.op_type != pattern.operator or pattern.index >= len(node.input) or not node.input[pattern.index]:
                continue
            name = node.input[pattern.index]
            if not view.is_constant(name):
                yield Hit(node, {"index": pattern.index, "value": name}, pattern.source)


def input_unsupported(ask: Question) -> Iterator[Hit]:
    for pattern in ask.book.inputs:
        for _, node in ask.standard_nodes() if pattern.applies(ask.version) else ():
            for index, name in enumerate(node.input):
                if node.op_type == pattern.operator and index >= pattern.count and name:
                    yield Hit(node, {"index": index, "value": name, "count": pattern.count}, pattern.source)


def output_unsupported(ask: Question) -> Iterator[Hit]:
    read = {name for _, node in ask.view.walk() for name in node.input}
    read |= {value.name for view in ask.view.graphs() for value in view.graph.output}
    for pattern in ask.book.outputs:
        for _, node in ask.standard_nodes() if pattern.applies(ask.version) else ():
            for index, name in enumerate(node.output):
                if node.op_type == pattern.operator and index >= pattern.count and name in read:
                    yield Hit(node, {"index": index, "value": name, "count": pattern.count}, pattern.source)


def einsum_form(ask: Question) -> Iterator[Hit]:
    for _, node in ask.standard_nodes():
        if node.op_type != "Einsum":
            continue
        equation = str(attribute(node, "equation", "")).replace(" ", "")
        terms = equation.replace("->", ",").split(",")
        if "..." in equation or any(len(set(term)) < len(term) for term in terms):
            yield Hit(node, {"equation": equation})


def scatternd_form(ask: Question) -> Iterator[Hit]:
    if ask.opset >= 18:
        yield from (Hit(node, {"opset": ask.opset}) for _, node in ask.standard_nodes() if node.op_type == "ScatterND")


def cumsum_loop(ask: Question) -> Iterator[Hit]:
    yield from (Hit(node) for _, node in ask.standard_nodes() if node.op_type == "CumSum")


OPERATOR_CHECKS: dict[str, Check] = {
    "cannot-lower": cannot_lower,
    "opset-too-old": opset_too_old,
    "opset-above-range": opset_above_range,
    "operator-form": operator_form,
    "operator-unsupported": operator_unsupported,
    "custom-operator": custom_operator,
    "local-functions": local_functions,
    "attribute-value": attribute_value,
    "input-not-constant": input_not_constant,
    "input-unsupported": input_unsupported,
    "output-unsupported": output_unsupported,
    "einsum-form": einsum_form,
    "scatternd-form": scatternd_form,
    "cumsum-loop": cumsum_loop,
}
