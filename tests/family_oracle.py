"""What transformers itself answers: from whole prompts, and from prompts of which some visual tokens were taken out.

Nothing of holov_export is used here but the positions that a bundle says it keeps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import transformers
from family_processors import processor_of
from PIL import Image

_CLASSES = {
    "llava": "LlavaForConditionalGeneration",
    "llava_next": "LlavaNextForConditionalGeneration",
    "qwen2_5_vl": "Qwen2_5_VLForConditionalGeneration",
    "video_llava": "VideoLlavaForConditionalGeneration",
}
Clip = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Asked:
    """A prompt as transformers' processor made it.

    Attributes:
        inputs: of the model. images, videos: int64 arrays, the places of each one's tokens in `input_ids`.
    """

    inputs: dict[str, Any]
    images: list[npt.NDArray[np.int64]]
    videos: list[npt.NDArray[np.int64]]


class Oracle:
    """A checkpoint in transformers, float32."""

    def __init__(self, folder: Path) -> None:
        config = transformers.AutoConfig.from_pretrained(folder)
        self.family: str = config.model_type
        self.model: Any = getattr(transformers, _CLASSES[self.family]).from_pretrained(folder, dtype=torch.float32)
        self.model.eval()
        self.model.generation_config = transformers.GenerationConfig(
            eos_token_id=self.model.generation_config.eos_token_id, pad_token_id=0
        )
        self.processor = processor_of(folder)
        self.ends = self.model.generation_config.eos_token_id
        self.ends = self.ends if isinstance(self.ends, list) else [self.ends]

    def text(self, question: str, images: int = 0, videos: int = 0) -> str:
        """The rendered prompt, by transformers' own chat template code."""
        parts = [{"type": "image"}] * images + [{"type": "video"}] * videos + [{"type": "text", "text": question}]
        messages = [{"role": "user", "content": parts}]
        return str(self.processor.apply_chat_template(messages, add_generation_prompt=True))

    def asked(self, question: str, images: Sequence[Image.Image] = (), videos: Sequence[Clip] = ()) -> Asked:
        """The inputs of one prompt."""
        named: dict[str, Any] = {"text": [self.text(question, len(images), len(videos))]}
        if images:
            named["images"] = [image.convert("RGB") for image in images]
        if videos:
            named["videos"] = list(videos)
            if self.family == "qwen2_5_vl":
                named["video_metadata"] = [
                    {"total_num_frames": len(clip), "fps": 2.0, "frames_indices": list(range(len(clip)))}
                    for clip in videos
                ]
        inputs = dict(self.processor(**named, return_tensors="pt"))
        ids = inputs["input_ids"][0].numpy()
        config = self.model.config
        return Asked(
            inputs,
            _runs(ids == config.image_token_id, len(images)),
            _runs(ids == config.video_token_id, len(videos)) if videos else [],
        )

    def answer(self, asked: Asked, new_tokens: int) -> list[int]:
        """transformers' generate, greedy; without the token that ends it."""
        with torch.inference_mode():
            made = self.model.generate(**asked.inputs, max_new_tokens=new_tokens, do_sample=False, num_beams=1)
        return self._to_end(made[0, asked.inputs["input_ids"].shape[1] :].tolist())

    def pruned_answer(self, asked: Asked, gone: npt.NDArray[np.int64], new_tokens: int) -> list[int]:
        """The greedy answer to a prompt without the tokens at the places `gone`.

        The embeddings are those that transformers would have given its language model. Where positions are three
        numbers the others keep theirs, and new tokens go on from those of the whole prompt; else they are 0, 1, 2, ...
        """
        embeds, positions, start = self._whole(asked.inputs)
        left = np.setdiff1d(np.arange(embeds.shape[1]), gone)
        embeds = embeds[:, left]
        step = positions[..., left] if positions is not None else torch.arange(len(left))[None]
        following = start if positions is not None else len(left)
        tokens: list[int] = []
        cache = None
        with torch.inference_mode():
            while len(tokens) < new_tokens:
                out = self.model.model.language_model(
                    inputs_embeds=embeds, position_ids=step, past_key_values=cache, use_cache=True
                )
                cache = out.past_key_values
                tokens.append(int(self.model.lm_head(out.last_hidden_state[0, -1]).argmax()))
                if tokens[-1] in self.ends:
                    break
                embeds = self.model.get_input_embeddings()(torch.tensor([tokens[-1:]]))
                shape = (3, 1, 1) if positions is not None else (1, 1)
                step = torch.full(shape, following + len(tokens) - 1)
        return self._to_end(tokens)

    def _to_end(self, tokens: list[int]) -> list[int]:
        ends = [index for index, token in enumerate(tokens) if token in self.ends]
        return tokens[: ends[0]] if ends else tokens

    def _whole(self, inputs: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor | None, int]:
        """(what the language model is given [1, S, D], its positions [3, 1, S] or None, the first new position)."""
        caught: dict[str, Any] = {}

        def catch(module: Any, args: Any, named: dict[str, Any]) -> None:
            caught.update(named)

        hook = self.model.model.language_model.register_forward_pre_hook(catch, with_kwargs=True)
        with torch.inference_mode():
            self.model.generate(**inputs, max_new_tokens=1, do_sample=False)
        hook.remove()
        if self.family != "qwen2_5_vl":
            return caught["inputs_embeds"], None, 0
        positions = caught["position_ids"][-3:]  # a fourth row in front counts plain tokens for the mask
        return caught["inputs_embeds"], positions, int(positions.max()) + 1


def _runs(mask: npt.NDArray[np.bool_], count: int) -> list[npt.NDArray[np.int64]]:
    """The places of each of `count` images. Their runs of placeholders do not touch."""
    places = np.flatnonzero(mask)
    runs = np.split(places, np.flatnonzero(np.diff(places) > 1) + 1) if len(places) else []
    assert len(runs) == count, f"{len(runs)} runs of placeholders for {count}"
    return [run.astype(np.int64) for run in runs]
