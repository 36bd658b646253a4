"""TensorRT over a bundle's compiled engine.

It has run against the stand-ins of TensorRT 8.6.0 to 11.4.0 in the tests, not yet on a real GPU.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Literal

import numpy as np

from holov_export.bundle import Bundle
from holov_export.engine import AxisSizes
from holov_export.errors import EngineError, ImageError
from holov_export.gpu import require_gpu
from holov_export.runtime.device_array import CudaArray, device_view
from holov_export.runtime.device_memory import cuda_api
from holov_export.runtime.device_tokens import DeviceTokens
from holov_export.runtime.engine_choice import checked_engine
from holov_export.runtime.engine_context import LoadedEngine, profile_for, profiles_text, tensorrt_module
from holov_export.runtime.lane import Feed, Lane, LaneSettings, Shape
from holov_export.runtime.lane_pool import LanePool
from holov_export.runtime.packed_parts import packed_parts
from holov_export.runtime.packing import Spread, pictures_from_rows
from holov_export.runtime.runner import RunTimes, checked_budget, joined, quota_array
from holov_export.signature import PIXEL_VALUES
from holov_export.tensors import FloatArray, PixelBatch, VisualTokens

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass(frozen=True)
class DeviceMemory:
    """Bytes on the device.

    Attributes:
        engine: by how much free memory fell while the plan was loaded; other programs are counted in.
        lanes: buffers and scratch memory of the lanes that exist.
    """

    engine: int
    lanes: int


class TrtRunner:
    """One engine, loaded once. It may be called from several threads; each call has a lane of its own.

    A batch above the largest of the engine's profiles is run in parts. An engine of a packed graph takes pictures and
    clips of unequal size, as large as it was compiled for, from host memory.

    Attributes:
        engine: the folder and record that was chosen.
    """

    def __init__(
        self,
        bundle: Bundle,
        *,
        target: str | None = None,
        engine: str | Path | None = None,
        saliency: bool = False,
        cuda_graphs: bool = True,
        graph_limit: int = 16,
        lanes: int = 4,
        memory: str = "auto",
        weight_budget: int | None = None,
        verify: Literal["full", "size"] = "full",
    ) -> None:
        """Choose the engine, check it, load it, and make the first lane.

        Args:
            bundle: an opened bundle.
            target: name of the engine in the bundle; None for the only one that fits this GPU and this TensorRT.
            engine: folder of an engine outside of the bundle, instead of `target`.
            saliency: what `run` does when it is not told.
            cuda_graphs: capture a CUDA graph for each (B, K) that comes a second time; of a packed graph all axes
                have to be as long as before, which pictures of one size are.
            graph_limit: so many graphs a lane at most; the least recently used one goes.
            lanes: so many runs at once; further callers wait. Each has buffers for the engine's largest shape.
            memory: "cuda-python", "torch", or "auto" for what is installed.
            weight_budget: bytes of weights on the device, for an engine with weight streaming; None for all.
            verify: "full" compares the plan's sha256 with its record, "size" only its size.

        Raises:
            HardwareError: no GPU; TensorRT is not touched then.
            MissingExtraError: TensorRT, or cuda-python and torch, are not installed.
            EngineError: no engine that fits, or one for another GPU, TensorRT or graph.
            IntegrityError: the plan is missing, truncated or changed.
            EnvironmentFaultError: the GPU has too little memory, or CUDA or TensorRT fails.
        """
        gpu = require_gpu()
        trt = tensorrt_module()
        self.engine = checked_engine(bundle, gpu, trt.__version__, target=target, folder=engine, full=verify == "full")
        self._saliency = saliency
        self._plan = bundle.manifest.plan
        self.tokens = self._plan.tokens
        self.name = f"tensorrt {trt.__version__} ({gpu.name}, {self.engine.record.target})"
        self._cuda = cuda_api(memory)
        self._quiet = threading.RLock()
        self._settings = LaneSettings(graph_limit if cuda_graphs else 0, self._without_graphs)
        self._times = threading.local()
        free = self._cuda.free_bytes()
        self._loaded = LoadedEngine(trt, self.engine, bundle, weight_budget=weight_budget)
        self._engine_bytes = max(0, free - self._cuda.free_bytes())
        self._pool = LanePool(lambda: Lane(self._cuda, self._loaded, self._settings, self._quiet), max(1, lanes))
        try:
            with self._pool.lane():
                pass
        except BaseException:
            self._loaded.close()
            raise

    # ------------------------------------------------------------------------------------------------ running

    def run(
        self,
        pixels: PixelBatch | CudaArray,
        budget: int,
        quota: Sequence[int] | None = None,
        *,
        saliency: bool | None = None,
        spread: Spread = "frames",
        stream: int | None = None,
    ) -> VisualTokens:
        """See `Runner.run`; the arrays are the caller's. A bfloat16 engine's tokens come as float32.

        Args:
            pixels: a batch, or [B, 3, H, W] on the device in the engine's type; of packed graphs a batch.
            stream: handle of the stream that writes pixels on the device; None for what the array says of it, and where
                it says nothing the whole device is waited for.

        Raises:
            EngineError: no profile of the engine holds the shape.
        """
        fetch = self._saliency if saliency is None else saliency
        if self._plan.packed:
            return self._run_packed(pixels, budget, quota, saliency=fetch, spread=spread)
        values, shapes, quotas = self._request(pixels, budget, quota)
        parts: list[VisualTokens] = []
        times = RunTimes(0.0, 0.0, 0.0, 0.0)
        with self._pool.lane() as lane:
            at = 0
            for shape in shapes:
                rows = slice(at, at + shape.sizes.batch)
                feed = Feed(_rows(values, rows), quotas[rows])
                visual, spent = lane.run(feed, shape, saliency=fetch, stream=stream)
                parts.append(visual)
                times += spent
                at += shape.sizes.batch
        self._times.last = times
        return joined(parts)

    def _run_packed(
        self,
        pixels: PixelBatch | CudaArray,
        budget: int,
        quota: Sequence[int] | None,
        *,
        saliency: bool,
        spread: Spread,
    ) -> VisualTokens:
        """Pictures and clips of unequal size: part after part, the rows put together for each of them."""
        budget = checked_budget(budget, self.tokens)
        if not isinstance(pixels, PixelBatch):
            raise ImageError(
                "pixels of unequal pictures cannot be taken from the device.", hint="Give the batch in host memory."
            )
        if len(pixels):
            self._check_pixels(pixels)
        parts = packed_parts(pixels, quota_array(quota, budget, len(pixels)), self._plan, spread, self._loaded)
        found: list[VisualTokens] = []
        times = RunTimes(0.0, 0.0, 0.0, 0.0)
        with self._pool.lane() as lane:
            for part in parts:
                rows, spent = lane.run(part.feed, part.shape, saliency=saliency)
                found.append(pictures_from_rows(rows, part.inputs, part.pixels.layouts))
                times += spent
        self._times.last = times
        return joined(found)

    def run_on_device(
        self,
        pixels: PixelBatch | CudaArray,
        budget: int,
        quota: Sequence[int] | None = None,
        *,
        stream: int | None = None,
    ) -> DeviceTokens:
        """Enqueue a run and return at once; the tokens stay on the device and are the caller's until dropped.

        Args, Raises: as of `run`. A batch above the engine's largest is refused: its parts would lie apart. So is every
        batch of a packed graph: the rows of its pictures are put together on the host.
        """
        if self._plan.packed:
            raise EngineError(
                f"the tokens of '{self._plan.model.name}' cannot stay on the device: its pictures have unequal numbers "
                "of tokens, and their rows are put together on the host.",
                hint="Use run() instead.",
            )
        values, shapes, quotas = self._request(pixels, budget, quota)
        if len(shapes) > 1:
            raise EngineError(
                f"{len(quotas)} images are more than the engine '{self.engine.record.target}' takes at once: "
                f"{self._profiles_text()}.",
                hint="Ask for them in parts, or compile with a larger batch.",
            )
        with self._pool.lane() as lane:
            return lane.run_on_device(Feed(values, quotas), shapes[0], stream=stream)

    @property
    def last_times(self) -> RunTimes | None:
        """Of this thread's last `run`; None before the first."""
        last: RunTimes | None = getattr(self._times, "last", None)
        return last

    @property
    def device_memory(self) -> DeviceMemory:
        """What the runner holds on the device now."""
        return DeviceMemory(self._engine_bytes, sum(lane.device_bytes for lane in self._pool.lanes))

    # ------------------------------------------------------------------------------------------------ requests

    def _request(
        self, pixels: PixelBatch | CudaArray, budget: int, quota: Sequence[int] | None
    ) -> tuple[FloatArray | CudaArray, list[Shape], np.ndarray[tuple[int], np.dtype[np.int64]]]:
        """Checked pixels, the shapes of the parts that they are run in, and all quotas."""
        budget = checked_budget(budget, self.tokens)
        tensor = self._loaded.tensors[PIXEL_VALUES]
        values: FloatArray | CudaArray
        if isinstance(pixels, PixelBatch):
            self._check_pixels(pixels)
            values, size = pixels.pixel_values, pixels.pixel_values.shape
        else:
            values, size = pixels, self._checked_device_pixels(pixels)
            if tuple(size[1:]) != tensor.shape[1:]:
                raise ImageError(f"the pixels are {tuple(size[1:])}, the engine takes {tensor.shape[1:]}.")
        quotas = quota_array(quota, budget, size[0])
        shapes = self._shapes(int(size[0]), budget)
        if len(shapes) > 1 and not isinstance(values, np.ndarray):
            raise EngineError(
                f"{size[0]} images on the device are more than the engine takes at once: {self._profiles_text()}."
            )
        return values, shapes, quotas

    def _check_pixels(self, pixels: PixelBatch) -> None:
        """Refuse pixels of another size, and those of another kind of graph."""
        size, wanted = tuple(pixels.pixel_values.shape[1:]), self._loaded.tensors[PIXEL_VALUES].shape[1:]
        if size != wanted:
            raise ImageError(f"the pixels are {size}, the engine takes {wanted}.")
        if bool(pixels.layouts) != self._plan.packed:
            raise ImageError(
                f"the pixels come {'with' if pixels.layouts else 'without'} layouts: they are those of another graph."
            )

    def _checked_device_pixels(self, pixels: CudaArray) -> tuple[int, ...]:
        """The shape of pixels on the device, in the engine's type."""
        if not hasattr(pixels, "__cuda_array_interface__"):
            raise ImageError(f"pixels of type {type(pixels).__name__} are neither a PixelBatch nor on the GPU.")
        tensor = self._loaded.tensors[PIXEL_VALUES]
        view = device_view(pixels)
        if len(view.shape) != 4:
            raise ImageError(f"the pixels on the device are {view.shape}, expected [B, 3, H, W].")
        if view.dtype != tensor.dtype:
            wanted = "bfloat16, viewed as uint16" if tensor.bfloat16 else str(tensor.dtype)
            raise ImageError(f"the pixels on the device are {view.dtype}, the engine takes {wanted}.")
        return view.shape

    def _shapes(self, batch: int, budget: int) -> list[Shape]:
        """How a batch is run: at once, or in parts as large as a profile holds."""
        profiles, whole = self._loaded.profiles, AxisSizes(batch, budget)
        held = profile_for(profiles, whole)
        if held is not None:
            return [Shape(held, whole)]
        largest = max((item.batch[2] for item in profiles if item.holds(AxisSizes(item.batch[2], budget))), default=0)
        for division in _divisions(batch, largest):
            parts = [AxisSizes(size, budget) for size in division]
            chosen = [profile_for(profiles, sizes) for sizes in parts]
            if None not in chosen:
                return [Shape(index, sizes) for index, sizes in zip(chosen, parts, strict=True) if index is not None]
        raise EngineError(
            f"the engine '{self.engine.record.target}' has no profile for {batch} images at budget {budget}: "
            f"{self._profiles_text()}.",
            hint="Compile it with --batch and --budget that hold them.",
        )

    def _profiles_text(self) -> str:
        return profiles_text(self._loaded.profiles)

    def _without_graphs(self, why: str) -> None:
        """CUDA graphs cannot be made here: say so once and go on without."""
        if self._settings.graphs:
            self._settings.graphs = 0
            self.name += ", no CUDA graphs"
            warnings.warn(f"CUDA graphs are off, every run is enqueued anew: {why}", RuntimeWarning, stacklevel=2)

    # ------------------------------------------------------------------------------------------------ life

    def close(self) -> None:
        """Wait for the runs under way and free the engine and all memory but that of outputs still held."""
        if self._pool.close():
            self._loaded.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def _rows(values: FloatArray | CudaArray, rows: slice) -> FloatArray | CudaArray:
    return values[rows] if isinstance(values, np.ndarray) else values


def _divisions(batch: int, largest: int) -> list[list[int]]:
    """Ways to run a batch in parts of at most `largest`: full parts and a rest, or parts of about one size."""
    if largest < 1:
        return []
    full, rest = divmod(batch, largest)
    parts = full + (rest > 0)
    small, more = divmod(batch, parts)
    return [[largest] * full + [rest] * (rest > 0), [small + 1] * more + [small] * (parts - more)]
