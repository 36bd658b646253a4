"""`holov-export compile --decoder NAME`: the language model for another runtime, beside the manifest."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import click

from holov_export.bundle import open_bundle
from holov_export.cli.console import OUT, print_json, progress, say, size_text, table
from holov_export.cli.options import UserPath, bundle_argument, json_option
from holov_export.decoder_files import DecoderFolder, DecoderKind, decoder_folder
from holov_export.errors import UsageError
from holov_export.export.decoder_gguf import gguf_from_checkpoint
from holov_export.export.decoder_trtllm import TrtllmPlan, build_trtllm, commands_text, trtllm_plan
from holov_export.export.trtllm_precisions import TrtllmKvCache
from holov_export.pipeline import checkpoint_of
from holov_export.runtime.runner import default_budget
from holov_export.targets import target_from_name

_KINDS = ("llamacpp", "trtllm")


@click.command("compile")
@bundle_argument
@click.option("--decoder", "kind", type=click.Choice(_KINDS), required=True, help="The runtime that will load it.")
@click.option("--checkpoint", help="Directory, name or OWNER/REPO of the weights (demo: found by itself).")
@click.option(
    "--weights",
    help="How they are stored. llamacpp: f32, f16, bf16, q8_0, q4_0, q4_k_m. trtllm: float16, bfloat16, int8, int4, "
    "int8_sq, int4_awq, w4a8_awq, fp8 [default: f16, float16].",
)
@click.option(
    "--kv-cache",
    type=click.Choice(get_args(TrtllmKvCache)),
    default="auto",
    show_default=True,
    help="trtllm: store keys and values in 8 bits. llamacpp decides when it is loaded: `ask --kv-cache`.",
)
@click.option(
    "--target", help="trtllm: what it will run on, a name of `holov-export targets`; refuses what that has not."
)
@click.option("--batch", type=click.IntRange(1), default=8, show_default=True, help="trtllm: requests at once.")
@click.option("--images", type=click.IntRange(1), default=1, show_default=True, help="trtllm: of one request.")
@click.option("--budget", type=click.IntRange(1), help="trtllm: visual tokens of one image [default: the bundle's].")
@click.option("--text-tokens", type=click.IntRange(1), default=512, show_default=True, help="trtllm: words of one "
              "prompt, without images.")  # fmt: skip
@click.option("--max-new-tokens", type=click.IntRange(1), default=256, show_default=True, help="trtllm: of an answer.")
@click.option("--tensor-parallel", type=click.IntRange(1), default=1, show_default=True, help="trtllm: GPUs.")
@click.option(
    "--trtllm-examples",
    "examples",
    type=UserPath(),
    help="trtllm: the folder 'examples' of its sources [default: $TRTLLM_EXAMPLES, or where containers have it].",
)
@click.option("-o", "--output", type=UserPath(), help="Write there [default: BUNDLE/decoders/NAME].")
@click.option("--dry-run", is_flag=True, help="trtllm: print the sizes and the commands, run nothing.")
@json_option
def compile_decoder(
    bundle: Path,
    kind: DecoderKind,
    checkpoint: str | None,
    weights: str | None,
    kv_cache: str,
    target: str | None,
    batch: int,
    images: int,
    budget: int | None,
    text_tokens: int,
    max_new_tokens: int,
    tensor_parallel: int,
    examples: Path | None,
    output: Path | None,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Make the decoder of a bundle for llama.cpp (GGUF) or TensorRT-LLM (engines, up to its version 1.2)."""
    if dry_run and kind != "trtllm":
        raise click.UsageError("--dry-run is for --decoder trtllm only: a GGUF file is written by no other program.")
    if kind != "trtllm" and (kv_cache != "auto" or target is not None):
        raise click.UsageError("--kv-cache and --target are for --decoder trtllm only.")
    opened = open_bundle(bundle, verify="size")
    folder = checkpoint_of(opened, checkpoint)
    if folder is None:
        raise UsageError("the weights are not in the bundle.", hint="Name the checkpoint: --checkpoint DIR")
    place = output or decoder_folder(bundle, kind)
    if kind == "llamacpp":
        with progress() as tell:
            made = gguf_from_checkpoint(folder, opened.manifest.plan.model, place, weights or "f16", tell=tell)
        _print_decoder(made, as_json)
        return
    plan = trtllm_plan(
        opened.manifest.plan.model,
        folder,
        weights=weights or "float16",
        kv_cache=kv_cache,
        target=None if target is None else target_from_name(target),
        batch=batch,
        images=images,
        budget=budget or default_budget(opened.manifest.plan),
        text_tokens=text_tokens,
        new_tokens=max_new_tokens,
        tensor_parallel=tensor_parallel,
        examples=examples,
    )
    if dry_run:
        _print_plan(plan, place, as_json)
        return
    say(commands_text(plan))
    with progress() as tell:
        made = build_trtllm(plan, place, tell=tell)
    _print_decoder(made, as_json)


def _print_plan(plan: TrtllmPlan, place: Path, as_json: bool) -> None:
    if as_json:
        print_json({"decoder": str(place), "plan": plan.model_dump(mode="json")})
        return
    made = table("TensorRT-LLM", "")
    for key, value in plan.sizes.model_dump().items():
        made.add_row(_SIZES[key], str(value))
    OUT.print(made)
    OUT.print()
    OUT.print(commands_text(plan), soft_wrap=True, markup=False, highlight=False)


_SIZES = {
    "batch": "requests at once",
    "images": "images of one request",
    "budget": "visual tokens of one image",
    "multimodal": "rows of the prompt table (max_multimodal_len)",
    "input": "longest prompt (max_input_len)",
    "sequence": "longest prompt and answer (max_seq_len)",
}


def _print_decoder(made: DecoderFolder, as_json: bool) -> None:
    if as_json:
        print_json({"decoder": str(made.folder), "record": made.record.model_dump(mode="json")})
        return
    size = sum(item.bytes for item in made.record.files)
    OUT.print(f"{made.folder}  {made.record.weights}, {size_text(size)}", soft_wrap=True)
