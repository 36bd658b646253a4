"""Optional packages: import one, or say exactly which pip line brings it."""

from __future__ import annotations

import importlib
import importlib.util
from types import ModuleType

from holov_export.errors import MissingExtraError

#: module name -> the extra of pyproject.toml that installs it
EXTRA_OF_MODULE = {
    "torch": "export",
    "transformers": "export",
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
    "matplotlib": "bench",
    "pynvml": "bench",
}


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
        extra = EXTRA_OF_MODULE.get(module.split(".")[0])
        line = f'pip install "holov-export[{extra}]"' if extra else f"pip install {module}"
        raise MissingExtraError(f"the Python package '{module}' is not installed.", hint=f"Run: {line}") from error


def is_installed(module: str) -> bool:
    """True if `module` can be found (it is not imported)."""
    return importlib.util.find_spec(module) is not None
