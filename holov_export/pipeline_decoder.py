"""The embedded decoder's step of an export: built once, or twice where its keys and values are stored in 8 bits."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from PIL import Image

from holov_export.bundle import DECODER, Bundle
from holov_export.evaluate.data import Dataset, Question
from holov_export.evaluate.kept_answers import questions_at_hand
from holov_export.evaluate.run import AskSettings, check_prompts
from holov_export.extras import require
from holov_export.quantize.decoder_cache import NEW_TOKENS, Asked, CacheRanges, SeenIn, cache_ranges, write_scales
from holov_export.recipes import NamedPicture, Recipe, pictures_of, recipe_from_name
from holov_export.request import ExportRequest
from holov_export.runtime.preprocess import image_from
from holov_export.spec import DecoderPrecision, ExportPlan

#: so many of the recipe's pictures, and of the questions at hand, show how large keys and values get
MOST_SEEN = 32


@dataclass(frozen=True)
class CacheMaterial:
    """What 8-bit keys and values get their scales from.

    Attributes:
        pictures: of the recipe. questions: all that are at hand, None for none.
    """

    recipe: Recipe
    pictures: tuple[NamedPicture, ...]
    questions: Dataset | None


def cache_material(request: ExportRequest, plan: ExportPlan) -> CacheMaterial | None:
    """Find it, before an export that may take long; None where keys and values are not in 8 bits.

    Raises:
        EnvironmentFaultError: this onnxruntime-genai builds no such decoder.
        HolovExportError: see `recipes.pictures_of` and `questions_at_hand`.
    """
    if request.decoder_kv_cache is None:
        return None
    from holov_export.export.decoder_onnx import check_cache_version

    check_cache_version(str(require("onnxruntime_genai").__version__))
    recipe = recipe_from_name(request.decoder_kv_cache.recipe)
    pictures = pictures_of(recipe, request.decoder_kv_cache.pictures).calibrate
    questions, _ = questions_at_hand(plan, request.questions)
    return CacheMaterial(recipe, pictures[:: _step(len(pictures))], questions)


def write_decoder(plan: ExportPlan, checkpoint: Path, out: Path, *, cache_scales: Path | None = None) -> None:
    """Build the plan's decoder at `out`.

    Args:
        checkpoint: directory of the weights. cache_scales: see `decoder_onnx.decoder_from_checkpoint`.
    """
    from holov_export.export.decoder_onnx import decoder_from_checkpoint

    assert plan.decoder is not None
    decoder_from_checkpoint(
        checkpoint,
        out,
        plan.model.decoder,
        plan.decoder,
        provider=plan.decoder_provider,
        int4=plan.decoder_int4,
        cache_scales=cache_scales,
    )


def write_decoder_with_cache(
    bundle: Bundle, checkpoint: Path, material: CacheMaterial, tell: Callable[[str], None]
) -> CacheRanges:
    """Build the bundle's decoder twice: once to see how large keys and values get, once with scales for them.

    Args:
        bundle: that is being made; its vision graphs and its tokenizer are there already.

    Raises:
        PromptError: a question does not fit into the context; before anything is built.
        HolovExportError: see `decoder_onnx.decoder_from_checkpoint` and `decoder_cache.cache_ranges`.
    """
    plan = bundle.manifest.plan
    if material.questions is not None:
        check_prompts(bundle, material.questions, AskSettings(max_new_tokens=NEW_TOKENS))
    # a CPU runs no bf16, and of the graphs for CUDA only fp16's
    seen_in = DecoderPrecision.FP16 if plan.decoder is DecoderPrecision.BF16 else plan.decoder
    changes = {"decoder": seen_in, "decoder_provider": "cpu", "decoder_kv_cache": "float"}
    first = Bundle(bundle.folder, bundle.manifest.model_copy(update={"plan": plan.model_copy(update=changes)}))
    out = bundle.folder / DECODER
    tell(f"build the decoder ({first.manifest.plan.decoder_name}) for its keys and values")
    write_decoder(first.manifest.plan, checkpoint, out)
    ranges = cache_ranges(first, SeenIn(material.recipe, material.pictures, *_asked(material.questions)), tell=tell)
    shutil.rmtree(out)
    tell(f"build the decoder ({plan.decoder_name})")
    with tempfile.TemporaryDirectory() as folder:
        scales = Path(folder) / "scales.json"
        write_scales(scales, ranges.keys, ranges.values)
        write_decoder(plan, checkpoint, out, cache_scales=scales)
    return ranges


def _asked(dataset: Dataset | None) -> tuple[list[Asked], str, str]:
    """Some of the questions, spread over all of them, and the name and hash of the file."""
    if dataset is None:
        return [], "", ""
    some = dataset.questions[:: _step(len(dataset.questions))]
    return [(partial(_picture_of, question), question.text) for question in some], dataset.name, dataset.sha256


def _step(number: int) -> int:
    return max(1, -(-number // MOST_SEEN))


def _picture_of(question: Question) -> Image.Image:
    return image_from(question.picture.read())
