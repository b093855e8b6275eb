"""The command line: a small file a command, imported when it is asked for; heavy imports wait until it runs."""

from __future__ import annotations

import errno
import os
import sys
from typing import NoReturn

import typer

from finetrace._version import __version__
from finetrace.cli.commands import Commands
from finetrace.errors import FinetraceError

app = typer.Typer(
    cls=Commands,
    name="finetrace",
    help="Which training examples made my fine-tuned language model say that, and can I trust the answer?",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


# what a person can mend who gave the path: nothing may be looked at or written there, or it is no path, or no file's
MENDABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.ELOOP)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"finetrace {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the version."),
) -> None:
    pass


def main() -> None:
    """Entry point: a problem the user can mend is one sentence on standard error and exit code 2."""
    try:
        app()
    except FinetraceError as error:
        _end(error)
    except OSError as error:
        if error.filename is None or error.errno not in MENDABLE:
            raise
        _end(FinetraceError(f"{error.filename}: {error.strerror}; check the path, or choose another one."))
    finally:
        _flush()


def _end(error: FinetraceError) -> NoReturn:
    """Say what is wrong and end."""
    from finetrace.reporting.cells import printable

    typer.echo(f"finetrace: {printable(str(error))}", err=True)
    sys.exit(error.exit_code)


def _flush() -> None:
    """Print what is held back; where the reader of a pipe has gone, as `head` does, there is nothing to say: exit code 1."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the interpreter flushes once more at its end
        sys.exit(1)
