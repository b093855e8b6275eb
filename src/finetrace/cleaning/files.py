"""The kept and the removed rows as files, in the format that the training set came in."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from finetrace.atomic import write_atomically
from finetrace.cleaning.rank import Ranked
from finetrace.columns import Columns, assign, name_of
from finetrace.delimited import delimited
from finetrace.errors import FinetraceError
from finetrace.examples import Example
from finetrace.formats import Table, first_line
from finetrace.json_values import json_value
from finetrace.reading import rows_of
from finetrace.units import many

MARKS = ("finetrace_rank", "finetrace_value", "finetrace_reason")
FORMATS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")


@dataclass(frozen=True, eq=False)
class Rows:
    """Rows to be written.

    Attributes:
        values: As they go to JSON and CSV.
        arrow: The same rows as they go to Parquet, where their source has types of its own.
        names: The columns of labels and ids.
        texts: The columns of prompts and responses, of which a list in a cell of CSV would be read as text.
    """

    values: Sequence[Mapping[str, Any]]
    arrow: Any = None
    names: frozenset[str] = frozenset()
    texts: frozenset[str] = frozenset()

    def chosen(self, rows: Sequence[int]) -> Rows:
        """Some of them, in this order."""
        arrow = None if self.arrow is None else self.arrow.take(pa.array(rows, pa.int64()))
        return replace(self, values=[self.values[row] for row in rows], arrow=arrow)

    def beside(self, more: Sequence[Mapping[str, Any]]) -> Rows:
        """Each with further columns, the same in every row."""
        values = [{**row, **new} for row, new in zip(self.values, more, strict=True)]
        arrow = self.arrow
        if arrow is not None:
            for column in more[0]:
                arrow = arrow.append_column(column, pa.array([new[column] for new in more]))
        return replace(self, values=values, arrow=arrow)


def reasons(ranked: Ranked, bad: Sequence[Example]) -> list[dict[str, Any]]:
    """Of every removed row, the first to go first: its rank, value and why it goes."""
    found = []
    for place, row in enumerate(ranked.gone, 1):
        answer = bad[int(ranked.nearest[row])]
        words = " ".join(answer.prompt.split())[:80]
        found.append(
            {
                "finetrace_rank": place,
                "finetrace_value": round(float(ranked.values[row]), 4),
                "finetrace_reason": f"number {place} of {len(ranked.values)} behind {many(len(bad), 'bad answer')} by "
                f"{' and '.join(ranked.methods)}; most of all behind {answer.id}: {words}",
            }
        )
    return found


def ranking_rows(ranked: Ranked, examples: Sequence[Example], bad: Sequence[Example]) -> Rows:
    """Of every row, the most responsible first: id, rank and value, whether it goes, and the bad answer it is most behind."""
    values = [
        {
            "id": examples[row].id,
            "finetrace_rank": place,
            "finetrace_value": round(float(ranked.values[row]), 4),
            "removed": place <= ranked.removed,
            "most_behind": bad[int(ranked.nearest[row])].id,
        }
        for place, row in enumerate(ranked.order.tolist(), 1)
    ]
    return Rows(values)


def index_rows(examples: Sequence[Example], name: str) -> Rows:
    """Rows of an index, where the training set itself is not at hand; `name` is what errors call it."""
    return _unmarked(Rows(rows_of(examples, name), names=frozenset({"id", "label"})), name)


def data_rows(table: Table, columns: Columns, examples: Sequence[Example], index: Sequence[Example]) -> Rows:
    """Rows of the training set as they stand in its file, checked to be those of the index and in its order.

    Raises:
        FinetraceError: A row differs, or a column has the name of one that the removed rows are given.
    """
    if len(examples) != len(index):
        raise FinetraceError(
            f"{table.name} holds {len(examples)} rows and the index {len(index)}; give the file it was built from."
        )
    for row, mine, theirs in zip(table.rows, examples, index, strict=True):
        if (mine.id, mine.messages) != (theirs.id, theirs.messages):
            raise FinetraceError(
                f"{table.name}, row {row.number}: it is not the index's {theirs.id}; give the file the index was built from."
            )
    values = [dict(row.values) for row in table.rows]
    for column, names in table.label_names.items():
        for each in values:
            each[column] = name_of(each.get(column), column, names)
    roles = assign(columns, table.columns, table.name, responses=True)
    named = frozenset(name for name in (roles.id, roles.label) if name is not None)
    texts = frozenset(name for name in (roles.prompt, roles.context, roles.response, roles.system) if name is not None)
    return _unmarked(Rows(values, table.arrow() if table.arrow is not None else None, named, texts), table.name)


def _unmarked(rows: Rows, name: str) -> Rows:
    if there := [column for column in MARKS if any(column in row for row in rows.values)]:
        raise FinetraceError(f"{name}: the removed rows are given a column {there[0]!r}, and there is one; rename it.")
    return rows


def refuse_path(path: Path) -> None:
    """Stop where rows cannot go to `path`.

    Raises:
        FinetraceError: The suffix is not known, the file exists, or its folder is a file or cannot be written.
    """
    if path.suffix.lower() not in FORMATS:
        raise FinetraceError(f"{path}: rows are written as {', '.join(FORMATS)}; choose one of these.")
    if path.exists():
        raise FinetraceError(f"{path} exists already and is left as it is; choose another name or remove it.")
    blocked = next((folder for folder in path.parents if folder.exists()), None)
    if blocked is not None and not blocked.is_dir():
        raise FinetraceError(f"{path}: {blocked} is a file, so no rows can be written there; choose another folder.")
    if blocked is not None and not os.access(blocked, os.W_OK):
        raise FinetraceError(f"{path}: nothing can be written in {blocked}; choose another folder.")


def write_files(files: Mapping[Path, Rows]) -> None:
    """Write rows in the format of each suffix: every file, whole, or none; one that is there is not replaced.

    Raises:
        FinetraceError: A suffix is not known, a file exists or cannot be written, or a value has no place in the format.
    """
    for path in files:
        refuse_path(path)
    contents = {path: _encoded(path, rows) for path, rows in files.items()}
    written: list[Path] = []
    try:
        for path, content in contents.items():
            _make_folder(path)
            write_atomically(path, content)
            written.append(path)
    except BaseException:
        for path in written:
            path.unlink(missing_ok=True)
        raise


def _make_folder(path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FinetraceError(f"{path}: its folder cannot be made ({error}); choose another.") from error


def _encoded(path: Path, rows: Rows) -> bytes:
    try:
        return _in_format(path.suffix.lower(), rows)
    except (TypeError, ValueError, OverflowError, pa.ArrowException) as error:
        raise FinetraceError(
            f"{path}: the rows cannot be written in this format ({first_line(error)}); choose another, such as .jsonl."
        ) from error


def _in_format(suffix: str, rows: Rows) -> bytes:
    if suffix in (".jsonl", ".ndjson"):
        return "".join(json.dumps(json_value(dict(row)), ensure_ascii=False) + "\n" for row in rows.values).encode()
    if suffix == ".json":
        return (
            json.dumps([json_value(dict(row)) for row in rows.values], ensure_ascii=False, indent=1) + "\n"
        ).encode()
    columns = list(dict.fromkeys(column for row in rows.values for column in row))
    if suffix == ".parquet":
        table = rows.arrow
        if table is None:
            table = pa.table({column: pa.array([row.get(column) for row in rows.values]) for column in columns})
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink)
        return bytes(sink.getvalue().to_pybytes())
    for column in columns:
        if column in rows.texts and any(isinstance(row.get(column), list) for row in rows.values):
            raise ValueError(f"the column {column!r} holds lists, which would be read back as text")
    cells = ([_cell(row.get(column), column in rows.names) for column in columns] for row in rows.values)
    return delimited(columns, cells, "\t" if suffix == ".tsv" else ",").encode()


def _cell(value: Any, names: bool) -> Any:
    """Objects and lists have no place in a cell but as JSON; a class or an id 2.0 is read as 2, and the text 2.0 is not."""
    value = json_value(value)
    if names and isinstance(value, float) and value.is_integer():
        return int(value)
    return json.dumps(value, ensure_ascii=False) if isinstance(value, (dict, list)) else value
