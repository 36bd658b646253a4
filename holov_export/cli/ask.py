"""`holov-export ask` and `holov-export show`: use a bundle on pictures."""

from __future__ import annotations

import io
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import click
from PIL import Image

from holov_export.bundle import Bundle, open_bundle, read_manifest
from holov_export.cli.console import OUT, print_json, say
from holov_export.cli.decoder_options import (
    check_decoder_options,
    check_engine_options,
    decoder_options,
    decoder_settings,
    kv_cache_option,
)
from holov_export.cli.options import (
    UserPath,
    bundle_argument,
    engine_option,
    engine_target_option,
    graph_of,
    method_names,
    method_option,
    provider_option,
    verify_option,
)
from holov_export.errors import StorageError
from holov_export.policies import POLICIES
from holov_export.runtime.decoder import check_sampling
from holov_export.runtime.decoder_kv_cache import KvCache
from holov_export.runtime.packing import SPREADS, Spread
from holov_export.runtime.preprocess import image_from
from holov_export.runtime.preprocess_video import check_takes_videos, clip_from
from holov_export.runtime.runner import Runner, chosen_budget, default_budget, quota_array
from holov_export.runtime.runner_choice import runner_from_bundle
from holov_export.runtime.session import Session
from holov_export.tensors import Generation, SamplingSettings
from holov_export.verify.panels import panels_from_bundle, subject_from_clip, subject_from_picture
from holov_export.verify.picture import picture_of_panels


@click.command()
@bundle_argument
@click.argument("images", nargs=-1, type=UserPath(), metavar="[IMAGE...]")
@click.argument("prompt")
@click.option(
    "--video", "videos", multiple=True, type=UserPath(), help="A clip: a video file, an animation, a folder of frames."
)
@click.option(
    "--budget", type=int, help="Visual tokens of each image or clip [default: the bundle's, or a ninth of them]."
)
@method_option
@click.option(
    "--quota", "quotas", type=int, multiple=True, help="Tokens of one image or clip, at most the budget; repeat."
)
@click.option(
    "--spread",
    type=click.Choice(SPREADS),
    default="frames",
    show_default=True,
    help="How the budget of a clip is spent: the same in each frame, or wherever the rule finds something.",
)
@decoder_options
@kv_cache_option
@click.option("--max-new-tokens", type=click.IntRange(1), default=256, show_default=True, help="Longest answer.")
@click.option("--temperature", type=click.FloatRange(0), default=0.0, show_default=True, help="0 is greedy.")
@click.option("--top-k", type=click.IntRange(0), default=0, help="Sample among the k most likely tokens; 0 is all.")
@click.option("--top-p", type=click.FloatRange(0, 1), default=1.0, show_default=True, help="Sample in this nucleus.")
@click.option("--seed", type=int, help="Of the sampler.")
@click.option("--stop", multiple=True, help="A string that ends the answer; repeat for more.")
@click.option("--raw", is_flag=True, help="The prompt is complete: no chat template is put around it.")
@click.option("--threads", type=click.IntRange(1), help="CPU threads.")
@engine_option
@engine_target_option
@provider_option
@verify_option
@click.option("--json", "as_json", is_flag=True, help="Answer and timings as JSON on stdout.")
def ask(
    bundle: Path,
    images: tuple[Path, ...],
    videos: tuple[Path, ...],
    prompt: str,
    budget: int | None,
    method: str | None,
    quotas: tuple[int, ...],
    spread: Spread,
    decoder: str,
    checkpoint: str | None,
    decoder_folder: Path | None,
    decoder_url: str | None,
    tensor_parallel: int,
    kv_cache: KvCache,
    max_new_tokens: int,
    temperature: float,
    top_k: int,
    top_p: float,
    seed: int | None,
    stop: tuple[str, ...],
    raw: bool,
    threads: int | None,
    engine: str,
    target: str | None,
    provider: str,
    verify: Literal["full", "size"],
    as_json: bool,
) -> None:
    """Ask a question about images, clips or both. The answer streams to stdout, timings go to stderr."""
    if not images and not videos:
        raise click.UsageError("name what the question is about: an IMAGE or --video.")
    choice = (decoder, checkpoint, decoder_folder, decoder_url, tensor_parallel)
    check_decoder_options(*choice)
    sampling = SamplingSettings(max_new_tokens, temperature, top_k, top_p, seed, stop)

    def on_text(piece: str) -> None:
        sys.stdout.write(piece)
        sys.stdout.flush()

    check_sampling(sampling)
    check_engine_options(engine, target)
    _check_request(bundle, images, budget, quotas, videos=videos, methods=(method,) if method else ())
    opened = graph_of(open_bundle(bundle, verify=verify), method)
    settings = decoder_settings(opened, *choice, kv_cache)
    with Session.open(
        opened,
        decoder=decoder,
        engine=engine,
        target=target,
        provider=provider,
        threads=threads,
        verify=verify,
        checkpoint=settings.checkpoint,
        decoder_options=settings,
    ) as session:
        answer = session.ask(
            list(images),
            prompt,
            videos=list(videos),
            budget=budget,
            quota=list(quotas) or None,
            spread=spread,
            sampling=sampling,
            raw=raw,
            on_text=None if as_json else on_text,
        )
    if as_json:
        print_json(answer_json(answer))
        return
    sys.stdout.write("\n")
    say(_timing_line(answer))


def _check_request(
    bundle: Path,
    images: Sequence[Path],
    budget: int | None,
    quotas: Sequence[int] = (),
    *,
    videos: Sequence[Path] = (),
    methods: Sequence[str] = (),
) -> None:
    """Refuse a wrong budget, quota, rule or picture before gigabytes are hashed and loaded.

    Raises:
        BundleError, UnknownNameError, BudgetError, ImageError: as when the request is carried out.
    """
    manifest = read_manifest(bundle)
    for method in methods:
        Bundle(bundle, manifest).of_method(method)
    plan = manifest.plan
    largest = max(plan.of_part(part).tokens for part in plan.parts)
    chosen = chosen_budget(budget, quotas or None, largest, default_budget(plan))
    quota_array(quotas or None, chosen, len(images) + len(videos))
    if videos:
        check_takes_videos(plan.model)
    for image in images:
        image_from(image)


def answer_json(answer: Generation) -> dict[str, Any]:
    """An answer as JSON; times in milliseconds."""
    times = answer.timings
    return {
        "text": answer.text,
        "finish_reason": answer.finish_reason,
        "prompt_tokens": answer.prompt_tokens,
        "visual_tokens": list(answer.visual_tokens),
        "new_tokens": len(answer.token_ids),
        "token_ids": list(answer.token_ids),
        "milliseconds": {
            "preprocess": times.preprocess * 1e3,
            "vision": times.vision * 1e3,
            "stitch": times.stitch * 1e3,
            "setup": times.setup * 1e3,
            "prefill": times.prefill * 1e3,
            "decode": times.decode * 1e3,
            "ttft": times.ttft * 1e3,
            "total": times.total * 1e3,
        },
    }


def _timing_line(answer: Generation) -> str:
    times = answer.timings
    parts = [
        f"{name} {seconds * 1e3:.1f} ms"
        for name, seconds in (
            ("preprocess", times.preprocess),
            ("vision", times.vision),
            ("setup", times.setup),
            ("prefill", times.prefill),
            ("decode", times.decode),
            ("TTFT", times.ttft),
        )
    ]
    tokens = "+".join(map(str, answer.visual_tokens))
    return f"{tokens} visual tokens, {answer.prompt_tokens} in the prompt; {', '.join(parts)}"


@click.command()
@bundle_argument
@click.argument("image", type=UserPath(), required=False)
@click.option(
    "--video", type=UserPath(), help="Instead of IMAGE a clip: a video file, an animation, a folder of frames."
)
@click.option("--budget", type=int, help="Visual tokens [default: the bundle's, or a ninth of them].")
@click.option(
    "--methods",
    help="Graphs of the bundle, or rules that read no features, comma separated [default: its first graph].",
)
@click.option(
    "--spread",
    type=click.Choice(SPREADS),
    help="How the budget of a clip is spent: the same in each frame, or wherever the rule finds something "
    "[default: frames].",
)
@click.option(
    "--side",
    type=click.IntRange(64, 4096),
    default=480,
    show_default=True,
    help="Pixels of a panel; a frame of a clip has a third.",
)
@click.option(
    "-o",
    "--output",
    type=UserPath(),
    default=Path("kept.png"),
    show_default=True,
    help="The picture; its ending names the format.",
)
@engine_option
@engine_target_option
@provider_option
@verify_option
def show(
    bundle: Path,
    image: Path | None,
    video: Path | None,
    budget: int | None,
    methods: str | None,
    spread: Spread | None,
    side: int,
    output: Path,
    engine: str,
    target: str | None,
    provider: str,
    verify: Literal["full", "size"],
) -> None:
    """Draw a picture of what stays. Kept tokens are lit, pruned ones dimmed; crop borders and their counts."""
    if (image is None) == (video is None):
        raise click.UsageError("name one thing to look at: a picture, or a clip with --video.")
    if spread is not None and video is None:
        raise click.UsageError("--spread is for --video only; a picture has no frames.")
    _check_picture(output)
    names = method_names(methods) if methods else []
    held = Bundle(bundle, read_manifest(bundle)).methods
    unknown = [name for name in names if name not in POLICIES and name not in held]
    if unknown:
        raise click.UsageError(f"unknown method '{unknown[0]}'; known: {', '.join(dict.fromkeys([*held, *POLICIES]))}.")
    check_engine_options(engine, target)
    _check_request(bundle, [image] if image else [], budget, videos=[video] if video else [])
    if video is not None:
        clip_from(video)  # what cannot be read is refused before gigabytes are hashed
    opened = open_bundle(bundle, verify=verify)
    plan = opened.manifest.plan

    def open_runner(view: Bundle) -> Runner:
        return runner_from_bundle(view, engine=engine, target=target, provider=provider, verify=verify)

    if video is not None:
        opened = opened.of_part(plan.parts[-1])
        subject = subject_from_clip(video, plan.model, side // 3)
    else:
        assert image is not None
        subject = subject_from_picture(image, plan.model, side)
    # one budget may be meant for pictures and clips alike, of which one has fewer tokens
    budget = None if budget is None else min(budget, opened.manifest.plan.tokens)
    panels = panels_from_bundle(
        opened, open_runner, subject.pixels, budget, names or [opened.method], spread or SPREADS[0]
    )
    try:
        picture_of_panels(subject, panels).save(output)
    except (OSError, ValueError) as error:
        raise StorageError(f"cannot write '{output}': {error}.", hint="Choose another --output.") from error
    OUT.print(str(output), soft_wrap=True)


def _check_picture(output: Path) -> None:
    """Refuse a picture that could not be saved in the end."""
    Image.init()
    kind = Image.registered_extensions().get(output.suffix.lower())
    try:
        if kind is None:
            raise ValueError
        Image.new("RGB", (1, 1)).save(io.BytesIO(), kind)  # some formats are only read, or take no colours
    except (KeyError, OSError, ValueError):
        raise click.UsageError(
            f"'{output}' does not end like a picture that can be written; try {output.stem or 'kept'}.png."
        ) from None
    if output.is_dir():
        raise click.UsageError(f"'{output}' is a folder; name a file in it.")
    if not output.parent.is_dir():
        raise click.UsageError(f"'{output.parent}' is not a folder, so '{output.name}' cannot be written there.")
