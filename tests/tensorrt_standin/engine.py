"""Runtime and ICudaEngine: a plan is loaded if this TensorRT and this GPU may run it."""

from __future__ import annotations

import json
import weakref
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import onnx

from tensorrt_standin.api import older
from tensorrt_standin.context import IExecutionContext
from tensorrt_standin.facade import Core
from tensorrt_standin.numbers import NUMPY_TYPES, Numbers
from tensorrt_standin.plan import Binding, Plan, bytes_from_plan, plan_from_bytes
from tensorrt_standin.values import HostMemory

if TYPE_CHECKING:
    from tensorrt_standin.world import World

_ACTIVATION_FACTOR = 4  # the stand-in's activations: this many times the largest inputs, a made-up figure


class Runtime(Core):
    """Real TensorRT without a driver dies here with SIGSEGV."""

    writable: ClassVar[dict[str, str]] = {
        "engine_host_code_allowed": "bool",
        "max_threads": "int",
        "temporary_directory": "str",
        "DLA_core": "int",
    }

    def __init__(self, world: World, logger: Any) -> None:
        super().__init__(world)
        world.require_gpu("tensorrt.Runtime")
        self._logger = logger
        self.engine_host_code_allowed, self.max_threads, self.temporary_directory, self.DLA_core = False, 1, "", -1

    @property
    def logger(self) -> Any:
        return self._logger

    @property
    def num_DLA_cores(self) -> int:  # noqa: N802
        return 0

    def deserialize_cuda_engine(
        self, serialized_engine: Any = None, stream_reader: Any = None, stream_reader_v2: Any = None
    ) -> Any:
        """The engine, or None after an error in the log."""
        if serialized_engine is None:
            raise NotImplementedError("the stand-in does not read engines from streams")
        try:
            plan = plan_from_bytes(bytes(memoryview(serialized_engine)))
        except ValueError as error:
            return self._refuse(f"Error Code 1: Serialization ({error})")
        problem = _incompatibility(plan, self.world, host_code=self.engine_host_code_allowed)
        if problem:
            return self._refuse(problem)
        gpu = self.world.require_gpu("an engine")
        if plan.gpu != gpu.name:
            text = "Using an engine plan file across different models of devices is not recommended"
            self.world.log(self._logger, "WARNING", text)
        return ICudaEngine(self.world, plan, self._logger)

    def _refuse(self, text: str) -> None:
        self.world.log(self._logger, "ERROR", text)


def _incompatibility(plan: Plan, world: World, *, host_code: bool) -> str | None:
    """Why this TensorRT on this GPU may not run the plan.

    Source: TensorRT documentation, "Version compatibility" (engines from 8.6 on run on 9 and 10, those of 10 on 11,
    never an older TensorRT than the builder's; a plan with a lean runtime in it needs engine_host_code_allowed) and
    "Hardware compatibility".
    """
    compatible = "VERSION_COMPATIBLE" in plan.flags
    has_lean = compatible and "EXCLUDE_LEAN_RUNTIME" not in plan.flags
    if plan.version != world.version:
        majors = (int(plan.version.split(".")[0]), int(world.version.split(".")[0]))
        if not compatible or older(world.version, plan.version) or majors[1] - majors[0] > 2 or majors == (8, 11):
            return (
                "Error Code 6: API Usage Error (The engine plan file is not compatible with this version of TensorRT, "
                f"expecting library version {world.version} got {plan.version}, please rebuild.)"
            )
        if not has_lean:
            return "Error Code 6: API Usage Error (the plan holds no lean runtime and none was loaded)"
    if has_lean and not host_code:
        return "Error Code 6: API Usage Error (the plan holds host code and engine_host_code_allowed is false)"
    sm = world.require_gpu("an engine").sm
    if plan.sm != sm and not (plan.hardware_compatibility == "AMPERE_PLUS" and sm >= 80):
        return (
            "Error Code 6: API Usage Error (The engine plan file is generated on an incompatible device, expecting "
            f"compute {sm // 10}.{sm % 10} got compute {plan.sm // 10}.{plan.sm % 10}, please rebuild.)"
        )
    return None


class ICudaEngine(Core):
    """A loaded plan."""

    def __init__(self, world: World, plan: Plan, logger: Any) -> None:
        super().__init__(world)
        self.plan, self.logger = plan, logger
        self.numbers: Numbers | None = None if plan.stripped else Numbers(plan)
        self.contexts: weakref.WeakSet[IExecutionContext] = weakref.WeakSet()
        self._reserved = plan.weight_bytes
        self._budget: int | None = None
        world.cuda.memory.reserved += self._reserved

    def __del__(self) -> None:
        self.world.cuda.memory.reserved -= getattr(self, "_reserved", 0)

    def binding(self, name: str) -> Binding | None:
        return next((item for item in self.plan.bindings if item.name == name), None)

    def complain(self, text: str) -> None:
        self.world.log(self.logger, "ERROR", f"Error Code 3: API Usage Error ({text})")

    def _named(self, name: str) -> Binding | None:
        found = self.binding(name)
        if found is None:
            self.complain(f"Parameter check failed, tensor name {name} does not exist in engine")
        return found

    def __getitem__(self, place: int) -> str:
        return self.plan.bindings[place].name

    # ---- inputs and outputs

    @property
    def num_io_tensors(self) -> int:
        return len(self.plan.bindings)

    def get_tensor_name(self, index: int) -> str | None:
        return self.plan.bindings[index].name if 0 <= index < len(self.plan.bindings) else None

    def get_tensor_mode(self, name: str) -> Any:
        found = self._named(name)
        return self.world.enum("TensorIOMode", "NONE" if found is None else "INPUT" if found.is_input else "OUTPUT")

    def get_tensor_dtype(self, name: str) -> Any:
        found = self._named(name)
        return self.world.enum("DataType", found.dtype if found else "FLOAT")

    def get_tensor_shape(self, name: str) -> Any:
        found = self._named(name)
        return self.world.classes["Dims"](found.shape if found else ())

    def get_tensor_location(self, name: str) -> Any:
        found = self._named(name)
        return self.world.enum("TensorLocation", "HOST" if found and found.host else "DEVICE")

    def is_shape_inference_io(self, name: str) -> bool:
        found = self._named(name)
        return bool(found and found.host)

    def get_tensor_bytes_per_component(self, name: str, profile_index: int = 0) -> int:
        found = self._named(name)
        return NUMPY_TYPES[found.dtype].itemsize if found else -1

    def get_tensor_format(self, name: str, profile_index: int = 0) -> Any:
        return self.world.enum("TensorFormat", "LINEAR")

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[Any]:
        dims = self.world.classes["Dims"]
        found = self._named(name)
        if found is None or not found.is_input or not 0 <= profile_index < len(self.plan.profiles):
            return [dims(), dims(), dims()]
        allowed = self.plan.profiles[profile_index].get(name)
        return [dims(item) for item in ((allowed.low, allowed.opt, allowed.high) if allowed else [found.shape] * 3)]

    def get_tensor_profile_values(self, name: int, profile_index: str) -> list[list[int]]:
        """The real bindings swap the two names: the profile comes first, the tensor second. Source: pyCore.cpp"""
        profile, tensor = int(name), profile_index
        found = self._named(tensor)
        if found is None or not found.host or not found.is_input:
            raise RuntimeError("Binding index does not correspond to an input shape tensor.")
        allowed = self.plan.values[profile][tensor]
        return [list(allowed.low), list(allowed.opt), list(allowed.high)]

    # ---- facts

    @property
    def name(self) -> str:
        return self.plan.name

    @property
    def num_layers(self) -> int:
        return len(self.plan.layers)

    @property
    def num_optimization_profiles(self) -> int:
        return len(self.plan.profiles)

    @property
    def num_aux_streams(self) -> int:
        return self.plan.aux_streams

    @property
    def refittable(self) -> bool:
        return "REFIT" in self.plan.flags

    @property
    def has_implicit_batch_dimension(self) -> bool:
        return False

    @property
    def profiling_verbosity(self) -> Any:
        return self.world.enum("ProfilingVerbosity", self.plan.verbosity)

    @property
    def hardware_compatibility_level(self) -> Any:
        return self.world.enum("HardwareCompatibilityLevel", self.plan.hardware_compatibility)

    @property
    def engine_capability(self) -> Any:
        return self.world.enum("EngineCapability", "STANDARD")

    @property
    def tactic_sources(self) -> int:
        return 0

    # ---- memory

    @property
    def device_memory_size(self) -> int:
        return max(self.get_device_memory_size_for_profile_v2(place) for place in range(len(self.plan.profiles)))

    device_memory_size_v2 = device_memory_size

    def get_device_memory_size_for_profile(self, profile_index: int) -> int:
        return self.get_device_memory_size_for_profile_v2(profile_index)

    def get_device_memory_size_for_profile_v2(self, profile_index: int) -> int:
        total = 0
        for item in self.plan.bindings:
            if item.is_input:
                allowed = self.plan.profiles[profile_index].get(item.name)
                shape = allowed.high if allowed else item.shape
                total += int(np.prod(shape, dtype=np.int64)) * NUMPY_TYPES[item.dtype].itemsize
        return -(-total * _ACTIVATION_FACTOR // 512) * 512

    @property
    def streamable_weights_size(self) -> int:
        return self.plan.weight_bytes if "WEIGHT_STREAMING" in self.plan.flags else 0

    @property
    def weight_streaming_budget_v2(self) -> int:
        return self.streamable_weights_size if self._budget is None else self._budget

    @weight_streaming_budget_v2.setter
    def weight_streaming_budget_v2(self, value: int) -> None:
        """Only before contexts exist, and within what can be streamed. Source: NvInferRuntime.h"""
        if self.contexts or not 0 <= value <= self.streamable_weights_size:
            self.complain("the weight streaming budget cannot be set to that now")
            return
        self._budget = int(value)
        self.world.cuda.memory.reserved += self._budget - self._reserved  # the rest stays in host memory
        self._reserved = self._budget

    weight_streaming_budget = weight_streaming_budget_v2

    @property
    def minimum_weight_streaming_budget(self) -> int:
        return 0

    def get_weight_streaming_automatic_budget(self) -> int:
        return self.streamable_weights_size

    @property
    def weight_streaming_scratch_memory_size(self) -> int:
        return 0

    def get_engine_stat(self, stat: Any = None) -> int:
        return self.plan.weight_bytes

    # ---- what is made of it

    def serialize(self) -> HostMemory:
        return HostMemory(bytes_from_plan(self.plan))

    def create_execution_context(self, strategy: Any = None, runtime_config: Any = None) -> Any:
        if runtime_config is not None:
            strategy = runtime_config.get_execution_context_allocation_strategy()
        return self._context(user_managed=strategy is not None and strategy.name == "USER_MANAGED")

    def create_execution_context_without_device_memory(self) -> Any:
        return self._context(user_managed=True)

    def _context(self, *, user_managed: bool) -> Any:
        size = 0 if user_managed else self.device_memory_size
        if size > self.world.cuda.memory.free_bytes:
            self.world.log(self.logger, "ERROR", "Error Code 2: OutOfMemory (no memory for the execution context)")
            return None
        context = IExecutionContext(self.world, self, size, user_managed=user_managed)
        self.contexts.add(context)
        return context

    def create_runtime_config(self) -> IRuntimeConfig:
        return IRuntimeConfig(self.world)

    def create_engine_inspector(self) -> EngineInspector:
        return EngineInspector(self.world, self)


class IRuntimeConfig(Core):
    """How contexts get their memory."""

    def __init__(self, world: World) -> None:
        super().__init__(world)
        self._strategy = world.enum("ExecutionContextAllocationStrategy", "STATIC")

    def set_execution_context_allocation_strategy(self, strategy: Any = None) -> None:
        if strategy is not None:
            self._strategy = strategy

    def get_execution_context_allocation_strategy(self) -> Any:
        return self._strategy


class EngineInspector(Core):
    """Layer information; how much depends on the verbosity of the build. Source: documentation, "Engine inspector"."""

    writable: ClassVar[dict[str, str]] = {"execution_context": "IExecutionContext"}

    def __init__(self, world: World, engine: ICudaEngine) -> None:
        super().__init__(world)
        self.engine = engine
        self.execution_context: Any = None

    def get_engine_information(self, format: Any) -> str:  # noqa: A002
        plan = self.engine.plan
        layers: list[Any] = list(plan.layers)
        if plan.verbosity == "LAYER_NAMES_ONLY":
            layers = [item["Name"] for item in plan.layers]
        elif plan.verbosity == "NONE":
            layers = []
        if format.name == "JSON":
            return json.dumps({"Layers": layers, "Bindings": [item.name for item in plan.bindings]})
        return "\n".join(str(item) for item in layers)

    def get_layer_information(self, layer_index: int, format: Any) -> str:  # noqa: A002
        layer = self.engine.plan.layers[layer_index]
        return json.dumps(layer if self.engine.plan.verbosity == "DETAILED" else layer["Name"])


def weights_of(model: bytes) -> dict[str, onnx.TensorProto]:
    return {item.name: item for item in onnx.load_model_from_string(model).graph.initializer}
