#!/usr/bin/env python3
"""Compare TensorRT-LLM's tokens with transformers': for whoever has a TensorRT-LLM container. It has not run in one.

    scripts/gpu/check_trtllm reference BUNDLE --checkpoint DIR --out REFERENCE.npz       (torch, transformers 5, ORT)
    scripts/gpu/check_trtllm engine BUNDLE --reference REFERENCE.npz --json OUT.json     (TensorRT-LLM 0.12 to 1.2)
    scripts/gpu/check_trtllm api BUNDLE --checkpoint DIR --reference ... --json ...      (TensorRT-LLM 1.1 or later)

The first part asks the bundle about pictures at each budget, and transformers answers in float32 on the CPU or in the
checkpoint's type on a GPU; prompts, rows, positions and tokens go into one file, so that the other parts need neither
ONNX Runtime nor transformers 5. `engine --build` makes the engine first, as `holov-export compile --decoder trtllm`.

What is noted: of each prompt how many tokens are the same from the start, once alone, once with all others in flight,
and once more with the same rows again (keys and values used again must not change the answer); seconds to the first
token by budget; that a closed stream ends nothing else. Half precision may break a tie another way: a run counts as
good if all first tokens and, of all tokens, at least `--agree` are the same.

Exit codes: 0 good, 1 tokens differ, 2 wrong usage, 3 this machine lacks something.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))

from steps import Steps, numbers

from holov_export.bundle import Bundle, open_bundle
from holov_export.decoder_files import decoder_folder
from holov_export.errors import HolovExportError, UsageError
from holov_export.runtime.decoder import Decoder
from holov_export.runtime.session import Session
from holov_export.runtime.stitch import stitch
from holov_export.tensors import SamplingSettings, StitchedPrompt

BUDGETS = (1, 64, 192, 576)
QUESTION = "What is shown in this picture?"


@dataclass(frozen=True)
class Case:
    """A prompt and the tokens of transformers."""

    budget: int
    prompt: StitchedPrompt
    tokens: tuple[int, ...]


class Listener:
    """Passes prompts on to a decoder and keeps them."""

    def __init__(self, decoder: Decoder) -> None:
        self.name, self.lanes = decoder.name, 1
        self.prompts: list[StitchedPrompt] = []
        self._decoder = decoder

    def stream(self, prompt: StitchedPrompt, sampling: SamplingSettings) -> Iterator[int]:
        self.prompts.append(prompt)
        return self._decoder.stream(prompt, sampling)

    def close(self) -> None:
        self._decoder.close()


# ----------------------------------------------------------------------------------------------------------- reference


def possible(bundle: Bundle, asked: Sequence[int]) -> tuple[int, ...]:
    """Those of the budgets that the model has, its largest one for all that are larger."""
    most = bundle.manifest.plan.tokens
    return tuple(sorted({min(budget, most) for budget in asked}))


def make_cases(bundle: Bundle, decoder: Decoder, budgets: Sequence[int], count: int, new: int) -> list[Case]:
    """Each of `count` pictures at each budget, and a prompt without any."""
    from pictures import pictures

    listener, cases = Listener(decoder), []
    settings = SamplingSettings(max_new_tokens=new)
    with Session.open(bundle, decoder=listener) as session:
        for budget in budgets:
            for picture in pictures(count):
                answer = session.ask(picture, QUESTION, budget=budget, sampling=settings)
                cases.append(Case(budget, listener.prompts[-1], answer.token_ids))
        text = session.encoder.text_from_question("What is the capital of France?", images=0)
        words = stitch(session.encoder, text, [], max_new_tokens=new)
        cases.append(Case(0, words, tuple(decoder.stream(words, settings))))
    return cases


def write_cases(cases: Sequence[Case], path: Path, name: str) -> None:
    arrays: dict[str, Any] = {"model": np.array(name)}
    for index, case in enumerate(cases):
        prompt = case.prompt
        arrays |= {
            f"{index}.ids": prompt.input_ids,
            f"{index}.rows": np.asarray(prompt.rows, dtype=np.float32),
            f"{index}.counts": np.array(prompt.counts, dtype=np.int64),
            f"{index}.tokens": np.array(case.tokens, dtype=np.int64),
            f"{index}.facts": np.array([case.budget, prompt.image_token_id, prompt.next_position or -1]),
            f"{index}.text": np.array(prompt.text),
        }
        if prompt.position_ids is not None:
            arrays[f"{index}.positions"] = prompt.position_ids
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, **arrays)


def read_cases(path: Path) -> tuple[str, list[Case]]:
    """(name of the model, its cases).

    Raises:
        UsageError: the file is missing or another.
    """
    try:
        with np.load(path, allow_pickle=False) as stored:
            count = sum(name.endswith(".ids") for name in stored.files)
            return str(stored["model"]), [_case(stored, index) for index in range(count)]
    except (OSError, ValueError, KeyError) as error:
        raise UsageError(f"'{path}' is no reference of this script: {error}") from error


def _case(stored: Any, index: int) -> Case:
    budget, placeholder, following = (int(number) for number in stored[f"{index}.facts"])
    positions = f"{index}.positions"
    prompt = StitchedPrompt(
        input_ids=stored[f"{index}.ids"],
        rows=stored[f"{index}.rows"],
        counts=tuple(int(count) for count in stored[f"{index}.counts"]),
        image_token_id=placeholder,
        text=str(stored[f"{index}.text"]),
        position_ids=stored[positions] if positions in stored.files else None,
        next_position=None if following < 0 else following,
    )
    return Case(budget, prompt, tuple(int(token) for token in stored[f"{index}.tokens"]))


# ---------------------------------------------------------------------------------------------------------- comparison


def same_tokens(found: Sequence[int], expected: Sequence[int]) -> int:
    """How many tokens are the same from the start."""
    pairs = list(zip(found, expected, strict=False))
    return next((index for index, (one, other) in enumerate(pairs) if one != other), len(pairs))


def compare(decoder: Decoder, cases: Sequence[Case], new: int) -> dict[str, Any]:
    """Tokens and times of all cases: alone, all in flight, again.

    Returns:
        For JSON: "cases" (of each its budget, rows, and the tokens that are the same), "agree" (share of all tokens, by
        way of asking), "first_tokens" (whether all are the same), "ttft" (median seconds by budget).
    """
    settings = SamplingSettings(max_new_tokens=new)
    alone, seconds = [], []
    for case in cases:
        began = perf_counter()
        stream = decoder.stream(case.prompt, settings)
        first = [token for token in [next(stream, None)] if token is not None]
        seconds.append(perf_counter() - began)
        alone.append([*first, *stream])
    ways = {"alone": alone, "together": in_turn(decoder, cases, settings)}
    ways["again"] = [list(decoder.stream(case.prompt, settings)) for case in cases]
    lines = []
    for index, case in enumerate(cases):
        same = {name: same_tokens(tokens[index], case.tokens) for name, tokens in ways.items()}
        lines.append({"budget": case.budget, "rows": len(case.prompt.rows), "tokens": len(case.tokens), "same": same})
    total = sum(len(case.tokens) for case in cases)
    budgets = sorted({case.budget for case in cases})
    return {
        "cases": lines,
        "agree": {name: round(sum(line["same"][name] for line in lines) / total, 4) for name in ways},
        "lengths": all(
            len(tokens[index]) == len(case.tokens) for tokens in ways.values() for index, case in enumerate(cases)
        ),
        "first_tokens": all(
            tokens[index][:1] == list(case.tokens[:1]) for tokens in ways.values() for index, case in enumerate(cases)
        ),
        "ttft": {
            str(budget): round(median(s for s, case in zip(seconds, cases, strict=True) if case.budget == budget), 5)
            for budget in budgets
        },
        "closing": closing_ends_one_stream(decoder, cases, settings, alone),
    }


def in_turn(decoder: Decoder, cases: Sequence[Case], settings: SamplingSettings) -> list[list[int]]:
    """The tokens of all cases, as many streams open as the decoder has lanes, pulled in turn from this thread."""
    answers: list[list[int]] = [[] for _ in cases]
    waiting = list(range(len(cases)))
    open_streams: dict[int, Iterator[int]] = {}
    while waiting or open_streams:
        while waiting and len(open_streams) < max(decoder.lanes, 1):
            index = waiting.pop(0)
            open_streams[index] = decoder.stream(cases[index].prompt, settings)
        for index in list(open_streams):
            token = next(open_streams[index], None)
            if token is None:
                del open_streams[index]
            else:
                answers[index].append(token)
    return answers


def closing_ends_one_stream(
    decoder: Decoder, cases: Sequence[Case], settings: SamplingSettings, alone: Sequence[Sequence[int]]
) -> bool:
    """Whether a stream that is closed after its first token leaves the next one as it is."""
    given_up = decoder.stream(cases[0].prompt, settings)
    next(given_up, None)
    given_up.close()  # type: ignore[attr-defined]
    return list(decoder.stream(cases[-1].prompt, settings)) == list(alone[-1])


def is_good(found: dict[str, Any], agree: float) -> bool:
    return bool(found["first_tokens"] and found["closing"] and min(found["agree"].values()) >= agree)


# ------------------------------------------------------------------------------------------------------------ commands


def reference(options: argparse.Namespace) -> int:
    from holov_export.runtime.decoder_hf import HfDecoder

    bundle = open_bundle(options.bundle)
    budgets = possible(bundle, options.budgets)
    decoder = HfDecoder(options.checkpoint, bundle.manifest.plan.model.decoder, provider=options.provider)
    cases = make_cases(bundle, decoder, budgets, options.pictures, options.new)
    write_cases(cases, options.out, bundle.manifest.plan.model.name)
    print(
        f"{options.out}: {len(cases)} prompts at the budgets {', '.join(map(str, budgets))}, tokens of {decoder.name}"
    )
    return 0


def check(options: argparse.Namespace) -> int:
    bundle = open_bundle(options.bundle, verify="size")
    name, cases = read_cases(options.reference)
    model = bundle.manifest.plan.model
    if name != model.name:
        raise UsageError(f"the reference is of '{name}', the bundle of '{model.name}'.")
    steps = Steps(options.json, options.minutes)
    steps.found["model"] = name
    if options.command == "engine" and options.build:
        steps.run("build", lambda: steps.found.update(build=_built(bundle, cases, options)))
    decoder = steps.run("load", lambda: _loaded(bundle, options))
    if decoder is not None:
        steps.found["decoder"] = {"name": decoder.name, "lanes": decoder.lanes}
        steps.run("compare", lambda: steps.found.update(found=compare(decoder, cases, options.new)))
        steps.run("close", decoder.close)
    if steps.failed:
        return 3
    good = is_good(steps.found["found"], options.agree)
    steps.found["good"] = good
    steps.write()
    print(json.dumps({"good": good, "agree": steps.found["found"]["agree"], "ttft": steps.found["found"]["ttft"]}))
    return 0 if good else 1


def _built(bundle: Bundle, cases: Sequence[Case], options: argparse.Namespace) -> dict[str, Any]:
    from holov_export.export.decoder_trtllm import build_trtllm, trtllm_plan

    if options.checkpoint is None:
        raise UsageError("--build needs --checkpoint DIR.")
    words = max(len(case.prompt) - len(case.prompt.rows) for case in cases)
    plan = trtllm_plan(
        bundle.manifest.plan.model,
        options.checkpoint,
        weights=options.weights,
        batch=options.batch,
        budget=max(case.budget for case in cases),
        text_tokens=words,
        new_tokens=options.new,
        tensor_parallel=options.tensor_parallel,
        examples=options.examples,
    )
    began = perf_counter()
    built = build_trtllm(plan, _folder(bundle, options), tell=lambda line: print(line, file=sys.stderr))
    return {"seconds": round(perf_counter() - began, 1), "tool": built.record.tool, "weights": built.record.weights}


def _folder(bundle: Bundle, options: argparse.Namespace) -> Path:
    folder: Path | None = options.engine
    return folder or decoder_folder(bundle.folder, "trtllm")


def _loaded(bundle: Bundle, options: argparse.Namespace) -> Decoder:
    spec = bundle.manifest.plan.model.decoder
    if options.command == "engine":
        from holov_export.runtime.decoder_trtllm import TrtllmDecoder

        return TrtllmDecoder(_folder(bundle, options), spec)
    from holov_export.runtime.decoder_trtllm_api import TrtllmApiDecoder

    return TrtllmApiDecoder(options.checkpoint, spec, tensor_parallel=options.tensor_parallel)


def parser() -> argparse.ArgumentParser:
    words = argparse.ArgumentParser(
        prog="scripts/gpu/check_trtllm", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = words.add_subparsers(dest="command", required=True)
    made = commands.add_parser("reference", help="prompts and transformers' tokens into one file")
    made.add_argument("--checkpoint", type=Path, required=True)
    made.add_argument("--out", type=Path, required=True, help="the .npz file")
    made.add_argument("--budgets", type=numbers, default=BUDGETS)
    made.add_argument("--pictures", type=int, default=2)
    made.add_argument("--provider", choices=("auto", "cpu", "cuda"), default="cpu")
    engine = commands.add_parser("engine", help="an engine against the reference")
    engine.add_argument("--engine", type=Path, help="folder with decoder.json; the bundle's own if left out")
    engine.add_argument("--build", action="store_true", help="make the engine first")
    engine.add_argument("--checkpoint", type=Path)
    engine.add_argument("--weights", default="float16")
    engine.add_argument("--batch", type=int, default=4)
    engine.add_argument("--examples", type=Path, help="folder of TensorRT-LLM's examples")
    api = commands.add_parser("api", help="the LLM API against the reference")
    api.add_argument("--checkpoint", type=Path, required=True)
    for command in (engine, api):
        command.add_argument("--reference", type=Path, required=True)
        command.add_argument("--json", type=Path, required=True)
        command.add_argument("--agree", type=float, default=0.9, help="share of tokens that must be the same")
        command.add_argument("--minutes", type=float, default=60.0)
        command.add_argument("--tensor-parallel", type=int, default=1)
    for command in (made, engine, api):
        command.add_argument("bundle", type=Path)
        command.add_argument("--new", type=int, default=32, help="tokens of an answer")
    return words


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    try:
        return reference(options) if options.command == "reference" else check(options)
    except HolovExportError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
