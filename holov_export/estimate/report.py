"""An estimate: whether a model fits a target, and how long it takes at several budgets, before anyone owns the target.

A roofline with stated shares, not a measurement. docs/estimates.md compares it with published figures.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from holov_export.errors import BudgetError, UsageError
from holov_export.estimate.memory import RUNTIME_BYTES, Memory, memory_of
from holov_export.estimate.roofline import SHARES, WEIGHT_BYTES, Machine, format_of
from holov_export.estimate.shapes import ModelShape
from holov_export.estimate.stages import SELECTION_KERNELS, STEP_KERNELS, prefill_seconds, step_seconds, vision_seconds
from holov_export.policies import Frozen
from holov_export.spec import CacheType, DecoderPrecision
from holov_export.targets import EngineTarget, TargetPrecision


class BudgetRow(Frozen):
    """What one token budget costs. Milliseconds; tokens a second of all sequences together; bytes."""

    budget: int
    vision_ms: float
    prefill_ms: float
    ttft_ms: float
    decode_tokens_per_s: float
    prompt_kv_bytes: int
    memory: Memory
    memory_bytes: int


class Estimate(Frozen):
    """The whole answer.

    Attributes:
        kv_cache: what keys and values are stored in. context: tokens that each sequence's KV cache has room for.
        fits: whether every row fits. context_that_fits: the longest context with which the largest budget would.
    """

    model: str
    target: str
    precision: TargetPrecision
    decoder_precision: DecoderPrecision
    kv_cache: CacheType = "float"
    batch: int
    context: int
    text_tokens: int
    usable_bytes: int
    fits: bool
    context_that_fits: int
    rows: tuple[BudgetRow, ...]
    assumptions: tuple[str, ...]


def estimate(
    shape: ModelShape,
    target: EngineTarget,
    *,
    precision: TargetPrecision,
    decoder: DecoderPrecision,
    kv_cache: CacheType = "float",
    budgets: Sequence[int] = (),
    batch: int = 1,
    context: int | None = None,
    text_tokens: int = 32,
) -> Estimate:
    """Estimate `shape` on `target` for all tokens, a third, a ninth and `budgets`.

    Args:
        shape: the model.
        target: the board or GPU.
        precision: of the vision engine. decoder: of the decoder's weights. kv_cache: of its keys and values.
        budgets: further token budgets, 1..N.
        batch: images, and sequences, at once.
        context: tokens that the KV cache has room for; None is the model's longest sequence.
        text_tokens: of the prompt beside the image.

    Raises:
        UsageError: a precision that the target lacks, or a context that the model lacks or the prompt exceeds.
        BudgetError: a budget outside 1..N.
    """
    check_precision(target, precision, "vision engine")
    layers: TargetPrecision = decoder.value
    _check_rate(target, "fp16" if layers == "int4" else layers, "decoder")
    tokens = shape.vision.tokens
    asked = _budgets(tokens, budgets)
    room = shape.decoder.context if context is None else context
    _check_context(shape, room, asked[0] + text_tokens)
    rows = tuple(
        _row(
            shape,
            target,
            precision,
            layers,
            budget,
            kv_cache=kv_cache,
            batch=batch,
            context=room,
            text_tokens=text_tokens,
        )
        for budget in asked
    )
    return Estimate(
        model=shape.name,
        target=target.name,
        precision=precision,
        decoder_precision=decoder,
        kv_cache=kv_cache,
        batch=batch,
        context=room,
        text_tokens=text_tokens,
        usable_bytes=target.usable_bytes,
        fits=all(row.memory_bytes <= target.usable_bytes for row in rows),
        context_that_fits=min(shape.decoder.context, _context_that_fits(rows[0], room, target.usable_bytes)),
        rows=rows,
        assumptions=_assumptions(shape, target, precision, layers, kv_cache),
    )


def check_precision(target: EngineTarget, precision: TargetPrecision, part: str) -> None:
    """Refuse a precision that `target` lacks.

    Raises:
        UsageError: with the reason and what it has instead.
    """
    _check_rate(target, precision, part)
    if not target.supports(precision):
        raise _refused(target, precision, part, f"engines of TensorRT {target.tensorrt} are not built in it there")


def _check_rate(target: EngineTarget, precision: TargetPrecision, part: str) -> None:
    """Refuse a precision that the GPU lacks. The decoder needs no more than that: TensorRT does not run it."""
    if target.rate(precision) is None:
        reason = f"compute capability {target.compute_capability} has no {precision} rate in its target file"
        raise _refused(target, precision, part, reason)


def _refused(target: EngineTarget, precision: TargetPrecision, part: str, reason: str) -> UsageError:
    return UsageError(
        f"the {part} cannot be {precision} on {target.title}: {reason}.",
        hint=f"It has: {', '.join(target.precisions)}.",
    )


def _budgets(tokens: int, asked: Sequence[int]) -> list[int]:
    for budget in asked:
        if not 1 <= budget <= tokens:
            raise BudgetError(f"the budget {budget} is outside 1..{tokens}.", hint=f"The model has {tokens} tokens.")
    return sorted({tokens, max(1, tokens // 3), max(1, tokens // 9), *asked}, reverse=True)


def _check_context(shape: ModelShape, context: int, prompt: int) -> None:
    longest = shape.decoder.context
    if context > longest:
        raise UsageError(f"a context of {context} tokens is more than the {longest} that {shape.name} was made for.")
    if prompt > context:
        raise UsageError(
            f"a prompt of {prompt} tokens (all visual tokens and the text) exceeds the context of {context}.",
            hint="Ask for a longer --context.",
        )


def _row(
    shape: ModelShape,
    target: EngineTarget,
    precision: TargetPrecision,
    layers: TargetPrecision,
    budget: int,
    *,
    kv_cache: CacheType,
    batch: int,
    context: int,
    text_tokens: int,
) -> BudgetRow:
    machine = Machine(target)
    seen, read = format_of(target, precision), format_of(target, layers)
    if kv_cache == "int8":  # one scale for each channel of all tokens: nothing that grows with them
        read = replace(read, stored=1.0)
    prompt = budget + text_tokens
    vision = vision_seconds(machine, shape, seen, budget=budget, batch=batch)
    prefill = prefill_seconds(machine, shape, read, read, prompt=prompt, batch=batch)
    step = step_seconds(machine, shape, read, read, past=prompt, batch=batch)
    memory = memory_of(shape, seen, read, read, prompt=prompt, context=context, batch=batch)
    return BudgetRow(
        budget=budget,
        vision_ms=vision * 1e3,
        prefill_ms=prefill * 1e3,
        ttft_ms=(vision + prefill) * 1e3,
        decode_tokens_per_s=batch / step,
        prompt_kv_bytes=memory.kv_cache * prompt // context,
        memory=memory,
        memory_bytes=memory.total,
    )


def _context_that_fits(row: BudgetRow, context: int, usable: int) -> int:
    """Tokens that the KV cache would have room for if it took all that the rest leaves; 0 if the rest is too much."""
    rest = row.memory_bytes - row.memory.kv_cache
    return max(0, (usable - rest) * context // row.memory.kv_cache)


def _assumptions(
    shape: ModelShape,
    target: EngineTarget,
    precision: TargetPrecision,
    layers: TargetPrecision,
    kv_cache: CacheType,
) -> tuple[str, ...]:
    """What the numbers rest on, one sentence each."""
    shared = ", shared by CPU and GPU" if target.unified_memory else ""
    number = 1 if kv_cache == "int8" else 4 if layers == "fp32" else 2
    kept = f"{target.reserved_gb:g} of {target.memory_gb:g}"
    bandwidth, rate = f"{target.bandwidth_gbs:g} GB/s", f"{target.rate(precision):g} T/s"
    products = f"matrix products reach {SHARES.product:.0%} of the dense {precision} rate, {rate}"
    steps = f" and a loop of {STEP_KERNELS} for each token of the budget" if shape.vision.greedy else ""
    attention = f"attention reaches {SHARES.attention:.0%} of the fp16 rate"
    attention += ", in float32 of the fp32 rate" if "fp32" in (precision, layers) else ""
    said = [
        "nothing of this was measured on the target: peak rates, and the share of them that kernels commonly reach",
        f"{products}; less where they have fewer tiles than the GPU has multiprocessors",
        f"{attention}, memory {SHARES.bandwidth:.0%} of {bandwidth}",
        f"a kernel costs {SHARES.kernel_seconds * 1e6:g} us, the selection is {SELECTION_KERNELS} small ones{steps}",
        "preprocessing and the host's own time are not counted",
        f"decoder weights take {WEIGHT_BYTES[layers]:g} bytes each, keys and values {number}",
        f"the runtime takes {RUNTIME_BYTES / 2**30:g} GiB; the system keeps {kept} GiB{shared}",
        "the GPU runs at its highest clocks; in a lower power mode it is slower",
    ]
    vision = shape.vision
    if vision.view_rows:
        seen = f"{vision.views} views of {vision.view_rows} rows" if vision.views > 1 else f"{vision.rows} patches"
        said.insert(1, f"the picture or clip has {vision.tokens} tokens, and the tower sees {seen}")
    if layers == "int4":
        said.insert(2, f"products with 4-bit weights reach {SHARES.weight_only:.0%} of the fp16 rate")
    if "fp32" in (precision, layers):
        said.insert(2, "float32 products run outside the tensor cores; where TensorRT chooses TF32 they are faster")
    return tuple(said)
