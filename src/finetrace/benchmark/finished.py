"""Finished cells as they lie in a benchmark's folder, read with one sentence where one is damaged."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

import pandas as pd
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file

from finetrace.benchmark.cell import DONE, QUERIES, SCORES, Cell
from finetrace.errors import FinetraceError
from finetrace.examples import Example
from finetrace.reading import read_examples
from finetrace.tasks import TASKS

T = TypeVar("T")
ALIKE = ("size", "task_seed", "model", "epochs", "chat_template", "target_modules", "modules")  # of all seeds of a task

OTHERS = {  # notes of commands that write results.json, too
    "attack-success.json": "an attack-success run",
    "study.json": "a study",
    "demo.json": "a demo",
    "validation.json": "a validation",
    "cleaning.json": "a cleaning",
}


def document(folder: Path) -> dict[str, Any]:
    """`config`, `records` and the rest of a cell's results."""
    found = _read(folder / DONE, lambda path: json.loads(path.read_text(encoding="utf-8")))
    if not isinstance(found, dict) or not {"config", "records"} <= set(found):
        raise _damaged(folder / DONE, "it holds no results")
    return found


def values(folder: Path) -> pd.DataFrame:
    """Every metric, method by method and query by query."""
    return _read(folder / QUERIES, pd.read_parquet)


def scores(folder: Path) -> dict[str, NDArray[Any]]:
    """(m, n) of each method by its label."""
    return _read(folder / SCORES, lambda path: load_file(str(path)))


def rows(folder: Path) -> tuple[list[Example], list[Example]]:
    """The training rows and the queries."""
    return read_examples(folder / "train.jsonl"), read_examples(folder / "queries.jsonl")


def finished(folder: Path) -> list[Cell]:
    """Every finished cell of a benchmark's folder: tasks as they are listed, others after them; protocols; seeds."""
    names = {field.name for field in fields(Cell)}
    found = []
    for path in sorted(folder.glob(f"*/*/seed-*/{DONE}")):
        config = {key: value for key, value in document(path.parent)["config"].items() if key in names}
        config |= {key: tuple(config[key]) for key in ("methods", "target_modules", "modules") if key in config}
        found.append(Cell(**config))
    order = {task: place for place, task in enumerate(TASKS)}
    return sorted(found, key=lambda cell: (order.get(cell.task, len(order)), cell.task, cell.protocol, cell.seed))


def settings(cell: Cell) -> dict[str, Any]:
    """What all seeds of its task have alike, without what was left as it is by default."""
    return {name: value for name in ALIKE if (value := getattr(cell, name)) not in (None, ())}


def refuse_other(folder: Path) -> None:
    """Stop where another command's results lie in the folder, since those of the benchmark have the same names.

    Raises:
        FinetraceError: They do.
    """
    for name, what in OTHERS.items():
        if (folder / name).exists():
            raise FinetraceError(f"{folder}: {what} is there, whose results would be lost; choose another --out.")


def refuse_mixed(folder: Path, cells: Iterable[Cell]) -> None:
    """Stop where seeds of a task differ in more than the seed: tables are means over seeds.

    Raises:
        FinetraceError: They do.
    """
    first: dict[tuple[str, str], Cell] = {}
    for cell in cells:
        there = first.setdefault((cell.task, cell.protocol), cell)
        for name in ALIKE:
            mine, theirs = getattr(cell, name), getattr(there, name)
            if mine != theirs:
                raise FinetraceError(
                    f"{folder / there.folder}: a run with other settings is there; choose another --out or remove the folder. "
                    f"Its {name} is {theirs}, that of {cell.name} is {mine}, and tables are means over seeds."
                )


def _read(path: Path, reader: Callable[[Path], T]) -> T:
    try:
        return reader(path)
    except (OSError, ValueError, SafetensorError) as error:
        raise _damaged(path, " ".join(str(error).split())[:120]) from error


def _damaged(path: Path, why: str) -> FinetraceError:
    return FinetraceError(f"{path}: cannot be read ({why}); remove {path.parent} and it is run again.")
