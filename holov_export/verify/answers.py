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
from holov_export.runtime.decoder_choice import embedded_decoder
from holov_export.runtime.decoder_genai import GenaiDecoder
from holov_export.runtime.decoder_hf import HfDecoder
from holov_export.runtime.decoder_ort import OrtDecoder
from holov_export.runtime.stitch import PromptEncoder, prompt_encoder_from_tokenizer, stitch
from holov_export.spec import CacheType, DecoderPrecision, DecoderSpec
from holov_export.tensors import CropBox, FloatArray, ImageLayout, ImageRows, Region, SamplingSettings, StitchedPrompt
from holov_export.verify.parity import DecoderComparison

#: a larger language model is not compared: transformers holds it in float32, twice its size on disk or more
LIMIT_BYTES = 3_000_000_000
#: question, images, videos
_QUESTIONS = (
    ("what is shown?", 1, 0),
    ("how many are there, and which is red?", 2, 0),
    ("what is a picture?", 0, 0),
    ("what happens?", 0, 1),
)
_ROWS = 16
#: of the pictures and clips that the prompts are about: (rows, columns) of tokens, frames, seconds between them
_GRID, _FRAMES, _SECONDS = (5, 9), 3, 1.0
_SAMPLED_WORDS = 4096
_NEEDED = ("torch", "transformers", "safetensors", "onnxruntime", "tokenizers", "jinja2")


def compare_decoder(
    bundle: Bundle,
    checkpoint: Path,
    *,
    prompts: Sequence[StitchedPrompt] | None = None,
    new_tokens: int = 8,
    limit_bytes: int = LIMIT_BYTES,
) -> tuple[DecoderComparison | None, str]:
    """Let the bundle's decoder and transformers continue the same prompts on the CPU.

    The back end is the one that the bundle opens by itself: GenAI, or plain ONNX Runtime where GenAI would be wrong.
    They run one after the other, so the larger decides the peak memory.

    Args:
        bundle: with an embedded decoder.
        checkpoint: directory of the weights that it was built from.
        prompts: None for some with random visual rows and one of text alone; see `default_prompts`.
        new_tokens: greedy tokens for each prompt; fewer where an answer ends.
        limit_bytes: a language model that takes more on disk is not compared.

    Returns:
        (comparison, ""), or (None, why nothing was compared).

    Raises:
        CheckpointError: the checkpoint is damaged or does not load.
        EnvironmentFaultError: the back end cannot load or run the decoder.
    """
    reason = _obstacle(bundle)
    if reason:
        return None, reason
    reason = too_large(checkpoint, limit_bytes)
    if reason:
        return None, reason
    if prompts is None:
        prompts = default_prompts(bundle, language_tensors(checkpoint)[EMBEDDING], new_tokens)
    spec = bundle.manifest.plan.model.decoder
    # neither is told the end tokens: an answer that is empty on both sides would agree about nothing
    endless = spec.model_copy(update={"eos_token_ids": ()})
    assert bundle.decoder is not None
    ours = _answers(_embedded(bundle.decoder, endless), prompts, new_tokens)
    gc.collect()
    theirs = _answers(HfDecoder(checkpoint, endless, provider="cpu"), prompts, new_tokens)
    gc.collect()
    pairs = [
        (_to_end(left, spec.eos_token_ids), _to_end(right, spec.eos_token_ids))
        for left, right in zip(ours, theirs, strict=True)
    ]
    precision = bundle.manifest.plan.decoder
    assert precision is not None
    return _judged(precision, pairs, new_tokens, kv_cache=bundle.manifest.plan.decoder_kv_cache), ""


def too_large(checkpoint: Path, limit_bytes: int = LIMIT_BYTES) -> str:
    """Why a checkpoint's language model is not held twice; "" if it may be.

    Raises:
        CheckpointError: the checkpoint is damaged.
    """
    stored = sum(tensor.end - tensor.begin for tensor in language_tensors(checkpoint).values())
    if stored <= limit_bytes:
        return ""
    return f"the language model takes {stored / 1e9:.3g} GB, the limit is {limit_bytes / 1e9:.3g} GB"


def _embedded(folder: Path, spec: DecoderSpec) -> Decoder:
    back_end = OrtDecoder if embedded_decoder("auto", spec) == "ort" else GenaiDecoder
    return back_end(folder, spec, provider="cpu")


def _obstacle(bundle: Bundle) -> str:
    """Why this bundle's decoder cannot be compared on this machine; empty if it can."""
    plan = bundle.manifest.plan
    if plan.decoder is None:
        return "the bundle has no decoder"
    if plan.decoder is DecoderPrecision.BF16:
        return "ONNX Runtime's CPU provider cannot run a bf16 decoder"
    if plan.decoder_provider != "cpu" and plan.decoder is not DecoderPrecision.FP16:
        return f"the decoder was built for {plan.decoder_provider}"
    needed = [*_NEEDED, *(["onnxruntime_genai"] if embedded_decoder("auto", plan.model.decoder) == "genai" else [])]
    missing = [name for name in needed if not is_installed(name)]
    return f"not installed: {', '.join(missing)}" if missing else ""


def default_prompts(bundle: Bundle, table: StoredTensor, new_tokens: int) -> tuple[StitchedPrompt, ...]:
    """A prompt about one picture, one about two, one of text alone and, if the model takes videos, one about a clip.

    They are in the model's own words. What is seen are seeded random rows with the standard deviation of the embedding
    table, at random places of an oblong picture.
    """
    model = bundle.manifest.plan.model
    encoder = prompt_encoder_from_tokenizer(bundle.tokenizer, model)
    pictures = _random_rows(table, min(_ROWS, model.image_tokens))
    return tuple(
        _prompt(encoder, question, pictures, (images, videos), new_tokens)
        for question, images, videos in _QUESTIONS
        if not videos or model.video.kind != "none"
    )


def _prompt(
    encoder: PromptEncoder, question: str, rows: Iterator[FloatArray], number: tuple[int, int], new_tokens: int
) -> StitchedPrompt:
    images, videos = number
    text = encoder.text_from_question(question, images=images, videos=videos)
    return stitch(
        encoder,
        text,
        [_placed(next(rows), _layout(1)) for _ in range(images)],
        [_placed(next(rows), _layout(_FRAMES)) for _ in range(videos)],
        max_new_tokens=new_tokens,
    )


def _placed(rows: FloatArray, layout: ImageLayout) -> ImageRows:
    """Rows at some of the layout's tokens, in the order of the picture."""
    kept = np.random.default_rng(len(rows)).choice(layout.tokens, len(rows), replace=False)
    return ImageRows(rows, np.sort(kept).astype(np.int64), layout)


def _layout(frames: int) -> ImageLayout:
    """A picture, or a clip of several frames, with more tokens than the prompts have rows."""
    box = CropBox(0.0, 0.0, 1.0, 1.0)
    regions = tuple(Region(_GRID, box, frame=frame, seconds=_SECONDS if frame else 0.0) for frame in range(frames))
    tokens = sum(region.tokens for region in regions)
    return ImageLayout(
        kind="image" if frames == 1 else "video",
        rows=tokens,
        tower_rows=tokens,
        source=np.arange(tokens, dtype=np.int64),
        regions=regions,
        places=np.zeros((0, 2), dtype=np.int64),
        windows=np.zeros(0, dtype=np.int64),
    )


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
    precision: DecoderPrecision,
    pairs: Sequence[tuple[list[int], list[int]]],
    new_tokens: int,
    kv_cache: CacheType = "float",
) -> DecoderComparison:
    identical = sum(left == right for left, right in pairs)
    first = sum(left[:1] == right[:1] for left, right in pairs)
    judged = {DecoderPrecision.FP32: identical, DecoderPrecision.FP16: first}
    agreeing = judged if kv_cache == "float" else {}
    return DecoderComparison(
        precision=precision,
        kv_cache=kv_cache,
        prompts=len(pairs),
        new_tokens=new_tokens,
        identical=identical,
        first_token_same=first,
        passed=bool(pairs) and agreeing.get(precision, len(pairs)) == len(pairs),
    )
