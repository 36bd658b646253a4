"""Tables of documents about precisions: what they cost on a CPU, what they lose, what the demo model still answers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from answer_tables import markdown, read

#: tower of scripts/bench_precisions -> what it is called
TOWERS = {"1": "as drawn", "15": "six channels times 15"}
_HEAD = ("", "time", "MB", "overlap, worst", "mean", "cosine, worst", "error of the saliency")
#: of scripts/evaluate_precisions -> what was exported
EXPORTS = {
    "fp16": "`--fp16`",
    "int8": "`--int8`",
    "fp16-int8": "`--fp16 --int8`",
    "int8-cpu": "`--int8 --quantize-for cpu`",
    "fp8": "`--fp8`",
    "int4-decoder": "`--decoder-precision int4`",
    "int8-kv": "`--decoder-kv-cache int8`",
    "int4-int8-kv": "both of the last two",
}


def ways_block() -> str:
    """docs/cpu.md: time and loss of every way to run the true-size tower."""
    result = read("precisions-cpu.json")
    parts = []
    for tower, title in TOWERS.items():
        rows = [_row(name, row) for name, row in result["towers"][tower]["ways"].items()]
        parts += [f"Random weights, {title}:", "", *markdown(_HEAD, rows), ""]
    return "\n".join([*parts, _about(result)])


def openvino_block() -> str:
    """docs/cpu.md: OpenVINO's float32 beside the others, in one run of its own environment."""
    result = read("precisions-openvino-cpu.json")
    ways = result["towers"]["1"]["ways"]
    rows = [[name, f"{row['cpu_ms']:.0f}", *_row("", row)[1:]] for name, row in ways.items() if "Q/DQ" not in name]
    head = ("", "ms", *_HEAD[1:])
    return "\n".join([*markdown(head, rows), "", _about(result)])


def kept_block() -> str:
    """docs/cpu.md: what it takes to keep layers in float."""
    result = read("precisions-cpu.json")
    parts = []
    for tower, title in TOWERS.items():
        found = result["towers"][tower]
        rows = [_row("0", found["ways"]["int8 for CPU"])]
        rows += [_row(number, row) for number, row in found["layers_kept_in_float"].items()]
        head = ("first layers kept", *_HEAD[1:])
        parts += [f"Random weights, {title}:", "", *markdown(head, rows), ""]
    return "\n".join(parts)


def error_block() -> str:
    """docs/cpu.md: the overlap that an error of the saliency costs by itself."""
    result = read("precisions-cpu.json")
    first, second = (result["towers"][tower]["overlap_by_error"] for tower in TOWERS)
    rows = [
        [
            error,
            *(f"{row[error]['overlap_mean']:.3f}" for row in (first, second)),
            *(f"{row[error]['draws_with_min_0.97']:.0%}" for row in (first, second)),
        ]
        for error in first
    ]
    titles = tuple(TOWERS.values())
    head = ["error", *(f"mean overlap, {title}" for title in titles)]
    head += [f"draws whose worst is above 0.97, {title}" for title in titles]
    return "\n".join(markdown(head, rows))


def demo_block() -> str:
    """docs/quantize.md: answers of the demo model in every precision."""
    result = read("demo-precisions.json")
    budget = min(result["tokens"], *(at["budget"] for at in _first(result)["answers"]["at"]))
    rows = [
        [
            EXPORTS[name],
            *(_answers(at) for at in found["answers"]["at"]),
            _right(found, budget),
            _gate(found),
        ]
        for name, found in result["precisions"].items()
    ]
    budgets = [at["budget"] for at in _first(result)["answers"]["at"]]
    head = ["", *(f"same answers, {number} tokens" for number in budgets), f"right, {budget} tokens", "its gate"]
    before = next(at for at in _first(result)["answers"]["at"] if at["budget"] == budget)["before"]
    note = (
        f"% of {result['questions']} answers on {result['scenes']} held-out scenes that are those of the fp32 bundle "
        f"[95 % interval, drawing whole scenes]; the fp32 bundle has {_percent(before)} % right at {budget} tokens. "
        f"The gate is that of `smoke-8`, whose photographs show no digits; its losses were accepted. "
        f"{result['machine']['cpu']}, {result['date'][:10]}, `scripts/evaluate_precisions.py`."
    )
    return "\n".join([*markdown(head, rows), "", note])


def readme_block() -> str:
    """README: the demo model's answers, and what int8 takes on a CPU."""
    ways = {tower: read("precisions-cpu.json")["towers"][tower]["ways"] for tower in TOWERS}
    plain, int8 = ways["1"]["ORT fp32"], ways["1"]["int8 for CPU"]
    shares = sorted({f"{rows['int8 for CPU']['ratio_to_ort_fp32']:.2f}" for rows in ways.values()})
    said = (
        f"On a CPU the int8 form takes {' to '.join(shares)} of float32's time and "
        f"{int8['megabytes'] / plain['megabytes']:.2f} of its size on the true-size tower; what it loses there is in "
        "[docs/cpu.md](docs/cpu.md)."
    )
    return f"{demo_block()}\n\n{said}"


def _first(result: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = next(iter(result["precisions"].values()))
    return found


def _answers(at: dict[str, Any]) -> str:
    return _percent(at["loyalty"])


def _right(found: dict[str, Any], budget: int) -> str:
    return _percent(next(at for at in found["answers"]["at"] if at["budget"] == budget)["after"])


def _gate(found: dict[str, Any]) -> str:
    gate = found["gate"]
    return "" if gate is None else "passed" if gate["passed"] else "refused"


def _percent(value: dict[str, Any]) -> str:
    """ "98.8 [97.8, 99.6]"."""
    middle = f"{100 * value['value']:.1f}"
    if value.get("low") is None:
        return middle
    return f"{middle} [{100 * value['low']:.1f}, {100 * value['high']:.1f}]"


def _row(name: str, row: dict[str, Any]) -> list[str]:
    """Time as a share of ONNX Runtime's float32, and what was lost."""
    return [name, f"{row['ratio_to_ort_fp32']:.2f}", *_loss(row)]


def _loss(row: dict[str, Any]) -> Iterator[str]:
    for key, form in (
        ("megabytes", ".0f"),
        ("overlap_min", ".3f"),
        ("overlap_mean", ".3f"),
        ("cosine_min", ".4f"),
        ("saliency_error", ".3f"),
    ):
        yield "" if key not in row else format(row[key], form)


def _about(result: dict[str, Any]) -> str:
    machine = result["machine"]
    libraries = machine["libraries"]
    version = libraries.get("onnxruntime") or f"{libraries['onnxruntime-openvino']} with OpenVINO"
    budgets = " and ".join(map(str, result["budgets"]))
    return (
        f"Times are shares of ONNX Runtime's float32, medians of {result['repeats']} interleaved rounds of process CPU "
        f"time, {result['threads']} thread; {len(result['pictures'])} pictures that nothing was calibrated on, at "
        f"{budgets} of 576 tokens, against torch; {machine['cpu']}, ONNX Runtime {version}, "
        f"{result['date'][:10]} (`scripts/bench_precisions`)."
    )
