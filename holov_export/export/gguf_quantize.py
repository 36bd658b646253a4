"""llama.cpp's quantizer: `python -m holov_export.export.gguf_quantize SOURCE TARGET NUMBER`, see `decoder_gguf`.

NUMBER is llama.cpp's of the file type. Ends with status 1 where the quantizer says that it failed.
"""

from __future__ import annotations

import ctypes
import os
import sys

from holov_export.extras import require

#: bytes of weights in memory at once; llama.cpp would take 8 GiB
_ROWS = 1 << 30


def quantize(source: str, target: str, file_type: int) -> int:
    """0 if `target` was written.

    Source of the names: abetlen/llama-cpp-python 0.3.36 llama_cpp/llama_cpp.py.
    """
    llama = require("llama_cpp")
    settings = llama.llama_model_quantize_default_params()
    settings.ftype = file_type
    settings.max_buf_size = _ROWS
    status: int = llama.llama_model_quantize(os.fsencode(source), os.fsencode(target), ctypes.byref(settings))
    return status


if __name__ == "__main__":
    sys.exit(1 if quantize(sys.argv[1], sys.argv[2], int(sys.argv[3])) else 0)
