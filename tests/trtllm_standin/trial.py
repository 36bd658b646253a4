"""What tests of the decoders share: an engine folder as trtllm-build leaves it, transformers as its language model."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForImageTextToText

from holov_export.decoder_files import DecoderRecord, DecoderSizes, files_in, write_record
from holov_export.spec import DecoderSpec
from holov_export.tensors import StitchedPrompt
from trtllm_standin.executor import Asked

SIZES = DecoderSizes(batch=4, images=2, budget=80, multimodal=640, input=240, sequence=300)


@dataclass(frozen=True)
class EngineTrial:
    """What differs between the engines of a test."""

    dtype: str = "float32"
    reuse: bool = False
    world: int = 1
    version: str = "0.16.0"


def write_engine(folder: Path, spec: DecoderSpec, trial: EngineTrial, sizes: DecoderSizes = SIZES) -> Path:
    """A folder of `holov-export compile --decoder trtllm` without its weights: names and numbers of a real config.json.

    Source: tensorrt_llm/builder.py (EngineConfig), models/qwen/config.py, 0.16.0.dev2024121000.
    """
    mrope = bool(spec.mrope_sections)
    model = {
        "architecture": "Qwen2VLForConditionalGeneration" if mrope else "LlamaForCausalLM",
        "dtype": trial.dtype,
        "vocab_size": spec.vocab_size,
        "hidden_size": spec.width,
        "num_attention_heads": spec.heads,
        "head_size": spec.head_width,
        "position_embedding_type": "mrope" if mrope else "rope_gpt_neox",
        "max_position_embeddings": spec.context,
        "rotary_embedding_dim": spec.head_width if mrope else None,
        "rotary_base": 10000.0,
        "mapping": {"world_size": trial.world, "tp_size": trial.world, "pp_size": 1},
    }
    build = {
        "max_batch_size": sizes.batch,
        "max_input_len": sizes.input,
        "max_seq_len": sizes.sequence,
        "max_num_tokens": 8192,
        "max_prompt_embedding_table_size": sizes.multimodal,
        "plugin_config": {"use_paged_context_fmha": trial.reuse},
    }
    engine = folder / "engine"
    engine.mkdir(parents=True)
    config = {"version": trial.version, "pretrained_config": model, "build_config": build}
    (engine / "config.json").write_text(json.dumps(config))
    record = DecoderRecord(
        kind="trtllm",
        model="tiny",
        width=spec.width,
        vocab_size=spec.vocab_size,
        weights=trial.dtype,
        main="engine",
        sizes=sizes,
        files=files_in(folder),
        tool=f"TensorRT-LLM {trial.version}",
        created="2026-11-26T00:00:00+00:00",
    )
    write_record(folder, record)
    return folder


class HfLanguage:
    """Greedy tokens of a checkpoint's language model, from ids that may be rows of a table."""

    def __init__(self, checkpoint: Path, vocab_size: int) -> None:
        self._model = AutoModelForImageTextToText.from_pretrained(checkpoint, dtype=torch.float32).eval()
        self._vocab_size = vocab_size
        self.asked: list[Asked] = []

    def __call__(self, asked: Asked) -> list[int]:
        self.asked.append(asked)
        ids = torch.tensor(asked.ids)
        words = ids < self._vocab_size
        embeds = torch.empty(len(ids), self._model.get_input_embeddings().weight.shape[1])
        embeds[words] = self._model.get_input_embeddings()(ids[words]).detach()
        if asked.rows is not None:
            embeds[~words] = asked.rows[ids[~words] - self._vocab_size].float()
        return self.greedy(embeds, asked.length)

    @torch.inference_mode()
    def greedy(self, embeds: torch.Tensor, length: int) -> list[int]:
        """From the embeddings [S, D] of a prompt."""
        found = self._model.generate(
            inputs_embeds=embeds[None],
            attention_mask=torch.ones(1, len(embeds), dtype=torch.long),
            max_new_tokens=length,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        return [int(token) for token in found[0]]


def prompt_of(spec: DecoderSpec, *counts: int, seed: int = 0, words: int = 5) -> StitchedPrompt:
    """Words, an image of each count of random rows between them, words."""
    dice = np.random.default_rng(seed)
    taken = {spec.image_token_id, *spec.eos_token_ids}
    known = [token for token in range(10, spec.vocab_size) if token not in taken]

    def some(number: int) -> list[int]:
        return [int(token) for token in dice.choice(known, number)]

    ids = some(words)
    for count in counts:
        ids += [spec.image_token_id] * count + some(3)
    rows = dice.normal(0, 0.3, (sum(counts), spec.width)).astype(np.float32)
    return StitchedPrompt(np.array(ids, dtype=np.int64), rows, counts, spec.image_token_id, "text")


def counting(first: int) -> Callable[[Asked], list[int]]:
    """A language model that counts from `first` on."""

    def language(asked: Asked) -> list[int]:
        return [first + index for index in range(asked.length)]

    return language


def rows_of(request: Any) -> torch.Tensor:
    """The prompt table of an executor's request."""
    table: torch.Tensor = request.prompt_tuning_config.embedding_table
    return table
