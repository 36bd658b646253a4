"""TensorRT's side of running an engine: deserialising a plan, its tensors and profiles, execution contexts.

Whoever calls this has asked the driver for a GPU and compared the plan with its record (`engine.check_engine`): without
a driver `trt.Runtime` kills the process. Versions differ in names; each is asked for by name, never by number.
"""

from __future__ import annotations

import importlib
import mmap
import threading
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from holov_export.bundle import Bundle
from holov_export.engine import AxisSizes, Engine, ShapeProfile
from holov_export.errors import EngineError, EnvironmentFaultError, MissingExtraError
from holov_export.signature import BUDGET, OUTPUTS, QUOTA

#: TensorRT's names of element types as numpy has them; bfloat16 has none there and travels as its 16 bits
_NUMPY = {
    "FLOAT": "float32",
    "HALF": "float16",
    "BF16": "uint16",
    "INT32": "int32",
    "INT64": "int64",
    "INT8": "int8",
    "UINT8": "uint8",
    "BOOL": "bool",
}
_ASLEEP = 'Use the JetPack\'s own packages on a Jetson; elsewhere: pip install "holov-export[tensorrt]"'


@dataclass(frozen=True)
class EngineTensor:
    """An input or output of an engine.

    Attributes:
        dtype: of its elements in numpy; bfloat16 as "uint16". TensorRT 8 has int32 where the graph has int64.
        bfloat16: whether its elements are bfloat16.
        shape: -1 is a dynamic axis. axes: the same as the signature has it, with a name for each dynamic axis.
        on_host: True if TensorRT reads its values on the host (a shape value).
    """

    name: str
    dtype: np.dtype[Any]
    bfloat16: bool
    shape: tuple[int, ...]
    axes: tuple[int | str, ...]
    on_host: bool

    def sized(self, sizes: AxisSizes) -> tuple[int, ...]:
        """The shape with its dynamic axes filled."""
        return tuple(axis if isinstance(axis, int) else sizes.of(axis) for axis in self.axes)

    def bytes_for(self, sizes: AxisSizes) -> int:
        return int(np.prod(self.sized(sizes), dtype=np.int64)) * self.dtype.itemsize


def tensorrt_module() -> Any:
    """The module `tensorrt`. Importing it is safe without a GPU.

    Raises:
        MissingExtraError: it is not installed.
        EnvironmentFaultError: it is, and one of its libraries does not load.
    """
    try:
        return importlib.import_module("tensorrt")
    except ModuleNotFoundError as error:
        raise MissingExtraError("the Python package 'tensorrt' is not installed.", hint=_ASLEEP) from error
    except (ImportError, OSError) as error:
        raise EnvironmentFaultError(f"TensorRT does not load: {error}.", hint=_ASLEEP) from error


@lru_cache(maxsize=1)
def _logger_of(trt: Any) -> Any:
    """A logger that keeps TensorRT's last errors. One for the process: TensorRT holds on to the first it is given."""

    class Words(trt.ILogger):  # type: ignore[misc]  # the module is not known to the type checker
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: deque[str] = deque(maxlen=8)

        def log(self, severity: Any, msg: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                self.errors.append(msg)

    return Words()


class LoadedEngine:
    """A plan in device memory. Threads may share it; making contexts is locked.

    Attributes:
        tensors: by name.
        inputs: names of its inputs, in the order of the signature.
        profiles: as the record has them, compared with the plan's.
        scratch_bytes: device memory that a context needs while it runs, at its largest profile.
    """

    def __init__(self, trt: Any, engine: Engine, bundle: Bundle, *, weight_budget: int | None = None) -> None:
        """Deserialise a checked plan.

        Args:
            trt: the module.
            engine: its hash has been compared.
            bundle: says what the inputs and outputs are; its graph has the weights of an engine that was built without.
            weight_budget: bytes of weights that stay on the device, for an engine with weight streaming; None for all.

        Raises:
            EngineError: TensorRT refuses the plan, or it does not fit its record or this TensorRT.
        """
        self.profiles: tuple[ShapeProfile, ...] = engine.record.profiles
        self.label = engine.record.target
        self._trt, self._log = trt, _logger_of(trt)
        self._lock = threading.Lock()
        self._log.errors.clear()
        self._runtime = trt.Runtime(self._log)
        if engine.record.built_with.version_compatible:
            self._runtime.engine_host_code_allowed = True  # such a plan brings the runtime that it was built with
        with engine.plan.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as plan:
            self._engine = self._runtime.deserialize_cuda_engine(plan)
        if self._engine is None:
            raise self._refusal("does not deserialise the plan")
        if engine.record.built_with.stripped:
            self._refit(bundle.vision)
        if weight_budget is not None:
            self._stream_weights(weight_budget)
        manifest = bundle.manifest
        self.inputs = tuple(item.name for item in manifest.inputs)
        self._axes = {item.name: item.shape for item in (*manifest.inputs, *manifest.outputs)}
        self.tensors = {tensor.name: tensor for tensor in self._tensors()}
        self._check_tensors()
        self._check_profiles()
        v2 = hasattr(self._engine, "device_memory_size_v2")
        self.scratch_bytes = int(self._engine.device_memory_size_v2 if v2 else self._engine.device_memory_size)

    def _refusal(self, what: str) -> EngineError:
        """An error with TensorRT's own words."""
        words = " ".join(self._log.errors) or "it does not say why."
        return EngineError(
            f"TensorRT {self._trt.__version__} {what} (engine '{self.label}'): {words}",
            hint=f"Compile it again here: holov-export compile BUNDLE --target {self.label}",
        )

    def _refit(self, onnx: Path) -> None:
        """Put the weights of the bundle's graph into an engine that was built without them."""
        if not hasattr(self._trt, "OnnxParserRefitter"):
            raise EngineError(
                f"the engine '{self.label}' was built without its weights, and TensorRT {self._trt.__version__} cannot "
                "read them from an ONNX file.",
                hint="Compile the engine again without stripping.",
            )
        refitter = self._trt.Refitter(self._engine, self._log)
        parser = self._trt.OnnxParserRefitter(refitter, self._log)
        if not parser.refit_from_file(str(onnx)) or not refitter.refit_cuda_engine():
            raise self._refusal(f"does not take the weights of {onnx.name}")

    def _stream_weights(self, budget: int) -> None:
        streamable = getattr(self._engine, "streamable_weights_size", 0)
        if not streamable:
            raise EngineError(
                f"the engine '{self.label}' was built without weight streaming.",
                hint="Compile it with weight streaming, or leave the weight budget out.",
            )
        v2 = hasattr(self._engine, "weight_streaming_budget_v2")
        name, wanted = "weight_streaming_budget_v2" if v2 else "weight_streaming_budget", min(budget, streamable)
        setattr(self._engine, name, wanted)
        if getattr(self._engine, name) != wanted:
            raise self._refusal(f"takes no weight budget of {budget} bytes")

    def _tensors(self) -> list[EngineTensor]:
        engine, host = self._engine, self._trt.TensorLocation.HOST
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        found = []
        for name in names:
            dtype = engine.get_tensor_dtype(name).name
            if dtype not in _NUMPY:
                raise EngineError(f"the engine's tensor '{name}' has elements of type {dtype}.")
            shape = tuple(int(size) for size in engine.get_tensor_shape(name))
            # where it says both, an address in pinned memory serves the host and the device
            on_host = engine.get_tensor_location(name) == host or bool(engine.is_shape_inference_io(name))
            axes = self._axes.get(name, ())
            found.append(EngineTensor(name, np.dtype(_NUMPY[dtype]), dtype == "BF16", shape, axes, on_host))
        return found

    def _check_tensors(self) -> None:
        if set(self.tensors) != {*self.inputs, *OUTPUTS}:
            raise EngineError(
                f"the engine '{self.label}' has the tensors {', '.join(self.tensors)}; expected "
                f"{', '.join((*self.inputs, *OUTPUTS))}.",
                hint="Compile the bundle again with this version.",
            )
        for tensor in self.tensors.values():
            sizes = zip(tensor.shape, tensor.axes, strict=False)
            fits = all(isinstance(axis, str) or size in (axis, -1) for size, axis in sizes)
            if not fits or len(tensor.shape) != len(tensor.axes):
                raise EngineError(
                    f"the engine '{self.label}' has {tensor.name} as {tensor.shape}, the bundle as {tensor.axes}.",
                    hint="Compile the bundle again with this version.",
                )
        if not self.tensors[BUDGET].on_host:
            raise EngineError(
                f"the engine '{self.label}' takes the budget as data, not as a shape value.",
                hint="Export and compile the bundle again with this version.",
            )

    def _check_profiles(self) -> None:
        """The record's profiles are the plan's, for what every input of a graph can tell."""
        count = self._engine.num_optimization_profiles
        shaped = [name for name in self.inputs if name != BUDGET]
        found = [
            [[tuple(map(int, dims)) for dims in self._engine.get_tensor_profile_shape(name, index)] for name in shaped]
            for index in range(count)
        ]
        wanted = [
            [[self.tensors[name].sized(sizes) for sizes in profile.corners] for name in shaped]
            for profile in self.profiles
        ]
        if found != wanted:
            quota = shaped.index(QUOTA)
            batches = ", ".join(str(tuple(size for (size,) in shapes[quota])) for shapes in found)
            raise EngineError(
                f"the record of the engine '{self.label}' names {profiles_text(self.profiles)}, its plan has the "
                f"batches {batches}{' and other axes' if self.profiles[0].axes else ''}.",
                hint="Compile the engine again.",
            )

    def context(self, scratch: int, stream: int, profile: int) -> Any:
        """A new execution context in one profile, over `scratch_bytes` of the caller's device memory at `scratch`.

        Contexts that share scratch memory must run one after the other.

        Raises:
            EngineError: TensorRT refuses; TensorRT 8 does where an engine was built without profile sharing.
        """
        with self._lock:
            self._log.errors.clear()
            made = self._bare_context()
            if made is None:
                raise self._refusal("makes no execution context")
            if hasattr(made, "set_device_memory"):
                made.set_device_memory(scratch, self.scratch_bytes)
            else:
                made.device_memory = scratch
            if made.active_optimization_profile != profile and not self._switched(made, profile, stream):
                raise self._refusal(f"does not switch to profile {profile}")
        return made

    @staticmethod
    def _switched(context: Any, profile: int, stream: int) -> bool:
        try:
            return bool(context.set_optimization_profile_async(profile, stream))
        except RuntimeError:  # what the bindings make of a refusal
            return False

    def _bare_context(self) -> Any:
        strategy = getattr(self._trt, "ExecutionContextAllocationStrategy", None)
        if strategy is None:  # TensorRT 8
            return self._engine.create_execution_context_without_device_memory()
        return self._engine.create_execution_context(strategy.USER_MANAGED)

    def shape(self, context: Any, sizes: AxisSizes, addresses: Mapping[str, int]) -> None:
        """Give a context its shapes and the addresses of all tensors; the budget is read from its host address now.

        Raises:
            EngineError: TensorRT refuses the shapes, or computes others than the signature says.
        """
        self._log.errors.clear()
        for name, address in addresses.items():
            if not context.set_tensor_address(name, address):
                raise self._refusal(f"takes no address for {name}")
        for name in self.inputs:
            tensor = self.tensors[name]
            if -1 in tensor.shape and not context.set_input_shape(name, tensor.sized(sizes)):
                raise self._refusal(f"refuses {sizes_text(sizes)}")
        try:
            missing = list(context.infer_shapes())
        except RuntimeError as error:  # what the bindings make of a refusal
            raise self._refusal(f"cannot tell the shapes of {sizes_text(sizes)}") from error
        if missing:
            raise self._refusal(f"does not know the shapes of {', '.join(missing)}")
        for name in OUTPUTS:
            got, wanted = tuple(context.get_tensor_shape(name)), self.tensors[name].sized(sizes)
            if got != wanted:
                raise EngineError(f"the engine '{self.label}' gives {name} the shape {got}, expected {wanted}.")

    def enqueue(self, context: Any, stream: int) -> None:
        """Put one run of a shaped context on the stream.

        Raises:
            EngineError: TensorRT refuses.
        """
        if not context.execute_async_v3(stream):
            raise self._refusal("does not run")

    def close(self) -> None:
        """Drop the plan; all contexts are dropped by now."""
        self._engine = None
        self._runtime = None


def profiles_text(profiles: Sequence[ShapeProfile]) -> str:
    """Like "batch 1..4 at budget 1..576; batch 8..8 at budget 64..64"; of packed graphs with the further axes."""
    return "; ".join(
        f"batch {profile.batch[0]}..{profile.batch[2]} at budget {profile.budget[0]}..{profile.budget[2]}"
        + "".join(f", {axis.name} {axis.span[0]}..{axis.span[2]}" for axis in profile.axes)
        for profile in profiles
    )


def sizes_text(sizes: AxisSizes) -> str:
    """Like "2 images at budget 64"; of packed graphs "2 rows at budget 64, views 10, tokens 2304"."""
    further = "".join(f", {name} {size}" for name, size in sizes.further)
    return f"{sizes.batch} {'rows' if further else 'images'} at budget {sizes.budget}{further}"


def profile_for(profiles: Sequence[ShapeProfile], sizes: AxisSizes) -> int | None:
    """The first profile that holds the sizes."""
    return next((index for index, profile in enumerate(profiles) if profile.holds(sizes)), None)
