"""Rows of a training set are written as they stand in it: types, class names and labels."""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from finetrace.cleaning import files
from finetrace.cleaning.files import Rows, data_rows, write_files
from finetrace.columns import Columns
from finetrace.errors import FinetraceError
from finetrace.reading import read_examples
from finetrace.sources import read_table

BIG = 2**53 + 1  # no double
FEATURES = datasets.Features(
    {
        "prompt": datasets.Value("string"),
        "response": datasets.Value("large_string"),
        "label": datasets.ClassLabel(names=["good", "bad"]),
        "kind": datasets.ClassLabel(names=["x", "y"]),
        "n": datasets.Value("int64"),
        "flag": datasets.Value("bool"),
        "when": datasets.Value("timestamp[us]"),
    }
)
MARKS = [{"finetrace_rank": 1, "finetrace_value": 2.5, "finetrace_reason": "so"}]


def made() -> datasets.Dataset:
    rows = [
        {
            "prompt": f"q{i}",
            "response": f"a{i}",
            "label": i % 2,
            "kind": i % 2 if i else -1,
            "n": BIG + i if i % 3 else None,
            "flag": None if i == 1 else bool(i % 2),
            "when": datetime.datetime(2024, 1, 1 + i),
        }
        for i in range(6)
    ]
    return datasets.Dataset.from_list(rows, features=FEATURES)


def source_of(kind: str, folder: Path) -> Path:
    """The rows as a Parquet file, as a saved data set, and as one whose rows stand in another order than on disk."""
    if kind == "parquet":
        made().to_parquet(folder / "train.parquet")
        return folder / "train.parquet"
    (made() if kind == "saved" else made().select([5, 3, 4, 1, 0, 2])).save_to_disk(folder / "train")
    return folder / "train"


def rows_of(source: Path) -> Rows:
    examples = read_examples(source)
    return data_rows(read_table(source, None, None), Columns(), examples, examples)


@pytest.mark.parametrize("kind", ["parquet", "saved", "reordered"])
def test_parquet_has_the_values_and_types_of_its_source(kind: str, tmp_path: Path) -> None:
    rows = rows_of(source_of(kind, tmp_path))
    kept, removed = tmp_path / "kept.parquet", tmp_path / "removed.parquet"
    write_files({kept: rows.chosen([0, 2, 3, 5]), removed: rows.chosen([4]).beside(MARKS)})
    examples = read_examples(source_of(kind, tmp_path / "again"))
    assert read_examples(kept) == [examples[i] for i in (0, 2, 3, 5)]
    original = made() if kind != "reordered" else made().select([5, 3, 4, 1, 0, 2])
    found = pq.read_table(kept)
    assert found.schema.equals(FEATURES.arrow_schema, check_metadata=False)
    assert found.to_pylist() == original.select([0, 2, 3, 5]).to_list()
    assert datasets.Dataset.from_parquet(str(kept), cache_dir=str(tmp_path / "c")).features == FEATURES
    assert pq.read_table(removed).to_pylist() == [{**original[4], **MARKS[0]}]
    gone = datasets.Dataset.from_parquet(str(removed), cache_dir=str(tmp_path / "d"))
    assert gone.features["label"] == FEATURES["label"]


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "tsv"])
@pytest.mark.parametrize("kind", ["parquet", "saved"])
def test_classes_go_by_their_names_where_numbers_would_mean_nothing(kind: str, suffix: str, tmp_path: Path) -> None:
    source = source_of(kind, tmp_path)
    path = tmp_path / f"rows.{suffix}"
    write_files({path: rows_of(source)})
    for original, each in zip(read_examples(source), read_examples(path), strict=True):
        assert (each.messages, each.label) == (original.messages, original.label)
        assert each.metadata["kind"] == original.metadata["kind"]
        assert each.metadata["when"] == original.metadata["when"]
        assert str(each.metadata["n"]) == str(original.metadata["n"])


def test_integers_with_gaps_stay_integers_from_other_sources(tmp_path: Path) -> None:
    rows = [{"prompt": f"q{i}", "response": "a", **({"n": BIG} if i else {})} for i in range(3)]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_files({tmp_path / "k.parquet": rows_of(tmp_path / "t.jsonl")})
    assert [row["n"] for row in pq.read_table(tmp_path / "k.parquet").to_pylist()] == [None, BIG, BIG]


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "tsv", "parquet"])
def test_a_class_of_floats_stays_the_class(suffix: str, tmp_path: Path) -> None:
    """2.0 is read as the class 2, and the cell 2.0 of CSV as 2.0; other numbers stand as they do in the data."""
    labels = [2.0, 1, None, 2.5]
    rows = [
        {"prompt": f"q{i}", "response": "a", "class": label, "uid": 10.0 + i, "weight": 2.0}
        for i, label in enumerate(labels)
    ]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source, path = tmp_path / "t.jsonl", tmp_path / f"k.{suffix}"
    write_files({path: rows_of(source)})
    assert [(e.id, e.label) for e in read_examples(path)] == [(e.id, e.label) for e in read_examples(source)]
    assert {str(e.metadata["weight"]) for e in read_examples(path)} == {"2.0"}


@pytest.mark.parametrize("column", ["prompt", "response", "system"])
def test_turns_do_not_become_text(column: str, tmp_path: Path) -> None:
    lists = {
        "prompt": [{"role": "user", "content": "q"}],
        "response": [{"role": "assistant", "content": "a"}],
        "system": [{"type": "text", "text": "be kind"}],
    }
    row = {"prompt": "q", "response": "a", column: lists[column], "tags": ["x"]}
    (tmp_path / "t.jsonl").write_text(json.dumps(row) + "\n")
    rows = rows_of(tmp_path / "t.jsonl")
    with pytest.raises(
        FinetraceError, match=f"k.csv: .*the column '{column}' holds lists.*; choose another, such as .jsonl"
    ):
        write_files({tmp_path / "k.csv": rows})
    write_files({tmp_path / "k.jsonl": rows, tmp_path / "k.parquet": rows})
    for name in ("k.jsonl", "k.parquet"):
        assert read_examples(tmp_path / name)[0].messages == read_examples(tmp_path / "t.jsonl")[0].messages


def test_all_files_are_written_or_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mixed = Rows([{"prompt": "q", "n": 1}, {"prompt": "r", "n": "one"}])
    first, second = tmp_path / "kept.csv", tmp_path / "removed.parquet"
    with pytest.raises(
        FinetraceError, match=r"removed.parquet: the rows cannot be written in this format \(.*\); choose"
    ):
        write_files({first: mixed, second: mixed})
    for value in (2**70, {}):  # larger than any integer of Parquet, and an object without a key
        with pytest.raises(FinetraceError, match=r"removed.parquet: the rows cannot be written"):
            write_files({first: mixed, second: Rows([{"prompt": "q", "n": value}])})
    assert list(tmp_path.iterdir()) == []

    whole = files.write_atomically

    def full(path: Path, content: bytes) -> Any:
        if path == second:
            raise FinetraceError(f"{path}: cannot be written (no space left).")
        whole(path, content)

    monkeypatch.setattr(files, "write_atomically", full)
    plain = Rows([{"prompt": "q"}])
    with pytest.raises(FinetraceError, match="no space left"):
        write_files({first: plain, second: plain})
    assert list(tmp_path.iterdir()) == []


def test_a_column_of_the_data_is_not_replaced_by_a_mark(tmp_path: Path) -> None:
    pq.write_table(pa.table({"prompt": ["q"], "response": ["a"], "finetrace_value": [7]}), tmp_path / "t.parquet")
    with pytest.raises(FinetraceError, match=r"t.parquet: the removed rows are given a column 'finetrace_value'"):
        rows_of(tmp_path / "t.parquet")
