"""A stitched prompt in the words of TensorRT-LLM's engines: made-up ids, a table of rows, numbers for each image.

An engine takes visual rows as a prompt table [R, D]; a token whose id is vocab_size + i stands for row i of it. The
engine is blind to what the rows are: its cache of keys and values goes by ids alone, unless each token also carries a
number of its own ("extra id").

Source: NVIDIA/TensorRT-LLM tensorrt_llm/runtime/multimodal_model_runner.py (setup_fake_prompts,
setup_fake_prompts_qwen2vl), 0.16.0.dev2024121000 and @65b31db; cpp/include/tensorrt_llm/batch_manager/llmRequest.h.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from holov_export.errors import BundleError, PromptError, UnsupportedModelError, UsageError
from holov_export.spec import DecoderSpec
from holov_export.tensors import StitchedPrompt

ENGINE_CONFIG = "config.json"
#: the element types that an engine may compute in, and that its prompt table must then have
ENGINE_TYPES = ("float16", "bfloat16", "float32")


@dataclass(frozen=True)
class EngineFacts:
    """What an engine's config.json says of it.

    Attributes:
        version: of the TensorRT-LLM that built it.
        dtype: of its activations: "float16", ...
        batch, input, sequence, multimodal: max_batch_size, max_input_len, max_seq_len and the rows of the prompt
            tables of a whole batch.
        step: tokens that one step may process, all requests together.
        world: GPUs that it is spread over.
        reuse: it was built so that keys and values of earlier prompts may be used again.
        mrope: it takes a rotary table with each request. positions: of that table.
        rotary_width, rotary_base: of the rotary embedding.
    """

    version: str
    dtype: str
    width: int
    vocab_size: int
    batch: int
    input: int
    sequence: int
    step: int
    multimodal: int
    world: int
    reuse: bool
    mrope: bool
    positions: int
    rotary_width: int
    rotary_base: float

    @property
    def rows(self) -> int:
        """Largest prompt table of one request.

        Source: cpp/tensorrt_llm/batch_manager/promptTuningBuffers.cpp@2868d79 (max_prompt_embedding_table_size divided
        by max_batch_size).
        """
        return self.multimodal // self.batch


def facts_from_engine(folder: Path) -> EngineFacts:
    """Read the config.json of an engine folder.

    Source of its names: tensorrt_llm/builder.py (EngineConfig, BuildConfig) and models/modeling_utils.py
    (PretrainedConfig), 0.12.0.dev2024080600 and 0.16.0.dev2024121000.

    Raises:
        BundleError: it is missing, does not parse, or is of no decoder that can run here.
    """
    path = folder / ENGINE_CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        return _facts(config)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BundleError(
            f"'{path}' does not describe a TensorRT-LLM engine: {type(error).__name__}: {error}",
            hint="Make it again: holov-export compile BUNDLE --decoder trtllm --checkpoint DIR",
        ) from error


def _facts(config: dict[str, Any]) -> EngineFacts:
    model, build = config["pretrained_config"], config["build_config"]
    heads, width = int(model["num_attention_heads"]), int(model["hidden_size"])
    head = int(model.get("head_size") or width // heads)
    dtype = str(model["dtype"])
    if dtype not in ENGINE_TYPES:
        raise ValueError(f"its dtype is '{dtype}'")
    sequence = int(build["max_seq_len"])
    return EngineFacts(
        version=str(config.get("version", "unknown")),
        dtype=dtype,
        width=width,
        vocab_size=int(model["vocab_size"]),
        batch=int(build["max_batch_size"]),
        input=int(build["max_input_len"]),
        sequence=sequence,
        step=int(build.get("max_num_tokens") or sequence),
        multimodal=int(build.get("max_prompt_embedding_table_size") or 0),
        world=int((model.get("mapping") or {}).get("world_size") or 1),
        reuse=bool((build.get("plugin_config") or {}).get("use_paged_context_fmha")),
        mrope=model.get("position_embedding_type") == "mrope",
        positions=int(model.get("max_position_embeddings") or sequence),
        rotary_width=int(model.get("rotary_embedding_dim") or head),
        rotary_base=float(model.get("rotary_base") or 10000.0),
    )


def check_engine(facts: EngineFacts, spec: DecoderSpec) -> None:
    """Refuse an engine of another language model.

    Raises:
        BundleError: width or vocabulary differ, or it takes no visual rows.
        UnsupportedModelError: positions of three numbers that the engine does not take, or the other way round.
    """
    if (facts.width, facts.vocab_size) != (spec.width, spec.vocab_size):
        raise BundleError(
            f"the engine is of another model: width {facts.width} and {facts.vocab_size} words, the bundle's has "
            f"{spec.width} and {spec.vocab_size}."
        )
    if facts.rows < 1:
        raise BundleError(
            "the engine takes no visual rows: it was built without --max_multimodal_len.",
            hint="Make it again: holov-export compile BUNDLE --decoder trtllm --checkpoint DIR",
        )
    if facts.mrope != bool(spec.mrope_sections):
        wanted, found = ("three numbers", "one") if spec.mrope_sections else ("one number", "three")
        raise UnsupportedModelError(f"the model's positions are {wanted}, the engine's are {found}.")
    if spec.mrope_sections and 2 * sum(spec.mrope_sections) != facts.rotary_width:
        raise UnsupportedModelError(
            f"the rotary sections {spec.mrope_sections} do not fill the engine's {facts.rotary_width} dimensions."
        )


def check_room(prompt: StitchedPrompt, max_new_tokens: int, facts: EngineFacts) -> None:
    """Refuse a prompt that the engine has no room for: it would fail late, or cut the answer with a mere warning.

    Raises:
        PromptError: names what is too long, and what it may be.
        UsageError: the answer may become too long.
    """
    if len(prompt.rows) > facts.rows:
        raise PromptError(
            f"the prompt has {len(prompt.rows)} visual rows; this engine was built for {facts.rows} a request "
            f"(max_multimodal_len {facts.multimodal} for {facts.batch} requests).",
            hint="Lower the budget, or compile the decoder for a larger one.",
        )
    longest = min(facts.input, facts.step)
    if len(prompt) > longest:
        name = "max_input_len" if facts.input <= facts.step else "max_num_tokens"
        raise PromptError(
            f"the prompt has {len(prompt)} tokens; this engine was built for {longest} ({name}).",
            hint="Shorten it or lower the budget, or compile the decoder for longer prompts.",
        )
    if len(prompt) + max_new_tokens > facts.sequence:
        raise UsageError(
            f"the prompt has {len(prompt)} tokens and the answer may have {max_new_tokens}; this engine was built for "
            f"{facts.sequence} together (max_seq_len).",
            hint=f"Lower max_new_tokens to at most {facts.sequence - len(prompt)}."
            if len(prompt) < facts.sequence
            else "Shorten the prompt.",
        )


def engine_ids(prompt: StitchedPrompt, vocab_size: int) -> list[int]:
    """[S]: the ids of the prompt, where the i-th placeholder is vocab_size + i."""
    places = prompt.input_ids == prompt.image_token_id
    ids = prompt.input_ids.copy()
    ids[places] = vocab_size + np.arange(int(np.count_nonzero(places)))
    return [int(number) for number in ids]


def extra_ids(prompt: StitchedPrompt) -> list[int]:
    """[S]: 0 for words, for each visual row a number that its whole image determines: rows, order and positions.

    Two images have the same number only if they look the same to the language model, so that keys and values may be
    used again between prompts. The numbers are below 2**63 and never 0.

    Source: cpp/include/tensorrt_llm/runtime/common.h (TokenExtraIdType is uint64); a word's number is 0 (llmRequest.h).
    """
    places = np.flatnonzero(prompt.input_ids == prompt.image_token_id)
    numbers = np.zeros(len(prompt), dtype=np.int64)
    start = 0
    for count in prompt.counts:
        own = places[start : start + count]
        rows = np.ascontiguousarray(prompt.rows[start : start + count])
        digest = hashlib.sha256(f"{rows.dtype} {rows.shape}".encode())
        digest.update(rows.tobytes())
        if prompt.position_ids is not None and count:
            # to the word behind it: where that goes on depends on the image's whole grid
            near = prompt.position_ids[:, own[0] : own[-1] + 2]
            digest.update(np.ascontiguousarray(near - near[:, :1]).tobytes())
        numbers[own] = (int.from_bytes(digest.digest()[:8], "little") >> 1) or 1
        start += count
    return [int(number) for number in numbers]


def rotary_table(prompt: StitchedPrompt, facts: EngineFacts, sections: tuple[int, ...]) -> npt.NDArray[np.float32]:
    """float32 [positions * rotary_width]: cosine and sine of every rotary frequency for every place of the sequence.

    Place s holds the angles of token s by its own time, height and width: the frequencies of the first section turn by
    time, then height, then width. (cosine, sine) lie side by side, 0 <= s < S; places behind the prompt hold angle 0
    and are not read. An engine looks a prompt's table up by place, so kept rows have the positions of the unpruned
    prompt, whatever they are.

    Source: multimodal_model_runner.py (setup_fake_prompts_qwen2vl); functional.py
    (create_sinusoidal_positions_for_attention_plugin); builder.py (mrope_rotary_sin_cos_size);
    unfusedAttentionKernels_2_template.h (rotary_position), 0.16.0.dev2024121000.
    """
    if prompt.position_ids is None:
        raise PromptError("this engine needs the position of every token, and the prompt has none.")
    half = facts.rotary_width // 2
    if len(prompt) > facts.positions:
        raise PromptError(f"the prompt has {len(prompt)} tokens, the engine's rotary table {facts.positions} places.")
    powers = np.arange(0, facts.rotary_width, 2) / facts.rotary_width
    frequencies = (1.0 / facts.rotary_base**powers).astype(np.float32)
    axis = np.repeat(np.arange(len(sections)), sections)
    angles = prompt.position_ids.astype(np.float32)[axis].T * frequencies
    table = np.zeros((facts.positions, half, 2), dtype=np.float32)
    table[..., 0] = 1.0
    table[: len(prompt), :, 0] = np.cos(angles)
    table[: len(prompt), :, 1] = np.sin(angles)
    return table.reshape(-1)


def position_delta(prompt: StitchedPrompt) -> int:
    """What an engine adds to a new token's place in the sequence to get its position.

    Negative where a picture's tokens share positions, positive where more were pruned than that saves.

    Source: decoderMaskedMultiheadAttentionTemplate.h (mrope_position_deltas), 0.16.0.dev2024121000.
    """
    if prompt.next_position is None:
        raise PromptError("this engine needs the position of the first new token, and the prompt has none.")
    return prompt.next_position - len(prompt)
