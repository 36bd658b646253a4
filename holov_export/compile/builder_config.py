"""Builder settings of a compile plan: memory, effort, precision flags, what the engine gives up to be portable."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from holov_export.compile.compilation import HALVED, CompilePlan
from holov_export.gpu import Gpu

_MEMINFO = Path("/proc/meminfo")
#: BuildFlags field -> BuilderFlag
_FLAGS = {
    "version_compatible": "VERSION_COMPATIBLE",
    "weight_streaming": "WEIGHT_STREAMING",
    "strip_plan": "STRIP_PLAN",
    "refit": "REFIT",
}


def configure(trt: Any, config: Any, plan: CompilePlan, workspace: int, *, detailed: bool) -> None:
    """Set everything but profiles, timing cache and progress.

    Args:
        workspace: bytes, see `workspace_bytes`.
        detailed: keep what the layer report needs; an engine can tell of its layers only if it was built so.
    """
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, workspace)
    if plan.optimization_level is not None:
        config.builder_optimization_level = plan.optimization_level
    if detailed:
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if not plan.tf32:  # set by default; 10 bits are too few for what decides which tokens stay
        config.clear_flag(trt.BuilderFlag.TF32)
    if plan.network == "int8-flag":  # a network with Q/DQ layers needs it; calibration and ranges it does not
        config.set_flag(trt.BuilderFlag.INT8)
    if plan.network in HALVED:
        config.set_flag(trt.BuilderFlag.FP16)
        word = "PREFER" if plan.prefer else "OBEY"
        config.set_flag(getattr(trt.BuilderFlag, f"{word}_PRECISION_CONSTRAINTS"))
    if (8, 6) <= plan.version < (10,):  # so that contexts of several threads may use one profile; later always so
        config.set_preview_feature(trt.PreviewFeature.PROFILE_SHARING_0806, True)
    for field, flag in _FLAGS.items():
        if getattr(plan.flags, field):
            config.set_flag(getattr(trt.BuilderFlag, flag))
    if plan.flags.hardware_compatibility != "none":
        level = plan.flags.hardware_compatibility.upper()
        config.hardware_compatibility_level = getattr(trt.HardwareCompatibilityLevel, level)


def workspace_bytes(plan: CompilePlan, gpu: Gpu, meminfo: Path = _MEMINFO) -> int:
    """The plan's workspace, but not more than there is: on a Jetson it comes out of the memory that all share."""
    wanted = plan.workspace_mb * 2**20
    limit = gpu.memory_bytes
    if gpu.integrated:
        limit = min(limit, _available_bytes(meminfo) or limit)
    return min(wanted, limit)


def _available_bytes(meminfo: Path) -> int | None:
    """MemAvailable of Linux; None where it is not said."""
    try:
        lines = meminfo.read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    for line in lines:
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None
