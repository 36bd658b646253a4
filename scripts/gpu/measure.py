#!/usr/bin/env python3
"""Build the engine of every bundle given, compare it with the reference, and measure: one command, one JSON file.

    scripts/gpu/measure DIR/bundles/* --reference DIR/reference-*.npz --target h200 --minutes 8 --json OUT.json

Needs TensorRT and what runs an engine; neither torch nor ONNX Runtime. In this order, so that what matters most is
there when time runs out:

    builds      the first pruned bundle, the baselines, the rest: seconds, bytes, layers; a plain encoder is tuned for
                K = N, the others as the target says
    parity      a pruned engine, once it is built, against the float32 reference: kept sets, token error and cosine,
                all (B, K); those of quantised bundles as well
    shapes      its profiles at their corners and between, without a rebuild
    bench       all engines in interleaved rounds at each batch, the pruned one without CUDA graphs as well
    callers     several threads over one runner
    packed      then the bundles of graphs that see pictures of unequal size, each family by itself

Quantised bundles that this TensorRT or GPU cannot have (float16 scales before TensorRT 9, 8-bit floats before sm_89)
are under `refused` with the reason, and no failure.

The file is replaced as a whole after every step; a step that fails is noted in it and the others go on. Each engine is
built by a process of its own, so that a crash of TensorRT's builder, or a build without end, loses that engine only.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))

from fitting import fitting, named
from packed import by_family, check_packed
from pictures import pictures
from steps import Steps, numbers

from holov_export.bundle import Bundle, open_bundle
from holov_export.compile.compilation import CompileOptions, engine_folder, engine_label
from holov_export.compile.engine_from_onnx import engine_from_bundle
from holov_export.engine import LAYERS, RECORD, Engine, read_engine
from holov_export.errors import HolovExportError
from holov_export.runtime.runner import Runner
from holov_export.runtime.runner_trt import TrtRunner
from holov_export.targets import EngineTarget, target_from_name
from holov_export.tensors import CropBox, PixelBatch, VisualTokens
from holov_export.verify.bench_engines import Contestant
from holov_export.verify.bench_run import BenchRequest, bench
from holov_export.verify.bench_tensorrt import engine_for_comparison, tensorrt_contestant
from holov_export.verify.parity import compare, tolerance_of

#: methods that do not look at the picture: baselines
BLIND = ("none", "uniform")
#: seconds that a step needs at least, so that none begins that cannot end
BUILD_SECONDS, BENCH_SECONDS, SHORT_SECONDS = 60.0, 20.0, 5.0
#: what the build of a baseline leaves for measuring what is built already
RESERVED_SECONDS = 90.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundles", type=Path, nargs="+", help="folders of bundles, the pruned ones first or not")
    parser.add_argument("--reference", type=Path, nargs="+", default=(), help="of scripts/gpu/prepare, by method")
    parser.add_argument("--target", required=True, help="a name of `holov-export targets`, or a TOML file")
    parser.add_argument("--minutes", type=float, default=8.0, help="no step begins after them (8)")
    parser.add_argument("--budgets", type=numbers, default=(), help="to measure (all, a third, two ninths, a ninth)")
    parser.add_argument("--batches", type=numbers, default=(1, 4, 16), help="to measure (1,4,16)")
    parser.add_argument("--callers", type=numbers, default=(1, 2, 4, 8, 16, 32), help="threads (1,2,4,8,16,32)")
    parser.add_argument("--seconds", type=float, default=1.5, help="of interleaved rounds for each case (1.5)")
    parser.add_argument("--level", type=int, help="TensorRT's builder optimisation level instead of the target's")
    parser.add_argument(
        "--profile", action="append", default=[], help="batch=1:16:32,budget=1:64:576 instead of the target's; repeat"
    )
    parser.add_argument("--prefer", action="store_true", help="TensorRT 8 may ignore a pin instead of failing")
    parser.add_argument("--keep", action="store_true", help="use engines that are there already")
    parser.add_argument("--memory", default="auto", help="cuda-python, torch or auto (auto)")
    parser.add_argument("--json", type=Path, required=True, help="where the results go")
    parser.add_argument("--here", action="store_true", help="build in this process, not in one of its own")
    parser.add_argument("--build-like", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--part", default="image", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.build_like is not None:  # the child of `build_in_child`
        opened = (open_bundle(folder, verify="size") for folder in (options.bundles[0], options.build_like))
        bundle, like = (one.of_part(options.part) for one in opened)
        try:
            build_here(bundle, like, target_from_name(options.target), options, partial(print, file=sys.stderr))
        except HolovExportError as error:
            print(error, file=sys.stderr)
            return error.exit_code
        return 0
    steps = Steps(options.json, options.minutes)
    measure(steps, options)
    print(summary(steps.found))
    for entry in steps.failed:
        print(f"{entry['outcome']}: {entry['step']}: {entry['reason']}", file=sys.stderr)
    return 1 if steps.failed else 0


def measure(steps: Steps, options: argparse.Namespace) -> None:
    """All steps."""
    target = target_from_name(options.target)
    steps.found |= {"target": target.name, "builds": [], "parity": [], "shapes": [], "bench": []}
    found = fitting(steps, [open_bundle(folder, verify="size") for folder in options.bundles], target)
    packed = by_family(found)
    opened = [bundle for bundle in found if not bundle.of_part(bundle.manifest.plan.parts[-1]).manifest.plan.packed]
    if opened:
        measure_square(steps, opened, target, options)
    for family in packed:
        measure_packed(steps, family, target, options)


def measure_square(steps: Steps, opened: list[Bundle], target: EngineTarget, options: argparse.Namespace) -> None:
    """The bundles whose pictures all have the same number of tokens."""
    opened.sort(key=lambda bundle: bundle.manifest.plan.policy.method in BLIND)
    pruned = opened[0]
    opened[1:] = sorted(opened[1:], key=lambda bundle: bundle.manifest.plan.policy.method not in BLIND)
    built = []
    for bundle in opened:
        action = partial(build, steps, bundle, pruned, target, options)
        if steps.run(f"build {bundle.folder.name}", action, needs=BUILD_SECONDS) is None:
            continue
        built.append(bundle)
        if bundle.manifest.plan.policy.method not in BLIND:
            check(steps, bundle, target, options)
    for batch in options.batches if built else ():
        action = partial(compare_speed, steps, built, target, options, batch)
        steps.run(f"bench B={batch}", action, needs=BENCH_SECONDS)
    if built:
        action = partial(callers, steps, built[0], target, options)
        steps.run(f"callers {built[0].folder.name}", action, needs=BENCH_SECONDS)


def measure_packed(steps: Steps, family: list[Bundle], target: EngineTarget, options: argparse.Namespace) -> None:
    """The bundles of one model: engines, comparison, shapes, and one benchmark of one picture at a time."""
    family.sort(key=lambda bundle: bundle.manifest.plan.policy.method in BLIND)
    entry = {"model": family[0].manifest.plan.model.name, "part": family[0].part, "parity": [], "shapes": []}
    steps.found.setdefault("packed", []).append(entry)
    built = []
    for bundle in family:
        action = partial(build, steps, bundle, family[0], target, options)
        if steps.run(f"build {bundle.folder.name}", action, needs=BUILD_SECONDS) is None:
            continue
        built.append(bundle)
        if bundle.manifest.plan.policy.method not in BLIND:
            runner = partial(runner_of, target=target, options=options)
            check_packed(steps, entry, bundle, options.reference, runner, kept_in_common)
    if built:
        action = partial(packed_speed, entry, built, target, options)
        steps.run(f"bench {built[0].folder.name}", action, needs=BENCH_SECONDS)


def packed_speed(
    entry: dict[str, Any], built: Sequence[Bundle], target: EngineTarget, options: argparse.Namespace
) -> None:
    """The engines of a family side by side, on one large picture."""
    contestants: list[Contestant] = []
    try:
        for bundle in built:
            one = tensorrt_contestant(bundle, bundle.folder.name, target=target, memory=options.memory)
            contestants.append(replace(one, profiled=bundle.manifest.plan.policy.method not in BLIND))
        asked = BenchRequest(
            batches=(1,), seconds=options.seconds, sustain=0.5, pictures=tuple(pictures(1, large=True))
        )
        entry["bench"] = _report(contestants, asked)
    finally:
        for one in contestants:
            one.runner.close()


def check(steps: Steps, bundle: Bundle, target: EngineTarget, options: argparse.Namespace) -> None:
    """Whether an engine gives what it should, as soon as it is built."""
    for path in options.reference:
        reference = np.load(path)  # those of packed graphs name their model
        if "model" not in reference and str(reference["method"]) == bundle.manifest.plan.policy.method:
            action = partial(parity, steps, bundle, target, options, path)
            steps.run(f"compare {bundle.folder.name}", action, needs=SHORT_SECONDS)
    steps.run(f"shapes {bundle.folder.name}", partial(shapes, steps, bundle, target, options), needs=SHORT_SECONDS)


def build(steps: Steps, bundle: Bundle, like: Bundle, target: EngineTarget, options: argparse.Namespace) -> Engine:
    """The engine, and what it took."""
    folder = engine_folder(bundle.folder, engine_label(target.name, bundle), CompileOptions())
    messages: list[str] = []
    if not (options.keep and (folder / RECORD).is_file()):
        if options.here:
            build_here(bundle, like, target, options, messages.append)
        else:
            reserve = 0.0 if bundle.folder == like.folder else RESERVED_SECONDS
            messages = build_in_child(bundle, like, options, steps.seconds_left - reserve)
    engine = read_engine(folder)
    record = engine.record.model_dump(mode="json")
    layers = engine.folder / LAYERS
    record |= named(bundle)
    record |= {"bundle": bundle.folder.name, "method": bundle.manifest.plan.policy.method, "messages": messages[-20:]}
    record["layers"] = _layer_count(layers) if layers.is_file() else None
    steps.found["builds"].append(record)
    return engine


def build_here(
    bundle: Bundle, like: Bundle, target: EngineTarget, options: argparse.Namespace, tell: Callable[[str], None]
) -> None:
    """Build with the target's settings; a baseline as the bundle that it is compared with."""
    asked = CompileOptions(optimization_level=options.level, profiles=tuple(options.profile), prefer=options.prefer)
    if bundle.folder == like.folder or bundle.manifest.plan.policy.method not in BLIND:
        engine_from_bundle(bundle, target, asked, tell=tell)
    else:
        engine_for_comparison(bundle, like, target, asked, tell=tell)


def build_in_child(bundle: Bundle, like: Bundle, options: argparse.Namespace, seconds: float) -> list[str]:
    """The same in a process of its own, for so many seconds at most. Returns what it said."""
    line = [sys.executable, __file__, str(bundle.folder), "--build-like", str(like.folder), "--target", options.target]
    line += ["--part", bundle.part, "--json", str(options.json)]
    line += ["--level", str(options.level)] if options.level is not None else []
    line += [word for profile in options.profile for word in ("--profile", profile)]
    line += ["--prefer"] if options.prefer else []
    try:
        ended = subprocess.run(line, capture_output=True, text=True, timeout=max(1.0, seconds), check=False)
    except subprocess.TimeoutExpired as error:
        said = (error.stderr or b"").decode(errors="replace").strip().splitlines()
        raise RuntimeError(f"the build was ended after {seconds:.0f} s; last: {' | '.join(said[-3:])}") from None
    said = ended.stderr.strip().splitlines()
    if ended.returncode:
        raise RuntimeError(f"the build ended with {ended.returncode}: {' | '.join(said[-6:])}")
    return said


def _layer_count(path: Path) -> int | None:
    found = json.loads(path.read_text(encoding="utf-8"))
    layers = found.get("Layers") if isinstance(found, dict) else found
    return len(layers) if isinstance(layers, list) else None


# ---------------------------------------------------------------------------------------------------- parity


def runner_of(bundle: Bundle, target: EngineTarget, options: argparse.Namespace) -> TrtRunner:
    return TrtRunner(bundle, target=target.name, memory=options.memory, saliency=True)


def parity(steps: Steps, bundle: Bundle, target: EngineTarget, options: argparse.Namespace, path: Path) -> None:
    """Every budget of the reference in batches of every size, against the float32 graph in ONNX Runtime."""
    reference = np.load(path)
    with runner_of(bundle, target, options) as runner:
        for budget in reference["budgets"].tolist():
            for batch in options.batches:
                row = compared(runner, reference, bundle, int(budget), batch)
                steps.found["parity"].append({"bundle": bundle.folder.name, **named(bundle), **row})
                steps.write()


def compared(runner: Runner, reference: Any, bundle: Bundle, budget: int, batch: int) -> dict[str, Any]:
    """One line of the report. The pictures of the reference are repeated where a batch has room for more."""
    pixels = reference["pixels"]
    index = np.arange(max(batch, len(pixels) - len(pixels) % batch)) % len(pixels)
    parts = [
        runner.run(_batch(pixels[index[at : at + batch]]), budget, saliency=True) for at in range(0, len(index), batch)
    ]
    ours = _joined(parts)
    theirs = VisualTokens(
        reference[f"tokens_{budget}"][index],
        reference[f"positions_{budget}"][index],
        reference[f"counts_{budget}"][index],
        reference["saliency"][index],
    )
    names = ("tensorrt", "onnxruntime fp32")
    found = compare(ours, theirs, names=names, budget=budget, tolerance=tolerance_of(bundle.manifest.plan))
    return {"batch": batch, "kept_in_common": kept_in_common(ours, theirs), **found.model_dump(mode="json")}


def kept_in_common(ours: VisualTokens, theirs: VisualTokens) -> float:
    """Share of the reference's kept tokens that are kept here as well, over all pictures together."""
    common = kept = 0
    for mine, other in zip(ours.positions, theirs.positions, strict=True):
        wanted = set(other[other >= 0].tolist())
        common, kept = common + len(wanted & set(mine.tolist())), kept + len(wanted)
    return round(common / kept, 6) if kept else 1.0


def _batch(pixels: Any) -> PixelBatch:
    side = pixels.shape[-1]
    return PixelBatch(pixels, (CropBox(0, 0, side, side),) * len(pixels), ((side, side),) * len(pixels))


def _joined(parts: Sequence[VisualTokens]) -> VisualTokens:
    return VisualTokens(
        np.concatenate([part.tokens for part in parts]),
        np.concatenate([part.positions for part in parts]),
        np.concatenate([part.counts for part in parts]),
        np.concatenate([part.saliency for part in parts if part.saliency is not None]),
    )


def shapes(steps: Steps, bundle: Bundle, target: EngineTarget, options: argparse.Namespace) -> None:
    """Run every profile at its corners and between; note each (B, K) with what was wrong, or nothing."""
    dice = np.random.default_rng(0)
    side = bundle.manifest.plan.model.vision.image_size
    with runner_of(bundle, target, options) as runner:
        for batch, budget in points_of(runner.engine):
            pixels = dice.standard_normal((batch, 3, side, side), dtype=np.float32)
            quota = [max(1, budget - image % budget) for image in range(batch)]
            problem = wrong_with(runner.run(_batch(pixels), budget, quota), budget, quota)
            entry = {"bundle": bundle.folder.name, "batch": batch, "budget": budget, "wrong": problem}
            steps.found["shapes"].append(entry)
    bad = [entry for entry in steps.found["shapes"] if entry["wrong"]]
    if bad:
        raise RuntimeError(f"{len(bad)} shapes gave wrong results, the first: {bad[0]}")


def points_of(engine: Engine) -> Iterator[tuple[int, int]]:
    """(B, K) of each profile: smallest, usual, largest, the powers of two between, and odd ones."""
    seen = set()
    for profile in engine.record.profiles:
        batches = {*profile.batch, *(size for size in (2, 3, 5, 8) if profile.batch[0] <= size <= profile.batch[2])}
        low, _, high = profile.budget
        budgets = {*profile.budget, *(size for size in (2, 17, 63, 65, 192, 577) if low <= size <= high)}
        for batch in sorted(batches):
            for budget in sorted(budgets):
                if (batch, budget) not in seen:
                    seen.add((batch, budget))
                    yield batch, budget


def wrong_with(visual: VisualTokens, budget: int, quota: Sequence[int]) -> str:
    """What a result breaks of the graph's contract; empty if nothing."""
    if visual.tokens.shape[:2] != (len(quota), budget) or visual.positions.shape != (len(quota), budget):
        return f"shapes {visual.tokens.shape}, {visual.positions.shape}"
    if visual.counts.tolist() != list(quota):
        return f"counts {visual.counts.tolist()[:8]}, asked {list(quota)[:8]}"
    if not np.isfinite(visual.tokens).all():
        return "a number that is not finite"
    for image, count in enumerate(quota):
        kept = visual.positions[image, :count]
        if len(set(kept.tolist())) != count or kept.min() < 0:
            return f"image {image}: positions that are not {count} different ones"
        if visual.tokens[image, count:].any() or (visual.positions[image, count:] != -1).any():
            return f"image {image}: padding that is not empty"
    return ""


# ---------------------------------------------------------------------------------------------------- speed


def compare_speed(
    steps: Steps, built: Sequence[Bundle], target: EngineTarget, options: argparse.Namespace, batch: int
) -> None:
    """All engines side by side; the first also without CUDA graphs."""
    contestants: list[Contestant] = []
    try:
        for bundle in built:
            one = tensorrt_contestant(bundle, bundle.folder.name, target=target, memory=options.memory)
            contestants.append(replace(one, profiled=bundle.manifest.plan.policy.method not in BLIND))
        name = f"{built[0].folder.name}, no CUDA graphs"
        one = tensorrt_contestant(built[0], name, target=target, cuda_graphs=False, memory=options.memory)
        contestants.append(replace(one, profiled=False))
        request = BenchRequest(budgets=options.budgets, batches=(batch,), seconds=options.seconds, sustain=0.5)
        steps.found["bench"].append(_report(contestants, request))
    finally:
        for one in contestants:
            one.runner.close()


def callers(steps: Steps, bundle: Bundle, target: EngineTarget, options: argparse.Namespace) -> None:
    """Threads over one runner at B = 1 and the smallest budget."""
    one = tensorrt_contestant(bundle, bundle.folder.name, target=target, memory=options.memory)
    try:
        smallest = (min(one.budgets(options.budgets)),)
        request = BenchRequest(
            budgets=smallest, batches=(1,), rounds=400, seconds=0.5, sustain=0, threads=options.callers, profile=False
        )
        steps.found["callers"] = _report([one], request)
    finally:
        one.runner.close()


def _report(contestants: Sequence[Contestant], request: BenchRequest) -> dict[str, Any]:
    said: Callable[[str], None] = lambda message: print(f"           {message}", file=sys.stderr, flush=True)  # noqa: E731
    report = bench(contestants, request, command="", tell=said)
    found: dict[str, Any] = report.model_dump(mode="json", exclude_none=True, exclude={"machine", "command", "date"})
    return found


def summary(found: dict[str, Any]) -> str:
    """Some lines for people; the file has everything."""
    lines = [
        f"{item['bundle']}: {item['build_seconds']:.0f} s, {item['bytes'] / 1e6:.0f} MB, {item['layers']} layers"
        for item in found["builds"]
    ]
    lines += [
        f"parity {item['bundle']} B={item['batch']} K={item['budget']}: {item['kept_in_common']:.2%} kept in common, "
        f"token error {item['token_error']:.1e}, cosine {item['token_cosine']:.4f}, "
        f"{'ok' if item['passed'] else 'FAILED'}"
        for item in found["parity"]
    ]
    lines += [
        f"{item['contestant']} B={item['batch']} K={item['budget']}: GPU {item['gpu']['p50']:.3f} ms, "
        f"latency {item['latency']['p50']:.3f} ms, {item['tflops']:.0f} TFLOP/s"
        for report in found["bench"]
        for item in report["cases"]
        if "gpu" in item
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
