"""Rows as they stand in the data: one reader a file format, each giving a table of rows that know their number."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

from finetrace.errors import FinetraceError


class Row(NamedTuple):
    """One row and its number, counted from 1 (the line in JSON Lines, the record after the header in CSV)."""

    number: int
    values: Mapping[str, Any]


@dataclass(frozen=True)
class Table:
    """Rows as they stand in the data.

    Attributes:
        name: What the user calls the data; opens every error about a row.
        rows: The rows, each a mapping from column to value.
        label_names: For a column of class numbers, the names of the classes (a `ClassLabel` of `datasets`).
        arrow: Where the data has types of its own, what reads the same rows as an Arrow table with its schema.
    """

    name: str
    rows: Sequence[Row]
    label_names: Mapping[str, Sequence[str]] = field(default_factory=dict)
    arrow: Callable[[], Any] | None = field(default=None, compare=False)

    @cached_property
    def columns(self) -> list[str]:
        """Every column of any row, in order of first appearance: rows of JSON need not agree."""
        return list(dict.fromkeys(column for row in self.rows for column in row.values))


def table_of(rows: Iterable[Any], name: str) -> Table:
    """The table of rows in memory: mappings, or a `datasets.Dataset`.

    Raises:
        FinetraceError: A row is not a mapping, or `rows` is one mapping (a `DatasetDict`, a dict of columns).
    """
    if isinstance(rows, Mapping):
        raise FinetraceError(
            f"{name} is one object with the keys {_listed(rows)} where rows are expected; "
            "pass a list of objects, or one split of a DatasetDict"
        )
    if type(rows).__name__ == "DataFrame":
        ways = "frame.to_dict('records') of a pandas one, or frame.to_dicts() of a polars one"
        raise FinetraceError(f"{name} is a DataFrame where rows are expected; pass {ways}")
    # Features have to be asked for before the rows, and only objects of `datasets` have them.
    features = getattr(rows, "features", None) or {}
    label_names = {column: feature.names for column, feature in features.items() if hasattr(feature, "names")}
    arrow = None
    if hasattr(rows, "with_format"):  # a Dataset may be set to return tensors or arrays
        rows, arrow = rows.with_format(None), partial(_arrow_of, rows, features)
    try:
        return Table(name, _numbered(enumerate(rows, 1), name), label_names, arrow)
    except FinetraceError:
        raise
    except Exception as error:  # a dataset decodes images, fetches shards and more while it is walked through
        raise FinetraceError(f"the rows of {name} cannot be read ({first_line(error)})") from error


def _arrow_of(data: Any, features: Any) -> Any:
    """A `datasets.Dataset` as one Arrow table, with the note in it of what its columns are."""
    return data.with_format("arrow")[:].replace_schema_metadata(features.arrow_schema.metadata)


def _numbered(values: Iterable[tuple[int, Any]], name: str) -> list[Row]:
    rows = []
    for number, value in values:
        if not isinstance(value, Mapping):
            raise FinetraceError(
                f"{name}, row {number}: expected an object with named columns and found {_kind(value)}; "
                'write each row as {"prompt": ..., "response": ...}'
            )
        rows.append(Row(number, {str(column): cell for column, cell in value.items()}))
    return rows


def _read_text(path: Path, name: str) -> str:
    """The whole file as text, line ends as they are; a byte order mark is dropped."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise FinetraceError(
            f"{name} cannot be read ({error.strerror or error}); check the file and its permissions"
        ) from error
    if data[:2] == b"\x1f\x8b":
        raise FinetraceError(f"{name} is compressed with gzip; unpack it and give the file that comes out")
    try:
        return data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        guess = "it looks like UTF-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else f"{error.reason}"
        raise FinetraceError(
            f"{name}, line {line}: byte {error.start} is not valid UTF-8 ({guess}); save the file as UTF-8"
        ) from None


def _read_json_lines(path: Path, name: str, split: str | None) -> Table:
    _no_splits(name, split)
    return _json_lines(_read_text(path, name), name)


def _json_lines(text: str, name: str) -> Table:
    def values() -> Iterable[tuple[int, Any]]:
        # Not str.splitlines: U+2028 and its like may stand unescaped inside a JSON string.
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                try:
                    yield number, json.loads(line, object_pairs_hook=_object)
                except (ValueError, RecursionError) as error:
                    raise FinetraceError(
                        f"{name}, row {number}: the line is not valid JSON ({error}); mend it or remove the line"
                    ) from None

    return Table(name, _numbered(values(), name))


def _read_json(path: Path, name: str, split: str | None) -> Table:
    """A list of objects, or an object holding such a list, or several of them as splits."""
    text = _read_text(path, name)
    try:
        value = json.loads(text, object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data" and split is None:  # JSON Lines under the name .json, as the Hub often has it
            return _json_lines(text, name)
        raise FinetraceError(f"{name} is not valid JSON ({error}); mend the file") from None
    except (ValueError, RecursionError) as error:
        raise FinetraceError(f"{name} is not valid JSON ({error}); mend the file") from None
    if isinstance(value, dict):
        lists = {key: rows for key, rows in value.items() if isinstance(rows, list) and _are_rows(rows)}
        if not lists and split is None and "\n" not in text.strip() and any(value.values()):
            return _json_lines(text, name)  # of a single line
        lists = lists or {key: rows for key, rows in value.items() if rows == []}
        if not lists:
            raise FinetraceError(
                f"{name} holds an object without a list of rows (its keys are {_listed(value)}); "
                "write a list of objects, or an object with one such list"
            )
        value = lists[pick_split(list(lists), split, name)]
    else:
        _no_splits(name, split)
    if not isinstance(value, list):
        raise FinetraceError(f"{name} holds {_kind(value)} where a list of objects is expected; write one object a row")
    return Table(name, _numbered(enumerate(value, 1), name))


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON, in which no key stands twice: one of the two values would be lost."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for place, name in enumerate(names) if name in names[:place])
        raise ValueError(f"the key {twice!r} stands twice in one object")
    return found


def _are_rows(items: list[Any]) -> bool:
    """Whether some are objects and not the turns of one conversation."""
    objects = [item for item in items if isinstance(item, dict)]
    return bool(objects) and not all("role" in item or "from" in item for item in objects)


def _read_csv(path: Path, name: str, split: str | None) -> Table:
    _no_splits(name, split)
    return _delimited(path, name, ",")


def _read_tsv(path: Path, name: str, split: str | None) -> Table:
    _no_splits(name, split)
    return _delimited(path, name, "\t")


def _delimited(path: Path, name: str, delimiter: str) -> Table:
    """CSV or TSV with a header; an empty cell is None, for the format has no other way to say so."""
    # newline="" leaves line ends inside quotes as they are.
    text = io.StringIO(_read_text(path, name), newline="")
    records = filter(None, csv.reader(text, delimiter=delimiter, strict=True))  # an empty line is no row
    limit = csv.field_size_limit(2**31 - 1)  # the default refuses cells above 128 KiB, and texts are longer
    rows: list[Row] = []
    try:
        header = next(records, [])
        if len(header) == 1 and (others := [mark for mark in ",;\t|" if mark != delimiter and mark in header[0]]):
            raise FinetraceError(
                f"{name}: the header is the one column {header[0]!r}, so its cells seem to be separated by {others[0]!r}; "
                f"write the file with {delimiter!r} between the cells"
            )
        twice = [column for index, column in enumerate(header) if column in header[:index]]
        if twice:
            raise FinetraceError(f"{name} names the column {twice[0]!r} twice in its header; rename one of them")
        for cells in records:
            number = len(rows) + 1
            if len(cells) != len(header):
                raise FinetraceError(
                    f"{name}, row {number}: {len(cells)} cells where the header has {len(header)}; "
                    "put texts with separators or line breaks in double quotes"
                )
            rows.append(Row(number, {column: cell or None for column, cell in zip(header, cells, strict=True)}))
    except csv.Error as error:
        raise FinetraceError(
            f"{name}, row {len(rows) + 1}: the quoting is broken ({error}); double the quotes inside a quoted text"
        ) from None
    finally:
        csv.field_size_limit(limit)
    return Table(name, rows)


def _read_parquet(path: Path, name: str, split: str | None) -> Table:
    _no_splits(name, split)
    import pyarrow
    import pyarrow.parquet

    try:
        # A ParquetFile reads this one file; read_table would take folder names such as `a=1` for columns.
        with pyarrow.parquet.ParquetFile(path) as file:
            schema = file.schema_arrow
            values = [row for batch in file.iter_batches() for row in batch.to_pylist()]
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise FinetraceError(
            f"{name} is not a Parquet file that can be read ({first_line(error)}); write it again"
        ) from error
    rows = _numbered(enumerate(values, 1), name)
    return Table(name, rows, _parquet_label_names(schema.metadata or {}), partial(_parquet_arrow, path))


def _parquet_arrow(path: Path) -> Any:
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path) as file:
        return file.read()


def _parquet_label_names(metadata: Mapping[bytes, bytes]) -> dict[str, list[str]]:
    """Class names that `datasets` notes in the file: the numbers alone would mean nothing to a reader."""
    try:
        features = json.loads(metadata[b"huggingface"])["info"]["features"]
        return {column: kind["names"] for column, kind in features.items() if kind.get("_type") == "ClassLabel"}
    except (KeyError, ValueError, TypeError, AttributeError):  # a note that is absent or of another version
        return {}


def _no_splits(name: str, split: str | None) -> None:
    if split is not None:
        raise FinetraceError(f"{name} is a single file without splits; leave out the split {split!r}")


def pick_split(splits: Sequence[str], split: str | None, name: str) -> str:
    """The split asked for; unasked the only one, or `train`."""
    if split is None:
        if len(splits) == 1:
            return splits[0]
        if "train" in splits:
            return "train"
        raise FinetraceError(f"{name} has several splits and none is called 'train'; choose one of {_listed(splits)}")
    if split not in splits:
        raise FinetraceError(f"{name} has no split {split!r}; choose one of {_listed(splits)}")
    return split


def _listed(names: Iterable[str]) -> str:
    return ", ".join(map(repr, names)) or "none"


def _kind(value: Any) -> str:
    kinds = {
        type(None): "null",
        bool: "true or false",
        int: "a number",
        float: "a number",
        str: "a text",
        list: "a list",
    }
    return kinds.get(type(value), f"a {type(value).__name__}")


def first_line(error: Exception) -> str:
    """What another library has to say, short enough to stand inside a sentence."""
    return next((line.strip().rstrip(".") for line in str(error).splitlines() if line.strip()), type(error).__name__)


READERS = {
    ".jsonl": _read_json_lines,
    ".ndjson": _read_json_lines,
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".parquet": _read_parquet,
    ".json": _read_json,
}
