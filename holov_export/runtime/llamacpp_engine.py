"""llama.cpp's C functions as one object: a model, and a context whose cells all sequences share.

Rows, tokens and positions go in as arrays, logits come out. What an answer is, `decoder_llamacpp` knows.

Source of the names and rules: abetlen/llama-cpp-python 0.3.36 llama_cpp/llama_cpp.py; ggml-org/llama.cpp
include/llama.h and src/llama-batch.cpp at 0c1e570.
"""

from __future__ import annotations

import ctypes
import os
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from holov_export.errors import EnvironmentFaultError
from holov_export.extras import require
from holov_export.tensors import FloatArray

#: tokens of one call and of one pass through the layers; longer prompts go in several calls
BATCH = 512
#: llama.cpp makes contexts of whole multiples of so many cells
CELLS = 256
_FULL_PRECISION, _HALF, _EIGHT_BITS = 0, 1, 8  # ggml_type: F32, F16, Q8_0
#: numbers that share a scale in Q8_0; llama.cpp refuses heads that are no multiple of it
EIGHT_BITS_BLOCK = 32
_WARNING, _CONTINUED = 2, 5  # ggml_log_level
#: what llama.cpp said last, for messages of errors, and the callback that hears it: ctypes does not keep one alive
_heard: deque[str] = deque(maxlen=12)
_listener: Any = None

IntArray = npt.NDArray[np.int32]


@dataclass(frozen=True)
class EngineOptions:
    """How llama.cpp runs.

    Attributes:
        gpu: all layers on the GPU; else none, and nothing else either.
        threads: CPU threads.
        exact: attention in float32 and keys and values stored so, without flash attention, which rounds them to
            float16. Else flash attention where llama.cpp has it, and float16.
        lanes: sequences at once.
        eight_bits: keys and values stored as Q8_0, with flash attention, without which llama.cpp has no such values;
            not together with `exact`.
    """

    gpu: bool
    threads: int
    exact: bool
    lanes: int
    eight_bits: bool = False


class LlamaEngine:
    """A GGUF file in memory and a context that grows.

    Attributes:
        cells: tokens that all sequences together have room for.
    """

    def __init__(self, file: Path, options: EngineOptions) -> None:
        """Load the file; the context comes with the first `resize`.

        Raises:
            MissingExtraError: llama-cpp-python is not installed.
            EnvironmentFaultError: the file does not load.
        """
        self._llama: Any = llama_cpp()
        self._options = options
        self._context: Any = None
        self.cells = 0
        settings = self._llama.llama_model_default_params()
        settings.n_gpu_layers = -1 if options.gpu else 0
        self._model: Any = self._llama.llama_model_load_from_file(os.fsencode(file), settings)
        if not self._model:
            raise _failed(f"llama.cpp cannot load '{file.name}'")

    @property
    def width(self) -> int:
        return int(self._llama.llama_model_n_embd(self._model))

    @property
    def vocab_size(self) -> int:
        return int(self._llama.llama_vocab_n_tokens(self._llama.llama_model_get_vocab(self._model)))

    @property
    def mrope(self) -> bool:
        """Whether positions are three numbers."""
        return bool(self._llama.llama_model_rope_type(self._model) == self._llama.LLAMA_ROPE_TYPE_MROPE)

    def resize(self, cells: int, lanes: Sequence[int]) -> None:
        """Make the context anew with room for at least so many tokens; what `lanes` have in it stays.

        Raises:
            EnvironmentFaultError: there is not enough memory.
        """
        before, kept = self.cells, {lane: self._state(lane) for lane in lanes}
        self._free_context()
        try:
            self._make_context(cells)
        except EnvironmentFaultError:
            if kept:
                self._make_context(before)
                self._restore(kept)
            raise
        self._restore(kept)

    def _make_context(self, cells: int) -> None:
        context = self._llama.llama_init_from_model(self._model, self._context_settings(cells))
        if not context:
            raise _failed(f"llama.cpp cannot make room for {cells} tokens")
        self._context, self.cells = context, int(self._llama.llama_n_ctx(context))

    def _restore(self, states: Mapping[int, bytearray]) -> None:
        for lane, state in states.items():
            array = (ctypes.c_uint8 * len(state)).from_buffer(state)
            if self._llama.llama_state_seq_set_data(self._context, array, len(state), lane) != len(state):
                raise _failed("llama.cpp cannot take an answer over into another context")

    def _context_settings(self, cells: int) -> Any:
        llama, options = self._llama, self._options
        settings = llama.llama_context_default_params()
        settings.n_ctx = -(-cells // CELLS) * CELLS
        settings.n_batch = settings.n_ubatch = BATCH
        settings.n_seq_max = settings.n_outputs_max = options.lanes
        settings.kv_unified = True
        settings.n_threads = settings.n_threads_batch = options.threads
        settings.offload_kqv = settings.op_offload = options.gpu
        settings.no_perf = True
        if options.exact:
            settings.flash_attn_type = llama.LLAMA_FLASH_ATTN_TYPE_DISABLED
        settings.type_k = settings.type_v = _FULL_PRECISION if options.exact else _HALF
        if options.eight_bits:
            settings.flash_attn_type = llama.LLAMA_FLASH_ATTN_TYPE_ENABLED
            settings.type_k = settings.type_v = _EIGHT_BITS
        return settings

    def _state(self, lane: int) -> bytearray:
        """The keys and values of a sequence."""
        size = self._llama.llama_state_seq_get_size(self._context, lane)
        state = bytearray(size)
        array = (ctypes.c_uint8 * size).from_buffer(state)
        if self._llama.llama_state_seq_get_data(self._context, array, size, lane) != size:
            raise _failed("llama.cpp cannot save an answer")
        return state

    def put_tokens(self, ids: IntArray, positions: IntArray, lanes: IntArray, wanted: npt.NDArray[np.bool_]) -> None:
        """Run tokens through the model.

        Args:
            ids: int32 [n], at most `BATCH`.
            positions: int32 [n].
            lanes: int32 [n], the sequence of each.
            wanted: bool [n], whose logits can be asked for afterwards.

        Raises:
            EnvironmentFaultError: llama.cpp failed.
        """
        self._decode(ids.ctypes.data_as(ctypes.POINTER(ctypes.c_int32)), None, positions, lanes, wanted)

    def put_rows(self, rows: FloatArray, positions: IntArray, lanes: IntArray, wanted: npt.NDArray[np.bool_]) -> None:
        """Run embedding rows through the model.

        Args:
            rows: float32 [n, D], at most `BATCH`.
            positions: int32 [n], or [4, n] where positions are three numbers: time, height, width, and zeros.
            lanes, wanted: as of `put_tokens`.

        Raises:
            EnvironmentFaultError: llama.cpp failed.
        """
        rows = np.ascontiguousarray(rows, dtype=np.float32)
        self._decode(None, rows.ctypes.data_as(ctypes.POINTER(ctypes.c_float)), positions, lanes, wanted)

    def _decode(
        self, tokens: Any, rows: Any, positions: IntArray, lanes: IntArray, wanted: npt.NDArray[np.bool_]
    ) -> None:
        if not self._context:
            raise EnvironmentFaultError("llama.cpp has no context: there was not enough memory for one.")
        number, integers = len(lanes), ctypes.POINTER(ctypes.c_int32)
        places, owners = np.ascontiguousarray(positions), np.ascontiguousarray(lanes)
        ones, outputs = np.ones(number, dtype=np.int32), wanted.astype(np.int8)
        pointers = (owners.ctypes.data + 4 * np.arange(number)).astype(np.uintp)  # each to one sequence
        batch = self._llama.llama_batch(
            n_tokens=number,
            token=tokens,
            embd=rows,
            pos=places.ctypes.data_as(integers),
            n_seq_id=ones.ctypes.data_as(integers),
            seq_id=pointers.ctypes.data_as(ctypes.POINTER(integers)),
            logits=outputs.ctypes.data_as(ctypes.POINTER(ctypes.c_int8)),
        )
        _heard.clear()
        status = self._llama.llama_decode(self._context, batch)
        if status != 0:
            raise _failed(f"llama.cpp failed with status {status}")

    def logits(self, index: int) -> FloatArray:
        """float32 [V], of one token of the last call: its number in it."""
        pointer = self._llama.llama_get_logits_ith(self._context, index)
        if not pointer:
            raise _failed("llama.cpp has no logits")
        return np.ctypeslib.as_array(pointer, shape=(self.vocab_size,)).copy()

    def forget(self, lane: int) -> None:
        """Free the cells of a sequence."""
        if self._context:
            self._llama.llama_memory_seq_rm(self._llama.llama_get_memory(self._context), lane, -1, -1)

    def _free_context(self) -> None:
        if self._context:
            self._llama.llama_free(self._context)
        self._context, self.cells = None, 0

    def close(self) -> None:
        """Release the context and the model."""
        self._free_context()
        if self._model:
            self._llama.llama_model_free(self._model)
        self._model = None


def llama_cpp() -> Any:
    """The package, initialised, silent, and heard by `_heard`.

    Raises:
        MissingExtraError: it is not installed.
        EnvironmentFaultError: its library does not load here.
    """
    global _listener
    try:
        package: Any = require("llama_cpp")
    except (OSError, RuntimeError) as error:  # RuntimeError: its own, around that of the loader
        raise EnvironmentFaultError(
            f"llama-cpp-python is installed, but its library does not load: {error}",
            hint="A wheel built for another CPU or CUDA does that; docs/llama-cpp.md says how to build one.",
        ) from error
    if _listener is None:
        _listener = package.llama_log_callback(_hear)
        package.llama_log_set(_listener, ctypes.c_void_p(0))
        package.llama_backend_init()
    return package


def _hear(level: int, text: bytes, data: object) -> None:
    del data
    if level >= _WARNING and level <= _CONTINUED and text.strip():
        _heard.append(text.decode("utf-8", errors="replace").strip())


def _failed(what: str) -> EnvironmentFaultError:
    """An error that ends with what llama.cpp said last."""
    said = "; ".join(_heard)
    return EnvironmentFaultError(f"{what}: {said}" if said else f"{what}, and says nothing about it.")
