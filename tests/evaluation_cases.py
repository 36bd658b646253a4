"""What the tests of `evaluate` share: questions about drawn pictures, a bundle with several toy graphs, and a journal
that is filled without a model.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper
from PIL import Image

from holov_export.bundle import (
    MANIFEST,
    VISION,
    Bundle,
    artifacts_in,
    graph_file,
    open_bundle,
    write_manifest,
)
from holov_export.evaluate.data import Dataset, Picture, Question, dataset_from_questions
from holov_export.evaluate.journal import Journal, JournalEntry, JournalHeader
from holov_export.policies import policy_from_settings
from holov_export.spec import GraphPlan

HEADER = JournalHeader(
    data="d", manifest="m", decoder="genai", provider="cpu", checkpoint="", suffix="", max_new_tokens=4
)


def write_picture(path: Path, seed: int, side: int = 56) -> Path:
    """Seeded noise as a PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    return path


def write_questions(folder: Path, pictures: int = 3, each: int = 2) -> Path:
    """data.jsonl with `each` questions about each of some noisy pictures."""
    lines = []
    for number in range(pictures):
        write_picture(folder / f"picture_{number}.png", number)
        for question in range(each):
            text = f"what is {'shown' if question % 2 else 'red'} {number} {question}?"
            row = {"image": f"picture_{number}.png", "question": text, "answers": ["one", "two"]}
            lines.append(json.dumps({**row, "kind": "ab"[question % 2]}))
    path = folder / "data.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def with_graphs(bundle: Bundle, folder: Path, methods: Sequence[str]) -> Bundle:
    """A copy of a toy bundle with further graphs: that of the first one with other weights, so that answers differ."""
    shutil.copytree(bundle.folder, folder)
    for number, method in enumerate(methods, start=1):
        graph = onnx.load(str(folder / VISION))
        for item in graph.graph.initializer:
            if item.name == "weights":
                item.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(item) * -2.0 * number, "weights"))
        onnx.save(graph, str(folder / graph_file(method)))
    also = tuple(GraphPlan(policy=policy_from_settings(method)) for method in methods)
    plan = bundle.manifest.plan.model_copy(update={"also": also})
    (folder / MANIFEST).unlink()
    manifest = bundle.manifest.model_copy(update={"plan": plan, "artifacts": artifacts_in(folder)})
    write_manifest(folder, manifest)
    return open_bundle(folder)


def questions_of(rows: Sequence[tuple[str, Sequence[str]]], form: str = "jsonl", pair: str = "") -> Dataset:
    """A dataset of (group, right answers), one picture a group."""
    questions = [
        Question(str(number), Picture(group, data=b""), "?", tuple(answers), group=group, pair=pair and group)
        for number, (group, answers) in enumerate(rows)
    ]
    return dataset_from_questions("made", form, questions)


def fill(journal: Journal, method: str, budget: int, texts: Mapping[str, str] | Sequence[str]) -> None:
    """Answers of a cell, by question id or in the order of the questions."""
    items = texts.items() if isinstance(texts, Mapping) else ((str(index), text) for index, text in enumerate(texts))
    for question, text in items:
        journal.add(
            JournalEntry(method=method, budget=budget, question=question, image="i", text=text, visual_tokens=budget)
        )
