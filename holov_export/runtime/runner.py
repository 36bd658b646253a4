"""What runs a vision graph: `with OrtRunner(bundle) as runner: runner.run(pixels, budget=64)`."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from holov_export.errors import BudgetError
from holov_export.runtime.packing import Spread
from holov_export.spec import ExportPlan
from holov_export.tensors import Int64Array, PixelBatch, VisualTokens

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass(frozen=True)
class RunTimes:
    """Seconds of one run.

    Attributes:
        host: wall clock from the call to the result.
        upload, compute, download: on the device, between its own events: pixels and quotas in, the engine, tokens out.
    """

    host: float
    upload: float
    compute: float
    download: float

    @property
    def gpu(self) -> float:
        """On the device altogether."""
        return self.upload + self.compute + self.download

    def __add__(self, other: RunTimes) -> RunTimes:
        return RunTimes(
            self.host + other.host,
            self.upload + other.upload,
            self.compute + other.compute,
            self.download + other.download,
        )


class Runner(Protocol):
    """Runs one vision graph. A context manager; `close` may be called twice.

    Attributes:
        name: of the engine and the device, for people.
        tokens: N, patch tokens of one image: the largest budget.
    """

    name: str
    tokens: int

    def run(
        self,
        pixels: PixelBatch,
        budget: int,
        quota: Sequence[int] | None = None,
        *,
        saliency: bool | None = None,
        spread: Spread = "frames",
    ) -> VisualTokens:
        """Select and project the visual tokens of a batch.

        Args:
            pixels: B images, or clips.
            budget: K, the size of the token axis, 1..N.
            quota: tokens wanted for each image, 1..K; None for K each. An image that has fewer keeps all.
            saliency: also fetch the saliency of all N tokens; None for what the runner was made with.
            spread: of clips: "frames" for equal quotas of all frames, "clip" for one quota of all of them.

        Raises:
            BudgetError: budget or quota outside its range.
        """
        ...

    def close(self) -> None: ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None: ...


def joined(parts: Sequence[VisualTokens]) -> VisualTokens:
    """One batch from the results of its parts; K and N are those of the largest."""
    if len(parts) == 1:
        return parts[0]
    saliency = [part.saliency for part in parts if part.saliency is not None]
    return VisualTokens(
        _stacked([part.tokens for part in parts], 0.0),
        _stacked([part.positions for part in parts], -1),
        np.concatenate([part.counts for part in parts]),
        _stacked(saliency, -1.0) if saliency else None,
    )


_Array = TypeVar("_Array", bound=npt.NDArray[Any])


def _stacked(arrays: Sequence[_Array], fill: float) -> _Array:
    """Arrays [B, M, ..] one after another, those with a shorter second axis filled up."""
    longest = max(array.shape[1] for array in arrays)
    padded = []
    for array in arrays:
        room = [(0, 0), (0, longest - array.shape[1]), *[(0, 0)] * (array.ndim - 2)]
        padded.append(np.pad(array, room, constant_values=fill) if room[1][1] else array)
    return np.concatenate(padded)  # type: ignore[return-value]


def default_budget(plan: ExportPlan) -> int:
    """Tokens of an image when nobody says: the plan's, or a ninth; of the largest image where they differ."""
    return plan.budget or a_ninth(plan.tokens)


def default_quotas(plan: ExportPlan, pixels: PixelBatch) -> list[int]:
    """Tokens of each image when nobody says: the plan's number, or a ninth of its own."""
    if not pixels.layouts:
        return [default_budget(plan)] * len(pixels)
    return [min(plan.budget or a_ninth(layout.tokens), layout.tokens) for layout in pixels.layouts]


def a_ninth(tokens: int) -> int:
    """One ninth of N, rounded, at least 1: 64 of 576, 16 of 144. Source: arXiv 2510.02912, the 88.9 % setting."""
    return max(1, round(tokens / 9))


def checked_budget(budget: int, tokens: int) -> int:
    """`budget` if it is an integer in 1..`tokens`.

    Raises:
        BudgetError: names the range.
    """
    value = _integer(budget, "the budget")
    if not 1 <= value <= tokens:
        raise BudgetError(f"the budget is {value}, it must be in 1..{tokens} (the tokens of one image).")
    return value


def chosen_budget(budget: int | None, quota: Sequence[int] | None, tokens: int, usual: int) -> int:
    """`budget` checked; where it is None the largest quota, and without quotas the usual one.

    Raises:
        BudgetError: names the range, or a quota that is no integer.
    """
    if budget is None:
        budget = max(_quotas(quota), default=usual) if quota is not None else usual
    return checked_budget(budget, tokens)


def quota_array(quota: Sequence[int] | None, budget: int, images: int) -> Int64Array:
    """int64 [B]: the quota of each image; the whole budget each if `quota` is None.

    Raises:
        BudgetError: a wrong number of quotas, or one outside 1..budget.
    """
    if quota is None:
        return np.full(images, budget, dtype=np.int64)
    values = _quotas(quota)
    if len(values) != images:
        raise BudgetError(f"{_counted(len(values), 'quota')} for {_counted(images, 'image')}.", hint="Give one each.")
    for number, value in enumerate(values, start=1):
        if not 1 <= value <= budget:
            raise BudgetError(f"the quota of image {number} is {value}, it must be in 1..{budget} (the budget).")
    return np.array(values, dtype=np.int64)


def _quotas(quota: Sequence[int]) -> list[int]:
    """The quotas as Python integers; they may come as a list, a tuple or a numpy array."""
    try:
        items = list(quota)
    except TypeError:
        raise BudgetError(f"the quota is {quota!r}, it must be a list: one integer for each image.") from None
    return [_integer(item, f"the quota of image {number}") for number, item in enumerate(items, start=1)]


def _integer(value: object, what: str) -> int:
    """Python and numpy integers; True is none of them here."""
    try:
        if isinstance(value, (bool, np.bool_)):
            raise TypeError
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise BudgetError(f"{what} is {value!r}, it must be an integer.") from None


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
