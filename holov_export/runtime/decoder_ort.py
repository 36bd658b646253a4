"""Plain ONNX Runtime over a bundle's decoder folder (written by `export/decoder_onnx.py`).

It runs what ONNX Runtime GenAI cannot: language models whose positions are three numbers (M-RoPE). GenAI's pipelines
for them work the numbers out of the picture's grid, which is wrong where tokens were pruned. Other decoders run too.

Keys and values stay in one buffer on the device, long enough for the prompt and its answer: the graph's attention
appends to it in place, as it does under GenAI (`past_present_share_buffer`). A graph that was built so stores them in
8 bits, with scales of its own; GenAI's configuration then shares no buffer on a CPU, here it is the same. CUDA has not
run on a real GPU yet.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from holov_export.errors import BundleError, EnvironmentFaultError, PromptError, UnknownNameError
from holov_export.extras import require
from holov_export.runtime.decoder import check_prompt, check_sampling, end_tokens, load_hint, token_from_logits
from holov_export.runtime.ort_providers import CPU, CUDA
from holov_export.spec import DecoderSpec
from holov_export.tensors import FloatArray, Int64Array, SamplingSettings, StitchedPrompt

PROVIDERS = ("auto", "cpu", "cuda")
GRAPHS = ("model.onnx", "embedding.onnx", "vision.onnx")
_PAST, _PRESENT = "past_key_values.", "present."
#: onnx's numbers of the types that a cache can have
_TYPES = {"tensor(float)": 1, "tensor(float16)": 10, "tensor(bfloat16)": 16, "tensor(int8)": 3}
#: of those, the ones that numpy has and that hold what was computed
_READABLE = ("tensor(float)", "tensor(float16)")
_BFLOAT16 = 16
_ERRORS_ONLY = 3


class OrtDecoder:
    """The decoder embedded in a bundle, run graph by graph. Each stream has a key-value cache of its own."""

    lanes = 64

    def __init__(self, folder: Path, spec: DecoderSpec, *, provider: str = "auto", threads: int | None = None) -> None:
        """Load the decoder.

        Args:
            folder: `decoder/` of a bundle.
            spec: of the language model.
            provider: "cpu", "cuda", or "auto" for CUDA where this ONNX Runtime has it.
            threads: CPU threads within one operator; None for one per core.

        Raises:
            UnknownNameError: another provider.
            MissingExtraError: onnxruntime is not installed.
            BundleError: the folder is no such decoder.
            EnvironmentFaultError: CUDA was asked for and is not there or fell back to the CPU, or a graph does not
                load.
        """
        for name in GRAPHS:
            if not (folder / name).is_file():
                raise BundleError(f"'{folder}' has no {name}.", hint="Export the bundle again, without --no-decoder.")
        self._ort = require("onnxruntime")
        self._spec = spec
        self._decoder: Any = self._opened(folder / GRAPHS[0], provider, threads)
        # the tables of words are looked up on the CPU: a gigabyte of them would save a GPU nothing
        self._embedding = self._opened(folder / GRAPHS[1], "cpu", threads)
        self._rows = self._opened(folder / GRAPHS[2], "cpu", threads)
        self._inputs = {item.name: item for item in self._decoder.get_inputs()}
        self._caches = _cache_names(self._decoder, folder)
        self._no_rows = self._features(np.zeros((0, spec.width), dtype=np.float32))
        self._device = "cuda" if self._decoder.get_providers()[0] == CUDA else "cpu"
        self.name = f"onnxruntime {self._ort.__version__} ({self._device})"

    def _opened(self, path: Path, provider: str, threads: int | None) -> Any:
        """A session that does not change its provider later."""
        if provider not in PROVIDERS:
            raise UnknownNameError(f"unknown provider '{provider}'.", hint=f"Known: {', '.join(PROVIDERS)}.")
        has_cuda = CUDA in self._ort.get_available_providers()
        if provider == "cuda" and not has_cuda:
            raise EnvironmentFaultError(
                f"this ONNX Runtime ({self._ort.__version__}) has no CUDA.",
                hint='Run: pip uninstall onnxruntime onnxruntime-genai; pip install "holov-export[gpu]". '
                "Or choose --provider cpu.",
            )
        options = self._ort.SessionOptions()
        options.log_severity_level = _ERRORS_ONLY
        if threads is not None:
            options.intra_op_num_threads = threads
        chosen = [CUDA, CPU] if has_cuda and provider != "cpu" else [CPU]
        try:
            session = self._ort.InferenceSession(str(path), options, providers=chosen, enable_fallback=0)
        except Exception as error:  # onnxruntime's exceptions have no common base
            if provider == "auto" and has_cuda:
                return self._opened(path, "cpu", threads)
            raise EnvironmentFaultError(
                f"ONNX Runtime {self._ort.__version__} cannot load the decoder's {path.name}: {error}",
                hint=load_hint(error),
            ) from error
        session.disable_fallback()
        if provider == "cuda" and session.get_providers()[0] != CUDA:
            raise EnvironmentFaultError(
                "ONNX Runtime fell back to the CPU: it could not load its CUDA libraries.",
                hint="Compare the CUDA and cuDNN versions with onnxruntime-gpu's, or choose --provider cpu.",
            )
        return session

    def stream(self, prompt: StitchedPrompt, sampling: SamplingSettings) -> Iterator[int]:
        """See `Decoder.stream`.

        Raises:
            PromptError: also where the prompt and its answer are longer than the context.
        """
        self._check(prompt, sampling)
        return self._tokens(prompt, sampling)

    def _check(self, prompt: StitchedPrompt, sampling: SamplingSettings) -> None:
        check_prompt(prompt, self._spec)
        check_sampling(sampling)
        if self._decoder is None:
            raise EnvironmentFaultError("the decoder is closed.")
        end = max(len(prompt), prompt.next_position or 0) + sampling.max_new_tokens
        if end > self._spec.context:  # behind it there are no rotary angles
            raise PromptError(
                f"the prompt and {sampling.max_new_tokens} new tokens end at {end}, the context at "
                f"{self._spec.context}.",
                hint="Lower max_new_tokens, shorten the prompt or lower the budget.",
            )

    def largest_stored(self, prompt: StitchedPrompt, sampling: SamplingSettings) -> tuple[FloatArray, FloatArray]:
        """How large the keys and values get that a prompt and its answer store.

        Keys are turned by their positions, channels i and i + head_width / 2 of a head together, so at another position
        either can be as large as both are long: that length counts for both.

        Returns:
            (keys, values): float32 [layers, kv_heads * head_width] each, largest over the tokens: lengths of the pairs
            of keys, absolute values of values.

        Raises:
            as `stream`; and EnvironmentFaultError where this graph does not store float32 or float16.
        """
        self._check(prompt, sampling)
        if any(self._inputs[past].type not in _READABLE for past, _ in self._caches):
            raise EnvironmentFaultError("the decoder's keys and values are neither float32 nor float16.")
        binding, caches = self._binding(len(prompt) + sampling.max_new_tokens)
        answer = list(self._tokens(prompt, sampling, binding))
        # the last of an answer that did not end by itself is not stored
        stored = len(prompt) + min(len(answer), sampling.max_new_tokens - 1)
        held = {name: cache.numpy()[0, :, :stored].astype(np.float32) for name, cache in caches.items()}
        keys = [_pair_lengths(rows).max(axis=1).ravel() for name, rows in held.items() if name.endswith(".key")]
        values = [np.abs(rows).max(axis=1).ravel() for name, rows in held.items() if name.endswith(".value")]
        return np.stack(keys), np.stack(values)

    def _tokens(self, prompt: StitchedPrompt, sampling: SamplingSettings, binding: Any = None) -> Iterator[int]:
        ends = end_tokens(self._spec, sampling)
        dice = np.random.default_rng(sampling.seed)
        length = len(prompt)
        following = length if prompt.next_position is None else prompt.next_position
        if binding is None:
            binding, _ = self._binding(length + sampling.max_new_tokens)
        positions = np.tile(np.arange(length), (3, 1)) if prompt.position_ids is None else prompt.position_ids
        rows = np.ascontiguousarray(prompt.rows, dtype=np.float32).reshape(-1, self._spec.width)
        embeds = self._embeds(prompt.input_ids, self._features(rows))
        for number in range(sampling.max_new_tokens):
            token = token_from_logits(self._logits(binding, embeds, positions, length + number), sampling, dice)
            if token in ends:
                return
            yield token
            embeds = self._embeds(np.array([token], dtype=np.int64), self._no_rows)
            positions = np.full((3, 1), following + number)

    def _binding(self, length: int) -> tuple[Any, dict[str, Any]]:
        """The decoder's inputs and outputs, and the caches of `length` tokens that both share, in the graph's order."""
        binding, caches = self._decoder.io_binding(), {}
        shape = [1, self._spec.kv_heads, length, self._spec.head_width]
        for past, present in self._caches:
            cache = self._ort.OrtValue.ortvalue_from_shape_and_type(
                shape, _TYPES[self._inputs[past].type], self._device
            )
            binding.bind_ortvalue_input(past, cache)
            binding.bind_ortvalue_output(present, cache)
            caches[past] = cache
        return binding, caches

    def _features(self, rows: npt.NDArray[np.float32]) -> Any:
        """Rows [R, D] in the decoder's type; its vision graph casts, for numpy has no bfloat16."""
        return self._run(self._rows, {"pixel_values": self._ort.OrtValue.ortvalue_from_numpy(rows)})

    def _embeds(self, ids: Int64Array, features: Any) -> Any:
        """[1, S, D]: the embeddings of ids [S], with the rows in the places of the placeholders."""
        words = self._ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(ids[None]))
        return self._run(self._embedding, {"input_ids": words, "image_features": features})

    def _run(self, session: Any, feed: dict[str, Any]) -> Any:
        try:
            (value,) = session.run_with_ort_values(None, feed)
        except Exception as error:  # onnxruntime's exceptions have no common base
            raise EnvironmentFaultError(f"ONNX Runtime failed before the decoder: {error}") from error
        return value

    def _logits(self, binding: Any, embeds: Any, positions: Int64Array, length: int) -> FloatArray:
        """float32 [V], of the token behind the S of `embeds` [1, S, D], whose last one is number `length` - 1."""
        binding.bind_ortvalue_input("inputs_embeds", embeds)
        binding.bind_cpu_input("attention_mask", np.ones((1, length), dtype=np.int64))
        if "position_ids" in self._inputs:
            three = self._inputs["position_ids"].shape[0] == 3
            binding.bind_cpu_input(
                "position_ids", np.ascontiguousarray(positions[:, None] if three else positions[:1], dtype=np.int64)
            )
        binding.bind_output("logits", "cpu")  # anew each time: the first ones have another shape
        try:
            self._decoder.run_with_iobinding(binding)
        except Exception as error:  # onnxruntime's exceptions have no common base
            raise EnvironmentFaultError(f"ONNX Runtime failed in the decoder: {error}") from error
        return last_logits(binding.get_outputs()[-1])

    def close(self) -> None:
        """Release the sessions."""
        self._decoder = self._embedding = self._rows = None


def _pair_lengths(keys: FloatArray) -> FloatArray:
    """Length of the rotary pair that each number of keys [heads, S, D] belongs to, same shape."""
    left, right = np.split(keys, 2, axis=-1)
    lengths = np.hypot(left, right)
    return np.concatenate([lengths, lengths], axis=-1)


def _cache_names(session: Any, folder: Path) -> list[tuple[str, str]]:
    """(input, output) of each layer's keys and values.

    Raises:
        BundleError: the graph is no decoder of embeddings with such caches.
    """
    inputs = {item.name: item.type for item in session.get_inputs()}
    outputs = {item.name for item in session.get_outputs()}
    pairs = [(name, name.replace(_PAST, _PRESENT)) for name in inputs if name.startswith(_PAST)]
    known = all(present in outputs and inputs[past] in _TYPES for past, present in pairs)
    if not pairs or not known or "logits" not in outputs or not {"inputs_embeds", "attention_mask"} <= set(inputs):
        raise BundleError(
            f"'{folder / GRAPHS[0]}' is no decoder of this package: it takes {', '.join(sorted(inputs))}.",
            hint="Export the bundle again with this version.",
        )
    return pairs


def last_logits(value: Any) -> FloatArray:
    """float32 [V] out of an OrtValue [1, S, V] on the CPU, of the last of S tokens."""
    if value.element_type() != _BFLOAT16:
        row: FloatArray = value.numpy()[0, -1].astype(np.float32)
        return row
    # numpy has no bfloat16: it is the upper half of a float32
    size = int(np.prod(value.shape()))
    halves = np.ctypeslib.as_array((ctypes.c_uint16 * size).from_address(value.data_ptr()))
    last = halves[size - value.shape()[-1] :].astype(np.uint32) << 16
    return last.view(np.float32)
