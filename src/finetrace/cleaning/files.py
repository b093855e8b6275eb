"""The kept and the removed rows as files, in the format that the training set came in."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from finetrace.atomic import write_atomically
from finetrace.cleaning.rank import Ranked
from finetrace.columns import json_value
from finetrace.delimited import delimited
from finetrace.errors import FinetraceError
from finetrace.examples import Example
from finetrace.formats import Table
from finetrace.units import many

FORMATS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")


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


def ranking_rows(ranked: Ranked, examples: Sequence[Example], bad: Sequence[Example]) -> list[dict[str, Any]]:
    """Of every row, the most responsible first: id, rank and value, whether it goes, and the bad answer it is most behind."""
    return [
        {
            "id": examples[row].id,
            "finetrace_rank": place,
            "finetrace_value": round(float(ranked.values[row]), 4),
            "removed": place <= ranked.removed,
            "most_behind": bad[int(ranked.nearest[row])].id,
        }
        for place, row in enumerate(ranked.order.tolist(), 1)
    ]


def raw_rows(table: Table, examples: Sequence[Example], index: Sequence[Example]) -> list[dict[str, Any]]:
    """Rows of the training set as they stand in its file, checked to be those of the index and in its order.

    Raises:
        FinetraceError: A row differs.
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
    return [dict(row.values) for row in table.rows]


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


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows in the format of the suffix, whole or not at all; a file that is there is not replaced.

    Raises:
        FinetraceError: The suffix is not known, the file exists, or a value has no place in the format.
    """
    refuse_path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, _encoded(path, rows))
    except (TypeError, ValueError, OSError) as error:
        raise FinetraceError(f"{path}: the rows cannot be written ({error}).") from error


def _encoded(path: Path, rows: Sequence[Mapping[str, Any]]) -> bytes:
    suffix = path.suffix.lower()
    if suffix in (".jsonl", ".ndjson"):
        return "".join(json.dumps(json_value(dict(row)), ensure_ascii=False) + "\n" for row in rows).encode()
    if suffix == ".json":
        return (json.dumps([json_value(dict(row)) for row in rows], ensure_ascii=False, indent=1) + "\n").encode()
    columns = list(dict.fromkeys(column for row in rows for column in row))
    if suffix == ".parquet":
        import pandas as pd

        return bytes(pd.DataFrame([dict(row) for row in rows], columns=columns).to_parquet(index=False))
    cells = ([_cell(row.get(column)) for column in columns] for row in rows)
    return delimited(columns, cells, "\t" if suffix == ".tsv" else ",").encode()


def _cell(value: Any) -> Any:
    """Objects and lists have no place in a cell but as JSON."""
    return json.dumps(json_value(value), ensure_ascii=False) if isinstance(value, (dict, list, tuple)) else value
