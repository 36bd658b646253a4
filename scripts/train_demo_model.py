"""Trains the demo model: a 2.3 M parameter LLaVA that answers about handwritten digits on photographs.

    python scripts/train_demo_model.py --out holov_export/data/demo-model --work-dir build/demo-model

Four stages, each a fixed number of steps with its own seed, each saved in the work folder and skipped when
its checkpoint is already there: `sheets` and `scenes` train the vision tower, `language` the projector and
the language model on the frozen tower, `dropping` lets them get used to missing image tokens.
`--quick` runs everything with a handful of steps, to test the script and not to make a model.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import demo_scenes as ds
import demo_training as dt
import numpy as np
import torch
from demo_checkpoint import PROMPT, demo_llava, vocabulary, write_checkpoint
from PIL import Image

COMMAND = (
    "python scripts/train_demo_model.py --out holov_export/data/demo-model --work-dir build/demo-model "
    "--results benchmarks/results/demo-model-training.json"
)
PEAK_RATE = 3e-3
DROP_RATE = 3e-3
KEPT = (144, 144, 64, 32, 16)  # image tokens per batch in the last stage
OUTER = ("embed", "head", "class_embedding", "patch_embedding")  # matrices that AdamW takes


@dataclass(frozen=True)
class Plan:
    """Steps of each stage, scenes per batch, scenes for the held-out figures."""

    sheets: int = 1000
    scenes: int = 850
    language: int = 1000
    dropping: int = 560
    batch: int = 32
    test_scenes: int = 550
    generated: int = 240  # questions answered with generate() as well
    compiled: bool = True


QUICK = Plan(3, 3, 4, 4, batch=4, test_scenes=8, generated=12, compiled=False)


class Training:
    """Data, model and results of one run; the methods are the stages in order."""

    def __init__(self, plan: Plan, work: Path, seed: int, quick: bool) -> None:
        self.plan, self.work, self.seed = plan, work, seed
        work.mkdir(parents=True, exist_ok=True)
        few = (1, 4) if quick else (None, None)
        self.bank, self.photos = ds.digit_bank("train", seed, few[0]), ds.photo_bank("train", seed, few[1])
        self.test_bank, self.test_photos = ds.digit_bank("held-out", seed), ds.photo_bank("held-out", seed)
        self.llava = demo_llava(seed)
        tower = self.llava.model.vision_tower
        self.tower = getattr(tower, "vision_model", tower)
        dt.start_tower(self.tower)
        torch.manual_seed(seed)
        self.losses = dt.TowerLosses(self.tower)
        self.layout = dt.PackedLayout(vocabulary())
        self.reader = dt.Reader(self.llava, self.layout)
        self.results: dict[str, Any] = {"seconds": {}, "held_out": {}}

    def stage(self, number: int, name: str, train: Any) -> None:
        """Runs one stage unless its checkpoint exists; afterwards the model holds the stage's weights."""
        path = self.work / f"{number}-{name}.pt"
        if not path.exists():
            torch.manual_seed(self.seed + number)
            start = time.perf_counter()
            scores = train(np.random.default_rng([self.seed, 10 + number]))
            seconds = time.perf_counter() - start
            state = {"llava": self.llava.state_dict(), "losses": self.losses.state_dict()}
            torch.save({**state, "seconds": seconds, "scores": scores}, path)
        saved = torch.load(path, weights_only=True)
        self.llava.load_state_dict(saved["llava"])
        self.losses.load_state_dict(saved["losses"])
        self.results["seconds"][name] = round(saved["seconds"], 1)
        self.results["held_out"][name] = {k: round(v, 4) for k, v in saved["scores"].items()}
        held_out = self.results["held_out"][name]
        print(f"stage {name}: {saved['seconds']:.0f} s, held-out {held_out}", flush=True)

    def compiled(self, function: Any) -> Any:
        """`function`, compiled for fixed shapes unless the plan says otherwise."""
        return torch.compile(function, dynamic=False) if self.plan.compiled else function

    def train_tower(self, rng: np.random.Generator, steps: int, sheets: bool) -> dict[str, float]:
        """Stages `sheets` (every eighth batch is scenes) and `scenes` (falling learning rate)."""
        model, optimizer = self.losses, dt.Optimizer(self.losses, OUTER)
        forward = self.compiled(model)
        start = time.perf_counter()
        for step in range(steps):
            lattice = sheets and step % 8 != 7
            make = ds.sheet_batch if lattice else ds.scene_batch
            batch = make(self.bank, self.photos, self.plan.batch, rng)
            targets = dt.targets_from_scenes(batch)
            patch, scene = forward(dt.pixels_from_images(batch.images))
            loss = model.patch_loss(patch, targets)
            if not lattice:
                loss = loss + model.scene_loss(scene, targets)
            loss.backward()
            rate = dt.learning_rate(step, steps, PEAK_RATE, 0.8 if sheets else 0.25)
            optimizer.step(max(rate, PEAK_RATE / 3) if sheets else rate)
            if step % 50 == 49:
                scores = {k: round(v, 3) for k, v in dt.tower_scores(patch, scene, targets).items()}
                seconds = time.perf_counter() - start
                print(f"{step + 1} {seconds:.0f}s loss {loss.item():.3f} {scores}", flush=True)
        return self.tower_test()

    @torch.no_grad()
    def tower_test(self) -> dict[str, float]:
        """Scores of the tower on held-out scenes."""
        count = self.plan.test_scenes
        batch = ds.scene_batch(self.test_bank, self.test_photos, count, np.random.default_rng(5))
        targets = dt.targets_from_scenes(batch)
        parts = [self.losses(dt.pixels_from_images(x)) for x in np.array_split(batch.images, count // 8)]
        patch = torch.cat([p for p, _ in parts])
        return dt.tower_scores(patch, [torch.cat([s[i] for _, s in parts]) for i in range(2)], targets)

    def train_language(self, rng: np.random.Generator, steps: int, dropping: bool) -> dict[str, float]:
        """Stages `language` (projector and language model, all tokens) and `dropping` (random subsets)."""
        for weight in self.tower.parameters():
            weight.requires_grad_(False)
        reader, optimizer = self.reader, dt.Optimizer(self.reader, OUTER)
        reader.decode = reader._decode if dropping else self.compiled(reader._decode)
        features_of = self.compiled(dt.tower_features)
        start = time.perf_counter()
        for step in range(steps):
            batch = ds.scene_batch(self.bank, self.photos, self.plan.batch, rng)
            questions = [ds.questions_of_scene(batch, i, rng) for i in range(self.plan.batch)]
            ids, targets = self.layout.pack(questions)
            with torch.no_grad():
                tokens = features_of(self.tower, dt.pixels_from_images(batch.images))[0][:, 1:]
            aligned = 0.0 if dropping else 0.3 * reader.alignment_loss(tokens, batch)
            if dropping and (kept := int(rng.choice(KEPT))) < tokens.shape[1]:
                tokens = dt.gathered(tokens, dt.kept_patches(batch, kept, rng))
            logits = reader(tokens.contiguous(), ids)
            weight = self.layout.weight if dropping else torch.ones(1)
            loss = dt.answer_loss(logits, targets, weight)
            (loss + aligned).backward()
            peak, hold = (DROP_RATE, 0.35) if dropping else (PEAK_RATE, 0.4)
            optimizer.step(dt.learning_rate(step, steps, peak, hold))
            if step % 50 == 49:
                print(f"{step + 1} {time.perf_counter() - start:.0f}s loss {loss.item():.4f}", flush=True)
            if step % 300 == 299:
                print("held-out", self.answer_test(144, 150)["by_kind"], flush=True)
        return {f"accuracy_{k}_tokens": self.answer_test(k)["accuracy"] for k in (144, 48, 16)}

    @torch.no_grad()
    def answer_test(self, kept: int, scenes: int | None = None) -> dict[str, Any]:
        """Share of held-out questions answered exactly, `kept` tokens chosen by attention of CLS."""
        return answers_right(self.reader, self.tower, self.test_scenes(scenes or self.plan.test_scenes), kept)

    def test_scenes(self, scenes: int) -> list[tuple[ds.ByteArray, list[ds.Question], list[bool]]]:
        """Held-out scenes with their ten packed questions and which of these count."""
        rng = np.random.default_rng([11, 99])
        batch = ds.scene_batch(self.test_bank, self.test_photos, scenes, rng)
        out = []
        for index in range(scenes):
            questions = ds.questions_of_scene(batch, index, rng)
            fair = ds.fair_questions(questions, int(batch.count[index]))
            counts = [q in fair and questions.index(q) == i for i, q in enumerate(questions)]
            out.append((batch.images[index], questions, counts))
        return out

    def run(self) -> None:
        """All stages in order."""
        plan = self.plan
        self.stage(1, "sheets", lambda rng: self.train_tower(rng, plan.sheets, True))
        self.stage(2, "scenes", lambda rng: self.train_tower(rng, plan.scenes, False))
        self.stage(3, "language", lambda rng: self.train_language(rng, plan.language, False))
        self.stage(4, "dropping", lambda rng: self.train_language(rng, plan.dropping, True))


@torch.no_grad()
def answers_right(reader: dt.Reader, tower: Any, scenes: list[Any], kept: int) -> dict[str, Any]:
    """Accuracy over the questions that count, by kind, and single results [scenes][10].
    A question is right when every answer token and `</s>` is the most likely one, as in greedy decoding."""
    decode, reader.decode = reader.decode, reader._decode
    right: list[list[bool]] = []
    for start in range(0, len(scenes), 25):
        part = scenes[start : start + 25]
        pixels = dt.pixels_from_images(np.stack([image for image, _, _ in part]))
        tokens = dt.tower_features(tower, pixels)[0][:, 1:]
        if kept < tokens.shape[1]:
            best = dt.cls_attention(tower, pixels).topk(kept).indices.sort().values
            tokens = dt.gathered(tokens, best)
        ids, targets = reader.layout.pack([questions for _, questions, _ in part])
        wrong = (reader(tokens, ids).argmax(-1) != targets) & (targets != -100)
        wrong_slots = torch.zeros(len(part), 10).index_add_(1, reader.layout.slot, wrong.float())
        right += (wrong_slots == 0).tolist()
    reader.decode = decode
    return {**tallied(scenes, right), "right": right}


def tallied(scenes: list[Any], right: list[list[bool]]) -> dict[str, Any]:
    """Accuracies from single results [scenes][10]; `half_width_95` of `accuracy` is clustered by scene."""
    tally: dict[str, list[bool]] = {kind: [] for kind in ds.KINDS}
    clusters: list[list[bool]] = []
    for (_, questions, counts), row in zip(scenes, right, strict=True):
        judged = [(q.kind, ok) for q, counted, ok in zip(questions, counts, row, strict=True) if counted]
        clusters.append([ok for _, ok in judged])
        for kind, ok in judged:
            tally[kind].append(ok)
    every = [ok for cluster in clusters for ok in cluster]
    mean = float(np.mean(every))
    error = float(np.sqrt(np.sum([(sum(c) - mean * len(c)) ** 2 for c in clusters]))) / len(every)
    return {
        "accuracy": round(mean, 4),
        "half_width_95": round(1.96 * error, 4),
        "questions": len(every),
        "by_kind": {kind: round(float(np.mean(results)), 4) for kind, results in tally.items() if results},
    }


@torch.no_grad()
def check_saved(out: Path, training: Training) -> dict[str, Any]:
    """Scores the saved float16 folder, loaded in float32; compares with generate() on `plan.generated`."""
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    llava = LlavaForConditionalGeneration.from_pretrained(out, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(out)
    tower = getattr(llava.model.vision_tower, "vision_model", llava.model.vision_tower)
    reader = dt.Reader(llava, training.layout)
    scenes = training.test_scenes(training.plan.test_scenes)
    scores = {k: answers_right(reader, tower, scenes, k) for k in (144, 48, 32, 16, 8)}
    answered = agreed = exact = 0
    for (pixels, questions, counts), row in zip(scenes, scores[144]["right"], strict=True):
        asked = [(q, ok) for q, counted, ok in zip(questions, counts, row, strict=True) if counted]
        if answered >= training.plan.generated:
            break
        texts = [PROMPT.format(question=q.question) for q, _ in asked]
        picture = Image.fromarray(pixels)
        inputs = processor(images=[picture] * len(texts), text=texts, padding=True, return_tensors="pt")
        made = llava.generate(**inputs, max_new_tokens=8, do_sample=False)[:, inputs["input_ids"].shape[1] :]
        said = [text.strip() for text in processor.batch_decode(made, skip_special_tokens=True)]
        for (q, ok), text in zip(asked, said, strict=True):
            right = text == q.answer
            answered, agreed, exact = answered + 1, agreed + (right == ok), exact + right
    by_tokens = {str(k): {n: v for n, v in s.items() if n != "right"} for k, s in scores.items()}
    generated = {"questions": answered, "right": exact, "agree_with_scorer": agreed}
    return {"cls_topk_by_tokens": by_tokens, "generate": generated}


def report(training: Training, checked: dict[str, Any], size: int, command: str) -> dict[str, Any]:
    """Everything that was measured, with the versions it was measured with."""
    import skimage
    import sklearn
    import transformers

    versions = {m.__name__: m.__version__ for m in (torch, transformers, np, sklearn, skimage)}
    return {
        "what": "training of the demo model (handwritten digits on photographs)",
        "date": time.strftime("%Y-%m-%d"),
        "machine": "2-core x86-64 CPU",
        "command": command,
        "seed": training.seed,
        "plan": vars(training.plan),
        "versions": {"python": platform.python_version(), **versions},
        "seconds_per_stage": training.results["seconds"],
        "held_out_after_stage": training.results["held_out"],
        "parameters": sum(p.numel() for p in training.llava.parameters()),
        "weight_bytes": size,
        "saved_folder": checked,
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="train the demo model")
    parser.add_argument("--out", type=Path, required=True, help="folder for the finished checkpoint")
    parser.add_argument("--work-dir", type=Path, required=True, help="folder for checkpoints of stages")
    parser.add_argument("--results", type=Path, help="write the measured figures to this JSON file")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="a few steps only, to test the script")
    arguments = parser.parse_args()
    plan = QUICK if arguments.quick else Plan()
    training = Training(plan, arguments.work_dir, arguments.seed, arguments.quick)
    training.run()
    size = write_checkpoint(training.llava, arguments.out)
    checked = check_saved(arguments.out, training)
    figures = report(training, checked, size, COMMAND + (" --quick" if arguments.quick else ""))
    text = json.dumps(figures, indent=2) + "\n"
    if arguments.results:
        arguments.results.parent.mkdir(parents=True, exist_ok=True)
        arguments.results.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
