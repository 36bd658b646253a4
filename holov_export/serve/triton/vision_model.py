"""`holov_vision`: encoded pictures become visual tokens; requests of several clients run through the graph together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from holov_export.bundle import Bundle
from holov_export.errors import BudgetError, HolovExportError, ImageError, UsageError
from holov_export.runtime.media import Media, Seen
from holov_export.runtime.picture_reader import image_from
from holov_export.runtime.runner import checked_budget, default_budget
from holov_export.runtime.session import Session
from holov_export.serve.triton.bridge import Bridge
from holov_export.serve.triton.config_text import Batching, ModelConfig, TensorConfig
from holov_export.serve.triton.picture_layouts import text_from_layout
from holov_export.serve.triton.settings import ModelSettings, settings_from_arguments
from holov_export.tensors import ImageRows

NAME = "holov_vision"
IMAGES = "images"
BUDGET = "budget"
TOKENS = "tokens"
POSITIONS = "positions"
COUNTS = "counts"
LAYOUTS = "layouts"


@dataclass(frozen=True)
class Wanted:
    """What one request asks for: b prompts of n pictures each.

    Attributes:
        groups: the decoded pictures of each prompt.
        quota: tokens of each picture, prompt after prompt.
    """

    groups: tuple[Media, ...]
    quota: tuple[int, ...]


def vision_config(bundle: Bundle, settings: ModelSettings, *, batch: int, instances: int, gpu: bool) -> ModelConfig:
    """Its configuration: in are the bytes of image files, out are rows that go where the placeholders are.

    Shapes of one prompt with n pictures of which R tokens stay: images [n], budget [n] or [1] (0 for the usual one);
    tokens [R, D], positions [R], counts [n], layouts [n]. R is the longest prompt's where a request has several; rows
    past the sum of a prompt's counts are zero, their positions -1.
    """
    plan = bundle.manifest.plan
    dtype = "float16" if plan.precision.dtype == "float16" else "float32"
    return ModelConfig(
        name=NAME,
        backend="python",
        inputs=(
            TensorConfig(IMAGES, "string", (-1,), ragged=True),
            TensorConfig(BUDGET, "int32", (-1,), optional=True, ragged=True),
        ),
        outputs=(
            TensorConfig(TOKENS, dtype, (-1, plan.model.decoder.width)),
            TensorConfig(POSITIONS, "int64", (-1,)),
            TensorConfig(COUNTS, "int64", (-1,)),
            TensorConfig(LAYOUTS, "string", (-1,)),
        ),
        batching=Batching(largest=batch, delay_microseconds=5000, queue=settings.queue),
        instances=instances,
        device="gpu" if gpu else "cpu",
        parameters=settings.parameters(),
    )


class VisionModel:
    """What Triton's Python backend calls."""

    def initialize(self, arguments: Mapping[str, str]) -> None:
        """Open the bundle, load the graph, run it once."""
        self._bridge = Bridge()
        self._settings = settings_from_arguments(arguments, ModelSettings)
        bundle = self._settings.opened()
        self._plan = bundle.manifest.plan
        self._dtype = np.float16 if self._plan.precision.dtype == "float16" else np.float32
        self._session = Session.open(
            bundle,
            decoder="none",
            engine=self._settings.engine,
            target=self._settings.target,
            provider=self._settings.provider,
            threads=self._settings.threads,
            verify=self._settings.verify,
        )

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """One response for each request; a request that is wrong gets its error, and the others their tokens."""
        wanted: dict[int, Wanted] = {}
        responses: dict[int, Any] = {}
        for number, request in enumerate(requests):
            try:
                wanted[number] = self._wanted(request)
            except Exception as error:
                responses[number] = self._bridge.failure(error)
        for number, found in zip(wanted, self._seen(list(wanted.values())), strict=True):
            if isinstance(found, Exception):
                responses[number] = self._bridge.failure(found)
            else:
                responses[number] = self._response(found)
        return [responses[number] for number in range(len(requests))]

    def finalize(self) -> None:
        """Release the graph."""
        self._session.close()

    def _wanted(self, request: Any) -> Wanted:
        """Read a request, and refuse alone what would spoil the run of all.

        Raises:
            ImageError, BudgetError, UsageError: what is wrong with it.
        """
        files = self._bridge.needed(request, IMAGES)
        prompts, images = files.shape
        if not 1 <= images <= self._settings.images:
            raise UsageError(f"a prompt has {images} images, it can have 1 to {self._settings.images}.")
        quota = quota_from_input(self._bridge.input(request, BUDGET), prompts, images, self._usual, self._plan.tokens)
        pictures = [image_from(_file(item), max_pixels=self._settings.pixels) for item in files.ravel().tolist()]
        groups = tuple(Media(pictures[first : first + images]) for first in range(0, len(pictures), images))
        return Wanted(groups, quota)

    @property
    def _usual(self) -> int:
        return default_budget(self._plan)

    def _seen(self, wanted: Sequence[Wanted]) -> list[list[Seen] | Exception]:
        """What each request's prompts see; all in one run, or one after the other if that fails."""
        if not wanted:
            return []
        groups = [group for item in wanted for group in item.groups]
        quota = [number for item in wanted for number in item.quota]
        try:
            found = iter(self._session.see_groups(groups, quota)[0])
            return [[next(found) for _ in item.groups] for item in wanted]
        except Exception as error:
            if len(wanted) == 1 or not isinstance(error, HolovExportError):
                return [error] * len(wanted)
            return [self._seen([item])[0] for item in wanted]

    def _response(self, prompts: Sequence[Seen]) -> Any:
        rows = [list(seen.images) for seen in prompts]
        bridge = self._bridge
        layouts = [[text_from_layout(item.layout).encode() for item in items] for items in rows]
        counts = [[len(item.rows) for item in items] for items in rows]
        tokens = _padded([[item.rows for item in items] for items in rows], 0)
        return bridge.response(
            [
                bridge.tensor(TOKENS, tokens.astype(self._dtype)),
                bridge.tensor(POSITIONS, _padded([[item.positions for item in items] for items in rows], -1)),
                bridge.tensor(COUNTS, np.array(counts, dtype=np.int64)),
                bridge.tensor(LAYOUTS, np.array(layouts, dtype=np.object_)),
            ]
        )


def quota_from_input(
    budget: npt.NDArray[Any] | None, prompts: int, images: int, usual: int, tokens: int
) -> tuple[int, ...]:
    """The tokens of each image, from the input `budget`.

    Args:
        budget: int [prompts, images] or [prompts, 1], 0 for the usual one; None where it was left out.
        prompts, images: of the request, and of each prompt.
        usual: tokens of an image when nobody says. tokens: N, the most.

    Raises:
        BudgetError: another shape, or a number out of its range.
    """
    if budget is None:
        return (usual,) * (prompts * images)
    if budget.shape not in ((prompts, images), (prompts, 1)):
        raise BudgetError(
            f"the budget has the shape {list(budget.shape)} for images of the shape [{prompts}, {images}].",
            hint="Give one number for each image, or one for each prompt.",
        )
    numbers = np.broadcast_to(budget, (prompts, images)).ravel().tolist()
    return tuple(usual if number == 0 else checked_budget(number, tokens) for number in numbers)


def _file(item: Any) -> bytes:
    """The bytes of an image file. A string would be read as a path of the server's own."""
    if not isinstance(item, bytes) or not item:
        raise ImageError("an image is empty; the input takes the bytes of image files.")
    return item


def _padded(prompts: Sequence[Sequence[npt.NDArray[Any]]], fill: int) -> npt.NDArray[Any]:
    """[b, longest, ...]: the rows of each prompt's images one after another, filled up."""
    joined = [np.concatenate(list(images)) for images in prompts]
    longest = max(len(item) for item in joined)
    whole = np.full((len(joined), longest, *joined[0].shape[1:]), fill, dtype=joined[0].dtype)
    for place, item in zip(whole, joined, strict=True):
        place[: len(item)] = item
    return whole


def rows_from_outputs(
    tokens: npt.NDArray[Any], positions: npt.NDArray[Any], counts: npt.NDArray[Any], layouts: Sequence[Any]
) -> list[ImageRows]:
    """The rows of each image of one prompt, from the outputs of this model without their first axis.

    Raises:
        UsageError: they contradict each other.
    """
    sizes = [int(count) for count in counts.ravel()]
    rows = sum(sizes)
    if min(sizes, default=0) < 0 or len(tokens) < rows or len(positions) < rows or len(layouts) != len(sizes):
        raise UsageError(
            f"the counts {sizes} do not fit {len(tokens)} tokens, {len(positions)} positions, {len(layouts)} layouts."
        )
    ends = np.cumsum([0, *sizes])
    return [
        ImageRows(tokens[start:end], positions[start:end].astype(np.int64), layout)
        for start, end, layout in zip(ends, ends[1:], layouts, strict=False)
    ]
