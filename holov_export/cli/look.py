"""Commands that only look: `inspect`, `verify`, `doctor`, `models`, `methods`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from rich.text import Text

from holov_export.bundle import ENGINES, Bundle, open_bundle
from holov_export.catalog import CATALOG, CatalogEntry
from holov_export.cli.compile import engine_json, print_engine
from holov_export.cli.console import OUT, print_json, progress, size_text, table
from holov_export.cli.export_text import graph_text, print_report, quantization_text
from holov_export.cli.options import UserPath, bundle_argument, graph_of, json_option, method_option
from holov_export.doctor import examine
from holov_export.engine import Engine, check_graph, check_plan, engines_in
from holov_export.errors import EngineError, HolovExportError, ImageError, IntegrityError
from holov_export.pipeline import checkpoint_of, refuse_if_failed, verify_bundle
from holov_export.policies import POLICIES, FeatureSource
from holov_export.runtime.engine_choice import graph_hashes
from holov_export.runtime.inner.methods import INNER, InnerMethod
from holov_export.verify.pictures import default_pictures


@click.command()
@bundle_argument
@json_option
def inspect(bundle: Path, as_json: bool) -> None:
    """Show what is in a bundle, and verify its hashes.

    Model, selection, graph inputs and outputs, files, and the compiled engines with what built them.
    """
    opened = open_bundle(bundle)
    engines = [(engine, _fault(engine, opened)) for engine in engines_in(opened.folder / ENGINES)]
    if as_json:
        listed = [
            {**engine_json(engine), **_graph_json(engine, opened), "fault": fault and fault.message}
            for engine, fault in engines
        ]
        print_json({**opened.manifest.model_dump(mode="json"), "engines": listed})
    else:
        _print_bundle(opened)
        _print_engines(engines, opened)
    for _, fault in engines:
        if isinstance(fault, IntegrityError):
            raise fault


def _graph_of(engine: Engine, bundle: Bundle) -> Bundle | None:
    """The bundle with the graph that an engine was built from; None if it was none of its graphs."""
    built_from = engine.record.graph_sha256, engine.record.weights_sha256
    parts = bundle.manifest.plan.parts
    views = (bundle.of_method(name).of_part(part) for name in bundle.methods for part in parts)
    return next((view for view in views if graph_hashes(view) == built_from), None)


def _graph_json(engine: Engine, bundle: Bundle) -> dict[str, str | None]:
    """Rule and part of the graph that an engine was built from."""
    graph = _graph_of(engine, bundle)
    return {"method": None, "part": None} if graph is None else {"method": graph.method, "part": graph.part}


def _fault(engine: Engine, bundle: Bundle) -> HolovExportError | None:
    """What is wrong with an engine on any machine: built from another graph, or its plan is missing or changed."""
    graph, weights = graph_hashes(_graph_of(engine, bundle) or bundle)
    try:
        check_graph(engine.record, graph_sha256=graph, weights_sha256=weights)
        check_plan(engine)
    except (EngineError, IntegrityError) as error:
        return error
    return None


def _print_bundle(bundle: Bundle) -> None:
    manifest, plan = bundle.manifest, bundle.manifest.plan
    head = table("bundle")
    head.add_column(str(bundle.folder))
    head.add_row("model", f"{plan.model.name} ({plan.source.kind}: {plan.source.name})")
    for number, entry in enumerate(plan.graphs):
        head.add_row("selection" if number == 0 else f"--method {entry.name}", graph_text(entry))
    head.add_row("precision", f"{plan.precision_name}, opset {plan.opset}")
    if plan.quantization is not None:
        head.add_row("quantised", quantization_text(plan.quantization))
    head.add_row("decoder", plan.decoder_name)
    head.add_row("written by", f"{manifest.provenance.tool}, {manifest.provenance.created}")
    OUT.print(head)
    graph = table("vision graph", "name", "type", "shape", title="")
    for side, tensors in (("input", manifest.inputs), ("output", manifest.outputs)):
        for tensor in tensors:
            graph.add_row(side, tensor.name, tensor.dtype, " x ".join(map(str, tensor.shape)))
    OUT.print()
    OUT.print(graph)
    files = table("file", "kind", "size>", "sha256")
    for item in manifest.artifacts:
        files.add_row(item.path, item.kind, size_text(item.bytes), item.sha256[:12])
    OUT.print()
    OUT.print(files)


def _print_engines(engines: list[tuple[Engine, HolovExportError | None]], bundle: Bundle) -> None:
    for engine, fault in engines:
        OUT.print()
        graph = _graph_of(engine, bundle)
        several = len(bundle.methods) > 1 or len(bundle.manifest.plan.parts) > 1
        print_engine(engine, graph if several else None)
        if fault is not None:
            OUT.print(Text(fault.message, "red"), soft_wrap=True)


@click.command()
@bundle_argument
@click.option("--checkpoint", help="Where the weights are: directory, name or OWNER/REPO (demo: found by itself).")
@click.option("--image", "images", multiple=True, type=UserPath(), help="Compare on this picture.")
@click.option("--no-transformers", is_flag=True, help="Leave transformers' own model out.")
@method_option
@json_option
def verify(
    bundle: Path,
    checkpoint: str | None,
    images: tuple[Path, ...],
    no_transformers: bool,
    method: str | None,
    as_json: bool,
) -> None:
    """Compare a bundle's graphs with the reference loops, torch, transformers. Exit code 1 if they differ."""
    from holov_export.runtime.preprocess import image_from

    opened = graph_of(open_bundle(bundle), method)
    pictures = [(path.name, image_from(path)) for path in images] or default_pictures()
    if not pictures:
        raise ImageError("no picture to compare on.", hint="Name some with --image.")
    folder = checkpoint_of(opened, checkpoint)
    names = [opened.method] if method is not None else opened.methods
    parts = opened.manifest.plan.parts
    views = [opened.of_method(name).of_part(part) for part in parts for name in names]
    with progress() as tell:
        reports = [
            verify_bundle(
                view,
                folder,
                pictures,
                with_transformers=not no_transformers,
                with_decoder=number == 0,  # all graphs share it
                tell=tell,
            )
            for number, view in enumerate(views)
        ]
    if as_json:
        first, *others = [report.model_dump(mode="json") for report in reports]
        print_json({**first, "also": others} if others else first)
    else:
        for report in reports:
            print_report(report)
    for report in reports:
        refuse_if_failed(report)


@click.command()
@json_option
def doctor(as_json: bool) -> None:
    """Say what this machine can do. Packages, execution providers, GPU, and the pip line for what is missing."""
    findings = examine()
    if as_json:
        print_json([finding.model_dump(mode="json") for finding in findings])
        return
    made = table("", "", "found", "what to do")
    for finding in findings:
        colour = {"ok": "green", "missing": "yellow", "fault": "red"}[finding.state]
        made.add_row(Text(finding.state, colour), finding.subject, finding.found, finding.advice)
    OUT.print(made)


@click.command()
@json_option
def models(as_json: bool) -> None:
    """List the models known by name. Tokens are those of one picture; some models take videos as well."""
    if as_json:
        print_json([vars(entry) for entry in CATALOG.values()])
        return
    made = table("name", "tokens>", "videos", "what it is")
    for entry in CATALOG.values():
        made.add_row(
            Text.assemble(f"{entry.name}\n", (f"{entry.family}, {entry.parameters}", "dim")),
            _tokens_text(entry),
            "yes" if entry.videos else "no",
            Text.assemble(f"{entry.note}\n", (_origin_text(entry), "dim")),
        )
    OUT.print(made)


def _tokens_text(entry: CatalogEntry) -> str:
    """Tokens of a picture: "576", "up to 2880", "4-16384"."""
    if not entry.varies:
        return str(entry.tokens)
    return f"up to {entry.tokens}" if entry.fewest is None else f"{entry.fewest}-{entry.tokens}"


def _origin_text(entry: CatalogEntry) -> str:
    if not entry.repository:
        return "in the package"
    return entry.repository if entry.revision else f"{entry.repository}, not pinned"


@click.command()
@json_option
def methods(as_json: bool) -> None:
    """List the selection rules. After them, for comparisons only, the methods inside the language model."""
    if as_json:
        rules = [
            {
                "name": name,
                "summary": policy.summary,
                "source": policy.source,
                "features": policy.features.value,
                "lossless_at_full": policy.lossless_at_full,
                "exported": True,
                "settings": {
                    key: str(getattr(field.default, "value", field.default))
                    for key, field in policy.model_fields.items()
                    if key != "method"
                },
            }
            for name, policy in POLICIES.items()
        ]
        print_json([*rules, *map(_inner_json, INNER.values())])
        return
    made = table("name", "selects", "keeps")
    for name, policy in POLICIES.items():
        when = "early" if policy.features is FeatureSource.NONE else "late"
        made.add_row(name, when, Text.assemble(f"{policy.summary}\n", (policy.source, "dim")))
    OUT.print(made)
    inside = table("inside the language model", "", "keeps")
    for method in INNER.values():
        state = "not exported, experimental" if method.experimental else "not exported"
        inside.add_row(method.name, state, Text.assemble(f"{method.summary}\n", (method.source, "dim")))
    OUT.print()
    OUT.print(inside)


def _inner_json(method: InnerMethod) -> dict[str, Any]:
    """With the keys of a rule: it reads no features of the vision graph, and drops nothing at full budget."""
    return {
        "name": method.name,
        "summary": method.summary,
        "source": method.source,
        "features": None,
        "lossless_at_full": True,
        "exported": method.exported,
        "experimental": method.experimental,
        "settings": {key: str(value) for key, value in method.settings},
    }
