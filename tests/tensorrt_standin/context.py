"""IExecutionContext: shapes, addresses and enqueueV3, with the rules that real contexts only sometimes enforce."""

from __future__ import annotations

import ctypes
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from tensorrt_standin.cuda_memory import Misuse, bytes_at
from tensorrt_standin.cuda_streams import CudaError, Work
from tensorrt_standin.facade import Core
from tensorrt_standin.numbers import NUMPY_TYPES

if TYPE_CHECKING:
    from tensorrt_standin.engine import ICudaEngine
    from tensorrt_standin.plan import Binding
    from tensorrt_standin.world import World

_ALIGNMENT = 256  # Source: NvInferRuntime.h, setTensorAddress
_WINDOW_S = 0.0005  # how long an enqueue keeps the context busy, so that a second thread is likely to be seen


@dataclass(frozen=True)
class Launch:
    """What one enqueue fixed: input shapes, shape values, output shapes, device addresses."""

    shapes: dict[str, tuple[int, ...]]
    values: dict[str, tuple[int, ...]]
    outputs: dict[str, tuple[int, ...]]
    addresses: dict[str, int]


class IExecutionContext(Core):
    """State of one execution; one thread at a time."""

    writable: ClassVar[dict[str, str]] = {
        "name": "str",
        "debug_sync": "bool",
        "enqueue_emits_profile": "bool",
        "persistent_cache_limit": "int",
        "nvtx_verbosity": "ProfilingVerbosity",
        "profiler": "IProfiler",
    }

    def __init__(self, world: World, engine: ICudaEngine, reserved: int, *, user_managed: bool) -> None:
        super().__init__(world)
        self._engine, self._reserved = engine, reserved
        world.cuda.memory.reserved += reserved
        self.user_managed = user_managed
        self.name, self.debug_sync, self.enqueue_emits_profile, self.persistent_cache_limit = "", False, True, 0
        self.nvtx_verbosity = world.enum("ProfilingVerbosity", "LAYER_NAMES_ONLY")
        self.profiler: Any = None
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.memory_address, self.memory_size, self.consumed_event = 0, 0, 0
        self.state = 0  # changes with everything that makes a captured graph stale
        self.enqueued_state: int | None = None
        self._enqueued_values: dict[str, tuple[int, ...]] = {}
        self._busy = threading.Lock()
        self.profile = 0
        if not self._free(0):
            self.profile = -1
            text = "Could not set default profile 0 for execution context. Profile index must be set explicitly."
            world.log(engine.logger, "WARNING", text)

    def __del__(self) -> None:
        self.world.cuda.memory.reserved -= getattr(self, "_reserved", 0)

    def _free(self, profile: int) -> bool:
        """Whether no other context holds the profile; sharing is a preview feature in 8.6 and the rule from 10 on."""
        others = [item for item in self._engine.contexts if item is not self]
        return self._engine.plan.profile_sharing or all(item.profile != profile for item in others)

    @contextmanager
    def _alone(self, what: str) -> Iterator[None]:
        if not self._busy.acquire(blocking=False):
            raise Misuse(f"{what} while another thread is using the same execution context")
        try:
            yield
        finally:
            self._busy.release()

    def _refuse(self, text: str) -> bool:
        self._engine.complain(text)
        return False

    # ---- state

    @property
    def engine(self) -> ICudaEngine:
        return self._engine

    @property
    def active_optimization_profile(self) -> int:
        return self.profile

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        """Forgets the input shapes. Raises RuntimeError as pyCore.cpp does."""
        with self._alone("set_optimization_profile_async"):
            problem = ""
            if not 0 <= profile_index < len(self._engine.plan.profiles):
                problem = f"Profile index {profile_index} is out of range"
            elif not self._free(profile_index):
                problem = (
                    f"Profile {profile_index} has been chosen by another IExecutionContext. Use another profileIndex "
                    "or destroy the IExecutionContext that use this profile."
                )
            if problem:
                self._refuse(problem)
                raise RuntimeError("Error in set optimization profile async.")
            if profile_index != self.profile:
                self.shapes.clear()
                self.state += 1
            self.profile = int(profile_index)
            return True

    def set_input_shape(self, name: str, shape: Any) -> bool:
        with self._alone("set_input_shape"):
            sizes = tuple(int(item) for item in tuple(shape))
            problem = self._shape_problem(name, sizes)
            if problem:
                return self._refuse(problem)
            if self.shapes.get(name) != sizes:
                self.shapes[name] = sizes
                self.state += 1
            return True

    def _shape_problem(self, name: str, sizes: tuple[int, ...]) -> str | None:
        found = self._engine.binding(name)
        if found is None or not found.is_input:
            return f"Given invalid tensor name: {name}. Get valid tensor names with getIOTensorName()"
        if self.profile < 0:
            return "setInputShape needs an optimization profile"
        if len(sizes) != len(found.shape):
            return f"{name} has {len(found.shape)} dimensions, not {len(sizes)}"
        allowed = self._engine.plan.profiles[self.profile].get(name)
        for place, (size, static) in enumerate(zip(sizes, found.shape, strict=True)):
            if static != -1 and size != static:
                text = f"Static dimension mismatch while setting input shape for {name}."
                return f"{text} Set dimensions are {sizes}. Expected dimensions are {found.shape}."
            if allowed and not allowed.low[place] <= size <= allowed.high[place]:
                return (
                    f"Supplied binding dimension {sizes} for {name} exceed min ~ max range at index {place}, maximum "
                    f"dimension in profile is {allowed.high[place]}, minimum dimension in profile is "
                    f"{allowed.low[place]}, but supplied dimension is {size}."
                )
        return None

    def set_tensor_address(self, name: str, memory: int) -> bool:
        with self._alone("set_tensor_address"):
            found = self._engine.binding(name)
            if found is None:
                return self._refuse(f"Given invalid tensor name: {name}. Get valid tensor names with getIOTensorName()")
            address = int(memory)
            if address and not found.host and address % _ALIGNMENT:
                raise Misuse(f"the address of {name} is not aligned to {_ALIGNMENT} bytes")
            self.addresses[name] = address
            return True

    def get_tensor_address(self, name: str) -> int:
        return self.addresses.get(name, 0)

    def set_device_memory(self, memory: int, size: int) -> None:
        if not self.user_managed:
            self._refuse("the context allocates its own device memory")
            return
        if self.memory_address != int(memory):
            self.state += 1
        self.memory_address, self.memory_size = int(memory), int(size)

    @property
    def device_memory(self) -> int:
        raise TypeError("device_memory can only be set")

    @device_memory.setter
    def device_memory(self, memory: int) -> None:
        self.set_device_memory(memory, self._engine.device_memory_size)

    def update_device_memory_size_for_shapes(self) -> int:
        return self._engine.get_device_memory_size_for_profile_v2(max(self.profile, 0))

    def set_input_consumed_event(self, event: int) -> bool:
        self.consumed_event = int(event)
        return True

    def get_input_consumed_event(self) -> int:
        return self.consumed_event

    # ---- questions

    def infer_shapes(self) -> list[str]:
        """Names of the inputs of which something is missing: dimensions, or the address of a shape tensor."""
        return [item.name for item in self._inputs() if self._missing(item)]

    @property
    def all_binding_shapes_specified(self) -> bool:
        return not any(-1 in item.shape and item.name not in self.shapes for item in self._inputs())

    @property
    def all_shape_inputs_specified(self) -> bool:
        return not any(item.host and not self.addresses.get(item.name) for item in self._inputs())

    def get_tensor_shape(self, name: str) -> Any:
        dims = self.world.classes["Dims"]
        found = self._engine.binding(name)
        if found is None:
            self._refuse(f"Given invalid tensor name: {name}")
            return dims()
        if found.is_input:
            return dims(self.shapes.get(name, found.shape))
        if self.infer_shapes() or self._engine.numbers is None:
            return dims(found.shape)
        return dims(self._output_shapes(self._values())[name])

    def get_max_output_size(self, name: str) -> int:
        """Bytes at the current input shapes and the largest shape values of the profile; -1: not known yet."""
        found = self._engine.binding(name)
        if found is None or found.is_input or not self.all_binding_shapes_specified or self._engine.numbers is None:
            return -1
        largest = {key: item.high for key, item in self._engine.plan.values[self.profile].items()}
        shape = self._output_shapes(largest)[name]
        return int(np.prod(shape, dtype=np.int64)) * NUMPY_TYPES[found.dtype].itemsize

    # ---- execution

    def execute_async_v3(self, stream_handle: int) -> bool:
        """Queue one execution on the stream; False after an error in the log."""
        with self._alone("execute_async_v3"), self.world.cuda.lock:
            time.sleep(_WINDOW_S)
            problem = self._enqueue_problem()
            if problem:
                return self._refuse(problem)
            try:
                return self._enqueue(int(stream_handle))
            except CudaError as error:
                return self._refuse(f"CUDA error: {error.code.name}")

    def _enqueue_problem(self) -> str | None:
        if self._engine.numbers is None:
            return "the engine's weights were stripped and it was not refitted"
        if self.profile < 0:
            return "no optimization profile has been selected"
        for item in self._engine.plan.bindings:
            if not self.addresses.get(item.name):
                return (
                    f"Neither address or allocator is set for {'in' if item.is_input else 'out'}put tensor {item.name}"
                )
        missing = self.infer_shapes()
        if missing:
            return f"Not all input dimensions have been specified: {', '.join(missing)}"
        for name, given in self._values().items():
            allowed = self._engine.plan.values[self.profile][name]
            if any(not a <= b <= c for a, b, c in zip(allowed.low, given, allowed.high, strict=True)):
                return f"the values {given} of shape tensor {name} lie outside {allowed.low} to {allowed.high}"
        if self.user_managed and self.memory_size < self._engine.device_memory_size:
            return "the context needs device memory that nobody gave it"
        return None

    def _enqueue(self, handle: int) -> bool:
        streams = self.world.cuda.streams
        stream = streams.stream(handle)
        values = self._values()
        launch = Launch(self._input_shapes(), values, self._output_shapes(values), dict(self.addresses))
        self._check_memory(launch, "execute_async_v3")
        key_changed = self.enqueued_state != self.state or self._enqueued_values != values
        if stream.capture is not None and key_changed:
            # Source: documentation, "CUDA graphs": enqueue once after the shapes changed, before the capture
            stream.capture.invalid = True
            return self._refuse("a capture needs one execution with the same shapes before it")
        if not handle:
            text = "Using default stream in enqueueV3() may lead to performance issues"
            self.world.log(self._engine.logger, "WARNING", text)
        self.enqueued_state, self._enqueued_values = self.state, values
        streams.enqueue(stream, self._work(launch))
        if self.consumed_event:
            streams.record(streams.event(self.consumed_event), stream)
        if self.profiler is not None and self.enqueue_emits_profile and stream.capture is None:
            for layer in self._engine.plan.layers:  # the milliseconds mean nothing, they only differ from zero
                self.profiler.report_layer_time(str(layer["Name"]), 0.001)
        return True

    def _work(self, launch: Launch) -> Work:
        """The queued execution; it does not keep the context alive, as real work does not."""
        context, engine, state = weakref.ref(self), self._engine, self.state

        def check() -> None:
            """Source: documentation, "CUDA graphs": one context for each graph, not changed after the capture."""
            alive = context()
            if alive is None:
                raise Misuse("a CUDA graph was launched after the execution context in it was destroyed")
            if alive.state != state or alive._enqueued_values != launch.values:
                raise Misuse("a CUDA graph was launched after the execution context in it got other shapes")

        def run() -> None:
            alive = context()
            if alive is None:
                raise Misuse("an execution context was destroyed before its work was done")
            alive._check_memory(launch, "an execution")
            inputs = {item.name: _read(item, launch) for item in engine.plan.bindings if item.is_input}
            assert engine.numbers is not None
            for name, value in engine.numbers.run(inputs).items():
                data = np.ascontiguousarray(value)
                ctypes.memmove(launch.addresses[name], data.ctypes.data, data.nbytes)

        exclusive = {id(self): "execution context"}
        if self.user_managed:
            exclusive[self.memory_address] = "device memory of two execution contexts"
        return Work("TensorRT", run, check, exclusive)

    # ---- parts

    def _inputs(self) -> list[Binding]:
        return [item for item in self._engine.plan.bindings if item.is_input]

    def _missing(self, item: Binding) -> bool:
        if -1 in item.shape and item.name not in self.shapes:
            return True
        return item.host and not self.addresses.get(item.name)

    def _input_shapes(self) -> dict[str, tuple[int, ...]]:
        return {item.name: self.shapes.get(item.name, item.shape) for item in self._inputs()}

    def _values(self) -> dict[str, tuple[int, ...]]:
        """What the host addresses of the shape tensors hold now."""
        values = {}
        for item in self._inputs():
            if item.host:
                dtype = NUMPY_TYPES[item.dtype]
                size = int(np.prod(self.shapes.get(item.name, item.shape), dtype=np.int64)) * dtype.itemsize
                address = self.addresses[item.name]
                block = self.world.cuda.memory.block_at(address, size, f"shape tensor {item.name}")
                if block is not None and block.kind == "device":
                    raise Misuse(f"shape tensor {item.name} needs a host address, and got device memory")
                values[item.name] = tuple(np.frombuffer(bytes_at(address, size), dtype).tolist())
        return values

    def _output_shapes(self, values: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        assert self._engine.numbers is not None
        return self._engine.numbers.output_shapes(self._input_shapes(), values)

    def _check_memory(self, launch: Launch, what: str) -> None:
        """Every device tensor lies wholly in living device memory."""
        for item in self._engine.plan.bindings:
            shape = launch.shapes[item.name] if item.is_input else launch.outputs[item.name]
            size = int(np.prod(shape, dtype=np.int64)) * NUMPY_TYPES[item.dtype].itemsize
            if not item.host:
                self.world.cuda.memory.require("device", launch.addresses[item.name], size, f"{what} ({item.name})")
        if self.user_managed:
            self.world.cuda.memory.require("device", self.memory_address, self.memory_size, f"{what} (activations)")


def _read(item: Binding, launch: Launch) -> np.ndarray:
    shape, dtype = launch.shapes[item.name], NUMPY_TYPES[item.dtype]
    if item.host:
        return np.array(launch.values[item.name], dtype).reshape(shape)
    data = bytes_at(launch.addresses[item.name], int(np.prod(shape, dtype=np.int64)) * dtype.itemsize)
    return np.frombuffer(data, dtype).reshape(shape)
