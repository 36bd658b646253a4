"""What a result says about the machine that it was taken on. No host name, no user, no path."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from datetime import datetime, timezone
from pathlib import Path

from holov_export.gpu import Gpu, probe
from holov_export.policies import Frozen

#: distributions whose versions are recorded where they are installed
LIBRARIES = (
    "torch",
    "transformers",
    "onnx",
    "onnxscript",
    "onnxruntime",
    "onnxruntime-gpu",
    "onnxruntime-openvino",
    "onnxruntime-genai",
    "tensorrt",
    "cuda-bindings",
    "numpy",
    "safetensors",
)


class GpuInfo(Frozen):
    """The first CUDA device: name, compute capability, GiB, the driver's CUDA and, if Linux tells, its version."""

    name: str
    sm: int
    memory_gb: float
    cuda: str
    driver: str | None = None


class Library(Frozen):
    """An installed distribution."""

    name: str
    version: str


class Machine(Frozen):
    """CPU name, cores, GiB of memory, operating system, Python, libraries, and the GPU if there is one."""

    cpu: str
    cores: int | None
    memory_gb: float
    system: str
    python: str
    libraries: tuple[Library, ...]
    gpu: GpuInfo | None = None

    def __str__(self) -> str:
        libraries = ", ".join(f"{item.name} {item.version}" for item in self.libraries)
        gpu = f"{self.gpu.name} (CUDA {self.gpu.cuda}), " if self.gpu else ""
        return f"{gpu}{self.cpu}, {self.cores} cores, {self.memory_gb} GB, Python {self.python}, {libraries}"


def this_machine() -> Machine:
    """Look at this machine. The GPU is asked for through the driver, without a context."""
    found = probe()
    return Machine(
        cpu=cpu_name(),
        cores=os.cpu_count(),
        memory_gb=round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        system=f"{platform.system()} {platform.machine()}",
        python=platform.python_version(),
        libraries=tuple(installed_libraries()),
        gpu=_gpu_info(found) if isinstance(found, Gpu) else None,
    )


def _gpu_info(gpu: Gpu) -> GpuInfo:
    return GpuInfo(
        name=gpu.name,
        sm=gpu.sm,
        memory_gb=round(gpu.memory_bytes / 2**30, 1),
        cuda=gpu.cuda,
        driver=_driver_version(),
    )


def _driver_version() -> str | None:
    """The kernel module's version, "580.159.04"; None where it does not say (a Jetson has no such file)."""
    try:
        text = Path("/sys/module/nvidia/version").read_text(encoding="ascii").strip()
    except OSError:
        return None
    return text or None


def cpu_name() -> str:
    """The processor's name as the kernel gives it, its architecture where it gives none."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def installed_libraries() -> list[Library]:
    """Versions of those `LIBRARIES` that are installed."""
    found = []
    for name in LIBRARIES:
        try:
            found.append(Library(name=name, version=importlib.metadata.version(name)))
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def utc_now() -> str:
    """The UTC date and minute, "2026-11-21 10:05 UTC"."""
    return datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
