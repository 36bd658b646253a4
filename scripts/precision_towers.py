"""True-size towers to quantise on a CPU, the pictures that they are judged by, and how far a way is from torch."""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from encoder_models import WeightsInMemory, spec_of_size, transformers_models

from holov_export.bundle import SCHEMA, Bundle, Manifest, artifacts_in, graph_tensors, provenance
from holov_export.export.onnx_from_graph import forget_graph, onnx_from_graph, save_vision
from holov_export.policies import HolovPolicy
from holov_export.recipes import NamedPicture, Recipe, RecipePictures, pictures_of
from holov_export.runtime.preprocess import pixels_from_pictures
from holov_export.runtime.runner_ort import OrtRunner
from holov_export.selection.reference import positions_of
from holov_export.spec import CheckpointSource, ExportPlan, ModelSpec, Precision, Quantization
from holov_export.tensors import PixelBatch, VisualTokens
from holov_export.verify.parity import TOLERANCES, compare
from holov_export.vision.clip import LlavaVision, vision_from_checkpoint

#: what LLaVA-1.5's pictures are normalised with. Source: openai/clip-vit-large-patch14-336 preprocessor_config.json
MEAN, DEVIATION = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
#: of a saliency, relative: the sum of the differences over the sum
ERRORS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05)
DRAWS = 20


@dataclass(frozen=True)
class Case:
    """One held-out picture at one budget, and what torch makes of it."""

    picture: str
    pixels: PixelBatch
    budget: int
    wanted: VisualTokens


@dataclass
class Loss:
    """How far a way is from torch, over all cases."""

    overlaps: list[float] = field(default_factory=list)
    cosines: list[float] = field(default_factory=list)
    saliency: list[float] = field(default_factory=list)

    def row(self) -> dict[str, float]:
        return {
            "overlap_min": round(min(self.overlaps), 4),
            "overlap_mean": round(statistics.mean(self.overlaps), 4),
            "cosine_min": round(min(self.cosines), 6),
            "saliency_error": round(statistics.mean(self.saliency), 6),
        }


@dataclass
class Tower:
    """One tower: the torch module, its exported bundle, and the cases it is judged by.

    Attributes:
        recipe: whose ranges the Q/DQ form has. pictures: its pictures.
    """

    module: LlavaVision
    bundle: Bundle
    work: Path
    recipe: Recipe
    pictures: RecipePictures
    cases: tuple[Case, ...]

    def quantised(self, name: str, quantization: Quantization, write: Callable[[Path], Any]) -> tuple[Bundle, float]:
        """The bundle of a quantised graph that `write` writes, and its megabytes."""
        folder = self.work / name
        folder.mkdir()
        write(folder / self.bundle.graph)
        plan = self.bundle.manifest.plan.model_copy(update={"quantization": quantization})
        bundle = Bundle(folder, self.bundle.manifest.model_copy(update={"plan": plan}))
        return bundle, round(sum(path.stat().st_size for path in folder.iterdir()) / 1e6, 1)

    def torch(self, pixels: PixelBatch, budget: int) -> VisualTokens:
        asked = torch.tensor([budget])
        with torch.inference_mode():
            found = self.module(torch.from_numpy(pixels.pixel_values), asked, asked.expand(len(pixels)))
        return VisualTokens(*(item.numpy() for item in found))

    def loss(self, runner: OrtRunner) -> Loss:
        """Run every case once."""
        loss = Loss()
        for case in self.cases:
            got = runner.run(case.pixels, case.budget, saliency=True)
            found = compare(got, case.wanted, names=("", ""), budget=case.budget, tolerance=TOLERANCES[Precision.FP32])
            loss.overlaps.append(found.overlap)
            loss.cosines.append(found.token_cosine)
            assert got.saliency is not None
            assert case.wanted.saliency is not None
            wrong = np.abs(got.saliency - case.wanted.saliency).sum() / case.wanted.saliency.sum()
            loss.saliency.append(float(wrong))
        return loss


def made_tower(layers: int, outliers: float, recipe: Recipe, budgets: Sequence[int], work: Path) -> Tower:
    """Export a tower, and let torch see the held-out pictures."""
    spec = pictured(spec_of_size(layers))
    eager, _, projector = transformers_models(spec, outliers)
    reader: Any = WeightsInMemory.from_models(eager, projector)
    module = vision_from_checkpoint(spec, HolovPolicy(), reader, Precision.FP32)
    source = CheckpointSource(kind="local", name="random")
    plan = ExportPlan(model=spec, source=source, policy=HolovPolicy(), precision=Precision.FP32, decoder=None)
    folder = work / "fp32"
    folder.mkdir(parents=True)
    with torch.no_grad():
        model = onnx_from_graph(module, plan)
        save_vision(model, folder)
        forget_graph(model)
    del model
    gc.collect()
    inputs, outputs = (graph_tensors(side) for side in plan.signature)
    manifest = Manifest(
        schema_version=SCHEMA,
        plan=plan,
        inputs=inputs,
        outputs=outputs,
        artifacts=artifacts_in(folder),
        provenance=provenance("", {}),
    )
    tower = Tower(module, Bundle(folder, manifest), work, recipe, pictures_of(recipe, None), ())
    tower.cases = tuple(case for picture in tower.pictures.judge for case in cases_of(tower, picture, budgets))
    return tower


def pictured(spec: ModelSpec) -> ModelSpec:
    """The model with pictures as LLaVA-1.5 takes them."""
    changes = {"resize_to": (336, 336), "mean": MEAN, "std": DEVIATION}
    return spec.model_copy(update={"image": spec.image.model_copy(update=changes)})


def cases_of(tower: Tower, picture: NamedPicture, budgets: Sequence[int]) -> list[Case]:
    """A picture at every budget, with what torch makes of it."""
    pixels = pixels_from_pictures([picture.image()], tower.bundle.manifest.plan.model)
    return [Case(picture.name, pixels, budget, tower.torch(pixels, budget)) for budget in budgets]


def overlap_by_error(tower: Tower, seed: int = 0) -> dict[str, dict[str, float]]:
    """What a saliency that is wrong at random costs, whoever computed it: the rule's loops on torch's saliency."""
    draw = np.random.default_rng(seed)
    rows = {}
    for error in ERRORS:
        overlaps: list[float] = []
        worst: list[float] = []
        for _ in range(DRAWS):
            seen = [overlap_with_error(case, error, tower.bundle.manifest.plan, draw) for case in tower.cases]
            overlaps += seen
            worst.append(min(seen))
        rows[f"{error:g}"] = {
            "overlap_mean": round(statistics.mean(overlaps), 4),
            "overlap_min_mean": round(statistics.mean(worst), 4),
            "draws_with_min_0.97": round(sum(value >= 0.97 for value in worst) / DRAWS, 2),
        }
    return rows


def overlap_with_error(case: Case, error: float, plan: ExportPlan, draw: np.random.Generator) -> float:
    """The overlap of what is kept with and without an error of the saliency, the same share for every token."""
    assert case.wanted.saliency is not None
    saliency = case.wanted.saliency[0]
    # the mean magnitude of a normal distribution is 0.8 of its deviation
    wrong = saliency * np.exp(draw.normal(0, error / 0.8, saliency.shape)).astype(np.float32)
    before, after = (kept(values, case.budget, plan) for values in (saliency, wrong))
    return len(before & after) / len(before)


def kept(saliency: npt.NDArray[np.float32], budget: int, plan: ExportPlan) -> set[int]:
    return set(positions_of(plan.policy, saliency, budget, plan.model.clip.grid).tolist())
