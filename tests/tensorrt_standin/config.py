"""IBuilderConfig, IOptimizationProfile and ITimingCache."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any, ClassVar

from tensorrt_standin.facade import Core
from tensorrt_standin.plan import Range
from tensorrt_standin.values import HostMemory

if TYPE_CHECKING:
    from tensorrt_standin.builder import Builder
    from tensorrt_standin.network import ILayer
    from tensorrt_standin.world import World

_CACHE_MAGIC = "timing cache of the stand-in"
_TIMED_FLAGS = {"FP16", "BF16", "INT8", "FP8", "TF32", "SPARSE_WEIGHTS"}  # what changes how a layer is run
_MAX_LEVEL = 5  # Source: NvInfer.h, setBuilderOptimizationLevel


class IOptimizationProfile(Core):
    """Ranges of the dynamic inputs. Wrong ones are refused where pyCore.cpp refuses them, with its words."""

    writable: ClassVar[dict[str, str]] = {"extra_memory_target": "float"}

    def __init__(self, world: World) -> None:
        super().__init__(world)
        self.shapes: dict[str, Range] = {}
        self.values: dict[str, Range] = {}
        self.extra_memory_target = 1.0

    def set_shape(self, input: str, min: Any, opt: Any, max: Any) -> None:  # noqa: A002
        wanted = _range(min, opt, max)
        self._require(wanted, "Shape provided for {} is inconsistent with other shapes.")
        if any(size < 0 for size in wanted.low):
            raise RuntimeError("Shape provided for min is inconsistent with other shapes.")
        self.shapes[input] = wanted

    def get_shape(self, input: str) -> list[Any]:  # noqa: A002
        found = self.shapes.get(input)
        dims = self.world.classes["Dims"]
        return [dims(item) for item in (found.low, found.opt, found.high)] if found else []

    def set_shape_input(self, input: str, min: Any, opt: Any, max: Any) -> None:  # noqa: A002
        wanted = _range(min, opt, max)
        self._require(wanted, "{} input provided for shape tensor is inconsistent with other inputs.")
        self.values[input] = wanted

    def get_shape_input(self, input: str) -> list[list[int]]:  # noqa: A002
        found = self.values.get(input)
        return [list(found.low), list(found.opt), list(found.high)] if found else []

    def __bool__(self) -> bool:
        return True  # set_shape and set_shape_input let nothing invalid in

    def _require(self, wanted: Range, text: str) -> None:
        for name, lower, upper in (("opt", wanted.low, wanted.opt), ("max", wanted.opt, wanted.high)):
            if len(lower) != len(upper) or any(a > b for a, b in zip(lower, upper, strict=True)):
                raise RuntimeError(text.format(name))


def _range(low: Any, opt: Any, high: Any) -> Range:
    return Range(*(tuple(int(item) for item in tuple(part)) for part in (low, opt, high)))


class ITimingCache(Core):
    """Which layers were timed, by which TensorRT on which GPU."""

    def __init__(self, world: World, content: dict[str, Any] | None = None) -> None:
        super().__init__(world)
        gpu = world.require_gpu("a timing cache")
        self.made_by = (content or {}).get("version", world.version)
        self.made_on = (content or {}).get("gpu", gpu.name)
        self.entries: set[str] = set((content or {}).get("entries", ()))

    def serialize(self) -> HostMemory:
        content = {"magic": _CACHE_MAGIC, "version": self.made_by, "gpu": self.made_on, "entries": sorted(self.entries)}
        return HostMemory(json.dumps(content).encode())

    def combine(self, input_cache: ITimingCache, ignore_mismatch: bool) -> bool:
        if self.made_by != input_cache.made_by or (self.made_on != input_cache.made_on and not ignore_mismatch):
            return False
        self.entries |= input_cache.entries
        return True

    def reset(self) -> bool:
        self.entries.clear()
        return True

    @staticmethod
    def key(layer: ILayer, flags: set[str]) -> str:
        text = repr((layer.name, layer.node.op_type, layer._precision, sorted(flags & _TIMED_FLAGS)))
        return hashlib.sha256(text.encode()).hexdigest()[:32]


class IBuilderConfig(Core):
    """Everything that a build is told besides the network."""

    writable: ClassVar[dict[str, str]] = {
        "engine_capability": "EngineCapability",
        "avg_timing_iterations": "int",
        "max_aux_streams": "int",
        "profiling_verbosity": "ProfilingVerbosity",
        "hardware_compatibility_level": "HardwareCompatibilityLevel",
        "progress_monitor": "IProgressMonitor",
        "runtime_platform": "RuntimePlatform",
        "tiling_optimization_level": "TilingOptimizationLevel",
        "l2_limit_for_tiling": "int",
        "max_num_tactics": "int",
        "plugins_to_serialize": "list[str]",
        "profile_stream": "int",
        "default_device_type": "DeviceType",
        "DLA_core": "int",
    }

    def __init__(self, world: World, builder: Builder) -> None:
        super().__init__(world)
        self.builder = builder
        self.reset()

    def reset(self) -> None:
        world = self.world
        self.flag_names = {"TF32"}  # on by default. Source: NvInfer.h, BuilderFlag::kTF32
        self.preview = set() if world.before("10.0.0") else {"PROFILE_SHARING_0806"}
        self.profiles: list[IOptimizationProfile] = []
        self.pools: dict[str, int] = {}
        self.cache: ITimingCache | None = None
        self.level = 3  # Source: NvInfer.h, setBuilderOptimizationLevel
        self.avg_timing_iterations, self.max_aux_streams, self.profile_stream = 1, -1, 0
        self.DLA_core, self.max_num_tactics, self.l2_limit_for_tiling = -1, -1, -1
        self.plugins_to_serialize: list[str] = []
        self.progress_monitor: Any = None
        self.tactic_sources: int | None = None
        for name, enum, member in (
            ("engine_capability", "EngineCapability", "STANDARD"),
            ("profiling_verbosity", "ProfilingVerbosity", "LAYER_NAMES_ONLY"),
            ("hardware_compatibility_level", "HardwareCompatibilityLevel", "NONE"),
            ("runtime_platform", "RuntimePlatform", "SAME_AS_BUILD"),
            ("tiling_optimization_level", "TilingOptimizationLevel", "NONE"),
            ("default_device_type", "DeviceType", "GPU"),
        ):
            if enum in world.enums:
                setattr(self, name, world.enum(enum, member))

    # ---- flags

    def set_flag(self, flag: Any) -> None:
        self.flag_names.add(flag.name)

    def clear_flag(self, flag: Any) -> None:
        self.flag_names.discard(flag.name)

    def get_flag(self, flag: Any) -> bool:
        return flag.name in self.flag_names

    @property
    def flags(self) -> int:
        return sum(1 << int(self.world.enum("BuilderFlag", name)) for name in self.flag_names)

    @flags.setter
    def flags(self, value: int) -> None:
        members = self.world.enums["BuilderFlag"].__members__
        self.flag_names = {name for name, member in members.items() if int(value) >> int(member) & 1}

    def set_preview_feature(self, feature: Any, enable: bool) -> None:
        if feature.name == "PROFILE_SHARING_0806" and not self.world.before("10.0.0"):
            return  # on, and cannot be changed. Source: NvInfer.h 10.3
        (self.preview.add if enable else self.preview.discard)(feature.name)

    def get_preview_feature(self, feature: Any) -> bool:
        return feature.name in self.preview

    # ---- numbers

    def set_memory_pool_limit(self, pool: Any, pool_size: int) -> None:
        self.pools[pool.name] = int(pool_size)

    def get_memory_pool_limit(self, pool: Any) -> int:
        """A workspace that nobody limited may take the whole device. Source: NvInfer.h, setMemoryPoolLimit"""
        return self.pools.get(pool.name, self.world.require_gpu("a limit").memory if pool.name == "WORKSPACE" else 0)

    @property
    def builder_optimization_level(self) -> int:
        return self.level

    @builder_optimization_level.setter
    def builder_optimization_level(self, value: int) -> None:
        if not 0 <= value <= _MAX_LEVEL:
            self.builder.complain(f"Parameter check failed, condition: builderOptimizationLevel {value} in [0, 5]")
            return
        self.level = int(value)

    def set_tactic_sources(self, tactic_sources: int) -> bool:
        known = sum(1 << int(member) for member in self.world.enums["TacticSource"].__members__.values())
        if int(tactic_sources) & ~known:
            return False
        self.tactic_sources = int(tactic_sources)
        return True

    def get_tactic_sources(self) -> int:
        return self.tactic_sources or 0

    # ---- profiles and cache

    def add_optimization_profile(self, profile: IOptimizationProfile) -> int:
        """Its index; -1 for one in which nothing is set. Source: NvInfer.h, addOptimizationProfile"""
        if not profile.shapes and not profile.values:
            return -1
        self.profiles.append(profile)
        return len(self.profiles) - 1

    @property
    def num_optimization_profiles(self) -> int:
        return len(self.profiles)

    def create_timing_cache(self, serialized_timing_cache: Any) -> Any:
        data = bytes(memoryview(serialized_timing_cache))
        if not data:
            return ITimingCache(self.world)
        try:
            content = json.loads(data)
            if content["magic"] != _CACHE_MAGIC:
                raise ValueError
        except (ValueError, KeyError, TypeError):
            self.builder.complain("the timing cache cannot be read")
            return None
        return ITimingCache(self.world, content)

    def set_timing_cache(self, cache: ITimingCache, ignore_mismatch: bool) -> bool:
        """False for another TensorRT's, and for another GPU's unless told to ignore that."""
        gpu = self.world.require_gpu("a timing cache")
        if cache.made_by != self.world.version or (cache.made_on != gpu.name and not ignore_mismatch):
            return False
        self.cache = cache
        return True

    def get_timing_cache(self) -> Any:
        return self.cache
