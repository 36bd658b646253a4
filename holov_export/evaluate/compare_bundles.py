"""Two bundles of one model side by side: what they are made of, what they keep, what they answer, how fast they are."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from PIL import Image

from holov_export.bundle import Bundle
from holov_export.errors import UsageError
from holov_export.evaluate.data import Dataset, Picture, Question, dataset_from_questions
from holov_export.evaluate.kept_answers import kept_answers, obstacle_of
from holov_export.evaluate.run import AskSettings
from holov_export.extras import is_installed
from holov_export.policies import Frozen
from holov_export.quantize.precision_report import AnswersKept
from holov_export.spec import ExportPlan
from holov_export.verify.backends import CPU_PRECISIONS
from holov_export.verify.bundle_contents import (
    BytesOfKind,
    TensorDifference,
    WeightsOfType,
    bytes_by_kind,
    tensor_differences,
    weights_by_type,
)
from holov_export.verify.machine import Machine, this_machine, utc_now
from holov_export.verify.paired_speed import PairedSpeed, paired_speed
from holov_export.verify.pictures import pixels_for
from holov_export.verify.vision_loss import (
    USUAL_SIZES,
    LossSummary,
    PictureLoss,
    Size,
    summary_of,
    tokens_of,
    vision_losses,
)

SCHEMA: Literal[1] = 1


class Side(Frozen):
    """What one of the two is."""

    name: str
    method: str
    precision: str
    opset: int
    decoder: str


class BundleComparison(Frozen):
    """What `compare` found; pairs are (A, B).

    Attributes:
        model, part, tokens: of both; N of the largest picture.
        remarks: what a reader must know. tensors: inputs and outputs that differ. weights: () without onnx.
        losses: of each picture at each budget, B against A.
        answers: None with the reason in `no_answers`. speed: None with the reason in `no_speed`.
    """

    schema_version: Literal[1] = SCHEMA
    date: str
    machine: Machine
    model: str
    part: Literal["image", "video"]
    tokens: int
    sides: tuple[Side, Side]
    remarks: tuple[str, ...]
    tensors: tuple[TensorDifference, ...]
    weights: tuple[WeightsOfType, ...]
    sizes: tuple[BytesOfKind, ...]
    pictures: tuple[str, ...]
    losses: tuple[PictureLoss, ...]
    summary: LossSummary
    answers: AnswersKept | None = None
    no_answers: str = ""
    speed: PairedSpeed | None = None
    no_speed: str = ""


@dataclass(frozen=True)
class ComparisonRequest:
    """What to compare on.

    Attributes:
        pictures: (name, RGB picture). sizes: budgets.
        questions: to ask both; None for none, with the reason in `no_questions`.
        settings: how to ask. threads: CPU threads of the vision graphs. rounds: of the timing; 0 leaves it out.
    """

    pictures: Sequence[tuple[str, Image.Image]]
    sizes: Sequence[Size] = USUAL_SIZES
    questions: Dataset | None = None
    no_questions: str = ""
    settings: AskSettings = field(default_factory=lambda: AskSettings(provider="cpu"))
    threads: int = 1
    rounds: int = 10


def check_comparable(before: Bundle, after: Bundle) -> None:
    """Refuse two that cannot be compared. Different rules and precisions can.

    Raises:
        UsageError: the models, their tokens or what they see differ.
    """
    left, right = before.manifest.plan, after.manifest.plan
    if left.tokens != right.tokens:
        raise UsageError(
            f"'{before.folder.name}' has {left.tokens} tokens of an image, '{after.folder.name}' {right.tokens}: they "
            "have no kept tokens in common.",
            hint="Compare bundles of one model.",
        )
    if left.model.model_copy(update={"name": right.model.name}) != right.model:
        names = dict.fromkeys((left.model.name, right.model.name))
        parts = [
            name for name in type(left.model).model_fields if getattr(left.model, name) != getattr(right.model, name)
        ]
        raise UsageError(
            f"'{before.folder.name}' and '{after.folder.name}' are of different models ({', '.join(names)}): "
            f"{', '.join(part for part in parts if part != 'name')} differ.",
            hint="Compare bundles of one model.",
        )


def question_about(pictures: Sequence[tuple[str, Image.Image]], text: str) -> Dataset:
    """One question about each picture, to which nobody knows the right answer."""
    asked = []
    for number, (name, picture) in enumerate(pictures, start=1):
        stream = io.BytesIO()
        picture.save(stream, "PNG")
        label = f"{number}: {name}"  # two folders may have a picture of the same name
        asked.append(Question(str(number), Picture(label, data=stream.getvalue()), text, (), group=label, where=name))
    return dataset_from_questions("the same question", "jsonl", asked)


def compare_bundles(
    before: Bundle,
    after: Bundle,
    labels: tuple[str, str],
    request: ComparisonRequest,
    *,
    tell: Callable[[str], None] = lambda message: None,
) -> BundleComparison:
    """Compare two views. One graph is loaded at a time, and both only for the timing, when all else is freed.

    Raises:
        UsageError: see `check_comparable`. BudgetError, ImageError, PromptError: as when either is asked.
        EnvironmentFaultError: this machine lacks something.
    """
    check_comparable(before, after)
    plan = before.manifest.plan
    losses = vision_losses(before, after, request.pictures, request.sizes, threads=request.threads, tell=tell)
    answers, no_answers = _answers(before, after, request, tell)
    speed, no_speed = _speed(before, after, request, tell)
    return BundleComparison(
        date=utc_now(),
        machine=this_machine(),
        model=plan.model.name,
        part=plan.part,
        tokens=plan.tokens,
        sides=(_side(before, labels[0]), _side(after, labels[1])),
        remarks=tuple(_remarks(before.manifest.plan, after.manifest.plan)),
        tensors=tensor_differences(before, after),
        weights=weights_by_type(before, after) if is_installed("onnx") else (),
        sizes=bytes_by_kind(before, after),
        pictures=tuple(name for name, _ in request.pictures),
        losses=losses,
        summary=summary_of(losses),
        answers=answers,
        no_answers=no_answers,
        speed=speed,
        no_speed=no_speed,
    )


def _side(bundle: Bundle, label: str) -> Side:
    plan = bundle.manifest.plan
    return Side(
        name=label,
        method=plan.method,
        precision=plan.precision_name,
        opset=plan.opset,
        decoder=plan.decoder_name,
    )


def _remarks(left: ExportPlan, right: ExportPlan) -> list[str]:
    said = []
    if left.method != right.method:
        said.append(f"the rules differ ({left.method}, {right.method}), so they keep other tokens by intention")
    elif left.policy != right.policy:
        said.append(f"the settings of {left.method} differ, so they keep other tokens by intention")
    if left.source.config_sha256 != right.source.config_sha256:
        said.append("they were exported from different checkpoints")
    if not is_installed("onnx"):
        said.append("onnx is not installed, so weights are not listed by type")
    return said


def _answers(
    before: Bundle, after: Bundle, request: ComparisonRequest, tell: Callable[[str], None]
) -> tuple[AnswersKept | None, str]:
    if request.questions is None:
        return None, request.no_questions
    if before.part != "image":
        return None, "questions are about pictures, these graphs see clips"
    obstacle = obstacle_of(before) or obstacle_of(after)
    if obstacle:
        return None, obstacle
    tell(f"ask both {len(request.questions.questions)} questions")
    sizes = [size for size in request.sizes if size != 1]  # the unpruned run is no use of these bundles
    return kept_answers(before, after, request.questions, request.settings, sizes or request.sizes), ""


def _speed(
    before: Bundle, after: Bundle, request: ComparisonRequest, tell: Callable[[str], None]
) -> tuple[PairedSpeed | None, str]:
    """On the first picture."""
    if not request.rounds:
        return None, "it was not asked for"
    for bundle in (before, after):
        precision = bundle.manifest.plan.precision
        if precision not in CPU_PRECISIONS:
            return None, f"ONNX Runtime's CPU provider cannot run a {precision.value} graph"
    tell(f"time both in {request.rounds} interleaved rounds")
    pixels = pixels_for(before.manifest.plan, [request.pictures[0][1]])
    tokens = pixels.layouts[0].tokens if pixels.layouts else before.manifest.plan.tokens
    budgets = tuple(dict.fromkeys(tokens_of(size, tokens) for size in request.sizes))
    return paired_speed(before, after, pixels, budgets, threads=request.threads, rounds=request.rounds), ""
