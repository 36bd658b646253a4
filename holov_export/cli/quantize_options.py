"""The options of `export` and `quantize` that say how vision graphs are quantised."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, TypeVar

import click

from holov_export.cli.options import UserPath
from holov_export.request import QuantizeRequest
from holov_export.spec import QuantizedType

_Command = TypeVar("_Command", bound=Callable[..., Any])

#: of a calibration and of what is quantised by it
recipe_option = click.option(
    "--recipe",
    default="smoke-8",
    show_default=True,
    help="Calibration recipe: a name of `calibration/`, or a TOML file. It names the pictures that ranges come from, "
    "others to judge by, and what may be lost.",
)
pictures_option = click.option(
    "--pictures", type=UserPath(), metavar="DIR", help="The recipe's pictures, for recipes that take a folder."
)
quantize_for_option = click.option(
    "--quantize-for",
    "quantize_for",
    type=click.Choice(["tensorrt", "cpu"]),
    default="tensorrt",
    show_default=True,
    help="What runs the quantised graph: Q/DQ nodes from a calibration for TensorRT, or ONNX Runtime's own form "
    "for a CPU, which needs no calibration.",
)
smooth_option = click.option(
    "--smooth", type=click.FloatRange(0.0, 1.0, max_open=True), help="SmoothQuant's alpha; 0 for none."
)
keep_option = click.option(
    "--keep",
    multiple=True,
    metavar="LAYERS",
    help="Layers that are not quantised, by parts of their names: layers.3,mlp.fc2. `auto` measures which.",
)
_OPTIONS = (
    click.option("--int8", "quantized", flag_value="int8", help="8-bit integer products in the vision graph."),
    click.option("--fp8", "quantized", flag_value="fp8", help="8-bit float (E4M3) products, for sm_89 and newer."),
    quantize_for_option,
    recipe_option,
    pictures_option,
    smooth_option,
    keep_option,
    click.option(
        "--questions",
        type=UserPath(),
        metavar="FILE",
        help="Questions, as `evaluate` reads them, to compare answers on, and to find scales of 8-bit keys and values.",
    ),
    click.option("--accept-loss", is_flag=True, help="Write the bundle even if it loses more than the recipe allows."),
)


def quantize_options(command: _Command) -> _Command:
    """Add all of them to a command; `quantize_request` reads them."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def quantize_request(
    quantized: str | None,
    quantize_for: Literal["tensorrt", "cpu"],
    recipe: str,
    pictures: Path | None,
    smooth: float | None,
    keep: tuple[str, ...],
    questions: Path | None,
    accept_loss: bool,
    pictures_for_more: bool = False,
) -> QuantizeRequest | None:
    """What the options ask for; None if nothing is to be quantised.

    Args:
        pictures_for_more: something else wants the recipe's pictures.

    Raises:
        click.UsageError: options of a quantisation that is not asked for.
    """
    if quantized is None:
        unused = pictures and not pictures_for_more
        if quantize_for != "tensorrt" or unused or smooth is not None or keep or accept_loss:
            raise click.UsageError("options of a quantised graph need --int8 or --fp8.")
        return None
    return QuantizeRequest(
        type=QuantizedType(quantized),
        engine=quantize_for,
        recipe=recipe,
        pictures=pictures,
        smoothing=smooth,
        keep=tuple(name.strip() for text in keep for name in text.split(",") if name.strip()),
        questions=questions,
        accept_loss=accept_loss,
    )
