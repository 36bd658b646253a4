"""Optional packages: import one, or say exactly which pip line brings it."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from types import ModuleType

from holov_export.errors import MissingExtraError

#: module name -> the extra of pyproject.toml that installs it
EXTRA_OF_MODULE = {
    "torch": "export",
    "transformers": "export",
    "ml_dtypes": "export",
    "onnx": "compile",
    "onnx_ir": "export",
    "onnxscript": "export",
    "safetensors": "export",
    "huggingface_hub": "export",
    "tokenizers": "runtime",
    "jinja2": "runtime",
    "onnxruntime": "cpu",
    "onnxruntime_genai": "cpu",
    "tensorrt": "tensorrt",
    "cuda": "tensorrt",
    "av": "video",
    "fastapi": "serve",
    "uvicorn": "serve",
    "httpx": "serve",
    "prometheus_client": "serve",
    "gguf": "gguf",
    "llama_cpp": "llamacpp",
    "vllm": "vllm",
    "matplotlib": "bench",
    "skimage": "calibration",
    "sklearn": "calibration",
    "pynvml": "bench",
}

#: the marks of pyproject.toml: an extra brings the module from this Python on
_NEEDS_PYTHON = {"onnxruntime_genai": (3, 11), "vllm": (3, 11)}


def require(module: str) -> ModuleType:
    """Import `module`.

    Raises:
        MissingExtraError: it is not installed; the message names the pip line.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is not None and error.name.split(".")[0] != module.split(".")[0]:
            raise
        hint = needs_newer_python(module)
        if not hint:
            extra = EXTRA_OF_MODULE.get(module.split(".")[0])
            hint = f'Run: pip install "holov-export[{extra}]"' if extra else f"Run: pip install {module}"
        raise MissingExtraError(f"the Python package '{module}' is not installed.", hint=hint) from error


def needs_newer_python(module: str) -> str:
    """Said of a module that its extra leaves out on this Python, "" of any other."""
    needed = _NEEDS_PYTHON.get(module.split(".")[0])
    if needed is None or sys.version_info >= needed:
        return ""
    return f"It needs Python {'.'.join(map(str, needed))} or newer."


def is_installed(module: str) -> bool:
    """True if `module` can be found (it is not imported)."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the package above it, or a finder that says no in this way
        return False
