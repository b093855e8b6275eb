"""The commands by name: what each does, and where it is; a command's file is imported when it is asked for."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, MutableMapping
from typing import Any, NamedTuple

import typer
from typer.core import TyperGroup


class Place(NamedTuple):
    """What a command does, in a line that fits the list of commands; its module; the function, or `app` with more commands."""

    does: str
    module: str
    attribute: str


COMMANDS = {
    "demo": Place("Fine-tune on a set with unsafe answers in it, and trace them.", "demo", "demo"),
    "finetune": Place("Fine-tune a LoRA adapter, with a checkpoint of every epoch.", "finetune", "finetune"),
    "plan": Place("Say what time, memory and disk an index would take.", "plan", "command"),
    "index": Place("Collect gradients of a training set; append, verify, repair.", "index", "app"),
    "trace": Place("Rank the training examples behind an answer.", "trace", "trace"),
    "clean": Place("Rank rows against bad answers; write those to keep, or remove.", "clean", "clean"),
    "validate": Place("Retrain without rows, and say which method to believe.", "validate", "validate"),
    "bench": Place("Run the benchmark: every task, method, protocol and seed.", "bench", "bench"),
    "study": Place("Run one of the paper's analyses: tables and figures.", "study", "study"),
    "doctor": Place("Look at this machine: packages, devices, disk, kernels.", "doctor", "doctor"),
    "methods": Place("List the attribution methods, or explain one of them.", "methods", "methods"),
    "tasks": Place("List the benchmark's tasks, write one, or generate one.", "tasks", "app"),
}


class Found(MutableMapping[str, Any]):
    """Commands that are imported when one is looked up: as many names as `COMMANDS` at no cost."""

    def __init__(self) -> None:
        self.loaded: dict[str, Any] = {}

    def __getitem__(self, name: str) -> Any:
        if name not in self.loaded:
            place = COMMANDS[name]
            found = getattr(importlib.import_module(f"finetrace.cli.{place.module}"), place.attribute)
            if not isinstance(found, typer.Typer):
                alone = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
                alone.command(name)(found)
                found = alone
            self.loaded[name] = typer.main.get_command(found)
        return self.loaded[name]

    def __setitem__(self, name: str, command: Any) -> None:
        self.loaded[name] = command

    def __delitem__(self, name: str) -> None:
        del self.loaded[name]

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys([*COMMANDS, *self.loaded]))

    def __len__(self) -> int:
        return len({*COMMANDS, *self.loaded})


class Commands(TyperGroup):
    """The group of all commands; its help says what each does without importing it."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.commands = Found()

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write the list of commands."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, place.does) for name, place in COMMANDS.items()])
