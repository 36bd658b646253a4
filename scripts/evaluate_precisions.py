#!/usr/bin/env python3
"""What the precisions cost the demo model: kept tokens and answers on held-out scenes, against fp32.

    python scripts/evaluate_precisions.py OUT --json benchmarks/results/demo-precisions.json

Exports the demo model in every precision, draws held-out scenes as `evaluate_demo.py` does (of digits and regions of
photographs that training never saw), compares every vision graph with the float32 one on them, and asks all bundles all
questions. Everything lies in OUT, and a run that was killed goes on. Losses are accepted: the gate is the export's.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
from demo_scenes import write_held_out
from evaluate_demo import call
from machine import write_result

from holov_export.bundle import REPORTS, Bundle, open_bundle
from holov_export.evaluate.data import Dataset
from holov_export.evaluate.formats import dataset_from_path
from holov_export.evaluate.journal import open_journal
from holov_export.evaluate.kept_answers import Answers, answers_of, kept_from_answers
from holov_export.evaluate.run import AskSettings, header_of
from holov_export.quantize.precision_report import PrecisionReport
from holov_export.runtime.preprocess import image_from
from holov_export.verify.bundle_contents import bytes_by_kind
from holov_export.verify.vision_loss import summary_of, vision_losses

FP32 = "fp32"
_GATED = ("--recipe", "smoke-8", "--accept-loss")
#: name of a precision -> options of the export
EXPORTS: dict[str, tuple[str, ...]] = {
    FP32: (),
    "fp16": ("--fp16",),
    "int8": ("--int8", *_GATED),
    "fp16-int8": ("--fp16", "--int8", *_GATED),
    "int8-cpu": ("--int8", "--quantize-for", "cpu", *_GATED),
    "fp8": ("--fp8", *_GATED),
    "int4-decoder": ("--decoder-precision", "int4"),
    "int8-kv": ("--decoder-kv-cache", "int8"),
    "int4-int8-kv": ("--decoder-precision", "int4", "--decoder-kv-cache", "int8"),
}
#: all tokens, a third and a ninth: 144, 48, 16
SIZES = (Fraction(1), Fraction(1, 3), Fraction(1, 9))
SETTINGS = AskSettings(provider="cpu", threads=1)


@dataclass(frozen=True)
class Asked:
    """A bundle and what it said."""

    bundle: Bundle
    answers: Answers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder for scenes, bundles and answers; a second run goes on in it")
    parser.add_argument("--scenes", type=int, default=200, help="held-out scenes, some nine questions each (200)")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--only", nargs="+", choices=[name for name in EXPORTS if name != FP32], default=list(EXPORTS))
    parser.add_argument("--json", type=Path, help="write the result here")
    options = parser.parse_args()
    scenes = options.out / f"scenes-{options.scenes}-{options.seed}"
    if not (scenes / "data.jsonl").is_file():
        write_held_out(scenes, options.scenes, options.seed)
    dataset = dataset_from_path(scenes / "data.jsonl")
    plain = asked(FP32, options.out, dataset)
    found = {}
    for name in dict.fromkeys(options.only):
        if name != FP32:
            found[name] = against(plain, asked(name, options.out, dataset), dataset)
            print(line_of(name, found[name]), flush=True)
    if options.json:
        head = {"scenes": options.scenes, "questions": len(dataset.questions), "tokens": plain.answers.cells[0].budget}
        write_result(options.json, {**head, "compared_with": FP32, "precisions": found})


def asked(name: str, out: Path, dataset: Dataset) -> Asked:
    """The bundle of a precision, exported if need be, and its answers, asked if need be."""
    folder = out / f"demo-{name}"
    if not folder.is_dir():
        call("--model", "demo", "-o", str(folder), *EXPORTS[name])
    bundle = open_bundle(folder)
    print(f"ask {name}", file=sys.stderr, flush=True)
    with open_journal(out / f"answers-{name}", header_of(bundle, dataset, SETTINGS)) as journal:
        return Asked(bundle, answers_of(bundle, dataset, SETTINGS, SIZES, journal=journal))


def against(plain: Asked, other: Asked, dataset: Dataset) -> dict[str, Any]:
    """What a precision lost: of the vision graph at each budget, and of the answers."""
    pictures = [(name, image_from(picture.read())) for name, picture in dataset.pictures.items()]
    losses = vision_losses(plain.bundle, other.bundle, pictures, SIZES, threads=1)
    answers = kept_from_answers(dataset, plain.answers, other.answers)
    gate = other.bundle.folder / REPORTS / "precision.json"
    report = PrecisionReport.model_validate_json(gate.read_text(encoding="utf-8")) if gate.is_file() else None
    return {
        "vision": other.bundle.manifest.plan.precision_name,
        "decoder": other.answers.decoder,
        "kept_tokens": {
            str(budget): summary_of([loss for loss in losses if loss.budget == budget]).model_dump(mode="json")
            for budget in dict.fromkeys(loss.budget for loss in losses)
        },
        "answers": answers.model_dump(mode="json"),
        "gate": report and {"recipe": report.recipe, "passed": report.passed},
        "bytes": {item.kind: item.bytes for item in bytes_by_kind(plain.bundle, other.bundle)},
    }


def line_of(name: str, found: dict[str, Any]) -> str:
    """The budgets of a precision in one line."""
    parts = []
    for at in found["answers"]["at"]:
        tokens = found["kept_tokens"][str(at["budget"])]
        overlap = "" if tokens["overlap_mean"] is None else f", overlap {tokens['overlap_mean']:.4f}"
        right = f"right {100 * at['before']['value']:.2f} -> {100 * at['after']['value']:.2f} %"
        parts.append(f"{at['budget']}: same {100 * at['loyalty']['value']:.2f} %, {right}{overlap}")
    return f"{name:12} of {found['answers']['questions']} answers at " + "; ".join(parts)


if __name__ == "__main__":
    main()
