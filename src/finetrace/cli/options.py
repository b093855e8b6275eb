"""Options that several commands share, and what they turn into."""

from __future__ import annotations

import contextlib
import functools
import inspect
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast, get_args

import typer

from finetrace.errors import FinetraceError
from finetrace.reporting.cells import printable

if TYPE_CHECKING:
    from finetrace.encoding import LengthReport
    from finetrace.execution import Engine
    from finetrace.models import DType
    from finetrace.reading import Columns

Model = Annotated[
    str,
    typer.Option(help="Base model: `embedded`, `embedded-aligned`, a folder, or a Hub id."),
]
Adapter = Annotated[str | None, typer.Option(help="PEFT LoRA adapter: a folder or a Hub id.")]
Dtype = Annotated[
    str, typer.Option(help="auto, float32, bfloat16, float16 or float64; auto is bfloat16 where the hardware has it.")
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
DeviceMap = Annotated[
    str | None,
    typer.Option(
        help="Layers on several GPUs: auto, balanced, balanced_low_0, sequential, or a JSON file from module names to devices."
    ),
]
TrustRemoteCode = Annotated[bool, typer.Option("--trust-remote-code", help="Run code that comes with the model.")]
LossOn = Annotated[
    str, typer.Option(help="Tokens of the loss: response, last-turn, all, first:K, weights, probe or probe:TEXT.")
]
At = Annotated[str, typer.Option(help="Where gradients are taken: at the `end` of the fine-tuning, or its `start`.")]
MaxLength = Annotated[int | None, typer.Option(min=2, help="Cut after so many tokens; nothing is cut if not given.")]
Template = Annotated[str | None, typer.Option(help="A Jinja chat template: a file, its text, or `plain`.")]
Benign = Annotated[str | None, typer.Option(help="Real benign rows for mixed-small, mixed-large and harmfulcheck.")]
Share = Annotated[float | None, typer.Option(help="Of the labels that mislabelled flips; 0.2 if not given.")]
PromptColumn = Annotated[str | None, typer.Option(help="Column of the prompt; guessed if not given.")]
ResponseColumn = Annotated[str | None, typer.Option(help="Column of the response.")]
MessagesColumn = Annotated[str | None, typer.Option(help="Column of a list of chat messages.")]
LabelColumn = Annotated[str | None, typer.Option(help="Column of the class, if any.")]
IdColumn = Annotated[str | None, typer.Option(help="Column of the id, if any.")]
Split = Annotated[str | None, typer.Option(help="Split of a saved or Hub data set.")]
EngineOption = Annotated[
    str | None,
    typer.Option(
        "--engine",
        help="local (this process), processes (this machine) or ray (a cluster); follows --workers if not given.",
    ),
]
Workers = Annotated[int | None, typer.Option(min=1, help="Workers side by side; 1 if not given.")]
Address = Annotated[
    str | None,
    typer.Option(help="Of a running Ray cluster: auto or ray://HOST:PORT; one is started here if not given."),
]
GpusPerTask = Annotated[
    float | None, typer.Option(help="GPUs that a Ray worker reserves; 1 where the cluster has any, if not given.")
]


def command(work: Callable[..., None], like: Callable[..., None] | None = None) -> Callable[..., None]:
    """`work` with what the command line shows of it: parameters that are no options (not `Annotated`) are left out.

    Where `work` takes `**options`, it gets the options of the command `like` as well, in front of its own; one that both
    have is its own.
    """
    shown: list[inspect.Parameter] = []
    # not `get_type_hints`, which on Python 3.10 hides what is `Annotated` in an `Optional` where the default is `None`
    for each in inspect.signature(work, eval_str=True).parameters.values():
        if each.kind is inspect.Parameter.VAR_KEYWORD and like is not None:
            own = {one.name for one in shown}
            shown = [*(one for one in inspect.signature(like).parameters.values() if one.name not in own), *shown]
        elif hasattr(each.annotation, "__metadata__"):
            shown.append(each.replace(kind=inspect.Parameter.POSITIONAL_OR_KEYWORD))

    @functools.wraps(work)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        work(*args, **kwargs)

    wrapped.__signature__ = inspect.Signature(shown)  # type: ignore[attr-defined]
    wrapped.__annotations__ = {each.name: each.annotation for each in shown}
    return wrapped


def columns(
    prompt: str | None, response: str | None, messages: str | None, label: str | None, id_: str | None
) -> Columns:
    """The column choices as the reader takes them."""
    from finetrace.reading import Columns

    return Columns(messages=messages, prompt=prompt, response=response, label=label, id=id_)


def dtype(name: str) -> DType:
    """A checked --dtype."""
    from finetrace.models import DType

    return cast("DType", one_of("--dtype", name, get_args(DType)))


def engine(name: str | None, workers: int | None, address: str | None, gpus_per_task: float | None) -> Engine:
    """The engine of --engine, --workers, --address and --gpus-per-task; several workers alone are processes."""
    from finetrace.execution import Engine, EngineName

    if name in ("processes", "ray") and workers is None:
        raise FinetraceError(f"--engine {name}: say with --workers how many to run side by side.")
    alone = "local" if (workers or 1) == 1 else "processes"
    return Engine(cast("EngineName", name or alone), workers or 1, address, gpus_per_task)


def one_of(flag: str, value: str, allowed: tuple[str, ...]) -> str:
    """`value`, if it is among the words `flag` takes."""
    if value not in allowed:
        raise FinetraceError(f"{flag} {value}: not known; use {', '.join(allowed)}.")
    return value


def refuse_given(given: Mapping[str, object], why: str) -> None:
    """Stop where one of some options was given, which nothing heeds."""
    if idle := [name for name, value in given.items() if value is not None]:
        raise FinetraceError(f"{' '.join(idle)}: {why}, or leave it out.")


def say(text: str = "") -> None:
    """A line for the person, on standard error: standard output is for results."""
    typer.echo(printable(text), err=True)


def listing(rows: Iterable[Sequence[str]]) -> None:
    """Columns on standard output, the last one wrapped within the terminal."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, show_header=False)
    for row in rows:
        if not table.columns:
            for place in range(len(row)):
                table.add_column(no_wrap=place + 1 < len(row))
        table.add_row(*map(Text, row))
    Console().print(table)


def say_lengths(report: LengthReport) -> None:
    """Say what is longer than the limit, if anything is."""
    if report.sentence():
        say(report.sentence())


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """Keep the libraries' own bars and advice off the terminal; what matters is said in our words."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformers import logging

        logging.set_verbosity_error()
        logging.disable_progress_bar()
        yield


def existing(path: Path, flag: str) -> Path:
    """`path`, if it is there."""
    if not path.exists():
        raise FinetraceError(f"{flag} {path}: there is no such file or folder.")
    return path


def new_files(named: Mapping[str, tuple[Path | None, Sequence[str]]], overwrite: bool | None = None) -> None:
    """Check the names of files to be written before any work is done; `overwrite` where the command has this option.

    Args:
        named: Flag to path and the suffixes that it may have.
    """
    given: dict[Path, str] = {}
    for flag, (path, kinds) in named.items():
        if path is None:
            continue
        if path.suffix not in kinds:
            raise FinetraceError(f"{flag} {path}: the name must end in {' or '.join(kinds)}.")
        if (same := given.setdefault(path.resolve(), flag)) != flag:
            raise FinetraceError(f"{flag} {path}: {same} is to be written there too; choose another name.")
        if path.exists() and not (overwrite and path.is_file()):
            ways = "choose another name" + (", or add --overwrite" if overwrite is False and path.is_file() else "")
            raise FinetraceError(f"{flag} {path}: this exists already and is left as it is; {ways}.")
        folder = next(each for each in path.absolute().parents if each.exists())
        if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
            why = "nothing may be written there" if folder.is_dir() else "not a folder"
            raise FinetraceError(f"{flag} {path}: cannot be written ({folder}: {why}); choose another folder.")
