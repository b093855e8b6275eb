"""Every CSV that is written reads back cell by cell, whatever its texts hold."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from finetrace.attribution import Scores, make
from finetrace.attribution.scores import write_frame
from finetrace.cleaning.files import Rows, write_files
from finetrace.cli.traced import show
from finetrace.delimited import delimited
from finetrace.examples import Example
from finetrace.reading import read_examples
from finetrace.tracing import Result

TEXTS = ["a\rb", "a\r\nb", "a\nb", "\r", 'say "x"', "a,b;c", "tab\there", "\tat the ends ", "plain", "ü \u2028 z", "\\"]


def test_cells_read_back() -> None:
    """By the csv module and by pandas; nothing to say is an empty cell, and a record of one such cell is still one."""
    written = delimited(["a", "b,c"], [[text, 1e-300 / 3] for text in TEXTS])
    assert written.startswith('a,"b,c"\n')
    found = list(csv.reader(io.StringIO(written, newline=""), strict=True))
    assert found[1:] == [[text, repr(1e-300 / 3)] for text in TEXTS]
    assert pd.read_csv(io.BytesIO(written.encode()))["a"].tolist() == TEXTS
    assert delimited(["a"], [[None], [float("nan")], [np.float64(0.1)], [True]]) == 'a\n""\n""\n0.1\nTrue\n'


@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
def test_cleaned_rows_read_back(suffix: str, tmp_path: Path) -> None:
    rows = [{"prompt": f"{text}?", "response": f"{text}.", "id": str(i)} for i, text in enumerate(TEXTS)]
    path = tmp_path / f"rows{suffix}"
    write_files({path: Rows(rows)})
    found = [{"prompt": e.prompt, "response": e.response, "id": e.id} for e in read_examples(path)]
    assert found == rows
    assert pd.read_csv(path, sep="\t" if suffix == ".tsv" else ",", dtype=str).to_dict("records") == rows


def test_traced_rows_read_back(tmp_path: Path, capsys: Any) -> None:
    train = tuple(Example.from_prompt(text + "?", text + ".", id=str(i)) for i, text in enumerate(TEXTS))
    scores = Scores(np.array([np.geomspace(1, 1e-12, len(TEXTS))]), train[:1], train, "bm25", "")
    write_frame(scores.top(len(TEXTS)).to_pandas(), tmp_path / "r.csv", {})
    show([Result(make("bm25"), scores, {})], "csv", len(TEXTS), False)
    for found in (pd.read_csv(tmp_path / "r.csv"), pd.read_csv(io.BytesIO(capsys.readouterr().out.encode()))):
        assert found["prompt"].tolist() == [each.prompt for each in train]
        assert found["response"].tolist() == [each.response for each in train]
        assert found["label"].isna().all()
    ids = [f"{i}{text}" for i, text in enumerate(TEXTS)]
    named = tuple(Example.from_prompt("a", "b", id=each) for each in ids)
    Scores(scores.values, named[:1], named, "bm25", "").save(tmp_path / "s.csv")
    assert pd.read_csv(tmp_path / "s.csv")["example"].tolist() == ids
