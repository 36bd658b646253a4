"""ONNX Runtime GenAI over a bundle's decoder folder (written by `export/decoder_onnx.py`)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from holov_export.errors import BundleError, EnvironmentFaultError, UnknownNameError
from holov_export.extras import require
from holov_export.runtime.decoder import check_genai, check_prompt, check_sampling, end_tokens
from holov_export.spec import DecoderSpec
from holov_export.tensors import SamplingSettings, StitchedPrompt

PROVIDERS = ("auto", "cpu", "cuda")
CONFIG = "genai_config.json"


class GenaiDecoder:
    """The decoder embedded in a bundle. One prompt at a time: GenAI's vision-language pipeline takes no batch."""

    def __init__(self, folder: Path, spec: DecoderSpec, *, provider: str = "auto", threads: int | None = None) -> None:
        """Load the decoder.

        Args:
            folder: `decoder/` of a bundle.
            spec: of the language model.
            provider: "cpu", "cuda", or "auto" for CUDA where this GenAI has it.
            threads: CPU threads within one operator; None for GenAI's choice.

        Raises:
            UnknownNameError: another provider.
            UsageError: the language model is one that GenAI would run wrongly.
            MissingExtraError: onnxruntime-genai is not installed.
            BundleError: the folder is no GenAI decoder.
            EnvironmentFaultError: CUDA was asked for and is not there, or the model does not load here.
        """
        check_genai(spec)
        if not (folder / CONFIG).is_file():
            raise BundleError(f"'{folder}' has no {CONFIG}.", hint="Export the bundle again, without --no-decoder.")
        require("onnxruntime")  # GenAI ends the whole process when it cannot find ONNX Runtime's library
        self._genai = require("onnxruntime_genai")
        self._spec = spec
        device = self._device(provider)
        config = self._genai.Config(str(folder))
        config.clear_providers()
        if device == "cuda":
            config.append_provider("cuda")
        if threads is not None:
            options = {"session_options": {"intra_op_num_threads": threads}}
            config.overlay(json.dumps({"model": {"decoder": options}}))
        try:
            self._model: Any = self._genai.Model(config)
        except RuntimeError as error:
            raise EnvironmentFaultError(
                f"ONNX Runtime GenAI {self._genai.__version__} cannot load the decoder on {device}: {error}"
            ) from error
        self.name = f"onnxruntime-genai {self._genai.__version__} ({device})"

    def _device(self, provider: str) -> str:
        if provider not in PROVIDERS:
            raise UnknownNameError(f"unknown provider '{provider}'.", hint=f"Known: {', '.join(PROVIDERS)}.")
        has_cuda = bool(self._genai.is_cuda_available())
        if provider == "cuda" and not has_cuda:
            raise EnvironmentFaultError(
                f"this ONNX Runtime GenAI ({self._genai.__version__}) has no CUDA.",
                hint='Run: pip uninstall onnxruntime onnxruntime-genai; pip install "holov-export[gpu]". '
                "Or choose --provider cpu.",
            )
        return "cuda" if has_cuda and provider != "cpu" else "cpu"

    def stream(self, prompt: StitchedPrompt, sampling: SamplingSettings) -> Iterator[int]:
        """See `Decoder.stream`."""
        check_prompt(prompt, self._spec)
        check_sampling(sampling)
        if self._model is None:
            raise EnvironmentFaultError("the decoder is closed.")
        return self._tokens(self._generator(prompt, sampling), self._inputs(prompt), sampling)

    def _generator(self, prompt: StitchedPrompt, sampling: SamplingSettings) -> Any:
        """A GenAI generator with room for the prompt and its answer."""
        genai = self._genai
        settings = genai.GeneratorParams(self._model)
        settings.set_search_options(
            max_length=len(prompt) + sampling.max_new_tokens, **_search(sampling, self._spec.vocab_size)
        )
        try:
            return genai.Generator(self._model, settings)
        except RuntimeError as error:
            raise EnvironmentFaultError(f"ONNX Runtime GenAI failed: {error}") from error

    def _inputs(self, prompt: StitchedPrompt) -> Any:
        """The prompt as GenAI's named tensors.

        Source of the names: onnxruntime-genai 0.18 src/models/multi_modal.cpp, for the type "phi3v".
        """
        inputs = self._genai.NamedTensors()
        inputs["input_ids"] = prompt.input_ids[None].astype(np.int32)
        # float32 whatever the decoder is: its vision graph casts, and numpy has no bfloat16
        inputs["pixel_values"] = np.ascontiguousarray(prompt.rows, dtype=np.float32).reshape(-1, self._spec.width)
        inputs["num_image_tokens"] = np.array([len(prompt.rows)], dtype=np.int64)
        return inputs

    def _tokens(self, generator: Any, inputs: Any, sampling: SamplingSettings) -> Iterator[int]:
        ends = end_tokens(self._spec, sampling)
        for number in range(sampling.max_new_tokens):
            try:
                if number == 0:
                    generator.set_inputs(inputs)  # this prefills
                generator.generate_next_token()
            except RuntimeError as error:
                raise EnvironmentFaultError(f"ONNX Runtime GenAI failed: {error}") from error
            token = int(generator.get_next_tokens()[0])
            if token in ends:
                return
            yield token
            if generator.is_done():
                return

    def close(self) -> None:
        """Release the model."""
        self._model = None


def _search(sampling: SamplingSettings, vocab_size: int) -> dict[str, bool | int | float]:
    """GenAI's search options.

    top_p never goes without a top_k: alone, GenAI 0.18 draws outside the nucleus (at top_p 0.5 and temperature 1, 357
    of 1500 draws); together with a top_k of the whole vocabulary none.
    """
    if sampling.temperature == 0:
        return {"do_sample": False, "temperature": 1.0, "top_k": 1, "top_p": 1.0}
    seed = -1 if sampling.seed is None else sampling.seed  # -1: GenAI throws its own dice
    return {
        "do_sample": True,
        "temperature": sampling.temperature,
        "top_k": sampling.top_k or vocab_size,
        "top_p": sampling.top_p,
        "random_seed": seed,
    }
