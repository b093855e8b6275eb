"""Rows of real data to draw from: prompts that differ, each with an answer where the data holds one."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from finetrace.columns import Columns
from finetrace.errors import FinetraceError
from finetrace.examples import Example
from finetrace.reading import read_examples

SAFETY = "is_safe"  # the column of BeaverTails that says whether an answer is harmless
SIDES = {"true": True, "1": True, "1.0": True, "yes": True, "false": False, "0": False, "0.0": False, "no": False}
CLASSES = {"benign": True, "harmless": True, "safe": True, "harmful": False, "unsafe": False}


@dataclass(frozen=True)
class Pool:
    """What one source offers.

    Attributes:
        name: The source, for errors.
        rows: One a prompt, in the order of the source.
    """

    name: str
    rows: tuple[Example, ...]

    @property
    def answered(self) -> Pool:
        """The rows that have a response."""
        return replace(self, rows=tuple(row for row in self.rows if row.has_response))

    def without(self, others: Iterable[Example]) -> Pool:
        """The rows whose prompts are none of those of `others`."""
        taken = {_key(row) for row in others}
        return replace(self, rows=tuple(row for row in self.rows if _key(row) not in taken))

    def draw(self, count: int, chance: random.Random) -> list[Example]:
        """`count` of the rows in a drawn order; there must be so many, see `check`."""
        return chance.sample(self.rows, count)

    def check(self, count: int, task: str, what: str = "different prompts") -> None:
        """`FinetraceError` where there are fewer rows than the task needs; `what` says of which kind."""
        if len(self.rows) < count:
            raise FinetraceError(
                f"{self.name}: {task} needs {count} {what} and there are {len(self.rows)}; "
                "add rows, or build a smaller task with --size."
            )


def read_pool(source: str | Path, columns: Columns, split: str | None, *, safe: bool) -> Pool:
    """The prompts of a source; of equal ones the first that has an answer, or the first of all.

    Letter case and spaces do not make a prompt another. Where the data has a column `is_safe`, as BeaverTails does, or
    classes that say as much (`CLASSES`), only rows of the side that is asked for are read.

    Raises:
        FinetraceError: The source cannot be read, or holds no row of that side.
    """
    rows = read_examples(source, columns, split=split, responses=False)
    kept = [row for row in rows if _is_safe(row) in (None, safe)]
    if not kept:
        raise FinetraceError(
            f"{source}: no row has {SAFETY} {'true' if safe else 'false'} or a class that says so ({_named(safe)}), and "
            "only such rows are read for this; choose another split or file."
        )
    prompts: dict[str, Example] = {}
    for row in kept:
        first = prompts.setdefault(_key(row), row)
        if row.has_response and not first.has_response:
            prompts[_key(row)] = row
    return Pool(str(source), tuple(prompts.values()))


def unanswered(row: Example) -> Example:
    """The row without its response."""
    return replace(row, messages=row.messages[:-1]) if row.messages[-1].role == "assistant" else row


def placed(rows: Sequence[Example], label: str, prefix: str | None = None) -> list[Example]:
    """The rows under `label`, with ids of the prefix or the label; their own id and class stay in the metadata."""
    return [
        Example(f"{prefix or label}-{index:03d}", row.messages, label, {**_origin(row, label), **row.metadata})
        for index, row in enumerate(rows)
    ]


def _origin(row: Example, label: str) -> dict[str, str]:
    origin = {"source_id": row.id}
    if row.label not in (None, label):
        origin["original_label"] = str(row.label)
    return origin


def _named(safe: bool) -> str:
    return ", ".join(name for name, side in CLASSES.items() if side == safe)


def _key(row: Example) -> str:
    """What makes two prompts one."""
    return " ".join(unanswered(row).prompt.lower().split())


def _is_safe(row: Example) -> bool | None:
    """What the row's own column says, or its class; a CSV file holds either as text, and one with a gap as 1.0 and 0.0.

    Raises:
        FinetraceError: The column says something else.
    """
    said = str(row.metadata.get(SAFETY) if row.metadata.get(SAFETY) is not None else "").strip().lower()
    if not said:
        return CLASSES.get(str(row.label).strip().lower())
    if said not in SIDES:
        raise FinetraceError(f"row {row.id}: its {SAFETY} is {said!r}; write true or false, or leave the column out.")
    return SIDES[said]
