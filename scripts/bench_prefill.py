#!/usr/bin/env python3
"""Time to the first token of the embedded decoder at 576, 192 and 64 visual tokens.

A random LLaMA (12 layers, width 512) is written as a LLaVA checkpoint, built with ONNX Runtime GenAI as a bundle's
decoder is, and asked with a prompt of 20 words around the visual rows, as many as a short question has in LLaVA's
template. Rounds are interleaved; medians are printed.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import sys
import tempfile
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from machine import one_line, write_result
from rich.console import Console
from rich.table import Table

from holov_export.export.checkpoint import spec_from_checkpoint
from holov_export.export.decoder_onnx import decoder_from_checkpoint
from holov_export.runtime.decoder_genai import GenaiDecoder
from holov_export.spec import DecoderPrecision, DecoderSpec
from holov_export.tensors import SamplingSettings, StitchedPrompt

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from checkpoints import TinyLlava, write_checkpoint


@dataclass
class Samples:
    """Seconds of wall clock and of process CPU time to the first token, and to the last."""

    first: list[float] = field(default_factory=list)
    first_cpu: list[float] = field(default_factory=list)
    last: list[float] = field(default_factory=list)

    def as_row(self) -> dict[str, Any]:
        return {
            "ttft_ms": round(statistics.median(self.first) * 1e3, 2),
            "ttft_cpu_ms": round(statistics.median(self.first_cpu) * 1e3, 2),
            "total_ms": round(statistics.median(self.last) * 1e3, 2),
            "ttft_ms_all": [round(value * 1e3, 2) for value in self.first],
        }


def prompt_of_length(visual: int, words: int, spec: DecoderSpec) -> StitchedPrompt:
    """`words` random words with `visual` random rows in their middle."""
    dice = np.random.default_rng(visual)
    text = dice.integers(10, spec.vocab_size, words).astype(np.int64)
    places = np.full(visual, spec.image_token_id, dtype=np.int64)
    rows = dice.standard_normal((visual, spec.width)).astype(np.float32) * np.float32(0.05)
    ids = np.concatenate([text[: words // 2], places, text[words // 2 :]])
    return StitchedPrompt(ids, rows, (visual,), spec.image_token_id, "")


def ask(decoder: GenaiDecoder, prompt: StitchedPrompt, new_tokens: int, samples: Samples | None) -> None:
    """One answer, timed."""
    start, start_cpu = time.perf_counter(), time.process_time()
    stream = decoder.stream(prompt, SamplingSettings(max_new_tokens=new_tokens))
    next(stream, None)
    first, first_cpu = time.perf_counter(), time.process_time()
    for _ in stream:
        pass
    if samples is not None:
        samples.first.append(first - start)
        samples.first_cpu.append(first_cpu - start_cpu)
        samples.last.append(time.perf_counter() - start)


def measure(
    decoder: GenaiDecoder, prompts: dict[int, StitchedPrompt], repeats: int, new_tokens: int
) -> dict[str, dict[str, Any]]:
    """Interleaved rounds after one warm-up round; the order turns by one every round."""
    counts = list(prompts)
    samples = {count: Samples() for count in counts}
    for round_number in range(repeats + 1):
        turn = round_number % len(counts)
        for count in counts[turn:] + counts[:turn]:
            ask(decoder, prompts[count], new_tokens, samples[count] if round_number else None)
    return {str(count): taken.as_row() for count, taken in samples.items()}


def show(precision: str, rows: dict[str, dict[str, Any]], ratios: dict[str, float], new_tokens: int) -> None:
    """One table on stdout."""
    title = f"decoder {precision}: the prompt's words and the visual tokens, {new_tokens} new tokens"
    table = Table("visual tokens", "TTFT ms (median)", "CPU ms", f"all {new_tokens} tokens ms", "TTFT 576 / this")
    table.title, table.title_justify = title, "left"
    for count, row in rows.items():
        ratio = f"{ratios[count]:.2f}" if count in ratios else ""
        table.add_row(count, f"{row['ttft_ms']:.1f}", f"{row['ttft_cpu_ms']:.1f}", f"{row['total_ms']:.1f}", ratio)
    Console(width=120).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of the decoder (2)")
    parser.add_argument("--repeats", type=int, default=7, help="interleaved rounds (7)")
    parser.add_argument("--layers", type=int, default=12, help="decoder layers (12)")
    parser.add_argument("--width", type=int, default=512, help="decoder width (512)")
    parser.add_argument("--words", type=int, default=20, help="words around the visual tokens (20)")
    parser.add_argument("--new-tokens", type=int, default=16, help="tokens generated (16)")
    parser.add_argument("--counts", type=int, nargs="+", default=[576, 192, 64], help="visual tokens (576 192 64)")
    parser.add_argument("--precisions", nargs="+", default=["fp32", "int4"], help="of the decoder (fp32 int4)")
    parser.add_argument("--json", type=Path, help="write the result here as well")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    print(one_line())
    sizes = TinyLlava(
        width=options.width,
        layers=options.layers,
        heads=options.width // 64,
        kv_heads=options.width // 64,
        mlp=options.width * 11 // 4 // 32 * 32,
        context=1024,
    )
    names = ("threads", "repeats", "layers", "width", "words", "new_tokens")
    result: dict[str, Any] = {name: getattr(options, name) for name in names}
    result |= {"mlp_width": sizes.mlp, "precisions": {}}
    with tempfile.TemporaryDirectory(prefix="bench-prefill-") as work:
        folder = write_checkpoint(Path(work) / "checkpoint", sizes)
        spec = spec_from_checkpoint(folder, "random").decoder
        prompts = {count: prompt_of_length(count, options.words, spec) for count in options.counts}
        for precision in options.precisions:
            out = Path(work) / precision
            decoder_from_checkpoint(folder, out, spec, DecoderPrecision(precision), "cpu")
            decoder = GenaiDecoder(out, spec, provider="cpu", threads=options.threads)
            rows = measure(decoder, prompts, options.repeats, options.new_tokens)
            decoder.close()
            largest = rows[str(max(options.counts))]["ttft_ms"]
            ratios = {count: round(largest / row["ttft_ms"], 3) for count, row in rows.items()}
            show(precision, rows, ratios, options.new_tokens)
            result["precisions"][precision] = {"times": rows, "ttft_ratios": ratios}
    if options.json:
        write_result(options.json, result)


if __name__ == "__main__":
    main()
