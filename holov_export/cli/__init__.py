"""The command line. `holov-export --model NAME` is `holov-export export --model NAME`."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import click

from holov_export import __version__
from holov_export.cli.console import let_go
from holov_export.errors import EnvironmentFaultError, HolovExportError

#: standard exit code of a program ended by Ctrl-C
_INTERRUPTED = 130
#: refusals of the operating system that are no fault of this program
_REFUSALS = (errno.EACCES, errno.EPERM, errno.ENOSPC, errno.EDQUOT, errno.EROFS)


class _ReaderLeftError(Exception):
    """Whoever read stdout is gone (`inspect BUNDLE | head -1`). click would end a BrokenPipeError with 1."""


@contextmanager
def _reader_may_leave() -> Iterator[None]:
    try:
        yield
    except BrokenPipeError as error:
        raise _ReaderLeftError from error


class DefaultGroup(click.Group):
    """A group whose options belong to the command `export` when no command is named."""

    def make_context(self, *args: Any, **settings: Any) -> click.Context:
        with _reader_may_leave():  # --help
            return super().make_context(*args, **settings)

    def invoke(self, ctx: click.Context) -> Any:
        with _reader_may_leave():
            return super().invoke(ctx)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        own = {"--help", "-h", "--version"}
        if args and args[0] not in self.commands and args[0] not in own and args[0].startswith("-"):
            args = ["export", *args]
        return super().parse_args(ctx, args)

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)


@click.group(
    cls=DefaultGroup,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    epilog="Exit codes: 0 ok, 1 a check failed, 2 wrong usage or input, 3 missing package, hardware, network or disk. "
    "--debug anywhere shows tracebacks.",
)
@click.version_option(__version__, prog_name="holov-export")
def cli() -> None:
    """Export a vision-language model so that an image costs 64 tokens instead of 576.

    Without a command name, options go to `export`: holov-export --model llava-1.5-7b --fp16
    """


def _register() -> None:
    from holov_export.cli.ask import ask, show
    from holov_export.cli.bench import bench_command
    from holov_export.cli.calibrate import calibrate
    from holov_export.cli.check import check, lower
    from holov_export.cli.compare import compare
    from holov_export.cli.compile import compile_engine
    from holov_export.cli.evaluate import evaluate
    from holov_export.cli.export import export
    from holov_export.cli.look import doctor, inspect, methods, models, verify
    from holov_export.cli.quantize import quantize
    from holov_export.cli.recommend import recommend
    from holov_export.cli.serve import serve_command
    from holov_export.cli.targets import estimate_command, targets
    from holov_export.cli.triton import triton_command

    for command in (
        *(export, ask, show, inspect, verify),
        *(calibrate, quantize, compare),
        *(evaluate, recommend),
        *(check, lower, compile_engine, bench_command),
        *(serve_command, triton_command),
        *(estimate_command, targets),
        *(doctor, models, methods),
    ):
        cli.add_command(command)


_register()


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point: runs a command and ends the process with its exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # a terminal that is only ASCII
    debug = "--debug" in arguments or bool(os.environ.get("HOLOV_EXPORT_DEBUG"))
    code = run([argument for argument in arguments if argument != "--debug"], debug=debug)
    sys.exit(_flushed(code))


def _flushed(code: int) -> int:
    """Write out what is buffered while an error can still be said; the interpreter would complain in its own words."""
    try:
        sys.stdout.flush()
    except OSError as error:
        let_go(sys.stdout)
        if error.errno != errno.EPIPE:
            _complain(f"cannot write to stdout: {error.strerror}.")
            code = code or EnvironmentFaultError.exit_code
    try:
        sys.stderr.flush()
    except OSError:
        let_go(sys.stderr)
    return code


def run(arguments: list[str], *, debug: bool = False) -> int:
    """Run a command and return its exit code; errors are printed to stderr, without traceback unless `debug`."""
    try:
        result = cli.main(arguments, prog_name="holov-export", standalone_mode=False)
        return result if isinstance(result, int) else 0
    except click.exceptions.Exit as stop:
        return stop.exit_code
    except (click.Abort, KeyboardInterrupt):
        _complain("interrupted.")
        return _INTERRUPTED
    except click.ClickException as error:
        with suppress(BrokenPipeError):
            error.show(sys.stderr)
        return 2
    except HolovExportError as error:
        if debug:
            raise
        _complain(error.message, error.hint)
        return error.exit_code
    except _ReaderLeftError:
        let_go(sys.stdout)
        return 0
    except Exception as error:
        if debug:
            raise
        if isinstance(error, OSError) and error.errno in _REFUSALS:
            _complain(f"{error.strerror}." if error.filename is None else f"{error.strerror}: '{error.filename}'.")
            return EnvironmentFaultError.exit_code
        hint = "Run again with --debug for the traceback, and please report it."
        _complain(f"internal error: {type(error).__name__}: {error}", hint)
        return 1


def _complain(message: str, hint: str = "") -> None:
    with suppress(BrokenPipeError):
        click.echo(f"holov-export: {message}" + (f"\n  {hint}" if hint else ""), err=True)
