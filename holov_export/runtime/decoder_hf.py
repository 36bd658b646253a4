"""transformers as the reference decoder: slow, plain, and what every other decoder is compared with."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from holov_export.errors import CheckpointError, EnvironmentFaultError, UnsupportedModelError
from holov_export.extras import require
from holov_export.runtime.decoder import check_prompt, check_sampling, end_tokens, token_from_logits
from holov_export.spec import DecoderSpec
from holov_export.tensors import SamplingSettings, StitchedPrompt
from holov_export.vision.weights import shard_of_tensor

#: transformers' class of each family, by the `model_type` of its config.json
CLASSES = {
    "llava": "LlavaForConditionalGeneration",
    "llava_next": "LlavaNextForConditionalGeneration",
    "qwen2_5_vl": "Qwen2_5_VLForConditionalGeneration",
    "video_llava": "VideoLlavaForConditionalGeneration",
}


def family_of_checkpoint(checkpoint: Path) -> str:
    """The family of a checkpoint directory, a key of `CLASSES`.

    Raises:
        CheckpointError: there is no config.json, it does not parse, or it is of another family.
    """
    path = _config_file(checkpoint)
    try:
        family = json.loads(path.read_text(encoding="utf-8"))["model_type"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"transformers cannot load '{checkpoint.name}': {error}") from error
    if family not in CLASSES:
        raise CheckpointError(f"'{checkpoint.name}' is a '{family}'.", hint=f"Known: {', '.join(CLASSES)}.")
    return str(family)


def _config_file(checkpoint: Path) -> Path:
    path = checkpoint / "config.json"
    if not path.is_file():  # transformers would make up a model of 7 B parameters
        raise CheckpointError(f"'{checkpoint.name}' has no config.json.", hint="A Hugging Face model is expected.")
    return path


def check_llava(checkpoint: Path) -> None:
    """Refuse a checkpoint that the methods inside the language model were not written for.

    Raises:
        CheckpointError: see `family_of_checkpoint`.
        UnsupportedModelError: it is no LLaVA-1.5.
    """
    family = family_of_checkpoint(checkpoint)
    if family != "llava":
        raise UnsupportedModelError(
            f"the methods inside the language model are references for LLaVA-1.5, this is a '{family}'.",
            hint="Choose a rule of the vision graph: holov-export methods",
        )


@dataclass(frozen=True)
class _Going:
    """What a step goes on from: the cache, and the position of the next token where positions are three numbers."""

    cache: Any
    position: int | None


class HfDecoder:
    """The language model of a checkpoint directory, run by transformers; each stream has its key-value cache."""

    lanes = 64

    def __init__(
        self, checkpoint: Path, spec: DecoderSpec, *, provider: str = "auto", threads: int | None = None
    ) -> None:
        """Load the checkpoint.

        Args:
            checkpoint: its directory.
            spec: of the language model.
            provider: "cpu", "cuda", or "auto" for CUDA where torch has it. The CPU computes in float32, CUDA in the
                checkpoint's own type.
            threads: torch's CPU threads, for the whole process; None leaves them.

        Raises:
            MissingExtraError: torch or transformers is not installed.
            EnvironmentFaultError: CUDA was asked for and is not there.
            CheckpointError: the directory does not load, or holds only pickled weights: those can run code.
        """
        self._torch = require("torch")
        transformers = require("transformers")
        has_cuda = bool(self._torch.cuda.is_available())
        if provider == "cuda" and not has_cuda:
            raise EnvironmentFaultError("this torch has no CUDA.", hint="Choose --provider cpu.")
        self._device = "cuda" if has_cuda and provider != "cpu" else "cpu"
        if threads is not None:
            self._torch.set_num_threads(threads)
        dtype = "auto" if self._device == "cuda" else self._torch.float32
        _config_file(checkpoint)
        shard_of_tensor(checkpoint)  # says what is wrong with the weights where transformers names a missing file
        family = family_of_checkpoint(checkpoint)
        bars = transformers.utils.logging
        shown = bars.is_progress_bar_enabled()
        bars.disable_progress_bar()
        try:
            model = getattr(transformers, CLASSES[family]).from_pretrained(
                checkpoint, dtype=dtype, local_files_only=True, use_safetensors=True
            )
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise CheckpointError(f"transformers cannot load '{checkpoint.name}': {error}") from error
        finally:
            if shown:
                bars.enable_progress_bar()
        self._model: Any = model.eval().to(self._device)
        self._spec = spec
        self.name = f"transformers {transformers.__version__} ({self._device})"

    def stream(self, prompt: StitchedPrompt, sampling: SamplingSettings) -> Iterator[int]:
        """See `Decoder.stream`."""
        self._check(prompt)
        check_sampling(sampling)
        return self._tokens(prompt, sampling)

    def _check(self, prompt: StitchedPrompt) -> None:
        """Refuse what cannot be decoded; a decoder that does more than this one refuses more."""
        check_prompt(prompt, self._spec)
        if self._model is None:
            raise EnvironmentFaultError("the decoder is closed.")

    def _tokens(self, prompt: StitchedPrompt, sampling: SamplingSettings) -> Iterator[int]:
        ends = end_tokens(self._spec, sampling)
        dice = np.random.default_rng(sampling.seed)
        logits, state = self._prefilled(prompt)
        for left in range(sampling.max_new_tokens - 1, -1, -1):
            token = token_from_logits(logits, sampling, dice)
            if token in ends:
                return
            yield token
            if left:
                logits, state = self._step(self._words(np.array([token], dtype=np.int64)), state)

    def _prefilled(self, prompt: StitchedPrompt) -> tuple[Any, Any]:
        """float32 [V], the logits of the first token, and the state that `_step` goes on from."""
        if not self._spec.mrope_sections:
            return self._step(self._embeds(prompt), _Going(None, None))
        assert prompt.position_ids is not None  # `check_prompt`
        positions = self._torch.from_numpy(np.ascontiguousarray(prompt.position_ids[:, None])).to(self._device)
        logits, cache = self._run(self._embeds(prompt), None, positions)
        return logits, _Going(cache, prompt.next_position)

    def _words(self, ids: Any) -> Any:
        """[1, S, D]: the token embeddings of ids [S]."""
        with self._torch.inference_mode():
            return self._model.get_input_embeddings()(self._torch.from_numpy(ids).to(self._device))[None]

    def _embeds(self, prompt: StitchedPrompt) -> Any:
        """[1, S, D]: the words' embeddings with the visual rows in the placeholders' places."""
        torch = self._torch
        embeds = self._words(prompt.input_ids)
        with torch.inference_mode():
            rows = torch.from_numpy(np.ascontiguousarray(prompt.rows, dtype=np.float32))
            places = torch.from_numpy(prompt.input_ids == prompt.image_token_id).to(self._device)
            embeds[0, places] = rows.to(self._device, embeds.dtype)
        return embeds

    def _step(self, embeds: Any, state: Any) -> tuple[Any, Any]:
        """float32 [V], the logits of the next token after embeds [1, S, D], and what the next step goes on from.

        With a position in `state` embeds is one token, which has it along all three axes.
        """
        if state.position is None:
            logits, cache = self._run(embeds, state.cache, None)
            return logits, _Going(cache, None)
        positions = self._torch.full((3, 1, embeds.shape[1]), state.position, device=self._device)
        logits, cache = self._run(embeds, state.cache, positions)
        return logits, _Going(cache, state.position + 1)

    def _run(self, embeds: Any, cache: Any, positions: Any) -> tuple[Any, Any]:
        """(logits [V], cache). Only the last token goes through the head; without positions they are 0, 1, 2, ..."""
        with self._torch.inference_mode():
            out = self._model.model.language_model(
                inputs_embeds=embeds, position_ids=positions, past_key_values=cache, use_cache=True
            )
            logits = self._model.lm_head(out.last_hidden_state[0, -1])
        return logits.float().cpu().numpy(), out.past_key_values

    def close(self) -> None:
        """Release the model."""
        self._model = None
