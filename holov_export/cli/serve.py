"""`holov-export serve`: an OpenAI-compatible server over a bundle."""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path
from typing import Literal

import click

from holov_export.bundle import open_bundle
from holov_export.cli.console import say
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
    method_option,
    provider_option,
    verify_option,
)
from holov_export.errors import StorageError
from holov_export.extras import require
from holov_export.runtime.decoder_kv_cache import KvCache
from holov_export.runtime.session import Session

_KEY_VARIABLE = "HOLOV_EXPORT_API_KEY"
_SECONDS = {"ms": 1e-3, "s": 1.0, "": 1.0, "m": 60.0, "min": 60.0}
_BYTES = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}
_LEAST_BYTES = 1024


def seconds(ctx: click.Context, param: click.Parameter, value: str | None) -> float | None:
    """Of "150ms", "0.2s", "2m" or a number of seconds; None where nothing was said."""
    if value is None:
        return None
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(ms|s|min|m|)", value.strip().lower())
    if found is None:
        raise click.BadParameter(f"'{value}' is no duration such as 150ms, 0.2s or 2m.", ctx, param)
    if float(found[1]) <= 0:
        raise click.BadParameter(f"'{value}' is not more than 0.", ctx, param)
    return float(found[1]) * _SECONDS[found[2]]


def size(ctx: click.Context, param: click.Parameter, value: str) -> int:
    """Bytes of "32MB", "64MiB" or a number of bytes."""
    found = re.fullmatch(r"(\d+)\s*([a-z]*)", value.strip().lower())
    if found is None or found[2] not in _BYTES:
        raise click.BadParameter(f"'{value}' is no size such as 32MB or 64MiB.", ctx, param)
    if int(found[1]) * _BYTES[found[2]] < _LEAST_BYTES:
        raise click.BadParameter(f"'{value}' is less than {_LEAST_BYTES} bytes.", ctx, param)
    return int(found[1]) * _BYTES[found[2]]


@click.command("serve")
@bundle_argument
@click.option("--host", default="127.0.0.1", show_default=True, help="Address; 0.0.0.0 is all of this machine's.")
@click.option("--port", type=click.IntRange(0, 65535), default=8080, show_default=True, help="0: any free one.")
@click.option("--model-name", metavar="NAME", help="What requests call the model [default: its own name].")
@click.option("--budget", type=click.IntRange(1), help="Tokens of an image whose request names none [default: as ask].")
@click.option(
    "--target-ttft",
    callback=seconds,
    metavar="TIME",
    help="Lower budgets under load so that the first token comes within TIME (150ms, 0.2s), and raise them again.",
)
@click.option("--min-budget", type=click.IntRange(1), help="With --target-ttft [default: an eighteenth of N].")
@click.option("--max-budget", type=click.IntRange(1), help="With --target-ttft [default: a third of N].")
@click.option("--media-folder", type=UserPath(), help="file: URLs may name what lies in this folder [default: none].")
@click.option("--allow-remote", is_flag=True, help="Fetch images of http: and https: URLs from public addresses.")
@click.option("--api-key", metavar="KEY", help=f"Clients must send it; better in a file or in {_KEY_VARIABLE}.")
@click.option("--api-key-file", type=UserPath(), help="A file whose first line is the key.")
@click.option("--allow-origin", "origins", multiple=True, metavar="ORIGIN", help="A web page that may ask; repeat.")
@method_option
@decoder_options
@kv_cache_option
@engine_option
@engine_target_option
@provider_option
@verify_option
@click.option("--threads", type=click.IntRange(1), help="CPU threads.")
@click.option(
    "--max-body", metavar="SIZE", callback=size, default="32MiB", show_default=True, help="Of a request's body."
)
@click.option("--max-pixels", type=click.IntRange(1), default=40_000_000, show_default=True, help="Of one image.")
@click.option("--max-images", type=click.IntRange(1), default=8, show_default=True, help="Of a request.")
@click.option("--max-videos", type=click.IntRange(0), default=1, show_default=True, help="Clips of a request.")
@click.option(
    "--max-characters", type=click.IntRange(1), default=100_000, show_default=True, help="Of all texts of a request."
)
@click.option("--max-new-tokens", type=click.IntRange(1), default=2048, show_default=True, help="Of an answer.")
@click.option("--queue", type=click.IntRange(1), default=256, show_default=True, help="Requests at once; others: 429.")
@click.option("--vision-batch", type=click.IntRange(1), default=8, show_default=True, help="Images seen in one run.")
@click.option("--streams", type=click.IntRange(1), default=8, show_default=True, help="Answers decoded in turn.")
@click.option(
    "--queue-timeout",
    metavar="TIME",
    callback=seconds,
    default="60s",
    show_default=True,
    help="Longest wait; then 503.",
)
@click.option(
    "--request-timeout", metavar="TIME", callback=seconds, default="300s", show_default=True, help="Of a whole answer."
)
@click.option(
    "--drain-timeout", metavar="TIME", callback=seconds, default="30s", show_default=True, help="Of a shutdown."
)
@click.option("--access-log", is_flag=True, help="A line on stderr for each request.")
def serve_command(
    bundle: Path,
    host: str,
    port: int,
    model_name: str | None,
    budget: int | None,
    target_ttft: float | None,
    min_budget: int | None,
    max_budget: int | None,
    media_folder: Path | None,
    allow_remote: bool,
    api_key: str | None,
    api_key_file: Path | None,
    origins: tuple[str, ...],
    method: str | None,
    decoder: str,
    checkpoint: str | None,
    decoder_folder: Path | None,
    decoder_url: str | None,
    tensor_parallel: int,
    kv_cache: KvCache,
    engine: str,
    target: str | None,
    provider: str,
    verify: Literal["full", "size"],
    threads: int | None,
    max_body: int,
    max_pixels: int,
    max_images: int,
    max_videos: int,
    max_characters: int,
    max_new_tokens: int,
    queue: int,
    vision_batch: int,
    streams: int,
    queue_timeout: float,
    request_timeout: float,
    drain_timeout: float,
    access_log: bool,
) -> None:
    """Answer over HTTP as OpenAI's API does: POST /v1/chat/completions. A page to try it is at /."""
    _check_budget_options(budget, target_ttft, min_budget, max_budget)
    check_engine_options(engine, target)
    choice = (decoder, checkpoint, decoder_folder, decoder_url, tensor_parallel)
    check_decoder_options(*choice)
    key = _key(api_key, api_key_file)
    if media_folder is not None and not media_folder.is_dir():
        raise click.BadParameter(f"'{media_folder}' is no folder.", param_hint="--media-folder")
    for module in ("fastapi", "uvicorn", "httpx", "prometheus_client"):
        require(module)
    from holov_export.serve.app import AppSettings
    from holov_export.serve.chat import ChatSettings
    from holov_export.serve.limits import Limits
    from holov_export.serve.parts import Sources
    from holov_export.serve.server import ServerSettings, budgets_for, serve

    limits = Limits(
        body_bytes=max_body,
        pixels=max_pixels,
        images=max_images,
        videos=max_videos,
        prompt_characters=max_characters,
        new_tokens=max_new_tokens,
        queue=queue,
        vision_batch=vision_batch,
        streams=streams,
        queue_seconds=queue_timeout,
        request_seconds=request_timeout,
        drain_seconds=drain_timeout,
    )
    opened = graph_of(open_bundle(bundle, verify=verify), method)
    options = decoder_settings(opened, *choice, kv_cache)
    session = Session.open(
        opened,
        decoder=decoder,
        engine=engine,
        target=target,
        provider=provider,
        threads=threads,
        verify=verify,
        checkpoint=options.checkpoint,
        decoder_options=options,
    )
    chat = ChatSettings(limits=limits, sources=Sources(media_folder, allow_remote))
    settings = ServerSettings(
        app=AppSettings(chat, key, origins),
        budgets=budgets_for(session, target=target_ttft, smallest=min_budget, largest=max_budget, budget=budget),
        host=host,
        port=port,
        name=model_name,
        access_log=access_log,
        tell=say,
    )
    logging.basicConfig(level=logging.INFO if access_log else logging.WARNING, format="%(asctime)s %(message)s")
    serve(session, settings)


def _check_budget_options(budget: int | None, target: float | None, smallest: int | None, largest: int | None) -> None:
    """Refuse options that would not be read."""
    if target is None and (smallest is not None or largest is not None):
        raise click.UsageError("--min-budget and --max-budget are for --target-ttft; without it name --budget.")
    if target is not None and budget is not None:
        raise click.UsageError("--budget is for servers without --target-ttft; with it name --max-budget.")


def _key(key: str | None, file: Path | None) -> str | None:
    """The API key; no message ever repeats it.

    Raises:
        StorageError: the file cannot be read. click.UsageError: it is empty, or there are two.
    """
    if key is not None and file is not None:
        raise click.UsageError("name --api-key or --api-key-file, not both.")
    if file is not None:
        try:
            key = (file.read_text(encoding="utf-8").splitlines() or [""])[0]
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is no text"
            raise StorageError(f"cannot read '{file}': {reason}.") from error
    elif key is None:
        key = os.environ.get(_KEY_VARIABLE) or None
    if key is None:
        return None
    if not key.strip():
        raise click.UsageError("the API key is empty.")
    return key.strip()
