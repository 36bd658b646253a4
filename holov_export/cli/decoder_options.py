"""The options that choose a decoder, shared by the commands that answer."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from holov_export.bundle import Bundle
from holov_export.cli.options import UserPath
from holov_export.pipeline import checkpoint_of
from holov_export.runtime.decoder_choice import DECODERS, OF_CHECKPOINT, DecoderOptions
from holov_export.runtime.decoder_kv_cache import KV_CACHES, TAKES, KvCache, kv_cache_name

_Command = TypeVar("_Command", bound=Callable[..., Any])
#: decoders that lie beside the manifest
_OF_FOLDER = ("llamacpp", "trtllm")
#: that spread a model over several GPUs
_PARALLEL = ("vllm", "trtllm-api")

_OPTIONS = (
    click.option(
        "--decoder",
        type=click.Choice([name for name in DECODERS if name != "none"]),
        default="auto",
        show_default=True,
        help="What answers. genai, ort: ONNX Runtime GenAI or plain ONNX Runtime over the embedded decoder. hf: "
        "transformers. llamacpp, trtllm: what `compile --decoder` made. vllm, trtllm-api: load the checkpoint. "
        "vllm-server: asks a server.",
    ),
    click.option(
        "--checkpoint",
        help=f"For --decoder {', '.join(OF_CHECKPOINT)}: directory, name or OWNER/REPO of the weights (demo: found by "
        "itself).",
    ),
    click.option(
        "--decoder-folder",
        type=UserPath(),
        help=f"For --decoder {', '.join(_OF_FOLDER)}: where it lies [default: BUNDLE/decoders/NAME].",
    ),
    click.option("--decoder-url", metavar="URL", help="For --decoder vllm-server: http://HOST:PORT."),
    click.option(
        "--tensor-parallel",
        type=click.IntRange(1),
        default=1,
        show_default=True,
        help=f"For --decoder {', '.join(_PARALLEL)}: over how many GPUs the model is spread.",
    ),
)


kv_cache_option = click.option(
    "--kv-cache",
    type=click.Choice(KV_CACHES),
    default="auto",
    show_default=True,
    help=f"For --decoder {', '.join(TAKES)}: store keys and values in 8 bits.",
)


def decoder_options(command: _Command) -> _Command:
    """Give a command the options of `decoder_settings`: decoder, checkpoint, decoder_folder, decoder_url, ..."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def check_decoder_options(
    decoder: str, checkpoint: str | None, folder: Path | None, url: str | None, tensor_parallel: int
) -> None:
    """Refuse an option that the chosen decoder would not read.

    Raises:
        click.UsageError: names it and the decoders that read it.
    """
    given = (
        ("--checkpoint", checkpoint is not None, OF_CHECKPOINT),
        ("--decoder-folder", folder is not None, _OF_FOLDER),
        ("--decoder-url", url is not None, ("vllm-server",)),
        ("--tensor-parallel", tensor_parallel != 1, _PARALLEL),
    )
    for option, is_given, readers in given:
        if is_given and decoder not in readers:
            raise click.UsageError(f"{option} is for --decoder {' or '.join(readers)} only.")


def check_engine_options(engine: str, target: str | None) -> None:
    """Refuse a target for an engine that has none.

    Raises:
        click.UsageError: says so.
    """
    if target is not None and engine != "tensorrt":
        raise click.UsageError("--target is for --engine tensorrt only; ONNX Runtime runs the graph itself.")


def decoder_settings(
    opened: Bundle,
    decoder: str,
    checkpoint: str | None,
    folder: Path | None,
    url: str | None,
    tensor_parallel: int,
    kv_cache: KvCache = "auto",
) -> DecoderOptions:
    """What `Session.open` takes as `decoder_options`; the key of a server comes from HOLOV_EXPORT_DECODER_API_KEY.

    Raises:
        CheckpointError: the checkpoint is not the one that was exported.
        UsageError: the decoder cannot store keys and values so.
    """
    kv_cache_name(decoder, kv_cache)
    weights = checkpoint_of(opened, checkpoint) if decoder in OF_CHECKPOINT else None
    return DecoderOptions(
        checkpoint=weights,
        folder=folder,
        url=url,
        api_key=os.environ.get("HOLOV_EXPORT_DECODER_API_KEY") or None,
        tensor_parallel=tensor_parallel,
        kv_cache=kv_cache,
    )
