"""Scales of an embedded decoder's 8-bit keys and values: from what its answers store.

Answers to one question about a recipe's pictures, and to questions of the application where some are at hand: a model
that is asked about other things than it was seen with clips what it stores.

One scale for each channel of each head. Keys are stored turned by their positions, so a channel of theirs holds both
numbers of its pair by turns.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from holov_export.bundle import Bundle
from holov_export.errors import CheckFailedError
from holov_export.policies import Frozen
from holov_export.quantize.observe import Tell, budgets_of, names_of, silent
from holov_export.recipes import NamedPicture, Recipe, recipe_sha256
from holov_export.runtime.decoder_ort import OrtDecoder
from holov_export.runtime.session import Session
from holov_export.tensors import FloatArray, SamplingSettings, StitchedPrompt

#: the pictures of a recipe are asked this; this many tokens of an answer count
QUESTION = "what is shown?"
NEW_TOKENS = 32
#: int8 reaches as far on both sides
_LARGEST = 127
#: scales reach so far beyond what was seen, because clipping costs more than coarser rounding. The demo model's logits,
#: root mean square of 400 questions about its scenes: seen with photographs, where channels stay up to four times
#: smaller, 0.27 off without room, 0.12 with twice, 0.014 with four times; seen with its own scenes 0.053, 0.010, 0.025.
_HEADROOM = 2
#: and for the same reason no scale is below this share of the layer's largest
_SMALLEST_SHARE = 1 / 8


#: a picture, opened when it is its turn, and a question about it
Asked = tuple[Callable[[], Image.Image], str]


class CacheRanges(Frozen):
    """How large keys and values get; goes to `reports/decoder-kv-cache.json`.

    Attributes:
        recipe, recipe_sha256, pictures: what was looked at, the pictures by (name, sha256).
        questions: how many others were asked, about pictures of their own.
        new_tokens: the longest answer. budgets: visual tokens of each answer.
        longest: tokens of the longest prompt.
        keys, values: largest absolute value of each channel of each head, [layers][kv_heads * head_width].
    """

    recipe: str
    recipe_sha256: str
    pictures: tuple[tuple[str, str], ...]
    questions: int
    new_tokens: int = NEW_TOKENS
    budgets: tuple[int, ...]
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
        self._decoder.close()


def cache_ranges(
    bundle: Bundle,
    recipe: Recipe,
    pictures: Sequence[NamedPicture],
    questions: Sequence[Asked] = (),
    *,
    threads: int | None = None,
    tell: Tell = silent,
) -> CacheRanges:
    """Answer a question about every picture, and all questions, at the recipe's budgets, and look at what is stored.

    Args:
        bundle: with a decoder whose keys and values are float32 or float16 and that runs on the CPU; it needs no
            manifest on disk.
        questions: those of the application, each with its picture.
        threads: CPU threads; None for one per core.

    Raises:
        CheckFailedError: a key or value is not finite; names the layer.
        EnvironmentFaultError: ONNX Runtime cannot run the graphs.
        PromptError, ImageError: the model's context is too short for a picture, or a picture does not decode.
    """
    plan = bundle.manifest.plan
    assert bundle.decoder is not None
    watching = _Watching(OrtDecoder(bundle.decoder, plan.model.decoder, provider="cpu", threads=threads))
    budgets = budgets_of(recipe, plan.tokens)
    sampling = SamplingSettings(max_new_tokens=NEW_TOKENS)
    with Session.open(bundle, decoder=watching, provider="cpu", threads=threads) as session:
        tell(f"look at the keys and values of answers ({len(pictures)} pictures, {len(questions)} questions)")
        for image, question in (*((picture.image, QUESTION) for picture in pictures), *questions):
            seen = image()
            for budget in budgets:
                session.ask(seen, question, budget=budget, sampling=sampling)
    assert watching.keys is not None
    assert watching.values is not None
    for kind, found in (("keys", watching.keys), ("values", watching.values)):
        for layer, row in enumerate(found):
            if not np.isfinite(row).all():
                raise CheckFailedError(
                    f"the {kind} of the decoder's layer {layer} are not finite (NaN or infinite).",
                    hint="float16 ends at 65504: choose --decoder-precision fp32. Or look whether the weights are "
                    "sound.",
                )
    return CacheRanges(
        recipe=recipe.name,
        recipe_sha256=recipe_sha256(recipe),
        pictures=names_of(pictures),
        questions=len(questions),
        budgets=budgets,
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
    scales = {"k_scales": _scales(keys), "v_scales": _scales(values)}
    path.write_text(json.dumps({"scales": scales}), encoding="utf-8")


def _scales(largest: Sequence[Sequence[float]]) -> list[list[float]]:
    """A positive scale for each channel; 1 for those of a layer that stores nothing but zeros."""
    found = []
    for row in largest:
        values = np.asarray(row, dtype=np.float64) * _HEADROOM
        least = values.max() * _SMALLEST_SHARE
        found.append((np.maximum(values, least) / _LARGEST if least > 0 else np.ones_like(values)).tolist())
    return found


def _rows(found: FloatArray) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(float(value) for value in row) for row in found)
