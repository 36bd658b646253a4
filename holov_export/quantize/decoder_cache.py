"""Scales of an embedded decoder's 8-bit keys and values: from what its answers store.

Answers to one question about a recipe's pictures, and to questions of the application where some are at hand. One scale
for each channel of each head; what is larger than everything that was seen is clipped.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from holov_export.bundle import Bundle
from holov_export.errors import CheckFailedError
from holov_export.policies import Frozen
from holov_export.quantize.observe import Tell, budgets_of, names_of, silent
from holov_export.recipes import Budget, NamedPicture, Recipe, recipe_sha256
from holov_export.runtime.decoder_ort import OrtDecoder
from holov_export.runtime.session import Session
from holov_export.spec import ExportPlan
from holov_export.tensors import FloatArray, SamplingSettings, StitchedPrompt
from holov_export.verify.pictures import pixels_for

#: the pictures of a recipe are asked this; this many tokens of an answer count
QUESTION = "what is shown?"
NEW_TOKENS = 32
#: int8 reaches as far on both sides
_LARGEST = 127
#: scales reach so far beyond what was seen, because clipping costs more than coarser rounding. Of keys the length of a
#: rotary pair counts already, which has room for other positions. Settled on the demo model, seen with photographs and
#: asked about its scenes; scripts/evaluate_precisions.py measures what is left.
_KEY_ROOM, _VALUE_ROOM = 1.25, 2.0
#: and for the same reason no scale is below this share of the layer's largest
_SMALLEST_SHARE = 1 / 8
#: answers between two messages
_TOLD = 16

#: a picture, opened when it is its turn, and a question about it
Asked = tuple[Callable[[], Image.Image], str]


@dataclass(frozen=True)
class SeenIn:
    """What is asked.

    Attributes:
        pictures: of the recipe, which also names the budgets.
        questions: those of the application, each with its picture. data, data_sha256: of the file that they are from.
    """

    recipe: Recipe
    pictures: Sequence[NamedPicture]
    questions: Sequence[Asked] = ()
    data: str = ""
    data_sha256: str = ""


class CacheRanges(Frozen):
    """How large keys and values get; goes to `reports/decoder-kv-cache.json`.

    Attributes:
        recipe, recipe_sha256, pictures: what was looked at, the pictures by (name, sha256).
        questions: how many others were asked, about pictures of their own. data, data_sha256: the file they are from.
        new_tokens: the longest answer. budgets: of each picture, shares are of its own tokens.
        longest: tokens of the longest prompt.
        keys, values: of each channel of each head, [layers][kv_heads * head_width]: largest absolute value, of keys
            largest length of its rotary pair.
    """

    recipe: str
    recipe_sha256: str
    pictures: tuple[tuple[str, str], ...]
    questions: int
    data: str = ""
    data_sha256: str = ""
    new_tokens: int = NEW_TOKENS
    budgets: tuple[Budget, ...]
    longest: int
    keys: tuple[tuple[float, ...], ...]
    values: tuple[tuple[float, ...], ...]


class _Watching:
    """A decoder that answers nothing and remembers how large the keys and values of its answers would get."""

    name, lanes = "watching", 1

    def __init__(self, decoder: OrtDecoder) -> None:
        self._decoder = decoder
        self.longest = 0
        self.keys: FloatArray | None = None
        self.values: FloatArray | None = None

    def stream(self, prompt: StitchedPrompt, sampling: SamplingSettings) -> Iterator[int]:
        keys, values = self._decoder.largest_stored(prompt, sampling)
        self.keys = keys if self.keys is None else np.maximum(self.keys, keys)
        self.values = values if self.values is None else np.maximum(self.values, values)
        self.longest = max(self.longest, len(prompt))
        return iter(())

    def close(self) -> None:
        """Nothing: who made the decoder closes it."""


def cache_ranges(bundle: Bundle, seen_in: SeenIn, *, threads: int | None = None, tell: Tell = silent) -> CacheRanges:
    """Answer a question about every picture, and all questions, at the recipe's budgets, and look at what is stored.

    Args:
        bundle: with a decoder whose keys and values are float32 or float16 and that runs on the CPU; it needs no
            manifest on disk.
        threads: CPU threads; None for one per core.
        tell: hears now and then how many answers there are.

    Raises:
        CheckFailedError: a key or value is not finite; names the layer.
        EnvironmentFaultError: ONNX Runtime cannot run the graphs.
        PromptError, ImageError: the model's context is too short for a picture, or a picture does not decode.
    """
    plan = bundle.manifest.plan
    assert bundle.decoder is not None
    cases = [*((picture.image, QUESTION) for picture in seen_in.pictures), *seen_in.questions]
    sampling = SamplingSettings(max_new_tokens=NEW_TOKENS)
    with closing(OrtDecoder(bundle.decoder, plan.model.decoder, provider="cpu", threads=threads)) as decoder:
        watching = _Watching(decoder)
        with Session.open(bundle, decoder=watching, provider="cpu", threads=threads) as session:
            for number, (open_picture, question) in enumerate(cases):
                if number % _TOLD == 0:
                    tell(f"look at keys and values: answers about {number} of {len(cases)} pictures seen")
                picture = open_picture()
                for budget in budgets_of(seen_in.recipe, _own_tokens(plan, picture)):
                    session.ask(picture, question, budget=budget, sampling=sampling)
    assert watching.keys is not None
    assert watching.values is not None
    _check_finite("keys", watching.keys, plan)
    _check_finite("values", watching.values, plan)
    return CacheRanges(
        recipe=seen_in.recipe.name,
        recipe_sha256=recipe_sha256(seen_in.recipe),
        pictures=names_of(seen_in.pictures),
        questions=len(seen_in.questions),
        data=seen_in.data,
        data_sha256=seen_in.data_sha256,
        budgets=tuple(seen_in.recipe.budgets),
        longest=watching.longest,
        keys=_rows(watching.keys),
        values=_rows(watching.values),
    )


def write_scales(path: Path, keys: Sequence[Sequence[float]], values: Sequence[Sequence[float]]) -> None:
    """Write the file that ONNX Runtime GenAI's builder reads (`kv_cache_scale_file`, for int8_per_channel).

    Args:
        keys, values: as in `CacheRanges`.

    Source: onnxruntime_genai 0.18 models/builders/base.py, make_kv_cache_scale_initializers.
    """
    scales = {"k_scales": _scales(keys, _KEY_ROOM), "v_scales": _scales(values, _VALUE_ROOM)}
    path.write_text(json.dumps({"scales": scales}), encoding="utf-8")


def _scales(largest: Sequence[Sequence[float]], room: float) -> list[list[float]]:
    """A positive scale for each channel; 1 for those of a layer that stores nothing but zeros."""
    found = []
    for row in largest:
        values = np.asarray(row, dtype=np.float64) * room
        least = values.max() * _SMALLEST_SHARE
        found.append((np.maximum(values, least) / _LARGEST if least > 0 else np.ones_like(values)).tolist())
    return found


def _own_tokens(plan: ExportPlan, picture: Image.Image) -> int:
    """N of a picture, where pictures have unequal numbers of tokens."""
    layouts = pixels_for(plan, [picture]).layouts if plan.packed else ()
    return layouts[0].tokens if layouts else plan.tokens


def _check_finite(kind: str, found: FloatArray, plan: ExportPlan) -> None:
    """Refuse a layer whose keys or values are not finite.

    Raises:
        CheckFailedError: names it.
    """
    for layer, row in enumerate(found):
        if not np.isfinite(row).all():
            where = "" if plan.decoder is None else f", seen in {plan.decoder.value}"
            raise CheckFailedError(
                f"the {kind} of the decoder's layer {layer} are not finite (NaN or infinite{where}).",
                hint="float16 ends at 65504: choose --decoder-precision fp32, or keys and values in float. Or look "
                "whether the weights are sound.",
            )


def _rows(found: FloatArray) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(float(value) for value in row) for row in found)
