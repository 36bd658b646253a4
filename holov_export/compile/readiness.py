"""Will TensorRT take this graph? A static check that needs neither a GPU nor TensorRT.

"Ready" means that no rule of `data/readiness/*.toml` found an error in the graph as `compile` would give it to that
TensorRT, lowered where `lowering` says so. It does not mean that TensorRT has parsed it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from holov_export.compile.graph_file import LARGEST_PROTOBUF, graph_from_file, graph_path
from holov_export.compile.graph_view import GraphView, view_of
from holov_export.compile.lowering import all_graphs, lowered_for, opset_of, tensorrt_version
from holov_export.compile.quantization_checks import FOR_CPU, QUANTIZATION_CHECKS
from holov_export.compile.readiness_checks import OPERATOR_CHECKS, Check, Hit, Question
from holov_export.compile.readiness_rules import Rule, RuleBook, Severity, rule_book
from holov_export.compile.rewrites import label_of
from holov_export.compile.shape_checks import SHAPE_CHECKS
from holov_export.compile.type_checks import TYPE_CHECKS
from holov_export.errors import UsageError
from holov_export.extras import require
from holov_export.policies import Frozen

if TYPE_CHECKING:
    from onnx import ModelProto

#: one of each kind that JetPack and servers have: JetPack 5, 6.0, 6.1/6.2, 7.x, and TensorRT 11
VERSIONS = ("8.5", "8.6", "10.3", "10.13", "11.1")
CHECKS: dict[str, Check] = {**OPERATOR_CHECKS, **TYPE_CHECKS, **QUANTIZATION_CHECKS, **SHAPE_CHECKS}
#: a rule of the file and not of the graph: such a file cannot be read at all
TOO_LARGE = "protobuf-too-large"
#: constants above this size are weights and not looked at
_WEIGHT_BYTES = 4096
_ORDER: dict[Severity, int] = {"error": 0, "warning": 1, "note": 2}


class Finding(Frozen):
    """One thing that a rule found.

    Attributes:
        node: name of the node, "" for the graph as a whole. operator: its operator.
    """

    rule: str
    severity: Severity
    node: str
    operator: str
    message: str
    way_out: str
    source: str


class VersionReadiness(Frozen):
    """What one TensorRT would make of the graph.

    Attributes:
        tensorrt: as it was asked for.
        lowered_to: the opset that `lowering` brings the graph to for it, None if it is given as it is.
        findings: errors first.
    """

    tensorrt: str
    lowered_to: int | None
    findings: tuple[Finding, ...]

    @property
    def ready(self) -> bool:
        """No rule found an error."""
        return not any(finding.severity == "error" for finding in self.findings)

    def count(self, severity: Severity) -> int:
        return sum(finding.severity == severity for finding in self.findings)


class ReadinessReport(Frozen):
    """The check of one graph.

    Attributes:
        graph: name of the graph. nodes: their number, bodies included. opset: before any lowering.
    """

    graph: str
    nodes: int
    opset: int
    versions: tuple[VersionReadiness, ...]

    @property
    def ready(self) -> bool:
        """Ready for every version that was asked for."""
        return all(version.ready for version in self.versions)

    def of(self, tensorrt: str) -> VersionReadiness:
        """The part for one version.

        Raises:
            UsageError: it was not asked for.
        """
        for version in self.versions:
            if version.tensorrt == tensorrt:
                return version
        asked = ", ".join(version.tensorrt for version in self.versions)
        raise UsageError(f"TensorRT {tensorrt} was not asked for.", hint=f"Asked for: {asked}")


def readiness_of_bundle(folder: Path, versions: Sequence[str] = VERSIONS) -> ReadinessReport:
    """Check the vision graph of a bundle, its manifest written or not.

    Raises:
        UsageError, StorageError: see `readiness_of`; BundleError: no vision.onnx there.
    """
    return readiness_of(graph_path(folder), versions)


def readiness_of(model: ModelProto | Path, versions: Sequence[str] = VERSIONS) -> ReadinessReport:
    """Check a graph for TensorRT versions ("8.6", "10.3.0").

    Args:
        model: an ONNX file, or a proto; weights outside are not read. A proto is not changed.

    Raises:
        UsageError: no ONNX model, or no TensorRT version from 8.5 on.
        StorageError: the file cannot be read.
    """
    for text in versions:
        tensorrt_version(text)
    folder = None
    if isinstance(model, Path):
        if model.is_file() and model.stat().st_size > LARGEST_PROTOBUF:
            return _too_large(model, versions)
        folder, model = model.parent, graph_from_file(model)
    light = _without_weights(model)
    opset = opset_of(light)
    forms: dict[str, _Form] = {}
    found = []
    for text in versions:
        key = text if tensorrt_version(text) < (9,) else "as it is"
        if key not in forms:
            forms[key] = _Form(light, text)
        found.append(_readiness(forms[key], text, opset, folder))
    nodes = sum(len(graph.node) for graph in all_graphs(light.graph))
    return ReadinessReport(graph=light.graph.name, nodes=nodes, opset=opset, versions=tuple(found))


class _Form:
    """A graph as one family of TensorRT is given it, or as it was if it cannot be lowered."""

    def __init__(self, model: ModelProto, tensorrt: str) -> None:
        self.refusal: tuple[str, str] | None = None
        try:
            self.model = lowered_for(model, tensorrt)
        except UsageError as error:
            self.model, self.refusal = model, (error.message, error.hint)
        self.opset = opset_of(self.model)
        self.view: GraphView = view_of(self.model)


def _readiness(form: _Form, tensorrt: str, opset: int, folder: Path | None) -> VersionReadiness:
    book, version = rule_book(), tensorrt_version(tensorrt)
    findings: dict[tuple[str, str, str], Finding] = {}
    for rule in book.rules:
        if rule.id not in CHECKS or not rule.applies(version):
            continue
        ask = Question(
            rule=rule,
            book=book,
            model=form.model,
            view=form.view,
            opset=form.opset,
            version=version,
            tensorrt=tensorrt,
            folder=folder,
            refusal=form.refusal,
        )
        for hit in CHECKS[rule.id](ask):
            finding = _finding(rule, hit, tensorrt)
            findings.setdefault((finding.rule, finding.node, finding.message), finding)
    kept = sorted(_without_echo(list(findings.values())), key=lambda finding: _ORDER[finding.severity])
    lowered_to = form.opset if form.opset != opset else None
    return VersionReadiness(tensorrt=tensorrt, lowered_to=lowered_to, findings=tuple(kept))


def _without_echo(findings: list[Finding]) -> Iterator[Finding]:
    """Leave out that the graph cannot be lowered where another rule says why, and what follows from the CPU's form."""
    rules = {finding.rule for finding in findings}
    echo = set[str]()
    if rules & {"type-unsupported", "local-functions", "operator-unsupported", FOR_CPU}:
        echo.add("cannot-lower")
    if FOR_CPU in rules:
        echo |= {*QUANTIZATION_CHECKS, "type-uint8-inside"} - {FOR_CPU}
    return (finding for finding in findings if finding.rule not in echo)


def _finding(rule: Rule, hit: Hit, tensorrt: str) -> Finding:
    node = hit.node
    operator = node.op_type if node is not None else ""
    facts = {"tensorrt": tensorrt, "operator": operator, **hit.facts}
    return Finding(
        rule=rule.id,
        severity=rule.severity,
        node=label_of(node) if node is not None else "",
        operator=operator,
        message=rule.message.format(**facts),
        way_out=rule.way_out.format(**facts),
        source=hit.source or rule.sources[0],
    )


def _too_large(path: Path, versions: Sequence[str]) -> ReadinessReport:
    rule = _rule(rule_book(), TOO_LARGE)
    hit = Hit(facts={"bytes": path.stat().st_size})
    parts = [
        VersionReadiness(tensorrt=text, lowered_to=None, findings=(_finding(rule, hit, text),)) for text in versions
    ]
    return ReadinessReport(graph=path.name, nodes=0, opset=0, versions=tuple(parts))


def _rule(book: RuleBook, name: str) -> Rule:
    return next(rule for rule in book.rules if rule.id == name)


def _without_weights(model: ModelProto) -> ModelProto:
    """A copy whose large constants say that they lie elsewhere: they are not looked at, and copying them costs time."""
    external = require("onnx").TensorProto.EXTERNAL
    light = type(model)()
    light.CopyFrom(model)
    for graph in all_graphs(light.graph):
        for tensor in graph.initializer:
            if len(tensor.raw_data) > _WEIGHT_BYTES:
                tensor.ClearField("raw_data")
                tensor.data_location = external
    return light
