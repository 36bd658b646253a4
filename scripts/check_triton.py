#!/usr/bin/env python3
"""Compares a Triton Inference Server that runs `holov-export triton` repositories with `Session` in this process.

    scripts/check_triton                makes an environment, unpacks the server and runs this file

Two bundles are served: the demo model, and a random LLaVA whose answers do not end early. Of each: visual tokens over
HTTP and gRPC, requests with different budgets at once (they must run together), answers in one response over HTTP and
token by token over gRPC, refusals, a client that leaves, fifty clients at once, the end of the server. Then the encoder
of the layout multimodal_ifb is served and its table compared. All config.pbtxt are parsed with Triton's own schema.

Ends with status 1 if anything differs.
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import json
import re
import signal
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image
from rich.console import Console
from rich.table import Table

from holov_export.assets import data_folder
from holov_export.bundle import open_bundle
from holov_export.runtime.preprocess import pixels_from_pictures
from holov_export.runtime.session import Session
from holov_export.serve.triton.repository import Layout, RepositoryRequest, write_repository
from holov_export.serve.triton.settings import ModelSettings
from holov_export.tensors import SamplingSettings

DECODER = "genai" if importlib.util.find_spec("onnxruntime_genai") else "ort"
QUESTION = "what is shown in this picture?"
#: rows of the same picture in another batch differ in the last bits
TOLERANCE = 1e-5
CLIENTS = 50


class Report:
    """Rows of the table that is printed at the end."""

    def __init__(self) -> None:
        self._table = Table("what", "figures", "", box=None, pad_edge=False, header_style="bold")
        self.good = True

    def row(self, what: str, figures: str, good: bool) -> None:
        """A check and its outcome."""
        self._table.add_row(what, figures, "ok" if good else "DIFFERS")
        self.good = self.good and good
        print(f"  {what}: {figures}  {'ok' if good else 'DIFFERS'}", flush=True)

    def show(self) -> None:
        Console(width=150).print(self._table)


def pictures() -> list[bytes]:
    """Six image files: the demo's scenes, and photograph-like noise in other shapes and formats."""
    found = [path.read_bytes() for path in sorted(data_folder("demo-scenes").glob("*.png"))]
    dice = np.random.default_rng(5)
    for width, height, kind in ((90, 60, "JPEG"), (40, 120, "WEBP"), (200, 200, "PNG")):
        coarse = Image.fromarray(dice.integers(0, 256, (8, 8, 3), dtype=np.uint8)).resize((width, height))
        stream = io.BytesIO()
        coarse.save(stream, kind)
        found.append(stream.getvalue())
    return found


def check_vision(report: Report, server: Server, session: Session, budgets: Sequence[int]) -> None:
    """Rows of single requests by both ways, and of one request with two prompts of two pictures."""
    files = pictures()
    names = ("tokens", "positions", "counts")
    for way in ("http", "grpc"):
        worst, same = 0.0, True
        for file in files:
            for budget in budgets:
                got = server.infer("holov_vision", {"images": [[file]], "budget": [[budget]]}, names, way)
                own = session.see(file, budget)
                worst = max(worst, _distance(got["tokens"][0], own.rows(0)))
                same = same and np.array_equal(got["positions"][0], own.positions[0]) and got["counts"][0, 0] == budget
        report.row(f"vision, {way}", f"{len(files) * len(budgets)} requests, max difference {worst:.1e}",
                   same and worst <= TOLERANCE)  # fmt: skip
    quota = [budgets[0], budgets[-1], budgets[1], budgets[1]]
    values = {"images": [files[:2], files[2:4]], "budget": [quota[:2], quota[2:]]}
    got = server.infer("holov_vision", values, names)
    own = session.see(files[:4], quota=quota)
    flat = np.concatenate([got["tokens"][row, : sum(quota[2 * row : 2 * row + 2])] for row in (0, 1)])
    worst = _distance(flat, np.concatenate([own.rows(index) for index in range(4)]))
    report.row("vision, 2 prompts of 2 pictures", f"counts {got['counts'].tolist()}, max difference {worst:.1e}",
               worst <= TOLERANCE and got["counts"].ravel().tolist() == quota)  # fmt: skip


def check_batches(report: Report, server: Server, session: Session, budgets: Sequence[int]) -> None:
    """Thirty-two clients with different budgets, one of them with a broken file."""
    files = pictures()
    asked = [(files[index % len(files)], budgets[index % len(budgets)]) for index in range(32)]
    before = server.statistics("holov_vision")

    def one(number: int) -> float | str:
        file, budget = asked[number]
        values = {"images": [[file if number != 7 else file[:40]]], "budget": [[budget]]}
        if number == 7:
            return server.refusal("holov_vision", values, "tokens", "grpc")
        got = server.infer("holov_vision", values, ["tokens"], "grpc" if number % 2 else "http")
        return _distance(got["tokens"][0], session_rows[number])

    session_rows = [session.see(file, budget).rows(0) for file, budget in asked]
    with ThreadPoolExecutor(len(asked)) as threads:
        results = list(threads.map(one, range(len(asked))))
    after = server.statistics("holov_vision")
    runs = int(after["execution_count"]) - int(before["execution_count"])
    requests = sum(int(after["inference_stats"][kind]["count"]) - int(before["inference_stats"][kind].get("count", 0))
                   for kind in ("success", "fail"))  # fmt: skip
    sizes = sorted(int(item["batch_size"]) for item in after["batch_stats"])
    worst = max(item for item in results if isinstance(item, float))
    report.row(
        "mixed budgets at once",
        f"{requests} requests in {runs} runs, batches of {sizes}, max difference {worst:.1e}, broken file: "
        f"'{str(results[7])[:40]}...'",
        worst <= TOLERANCE and runs < 32 and max(sizes) > 1 and "is not an image" in str(results[7]),
    )


def check_answers(report: Report, server: Server, session: Session, budgets: Sequence[int], length: int) -> None:
    """Answers in one response and streamed, with one picture, two, and none."""
    files = pictures()
    cases = [([files[number % 6]], budget) for number, budget in enumerate(budgets)]
    cases += [(files[:2], budgets[1]), ([], 1)]
    tokens, same_once, same_stream, split = 0, 0, 0, True
    for images, budget in cases:
        own = session.ask(images, QUESTION, budget=budget, sampling=SamplingSettings(max_new_tokens=length)) if images \
            else session.answer([], QUESTION, sampling=SamplingSettings(max_new_tokens=length))  # fmt: skip
        values = {"question": QUESTION, "max_new_tokens": length}
        if images:
            values |= {"images": images, "budget": [budget]}
        outputs = ("text", "token_ids", "finish_reason", "visual_tokens")
        got = server.infer("holov_answer_once", values, outputs, "http")
        same_once += (got["text"][0].decode(), tuple(got["token_ids"]), got["finish_reason"][0].decode()) == (
            own.text, own.token_ids, own.finish_reason)  # fmt: skip
        streamed = server.stream(values)
        same_stream += ("".join(streamed.pieces), streamed.token_ids, streamed.reason, streamed.visual_tokens) == (
            own.text, own.token_ids, own.finish_reason, own.visual_tokens)  # fmt: skip
        text_alone = server.stream(values, outputs=["text"])
        split = split and "".join(text_alone.pieces) == own.text and text_alone.token_ids == ()
        split = split and streamed.responses >= len(own.token_ids)
        tokens += len(own.token_ids)
    report.row("answers, http, one response", f"{same_once} of {len(cases)} equal", same_once == len(cases))
    report.row("answers, gRPC, streamed", f"{same_stream} of {len(cases)} equal, {tokens} tokens, a response for each",
               same_stream == len(cases) and split)  # fmt: skip


def check_refusals(report: Report, server: Server, largest: int) -> None:
    """What is wrong arrives as an error that says so, by both ways, alone and through the chain."""
    file = pictures()[0]
    good = {"images": [file], "question": QUESTION, "max_new_tokens": 4}
    vision = {"images": [[file]], "budget": [[1]]}
    cases: list[tuple[str, dict, str]] = [
        ("holov_vision", {**vision, "images": [[b"no picture"]]}, "is not an image"),
        ("holov_vision", {**vision, "images": [[file[:60]]]}, "truncated"),
        ("holov_vision", {**vision, "images": [[b"/etc/passwd"]]}, "is not an image"),
        ("holov_vision", {**vision, "budget": [[largest + 1]]}, f"it must be in 1..{largest}"),
        ("holov_vision", {**vision, "budget": [[-1]]}, f"it must be in 1..{largest}"),
        ("holov_vision", {**vision, "budget": [[1, 2]]}, "one number for each image"),
        ("holov_vision", {**vision, "images": [[file] * 9]}, "it can have 1 to 8"),
        ("holov_answer_once", {**good, "budget": [largest + 1]}, f"it must be in 1..{largest}"),
        ("holov_answer_once", {**good, "images": [file[:60]]}, "truncated"),
        ("holov_answer_once", {**good, "question": "  "}, "empty"),
        ("holov_answer_once", {**good, "question": "word " * 3000}, "context"),
        ("holov_answer_once", {**good, "max_new_tokens": 0}, "at least 1"),
        ("holov_answer_once", {**good, "max_new_tokens": 100_000}, "at most 2048"),
        ("holov_answer_once", {**good, "question": "<image> <image>"}, "question is empty"),
    ]
    wrong = []
    for model, values, words in cases:
        output = "tokens" if model == "holov_vision" else "text"
        for way in ("http", "grpc"):
            said = server.refusal(model, values, output, way)
            if words not in said:
                wrong.append(f"{model}: '{said}' lacks '{words}'")
    streamed = server.stream({**good, "budget": [largest + 1]})
    if f"it must be in 1..{largest}" not in streamed.error:
        wrong.append(f"stream: '{streamed.error}'")
    report.row("refusals", "; ".join(wrong) or f"{len(cases)} wrong requests by both ways, and one streamed", not wrong)


def check_leaving(report: Report, server: Server, length: int) -> None:
    """A client goes after five tokens: the decoder must not go on to the end, by its own word in the log."""
    values = {"images": [pictures()[3]], "question": QUESTION, "max_new_tokens": length}
    whole = server.stream(values)
    server.stream(values, leave_after=5)
    made: list[int] = []
    deadline = time.monotonic() + 10
    while not made and time.monotonic() < deadline:
        time.sleep(0.2)
        found = re.findall(r"cancelled after (\d+) tokens", server.log.read_text(errors="replace"))
        made = [int(number) for number in found]
    report.row("client leaves after 5 tokens", f"{made} of {len(whole.token_ids)} tokens made",
               len(whole.token_ids) == length and len(made) == 1 and made[0] < length // 2)  # fmt: skip


def check_crowd(report: Report, server: Server, session: Session, budgets: Sequence[int], length: int) -> None:
    """Fifty clients at once, half of them streaming; each must get its own answer."""
    files = pictures()
    asked = [(files[index % 6], f"{QUESTION} {index % 5}", budgets[index % len(budgets)]) for index in range(CLIENTS)]
    sampling = SamplingSettings(max_new_tokens=length)
    own = [session.ask(file, question, budget=budget, sampling=sampling) for file, question, budget in asked]

    def one(number: int) -> tuple[int, ...]:
        file, question, budget = asked[number]
        values = {"images": [file], "question": question, "budget": [budget], "max_new_tokens": length}
        if number % 2:
            return server.stream(values).token_ids
        return tuple(server.infer("holov_answer_once", values, ["token_ids"], "http")["token_ids"])

    began = time.perf_counter()
    with ThreadPoolExecutor(CLIENTS) as threads:
        got = list(threads.map(one, range(CLIENTS)))
    seconds = time.perf_counter() - began
    same = sum(left == right.token_ids for left, right in zip(got, own, strict=True))
    tokens = sum(len(item) for item in got)
    different = len({item.token_ids for item in own})
    report.row(f"{CLIENTS} clients at once", f"{same} equal, {different} different answers, "
               f"{tokens} tokens in {seconds:.1f} s", same == CLIENTS)  # fmt: skip


def check_encoder(report: Report, server: Server, session: Session, budget: int) -> None:
    """The table of the layout multimodal_ifb against the graph, one picture and two in a request."""
    model = session.bundle.manifest.plan.model
    pixels = pixels_from_pictures(pictures(), model)
    halves = pixels.pixel_values.astype(np.float16)
    own = session.see(pictures(), budget)
    worst, rows = 0.0, []
    for shape in ((1, 1), (1, 2), (3, 2)):
        count = shape[0] * shape[1]
        sent = halves[:count].reshape(*shape, *halves.shape[1:])
        got = server.infer("multimodal_encoders", {"IMAGE": sent},
                           ["OUT_PROMPT_EMBEDDING_TABLE", "OUT_PROMPT_VOCAB_SIZE"])  # fmt: skip
        table = got["OUT_PROMPT_EMBEDDING_TABLE"].reshape(count, budget, -1)
        worst = max(worst, _distance(table.astype(np.float32), own.tokens[:count]) / float(np.abs(own.tokens).max()))
        rows.append(got["OUT_PROMPT_VOCAB_SIZE"].tolist())
    wanted = [[[budget]], [[2 * budget]], [[2 * budget]] * 3]
    report.row("multimodal_ifb, encoder", f"rows {rows}, max difference {worst:.1e} of the largest (float16 pixels)",
               rows == wanted and worst < 5e-3)  # fmt: skip


def check_configs(report: Report, bundle: Path, work: Path) -> None:
    """Every config.pbtxt of every layout by Triton's own schema."""
    from google.protobuf import text_format
    from tritonclient.grpc import model_config_pb2

    from holov_export.serve.triton.config_text import text_from_config
    from holov_export.serve.triton.graph_models import graph_config

    opened, texts = open_bundle(bundle, verify="size"), []
    layouts: tuple[Layout, ...] = ("holov", "multimodal_ifb", "onnxruntime")
    for layout in layouts:
        request = RepositoryRequest(ModelSettings(bundle="", decoder=DECODER), layout, overwrite=True)
        write_repository(opened, request, work / f"parsed-{layout}")
        texts += [path.read_text() for path in sorted((work / f"parsed-{layout}").glob("*/config.pbtxt"))]
    texts.append(text_from_config(graph_config(opened, "tensorrt", instances=2, gpu=True)))
    parsed = [text_format.Parse(text, model_config_pb2.ModelConfig()) for text in texts]
    tensors = sum(len(config.input) + len(config.output) for config in parsed)
    report.row("config.pbtxt", f"{len(parsed)} parsed, {tensors} tensors", len(parsed) == 8)


def _distance(left: np.ndarray, right: np.ndarray) -> float:
    return float(np.abs(left - right).max()) if left.shape == right.shape else float("inf")


def check_bundle(report: Report, folder: Path, work: Path, budgets: Sequence[int], length: int) -> None:
    """Everything about one bundle."""
    name = folder.name
    print(name, flush=True)
    request = RepositoryRequest(ModelSettings(bundle="", decoder=DECODER, threads=1), overwrite=True)
    repository = work / f"repository-{name}"
    write_repository(open_bundle(folder), request, repository)
    began = time.perf_counter()
    with Session.open(folder, decoder=DECODER, provider="cpu", threads=1) as session:
        session.decoder  # noqa: B018  loads it
        with running(work / "server", repository, work) as server:
            seconds = time.perf_counter() - began
            ready = [server.http.is_model_ready(model.name) for model in repository.iterdir() if model.is_dir()]
            report.row(f"{name}: server ready", f"{seconds:.1f} s, {sum(ready)} models", sum(ready) == 5)
            checks: list[Callable[[], None]] = [
                lambda: check_vision(report, server, session, budgets),
                lambda: check_batches(report, server, session, budgets),
                lambda: check_answers(report, server, session, budgets, length),
                lambda: check_refusals(report, server, session.bundle.manifest.plan.tokens),
                lambda: check_crowd(report, server, session, budgets, length),
            ]
            if length > 16:
                checks.append(lambda: check_leaving(report, server, 1500))
            for check in checks:
                check()
            check_end(report, server)


def check_end(report: Report, server: Server) -> None:
    """SIGTERM ends the server and its processes."""
    stubs = server.stubs()
    server.close()
    began = time.perf_counter()
    server.process.send_signal(signal.SIGTERM)
    code = server.process.wait(60)
    seconds = time.perf_counter() - began
    left = [pid for pid in stubs if Path(f"/proc/{pid}").exists()]
    log = server.log.read_text(errors="replace").splitlines()
    faults = sum(word in line for line in log for word in ("internal error", "Traceback", "not healthy"))
    report.row("end", f"status {code} in {seconds:.1f} s, {len(stubs)} stubs of which {len(left)} are left, "
               f"{faults} tracebacks in the log", code == 0 and not left and stubs != [] and faults == 0)  # fmt: skip


def export(folder: Path) -> None:
    """The two bundles; needs the extra export."""
    from checkpoints import TinyLlava, write_checkpoint

    from holov_export.cli import run

    folder.mkdir(parents=True, exist_ok=True)
    checkpoint = write_checkpoint(folder.parent / "checkpoint", TinyLlava(context=2048))
    for name, model in (("demo", "demo"), ("random", str(checkpoint))):
        code = run(["export", "--model", model, "--output", str(folder / name), "--overwrite", "--no-verify"])
        if code:
            sys.exit(code)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="folder with server/ and bundles/; everything is written there")
    parser.add_argument("--export", type=Path, metavar="FOLDER", help="only export the bundles into this folder")
    options = parser.parse_args()
    if options.export:
        export(options.export)
        return
    work = options.work.resolve()
    report = Report()
    numpy_version = f"numpy {np.__version__}"
    print(f"Python {sys.version.split()[0]}, {numpy_version}, decoder {DECODER}")
    check_configs(report, work / "bundles" / "demo", work)
    check_bundle(report, work / "bundles" / "demo", work, (1, 16, 144), 16)
    check_bundle(report, work / "bundles" / "random", work, (1, 16, 64), 64)
    request = RepositoryRequest(
        ModelSettings(bundle="", threads=1), "multimodal_ifb", budget=16, copy_bundle=True, overwrite=True
    )
    write_repository(open_bundle(work / "bundles" / "demo"), request, work / "repository-ifb")
    with (
        Session.open(work / "bundles" / "demo", provider="cpu", threads=1) as session,
        running(work / "server", work / "repository-ifb", work) as server,
    ):
        check_encoder(report, server, session, 16)
        check_end(report, server)
    print()
    report.show()
    (work / "report.json").write_text(json.dumps({"good": report.good}) + "\n")
    sys.exit(not report.good)


if __name__ == "__main__":
    if "--export" not in sys.argv:
        from triton_server import Server, running
    main()
