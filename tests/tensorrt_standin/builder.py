"""Builder: a network and its configuration become a plan, or an error and None."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from tensorrt_standin.config import IBuilderConfig, IOptimizationProfile, ITimingCache
from tensorrt_standin.facade import Core
from tensorrt_standin.network import INetworkDefinition, ITensor
from tensorrt_standin.plan import Binding, Plan, Range, bytes_from_plan, strip_weights
from tensorrt_standin.quantization import build_fault
from tensorrt_standin.values import HostMemory

if TYPE_CHECKING:
    from tensorrt_standin.world import World

#: Flags that choose precisions, which a strongly typed network has itself. Source: TensorRT documentation, "Strongly
#: typed networks"
_PRECISION_FLAGS = {
    "FP16", "BF16", "INT8", "FP8", "INT4", "FP4", "OBEY_PRECISION_CONSTRAINTS", "PREFER_PRECISION_CONSTRAINTS",
}  # fmt: skip


class BuildError(Exception):
    """Why there is no engine: the number and name of TensorRT's error code, and its text."""


@dataclass(frozen=True)
class Build:
    """What one finished build was told, for tests to ask.

    Attributes:
        pinned: layer name -> (precision, output types), as set on the layers.
        pools: memory pool name -> bytes.
        timing_cache: a cache was attached.
    """

    version: str
    flags: frozenset[str]
    strongly_typed: bool
    pinned: dict[str, tuple[str | None, tuple[str, ...]]]
    pools: dict[str, int]
    level: int
    preview: frozenset[str]
    timing_cache: bool
    new_timings: int
    plan: Plan


class Builder(Core):
    """Real 8.6 without a driver: TypeError "pybind11::init(): factory function returned nullptr"."""

    writable: ClassVar[dict[str, str]] = {"max_threads": "int"}

    def __init__(self, world: World, logger: Any) -> None:
        super().__init__(world)
        world.require_gpu("tensorrt.Builder")
        self._logger = logger
        self.max_threads = 1

    @property
    def logger(self) -> Any:
        return self._logger

    def complain(self, text: str) -> None:
        self.world.log(self._logger, "ERROR", f"Error Code 3: API Usage Error ({text})")

    @property
    def platform_has_fast_fp16(self) -> bool:
        return self.world.require_gpu("a question").sm >= 53

    @property
    def platform_has_fast_int8(self) -> bool:
        return self.world.require_gpu("a question").sm >= 61

    @property
    def platform_has_tf32(self) -> bool:
        return self.world.require_gpu("a question").sm >= 80

    @property
    def num_DLA_cores(self) -> int:  # noqa: N802
        return 0

    @property
    def max_DLA_batch_size(self) -> int:  # noqa: N802
        return 0

    def create_network(self, flags: int = 0) -> Any:
        members = self.world.enums["NetworkDefinitionCreationFlag"].__members__
        known = sum(1 << int(member) for member in members.values())
        if int(flags) & ~known:
            self.complain(f"unknown network creation flags {int(flags)}")
            return None
        names = {name for name, member in members.items() if int(flags) >> int(member) & 1}
        return INetworkDefinition(self.world, self, names)

    def create_builder_config(self) -> IBuilderConfig:
        return IBuilderConfig(self.world, self)

    def create_optimization_profile(self) -> IOptimizationProfile:
        return IOptimizationProfile(self.world)

    def reset(self) -> None:
        return None

    def is_network_supported(self, network: INetworkDefinition, config: IBuilderConfig) -> bool:
        return not network.faults and network.model is not None

    def build_serialized_network(
        self, network: INetworkDefinition, config: IBuilderConfig, kernel_text: Any = None
    ) -> Any:
        """The plan, or None after an error in the log."""
        try:
            plan = _build(self.world, network, config)
        except BuildError as error:
            self.world.log(self._logger, "ERROR", str(error))
            return None
        return HostMemory(bytes_from_plan(plan))


def _build(world: World, network: INetworkDefinition, config: IBuilderConfig) -> Plan:
    """Every check that a real builder makes in some form, then the plan; the build is recorded.

    Raises:
        BuildError: there is no engine.
    """
    if network.model is None or not network.outputs:
        raise BuildError("Error Code 4: Internal Error (Network must have at least one output)")
    if network.faults:
        raise BuildError(f"Error Code 4: API Usage Error (the network was misused: {network.faults[0]})")
    flags = _checked_flags(network, config)
    _check_profiles(network, config)
    _check_constraints(network, flags)
    fault = build_fault(network, flags, world.require_gpu("an engine").sm)
    if fault:
        raise BuildError(f"Error Code 4: API Usage Error ({fault})")
    new_timings = _time_layers(network, config, flags)
    report_progress(config.progress_monitor, len(network.layers))
    plan = _plan(world, network, config, flags)
    build = Build(
        version=world.version,
        flags=frozenset(flags),
        strongly_typed=network.strongly_typed,
        pinned=network.pinned(),
        pools=dict(config.pools),
        level=config.level,
        preview=frozenset(config.preview),
        timing_cache=config.cache is not None,
        new_timings=new_timings,
        plan=plan,
    )
    world.builds.append(build)
    return plan


def _plan(world: World, network: INetworkDefinition, config: IBuilderConfig, flags: set[str]) -> Plan:
    assert network.model is not None
    gpu = world.require_gpu("an engine")
    model, stripped = network.model.SerializeToString(), []
    weight_bytes = len(model)
    if flags & {"STRIP_PLAN", "WEIGHTLESS"}:
        model, stripped = strip_weights(network.model)
    bindings = [_binding(item, True) for item in network.inputs] + [_binding(item, False) for item in network.outputs]
    layers = [
        {"Name": item.name, "LayerType": item.type.name, "Operator": item.node.op_type} for item in network.layers
    ]
    return Plan(
        version=world.version,
        gpu=gpu.name,
        sm=gpu.sm,
        name=network.name,
        flags=sorted(flags),
        strongly_typed=network.strongly_typed,
        hardware_compatibility=config.hardware_compatibility_level.name,
        verbosity=config.profiling_verbosity.name,
        aux_streams=max(config.max_aux_streams, 0),
        bindings=bindings,
        profiles=[dict(item.shapes) for item in config.profiles] or [{}],
        values=[dict(item.values) for item in config.profiles] or [{}],
        profile_sharing="PROFILE_SHARING_0806" in config.preview or not world.before("10.0.0"),
        layers=layers,
        weight_bytes=weight_bytes,
        stripped=stripped,
        model=model,
    )


def _binding(tensor: ITensor, is_input: bool) -> Binding:
    return Binding(tensor.name, tensor._dtype, tensor._shape, is_input, tensor.is_shape)


def _checked_flags(network: INetworkDefinition, config: IBuilderConfig) -> set[str]:
    flags = set(config.flag_names)
    refused = flags & _PRECISION_FLAGS
    if network.strongly_typed and refused:
        text = f"the builder flags {', '.join(sorted(refused))} are not allowed with a strongly typed network"
        raise BuildError(f"Error Code 4: API Usage Error ({text})")
    if "WEIGHT_STREAMING" in flags and not network.strongly_typed:
        raise BuildError("Error Code 4: API Usage Error (weight streaming requires a strongly typed network)")
    level = config.hardware_compatibility_level.name
    if level == "AMPERE_PLUS" and config.builder.world.require_gpu("an engine").sm < 80:
        raise BuildError(
            "Error Code 9: API Usage Error (AMPERE_PLUS needs a device of compute capability 8.0 or newer)"
        )
    return flags | ({"REFIT"} if flags & {"STRIP_PLAN", "WEIGHTLESS"} else set())


def _check_constraints(network: INetworkDefinition, flags: set[str]) -> None:
    if not flags & {"OBEY_PRECISION_CONSTRAINTS"}:
        return
    for layer in network.layers:
        if layer.impossible():
            text = f"Could not find any implementation for node {layer.name} under OBEY_PRECISION_CONSTRAINTS"
            raise BuildError(f"Error Code 10: Internal Error ({text})")


def _check_profiles(network: INetworkDefinition, config: IBuilderConfig) -> None:
    """Every dynamic input and shape tensor needs its range in every profile."""
    inputs = {item.name: item for item in network.inputs}
    needs = [item for item in network.inputs if -1 in item._shape or item.is_shape]
    if needs and not config.profiles:
        text = "Network has dynamic or shape inputs, but no optimization profile has been defined."
        raise BuildError(f"Error Code 4: Internal Error ({text})")
    for place, profile in enumerate(config.profiles):
        for name in (*profile.shapes, *profile.values):
            if name not in inputs:
                raise BuildError(f"Error Code 4: Internal Error ({name}: profile {place} names no network input)")
        for item in network.inputs:
            _check_input(item, profile, place)


def _check_input(item: ITensor, profile: IOptimizationProfile, place: int) -> None:
    shapes, values = profile.shapes.get(item.name), profile.values.get(item.name)
    if -1 in item._shape and shapes is None:
        text = f"{item.name}: dynamic input is missing dimensions in profile {place}."
        raise BuildError(f"Error Code 4: Internal Error ({text})")
    if shapes is not None:
        for name, sizes in (("kMIN", shapes.low), ("kOPT", shapes.opt), ("kMAX", shapes.high)):
            if len(sizes) != len(item._shape) or any(b not in (-1, a) for a, b in zip(sizes, item._shape, strict=True)):
                text = f"{item.name}: {name} dimensions in profile {place} are {sizes} but input has {item._shape}."
                raise BuildError(f"Error Code 4: Internal Error ({text})")
    if item.is_shape and values is None:
        text = f"{item.name}: optimization profile is missing values for shape input"
        raise BuildError(f"Error Code 4: Internal Error ({text})")
    if values is not None:
        _check_values(item, values, place)


def _check_values(item: ITensor, values: Range, place: int) -> None:
    if not item.is_shape:
        text = f"{item.name}: profile {place} gives values, but the input is no shape tensor"
        raise BuildError(f"Error Code 4: Internal Error ({text})")
    volume = 1
    for size in item._shape:
        volume *= size
    if len(values.low) != volume:
        text = f"{item.name}: profile {place} gives {len(values.low)} values for a shape tensor of {volume}"
        raise BuildError(f"Error Code 4: Internal Error ({text})")


def _time_layers(network: INetworkDefinition, config: IBuilderConfig, flags: set[str]) -> int:
    """How many layers were not in the cache; they are in it afterwards."""
    if config.cache is None or "DISABLE_TIMING_CACHE" in flags:
        return len(network.layers)
    keys = {ITimingCache.key(layer, flags) for layer in network.layers}
    new = keys - config.cache.entries
    if new and "ERROR_ON_TIMING_CACHE_MISS" in flags:
        raise BuildError("Error Code 9: Internal Error (a layer is missing in the timing cache)")
    config.cache.entries |= new
    return len(new)


def report_progress(monitor: Any, layers: int) -> None:
    """Two nested phases, as a real build has many. An exception in the monitor, None or False from step_complete
    cancel the build. Source: PyProgressMonitor in pyCore.cpp

    Raises:
        BuildError: it was cancelled.
    """
    if monitor is None:
        return
    root = "Building Engine"
    for phase, parent, steps in ((root, None, 2), ("Tactic Selection", root, layers)):
        _guarded(monitor.phase_start, phase, parent, steps)
    cancelled = not all(_guarded(monitor.step_complete, "Tactic Selection", step) for step in range(layers))
    _guarded(monitor.phase_finish, "Tactic Selection")
    cancelled = cancelled or not all(_guarded(monitor.step_complete, root, step) for step in range(2))
    _guarded(monitor.phase_finish, root)
    if cancelled:
        raise BuildError("Error Code 10: Internal Error (the build was cancelled by the progress monitor)")


def _guarded(method: Any, *args: Any) -> Any:
    try:
        return method(*args)
    except Exception as error:
        print(f"[ERROR] Exception caught in {method.__name__}(): {error}", file=sys.stderr)
        return False
