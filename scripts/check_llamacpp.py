#!/usr/bin/env python3
"""Compares llama.cpp with transformers, token by token, on small random models.

    scripts/check_llamacpp                makes an environment with llama-cpp-python and runs this file in it

Language models of 3 to 4 layers are written as checkpoints, turned into GGUF files and asked about visual rows that are
random too: none, 1, 64, 192 and 576, two pictures, two pictures side by side, one picture first, answers that are open
at once. 64 tokens of each answer are greedy and must be those of transformers (float32, attention in float32). Models:

    LLaMA          grouped queries, float32 weights
    LLaMA rope     the same with scaled rotary angles: llama3, linear, yarn
    Mistral        another width of heads
    Qwen2.5-VL     positions of three numbers, biases

Other weights round, and llama.cpp rounds activations with them (float16, bfloat16, blocks of 8 bits). Two differences
of the first token's logits are said, in parts of the logits' standard deviation: from transformers with the weights of
the checkpoint, and from transformers with the rounded weights of the GGUF file. The second must stay below `LIMITS`;
the first is what rounding costs, and random weights pay more than trained ones. Random models answer from near ties, so
that tokens need not be equal; how many are is said as well.

At last the demo bundle answers its questions through `Session`: by ONNX Runtime GenAI here, and by llama.cpp in the
Python that --runtime-python names (3.10, as on JetPack 6, has no GenAI for ARM). float32 and float16 must give the same
tokens. That Python needs this package with its extra runtime, onnxruntime and llama-cpp-python only.

Ends with status 1 if a token or a limit is missed.
"""

from __future__ import annotations

import argparse
import importlib
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import numpy as np
from rich.console import Console
from rich.table import Table
from safetensors.numpy import load_file, save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from family_checkpoints import write_family
from layouts import grid_layout

from holov_export.bundle import open_bundle
from holov_export.decoder_files import decoder_folder
from holov_export.export.checkpoint import spec_from_checkpoint
from holov_export.export.decoder_gguf import checked_config, gguf_from_checkpoint, shape_of
from holov_export.export.decoder_weights import language_key, language_tensors
from holov_export.export.gguf_tensors import gguf_tensors
from holov_export.pipeline import checkpoint_of
from holov_export.runtime import decoder_hf, decoder_llamacpp
from holov_export.runtime.decoder import Decoder
from holov_export.runtime.decoder_hf import HfDecoder
from holov_export.runtime.decoder_llamacpp import LlamaCppDecoder
from holov_export.runtime.stitch import PromptEncoder, prompt_encoder_from_tokenizer, stitch
from holov_export.spec import ModelSpec
from holov_export.tensors import FloatArray, ImageRows, SamplingSettings, StitchedPrompt

TOKENS = 64
GREEDY = SamplingSettings(max_new_tokens=TOKENS)
GRID = (24, 24)
COUNTS = (0, 1, 64, 192, 576)
#: largest difference of the first token's logits from those of the same weights, in standard deviations of the logits
LIMITS = {"f32": 1e-3, "f16": 3e-2, "bf16": 2e-1, "q8_0": 0.4, "q4_0": 0.4, "q4_k_m": 0.4}
#: the same where attention is in float16
HALF = 6e-2
#: name -> (family of tests/family_checkpoints.py, its sizes, rotary settings)
MODELS: dict[str, tuple[str, dict[str, object], dict[str, object]]] = {
    "LLaMA": ("llava_next", {"width": 256, "layers": 4, "heads": 8, "kv_heads": 2, "mlp": 768}, {}),
    "LLaMA rope llama3": (
        "llava_next",
        {"width": 256, "heads": 8, "mlp": 512},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 256,
        },
    ),
    "LLaMA rope linear": (
        "llava_next",
        {"width": 256, "heads": 8, "mlp": 512},
        {"rope_type": "linear", "factor": 4.0},
    ),
    "LLaMA rope yarn": (
        "llava_next",
        {"width": 256, "heads": 8, "mlp": 512},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 576},
    ),
    "Mistral": ("llava_next_mistral", {"width": 512, "heads": 8, "kv_heads": 4, "mlp": 1024}, {}),
    "Qwen2.5-VL": (
        "qwen2_5_vl",
        {"width": 256, "heads": 8, "kv_heads": 4, "mlp": 768, "tied": False},
        {},
    ),
}


@dataclass(frozen=True)
class Model:
    """A checkpoint, what it is, and its tokenizer. No token ends an answer."""

    name: str
    checkpoint: Path
    spec: ModelSpec
    encoder: PromptEncoder

    def prompt(self, text: str, counts: Sequence[int], seed: int = 0) -> StitchedPrompt:
        """Random rows at random places of a 24 x 24 grid in the order of the picture."""
        dice = np.random.default_rng(seed)
        images = []
        for count in counts:
            places = np.sort(dice.choice(GRID[0] * GRID[1], count, replace=False)).astype(np.int64)
            rows = (dice.standard_normal((count, self.spec.decoder.width)) * 0.1).astype(np.float32)
            images.append(ImageRows(rows, places, grid_layout(*GRID)))
        return stitch(self.encoder, text.format(image=self.spec.prompt.image_placeholder), images)


def model_of(name: str, work: Path) -> Model:
    family, sizes, rope = MODELS[name]
    folder = write_family(work / name.replace(" ", "-"), family, **sizes)
    if rope:
        path = folder / "config.json"
        config = json.loads(path.read_text(encoding="utf-8"))
        config["text_config"]["rope_parameters"] = {"rope_theta": 10000.0, **rope}
        path.write_text(json.dumps(config), encoding="utf-8")
    spec = spec_from_checkpoint(folder, name)
    endless = spec.decoder.model_copy(update={"eos_token_ids": ()})
    spec = spec.model_copy(update={"decoder": endless})
    return Model(name, folder, spec, prompt_encoder_from_tokenizer(folder / "tokenizer.json", spec))


def prompts_of(model: Model) -> dict[str, StitchedPrompt]:
    """By what they are about."""
    one = "USER: {image} how many digits are there? ASSISTANT:"
    several = {
        "two pictures": model.prompt("USER: {image} left of {image} what is below it? ASSISTANT:", (64, 33), 1),
        "side by side": model.prompt("USER: {image}{image} what is shown? ASSISTANT:", (40, 7), 2),
        "one is empty": model.prompt("USER: {image} left of {image} what is shown? ASSISTANT:", (0, 48), 3),
        "picture first": model.prompt("{image} describe it", (64,), 4),
        "picture last": model.prompt("describe {image}", (64,), 5),
        "1000 rows": model.prompt("USER: {image} and {image} ASSISTANT:", (576, 424), 6),
    }
    return {**{f"K = {count}": model.prompt(one, (count,)) for count in COUNTS}, **several}


@contextmanager
def heard(module: ModuleType) -> Iterator[list[FloatArray]]:
    """The logits that a decoder draws tokens from, in order."""
    found: list[FloatArray] = []
    draw = module.token_from_logits

    def listening(logits: FloatArray, *more: Any) -> int:
        found.append(np.array(logits))
        token: int = draw(logits, *more)
        return token

    with patch.object(module, "token_from_logits", listening):
        yield found


def answer(decoder: Decoder, module: ModuleType, prompt: StitchedPrompt) -> tuple[list[int], FloatArray]:
    """(tokens, logits of the first)."""
    with heard(module) as logits:
        tokens = list(decoder.stream(prompt, GREEDY))
    return tokens, logits[0]


def equal(ours: Sequence[int], theirs: Sequence[int]) -> int:
    """How many of the first tokens are."""
    same = np.array(ours) == np.array(theirs)
    return len(same) if same.all() else int(np.argmin(same))


def distance(ours: FloatArray, theirs: FloatArray) -> float:
    """The largest difference of logits in their standard deviations."""
    return float(np.abs(ours - theirs).max() / theirs.std())


def in_turn(decoder: Decoder, prompts: Sequence[StitchedPrompt], wanted: Sequence[Sequence[int]]) -> list[int]:
    """Answers that are open at once, pulled in turn: equal tokens of each.

    A further one is left after a while, and the last one begins when the first ends.
    """
    left = decoder.stream(prompts[0], GREEDY)
    for _ in range(3):
        next(left)
    open_ones = dict(enumerate(decoder.stream(prompt, GREEDY) for prompt in prompts[:-1]))
    found: list[list[int]] = [[] for _ in prompts]
    while open_ones:
        for index in list(open_ones):
            try:
                found[index].append(next(open_ones[index]))
            except StopIteration:
                del open_ones[index]
                last = len(prompts) - 1
                if last not in open_ones and not found[last]:
                    open_ones[last] = decoder.stream(prompts[last], GREEDY)
        if left is not None and len(found[0]) == 10:
            left.close()  # type: ignore[attr-defined]
    return [equal(ours, theirs) for ours, theirs in zip(found, wanted, strict=True)]


def check_tokens(model: Model, work: Path, table: Table) -> bool:
    """float32: every token."""
    folder = gguf_from_checkpoint(model.checkpoint, model.spec, work / "llamacpp", "f32")
    ours = LlamaCppDecoder(folder.main, model.spec.decoder, provider="cpu", threads=1)
    theirs = HfDecoder(model.checkpoint, model.spec.decoder, provider="cpu", threads=1)
    prompts, good, wanted = prompts_of(model), True, []
    for what, prompt in prompts.items():
        mine, logits = answer(ours, decoder_llamacpp, prompt)
        reference, those = answer(theirs, decoder_hf, prompt)
        wanted.append(reference)
        fine = mine == reference and len(mine) == TOKENS and distance(logits, those) < LIMITS["f32"]
        good = good and fine
        row = model.name, what, f"{equal(mine, reference)} of {len(reference)}", f"{distance(logits, those):.1e}"
        table.add_row(*row, f"{len(set(reference))}", "" if fine else "DIFFERS")
    together = in_turn(ours, list(prompts.values()), wanted)
    fine = together == [TOKENS] * len(prompts)
    table.add_row(
        model.name, f"{len(prompts)} in turn", f"{min(together)} of {TOKENS}", "", "", "" if fine else "DIFFERS"
    )
    ours.close()
    return good and fine


def rounded(model: Model, file: Path, target: Path) -> Path:
    """The checkpoint with the weights of a GGUF file, in float32."""
    gguf: Any = importlib.import_module("gguf")
    stored = {item.name: item for item in gguf.GGUFReader(file).tensors}
    shape = shape_of(checked_config(model.checkpoint, model.spec.decoder), model.spec.decoder)
    plan = gguf_tensors(language_tensors(model.checkpoint), shape, "llama" if shape.pairs else "paddleocr", "F32")
    values = {}
    for tensor in plan:
        item = stored[tensor.name]
        value = gguf.quants.dequantize(item.data, item.tensor_type).reshape(tensor.source.shape).astype(np.float32)
        if tensor.heads:  # as_pairs, the other way
            half = len(value) // tensor.heads // 2
            value = value.reshape(tensor.heads, half, 2, *value.shape[1:]).swapaxes(1, 2).reshape(value.shape)
        values[tensor.key] = np.ascontiguousarray(value)
    shutil.copytree(model.checkpoint, target, dirs_exist_ok=True)
    whole = load_file(model.checkpoint / "model.safetensors")
    whole.update({key: values[name] for key in whole if (name := language_key(key)) in values})
    save_file(whole, target / "model.safetensors", metadata={"format": "pt"})
    return target


def check_weights(model: Model, work: Path, table: Table) -> bool:
    """All kinds of weights: how far the logits are from transformers', and the files' sizes."""
    prompts, good = prompts_of(model), True

    def answers(decoder: Decoder, module: ModuleType) -> list[tuple[list[int], FloatArray]]:
        found = [answer(decoder, module, prompt) for prompt in prompts.values()]
        decoder.close()
        return found

    def transformers(checkpoint: Path) -> list[tuple[list[int], FloatArray]]:
        return answers(HfDecoder(checkpoint, model.spec.decoder, provider="cpu", threads=1), decoder_hf)

    plain = transformers(model.checkpoint)
    for weights, limit in LIMITS.items():
        folder = gguf_from_checkpoint(model.checkpoint, model.spec, work / "llamacpp", weights)
        same = transformers(rounded(model, folder.main, work / "rounded"))
        for exact in (True, False):
            ours = answers(
                LlamaCppDecoder(folder.main, model.spec.decoder, provider="cpu", threads=1, exact=exact),
                decoder_llamacpp,
            )
            far = [max(distance(a[1], b[1]) for a, b in zip(ours, those, strict=True)) for those in (plain, same)]
            alike = [
                int(np.median([equal(a[0], b[0]) for a, b in zip(ours, them, strict=True)])) for them in (plain, same)
            ]
            fine = far[1] < (limit if exact else max(limit, HALF))
            good = good and fine
            size = f"{folder.main.stat().st_size / 1e6:.2f} MB"
            cells = (
                weights,
                "float32" if exact else "float16",
                size,
                *(f"{d:.1e}, {n}" for d, n in zip(far, alike, strict=True)),
            )
            table.add_row(model.name, *cells, "" if fine else "TOO FAR")
    return good


def check_demo(work: Path, python: str, table: Table) -> bool:
    """The demo bundle's answers: GenAI in this Python, llama.cpp in `python`."""
    bundle, here = work / "demo", sys.executable
    line = [here, "-c", "from holov_export.cli import main; main()"]
    subprocess.run(
        [*line, "--model", "demo", "--no-verify", "--overwrite", "-o", str(bundle)], check=True, stdout=sys.stderr
    )
    good, opened = True, open_bundle(bundle)
    checkpoint = checkpoint_of(opened, None)
    assert checkpoint is not None
    wanted = demo_answers(here, bundle, "genai")
    for weights in LIMITS:
        folder = decoder_folder(bundle, "llamacpp")
        gguf_from_checkpoint(checkpoint, opened.manifest.plan.model, folder, weights)
        found = demo_answers(python, bundle, "llamacpp")
        same = sum(ours == theirs for ours, theirs in zip(found["answers"], wanted["answers"], strict=True))
        fine = same == len(wanted["answers"]) or weights not in ("f32", "f16")
        good = good and fine
        cells = found["python"], found["name"], weights, f"{same} of {len(wanted['answers'])}"
        table.add_row(*cells, "" if fine else "DIFFERS")
    return good


def demo_answers(python: str, bundle: Path, decoder: str) -> dict[str, Any]:
    run = subprocess.run(
        [python, str(Path(__file__).with_name("demo_answers.py")), str(bundle), decoder],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    found: dict[str, Any] = json.loads(run.stdout)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="keep checkpoints and GGUF files in this folder")
    parser.add_argument("--runtime-python", default=sys.executable, help="answers with llama.cpp, see above")
    chosen = parser.parse_args()
    work = chosen.work or Path(tempfile.mkdtemp(prefix="check-llamacpp-"))
    work.mkdir(parents=True, exist_ok=True)
    console = Console(width=120)
    tokens = Table("model", "prompt", "equal tokens", "logits", "different words", "", box=None)
    tokens.title = "float32: tokens as transformers'"
    weights = Table("model", "weights", "attention", "file", "own weights", "the same weights", "", box=None)
    weights.title = "weights: how far logits are from transformers', and equal tokens of 64 (median)"
    demo = Table("Python", "engines", "weights", "answers as GenAI's here", "", box=None)
    demo.title = "the demo bundle through Session"
    try:
        models = [model_of(name, work / "checkpoints") for name in MODELS]
        good = not [model for model in models if not check_tokens(model, work, tokens)]
        console.print(tokens)
        plain = [model for model in models if " rope " not in model.name]
        good = not [model for model in plain if not check_weights(model, work, weights)] and good
        console.print(weights)
        good = check_demo(work, chosen.runtime_python, demo) and good
        console.print(demo)
    finally:
        if chosen.work is None:
            shutil.rmtree(work, ignore_errors=True)
    console.print("all as they should be" if good else "DIFFERENT")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
