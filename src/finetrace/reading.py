"""Examples in and out: a file, a saved or Hub dataset or rows in memory become examples, and examples a file."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from finetrace.atomic import write_atomically
from finetrace.columns import Columns, Roles, assign, mistaken_for_roles, name_of, turns_of
from finetrace.errors import FinetraceError
from finetrace.examples import Example, Message, content_id
from finetrace.formats import Row, Table, table_of
from finetrace.json_values import json_value
from finetrace.sources import read_table

__all__ = ["Columns", "examples_from_rows", "read_examples", "rows_of", "write_examples"]


class _Draft(NamedTuple):
    """A row read so far: its id is final only once all rows are known."""

    row: int
    id: str | None
    messages: tuple[Message, ...]
    label: str | None
    metadata: Mapping[str, Any]


def read_examples(
    source: str | Path,
    columns: Columns = Columns(),
    *,
    split: str | None = None,
    subset: str | None = None,
    responses: bool = True,
) -> list[Example]:
    """Read examples from a file, a folder of `datasets.save_to_disk`, or the Hugging Face Hub.

    Args:
        source: Path of a `.jsonl`, `.ndjson`, `.json`, `.csv`, `.tsv` or `.parquet` file or of a saved dataset; if
            nothing is there, the `owner/name` of a dataset on the Hub.
        columns: Names of the columns; those left out are guessed.
        split: Which split to read; by default the only one, or `train`.
        subset: Which subset (configuration) of a Hub dataset to read.
        responses: Whether every row needs a response; False reads queries, which may lack one.

    Raises:
        FinetraceError: What is wrong, in which file and row, and what to do.
    """
    return _examples(read_table(source, split, subset), columns, responses)


def examples_from_rows(
    rows: Iterable[Mapping[str, Any]] | Iterable[Example],
    columns: Columns = Columns(),
    *,
    source: str = "rows",
    responses: bool = True,
) -> list[Example]:
    """Examples from rows in memory: mappings, a `datasets.Dataset`, or examples, which are checked and passed through.

    Args:
        rows: The rows.
        columns: Names of the columns; those left out are guessed.
        source: What errors call the rows.
        responses: Whether every row needs a response.

    Raises:
        FinetraceError: What is wrong, in which row, and what to do.
    """
    if isinstance(rows, Iterator):  # it can be looked through only once
        rows = list(rows)
    if isinstance(rows, Sequence) and rows and all(isinstance(row, Example) for row in rows):
        return _checked([row for row in rows if isinstance(row, Example)], source, responses)
    return _examples(table_of(rows, source), columns, responses)


def write_examples(path: str | Path, examples: Sequence[Example], *, overwrite: bool = False) -> None:
    """Write examples as JSON Lines that `read_examples` reads back as they were.

    Rows are `prompt` and `response` if every example is a user's turn with or without an answer, else `messages`;
    beside them stand `id`, `label` (if any example has one) and the metadata. Metadata whose name would be taken for
    one of these goes into an object in the column `metadata`. The file appears whole or not at all.

    Args:
        path: A `.jsonl` or `.ndjson` file; its folder is made if need be.
        examples: What to write, each with an id of its own.
        overwrite: Whether an existing file may be replaced.

    Raises:
        FinetraceError: The file exists, has another suffix or cannot be written, or an example cannot be kept.
    """
    path = Path(path)
    if path.suffix.lower() not in (".jsonl", ".ndjson"):
        raise FinetraceError(f"{path}: examples are written as JSON Lines; give the file the suffix .jsonl")
    if path.exists() and not overwrite:
        raise FinetraceError(f"{path} exists already and is left as it is; choose another name or allow overwriting")
    lines = _json_lines(examples, str(path))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FinetraceError(f"{path} cannot be written ({error.strerror or error}); check folder and space") from error
    write_atomically(path, b"".join(lines), str(os.getpid()))


def rows_of(examples: Sequence[Example], name: str) -> list[dict[str, Any]]:
    """The rows that `write_examples` writes, of which `read_examples` makes the same examples.

    Args:
        examples: Each with an id of its own.
        name: What errors call the rows.

    Raises:
        FinetraceError: An id is empty or there twice.
    """
    paired = all(_is_pair(example) for example in examples)
    labelled = any(example.label is not None for example in examples)
    columns = {"id", *(("prompt", "response") if paired else ("messages",)), *(("label",) if labelled else ())}
    keys = {key for example in examples for key in example.metadata}
    # A column of the metadata must not be read back as something else, nor overwrite what stands under its name.
    guessed = ["system", *(("messages",) if paired else ()), *(() if labelled else ("label",))]
    nested = (keys & (columns | {"metadata"})) | mistaken_for_roles(keys, guessed)

    rows, seen = [], dict[str, int]()
    for number, example in enumerate(examples, 1):
        if not example.id.strip():
            raise FinetraceError(f"{name}, row {number}: the example has an empty id; give it one")
        if (first := seen.setdefault(example.id, number)) != number:
            raise FinetraceError(
                f"{name}, row {number}: the id {example.id!r} is already that of row {first}; give each example its own"
            )
        row: dict[str, Any] = {"id": example.id}
        if paired:
            turns = [turn.content for turn in example.messages]
            row |= {"prompt": turns[0], "response": turns[1] if len(turns) > 1 else None}
        else:
            row["messages"] = [{"role": turn.role, "content": turn.content} for turn in example.messages]
        if labelled:
            row["label"] = example.label
        row |= {key: value for key, value in example.metadata.items() if key not in nested}
        if inner := {key: value for key, value in example.metadata.items() if key in nested}:
            row["metadata"] = inner
        rows.append(row)
    return rows


def _json_lines(examples: Sequence[Example], name: str) -> list[bytes]:
    lines = []
    for number, row in enumerate(rows_of(examples, name), 1):
        try:
            lines.append(json.dumps(json_value(row), ensure_ascii=False, allow_nan=False).encode() + b"\n")
        except UnicodeEncodeError as error:
            raise FinetraceError(f"{name}, row {number}: {_half_pair(error)}") from None
    return lines


def _is_pair(example: Example) -> bool:
    """Whether prompt and response say all there is: a user's turn, then the assistant's or none."""
    roles = [turn.role for turn in example.messages]
    return roles == ["user"] or (roles == ["user", "assistant"] and example.has_response)


def _examples(table: Table, columns: Columns, responses: bool) -> list[Example]:
    if not table.rows:
        raise FinetraceError(f"{table.name} holds no rows; give it at least one example")
    roles = assign(columns, table.columns, table.name, responses=responses)
    guessed = roles.label if columns.label is None else None
    if guessed is not None and all(isinstance(row.values.get(guessed), dict) for row in table.rows):
        roles = replace(roles, label=None)  # objects are no classes: `category` of BeaverTails
    drafts = []
    for row in table.rows:
        try:
            drafts.append(_draft(row, roles, table.label_names, responses))
        except FinetraceError as error:  # raised where the cause is known, placed where the row is
            raise FinetraceError(f"{table.name}, row {row.number}: {error}") from None
    return _with_ids(drafts, table.name)


def _draft(row: Row, roles: Roles, label_names: Mapping[str, Sequence[str]], responses: bool) -> _Draft:
    values: dict[str, Any] = {}
    for column, value in row.values.items():
        try:
            values[json_value(column)] = json_value(value)
        except UnicodeEncodeError as error:
            raise FinetraceError(f"column {column!r}: {_half_pair(error)}") from None
        except RecursionError:
            raise FinetraceError(f"column {column!r} is nested too deeply; flatten it or remove the row") from None
    messages, used = turns_of(values, roles, responses=responses)
    for column, names in label_names.items():
        if column not in used and column in values:
            values[column] = name_of(values[column], column, names)
    id, label = (name_of(values.get(name), name) if name is not None else None for name in (roles.id, roles.label))
    rest = {column: value for column, value in values.items() if column not in (*used, roles.id, roles.label)}
    # An object called `metadata` is what it says, unless opening it would hide another column.
    inner = rest.get("metadata")
    if isinstance(inner, dict) and not inner.keys() & (rest.keys() - {"metadata"}):
        del rest["metadata"]
        rest |= inner
    return _Draft(row.number, id, tuple(messages), label, rest)


def _checked(examples: list[Example], name: str, responses: bool) -> list[Example]:
    for number, example in enumerate(examples, 1):
        if responses and not example.has_response:
            raise FinetraceError(f"{name}, row {number}: the response is empty; give it a text or remove the row")
    # Whether an id was given is not kept; one that equals the hash of the content was derived.
    drafts = [
        _Draft(number, None if e.id == content_id(e.messages) else e.id, e.messages, e.label, e.metadata)
        for number, e in enumerate(examples, 1)
    ]
    return [
        replace(new, place=old.place or new.place) for new, old in zip(_with_ids(drafts, name), examples, strict=True)
    ]


def _with_ids(drafts: Sequence[_Draft], name: str) -> list[Example]:
    """Given ids have to differ; those derived from the content are made to, in the order of the rows."""
    rows: dict[str, int] = {}
    for draft in drafts:
        if draft.id is not None and (first := rows.setdefault(draft.id, draft.row)) != draft.row:
            raise FinetraceError(
                f"{name}, row {draft.row}: the id {draft.id!r} is already that of row {first}; give each row its own, "
                "or name another column with --id-column"
            )
    taken, copies = set(rows), dict[str, int]()
    examples = []
    for draft in drafts:
        id = draft.id
        if id is None:
            base = id = content_id(draft.messages)
            while id in taken:
                copies[base] = copies.get(base, 1) + 1
                id = f"{base}-{copies[base]}"
            taken.add(id)
        examples.append(Example(id, draft.messages, draft.label, draft.metadata, f"{name}, row {draft.row}"))
    return examples


def _half_pair(error: UnicodeEncodeError) -> str:
    return f"character {error.start + 1} is half of a surrogate pair and no valid text; replace it or remove the row"
