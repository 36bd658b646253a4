#!/usr/bin/env python3
"""Compares vLLM's answers with transformers' `generate(inputs_embeds)`, token by token. `scripts/check_vllm` runs it.

Checkpoints are tiny and random, rows are noise, answers are 32 greedy tokens. Each prompt is asked alone and all of
them together, through

    engine    `VllmDecoder` in this process: LLaVA-1.5, LLaVA-NeXT, Video-LLaVA
    server    `VllmServerDecoder` against a server with --enable-mm-embeds --enable-scale-out ("tokens"):
              LLaVA-1.5, LLaVA-NeXT
    chat      the same against one with --enable-mm-embeds --trust-request-chat-template ("chat")

and what must be refused is tried as well: after it the server must still be there. Ends with status 1 if a token
differs or a check fails.
"""

from __future__ import annotations

import argparse
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import transformers
from checkpoints import TinyLlava, write_checkpoint
from family_checkpoints import write_family

from holov_export.errors import HolovExportError
from holov_export.export.checkpoint import spec_from_checkpoint
from holov_export.runtime.decoder import Decoder
from holov_export.runtime.decoder_hf import CLASSES, family_of_checkpoint
from holov_export.runtime.decoder_vllm import VllmDecoder
from holov_export.runtime.decoder_vllm_server import VllmServerDecoder
from holov_export.runtime.stitch import prompt_encoder_from_tokenizer, stitch
from holov_export.spec import ModelSpec
from holov_export.tensors import SamplingSettings, StitchedPrompt

NEW = 32
GREEDY = SamplingSettings(max_new_tokens=NEW)
DRAWN = replace(GREEDY, temperature=1.0, top_k=50, top_p=0.9, seed=7)
#: 576 patch tokens, as LLaVA-1.5 has; sizes that differ; heads as wide as vLLM's CPU attention wants them
SIZES = TinyLlava(image_size=168, patch_size=7, width=192, heads=6, kv_heads=2, mlp=320, context=4096)
START_SECONDS = 240
ONE, TWO = "USER: <image>\nwhat is shown? ASSISTANT:", "USER: <image>\nleft of <image> in detail? ASSISTANT:"
#: name -> (text, rows of each image)
CASES: dict[str, tuple[str, tuple[int, ...]]] = {
    **{f"{rows} rows": (ONE, (rows,)) for rows in (0, 1, 64, 192, 576)},
    "192 other rows": (ONE, (192,)),
    "576 other rows": (ONE, (576,)),
    "1500 rows": (ONE, (1500,)),
    "no image": ("USER: describe the image ASSISTANT:", ()),
    "64 and 64 rows": (TWO, (64, 64)),
    "192 and 30 rows": (TWO, (192, 30)),
    "64 and 0 rows": (TWO, (64, 0)),
    "neighbours": ("USER: <image><image>\nwhat? ASSISTANT:", (40, 7)),
}
#: what a server takes as text: images of one count, none of them empty
CHAT_CASES = ("1 rows", "64 rows", "192 rows", "576 rows", "1500 rows", "no image", "64 and 64 rows")


@dataclass(frozen=True)
class Question:
    """A prompt and what transformers answers."""

    name: str
    prompt: StitchedPrompt
    answer: list[int]


class Report:
    """The table, as it is made."""

    def __init__(self) -> None:
        self.failed = 0
        print(f"{'way':<30}{'prompt':<22}{'tokens':>7}  result")

    def line(self, way: str, name: str, tokens: int | None, good: bool, result: str) -> None:
        self.failed += not good
        print(f"{way:<30}{name:<22}{'' if tokens is None else tokens:>7}  {result}{'' if good else '   FAILED'}")
        sys.stdout.flush()

    def answer(self, way: str, question: Question, found: list[int]) -> None:
        same = sum(a == b for a, b in zip(found, question.answer, strict=False))
        good = found == question.answer
        self.line(way, question.name, len(question.prompt), good, f"{same} of {NEW} equal")

    def refusal(self, way: str, name: str, wanted: str, action: Callable[[], object]) -> None:
        """`action` must raise an error that says `wanted`."""
        try:
            action()
        except HolovExportError as error:
            self.line(way, name, None, wanted in str(error), f"refused: {error.message}")
        else:
            self.line(way, name, None, False, "not refused")


def spec_without_ends(checkpoint: Path) -> ModelSpec:
    """A random model may well say its end token; here every answer has its full length."""
    spec = spec_from_checkpoint(checkpoint, checkpoint.name)
    return spec.model_copy(update={"decoder": spec.decoder.model_copy(update={"eos_token_ids": ()})})


def questions_of(checkpoint: Path, spec: ModelSpec) -> list[Question]:
    """The cases with rows of noise, and transformers' answers to them."""
    model = getattr(transformers, CLASSES[family_of_checkpoint(checkpoint)])
    loaded = model.from_pretrained(checkpoint, dtype=torch.float32).eval()
    encoder = prompt_encoder_from_tokenizer(checkpoint / "tokenizer.json", spec)
    dice = np.random.default_rng(0)
    found = []
    for name, (text, counts) in CASES.items():
        rows = [noise(dice, count, spec.decoder.width) for count in counts]
        prompt = stitch(encoder, text, rows, max_new_tokens=NEW)
        found.append(Question(name, prompt, reference(loaded, prompt)))
    half = replace(found[2].prompt, rows=found[2].prompt.rows.astype(np.float16))
    return [*found, Question("64 rows, float16", half, reference(loaded, half))]


def noise(dice: np.random.Generator, count: int, width: int) -> npt.NDArray[np.float32]:
    return dice.normal(scale=0.5, size=(count, width)).astype(np.float32)


def reference(model: transformers.PreTrainedModel, prompt: StitchedPrompt) -> list[int]:
    """What transformers' own loop makes of the stitched embeddings."""
    ids = torch.from_numpy(prompt.input_ids)
    with torch.inference_mode():
        embeds = model.get_input_embeddings()(ids)
        embeds[ids == prompt.image_token_id] = torch.from_numpy(prompt.rows).float()
        mask = torch.ones(1, len(ids), dtype=torch.long)
        out = model.generate(
            inputs_embeds=embeds[None], attention_mask=mask, max_new_tokens=NEW, do_sample=False, eos_token_id=None,
            pad_token_id=0,
        )  # fmt: skip
    answer: list[int] = out[0].tolist()
    return answer


def in_turn(decoder: Decoder, prompts: Sequence[StitchedPrompt]) -> list[list[int]]:
    """The answers, all streams open at once and pulled one token each in turn."""
    streams = [decoder.stream(prompt, GREEDY) for prompt in prompts]
    answers: list[list[int]] = [[] for _ in prompts]
    for _ in range(NEW + 1):
        for stream, answer in zip(streams, answers, strict=True):
            answer.extend(token for token in [next(stream, None)] if token is not None)
    return answers


def check_decoder(report: Report, way: str, decoder: Decoder, questions: Sequence[Question]) -> None:
    """Each question alone; all together, if the decoder has lanes; the end token, a seed, an answer that is left."""
    for question in questions:
        report.answer(way, question, list(decoder.stream(question.prompt, GREEDY)))
    if decoder.lanes > 1:
        for question, found in zip(questions, in_turn(decoder, [one.prompt for one in questions]), strict=True):
            report.answer(f"{way}, in turn", question, found)
    some = questions[-1]
    stop = some.answer[10]
    ended = list(decoder.stream(some.prompt, replace(GREEDY, stop_token_ids=(stop,))))
    report.line(way, "end token", None, ended == some.answer[: some.answer.index(stop)], f"after {len(ended)}")
    drawn = [list(decoder.stream(some.prompt, DRAWN)) for _ in range(2)]
    report.line(way, "seed 7, twice", None, drawn[0] == drawn[1] != some.answer, "equal, not greedy")
    left = decoder.stream(some.prompt, replace(GREEDY, max_new_tokens=2000))
    next(left)
    left.close()  # type: ignore[attr-defined]
    report.answer(f"{way}, after a left one", some, list(decoder.stream(some.prompt, GREEDY)))


# ---------------------------------------------------------------------------------------------------- engine


def check_rows_count(report: Report, way: str, questions: Sequence[Question]) -> None:
    """The comparison would say nothing if answers did not depend on the rows."""
    answers = {question.name: question.answer for question in questions}
    for name in ("192", "576"):
        other = answers[f"{name} rows"] != answers[f"{name} other rows"]
        report.line(way, f"{name} other rows", None, other, "transformers answers otherwise")


def check_engine(report: Report, checkpoints: dict[str, Path]) -> None:
    for family, checkpoint in checkpoints.items():
        spec = spec_without_ends(checkpoint)
        began = time.perf_counter()
        decoder = VllmDecoder(checkpoint, spec.decoder)
        report.line(family, f"loaded in {time.perf_counter() - began:.1f} s", None, True, decoder.name)
        questions = questions_of(checkpoint, spec)
        check_rows_count(report, family, questions)
        check_decoder(report, family, decoder, questions)
        report.line(family, "left in the engine", None, decoder.open_requests == 0, f"{decoder.open_requests} requests")
        decoder.close()
        some = questions[0].prompt
        report.refusal(family, "closed", "closed", lambda: decoder.stream(some, GREEDY))  # noqa: B023  called here


# ---------------------------------------------------------------------------------------------------- servers


@contextmanager
def server(checkpoint: Path, *flags: str) -> Iterator[str]:
    """A vLLM server of a checkpoint on this machine; its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(checkpoint)),
        *("--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--enforce-eager"),
        *("--limit-mm-per-prompt", '{"image": 0}', *flags),
    ]
    log = checkpoint.parent / "server.log"
    with log.open("w") as stream:
        process = subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT)
        try:
            address = f"http://127.0.0.1:{port}"
            wait_for(address, process, log)
            yield address
        finally:
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def wait_for(address: str, process: subprocess.Popen[bytes], log: Path) -> None:
    ends = time.monotonic() + START_SECONDS
    while not healthy(address):
        if process.poll() is not None or time.monotonic() > ends:
            raise SystemExit("vLLM's server did not start:\n" + "\n".join(log.read_text().splitlines()[-30:]))
        time.sleep(1)


def healthy(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"{address}/health", timeout=10) as reply:
            return bool(reply.status == 200)
    except OSError:
        return False


def running(address: str) -> float:
    """Requests that a server is at work on."""
    with urllib.request.urlopen(f"{address}/metrics", timeout=10) as reply:
        lines = reply.read().decode().splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith("vllm:num_requests_running"))


def check_server(report: Report, way: str, checkpoint: Path) -> None:
    spec = spec_without_ends(checkpoint)
    questions = questions_of(checkpoint, spec)
    with server(checkpoint, "--enable-mm-embeds", "--enable-scale-out") as address:
        decoder = VllmServerDecoder(address, spec.decoder)
        report.line(way, "way", None, decoder.way == "tokens", decoder.way)
        check_decoder(report, way, decoder, questions)
        with ThreadPoolExecutor(len(questions)) as threads:
            found = list(threads.map(lambda one: list(decoder.stream(one.prompt, GREEDY)), questions * 2))
        for question, answer in zip(questions * 2, found, strict=True):
            report.answer(f"{way}, {len(questions)} threads", question, answer)
        ends = time.monotonic() + 20
        while running(address) and time.monotonic() < ends:
            time.sleep(0.5)
        report.line(way, "left on the server", None, running(address) == 0, f"{running(address):g} requests")
        wide = spec.decoder.model_copy(update={"width": 2 * spec.decoder.width})
        report.refusal(way, "another width", "wide", lambda: VllmServerDecoder(address, wide))
        report.line(way, "still there", None, healthy(address), "yes" if healthy(address) else "no")


def check_chat(report: Report, checkpoint: Path) -> None:
    spec = spec_without_ends(checkpoint)
    questions = {one.name: one for one in questions_of(checkpoint, spec)}
    with server(checkpoint, "--enable-mm-embeds", "--trust-request-chat-template") as address:
        decoder = VllmServerDecoder(address, spec.decoder)
        report.line("chat", "way", None, decoder.way == "chat", decoder.way)
        check_decoder(report, "chat", decoder, [questions[name] for name in CHAT_CASES])
        for name in ("192 and 30 rows", "64 and 0 rows", "0 rows"):
            prompt = questions[name].prompt
            if name == "0 rows":  # no rows, so no text: its token ids are sent
                report.answer("chat", questions[name], list(decoder.stream(prompt, GREEDY)))
            else:
                report.refusal("chat", name, "--enable-scale-out", lambda: decoder.stream(prompt, GREEDY))  # noqa: B023
        other = replace(questions["64 rows"].prompt, text="USER: <image>\nhow many? ASSISTANT:")
        report.refusal("chat", "other token ids", "another prompt", lambda: list(decoder.stream(other, GREEDY)))
        report.line("chat", "still there", None, healthy(address), "yes" if healthy(address) else "no")
    with server(checkpoint) as address:
        report.refusal("plain server", "no flags", "visual rows", lambda: VllmServerDecoder(address, spec.decoder))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("engine", "server", "chat"))
    only = parser.parse_args().only
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as work:
        llava = write_checkpoint(Path(work) / "llava", SIZES)
        report = Report()
        if only in (None, "engine"):
            others = {name: write_family(Path(work) / name, name) for name in ("llava_next", "video_llava")}
            check_engine(report, {"llava": llava, **others})
        if only in (None, "server"):
            check_server(report, "server", llava)
            check_server(report, "server next", write_family(Path(work) / "served_next", "llava_next"))
        if only in (None, "chat"):
            check_chat(report, llava)
    print(f"{report.failed} failed" if report.failed else "all equal")
    return 1 if report.failed else 0


if __name__ == "__main__":
    sys.exit(main())
