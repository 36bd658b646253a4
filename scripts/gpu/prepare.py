#!/usr/bin/env python3
"""Everything that a GPU run needs and that needs torch: a checkpoint, its bundles, and reference outputs on the CPU.

    scripts/gpu/prepare --work DIR               LLaVA-1.5-7B's vision side at true size, random weights
    scripts/gpu/prepare --work DIR --size tiny   a model of some hundred kilobytes, to rehearse
    scripts/gpu/prepare --work DIR --families llava-next-7b,qwen2.5-vl-7b    these as well, at true size some minutes
                                                 and 2 GB each; not by default

Writes into DIR:

    bundles/holov-PRECISION  scope-  plain-  uniform-      what `measure` builds engines from
    bundles/holov-int8  holov-fp16-int8  holov-fp16-fp8    the first of them quantised (--quantized); fp8 where the GPU
                                                           of this machine has it
    reference-holov.npz  reference-scope.npz               pixels, and per budget what the float32 graph gives in ONNX
                                                           Runtime on the CPU
    bundles/FAMILY-holov-PRECISION  FAMILY-plain-          of each further family, and reference-FAMILY.npz
    prepare.json             steps, times, sizes

Random weights have a peaky CLS row by construction (see make_sparse_checkpoint), so quotas differ between crops, but
nothing is known of how a trained model's near-ties fall.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1]), str(Path(__file__).parents[2] / "tests")]

from pictures import pixels_of  # noqa: E402
from steps import Steps, names, numbers  # noqa: E402

from holov_export import gpu  # noqa: E402
from holov_export.bundle import Bundle, open_bundle  # noqa: E402
from holov_export.pipeline import export_bundle  # noqa: E402
from holov_export.pipeline_quantized import quantize_bundle  # noqa: E402
from holov_export.policies import policy_from_settings  # noqa: E402
from holov_export.request import ExportRequest, QuantizeRequest  # noqa: E402
from holov_export.runtime.runner import joined  # noqa: E402
from holov_export.runtime.runner_ort import OrtRunner  # noqa: E402
from holov_export.spec import Precision, QuantizedType  # noqa: E402
from holov_export.verify.baselines import BASELINES, baseline_of  # noqa: E402
from holov_export.verify.bench_engines import DEFAULT_SHARES  # noqa: E402

#: the rules that engines are built of; the first is what is compared with the baselines
METHODS = ("holov", "scope")
#: further models, as `make_sparse_checkpoint` names them, and the tiny ones of the tests
FAMILIES = {"llava-next-7b": "llava_next", "qwen2.5-vl-7b": "qwen2_5_vl", "video-llava-7b": "video_llava"}
#: quantised bundles by name: the float bundle that each is made of, and the type of its products
QUANTIZED = {
    "int8": (Precision.FP32, QuantizedType.INT8),
    "fp16-int8": (Precision.FP16, QuantizedType.INT8),
    "fp16-fp8": (Precision.FP16, QuantizedType.FP8),
}
#: the calibration of all of them; random weights lose what they lose, so no limit is asked of them
RECIPE = "smoke-8"
#: the first compute capability with 8-bit floats. Source: TensorRT support matrix, "Hardware and Precision"
SM_OF_FP8 = 89
#: pictures, and shares of their tokens, in the reference of a further family: their towers take long on a CPU
FEW_PICTURES, FEW_SHARES = 3, ((1, 3), (1, 9))


def write_checkpoint_of_size(size: str, folder: Path, family: str = "") -> None:
    """A directory with random weights: true size (14 GB of which the language model is a hole) or tiny."""
    if size == "true":
        from make_sparse_checkpoint import DEFAULT, write_checkpoint

        write_checkpoint(folder, name=family or DEFAULT)
    elif family:
        from family_checkpoints import write_family

        write_family(folder, FAMILIES[family])
    else:
        from checkpoints import write_checkpoint as write_tiny

        write_tiny(folder)


def export(checkpoint: Path, output: Path, precision: Precision, method: str) -> Bundle:
    """The vision graph without a decoder; `measure` compares it with the reference, so no parity report here."""
    request = ExportRequest(
        model=str(checkpoint),
        policy=policy_from_settings(method),
        precision=precision,
        decoder=None,
        output=output,
        overwrite=True,
        verify=False,
    )
    return export_bundle(request)[0]


def write_reference(bundle: Bundle, path: Path, pictures: int, budgets: tuple[int, ...]) -> dict[str, Any]:
    """Run the float32 graph on the CPU, two pictures at a time, at every budget.

    Packed pixels are not written: `measure` makes them again, with their layouts. Their budgets, where none are named,
    are shares of the largest picture's tokens.
    """
    pixels = pixels_of(bundle, pictures)
    method, packed = bundle.manifest.plan.policy.method, bundle.manifest.plan.packed
    if packed and not budgets:
        budgets = _shares(max(layout.tokens for layout in pixels.layouts), FEW_SHARES)
    arrays: dict[str, Any] = {"budgets": np.array(budgets), "method": method, "pictures": pictures}
    arrays |= {"model": bundle.manifest.plan.model.family} if packed else {"pixels": pixels.pixel_values}
    with OrtRunner(bundle, provider="cpu") as runner:
        for budget in budgets:
            found = joined([runner.run(pixels.part(at, at + 2), budget, saliency=True) for at in range(0, pictures, 2)])
            arrays |= {
                f"tokens_{budget}": found.tokens,
                f"positions_{budget}": found.positions,
                f"counts_{budget}": found.counts,
                "saliency": found.saliency,
            }
        name = runner.name
    np.savez(path, **arrays)
    return {
        "method": method,
        "model": bundle.manifest.plan.model.name,
        "engine": name,
        "pictures": pictures,
        "budgets": list(budgets),
        "bytes": path.stat().st_size,
    }


def _shares(tokens: int, shares: tuple[tuple[int, int], ...]) -> tuple[int, ...]:
    return tuple(dict.fromkeys(max(1, round(tokens * over / under)) for over, under in shares))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder to write into")
    parser.add_argument("--size", choices=["true", "tiny"], default="true", help="of the model (true)")
    parser.add_argument("--precision", choices=["fp16", "fp32"], default="fp16", help="of the bundles (fp16)")
    parser.add_argument("--budgets", type=numbers, default=(), help="of the reference (all, a third, 2/9, a ninth)")
    parser.add_argument("--pictures", type=int, default=8, help="in the reference (8)")
    parser.add_argument("--minutes", type=float, default=8.0, help="no step begins after them (8)")
    parser.add_argument("--quantized", default="auto", help=f"{', '.join(QUANTIZED)}; comma, or none (those that fit)")
    parser.add_argument("--families", type=names, default=(), help=f"further models: {', '.join(FAMILIES)}; comma")
    options = parser.parse_args()
    unknown = [name for name in options.families if name not in FAMILIES]
    if unknown:
        parser.error(f"unknown family '{unknown[0]}'; known: {', '.join(FAMILIES)}")
    kinds = quantized_kinds(options.quantized)
    unknown = [name for name in kinds if name not in QUANTIZED]
    if unknown:
        parser.error(f"unknown quantisation '{unknown[0]}'; known: {', '.join(QUANTIZED)}, auto, none")
    steps = Steps(options.work / "prepare.json", options.minutes)
    prepare(steps, options.work, options.size, Precision(options.precision), options.budgets, options.pictures)
    prepare_quantized(steps, options.work, kinds)
    for family in options.families:
        prepare_family(steps, options.work, options.size, Precision(options.precision), family)
    made = [open_bundle(path, verify="size") for path in sorted((options.work / "bundles").iterdir())]
    steps.found["bundle_bytes"] = {one.folder.name: sum(item.bytes for item in one.manifest.artifacts) for one in made}
    steps.write()
    for entry in steps.failed:
        print(f"{entry['outcome']}: {entry['step']}: {entry['reason']}", file=sys.stderr)
    return 1 if steps.failed else 0


def prepare(steps: Steps, work: Path, size: str, precision: Precision, budgets: tuple[int, ...], pictures: int) -> None:
    """All steps; what is there already is made anew."""
    checkpoint, bundles = work / "checkpoint" / "llava-1.5-7b", work / "bundles"
    bundles.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(checkpoint.parent, ignore_errors=True)
    checkpoint.parent.mkdir(parents=True)
    pruned = bundles / f"{METHODS[0]}-{precision.value}"
    steps.found["references"] = []

    def baseline(kind: str) -> Bundle:
        like, out = open_bundle(pruned, verify="size"), bundles / f"{kind}-{precision.value}"
        return baseline_of(like, checkpoint, out, kind=kind, overwrite=True, verify=size == "tiny")

    def reference(method: str) -> None:
        whole = export(checkpoint, work / "reference-fp32", Precision.FP32, method)
        chosen = budgets or _shares(whole.manifest.plan.tokens, DEFAULT_SHARES)
        said = write_reference(whole, work / f"reference-{method}.npz", pictures, chosen)
        steps.found["references"].append(said)
        shutil.rmtree(work / "reference-fp32")

    steps.run("write the checkpoint", partial(write_checkpoint_of_size, size, checkpoint))
    for number, method in enumerate(METHODS):
        out = bundles / f"{method}-{precision.value}"
        steps.run(f"export {out.name}", partial(export, checkpoint, out, precision, method))
        steps.run(f"the reference of {method}", partial(reference, method))
        for kind in BASELINES if number == 0 else ():
            steps.run(f"export {kind}-{precision.value}", partial(baseline, kind))


def quantized_kinds(asked: str) -> tuple[str, ...]:
    """Names of quantised bundles; "auto" is all that the GPU of this machine can run, and without one the int8 ones."""
    if asked == "none":
        return ()
    if asked != "auto":
        return names(asked)
    found = gpu.probe()
    floats = isinstance(found, gpu.Gpu) and found.sm >= SM_OF_FP8
    return tuple(name for name, (_, kind) in QUANTIZED.items() if kind is QuantizedType.INT8 or floats)


def prepare_quantized(steps: Steps, work: Path, kinds: tuple[str, ...]) -> None:
    """The pruned bundle, quantised in each of these ways; a float one that is missing is exported for it."""
    checkpoint, bundles = work / "checkpoint" / "llava-1.5-7b", work / "bundles"

    def quantize(name: str, base: Precision, kind: QuantizedType) -> Bundle:
        source, passing = bundles / f"{METHODS[0]}-{base.value}", work / f"quantize-{base.value}"
        if not source.is_dir():
            export(checkpoint, passing, base, METHODS[0])
        request = QuantizeRequest(type=kind, recipe=RECIPE, accept_loss=True)
        opened = open_bundle(source if source.is_dir() else passing, verify="size")
        made = quantize_bundle(opened, request, bundles / f"{METHODS[0]}-{name}", overwrite=True)
        report = made.reports[0].model_dump(mode="json")
        steps.found.setdefault("quantized", []).append({"bundle": made.bundle.folder.name, "report": report})
        shutil.rmtree(passing, ignore_errors=True)
        return made.bundle

    for name in kinds:
        steps.run(f"quantise {METHODS[0]}-{name}", partial(quantize, name, *QUANTIZED[name]))


def prepare_family(steps: Steps, work: Path, size: str, precision: Precision, family: str) -> None:
    """A pruned and a plain bundle of a further family, and what its packed float32 graph gives."""
    checkpoint, pruned = work / "checkpoint" / family, work / "bundles" / f"{family}-{METHODS[0]}-{precision.value}"
    shutil.rmtree(checkpoint, ignore_errors=True)

    def plain() -> Bundle:
        out = pruned.with_name(f"{family}-plain-{precision.value}")
        return baseline_of(open_bundle(pruned, verify="size"), checkpoint, out, overwrite=True, verify=size == "tiny")

    def reference() -> None:
        whole = export(checkpoint, work / "reference-fp32", Precision.FP32, METHODS[0])
        packed = whole.of_part(whole.manifest.plan.parts[-1])
        steps.found["references"].append(write_reference(packed, work / f"reference-{family}.npz", FEW_PICTURES, ()))
        shutil.rmtree(work / "reference-fp32")

    steps.run(f"write the checkpoint of {family}", partial(write_checkpoint_of_size, size, checkpoint, family))
    steps.run(f"export {pruned.name}", partial(export, checkpoint, pruned, precision, METHODS[0]))
    steps.run(f"the reference of {family}", reference)
    steps.run(f"export {family}-plain-{precision.value}", plain)
    shutil.rmtree(checkpoint, ignore_errors=True)  # the weights of its tower are in the bundles


if __name__ == "__main__":
    sys.exit(main())
