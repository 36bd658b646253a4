#!/usr/bin/env python3
"""Everything that a GPU run needs and that needs torch: a checkpoint, its bundles, and reference outputs on the CPU.

    scripts/gpu/prepare --work DIR               LLaVA-1.5-7B's vision side at true size, random weights
    scripts/gpu/prepare --work DIR --size tiny   a model of some hundred kilobytes, to rehearse

Writes into DIR:

    bundles/holov-PRECISION  scope-  plain-  uniform-      what `measure` builds engines from
    reference-holov.npz  reference-scope.npz               pixels, and per budget what the float32 graph gives in ONNX
                                                           Runtime on the CPU
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

from steps import Steps, numbers  # noqa: E402

from holov_export.bundle import Bundle, open_bundle  # noqa: E402
from holov_export.pipeline import export_bundle  # noqa: E402
from holov_export.policies import policy_from_settings  # noqa: E402
from holov_export.request import ExportRequest  # noqa: E402
from holov_export.runtime.preprocess import pixels_from_images  # noqa: E402
from holov_export.runtime.runner_ort import OrtRunner  # noqa: E402
from holov_export.spec import Precision  # noqa: E402
from holov_export.tensors import PixelBatch  # noqa: E402
from holov_export.verify.baselines import BASELINES, baseline_of  # noqa: E402
from holov_export.verify.bench_engines import DEFAULT_SHARES  # noqa: E402
from holov_export.verify.pictures import default_pictures  # noqa: E402

#: the rules that engines are built of; the first is what is compared with the baselines
METHODS = ("holov", "scope")


def write_checkpoint_of_size(size: str, folder: Path) -> None:
    """A LLaVA directory with random weights: true size (14 GB of which the language model is a hole) or tiny."""
    if size == "true":
        from make_sparse_checkpoint import write_checkpoint

        write_checkpoint(folder)
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


def pictures_of(bundle: Bundle, count: int) -> PixelBatch:
    """`count` different pictures: the default ones, then mirrored and turned ones."""
    known = [picture for _, picture in default_pictures()]
    made = [known[index % len(known)].rotate(90 * (index // len(known)), expand=True) for index in range(count)]
    return pixels_from_images(made, bundle.manifest.plan.model.image)


def write_reference(bundle: Bundle, path: Path, pictures: int, budgets: tuple[int, ...]) -> dict[str, Any]:
    """Run the float32 graph on the CPU, two pictures at a time, at every budget."""
    pixels = pictures_of(bundle, pictures)
    method = bundle.manifest.plan.policy.method
    arrays: dict[str, Any] = {"pixels": pixels.pixel_values, "budgets": np.array(budgets), "method": method}
    with OrtRunner(bundle, provider="cpu") as runner:
        for budget in budgets:
            parts = []
            for start in range(0, pictures, 2):
                few = slice(start, start + 2)
                part = PixelBatch(pixels.pixel_values[few], pixels.boxes[few], pixels.sizes[few])
                parts.append(runner.run(part, budget, saliency=True))
            arrays |= {
                f"tokens_{budget}": np.concatenate([part.tokens for part in parts]),
                f"positions_{budget}": np.concatenate([part.positions for part in parts]),
                f"counts_{budget}": np.concatenate([part.counts for part in parts]),
            }
            arrays["saliency"] = np.concatenate([part.saliency for part in parts if part.saliency is not None])
        name = runner.name
    np.savez(path, **arrays)
    return {
        "method": method,
        "engine": name,
        "pictures": pictures,
        "budgets": list(budgets),
        "bytes": path.stat().st_size,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder to write into")
    parser.add_argument("--size", choices=["true", "tiny"], default="true", help="of the model (true)")
    parser.add_argument("--precision", choices=["fp16", "fp32"], default="fp16", help="of the bundles (fp16)")
    parser.add_argument("--budgets", type=numbers, default=(), help="of the reference (all, a third, 2/9, a ninth)")
    parser.add_argument("--pictures", type=int, default=8, help="in the reference (8)")
    parser.add_argument("--minutes", type=float, default=8.0, help="no step begins after them (8)")
    options = parser.parse_args()
    steps = Steps(options.work / "prepare.json", options.minutes)
    prepare(steps, options.work, options.size, Precision(options.precision), options.budgets, options.pictures)
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
        tokens = whole.manifest.plan.model.vision.tokens
        chosen = budgets or tuple(dict.fromkeys(max(1, round(tokens * a / b)) for a, b in DEFAULT_SHARES))
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
    made = [open_bundle(path, verify="size") for path in sorted(bundles.iterdir())]
    steps.found["bundle_bytes"] = {one.folder.name: sum(item.bytes for item in one.manifest.artifacts) for one in made}
    steps.write()


if __name__ == "__main__":
    sys.exit(main())
