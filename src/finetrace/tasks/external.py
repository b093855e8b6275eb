"""An external labelled set as a task: split here, or with the train and test splits that it comes with."""

from __future__ import annotations

import json
import random
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from finetrace.columns import Columns
from finetrace.errors import FinetraceError
from finetrace.examples import Example
from finetrace.formats import READERS
from finetrace.reading import read_examples
from finetrace.tasks.task import Task, split


def external(
    source: str | Path,
    label_column: str,
    prompt_column: str | None = None,
    response_column: str | None = None,
    train_share: float = 0.9,
    seed: int = 0,
    *,
    source_split: str | None = None,
    id_column: str | None = None,
) -> Task:
    """A labelled set from elsewhere: every class asked for, training rows and queries with their responses.

    A folder that holds train and test splits (a `DatasetDict` saved to disk, or files such as `train.jsonl` and
    `test.jsonl`) is used as it is split; anything else is split here, by the same share in every class.

    Args:
        source: A JSON Lines, CSV or Parquet file, a folder, or a dataset of the Hub, of which `train` is read.
        label_column: The column of the classes; `variation` in the data released with arXiv 2409.19998.
        prompt_column: The column of the prompts; guessed if left out.
        response_column: The column of the responses; guessed if left out. The label's own column makes the name of
            the class the response.
        train_share: The share of each class that trains, where the split is made here.
        seed: Draws the split.
        source_split: Read this split of the source alone, and split it here.
        id_column: The column of the ids; guessed if left out.

    Raises:
        FinetraceError: The data cannot be read, a row has no label, or a class cannot be trained on or asked about.
    """
    columns = Columns(prompt=prompt_column, response=response_column, label=label_column, id=id_column)
    name = _name(source)
    if source_split is None and (given := _given_splits(source)) is not None:
        (train_file, train_split), (test_file, test_split) = given
        train = _labelled(train_file, columns, train_split, label_column)
        queries = _labelled(test_file, columns, test_split, label_column)
        _check_given(train, queries, source)
        return Task(name, tuple(train), tuple(queries))
    rows = _labelled(source, columns, source_split, label_column)
    if not 0 < train_share < 1:
        raise FinetraceError(f"train_share={train_share:g}: give a share above 0 and below 1")
    return Task(name, *_split_by_share(rows, train_share, seed, source))


def _name(source: str | Path) -> str:
    """The stem of a file, else the last part of a folder's path or of a Hub id."""
    path = Path(source).expanduser()
    if path.suffix.lower() in READERS and not path.is_dir():
        return path.stem
    return path.resolve().name


def _given_splits(source: str | Path) -> tuple[tuple[str, str | None], tuple[str, str | None]] | None:
    """Where to read train and test, each a source and the split of it; None where the folder has no such pair."""
    folder = Path(source).expanduser()
    if not folder.is_dir():
        return None
    if (folder / "dataset_dict.json").exists():
        try:
            splits = json.loads((folder / "dataset_dict.json").read_text(encoding="utf-8"))["splits"]
        except (OSError, ValueError, KeyError, TypeError):
            return None  # reading the dataset says what is wrong
        return ((str(folder), "train"), (str(folder), "test")) if {"train", "test"} <= set(splits) else None
    if (folder / "state.json").exists():
        return None
    train, test = _split_file(folder, "train"), _split_file(folder, "test")
    if train is None and test is None:
        return None
    if train is None or test is None:
        there, absent = (train, "test") if train is not None else (test, "train")
        raise FinetraceError(f"the folder {folder} has {there} and no {absent} file; add it, or name the one file")
    return (train, None), (test, None)


def _split_file(folder: Path, split_name: str) -> str | None:
    files = [path for suffix in READERS if (path := folder / f"{split_name}{suffix}").is_file()]
    if len(files) > 1:
        names = " and ".join(path.name for path in files)
        raise FinetraceError(f"the folder {folder} holds {names}; keep one file a split")
    return str(files[0]) if files else None


def _labelled(source: str | Path, columns: Columns, split_name: str | None, label_column: str) -> list[Example]:
    named = columns.response == label_column  # the answer is the class
    read = replace(columns, response=None) if named else columns
    rows = read_examples(source, read, split=split_name, responses=not named)
    for number, row in enumerate(rows, 1):
        if row.label is None:
            place = f"{source} ({split_name})" if split_name else str(source)
            raise FinetraceError(
                f"{place}, row {number} ({row.prompt[:40]!r}): there is no label in column {label_column!r}; "
                "give it one or remove the row"
            )
    return [row.answered_anew(str(row.label)) for row in rows] if named else rows


def _check_given(train: Sequence[Example], queries: Sequence[Example], source: str | Path) -> None:
    classes = Counter(row.label for row in train)
    if len(classes) < 2:
        raise FinetraceError(f"{source}: the training rows hold the class {train[0].label!r} alone; add another class")
    for query in queries:
        if query.label not in classes:
            raise FinetraceError(
                f"{source}: the class {query.label!r} is in the test split and not in the train split; "
                "add training rows of that class, or remove its queries"
            )


def _split_by_share(
    rows: Sequence[Example], share: float, seed: int, source: str | Path
) -> tuple[tuple[Example, ...], tuple[Example, ...]]:
    """Every class cut at the same share, at least one row on either side; classes may differ in size."""
    classes: dict[str | None, list[Example]] = defaultdict(list)
    for row in rows:
        classes[row.label].append(row)
    if len(classes) < 2:
        raise FinetraceError(f"{source} holds the class {rows[0].label!r} alone; add rows of another class")
    train: list[Example] = []
    queries: list[Example] = []
    for label, members in classes.items():
        if len(members) < 2:
            raise FinetraceError(
                f"{source}: the class {label!r} has a single row, and one must train and another be asked about; "
                "add rows of that class or remove it"
            )
        kept = min(len(members) - 1, max(1, round(share * len(members))))
        of_class = split(members, kept, seed)
        train += of_class[0]
        queries += of_class[1]
    random.Random(seed).shuffle(train)
    return tuple(train), tuple(queries)
