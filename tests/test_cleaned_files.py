"""What `finetrace clean` writes reads back as the rows it was given, and what it says of them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from commands import run, tuned_index
from finetrace.cleaning import rank as cleaning
from finetrace.index import open_index
from finetrace.reading import read_examples, write_examples
from tiny import make_examples


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An index whose prompt, response, label and id stand in columns of other names."""
    folder = tmp_path_factory.mktemp("cleaned")
    rows = [
        {
            "id": 100 + i,
            "uid": f"u{i}",
            "prompt": "a template",
            "ask": each.prompt,
            "response": "an old model's",
            "reply": each.response,
            "label": "split",
            "topic": "xy"[i % 2],
        }
        for i, each in enumerate(make_examples(12))
    ]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_examples(folder / "bad.jsonl", make_examples(3, seed=5))
    named = {"prompt": "ask", "response": "reply", "label": "topic", "id": "uid"}
    columns = [word for key, name in named.items() for word in (f"--{key}-column", name)]
    tuned_index(folder, folder / "train.jsonl", columns=columns)
    return folder


def clean(place: Path, kept: Path, removed: Path, *more: object) -> list[object]:
    files = ["--kept", kept, "--removed", removed]
    return ["clean", "--index", place / "idx", "--bad", place / "bad.jsonl", *files, "--method", "bm25", *more]


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "tsv", "parquet"])
def test_columns_of_the_same_names_do_not_replace_the_indexs_texts(
    suffix: str, place: Path, tmp_path: Path, capsys: Any
) -> None:
    kept, removed = tmp_path / f"kept.{suffix}", tmp_path / f"removed.{suffix}"
    code, _, err = run(capsys, *clean(place, kept, removed, "--top", 3))
    assert code == 0, err
    originals = {each.id: each for each in open_index(place / "idx").rows.examples}
    found = read_examples(kept) + read_examples(removed)
    assert {each.id for each in found} == set(originals)
    for each in found:
        original = originals[each.id]
        assert (each.messages, each.label) == (original.messages, original.label)
        if suffix in ("jsonl", "json", "parquet"):
            rest = {key: value for key, value in each.metadata.items() if not key.startswith("finetrace_")}
            assert rest == original.metadata


def test_it_is_said_where_rows_go_that_are_not_behind_the_answers(
    place: Path, tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    kept, removed = tmp_path / "kept.jsonl", tmp_path / "removed.jsonl"
    found = cleaning.Ranked(np.array([3.0, 1, 0, -2]), np.arange(4), 3, None, np.zeros(4, dtype=int), ("bm25",))
    assert [replace(found, removed=count).below for count in (1, 2, 3)] == [0, 0, 1]
    monkeypatch.setattr(cleaning, "standard", lambda problem, methods: np.repeat([[3.0, 2, 0, -1]], 3, axis=1))
    code, out, err = run(capsys, *clean(place, kept, removed, "--top", 8))
    assert code == 0, err
    said = "of the 8 removed have no value above 0: no more behind the answers than most rows; remove fewer."
    assert f"2 {said}" in " ".join(out.split())
    kept.unlink()
    removed.unlink()
    code, out, err = run(capsys, *clean(place, kept, removed, "--top", 6))
    assert code == 0, err
    assert "no value above 0" not in out
