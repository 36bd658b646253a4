"""What a pruned bundle is compared with: the same checkpoint, exporter and precision, with no selection or a blind one.

    plain      the encoder without selection: what pruning costs or saves altogether
    uniform    fixed positions, gathered as the pruned ones are: what is left is the price of deciding

Both have the signature of a pruned graph, so whatever compiles, runs or times a bundle does it with these as well.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from holov_export import __version__
from holov_export.bundle import (
    NEWLINE,
    SCHEMA,
    TOKENIZER,
    VISION,
    Bundle,
    Manifest,
    artifacts_in,
    atomic_folder,
    graph_file,
    graph_tensors,
    label_of,
    provenance,
    write_manifest,
)
from holov_export.errors import ParityError, UnknownNameError
from holov_export.policies import NoSelection, UniformPolicy
from holov_export.runtime.runner_ort import OrtRunner
from holov_export.spec import ExportPlan, opset_of
from holov_export.tensors import VisualTokens
from holov_export.verify.backends import CPU_PRECISIONS
from holov_export.verify.machine import installed_libraries
from holov_export.verify.parity import Comparison, compare, tolerance_of
from holov_export.verify.pictures import default_pictures, pixels_for

#: name -> policy that the manifest of such a bundle names
BASELINES: dict[str, NoSelection | UniformPolicy] = {"plain": NoSelection(), "uniform": UniformPolicy()}


def baseline_of(
    bundle: Bundle,
    checkpoint: Path,
    output: Path,
    *,
    kind: str = "plain",
    overwrite: bool = False,
    verify: bool = True,
    tell: Callable[[str], None] = lambda message: None,
) -> Bundle:
    """Export the encoder of a bundle once more with another selection or none, and compare the two at K = N.

    A model with a tower of its own for clips gets both graphs.

    Args:
        bundle: a pruned one. checkpoint: directory of the weights that it was exported from.
        output: folder of the new bundle. kind: a name of `BASELINES`.
        verify: refuse it if its rows are not those of the pruned graph; if that one merges rows, of another graph of
            the bundle that does not, if there is one.

    Raises:
        UnknownNameError: another kind.
        ParityError: the rows of the two graphs differ, or the exporter did not keep the signature.
        CheckpointError: the checkpoint lacks a tensor.
        EnvironmentFaultError: torch or the exporter is not installed, or the disk is full.
    """
    if kind not in BASELINES:
        raise UnknownNameError(f"unknown baseline '{kind}'.", hint=f"Known: {', '.join(BASELINES)}.")
    changes = {"policy": BASELINES[kind], "cuts": (), "also": (), "decoder": None, "part": "image"}
    usual = {"quantization": None, "opset": opset_of(bundle.manifest.plan.precision)}  # a quantised one: as before
    plan = bundle.manifest.plan.model_copy(update={**changes, **usual})
    tell(f"export the baseline '{kind}' ({plan.precision.value})")
    with atomic_folder(output, overwrite=overwrite) as work:
        for part in plan.parts:
            label = label_of("", part)
            _write_graph(plan.of_part(part), checkpoint, work, graph_file(label) if label else VISION)
        shutil.copyfile(bundle.tokenizer, work / TOKENIZER)
        if plan.keeps_newlines:
            shutil.copyfile(bundle.folder / NEWLINE, work / NEWLINE)
        inputs, outputs = (graph_tensors(side) for side in plan.signature)
        manifest = Manifest(
            schema_version=SCHEMA,
            plan=plan,
            inputs=inputs,
            outputs=outputs,
            artifacts=artifacts_in(work),
            provenance=provenance(__version__, {item.name: item.version for item in installed_libraries()}),
        )
        write_manifest(work, manifest)
        pruned = _with_plain_rows(bundle)
        if verify and pruned is not None and plan.precision in CPU_PRECISIONS:
            tell(f"compare: {kind}")
            for part in plan.parts:
                sides = Bundle(work, manifest).of_part(part), pruned.of_part(part)
                refuse_if_different(compare_with_pruned(*sides), bundle.manifest.plan)
    return Bundle(output, manifest)


def _with_plain_rows(bundle: Bundle) -> Bundle | None:
    """The bundle's own graph, or another one, whose rows at K = N are the plain encoder's; None if all merge some."""
    views = [bundle, *(bundle.of_method(name) for name in bundle.methods)]
    return next((view for view in views if not view.manifest.plan.policy.merges), None)


def _write_graph(plan: ExportPlan, checkpoint: Path, work: Path, name: str) -> None:
    from holov_export.export.onnx_from_graph import forget_graph, onnx_from_graph, save_vision
    from holov_export.vision.families import vision_from_plan
    from holov_export.vision.loading import forget_weights
    from holov_export.vision.weights import SafetensorsReader

    with SafetensorsReader(checkpoint) as reader:
        module = vision_from_plan(plan, reader)
    model = onnx_from_graph(module, plan)
    save_vision(model, work, name)
    forget_graph(model)
    forget_weights(module)


def compare_with_pruned(baseline: Bundle, pruned: Bundle) -> Comparison:
    """Both graphs at K = N on two pictures, in ONNX Runtime on the CPU: the rows must be the same."""
    plan = baseline.manifest.plan
    pixels = pixels_for(plan, [picture for _, picture in default_pictures()[-2:]])
    tokens = max((layout.tokens for layout in pixels.layouts), default=plan.tokens)
    sides: list[VisualTokens] = []
    for bundle in (baseline, pruned):
        with OrtRunner(bundle, provider="cpu") as runner:
            sides.append(runner.run(pixels, tokens, saliency=False))
    names = (plan.policy.method, "pruned")
    return compare(sides[0], sides[1], names=names, budget=tokens, tolerance=tolerance_of(pruned.manifest.plan))


def refuse_if_different(comparison: Comparison, pruned: ExportPlan) -> None:
    """Judge the rows at common positions alone: a rule that is not lossless at N may lack some.

    Raises:
        ParityError: they differ by more than the tolerance of the pruned graph.
    """
    if not comparison.token_error <= tolerance_of(pruned).tokens:
        raise ParityError(
            f"the baseline's rows differ from the pruned graph's at K = N: error {comparison.token_error:.2e}.",
            hint="The checkpoint may not be the one that the bundle was exported from.",
        )
