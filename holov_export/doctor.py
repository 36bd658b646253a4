"""What this machine can do. Looks without loading what could crash: CUDA is probed through the driver first."""

from __future__ import annotations

import importlib.metadata
import platform
from pathlib import Path
from typing import Literal

from holov_export import __version__
from holov_export.extras import EXTRA_OF_MODULE, is_installed, needs_newer_python, require
from holov_export.gpu import NoGpu, probe
from holov_export.policies import Frozen

#: import name -> names it may be distributed under
_DISTRIBUTIONS = {
    "onnxruntime": ("onnxruntime", "onnxruntime-gpu", "onnxruntime-openvino"),
    "onnxruntime_genai": ("onnxruntime-genai", "onnxruntime-genai-cuda"),
    "onnx_ir": ("onnx-ir",),
    "cuda": ("cuda-bindings", "cuda-python"),
    "pynvml": ("nvidia-ml-py",),
    "tensorrt": ("tensorrt", "tensorrt-cu12", "tensorrt-cu13"),
}

#: where Jetson Linux says its release
_RELEASE_OF_JETSON = Path("/etc/nv_tegra_release")

State = Literal["ok", "missing", "fault"]


class Finding(Frozen):
    """One thing that was looked at: `state` is ok, missing (optional) or fault (there but not usable)."""

    subject: str
    state: State
    found: str
    advice: str = ""


def examine() -> list[Finding]:
    """Look at the interpreter, the packages of every extra, execution providers and the CUDA driver."""
    system = f"Python {platform.python_version()}, {platform.system()} {platform.machine()}"
    findings = [Finding(subject="holov-export", state="ok", found=f"{__version__}, {system}")]
    findings += [_package(module, extra) for module, extra in EXTRA_OF_MODULE.items()]
    findings += [_providers(), _cuda()]
    return findings


def _package(module: str, extra: str) -> Finding:
    if not is_installed(module):
        return Finding(subject=module, state="missing", found="-", advice=_way_to(module, extra))
    for name in _DISTRIBUTIONS.get(module, (module,)):
        try:
            return Finding(subject=module, state="ok", found=importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError:
            continue
    return Finding(subject=module, state="ok", found="installed, version unknown")


def _way_to(module: str, extra: str) -> str:
    """How a missing package gets here."""
    if module == "tensorrt" and _RELEASE_OF_JETSON.exists():
        return "JetPack's own: apt install python3-libnvinfer, and a venv with --system-site-packages"
    return needs_newer_python(module) or f'pip install "holov-export[{extra}]"'


def _providers() -> Finding:
    subject = "execution providers"
    if not is_installed("onnxruntime"):
        return Finding(subject=subject, state="missing", found="-", advice="install onnxruntime first")
    try:
        names = require("onnxruntime").get_available_providers()
    except Exception as error:  # a broken shared library raises whatever it likes
        return Finding(subject=subject, state="fault", found=str(error), advice="reinstall onnxruntime")
    return Finding(subject=subject, state="ok", found=", ".join(names))


def _cuda() -> Finding:
    """Ask the driver itself: TensorRT kills the process when there is none."""
    found = probe()
    if isinstance(found, NoGpu):
        state: State = "fault" if found.broken else "missing"
        return Finding(subject="GPU", state=state, found=found.reason, advice="needed for GPU engines only")
    memory = f"{found.memory_bytes / 2**30:.0f} GiB{' shared' if found.integrated else ''}"
    return Finding(subject="GPU", state="ok", found=f"{found.name}, sm_{found.sm}, {memory}, CUDA {found.cuda}")
