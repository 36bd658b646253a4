"""Arguments and options that commands share."""

from __future__ import annotations

import os
import re
import tempfile
from pathlib import Path
from typing import Any

import click

from holov_export.bundle import Bundle
from holov_export.errors import StorageError
from holov_export.runtime.ort_providers import PROVIDERS
from holov_export.runtime.runner_choice import ENGINES


class UserPath(click.Path):
    """A path that a user typed. A shell leaves the `~` of `--output=~/b` alone, so it is expanded here."""

    def __init__(self) -> None:
        super().__init__(path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return super().convert(os.path.expanduser(value), param, ctx)


bundle_argument = click.argument("bundle", type=UserPath())
json_option = click.option("--json", "as_json", is_flag=True, help="Result as JSON on stdout.")
provider_option = click.option(
    "--provider", type=click.Choice(PROVIDERS), default="auto", show_default=True, help="Where ONNX Runtime runs."
)
engine_option = click.option(
    "--engine",
    type=click.Choice(ENGINES),
    default="ort",
    show_default=True,
    help="What runs the vision graph: ONNX Runtime, or the bundle's compiled TensorRT engine.",
)
engine_target_option = click.option(
    "--target", metavar="NAME", help="For --engine tensorrt: which compiled engine [default: the one that fits]."
)
method_option = click.option(
    "--method", metavar="NAME", help="Which of the bundle's selection rules runs [default: the first of `inspect`]."
)
verify_option = click.option(
    "--verify",
    type=click.Choice(["full", "size"]),
    default="full",
    show_default=True,
    help="How files are compared with the manifest. 'full' reads all of them for their sha256; 'size' is enough for a "
    "bundle that was opened with 'full' since it was written or copied, and saves that time with many gigabytes.",
)


def graph_of(bundle: Bundle, method: str | None) -> Bundle:
    """The bundle with the graph that --method names, or as it is.

    Raises:
        UnknownNameError: it has no such graph.
    """
    return bundle if method is None else bundle.of_method(method)


def method_names(text: str) -> list[str]:
    """["holov@12:256,22", "scope"] of "holov@12:256,22,scope": what begins like a number belongs to the name before."""
    return [name.strip() for name in re.split(r",(?!\s*\d)", text)]


def numbers(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[int, ...]:
    """(576, 192, 64) of "576,192,64": whole numbers of at least 1, each once; () where nothing was said."""
    if value is None:
        return ()
    try:
        found = tuple(int(part) for part in value.split(","))
    except ValueError:
        raise click.BadParameter(f"'{value}' is no list of whole numbers such as 576,192,64.", ctx, param) from None
    if min(found) < 1:
        raise click.BadParameter(f"{min(found)} is below 1.", ctx, param)
    return tuple(dict.fromkeys(found))


def check_output(output: Path) -> None:
    """Make the folder of results, and refuse it before hours of work if nothing can be written there.

    Raises:
        StorageError: it is a file, or cannot be written to.
    """
    if output.exists() and not output.is_dir():
        raise StorageError(f"'{output}' is a file, the results need a folder.", hint="Choose another --output.")
    try:
        output.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=output).close()
    except OSError as error:
        raise StorageError(f"cannot write to '{output}': {error.strerror}.", hint="Choose another --output.") from error
