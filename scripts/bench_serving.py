#!/usr/bin/env python3
"""What pruning does for a server: throughput and time to the first token under 1 to 32 clients.

Starts `holov-export serve` with the demo model (144 tokens an image), and with a random model that has 576 as
LLaVA-1.5 has. Clients ask in a closed loop, each its next question when its last answer has ended, at all tokens, at a
ninth, and with the budget controller. Rounds interleave the modes, so that a busy minute hits all of them; the table
shows medians over rounds.

Exit code 1 if an answer failed, or if a ninth of the tokens did not answer more requests a second than all of them at
some number of clients.
"""

from __future__ import annotations

import argparse
import asyncio
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import httpx
from machine import one_line, write_result
from rich.console import Console
from rich.table import Table
from serving_process import Reply, ServerProcess, chat_body, demo_scenes, streamed

CLIENTS = (1, 4, 8, 16, 32)
#: name -> (tokens of an answer at most, the target of the controller, requests of each client, at least so many)
MODELS = {"demo": (8, "150ms", 8, 120), "576": (16, "2000ms", 1, 6)}


@dataclass(frozen=True)
class Mode:
    """How a request is answered: by which server, and with which budget."""

    name: str
    server: ServerProcess
    budget: int | None


@dataclass(frozen=True)
class Run:
    """One closed loop. Seconds, and requests a second.

    Attributes:
        ttfts: as the clients see them. in_target: their share; server_in_target: of those that the server counts,
            which begin when a request is read and its picture decoded.
        cpu_seconds: of the server, for each request.
    """

    mode: str
    clients: int
    requests: int
    errors: int
    throughput: float
    cpu_seconds: float
    ttft_p50: float
    ttft_p99: float
    total_p50: float
    budget: float
    ttfts: tuple[float, ...]
    in_target: float
    server_in_target: float


def exported(name: str, work: Path) -> Path:
    """The bundle of a model."""
    bundle, source = work / f"bundle-{name}", "demo"
    if bundle.exists():
        return bundle
    if name != "demo":
        from serving_model import write_checkpoint

        source = str(work / "checkpoint")
        write_checkpoint(Path(source))
    line = [sys.executable, "-c", "from holov_export.cli import main; main()"]
    subprocess.run([*line, "--model", source, "--output", str(bundle), "--no-verify"], check=True, capture_output=True)
    return bundle


async def closed_loop(mode: Mode, model: str, clients: int, requests: int, max_tokens: int) -> list[Reply]:
    """Answers of so many clients that ask one after the other until all requests are asked."""
    scenes, asked = demo_scenes(), iter(range(requests))
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)

    async with httpx.AsyncClient(timeout=600, limits=limits) as http:

        async def client() -> list[Reply]:
            mine = []
            for number in asked:
                scene = scenes[number % len(scenes)]
                body = chat_body(model, scene, stream=True, max_tokens=max_tokens, budget=mode.budget)
                mine.append(await streamed(http, mode.server.url, body))
            return mine

        return [reply for mine in await asyncio.gather(*(client() for _ in range(clients))) for reply in mine]


def measured(mode: Mode, model: str, clients: int, requests: int, max_tokens: int, target: float) -> Run:
    began, busy = time.perf_counter(), mode.server.cpu_seconds
    replies = asyncio.run(closed_loop(mode, model, clients, requests, max_tokens))
    seconds = time.perf_counter() - began
    good = [reply for reply in replies if reply.status == 200]
    if not good:
        raise SystemExit(f"no request was answered: {replies[:3]}")
    firsts = sorted(reply.first for reply in good)
    return Run(
        mode=mode.name,
        clients=clients,
        requests=requests,
        errors=requests - len(good),
        throughput=len(good) / seconds,
        cpu_seconds=(mode.server.cpu_seconds - busy) / requests,
        ttft_p50=quantile(firsts, 0.5),
        ttft_p99=quantile(firsts, 0.99),
        total_p50=median(reply.total for reply in good),
        budget=sum(reply.budget for reply in good) / len(good),
        ttfts=tuple(round(first, 4) for first in firsts),
        in_target=sum(first <= target for first in firsts) / len(firsts),
        server_in_target=sum(reply.server_first <= target for reply in good) / len(good),
    )


def quantile(ranked: Sequence[float], share: float) -> float:
    """The value that this share of the ranked ones does not pass."""
    return ranked[min(len(ranked) - 1, int(share * len(ranked)))]


def joined(runs: Sequence[Run]) -> dict[str, Any]:
    """Rounds of one mode and number of clients: medians of rates, quantiles over all requests."""
    firsts = sorted(first for run in runs for first in run.ttfts)
    return {
        "mode": runs[0].mode,
        "clients": runs[0].clients,
        "requests": sum(run.requests for run in runs),
        "errors": sum(run.errors for run in runs),
        "requests_per_second": round(median(run.throughput for run in runs), 3),
        "cpu_seconds_per_request": round(median(run.cpu_seconds for run in runs), 5),
        "ttft_p50_seconds": round(quantile(firsts, 0.5), 4),
        "ttft_p99_seconds": round(quantile(firsts, 0.99), 4),
        "answer_p50_seconds": round(median(run.total_p50 for run in runs), 4),
        "mean_budget": round(sum(run.budget for run in runs) / len(runs), 1),
        "share_within_target": round(sum(run.in_target for run in runs) / len(runs), 3),
        "server_share_within_target": round(sum(run.server_in_target for run in runs) / len(runs), 3),
        "requests_per_second_of_rounds": [round(run.throughput, 3) for run in runs],
    }


def bench(name: str, bundle: Path, options: argparse.Namespace) -> dict[str, Any]:
    """All runs over one model."""
    max_tokens, target, each, least = MODELS[name]
    shared = ["--threads", str(options.threads), "--decoder", options.decoder, "--streams", str(options.streams)]
    with ExitStack() as stack:
        fixed = stack.enter_context(ServerProcess(bundle, *shared))
        entry = httpx.get(f"{fixed.url}/v1/models").json()["data"][0]
        tokens, model, engine = entry["holov"]["tokens"], entry["id"], entry["holov"]["engine"]
        smallest, ninth = max(1, tokens // 18), tokens // 9
        guided = stack.enter_context(
            ServerProcess(
                bundle, *shared, "--target-ttft", target, "--min-budget", str(smallest), "--max-budget", str(tokens)
            )
        )
        modes = [
            Mode(f"{tokens} tokens", fixed, tokens),
            Mode(f"{ninth} tokens", fixed, ninth),
            Mode(f"controller, {target}", guided, None),
        ]
        seconds = float(target.removesuffix("ms")) / 1000
        runs: list[Run] = []
        for turn in range(options.rounds + 1):
            for clients in options.clients:
                requests = max(least, clients * each) if turn else clients  # the first round warms up
                for mode in modes[turn % 3 :] + modes[: turn % 3]:
                    run = measured(mode, model, clients, requests, max_tokens, seconds)
                    if turn:
                        runs.append(run)
            print(f"{name}: round {turn} of {options.rounds}", file=sys.stderr, flush=True)
        batches = fixed.metrics()
    rows = [
        joined([run for run in runs if (run.mode, run.clients) == (mode.name, clients)])
        for clients in options.clients
        for mode in modes
    ]
    return {
        "model": name,
        "tokens": tokens,
        "engine": engine,
        "new_tokens_at_most": max_tokens,
        "target_ttft_seconds": seconds,
        "controller_range": [smallest, tokens],
        "mean_vision_batch": round(
            batches["holov_vision_batch_images_sum"] / batches["holov_vision_batch_images_count"], 2
        ),
        "rows": rows,
    }


def show(found: dict[str, Any]) -> None:
    table = Table(
        "clients", "mode", "requests/s", "CPU ms each", "TTFT p50 ms", "p99 ms", "answer p50 ms", "budget", "errors"
    )
    table.add_column("in target")
    table.add_column("(server)")
    for row in found["rows"]:
        times = [f"{row[key] * 1000:,.0f}" for key in ("ttft_p50_seconds", "ttft_p99_seconds", "answer_p50_seconds")]
        shares = [f"{row[key]:.0%}" for key in ("share_within_target", "server_share_within_target")]
        rate = f"{row['requests_per_second']:.2f}"
        guided = row["mode"].startswith("controller")
        times.insert(0, f"{row['cpu_seconds_per_request'] * 1000:,.1f}")
        cells = [str(row["clients"]), row["mode"], rate, *times, f"{row['mean_budget']:.0f}", str(row["errors"])]
        table.add_row(*cells, *shares, end_section=guided)
    print(f"\n{found['model']}: {found['engine']}")
    Console(width=130).print(table)


def faults(found: dict[str, Any]) -> list[str]:
    """What is not as it must be."""
    wrong = [
        f"{row['errors']} errors: {row['mode']}, {row['clients']} clients" for row in found["rows"] if row["errors"]
    ]
    rates: dict[int, list[float]] = {}
    for row in found["rows"]:
        rates.setdefault(row["clients"], []).append(row["requests_per_second"])
    for clients, (whole, ninth, _) in rates.items():
        if ninth <= whole:
            wrong.append(f"{found['model']}, {clients} clients: {ninth} requests/s pruned, {whole} with all tokens")
    return wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), help="(demo 576)")
    parser.add_argument("--clients", nargs="+", type=int, default=list(CLIENTS), help="(1 4 8 16 32)")
    parser.add_argument("--rounds", type=int, default=3, help="of each (3)")
    parser.add_argument("--decoder", default="auto", help="of the server (auto)")
    parser.add_argument("--streams", type=int, default=8, help="of the server (8)")
    parser.add_argument("--threads", type=int, default=1, help="of the server (1: clients need a core as well)")
    parser.add_argument("--work", type=Path, help="keeps bundles here (a temporary folder)")
    parser.add_argument("--json", type=Path, help="write the result here as well")
    options = parser.parse_args()
    print(one_line())
    with tempfile.TemporaryDirectory(prefix="bench-serving-") as temporary:
        work = options.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        results = [bench(name, exported(name, work), options) for name in options.models]
    for found in results:
        show(found)
    wrong = [fault for found in results for fault in faults(found)]
    print("\n".join(wrong) or "pruning answers more requests a second at every number of clients; no errors")
    if options.json:
        settings = {"streams": options.streams, "threads": options.threads, "rounds": options.rounds}
        write_result(options.json, {**settings, "faults": wrong, "models": results})
    raise SystemExit(1 if wrong else 0)


if __name__ == "__main__":
    main()
