"""Which of a bundle's engines runs here, and whether it may."""

from __future__ import annotations

from pathlib import Path

from holov_export.bundle import ENGINES, Bundle
from holov_export.engine import Engine, check_engine, check_machine, engines_in, read_engine
from holov_export.errors import EngineError
from holov_export.gpu import Gpu


def checked_engine(
    bundle: Bundle, gpu: Gpu, tensorrt: str, *, target: str | None, folder: str | Path | None, full: bool
) -> Engine:
    """The engine that was asked for, or the only one that fits this machine, after all checks that need no TensorRT.

    Args:
        tensorrt: the installed version.
        target: name of an engine in the bundle.
        folder: of an engine anywhere, instead.
        full: compare the plan's sha256, not its size alone.

    Raises:
        EngineError: none fits, several do and none was named, or it was built for another GPU, TensorRT or graph.
        IntegrityError: the plan is missing, truncated or changed.
    """
    engine = read_engine(Path(folder)) if folder is not None else _chosen(bundle, gpu, tensorrt, target)
    graph, weights = graph_hashes(bundle)
    check_engine(engine, gpu, tensorrt, graph_sha256=graph, weights_sha256=weights, full=full)
    return engine


def graph_hashes(bundle: Bundle) -> tuple[str, str]:
    """sha256 of the bundle's graph and of its weights, as engines record them."""
    hashes = {item.path: item.sha256 for item in bundle.manifest.artifacts}
    return hashes[bundle.graph], hashes.get(bundle.weights, "")  # a small graph holds its weights itself


def _chosen(bundle: Bundle, gpu: Gpu, tensorrt: str, target: str | None) -> Engine:
    """The engine of that name, or the only one that fits. The error says which exist and why they do not fit."""
    of_graph = f" --method {bundle.method}" if bundle.method != bundle.methods[0] else ""
    seen = " that sees clips" if bundle.part == "video" else ""
    engines = engines_of(bundle)
    if not engines:
        raise EngineError(
            f"the bundle '{bundle.folder.name}' has no engine{f' for {bundle.method}' if of_graph else ''}{seen}.",
            hint=f"Build one: holov-export compile {bundle.folder} --target {target or 'TARGET'}{of_graph}",
        )
    if target is not None:
        named = [engine for engine in engines if engine.record.target == target or engine.folder.name == target]
        if named:
            return named[0]
        raise EngineError(
            f"the bundle has no engine for '{target}'; it has {', '.join(engine.record.target for engine in engines)}.",
            hint=f"Build it: holov-export compile {bundle.folder} --target {target}{of_graph}",
        )
    reasons = {engine.folder.name: _misfit(engine, gpu, tensorrt) for engine in engines}
    fitting = [engine for engine in engines if reasons[engine.folder.name] is None]
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        names = ", ".join(engine.record.target for engine in fitting)
        raise EngineError(f"several engines fit this GPU and TensorRT: {names}.", hint="Choose one with --target.")
    raise EngineError(
        "no engine of the bundle fits: " + " ".join(str(reason) for reason in reasons.values()),
        hint=f"Compile the bundle on this machine: holov-export compile {bundle.folder}{of_graph}",
    )


def engines_of(bundle: Bundle) -> list[Engine]:
    """A bundle's engines without those of its other graphs. One of a graph that is not here any more stays in.

    Raises:
        BundleError, IntegrityError: see `engines_in`.
    """
    hashes = {item.path: item.sha256 for item in bundle.manifest.artifacts}
    others = {graph for path, graph in hashes.items() if path.endswith(".onnx") and path != bundle.graph}
    return [engine for engine in engines_in(bundle.folder / ENGINES) if engine.record.graph_sha256 not in others]


def _misfit(engine: Engine, gpu: Gpu, tensorrt: str) -> str | None:
    """Why an engine cannot run here, None if it can."""
    try:
        check_machine(engine.record, gpu, tensorrt)
    except EngineError as error:
        return error.message
    return None
