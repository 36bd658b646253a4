#!/usr/bin/env python3
"""The README's GPU tables, from the files that `measure` and `peers` wrote: numbers from there and nowhere else.

scripts/gpu/report [DIR]        print them (benchmarks/results)
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"
ENGINES, PEERS = "gpu-engines", "gpu-peers"
NOTHING = (
    "Nothing has been measured on a GPU yet. `scripts/gpu/run` measures engines and their PyTorch peers on a machine "
    "with a GPU and TensorRT ([how](scripts/gpu/README.md)); its results fill this block."
)

Json = dict[str, Any]


def gpu_block(folder: Path = RESULTS) -> str:
    """Markdown for every pair of result files; a sentence where there is none.

    Raises:
        ValueError: a file is a rehearsal, whose numbers say nothing.
    """
    suffixes = sorted({path.stem.removeprefix(ENGINES) for path in folder.glob(f"{ENGINES}*.json")}
                      | {path.stem.removeprefix(PEERS) for path in folder.glob(f"{PEERS}*.json")})  # fmt: skip
    parts = [_section(_read(folder / f"{ENGINES}{end}.json"), _read(folder / f"{PEERS}{end}.json")) for end in suffixes]
    return "\n\n".join(parts) if parts else NOTHING


def _read(path: Path) -> Json:
    """A result file, {} if there is none."""
    if not path.is_file():
        return {}
    found: Json = json.loads(path.read_text(encoding="utf-8"))
    if found.get("rehearsal"):
        raise ValueError(f"{path.name} is a rehearsal on a CPU, not a measurement")
    return found


def _section(engines: Json, peers: Json) -> str:
    rows = [*_engine_rows(engines), *_peer_rows(peers)]
    batches = sorted({batch for _, times in rows for batch in times})
    lines = []
    if rows:
        lines += ["| GPU time of a batch, ms | " + " | ".join(f"B={batch}" for batch in batches) + " |"]
        lines += ["|---|" + "---:|" * len(batches)]
        for title, times in rows:
            lines.append(f"| {title} | " + " | ".join(_cell(times.get(batch)) for batch in batches) + " |")
        floor = _floor_row(peers, batches)
        lines += [floor] if floor else []
    statements = [*_statements(engines, peers)]
    lines += ["", *(f"- {statement}" for statement in statements)] if statements else []
    lines += [*_language_table(engines, peers)]
    lines += ["", _note(engines, peers)]
    return "\n".join(lines).strip()


def _cell(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}" if value < 10 else f"{value:.1f}"


# ---------------------------------------------------------------------------------------------------- encoders


def _cases(engines: Json) -> Iterator[tuple[Json, Json]]:
    """(contestant, case) of every measured case."""
    for report in engines.get("bench", []):
        infos = {one["label"]: one for one in report["contestants"]}
        for case in report["cases"]:
            yield infos[case["contestant"]], case


def _engine_rows(engines: Json) -> list[tuple[str, dict[int, float]]]:
    """(title, batch -> GPU ms) of every engine and budget."""
    rows: dict[str, dict[int, float]] = {}
    for info, case in _cases(engines):
        if "gpu" not in case:
            continue
        what = "plain" if info["method"] == "none" else info["method"]
        graphs = ", without CUDA graphs" if info["label"].endswith("no CUDA graphs") else ""
        if not graphs and info["engine"].endswith("no CUDA graphs"):  # the runner gave up; see its warning
            graphs = ", no CUDA graph could be made"
        title = f"TensorRT {_version(engines)}, {what} {info['precision']}, K={case['budget']}{graphs}"
        rows.setdefault(title, {})[case["batch"]] = case["gpu"]["p50"]
    return sorted(rows.items(), key=lambda row: ("without" in row[0], "uniform" in row[0]))


def _version(engines: Json) -> str:
    builds = engines.get("builds", [])
    return str(builds[0]["built_with"]["tensorrt"]) if builds else ""


def _peer_rows(peers: Json) -> list[tuple[str, dict[int, float]]]:
    """(title, batch -> GPU ms) of every way in PyTorch."""
    rows: dict[str, dict[int, float]] = {}
    for row in peers.get("peers", []):
        if "gpu" in row:
            rows.setdefault(f"PyTorch, {row['way']}, K={row['budget']}", {})[row["batch"]] = row["gpu"]["p50"]
    return list(rows.items())


def _floor_row(peers: Json, batches: Sequence[int]) -> str:
    """The counted operations at the matrix rate that was measured."""
    if "ceilings" not in peers:
        return ""
    rate, one = peers["ceilings"]["matrix_tflops"], peers["operations_per_image"]
    cells = " | ".join(_cell(batch * one["pruned"] / rate / 1e9) for batch in batches)
    what = f"{one['pruned'] / 1e12:.2f} TFLOP an image (K={one['budget']})"
    return f"| floor: {what} at the measured matrix peak | {cells} |"


def _time(
    cases: Sequence[tuple[Json, Json]], batch: int, budget: int | None, method: Callable[[str], bool]
) -> float | None:
    """GPU ms of the first matching case with CUDA graphs; `budget` None for any."""
    for info, case in cases:
        fits = case["batch"] == batch and (budget is None or case["budget"] == budget) and method(info["method"])
        if fits and "gpu" in case and not info["label"].endswith("no CUDA graphs"):
            return float(case["gpu"]["p50"])
    return None


def _selects(method: str) -> bool:
    return method not in ("none", "uniform")


def _statements(engines: Json, peers: Json) -> Iterator[str]:
    """What was asked for beforehand, with what came out."""
    for name in dict.fromkeys(row["bundle"] for row in engines.get("parity", [])):
        parity = [row for row in engines["parity"] if row["bundle"] == name]
        least, error = min(row["kept_in_common"] for row in parity), max(row["token_error"] for row in parity)
        yield (
            f"{name}: {least:.2%} or more of the tokens that float32 keeps in ONNX Runtime, over {len(parity)} "
            f"combinations of batch and budget; token error at most {error:.1e} of the largest value"
        )
    shapes = engines.get("shapes", [])
    if shapes:
        wrong = sum(bool(row["wrong"]) for row in shapes)
        yield f"{len(shapes)} combinations of batch and budget ran without a rebuild, {wrong} with a wrong result"
    cases = list(_cases(engines))
    first = next((info["method"] for info, _ in cases if _selects(info["method"])), "")
    shares = [case["selection"] for info, case in cases if "selection" in case and info["method"] == first]
    if shares:
        low, high = max(s["share"] for s in shares), max(s["share"] + s["mixed"] for s in shares)
        yield f"The selection's own layers: {low:.2%} of the engine's time at most, by profile ({_bound(low, high)})"
    yield from _ratio_statements(cases, peers)


def _bound(low: float, high: float) -> str:
    if high - low < 5e-4:
        return "no layer mixes it with others"
    return f"{high:.1%} if every layer that may hold some of it is counted whole"


def _ratio_statements(cases: Sequence[tuple[Json, Json]], peers: Json) -> Iterator[str]:
    budget = min((case["budget"] for info, case in cases if _selects(info["method"])), default=0)
    for batch in sorted({case["batch"] for _, case in cases}):
        ours = _time(cases, batch, budget, _selects)
        if ours is None:
            continue
        said = []
        plain = _time(cases, batch, None, lambda method: method == "none")
        uniform = _time(cases, batch, budget, lambda method: method == "uniform")
        if plain is not None:
            said.append(f"{ours / plain:.3f} of the plain engine's time")
        if uniform is not None:
            said.append(f"deciding takes {1 - uniform / ours:.1%} (against an engine with fixed positions)")
        for row in peers.get("peers", []):
            if row["batch"] == batch and "gpu" in row and (row["budget"] == budget or row["way"].startswith("plain")):
                said.append(f"{row['gpu']['p50'] / ours:.1f}x as fast as {row['way']}")
        if "ceilings" in peers:
            rate = next(
                case["tflops"]
                for info, case in cases
                if _selects(info["method"]) and (case["batch"], case["budget"]) == (batch, budget)
            )
            peak = peers["ceilings"]["matrix_tflops"]
            said.append(f"{rate:.0f} TFLOP/s, {rate / peak:.0%} of the measured matrix peak")
        yield f"B={batch}, K={budget}: {'; '.join(said)}"


# ---------------------------------------------------------------------------------------------------- language


def _language_table(engines: Json, peers: Json) -> list[str]:
    """Prefill, decoding, cache, and the engine before it: one line for each batch and number of visual tokens."""
    rows: dict[tuple[int, int], dict[str, Json]] = {}
    for row in peers.get("language", []):
        if "gpu" in row:
            rows.setdefault((row["batch"], row["visual_tokens"]), {})[row["way"]] = row
    if not rows:
        return []
    heads = ("language model", "visual tokens", "prompt", "prefill, ms", "vision engine + prefill, ms")
    heads += ("prefill and 32 steps, ms", "KV cache after prefill")
    lines = ["", f"| {' | '.join(heads)} |", "|---|" + "---:|" * (len(heads) - 1)]
    cases = list(_cases(engines))
    for (batch, visual), ways in sorted(rows.items(), key=lambda item: (item[0][0], -item[0][1])):
        one = next(iter(ways.values()))
        prefill = ways["prefill"]["gpu"]["p50"] if "prefill" in ways else None
        answer = next((row["gpu"]["p50"] for way, row in ways.items() if way != "prefill"), None)
        # all tokens come from the plain engine, fewer from the pruned one
        vision = _time(cases, batch, visual, lambda method: method == "none")
        vision = _time(cases, batch, visual, _selects) if vision is None else vision
        first = prefill + vision if prefill is not None and vision is not None else None
        cache = f"{one['cache_bytes_after_prefill'] / 2**20:.0f} MiB"
        cells = [str(visual), str(one["prompt_tokens"]), *(_cell(value) for value in (prefill, first, answer)), cache]
        lines.append(f"| B={batch} | {' | '.join(cells)} |")
    return lines


def _note(engines: Json, peers: Json) -> str:
    """Where, when and with what."""
    parts = []
    for name, found in (("engines", engines), ("PyTorch", peers)):
        if not found:
            parts.append(f"{name}: not measured")
            continue
        machine = found["machine"]
        gpu = machine.get("gpu")
        where = f"{gpu['name']}, driver {gpu.get('driver') or '?'}, CUDA {gpu['cuda']}" if gpu else machine["cpu"]
        names = ("torch", "tensorrt")
        versions = [f"{item['name']} {item['version']}" for item in machine["libraries"] if item["name"] in names]
        if name == "engines":
            versions = [f"TensorRT {_version(found)}"]
        parts.append(f"{name}: {where}, {', '.join(versions)}, {found['date'][:10]} (`{found['command']}`)")
    ceilings = peers.get("ceilings")
    if ceilings:
        parts.append(
            f"ceilings: {ceilings['matrix_tflops']:.0f} TFLOP/s for two {ceilings['matrix']} x {ceilings['matrix']} "
            f"{ceilings['dtype']} matrices of random numbers, copy {ceilings['copy_gbs'] / 1e3:.2f} TB/s"
        )
    failed = [f"{entry['step']} ({entry['outcome']})" for found in (engines, peers) for entry in found.get("steps", [])
              if entry["outcome"] != "done"]  # fmt: skip
    if failed:
        parts.append(f"not there: {', '.join(failed)}")
    return (
        "CLIP ViT-L/14-336 with LLaVA-1.5-7B's projector and a LLaMA-7B-shaped language model, random weights; medians "
        f"of interleaved runs, inputs on the device already. {'; '.join(parts)}."
    )


def main() -> int:
    try:
        print(gpu_block(Path(sys.argv[1]) if len(sys.argv) > 1 else RESULTS))
    except ValueError as error:
        print(f"no report: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
