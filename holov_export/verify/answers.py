"""The decoder of a bundle against transformers: the same prompts, greedily, token by token.

ONNX Runtime GenAI's builder can write a wrong graph without a word, so an embedded decoder is asked before it is
trusted.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from holov_export.bundle import Bundle
from holov_export.export.decoder_weights import EMBEDDING, StoredTensor, array_from_tensor, language_tensors
from holov_export.extras import is_installed
from holov_export.runtime.decoder import Decoder
from holov_export.runtime.decoder_genai import GenaiDecoder
from holov_export.runtime.decoder_hf import HfDecoder
from holov_export.runtime.stitch import PromptEncoder, prompt_encoder_from_tokenizer, stitch
from holov_export.spec import DecoderPrecision
from holov_export.tensors import FloatArray, SamplingSettings, StitchedPrompt
from holov_export.verify.parity import DecoderComparison

#: a larger language model is not compared: transformers holds it in float32, twice its size on disk or more
LIMIT_BYTES = 3_000_000_000
_QUESTIONS = (("what is shown?", 1), ("how many are there, and which is red?", 2), ("what is a picture?", 0))
_ROWS = 16
_SAMPLED_WORDS = 4096
_NEEDED = ("torch", "transformers", "safetensors", "onnxruntime", "onnxruntime_genai", "tokenizers", "jinja2")


def compare_decoder(
    bundle: Bundle,
    checkpoint: Path,
    *,
    prompts: Sequence[StitchedPrompt] | None = None,
    new_tokens: int = 8,
    limit_bytes: int = LIMIT_BYTES,
) -> tuple[DecoderComparison | None, str]:
    """Let the bundle's GenAI decoder and transformers continue the same prompts on the CPU.

    They run one after the other, so the larger decides the peak memory.

    Args:
        bundle: with an embedded decoder.
        checkpoint: directory of the weights that it was built from.
        prompts: None for two with random visual rows and one of text alone; see `default_prompts`.
        new_tokens: greedy tokens for each prompt; fewer where an answer ends.
        limit_bytes: a language model that takes more on disk is not compared.

    Returns:
        (comparison, ""), or (None, why nothing was compared).

    Raises:
        CheckpointError: the checkpoint is damaged or does not load.
        EnvironmentFaultError: GenAI cannot load or run the decoder.
    """
    reason = _obstacle(bundle)
    if reason:
        return None, reason
    tensors = language_tensors(checkpoint)
    stored = sum(tensor.end - tensor.begin for tensor in tensors.values())
    if stored > limit_bytes:
        return None, f"the language model takes {stored / 1e9:.3g} GB, the limit is {limit_bytes / 1e9:.3g} GB"
    if prompts is None:
        prompts = default_prompts(bundle, tensors[EMBEDDING], new_tokens)
    spec = bundle.manifest.plan.model.decoder
    # neither is told the end tokens: an answer that is empty on both sides would agree about nothing
    endless = spec.model_copy(update={"eos_token_ids": ()})
    assert bundle.decoder is not None
    ours = _answers(GenaiDecoder(bundle.decoder, endless, provider="cpu"), prompts, new_tokens)
    gc.collect()
    theirs = _answers(HfDecoder(checkpoint, endless, provider="cpu"), prompts, new_tokens)
    gc.collect()
    pairs = [
        (_to_end(left, spec.eos_token_ids), _to_end(right, spec.eos_token_ids))
        for left, right in zip(ours, theirs, strict=True)
    ]
    precision = bundle.manifest.plan.decoder
    assert precision is not None
    return _judged(precision, pairs, new_tokens), ""


def _obstacle(bundle: Bundle) -> str:
    """Why this bundle's decoder cannot be compared on this machine; empty if it can."""
    plan = bundle.manifest.plan
    if plan.decoder is None:
        return "the bundle has no decoder"
    if plan.decoder is DecoderPrecision.BF16:
        return "ONNX Runtime's CPU provider cannot run a bf16 decoder"
    if plan.decoder_provider != "cpu" and plan.decoder is not DecoderPrecision.FP16:
        return f"the decoder was built for {plan.decoder_provider}"
    missing = [name for name in _NEEDED if not is_installed(name)]
    return f"not installed: {', '.join(missing)}" if missing else ""


def default_prompts(bundle: Bundle, table: StoredTensor, new_tokens: int) -> tuple[StitchedPrompt, ...]:
    """A prompt about one picture, one about two, and one of text alone, in the model's own words.

    The pictures are seeded random rows with the standard deviation of the embedding table.
    """
    encoder = prompt_encoder_from_tokenizer(bundle.tokenizer, bundle.manifest.plan.model)
    rows = min(_ROWS, bundle.manifest.plan.model.vision.tokens)
    pictures = _random_rows(table, rows)
    return tuple(
        _prompt(encoder, question, [next(pictures) for _ in range(images)], new_tokens)
        for question, images in _QUESTIONS
    )


def _prompt(encoder: PromptEncoder, question: str, rows: list[FloatArray], new_tokens: int) -> StitchedPrompt:
    text = encoder.text_from_question(question, images=len(rows))
    return stitch(encoder, text, rows, max_new_tokens=new_tokens)


def _random_rows(table: StoredTensor, rows: int) -> Iterator[FloatArray]:
    values = array_from_tensor(table)
    values = values[:: max(1, len(values) // _SAMPLED_WORDS)]
    if table.dtype == "BF16":  # the upper half of a float32
        values = (values.astype(np.uint32) << 16).view(np.float32)
    deviation = float(values.astype(np.float64).std())
    dice = np.random.default_rng(0)
    while True:
        yield (dice.standard_normal((rows, table.shape[1])) * deviation).astype(np.float32)


def _answers(decoder: Decoder, prompts: Sequence[StitchedPrompt], new_tokens: int) -> list[list[int]]:
    """The greedy tokens of each prompt. Closes the decoder."""
    sampling = SamplingSettings(max_new_tokens=new_tokens)
    try:
        return [list(decoder.stream(prompt, sampling)) for prompt in prompts]
    finally:
        decoder.close()


def _to_end(tokens: list[int], ends: Sequence[int]) -> list[int]:
    """The tokens up to the first end token, which stays: GenAI stops at the one in its own configuration."""
    for index, token in enumerate(tokens):
        if token in ends:
            return tokens[: index + 1]
    return tokens


def _judged(
    precision: DecoderPrecision, pairs: Sequence[tuple[list[int], list[int]]], new_tokens: int
) -> DecoderComparison:
    identical = sum(left == right for left, right in pairs)
    first = sum(left[:1] == right[:1] for left, right in pairs)
    agreeing = {DecoderPrecision.FP32: identical, DecoderPrecision.FP16: first}
    return DecoderComparison(
        precision=precision,
        prompts=len(pairs),
        new_tokens=new_tokens,
        identical=identical,
        first_token_same=first,
        passed=bool(pairs) and agreeing.get(precision, len(pairs)) == len(pairs),
    )
