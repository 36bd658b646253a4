"""Commands about TensorRT that need neither a GPU nor TensorRT: `check` and `lower`."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path

import click
from rich.text import Text

from holov_export.bundle import Bundle, read_manifest
from holov_export.cli.console import OUT, print_json, table
from holov_export.cli.options import UserPath, json_option, method_option
from holov_export.compile.graph_file import graph_path, write_lowered
from holov_export.compile.readiness import VERSIONS, Finding, ReadinessReport, VersionReadiness, readiness_of
from holov_export.errors import UsageError
from holov_export.targets import target_from_name
from holov_export.versions import version_from_text

_COLOURS = {"error": "red", "warning": "yellow", "note": "dim"}
#: nodes named for one finding before "and N more"
_NAMED = 3
#: the newest TensorRT whose documents the rules were read from
_NEWEST = VERSIONS[-1]

model_argument = click.argument("model", type=UserPath(), metavar="BUNDLE|FILE.onnx")
target_option = click.option("--target", help="The versions of a deployment target: a name or a TOML file.")


@click.command()
@model_argument
@target_option
@click.option("--tensorrt", "versions", multiple=True, metavar="VERSION", help="A TensorRT version; may be repeated.")
@method_option
@json_option
@click.pass_context
def check(
    ctx: click.Context,
    model: Path,
    target: str | None,
    versions: tuple[str, ...],
    method: str | None,
    as_json: bool,
) -> None:
    """Say whether TensorRT will take a graph; needs no GPU.

    Exit code 1 if a version has errors. A static check of operators, types, shapes and loops against what each version
    documents. "Ready" means that no rule found an error, not that TensorRT has parsed the graph.
    """
    asked = versions_asked(target, versions) or VERSIONS
    report = readiness_of(_graph(model, method), asked)
    if as_json:
        print_json({**report.model_dump(mode="json"), "ready": report.ready})
    else:
        print_readiness(report)
    ctx.exit(0 if report.ready else 1)


@click.command()
@model_argument
@target_option
@click.option("--tensorrt", "version", metavar="VERSION", help="The TensorRT version that will read the graph.")
@method_option
@click.option("-o", "--output", type=UserPath(), required=True, help="Folder to write to; made if it is missing.")
def lower(model: Path, target: str | None, version: str | None, method: str | None, output: Path) -> None:
    """Write the graph as an older TensorRT reads it.

    The folder, with the weights in it, is for trtexec on a board.

    TensorRT 8.5 and 8.6 get opset 17, and 8.5 gets LayerNormalization in parts; later ones get the graph as it is. A
    target is taken at its oldest TensorRT.
    """
    asked = versions_asked(target, (version,) if version else ())
    if not asked:
        raise UsageError("for which TensorRT?", hint="Add --tensorrt 8.6 or --target NAME.")
    written = write_lowered(_graph(model, method), asked[0], output)
    OUT.print(str(written), soft_wrap=True)


def _graph(model: Path, method: str | None) -> Path:
    """The ONNX file that a bundle and --method name.

    Raises:
        BundleError, UsageError: see `graph_path`. UnknownNameError: the bundle has no such graph.
    """
    return graph_path(model) if method is None else Bundle(model, read_manifest(model)).of_method(method).vision


def versions_asked(target: str | None, versions: tuple[str, ...]) -> tuple[str, ...]:
    """The versions named, or the oldest and newest of a target; () if neither is given.

    Raises:
        UsageError: both are given, or the target is unknown.
    """
    if target is None:
        return tuple(dict.fromkeys(versions))
    if versions:
        raise UsageError("--target and --tensorrt say the same thing.", hint="Use one of them.")
    span = target_from_name(target).tensorrt
    return tuple(dict.fromkeys((span.min, span.max)))


def print_readiness(report: ReadinessReport) -> None:
    """A line for each version, then what was found, each rule once."""
    made = table("TensorRT", "verdict", "errors>", "warnings>", "notes>")
    for version in report.versions:
        counts = [str(version.count(severity) or "") for severity in ("error", "warning", "note")]
        made.add_row(version.tensorrt, _verdict(version), *counts)
    OUT.print(made)
    for (severity, rule), lines in _grouped(report):
        OUT.print()
        OUT.print(Text.assemble((severity, _COLOURS[severity]), f"  {rule}  ", lines[0]), soft_wrap=True)
        for line in lines[1:]:
            OUT.print(f"  {line}", soft_wrap=True)
    if report.ready:
        OUT.print()
        OUT.print("Ready means that no rule found an error, not that TensorRT has parsed the graph.", style="dim")
    newest = version_from_text(_NEWEST)
    newer = [item.tensorrt for item in report.versions if version_from_text(item.tensorrt)[: len(newest)] > newest]
    if newer:
        OUT.print(f"The rules know TensorRT up to {_NEWEST}; {', '.join(newer)} is judged as that one.", style="dim")


def _verdict(version: VersionReadiness) -> Text:
    if not version.ready:
        return Text("not ready", "red")
    lowered = f" (after lowering to opset {version.lowered_to})" if version.lowered_to else ""
    return Text(f"ready{lowered}", "green")


def _grouped(report: ReadinessReport) -> list[tuple[tuple[str, str], list[str]]]:
    """[(severity, rule), lines]: the versions, each message with its nodes, the way out and the source."""
    rows = [(finding, version.tensorrt) for version in report.versions for finding in version.findings]
    order = list(_COLOURS)
    rows.sort(key=lambda row: (order.index(row[0].severity), row[0].rule))
    grouped = []
    for key, members in groupby(rows, key=lambda row: (row[0].severity, row[0].rule)):
        found = list(members)
        lines = [f"TensorRT {', '.join(dict.fromkeys(version for _, version in found))}"]
        for message, nodes in _by_message(found).items():
            lines.append(message)
            if nodes:
                more = f" and {len(nodes) - _NAMED} more" if len(nodes) > _NAMED else ""
                lines.append(f"  at {', '.join(nodes[:_NAMED])}{more}")
        lines += [f"-> {way_out}" for way_out in dict.fromkeys(finding.way_out for finding, _ in found)]
        lines.append(f"   {found[0][0].source}")
        grouped.append((key, lines))
    return grouped


def _by_message(found: list[tuple[Finding, str]]) -> dict[str, list[str]]:
    """Message -> names of the nodes, each once."""
    messages: dict[str, dict[str, None]] = {}
    for finding, _ in found:
        nodes = messages.setdefault(finding.message, {})
        if finding.node:
            nodes[finding.node] = None
    return {message: list(nodes) for message, nodes in messages.items()}
