#!/usr/bin/env python3
"""What the engines are compared with: PyTorch on the same GPU, in one run.

    scripts/gpu/peers --minutes 8 --json OUT.json
    scripts/gpu/peers --rehearse --json OUT.json        tiny sizes on the CPU, to see that it runs

In this order, so that what matters most is there when time runs out:

    ceilings    a product of two 8192 x 8192 fp16 matrices of random numbers, a copy on the device
    encoders    B = 1, 4, 16: the official way (eager attention with every map, the published loop), the plain encoder
                with fused attention, ours; the latter two through torch.compile with CUDA graphs as well
    language    a LLaMA-7B-shaped model with random fp16 weights: prefill of the text and 576, 192 or 64 visual tokens,
                32 decoding steps, bytes of the KV cache; at the first batch after its encoders, at the others last

Times of the GPU are between two events around the work, its inputs on the device already. Ways are timed in interleaved
rounds after a warm-up until steady. A step that fails is noted in the file and the others go on.
"""

from __future__ import annotations

import argparse
import gc
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

from encoder_models import WeightsInMemory, spec_of_size, transformers_models  # noqa: E402
from official_way import official_tokens  # noqa: E402
from steps import Steps, numbers  # noqa: E402

from holov_export.policies import HolovPolicy  # noqa: E402
from holov_export.spec import ModelSpec, Precision  # noqa: E402
from holov_export.verify.bench import Case, OnDevice, measure, warm_up  # noqa: E402
from holov_export.verify.operations import encoder_operations  # noqa: E402
from holov_export.vision.clip import LlavaVision, vision_from_checkpoint  # noqa: E402
from holov_export.vision.clip_layers import take_rows  # noqa: E402

#: words of a short question in LLaVA-1.5's template, in tokens
TEXT_TOKENS = 35
DECODE_STEPS = 32
#: a compiled module compiles in its first call, and captures its CUDA graph in its second or third
FIRST_CALLS = 3
OFFICIAL, PLAIN, OURS = "official, eager", "plain, SDPA", "ours, eager"


@dataclass(frozen=True)
class Sizes:
    """How large everything is: true size, or tiny for a rehearsal."""

    device: str
    matrix: int
    copied_bytes: int
    spec: ModelSpec
    llama: dict[str, int]
    visual: tuple[int, ...]

    @property
    def dtype(self) -> torch.dtype:
        return torch.float16 if self.device == "cuda" else torch.float32


def sizes_of(rehearse: bool) -> Sizes:
    """True sizes for a GPU, tiny ones for the CPU."""
    if not rehearse:
        llama = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
        return Sizes("cuda", 8192, 4 << 30, spec_of_size(24), {**llama, "vocab_size": 32064}, (576, 192, 64))
    spec = spec_of_size(2)
    vision = spec.vision.model_copy(update={"image_size": 56, "width": 32, "heads": 2, "mlp_width": 64})
    decoder = spec.decoder.model_copy(update={"width": 48, "heads": 2, "kv_heads": 2, "head_width": 24})
    llama = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    tiny = spec.model_copy(update={"vision": vision, "decoder": decoder})
    return Sizes("cpu", 64, 1 << 20, tiny, {**llama, "vocab_size": 128}, (16, 4))


# ---------------------------------------------------------------------------------------------------- timing


def on_device(sizes: Sizes, action: Callable[[], Any]) -> Callable[[], OnDevice | None]:
    """Do it and wait; the GPU's own time between two events."""
    if sizes.device != "cuda":

        def on_cpu() -> None:
            action()

        return on_cpu
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    def on_gpu() -> OnDevice:
        start.record()
        action()
        end.record()
        end.synchronize()
        return OnDevice(start.elapsed_time(end) / 1e3)

    return on_gpu


def timed(
    sizes: Sizes, actions: Sequence[tuple[dict[str, Any], Callable[[], Any]]], rounds: int
) -> Iterator[dict[str, Any]]:
    """Warm up each, time all in interleaved rounds; `rows` with what was found. What cannot run says why."""
    cases: list[tuple[dict[str, Any], Case]] = []
    for row, action in actions:
        case = Case(row["way"], row["batch"], row.get("budget", 0), on_device(sizes, action))
        try:
            for _ in range(FIRST_CALLS):
                case.run()
            warm = warm_up(case.run, runs=60, seconds=5.0)
        except Exception as error:  # out of memory, or a compiler that gives up: the others go on
            yield {**row, "failed": f"{type(error).__name__}: {str(error)[:300]}"}
            continue
        cases.append(({**row, "warm_up": warm.model_dump()}, case))
    if not cases:
        return
    for (row, _), samples in zip(cases, measure([case for _, case in cases], rounds), strict=True):
        found = {"latency": samples.latency.model_dump()}
        if samples.gpu_time is not None:
            found["gpu"] = samples.gpu_time.model_dump()
        yield {**row, **found}


# ---------------------------------------------------------------------------------------------------- ceilings


def ceilings(steps: Steps, sizes: Sizes) -> None:
    """TFLOP/s of a large product of random numbers, GB/s of a copy (bytes read and written)."""
    side = sizes.matrix
    left, right = (torch.randn(side, side, device=sizes.device, dtype=sizes.dtype) for _ in range(2))
    out = torch.empty_like(left)
    source = torch.empty(sizes.copied_bytes, dtype=torch.uint8, device=sizes.device).random_()
    target = torch.empty_like(source)
    product, copy = list(
        timed(
            sizes,
            [
                ({"way": "product", "batch": 1}, partial(torch.mm, left, right, out=out)),
                ({"way": "copy", "batch": 1}, partial(target.copy_, source)),
            ],
            20,
        )
    )
    seconds = [(row.get("gpu") or row["latency"])["p50"] / 1e3 for row in (product, copy)]
    steps.found["ceilings"] = {
        "matrix": side,
        "matrix_tflops": round(2 * side**3 / seconds[0] / 1e12, 3),
        "copied_bytes": sizes.copied_bytes,
        "copy_gbs": round(2 * sizes.copied_bytes / seconds[1] / 1e9, 1),
        "dtype": str(sizes.dtype).removeprefix("torch."),
        "rows": [product, copy],
    }


# ---------------------------------------------------------------------------------------------------- encoders


class PlainTransformers(nn.Module):
    """transformers' tower with fused attention and LLaVA's projector: all N tokens."""

    def __init__(self, tower: Any, projector: Any, layer: int) -> None:
        super().__init__()
        self.tower, self.projector, self.layer = tower, projector, layer

    def forward(self, pixels: Tensor) -> Tensor:
        hidden = self.tower(pixels, output_hidden_states=True).hidden_states[self.layer + 1]
        rows: Tensor = self.projector(hidden[:, 1:])
        return rows


class FixedBudget(nn.Module):
    """Ours with the budget as a constant, which a compiler that knows fixed shapes alone can take."""

    def __init__(self, vision: LlavaVision, budget: int) -> None:
        super().__init__()
        self.vision, self.budget = vision, budget

    def forward(self, pixels: Tensor, quota: Tensor, asked: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        tower = self.vision.vision_tower
        x, layer = tower.before_feature_layer(pixels), tower.feature_layer
        normed, keys, values = layer.keys_and_values(x)
        saliency = layer.saliency(normed, keys)
        positions, counts, _ = self.vision.selection(saliency, None, quota, asked)
        positions = positions[:, : self.budget]
        index = positions.clamp_min(0) + 1
        hidden = layer.rows(take_rows(x, index), take_rows(normed, index), keys, values)
        tokens = self.vision.multi_modal_projector(hidden)
        real = (positions >= 0).unsqueeze(-1)
        return torch.where(real, tokens, torch.zeros((), dtype=tokens.dtype, device=tokens.device)), positions, counts


@dataclass(frozen=True)
class Encoders:
    """The same random weights in transformers' classes and in ours, on the device."""

    sizes: Sizes
    eager: Any
    plain: PlainTransformers
    projector: Any
    ours: LlavaVision

    @classmethod
    def made(cls, sizes: Sizes) -> Encoders:
        eager, sdpa, projector = transformers_models(sizes.spec)
        reader: Any = WeightsInMemory.from_models(eager, projector)
        ours = vision_from_checkpoint(sizes.spec, HolovPolicy(), reader, Precision.FP32)
        place = {"device": sizes.device, "dtype": sizes.dtype}
        eager, sdpa, projector = (module.to(**place) for module in (eager, sdpa, projector))
        plain = PlainTransformers(sdpa, projector, sizes.spec.vision.feature_layer)
        ours.selection.to(sizes.device)  # float32 in every precision
        ours.vision_tower.to(**place)
        ours.multi_modal_projector.to(**place)
        return cls(sizes, eager, plain, projector, ours)

    def actions(
        self, batch: int, budgets: Sequence[int], modes: Sequence[str]
    ) -> Iterator[tuple[dict[str, Any], Callable[[], Any]]]:
        """(row, action) of every way at one batch."""
        vision = self.sizes.spec.vision
        shape = (batch, vision.channels, vision.image_size, vision.image_size)
        pixels = torch.randn(shape, device=self.sizes.device, dtype=self.sizes.dtype)
        tokens, layer = vision.tokens, vision.feature_layer
        yield {"way": PLAIN, "batch": batch, "budget": tokens}, partial(self.plain, pixels)
        for mode in modes:
            compiled = torch.compile(self.plain, mode=mode, dynamic=False)
            row = {"way": f"plain, compiled {mode}", "batch": batch, "budget": tokens}
            yield row, partial(stepped, compiled, self.sizes, pixels)
        for budget in budgets:
            row = {"way": OFFICIAL, "batch": batch, "budget": budget}
            yield row, partial(official_tokens, self.eager, self.projector, pixels, budget, layer)
            quota = torch.full((batch,), budget, device=self.sizes.device)
            asked = torch.tensor([budget], device=self.sizes.device)
            fixed = FixedBudget(self.ours, budget)
            yield {"way": OURS, "batch": batch, "budget": budget}, partial(fixed, pixels, quota, asked)
            for mode in modes:
                compiled = torch.compile(fixed, mode=mode, dynamic=False)
                row = {"way": f"ours, compiled {mode}", "batch": batch, "budget": budget}
                yield row, partial(stepped, compiled, self.sizes, pixels, quota, asked)


def stepped(module: Callable[..., Any], sizes: Sizes, *arguments: Tensor) -> Any:
    """Call a compiled module; its CUDA graphs may then reuse the memory of the last outputs."""
    if sizes.device == "cuda":
        torch.compiler.cudagraph_mark_step_begin()
    return module(*arguments)


def check_ours(steps: Steps, encoders: Encoders, budget: int) -> None:
    """Ours and the plain encoder give the same rows at the kept positions; noted, and refused if they do not."""
    vision = encoders.sizes.spec.vision
    shape = (2, vision.channels, vision.image_size, vision.image_size)
    pixels = torch.randn(shape, device=encoders.sizes.device, dtype=encoders.sizes.dtype)
    quota = torch.full((2,), budget, device=encoders.sizes.device)
    asked = torch.tensor([budget], device=encoders.sizes.device)
    tokens, positions, counts = FixedBudget(encoders.ours, budget)(pixels, quota, asked)
    rows = encoders.plain(pixels)
    wanted = torch.gather(rows, 1, positions.clamp_min(0)[..., None].expand_as(tokens))
    error = float((tokens - wanted).float().abs().max() / rows.float().abs().max())
    steps.found["check"] = {"budget": budget, "counts": counts.tolist(), "token_error": error}
    if not error < 2e-2:
        raise RuntimeError(f"ours and the plain encoder differ: {error:.2e}")


def encode(
    steps: Steps, encoders: Encoders, batch: int, budgets: Sequence[int], modes: Sequence[str], rounds: int
) -> None:
    """All ways at one batch."""
    torch._dynamo.reset()
    steps.found["peers"] += list(timed(encoders.sizes, list(encoders.actions(batch, budgets, modes)), rounds))
    gc.collect()


# ---------------------------------------------------------------------------------------------------- language


def language_model(sizes: Sizes) -> Any:
    """A LLaMA with random weights, made on the device."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**sizes.llama, max_position_embeddings=4096, attn_implementation="sdpa")
    before = torch.get_default_dtype()
    torch.set_default_dtype(sizes.dtype)
    try:
        with torch.device(sizes.device):
            return LlamaForCausalLM(config).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(before)


def cache_bytes(cache: Any) -> int:
    """Bytes of the keys and values in a transformers cache."""
    return sum(
        tensor.numel() * tensor.element_size()
        for layer in cache.layers
        for tensor in (layer.keys, layer.values)
        if isinstance(tensor, Tensor)
    )


def speak(steps: Steps, sizes: Sizes, model: Any, batch: int, rounds: int) -> None:
    """Prefill and decoding at every number of visual tokens."""
    actions: list[tuple[dict[str, Any], Callable[[], Any]]] = []
    for visual in sizes.visual:
        length = TEXT_TOKENS + visual
        rows = torch.randn(batch, length, sizes.llama["hidden_size"], device=sizes.device, dtype=sizes.dtype) * 0.02

        def prefill(rows: Tensor = rows) -> Any:
            return model(inputs_embeds=rows, use_cache=True, logits_to_keep=1)

        def answer(prefill: Callable[[], Any] = prefill) -> Any:
            out = prefill()
            for _ in range(DECODE_STEPS):
                token = out.logits[:, -1:].argmax(-1)
                out = model(input_ids=token, past_key_values=out.past_key_values, use_cache=True)
            return out

        kept = cache_bytes(prefill().past_key_values)
        row = {"batch": batch, "budget": visual, "visual_tokens": visual, "prompt_tokens": length}
        row["cache_bytes_after_prefill"] = kept
        actions.append(({"way": "prefill", **row}, prefill))
        actions.append(({"way": f"prefill and {DECODE_STEPS} steps", **row}, answer))
    steps.found["language"] += list(timed(sizes, actions, rounds))


# ---------------------------------------------------------------------------------------------------- the run


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8.0, help="no step begins after them (8)")
    parser.add_argument("--batches", type=numbers, default=(1, 4, 16), help="pictures in a batch (1,4,16)")
    parser.add_argument("--budgets", type=numbers, help="of the official way and ours (64, and a ninth in a rehearsal)")
    parser.add_argument("--modes", default="reduce-overhead", help="of torch.compile, with commas (reduce-overhead)")
    parser.add_argument("--rounds", type=int, default=50, help="interleaved rounds (50)")
    parser.add_argument("--no-language", action="store_true", help="leave the language model out")
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes on the CPU, without torch.compile")
    parser.add_argument("--json", type=Path, required=True, help="where the results go")
    options = parser.parse_args()
    if not options.rehearse and not torch.cuda.is_available():
        print("there is no CUDA device; --rehearse runs tiny sizes on the CPU", file=sys.stderr)
        return 3
    warnings.simplefilter("ignore")
    steps = Steps(options.json, options.minutes)
    with torch.inference_mode():
        peers(steps, sizes_of(options.rehearse), options)
    for entry in steps.failed:
        print(f"{entry['outcome']}: {entry['step']}: {entry['reason']}", file=sys.stderr)
    return 1 if steps.failed else 0


def peers(steps: Steps, sizes: Sizes, options: argparse.Namespace) -> None:
    """All steps."""
    tokens = sizes.spec.vision.tokens
    budgets = options.budgets or (max(1, round(tokens / 9)),)
    modes = [] if sizes.device == "cpu" else [mode for mode in options.modes.split(",") if mode]
    plain = encoder_operations(sizes.spec, last_rows=tokens + 1, projected=tokens, cls_row=False)
    pruned = encoder_operations(sizes.spec, last_rows=budgets[0], projected=budgets[0], cls_row=True)
    one = {"plain": plain, "pruned": pruned, "budget": budgets[0]}
    steps.found |= {"rehearsal": sizes.device == "cpu", "operations_per_image": one, "peers": [], "language": []}
    steps.found["device"] = torch.cuda.get_device_name() if sizes.device == "cuda" else "cpu"
    steps.run("ceilings", partial(ceilings, steps, sizes))
    encoders = steps.run("make the encoders", partial(Encoders.made, sizes))
    if encoders is not None:
        steps.run("check ours against the plain encoder", partial(check_ours, steps, encoders, budgets[0]))
    model: Any = None

    def language(batch: int) -> None:
        if model is not None:
            rounds = max(3, options.rounds // 5)
            steps.run(f"language B={batch}", partial(speak, steps, sizes, model, batch, rounds), needs=20)

    first, *others = options.batches
    for batch in options.batches:
        if encoders is not None:
            action = partial(encode, steps, encoders, batch, budgets, modes, options.rounds)
            steps.run(f"encoders B={batch}", action, needs=20)
        if not options.no_language and batch == first:
            model = steps.run("make the language model", partial(language_model, sizes), needs=30)
            language(batch)
    for batch in others:
        language(batch)


if __name__ == "__main__":
    sys.exit(main())
