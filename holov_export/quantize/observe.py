"""The ranges of what a vision graph's products multiply, over the pictures and budgets of a recipe.

What is padding widens nothing: see `quantize.watched`.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from fractions import Fraction
from pathlib import Path

import numpy as np
import numpy.typing as npt

from holov_export.bundle import Bundle
from holov_export.errors import CheckFailedError, UsageError
from holov_export.quantize.histograms import Histogram, entropy_threshold, percentile_range
from holov_export.quantize.partial import Progress, Seen, read_progress, write_progress
from holov_export.quantize.ranges import ChannelRange, Ranges, RangesRecord, TensorRange
from holov_export.quantize.watched import Watched, real_rows, run_watched, watched_graph
from holov_export.recipes import Budget, NamedPicture, Recipe, recipe_sha256
from holov_export.runtime.engine_choice import graph_hashes
from holov_export.verify.pictures import pixels_for
from holov_export.verify.vision_loss import Size, tokens_of

Tell = Callable[[str], None]
#: hears how many further pictures are done
Advance = Callable[[int], None]
#: of the partial file; another number is another key
_PARTIAL = 1


def silent(message: str) -> None:
    """A `Tell` that says nothing."""


def unheard(pictures: int) -> None:
    """An `Advance` that nobody hears."""


def observe(
    view: Bundle,
    recipe: Recipe,
    pictures: Sequence[NamedPicture],
    *,
    partial: Path | None = None,
    threads: int | None = None,
    tell: Tell = silent,
    advance: Advance = unheard,
) -> Ranges:
    """Run the view's graph on all pictures, at all budgets of the recipe, and collect what its products multiply.

    Activations in front of the selection do not depend on the budget and are counted once for each picture. What is
    held is one picture's activations. A bfloat16 graph is widened to float32, because a CPU cannot run it.

    Args:
        view: a bundle that stands for one of its graphs.
        partial: where the state is kept after each picture; a run that finds it there goes on with the next picture.
        threads: CPU threads; None for one per core.
        tell: hears of activations that are zero everywhere.

    Raises:
        UsageError: see `check_can_observe`; or the graph has no product with weights.
        CheckFailedError: an activation is not finite; names it and the picture.
        MissingExtraError, EnvironmentFaultError: onnx or ONNX Runtime is missing, or cannot run the graph.
        StorageError: `partial` cannot be written.
    """
    check_can_observe(view, pictures)
    key = _key(view, recipe, pictures)
    progress = Progress(0, 0.0, {}) if partial is None else read_progress(partial, key, tell)
    advance(progress.done)
    start = time.perf_counter() - progress.seconds
    if progress.done < len(pictures):
        with watched_graph(view, threads) as watched:
            for picture in pictures[progress.done :]:
                _add_picture(progress.seen, watched, recipe, picture)
                progress.done += 1
                progress.seconds = time.perf_counter() - start
                if partial is not None:
                    write_progress(partial, key, progress)
                advance(1)
    record = _record(view, recipe, pictures, progress, tell)
    record = record.model_copy(update={"seconds": round(time.perf_counter() - start, 3)})
    return Ranges(record, {name: ChannelRange(seen.low, seen.high) for name, seen in progress.seen.items()})


def check_can_observe(view: Bundle, pictures: Sequence[NamedPicture]) -> None:
    """Refuse what no calibration can come from.

    Raises:
        UsageError: the graph is quantised already, or there are no pictures.
    """
    plan = view.manifest.plan
    if plan.quantization is not None:
        raise UsageError(
            f"the bundle '{view.folder.name}' is quantised already ({plan.precision_name}).",
            hint="Calibrate the bundle that it was made from.",
        )
    if not pictures:
        raise UsageError("there are no pictures to calibrate with.", hint="Name a recipe or a folder that has some.")


def names_of(pictures: Sequence[NamedPicture]) -> tuple[tuple[str, str], ...]:
    """(name, sha256) of each, as records have them."""
    return tuple((picture.name, picture.sha256) for picture in pictures)


def size_from_budget(budget: Budget) -> Size:
    """A recipe's budget as `vision_loss.tokens_of` takes it."""
    return Fraction(1) if budget == "all" else Fraction(budget) if isinstance(budget, str) else budget


def budgets_of(recipe: Recipe, tokens: int) -> tuple[int, ...]:
    """The recipe's budgets for a picture of so many tokens, each once."""
    return tuple(dict.fromkeys(tokens_of(size_from_budget(budget), tokens) for budget in recipe.budgets))


def _key(view: Bundle, recipe: Recipe, pictures: Sequence[NamedPicture]) -> str:
    """What a state belongs to."""
    words = [_PARTIAL, *graph_hashes(view), recipe_sha256(recipe), names_of(pictures)]
    return hashlib.sha256(json.dumps(words).encode()).hexdigest()


def _add_picture(seen: dict[str, Seen], watched: Watched, recipe: Recipe, picture: NamedPicture) -> None:
    """Count a picture's activations at every budget.

    Raises:
        CheckFailedError: one is not finite.
    """
    plan = watched.view.manifest.plan
    pixels = pixels_for(plan, [picture.image()])
    # where pictures have unequal numbers of tokens, a share is of their own, and one that has fewer gives all
    own = pixels.layouts[0].tokens if pixels.layouts else plan.tokens
    for index, budget in enumerate(budgets_of(recipe, own)):
        names = [name for name in watched.names if index == 0 or name in watched.moving]
        positions, values = run_watched(watched, pixels, budget, names)
        for name, value in zip(names, values, strict=True):
            rows = real_rows(value, positions) if name in watched.moving else value.reshape(-1, value.shape[-1])
            if not _add_rows(seen, name, rows.astype(np.float32, copy=False), histogram=recipe.algorithm != "minmax"):
                raise CheckFailedError(
                    f"the activation '{name}' is not finite (NaN or infinite) on the picture '{picture.name}'.",
                    hint="float16 ends at 65504: calibrate an fp32 or bf16 bundle. Or look whether the weights are "
                    "sound: holov-export verify",
                )


def _add_rows(seen: dict[str, Seen], name: str, rows: npt.NDArray[np.float32], *, histogram: bool) -> bool:
    """Count float32 [rows, width]; False if not all values are finite."""
    with np.errstate(invalid="ignore"):
        low, high = rows.min(0), rows.max(0)
    if not (np.isfinite(low).all() and np.isfinite(high).all()):
        return False
    if name in seen:
        so_far = seen[name]
        so_far.low, so_far.high = np.minimum(so_far.low, low), np.maximum(so_far.high, high)
    else:
        so_far = seen[name] = Seen(low, high, Histogram() if histogram else None)
    if so_far.histogram is not None:
        so_far.histogram.add(rows)
    return True


def _record(
    view: Bundle, recipe: Recipe, pictures: Sequence[NamedPicture], progress: Progress, tell: Tell
) -> RangesRecord:
    """What was seen as a record; `tell` hears of activations that are zero everywhere."""
    tensors = {name: _range_of(seen, recipe) for name, seen in progress.seen.items()}
    for name, found in tensors.items():
        if found.low == found.high == 0.0:
            tell(f"'{name}' is zero on every picture; its range is 0..0")
    graph_sha256, weights_sha256 = graph_hashes(view)
    return RangesRecord(
        recipe=recipe.name,
        recipe_sha256=recipe_sha256(recipe),
        graph_sha256=graph_sha256,
        weights_sha256=weights_sha256,
        algorithm=recipe.algorithm,
        pictures=names_of(pictures),
        budgets=budgets_of(recipe, view.manifest.plan.tokens),
        tensors=tensors,
        created=datetime.now(timezone.utc).replace(microsecond=0).isoformat(),
        seconds=progress.seconds,
    )


def _range_of(seen: Seen, recipe: Recipe) -> TensorRange:
    low, high = float(seen.low.min()), float(seen.high.max())
    if seen.histogram is None or low == high:
        return TensorRange(low=low, high=high)
    if recipe.algorithm == "percentile":
        left, right = percentile_range(seen.histogram, recipe.percentile)
        return TensorRange(low=max(low, left), high=min(high, right))
    threshold = entropy_threshold(seen.histogram)
    return TensorRange(low=min(max(low, -threshold), threshold), high=max(min(high, threshold), -threshold))
