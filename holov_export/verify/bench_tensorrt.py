"""A bundle's TensorRT engine, ready to be timed, and the times of its layers."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from holov_export.bundle import Bundle
from holov_export.engine import AxisSizes, Engine, EngineRecord, ShapeProfile
from holov_export.errors import EngineError, EnvironmentFaultError, UnknownNameError
from holov_export.runtime.device_memory import CudaApi, cuda_api
from holov_export.runtime.engine_choice import engines_of
from holov_export.runtime.engine_context import LoadedEngine, profile_for, profiles_text, tensorrt_module
from holov_export.runtime.host_arrays import bfloat16_bits
from holov_export.runtime.lane import Feed, Shape
from holov_export.runtime.packed_parts import packed_parts
from holov_export.runtime.runner_trt import TrtRunner
from holov_export.signature import BUDGET, OUTPUTS
from holov_export.spec import ExportPlan
from holov_export.targets import EngineTarget, target_from_name
from holov_export.tensors import PixelBatch
from holov_export.verify.bench import OnDevice
from holov_export.verify.bench_engines import Contestant, contestant_info
from holov_export.verify.bench_results import SelectionShare
from holov_export.verify.bench_selection import tensorrt_selection_share

if TYPE_CHECKING:
    from holov_export.compile.compilation import CompileOptions

Tell = Callable[[str], None]


def tensorrt_contestant(
    bundle: Bundle, label: str, *, target: EngineTarget | None, cuda_graphs: bool = True, memory: str = "auto"
) -> Contestant:
    """The bundle's engine for a target, or the only one that fits this machine.

    Raises:
        HardwareError, MissingExtraError, EngineError, IntegrityError: see `TrtRunner`.
    """
    began = time.perf_counter()
    name = target.name if target else None
    runner = TrtRunner(bundle, target=name, cuda_graphs=cuda_graphs, memory=memory)
    loaded = time.perf_counter() - began
    engine = runner.engine

    def run(pixels: PixelBatch, budget: int) -> OnDevice | None:
        runner.run(pixels, budget, saliency=False)
        times = runner.last_times
        return None if times is None else OnDevice(times.compute, times.upload + times.download)

    def share(pixels: PixelBatch, budget: int, runs: int) -> SelectionShare:
        with LayerProfiler(bundle, engine, pixels, budget, memory=memory) as profiler:
            return tensorrt_selection_share(profiler.layer_times, runs=runs)

    def device_bytes() -> int:
        return runner.device_memory.engine + runner.device_memory.lanes

    info = contestant_info(
        bundle,
        label,
        engine=runner.name,
        kind="tensorrt",
        load_seconds=loaded,
        built_with=built_with_text(engine.record),
    )
    return Contestant(info, bundle, runner, run, share, target or _target_of(engine), device_bytes)


def built_with_text(record: EngineRecord) -> str:
    """TensorRT 8.6.0 on NVIDIA H200 in 93 s, fp16-flag, 623 MB."""
    built = record.built_with
    return (
        f"TensorRT {built.tensorrt} on {built.gpu} in {record.build_seconds:.0f} s, {built.network}, "
        f"{record.bytes / 1e6:.0f} MB"
    )


def _target_of(engine: Engine) -> EngineTarget | None:
    """The target that an engine was built for, if it is one of those that ship."""
    try:
        return target_from_name(engine.record.target)
    except UnknownNameError:  # a target file of the user's own, which is not at hand
        return None


def engine_for_comparison(
    baseline: Bundle,
    like: Bundle,
    target: EngineTarget | None,
    options: CompileOptions | None = None,
    *,
    tell: Tell,
) -> Engine:
    """Build the engine of a baseline as that of `like` was built: the same target, settings and batches.

    A plain encoder runs at K = N only, so its profiles are tuned for that; the others keep the profiles.

    `options` are those of `like`; their profiles are not used.

    Raises:
        EngineError: `like` has no engine for the target, or the build fails. HardwareError: see `engine_from_bundle`.
    """
    from holov_export.compile.compilation import CompileOptions
    from holov_export.compile.engine_from_onnx import engine_from_bundle

    found = next((item for item in engines_of(like) if target is None or item.record.target == target.name), None)
    if found is None:
        raise EngineError(
            f"the bundle '{like.folder.name}' has no engine to compare with.",
            hint=f"Build one: holov-export compile {like.folder} --target TARGET"
            + ("" if like.is_default else f" --method {like.method}"),
        )
    plan = baseline.manifest.plan
    only = plan.tokens if plan.policy.method == "none" else None
    chosen = target or target_from_name(found.record.target)
    made = replace(options or CompileOptions(), batch=None, budget=None, max_tokens=None, clip_frames=None)
    if plan.packed:
        made = replace(made, profiles=(), shapes=packed_shapes(found.record, whole=only is not None))
    else:
        made = replace(made, profiles=profile_texts(found.record, only=only))
    return engine_from_bundle(baseline, chosen, made, tell=tell)


def profile_texts(record: EngineRecord, *, only: int | None) -> tuple[str, ...]:
    """The profiles of an engine as `CompileOptions.profiles`; `only`: the one budget that they are to hold."""
    texts = []
    for profile in record.profiles:
        budget = (only,) * 3 if only is not None else profile.budget
        texts.append(f"batch={':'.join(map(str, profile.batch))},budget={':'.join(map(str, budget))}")
    return tuple(dict.fromkeys(texts))


def packed_shapes(record: EngineRecord, *, whole: bool) -> tuple[ShapeProfile, ...]:
    """The profiles of a packed engine; `whole`: for rows that keep all their tokens."""
    if not whole:
        return record.profiles
    return tuple(
        profile.model_copy(update={"budget": tuple(sizes.of("tokens") for sizes in profile.corners)})
        for profile in record.profiles
    )


# ---------------------------------------------------------------------------------------------------- layers


class LayerProfiler:
    """An engine at one batch and budget in a context of its own, under TensorRT's IProfiler. A context manager."""

    def __init__(
        self, bundle: Bundle, engine: Engine, pixels: PixelBatch, budget: int, *, memory: str = "auto"
    ) -> None:
        """Load the plan a second time and allocate buffers. The engine was checked when its runner was made.

        Frames of clips get equal quotas.

        Raises:
            EngineError: no profile holds the shape, or TensorRT refuses. EnvironmentFaultError: out of memory.
        """
        trt = tensorrt_module()
        self._cuda: CudaApi = cuda_api(memory)
        self._loaded = LoadedEngine(trt, engine, bundle)
        self._seen: list[tuple[str, float]] = []
        self._stack = ExitStack()
        try:
            self._stream = self._own(self._cuda.create_stream(), self._cuda.destroy_stream)
            self._context = self._context_for(trt, bundle.manifest.plan, pixels, budget)
        except BaseException:
            self.__exit__()
            raise

    def layer_times(self) -> Sequence[tuple[str, float]]:
        """Run once: (layer, milliseconds).

        Raises:
            EnvironmentFaultError: TensorRT reported no layer.
        """
        self._seen.clear()
        self._loaded.enqueue(self._context, self._stream)
        self._cuda.wait_for_stream(self._stream)
        if not self._seen:
            raise EnvironmentFaultError("TensorRT's profiler reported no layer times.")
        return tuple(self._seen)

    def _own(self, handle: int, release: Callable[[int], None]) -> int:
        self._stack.callback(release, handle)
        return handle

    def _shaped(self, plan: ExportPlan, pixels: PixelBatch, budget: int) -> tuple[Feed, Shape]:
        """What a run of the whole batch is fed, and its shape."""
        profiles, quota = self._loaded.profiles, np.full(len(pixels), budget)
        if plan.packed:
            parts = packed_parts(pixels, quota, plan, "frames", self._loaded)
            if len(parts) == 1:
                return parts[0].feed, parts[0].shape
        else:
            sizes = AxisSizes(len(pixels), budget)
            chosen = profile_for(profiles, sizes)
            if chosen is not None:
                return Feed(pixels.pixel_values, quota), Shape(chosen, sizes)
        raise EngineError(f"no profile holds {len(pixels)} images at budget {budget}: {profiles_text(profiles)}.")

    def _context_for(self, trt: Any, plan: ExportPlan, pixels: PixelBatch, budget: int) -> Any:
        """A shaped context whose inputs are filled and whose layers are reported to `_seen`."""
        cuda, loaded = self._cuda, self._loaded
        feed, (chosen, sizes) = self._shaped(plan, pixels, budget)
        scratch = self._own(cuda.allocate(max(1, loaded.scratch_bytes)), cuda.free)
        context = loaded.context(scratch, self._stream, chosen)
        self._stack.callback(self._drop_context)
        addresses = {array.name: self._filled(array.name, array.values) for array in feed.on_host}
        addresses[BUDGET] = self._filled(BUDGET, np.array([sizes.budget]))
        for name in OUTPUTS:
            addresses[name] = self._own(cuda.allocate(loaded.tensors[name].bytes_for(sizes)), cuda.free)
        loaded.shape(context, sizes, addresses)
        context.profiler = profiler_into(trt, self._seen)
        cuda.wait_for_stream(self._stream)
        return context

    def _filled(self, name: str, values: np.ndarray[Any, Any]) -> int:
        """Address of an input's values: on the device, and of the budget on the host."""
        tensor = self._loaded.tensors[name]
        made = bfloat16_bits(values) if tensor.bfloat16 else np.ascontiguousarray(values, dtype=tensor.dtype)
        pinned = self._own(self._cuda.allocate_pinned(made.nbytes), self._cuda.free_pinned)
        _write(pinned, made)
        if tensor.on_host:
            return pinned
        address = self._own(self._cuda.allocate(made.nbytes), self._cuda.free)
        self._cuda.copy(address, pinned, made.nbytes, self._stream)
        return address

    def _drop_context(self) -> None:
        self._context = None

    def __enter__(self) -> LayerProfiler:
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()
        self._loaded.close()


def profiler_into(trt: Any, seen: list[tuple[str, float]]) -> Any:
    """An IProfiler that appends (layer, milliseconds) to a list."""

    class Profiler(trt.IProfiler):  # type: ignore[misc]  # the module is not known to the type checker
        def __init__(self) -> None:
            trt.IProfiler.__init__(self)

        def report_layer_time(self, layer_name: str, ms: float) -> None:
            seen.append((layer_name, float(ms)))

    return Profiler()


def _write(address: int, values: np.ndarray[Any, Any]) -> None:
    ctypes.memmove(address, values.ctypes.data, values.nbytes)
