"""Arguments and options that commands share."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click


class UserPath(click.Path):
    """A path that a user typed. A shell leaves the `~` of `--output=~/b` alone, so it is expanded here."""

    def __init__(self) -> None:
        super().__init__(path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return super().convert(os.path.expanduser(value), param, ctx)


bundle_argument = click.argument("bundle", type=UserPath())
json_option = click.option("--json", "as_json", is_flag=True, help="Result as JSON on stdout.")
provider_option = click.option(
    "--provider", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True, help="Where to run."
)
verify_option = click.option(
    "--verify",
    type=click.Choice(["full", "size"]),
    default="full",
    show_default=True,
    help="How files are compared with the manifest. 'full' reads all of them for their sha256; 'size' is enough for a "
    "bundle that was opened with 'full' since it was written or copied, and saves that time with many gigabytes.",
)
