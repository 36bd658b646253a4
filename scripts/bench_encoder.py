#!/usr/bin/env python3
"""The true-size LLaVA-1.5 vision encoder (CLIP ViT-L/14-336, projector to 4096) with random weights, side by side.

Five ways to turn pictures into visual tokens, all in one process, rounds interleaved, medians of CPU time:

    official      transformers, eager attention with output_attentions, projector on all 576, the published loop
    plain torch   transformers, SDPA, projector on all 576, no selection
    ours torch    holov_export.vision.clip.LlavaVision, the same weights
    ours ORT      the exported graph in ONNX Runtime
    plain ORT     the same exporter, all 576 tokens through the last kept layer and the projector, no selection

Before anything is timed, the outputs are checked against each other.

Ratios between torch and torch hang on torch's matrix multiplication: the faster it is, the more the attention maps of
the official way weigh. MKL uses AVX-512 on Intel processors only. On an AMD processor that has it, a preloaded library
with the line `int mkl_serv_intel_cpu_true(void) { return 1; }` doubles MKL's speed; `--note` records such a setting.
"""

from __future__ import annotations

import argparse
import gc
import logging
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any


def _threads_from_arguments() -> int:
    """Set the thread pools' size before torch is imported."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--threads", type=int, default=1)
    threads = int(parser.parse_known_args()[0].threads)
    os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = str(threads)
    return threads


THREADS = _threads_from_arguments()

import numpy as np  # noqa: E402
import onnx_ir as ir  # noqa: E402
import onnxruntime as ort  # noqa: E402
import torch  # noqa: E402
from encoder_models import WeightsInMemory, spec_of_size, transformers_models  # noqa: E402
from machine import one_line, write_result  # noqa: E402
from official_way import official_tokens  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from holov_export.export.onnx_from_graph import onnx_from_graph, save_vision  # noqa: E402
from holov_export.export.passes import clean  # noqa: E402
from holov_export.export.translations import translation_table  # noqa: E402
from holov_export.policies import HolovOfficialPolicy, HolovPolicy, NoSelection, SelectionPolicy  # noqa: E402
from holov_export.spec import CheckpointSource, ExportPlan, ModelSpec, Precision  # noqa: E402
from holov_export.verify.operations import encoder_operations, operations_of  # noqa: E402
from holov_export.vision.clip import LlavaVision, vision_from_checkpoint  # noqa: E402
from holov_export.vision.plain import PlainVision  # noqa: E402

OPSET = 18
OFFICIAL, PLAIN_TORCH, PLAIN_ORT = "official", "plain torch", "plain ORT"
OURS_TORCH, OURS_ORT = "ours torch", "ours ORT"
WAYS = (OFFICIAL, PLAIN_TORCH, OURS_TORCH, OURS_ORT, PLAIN_ORT)


class RuleOnly(nn.Module):
    """The selection alone, as it stands in the graph: saliency, budget and quota in, positions out."""

    def __init__(self, vision: LlavaVision) -> None:
        super().__init__()
        self.selection, self.tokens = vision.selection, vision.tokens

    def forward(self, saliency: Tensor, budget: Tensor, quota: Tensor) -> tuple[Tensor, Tensor]:
        asked = budget.clamp(1, self.tokens)
        size = asked.item()
        torch._check(size >= 1)
        torch._check(size <= self.tokens)
        positions, counts, _ = self.selection(saliency, None, torch.minimum(quota.clamp_min(1), asked), asked)
        return positions[:, :size], counts


def plan_of(spec: ModelSpec, policy: SelectionPolicy) -> ExportPlan:
    source = CheckpointSource(kind="local", name="random")
    return ExportPlan(model=spec, source=source, policy=policy, precision=Precision.FP32, decoder=None, opset=OPSET)


def exported(module: nn.Module, arguments: tuple[Tensor, ...], shapes: tuple[Any, ...], path: Path) -> Path:
    """Export a module that is not a LlavaVision with the same exporter options, translations and passes."""
    program = torch.onnx.export(
        module.eval(),
        arguments,
        dynamo=True,
        opset_version=OPSET,
        dynamic_shapes=shapes,
        custom_translation_table=translation_table(OPSET),
        optimize=True,
        verbose=False,
    )
    assert program is not None
    clean(program.model, {})
    path.mkdir()
    ir.save(program.model, path / "model.onnx", external_data="model.onnx.data")
    return path / "model.onnx"


def session(path: Path) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = THREADS, 1
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


@dataclass
class Contestants:
    """Everything that is timed. `run(name, pixels, budget)` returns what the way returns."""

    spec: ModelSpec
    work: Path
    eager: Any = None
    sdpa: Any = None
    projector: Any = None
    ours: LlavaVision = field(init=False)
    official_rule: LlavaVision = field(init=False)
    sessions: dict[str, ort.InferenceSession] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.eager, self.sdpa, self.projector = transformers_models(self.spec)
        reader: Any = WeightsInMemory.from_models(self.eager, self.projector)
        self.ours = vision_from_checkpoint(self.spec, HolovPolicy(), reader, Precision.FP32)
        self.official_rule = vision_from_checkpoint(self.spec, HolovOfficialPolicy(), reader, Precision.FP32)
        for name, module, policy in (
            ("ours", self.ours, HolovPolicy()),
            ("plain", PlainVision(self.ours), NoSelection()),
        ):
            (self.work / name).mkdir()
            model = onnx_from_graph(module, plan_of(self.spec, policy))
            save_vision(model, self.work / name)
            del model
            gc.collect()
        batch = torch.export.Dim.DYNAMIC
        rule = (torch.zeros(2, self.spec.vision.tokens), torch.tensor([2]), torch.tensor([2, 1]))
        exported(RuleOnly(self.ours), rule, ({0: batch}, None, {0: batch}), self.work / "rule")
        self.sessions = {
            OURS_ORT: session(self.work / "ours" / "vision.onnx"),
            PLAIN_ORT: session(self.work / "plain" / "vision.onnx"),
            "rule": session(self.work / "rule" / "model.onnx"),
        }
        gc.collect()

    def run(self, name: str, pixels: Tensor, budget: int) -> Any:
        layer = self.spec.vision.feature_layer
        if name == OFFICIAL:
            return official_tokens(self.eager, self.projector, pixels, budget, layer)
        if name == PLAIN_TORCH:
            return self.projector(self.sdpa(pixels, output_hidden_states=True).hidden_states[layer + 1][:, 1:])
        if name == OURS_TORCH:
            return self.ours(pixels, torch.tensor([budget]), torch.full((len(pixels),), budget))
        if name == PLAIN_ORT:
            return self.sessions[PLAIN_ORT].run(["visual_tokens"], vision_feed(pixels, self.spec.vision.tokens))
        return self.sessions[OURS_ORT].run(None, vision_feed(pixels, budget))

    def rule(self, name: str, saliency: Tensor, budget: int) -> Any:
        """The selection alone, in torch or in ONNX Runtime."""
        quota = torch.full((len(saliency),), budget)
        if name == OURS_TORCH:
            return self.ours.selection(saliency, None, quota, quota.amax()[None])
        feed = {"saliency": saliency.numpy(), "budget": np.array([budget]), "quota": quota.numpy()}
        return self.sessions["rule"].run(None, feed)


def vision_feed(pixels: Tensor, budget: int) -> dict[str, Any]:
    """Inputs of the exported graph, the same quota for every picture."""
    quota = np.full(len(pixels), budget, dtype=np.int64)
    return {"pixel_values": pixels.numpy(), "budget": np.array([budget], dtype=np.int64), "quota": quota}


def check_outputs(ways: Contestants, pixels: Tensor, budget: int) -> dict[str, float]:
    """Largest differences between the ways, relative to the largest output; raises SystemExit if one is too large."""
    official = ways.run(OFFICIAL, pixels, budget)
    plain = ways.run(PLAIN_TORCH, pixels, budget)
    quota = torch.full((len(pixels),), budget)
    same_rule, same_positions, _, _ = ways.official_rule(pixels, torch.tensor([budget]), quota)
    tokens, positions, _, saliency = ways.run(OURS_TORCH, pixels, budget)
    ort_tokens, ort_positions, _, ort_saliency = ways.run(OURS_ORT, pixels, budget)
    (ort_plain,) = ways.run(PLAIN_ORT, pixels, budget)
    scale = float(plain.abs().max())
    rows = torch.gather(plain, 1, positions.clamp_min(0)[..., None].expand_as(tokens))
    real = (positions >= 0)[..., None]
    seen = {
        "zero rows of the official way": float((same_positions < 0).sum()),
        "official rule, ours against the official way": float((same_rule - official).abs().max()) / scale,
        "ours torch against plain rows": float(((tokens - rows) * real).abs().max()) / scale,
        "plain ORT against plain torch": float(np.abs(ort_plain - plain.numpy()).max()) / scale,
        "saliency, ORT against torch": float(np.abs(ort_saliency - saliency.numpy()).max() / saliency.max()),
        "positions that differ, ORT against torch": float((ort_positions != positions.numpy()).sum()),
        "largest share of one token in the CLS row": float(saliency.max()),
    }
    if not seen["positions that differ, ORT against torch"]:
        seen["ours ORT against ours torch"] = float(np.abs(ort_tokens - tokens.numpy()).max()) / scale
    bad = [name for name, value in seen.items() if " against " in name and "positions" not in name and value > 1e-4]
    if bad:
        raise SystemExit(f"the ways do not agree: {seen}")
    return seen


@dataclass
class Samples:
    """Process CPU seconds and wall seconds of each repetition."""

    cpu: list[float] = field(default_factory=list)
    wall: list[float] = field(default_factory=list)

    def take(self, action: Callable[[], Any], times: int = 1) -> None:
        wall, cpu = time.perf_counter(), time.process_time()
        for _ in range(times):
            action()
        self.cpu.append((time.process_time() - cpu) / times)
        self.wall.append((time.perf_counter() - wall) / times)

    def as_row(self) -> dict[str, Any]:
        return {
            "cpu_ms": round(statistics.median(self.cpu) * 1e3, 3),
            "wall_ms": round(statistics.median(self.wall) * 1e3, 3),
            "cpu_ms_least": round(min(self.cpu) * 1e3, 3),
            "cpu_ms_all": [round(value * 1e3, 3) for value in self.cpu],
        }


def measure(
    ways: Contestants, wanted: list[str], pixels: Tensor, budgets: list[int], repeats: int
) -> dict[str, dict[str, Any]]:
    """Interleaved rounds: one run of each way after the other, the order turned by one every round."""
    pruned = [(name, budget) for budget in budgets for name in (OFFICIAL, OURS_TORCH, OURS_ORT)]
    entries = [*pruned, (PLAIN_TORCH, ways.spec.vision.tokens), (PLAIN_ORT, ways.spec.vision.tokens)]
    entries = [entry for entry in entries if entry[0] in wanted]
    samples = {entry: Samples() for entry in entries}
    rules = {(name, budget): Samples() for name in (OURS_TORCH, OURS_ORT) for budget in budgets if name in wanted}
    saliency = ways.run(OURS_TORCH, pixels, budgets[0])[3]
    for round_number in range(repeats):
        turn = round_number % len(entries)
        for name, budget in entries[turn:] + entries[:turn]:
            samples[name, budget].take(partial(ways.run, name, pixels, budget))
        for name, budget in rules:
            ways.rule(name, saliency, budget)
            rules[name, budget].take(partial(ways.rule, name, saliency, budget), times=20)
        print(f"  B={len(pixels)} round {round_number + 1}/{repeats}", file=sys.stderr, flush=True)
    found = {f"{name} K={budget}": taken.as_row() for (name, budget), taken in samples.items()}
    found.update({f"rule only, {name} K={budget}": taken.as_row() for (name, budget), taken in rules.items()})
    return found


def ratios_of(rows: dict[str, dict[str, Any]], budgets: list[int], tokens: int) -> dict[str, float]:
    """Ratios of medians of CPU time, of those ways that ran."""
    cpu = {name: row["cpu_ms"] for name, row in rows.items()}
    wanted = {}
    for k in budgets:
        ours_torch, ours_ort = f"{OURS_TORCH} K={k}", f"{OURS_ORT} K={k}"
        wanted[f"official / ours torch, K={k}"] = (f"{OFFICIAL} K={k}", ours_torch)
        wanted[f"official / ours ORT, K={k}"] = (f"{OFFICIAL} K={k}", ours_ort)
        wanted[f"ours torch / plain torch, K={k}"] = (ours_torch, f"{PLAIN_TORCH} K={tokens}")
        wanted[f"ours ORT / plain ORT, K={k}"] = (ours_ort, f"{PLAIN_ORT} K={tokens}")
        wanted[f"selection share of ours torch, K={k}"] = (f"rule only, {ours_torch}", ours_torch)
        wanted[f"selection share of ours ORT, K={k}"] = (f"rule only, {ours_ort}", ours_ort)
    return {name: round(cpu[a] / cpu[b], 5) for name, (a, b) in wanted.items() if a in cpu and b in cpu}


def counted(spec: ModelSpec, budgets: list[int]) -> dict[str, float]:
    """Ratios that counting operations gives, to compare the measured ones with."""
    tokens = spec.vision.tokens
    plain = operations_of(plan_of(spec, NoSelection()), tokens)
    later = spec.model_copy(update={"vision": spec.vision.model_copy(update={"feature_layer": spec.vision.layers - 1})})
    all_layers = encoder_operations(later, last_rows=tokens + 1, projected=tokens, cls_row=False)
    found = {}
    for k in budgets:
        ours = operations_of(plan_of(spec, HolovPolicy()), k)
        found[f"ours / plain, K={k}"] = round(ours / plain, 4)
        found[f"ours / plain with the layer that nobody reads, K={k}"] = round(ours / all_layers, 4)
    return found


def show(batch: int, rows: dict[str, dict[str, Any]], ratios: dict[str, float]) -> None:
    """Two tables on stdout."""
    console = Console(width=120)
    title = f"B={batch}, {THREADS} thread(s)"
    times = Table("way", "CPU ms (median)", "wall ms (median)", title=title, title_justify="left")
    for name, row in rows.items():
        times.add_row(name, f"{row['cpu_ms']:.2f}", f"{row['wall_ms']:.2f}")
    console.print(times)
    table = Table("ratio of medians of CPU time", "value")
    for name, value in ratios.items():
        table.add_row(name, f"{value * 100:.3f} %" if "share" in name else f"{value:.3f}")
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1, help="threads of torch and of ONNX Runtime (1)")
    parser.add_argument("--repeats", type=int, nargs="+", default=[5], help="interleaved rounds of each batch (5)")
    parser.add_argument("--layers", type=int, default=24, help="layers of the tower, fewer for a quick run (24)")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4], help="pictures in a batch (1 4)")
    parser.add_argument("--budgets", type=int, nargs="+", default=[64, 192], help="tokens kept (64 192)")
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS, help="(all)")
    parser.add_argument("--note", default="", help="what is special about this run; kept in the result")
    parser.add_argument("--json", type=Path, help="write the result here as well")
    options = parser.parse_args()
    torch.set_num_threads(THREADS)
    logging.disable(logging.WARNING)  # the exporter warns about packages that are not needed
    warnings.simplefilter("ignore")
    print(one_line())
    result: dict[str, Any] = {"threads": THREADS, "layers": options.layers, "batches": {}}
    with tempfile.TemporaryDirectory(prefix="bench-encoder-") as work, torch.inference_mode():
        spec = spec_of_size(options.layers)
        with torch.inference_mode(False), torch.no_grad():
            ways = Contestants(spec, Path(work))
        for index, batch in enumerate(options.batches):
            repeats = options.repeats[min(index, len(options.repeats) - 1)]
            generator = torch.Generator().manual_seed(batch)
            side = spec.vision.image_size
            pixels = torch.randn(batch, spec.vision.channels, side, side, generator=generator)
            checks = {str(budget): check_outputs(ways, pixels, budget) for budget in options.budgets}
            rows = measure(ways, options.ways, pixels, options.budgets, repeats)
            ratios = ratios_of(rows, options.budgets, spec.vision.tokens)
            show(batch, rows, ratios)
            result["batches"][str(batch)] = {"repeats": repeats, "times": rows, "ratios": ratios, "checks": checks}
    result["operation_ratios"] = counted(spec, options.budgets)
    print("counting operations:", ", ".join(f"{name}: {value}" for name, value in result["operation_ratios"].items()))
    if options.json:
        write_result(options.json, {"note": options.note, **result} if options.note else result)


if __name__ == "__main__":
    main()
