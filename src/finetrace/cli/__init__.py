"""The command line: a small file a command; heavy imports wait until a command runs."""

from __future__ import annotations

import os
import sys

import typer

from finetrace._version import __version__
from finetrace.cli import bench, clean, demo, doctor, finetune, index, methods, plan, study, tasks, trace, validate
from finetrace.errors import FinetraceError
from finetrace.reporting.cells import printable

app = typer.Typer(
    name="finetrace",
    help="Which training examples made my fine-tuned language model say that, and can I trust the answer?",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command("demo")(demo.demo)
app.command("finetune")(finetune.finetune)
app.command("plan")(plan.command)
app.add_typer(index.app, name="index")
app.command("trace")(trace.trace)
app.command("clean")(clean.clean)
app.command("validate")(validate.validate)
app.command("bench")(bench.bench)
app.command("study")(study.study)
app.command("doctor")(doctor.doctor)
app.command("methods")(methods.methods)
app.add_typer(tasks.app, name="tasks")


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
        typer.echo(f"finetrace: {printable(str(error))}", err=True)
        sys.exit(error.exit_code)
    finally:
        _flush()


def _flush() -> None:
    """Print what is held back; where the reader of a pipe has gone, as `head` does, there is nothing to say: exit code 1."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the interpreter flushes once more at its end
        sys.exit(1)
