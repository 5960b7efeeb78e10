"""The `rookery` command: registers the commands and turns user errors into one message and exit status 2."""

from __future__ import annotations

import errno
import signal
import sys
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from data_prep.wording import printable
from launch import (
    bench_cli,
    compare_cli,
    config_cli,
    eval_cli,
    explain_cli,
    export_cli,
    generate_cli,
    models_cli,
    prep_cli,
    sweep_cli,
    sync_cli,
    train_cli,
)
from pipeline.errors import UserError
from pipeline.streams import abandon, name_output, open_closed

# What the machine refuses, wherever it turns up, and what to do about it.
_REFUSED = {
    errno.ENOSPC: "free space, or write elsewhere",
    errno.EDQUOT: "free space, or write elsewhere",
    errno.EFBIG: "raise the limit of files (ulimit -f), or write elsewhere",
    errno.EROFS: "write elsewhere",
    errno.EACCES: "change its permissions, or choose another place",
    errno.EPERM: "change its permissions, or choose another place",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.ENFILE: "close programs that have many files open",
    errno.EIO: "look after the disk, or take another one",
}
# Commands that leave this to nobody else.
_ENDED_AS_BY_CTRL_C = ("eval", "verify", "compare", "explain", "generate", "export", "sync", "bench")

_commands = typer.Typer(
    name="rookery",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"rookery {metadata.version('rookery')}")
        raise typer.Exit


@_commands.callback()
def _options(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="print the version and exit")
    ] = False,
) -> None:
    """Train hierarchical vision transformers from scratch: shard the data, train, evaluate, compare."""
    if context.invoked_subcommand in _ENDED_AS_BY_CTRL_C and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        # A scheduler's SIGTERM takes folders that are half written away, and processes, as Ctrl-C does.
        signal.signal(signal.SIGTERM, signal.default_int_handler)


_commands.command()(prep_cli.prep)
_commands.command()(prep_cli.verify)
_commands.command()(train_cli.train)
_commands.command()(sweep_cli.sweep)
_commands.command("eval")(eval_cli.evaluate)
_commands.command(cls=compare_cli.CompareCommand)(compare_cli.compare)
_commands.command()(models_cli.models)
_commands.command()(explain_cli.explain)
_commands.command()(generate_cli.generate)
_commands.command()(export_cli.export)
_commands.command()(sync_cli.sync)
_commands.command()(config_cli.config)
_commands.add_typer(bench_cli.bench, name="bench")


def _say(text: str) -> None:
    Console(stderr=True, soft_wrap=True, highlight=False, emoji=False).print(f"rookery: {text}", markup=False)


def app() -> None:
    """Run the command that was asked for."""
    open_closed()
    name_output()
    try:
        Path.cwd()
    except FileNotFoundError:
        # torch's libraries would end the process, with words that lead nowhere.
        _say("the working directory is gone, it was removed or made anew; cd to another one, or there again")
        sys.exit(2)
    try:
        try:
            _commands()
        finally:
            sys.stdout.flush()
    except UserError as error:
        _say(str(error))
        sys.exit(error.status)
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's; not every command has imported torch
            raise
        from pipeline.train.no_room import no_room

        _say(no_room(error))
        sys.exit(2)
    except BrokenPipeError:
        # The reader of a pipe (`| head`) left; the closing flush must not complain either.
        abandon()
        sys.exit(0)
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:  # none of the ways to look for a file can take such a name
            text = f"{str(error.filename)[:60]}...: the name is too long; choose a shorter one"
        elif error.errno in _REFUSED:
            place = "" if error.filename is None else f"{printable(str(error.filename))}: "
            text = f"{place}{error.strerror}; {_REFUSED[error.errno]}"
        else:
            raise
        with suppress(OSError):
            print(f"rookery: {text}", file=sys.stderr, flush=True)
        abandon()
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
