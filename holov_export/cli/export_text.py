"""What an export says: the plan before it, the result after it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from holov_export.bundle import Bundle
from holov_export.cli.compile import engine_json
from holov_export.cli.console import OUT, print_json, say, size_text, table
from holov_export.engine import Engine
from holov_export.pipeline import readiness_report, written_parity
from holov_export.runtime.runner import default_budget
from holov_export.spec import (
    ExportPlan,
    FramePairsSpec,
    FramesSpec,
    GraphPlan,
    PatchImageSpec,
    Quantization,
    TiledImageSpec,
    decoder_name,
)
from holov_export.verify.parity import ParityReport


def plan_json(plan: ExportPlan, output: Path) -> dict[str, Any]:
    return {"output": str(output), "plan": plan.model_dump(mode="json")}


def print_plan(plan: ExportPlan, output: Path, as_json: bool) -> None:
    if as_json:
        print_json(plan_json(plan, output))
        return
    decoder = plan.model.decoder
    rows = {
        "model": f"{plan.model.name} ({plan.source.kind}: {plan.source.name})",
        "revision": plan.source.revision or "-",
        "vision": _vision_text(plan),
        **({"video": _video_text(plan)} if plan.model.video.kind != "none" else {}),
        "selection": graph_text(plan.graphs[0]),
        **({"also": "; ".join(graph_text(graph) for graph in plan.also)} if plan.also else {}),
        "default budget": _budget_text(plan),
        **({"newlines": "kept" if plan.keeps_newlines else "dropped"} if plan.model.image.kind == "tiles" else {}),
        "precision": f"{plan.precision_name}, selection float32, opset {plan.opset}",
        **({} if plan.quantization is None else {"quantised": quantization_text(plan.quantization)}),
        "decoder": f"{decoder.architecture}, {decoder.layers} layers, {plan.decoder_name}" if plan.decoder else "none",
        "context": f"{decoder.context} tokens",
        "output": str(output),
    }
    made = table("plan", "")
    for key, value in rows.items():
        made.add_row(key, value)
    OUT.print(made)


def _vision_text(plan: ExportPlan) -> str:
    """What the tower sees of an image, and how much of the tower is exported."""
    image, vision = plan.model.image, plan.model.vision
    exported = f"{vision.feature_layer + 1} of {vision.layers} layers"
    if isinstance(image, PatchImageSpec):
        side = image.token_pixels
        fewest = max(1, image.min_pixels // side**2)
        return (
            f"any size, a token each {side} x {side} pixels, {fewest} to {plan.model.image_tokens} tokens, {exported}"
        )
    seen = f"{plan.model.clip.image_size} x {plan.model.clip.image_size} pixels"
    if isinstance(image, TiledImageSpec):
        largest = max(height * width for height, width in image.pinpoints) // plan.model.clip.image_size**2
        return f"{seen} and up to {largest} tiles of that size, up to {plan.model.image_tokens} tokens, {exported}"
    return f"{seen}, {plan.model.image_tokens} tokens, {exported}"


def _video_text(plan: ExportPlan) -> str:
    video = plan.model.video
    if isinstance(video, FramesSpec):
        return f"{video.frames} frames of a clip, {plan.model.video_tokens} tokens, a tower of its own"
    assert isinstance(video, FramePairsSpec)  # it is not "none"
    frames = f"{video.fps:g} frames a second, {video.min_frames} to {video.max_frames}"
    return f"{frames}, up to {plan.model.video_tokens} tokens"


def _budget_text(plan: ExportPlan) -> str:
    if plan.budget is None and plan.packed:
        return "a ninth of an image's tokens"
    return f"{default_budget(plan)} tokens of an image"


def graph_text(graph: GraphPlan) -> str:
    """A graph's rule with its settings, and where it cuts."""
    settings = ", ".join(f"{key}={value}" for key, value in graph.policy.model_dump(mode="json").items())
    return f"{settings}, cuts at {graph.name.partition('@')[2]}" if graph.cuts else settings


def result_json(bundle: Bundle, report: ParityReport | None, engines: tuple[Engine, ...]) -> dict[str, Any]:
    readiness = readiness_report(bundle)
    made = {
        "bundle": str(bundle.folder),
        "bytes": sum(item.bytes for item in bundle.manifest.artifacts),
        "parity": None if report is None else report.model_dump(mode="json"),
        "tensorrt": {version.tensorrt: version.ready for version in readiness.versions},
        "methods": list(bundle.methods),
        "also": {view.title: _further_result(view, verified=report is not None) for view in _further(bundle)},
    }
    if not engines:
        return made
    found = [engine_json(engine) for engine in engines]
    return {**made, **(found[0] if len(found) == 1 else {"graphs": found})}


def _further(bundle: Bundle) -> list[Bundle]:
    """The bundle once for each graph beside the default one."""
    return list(bundle.views[1:])


def _further_result(view: Bundle, *, verified: bool) -> dict[str, Any]:
    return {
        "parity": written_parity(view).model_dump(mode="json") if verified else None,
        "tensorrt": {version.tensorrt: version.ready for version in readiness_report(view).versions},
    }


def quantization_text(quantization: Quantization) -> str:
    """How products are quantised, in a line."""
    words = [f"products with weights {quantization.type.value}, written for {quantization.engine}"]
    if quantization.recipe:
        words.append(f"recipe {quantization.recipe} ({quantization.algorithm})")
    if quantization.smoothing is not None:
        words.append(f"smoothing {quantization.smoothing:g}")
    if quantization.keep:
        words.append(f"kept out: {', '.join(quantization.keep)}")
    return ", ".join(words)


def print_result(bundle: Bundle, report: ParityReport | None) -> None:
    if report is not None:
        print_report(report)
        for view in _further(bundle):
            found = written_parity(view)
            worst = max(item.token_error for item in found.comparisons)
            OUT.print(
                f"{view.title}: {len(found.comparisons)} comparisons of {len(found.pictures)} pictures, largest token "
                f"error {worst:.1e}  {'ok' if found.passed else 'FAILED'}",
                soft_wrap=True,
            )
    for view in bundle.views:
        OUT.print((f"{view.title}: " if len(bundle.views) > 1 else "") + _readiness_line(view))
    total = size_text(sum(item.bytes for item in bundle.manifest.artifacts))
    OUT.print(f"{_shown(bundle.folder)}  {total}", soft_wrap=True)


def _readiness_line(bundle: Bundle) -> str:
    """For which TensorRT the graph is ready."""
    versions = readiness_report(bundle).versions
    ready = [version.tensorrt for version in versions if version.ready]
    others = [version.tensorrt for version in versions if not version.ready]
    line = f"TensorRT: by the rules of `check` ready for {', '.join(ready) or 'none'}"
    return f"{line}, not for {', '.join(others)}" if others else line


def _shown(path: Path) -> Path:
    """Relative to the working directory where it lies inside, as the user would type it."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def print_report(report: ParityReport) -> None:
    """The comparisons on stdout, what could not be compared on stderr."""
    OUT.print(_parity_table(report))
    answers = report.decoder
    if answers is not None:
        verdict = "not judged" if not answers.judged else "ok" if answers.passed else "FAILED"
        OUT.print(
            f"decoder {decoder_name(answers.precision, answers.kv_cache)} = transformers: "
            f"{answers.identical} of {answers.prompts} answers of {answers.new_tokens} tokens identical, "
            f"{answers.first_token_same} begin alike  {verdict}"
        )
    for reason in report.skipped:
        say(f"not compared: {reason}")


def _parity_table(report: ParityReport) -> Any:
    """The comparisons of a report, one line each."""
    precision = report.precision_name or report.precision.value
    made = table(
        "compared",
        "budget>",
        "token error>",
        "cosine>",
        "saliency error>",
        "overlap>",
        "equal sets>",
        "",
        title=f"parity, {report.method} {precision}, {len(report.pictures)} pictures",
    )
    for item in report.comparisons:
        rows = item.token_cosine < 1.0 or item.token_error > 0.0
        made.add_row(
            f"{item.left} = {item.right}",
            str(item.budget),
            f"{item.token_error:.1e}" if rows else "-",
            f"{item.token_cosine:.6f}" if rows else "-",
            "-" if item.saliency_error is None else f"{item.saliency_error:.1e}",
            f"{item.overlap:.3f}",
            f"{item.same_sets}/{item.pictures}",
            "ok" if item.passed else "FAILED",
        )
    return made
