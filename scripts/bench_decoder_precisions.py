#!/usr/bin/env python3
"""Precisions of the embedded decoder, side by side: size, speed, and how far they are from float32.

    scripts/bench_decoder_precisions BUNDLE --json benchmarks/results/decoder-precisions-cpu.json

Two language models: the trained one of the demo bundle BUNDLE, asked about its scenes, and a LLaMA of 100 million
random weights, whose sizes all differ, with random visual rows. All decoders of a model are loaded at once and take
turns: tokens per second of process CPU time, on one thread, medians of interleaved rounds, each divided by float32's
of the same round.

"int8 KV" stores keys and values in 8 bits, with scales from answers about the photographs of smoke-8, or for the random
model from other random prompts. Logits are those of ONNX Runtime over whole prompts, every position, against float32's
graph; tokens are greedy ones of ONNX Runtime GenAI. Random weights answer from near ties: there the logits tell more
than the tokens do.
"""

from __future__ import annotations

import argparse
import gc
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"

import numpy as np
import onnxruntime
import torch
from machine import one_line, write_result
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM

from holov_export import Session
from holov_export.assets import data_folder
from holov_export.bundle import open_bundle
from holov_export.export.decoder_onnx import decoder_from_checkpoint
from holov_export.pipeline import checkpoint_of
from holov_export.quantize.decoder_cache import NEW_TOKENS, QUESTION, write_scales
from holov_export.recipes import pictures_of, recipe_from_name
from holov_export.runtime.decoder_genai import GenaiDecoder
from holov_export.runtime.decoder_ort import OrtDecoder
from holov_export.runtime.preprocess import ImageSource
from holov_export.spec import DecoderPrecision, DecoderSpec, Int4Settings
from holov_export.tensors import FloatArray, SamplingSettings, StitchedPrompt

QUESTIONS = ("how many digits are there?", "which digit is at the bottom?", "is there a seven?",
             "what is left of the red digit?")  # fmt: skip
BUDGETS = (1, 16, 144)
ROWS = (0, 64, 192, 576)
SPEED_ROWS = {"demo": 144, "random-100m": 192}
SIXTEEN = "fp16"
FULL = "fp32"


@dataclass(frozen=True)
class Way:
    """One way to build a decoder."""

    name: str
    precision: DecoderPrecision
    int4: Int4Settings | None = None
    cache: bool = False


def _int4(name: str, **settings: Any) -> Way:
    return Way(f"int4 {name}", DecoderPrecision.INT4, Int4Settings(**settings))


WAYS = (
    Way(FULL, DecoderPrecision.FP32),
    Way(SIXTEEN, DecoderPrecision.FP16),
    _int4("rtn 32", algorithm="rtn"),
    _int4("rtn 32, float32 activations", algorithm="rtn", accuracy_level=1),
    _int4("rtn 128", algorithm="rtn", block_size=128),
    _int4("k_quant 32", algorithm="k_quant"),
    _int4("k_quant_last 32", algorithm="k_quant_last"),
    _int4("k_quant_mixed 32", algorithm="k_quant_mixed"),
    Way("fp32, int8 KV", DecoderPrecision.FP32, cache=True),
    Way("fp16, int8 KV", DecoderPrecision.FP16, cache=True),
    Way("int4 rtn 32, int8 KV", DecoderPrecision.INT4, Int4Settings(), cache=True),
)


@dataclass(frozen=True)
class Result:
    """One decoder of one model.

    Attributes:
        megabytes: of model.onnx and its data. build_seconds: of the builder.
        tokens_per_second: of process CPU time, while decoding. of_fp32: the median ratio to float32's in its round.
        prefill_ms: process CPU time to the first token, with `SPEED_ROWS` visual rows. prefill_of_fp32: as above.
        first_same, identical, tokens_same: prompts whose first token, whose whole answer is float32's; share of all
            tokens that are the same up to the first other one.
        top_same: share of positions with float32's most likely token.
        logit_error: root mean square of the difference to float32's, in standard deviations of those.
    """

    model: str
    way: str
    megabytes: float
    build_seconds: float
    tokens_per_second: float
    of_fp32: float
    prefill_ms: float
    prefill_of_fp32: float
    prompts: int
    first_same: int
    identical: int
    tokens_same: float
    top_same: float
    logit_error: float


class Recorder:
    """A decoder that keeps the prompts it is asked and answers nothing."""

    name, lanes = "recorder", 1

    def __init__(self) -> None:
        self.prompts: list[StitchedPrompt] = []

    def stream(self, prompt: StitchedPrompt, sampling: SamplingSettings) -> Iterator[int]:
        self.prompts.append(prompt)
        return iter(())

    def close(self) -> None: ...


def prompts_about(
    bundle: Path, pictures: Sequence[ImageSource], questions: Sequence[str], budgets: Sequence[int]
) -> list[StitchedPrompt]:
    """Every question about every picture at every budget."""
    recorder = Recorder()
    with Session.open(bundle, decoder=recorder, provider="cpu", threads=1) as session:
        for picture in pictures:
            for question in questions:
                for budget in budgets:
                    session.ask(picture, question, budget=budget)
    return recorder.prompts


def scales_from_prompts(folder: Path, spec: DecoderSpec, prompts: Sequence[StitchedPrompt], path: Path) -> None:
    """Scales for 8-bit keys and values, from what a float32 decoder stores of these prompts and its answers."""
    decoder = OrtDecoder(folder, spec, provider="cpu", threads=1)
    found = [decoder.largest_stored(prompt, SamplingSettings(max_new_tokens=NEW_TOKENS)) for prompt in prompts]
    decoder.close()
    keys, values = (np.max([pair[side] for pair in found], axis=0).tolist() for side in (0, 1))
    write_scales(path, keys, values)


def random_prompt(spec: DecoderSpec, count: int, seed: int) -> StitchedPrompt:
    """Words around so many random rows, as large as the words' embeddings are."""
    dice = np.random.default_rng(1000 * seed + count)
    rows = (dice.standard_normal((count, spec.width)) * 0.02).astype(np.float32)
    words = dice.integers(10, spec.vocab_size, size=12)
    ids = [1, *words[:4], *[spec.image_token_id] * count, *words[4:]]
    return StitchedPrompt(np.array(ids, np.int64), rows, (count,) if count else (), spec.image_token_id, "")


def random_checkpoint(folder: Path, tokenizer: Path) -> DecoderSpec:
    """A LLaMA of 100 million random weights in float32; its sizes all differ, and the head is not as wide as any."""
    config = LlamaConfig(
        hidden_size=832,
        intermediate_size=2240,
        num_hidden_layers=12,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=64,
        vocab_size=8000,
        max_position_embeddings=1024,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).eval().save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tokenizer / name, folder / name)
    return DecoderSpec(
        architecture="llama",
        width=832,
        layers=12,
        heads=8,
        kv_heads=4,
        head_width=64,
        mlp_width=2240,
        vocab_size=8000,
        context=1024,
        image_token_id=4,
        bos_token_id=1,
        eos_token_ids=(),
        pad_token_id=3,
    )


def logits_of(folder: Path, spec: DecoderSpec, prompts: Sequence[StitchedPrompt]) -> list[FloatArray]:
    """float32 [S, V] of each prompt, by the graphs alone."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    model, embedding, cast = (
        onnxruntime.InferenceSession(str(folder / name), options, providers=["CPUExecutionProvider"])
        for name in ("model.onnx", "embedding.onnx", "vision.onnx")
    )
    types = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int8)": np.int8}
    empty = {
        item.name: np.zeros((1, spec.kv_heads, 0, spec.head_width), types[item.type])
        for item in model.get_inputs()
        if item.name.startswith("past_key_values.")
    }
    found = []
    for prompt in prompts:
        rows = np.ascontiguousarray(prompt.rows, np.float32).reshape(-1, spec.width)
        features = cast.run(None, {"pixel_values": rows})[0]
        embeds = embedding.run(None, {"input_ids": prompt.input_ids[None], "image_features": features})[0]
        mask = np.ones((1, len(prompt)), np.int64)
        out = model.run(["logits"], {"inputs_embeds": embeds, "attention_mask": mask, **empty})[0]
        found.append(out[0].astype(np.float32))
    return found


def timed(decoder: GenaiDecoder, prompt: StitchedPrompt, tokens: int) -> tuple[float, float]:
    """(seconds to the first token, tokens per second after it), of process CPU time."""
    began = time.process_time()
    stream = decoder.stream(prompt, SamplingSettings(max_new_tokens=tokens))
    next(stream)
    first = time.process_time()
    made = sum(1 for _ in stream)
    return first - began, made / (time.process_time() - first)


def speeds(
    decoders: dict[str, GenaiDecoder], prompt: StitchedPrompt, rounds: int, tokens: int
) -> dict[str, tuple[float, float, float, float]]:
    """(tokens per second, of float32's, prefill ms, of float32's) of each decoder: medians of rounds in turn."""
    seen: dict[str, list[tuple[float, float]]] = {name: [] for name in decoders}
    for number in range(rounds + 1):
        for name, decoder in decoders.items():
            pair = timed(decoder, prompt, tokens)
            if number:  # the first round warms up
                seen[name].append(pair)
    full = seen[FULL]
    return {
        name: (
            statistics.median(rate for _, rate in pairs),
            statistics.median(rate / other for (_, rate), (_, other) in zip(pairs, full, strict=True)),
            1000 * statistics.median(prefill for prefill, _ in pairs),
            statistics.median(prefill / other for (prefill, _), (other, _) in zip(pairs, full, strict=True)),
        )
        for name, pairs in seen.items()
    }


def same_beginning(found: Sequence[int], wanted: Sequence[int]) -> int:
    """How many tokens are the same up to the first other one."""
    for place, (left, right) in enumerate(zip(found, wanted, strict=False)):
        if left != right:
            return place
    return min(len(found), len(wanted))


def measured(
    model: str,
    checkpoint: Path,
    spec: DecoderSpec,
    prompts: Sequence[StitchedPrompt],
    others: Sequence[StitchedPrompt],
    work: Path,
    args: Any,
) -> list[Result]:
    """All ways for one language model; `others` are the prompts that scales come from."""
    built: dict[str, float] = {}
    scales = work / "scales.json"
    for way in WAYS:
        began = time.perf_counter()
        decoder_from_checkpoint(
            checkpoint,
            work / way.name,
            spec,
            way.precision,
            int4=way.int4,
            cache_scales=scales if way.cache else None,
        )
        built[way.name] = time.perf_counter() - began
        if way.name == FULL:
            scales_from_prompts(work / FULL, spec, others, scales)
    longest = next(prompt for prompt in prompts if len(prompt.rows) == SPEED_ROWS[model])
    endless = spec.model_copy(update={"eos_token_ids": ()})
    decoders = {way.name: GenaiDecoder(work / way.name, endless, provider="cpu", threads=1) for way in WAYS}
    fast = speeds(decoders, longest, args.rounds, args.tokens)
    for decoder in decoders.values():
        decoder.close()
    del decoders
    gc.collect()
    exact = logits_of(work / FULL, spec, prompts)
    wanted = answers(work / FULL, spec, prompts, args.answer)
    results = []
    for way in WAYS:
        found, logits = answers(work / way.name, spec, prompts, args.answer), logits_of(work / way.name, spec, prompts)
        pairs = list(zip(logits, exact, strict=True))
        deviation = float(np.concatenate([row.ravel() for row in exact]).std())
        error = float(np.sqrt(np.mean(np.concatenate([(left - right).ravel() ** 2 for left, right in pairs]))))
        size = sum((work / way.name / name).stat().st_size for name in ("model.onnx", "model.onnx.data"))
        results.append(
            Result(
                model,
                way.name,
                round(size / 1e6, 2),
                round(built[way.name], 1),
                *(round(number, 3) for number in fast[way.name]),
                prompts=len(prompts),
                first_same=sum(left[:1] == right[:1] for left, right in zip(found, wanted, strict=True)),
                identical=sum(left == right for left, right in zip(found, wanted, strict=True)),
                tokens_same=round(
                    sum(same_beginning(left, right) for left, right in zip(found, wanted, strict=True))
                    / max(sum(map(len, wanted)), 1),
                    4,
                ),
                top_same=round(
                    float(np.mean(np.concatenate([left.argmax(-1) == right.argmax(-1) for left, right in pairs]))), 4
                ),
                logit_error=round(error / deviation, 4),
            )
        )
    return results


def answers(folder: Path, spec: DecoderSpec, prompts: Sequence[StitchedPrompt], tokens: int) -> list[list[int]]:
    """Greedy tokens of each prompt."""
    decoder = GenaiDecoder(folder, spec, provider="cpu", threads=1)
    found = [list(decoder.stream(prompt, SamplingSettings(max_new_tokens=tokens))) for prompt in prompts]
    decoder.close()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("bundle", type=Path, help="a bundle of the demo model")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=48, help="timed in each round")
    parser.add_argument("--answer", type=int, default=24, help="longest answer that is compared")
    parser.add_argument("--work", type=Path, help="folder for the decoders [default: a temporary one]")
    parser.add_argument("--json", type=Path, help="write the result there")
    args = parser.parse_args()
    torch.set_num_threads(1)
    results: list[Result] = []
    with tempfile.TemporaryDirectory(dir=args.work) as scratch:
        work = Path(scratch)
        opened = open_bundle(args.bundle)
        spec, checkpoint = opened.manifest.plan.model.decoder, checkpoint_of(opened, None)
        if checkpoint is None:
            raise SystemExit("the weights of this bundle are not found: it is not the demo model's")
        scenes = sorted(data_folder("demo-scenes").glob("*.png"))
        prompts = prompts_about(args.bundle, scenes, QUESTIONS, BUDGETS)
        photographs = [picture.image() for picture in pictures_of(recipe_from_name("smoke-8"), None).calibrate]
        others = prompts_about(args.bundle, photographs, [QUESTION], BUDGETS[1:])
        results += measured("demo", checkpoint, spec, prompts, others, work / "demo", args)
        spec = random_checkpoint(work / "random", checkpoint)
        prompts = [random_prompt(spec, count, seed) for seed in range(2) for count in ROWS]
        others = [random_prompt(spec, count, seed) for seed in range(2, 6) for count in ROWS]
        results += measured("random-100m", work / "random", spec, prompts, others, work / "random-decoders", args)
    show(results)
    if args.json:
        note = "one thread; tokens/s and prefill are of process CPU time"
        write_result(args.json, {"note": note, "results": [asdict(item) for item in results]})


def show(results: Sequence[Result]) -> None:
    console = Console(width=150)
    console.print(one_line())
    for model in dict.fromkeys(item.model for item in results):
        rows = [item for item in results if item.model == model]
        table = Table(title=f"{model}, {rows[0].prompts} prompts, {SPEED_ROWS[model]} visual rows where timed")
        for name in ("decoder", "MB", "tokens/s", "of fp32", "prefill ms", "of fp32", "first", "identical", "tokens",
                     "top-1", "logit error"):  # fmt: skip
            table.add_column(name, justify="left" if name == "decoder" else "right")
        for item in rows:
            table.add_row(
                item.way,
                f"{item.megabytes:.1f}",
                f"{item.tokens_per_second:.1f}",
                f"{item.of_fp32:.2f}",
                f"{item.prefill_ms:.1f}",
                f"{item.prefill_of_fp32:.2f}",
                f"{item.first_same}/{item.prompts}",
                f"{item.identical}/{item.prompts}",
                f"{100 * item.tokens_same:.1f} %",
                f"{100 * item.top_same:.1f} %",
                f"{item.logit_error:.4f}",
            )
        console.print(table)


if __name__ == "__main__":
    main()
