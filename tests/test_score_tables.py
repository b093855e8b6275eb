"""Tables of scores have every digit, in every format."""

from __future__ import annotations

import json
import math
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from finetrace.attribution import Scores
from finetrace.attribution.scores import write_frame
from finetrace.examples import Example

VALUES = [3.2e-11, 1.23456789012e-9, float("nan"), -5e-324, 1 / 3, 1.7e308, float("inf"), -float("inf"), 0.0]


def read(path: Path) -> list[Any]:
    if path.suffix == ".json":
        return [record["score"] for record in json.loads(path.read_text())["records"]]
    frame = pd.read_csv(path, float_precision="round_trip") if path.suffix == ".csv" else pd.read_parquet(path)
    return list(frame["score"])


@pytest.mark.parametrize("suffix", [".json", ".csv", ".parquet"])
def test_scores_are_written_with_every_digit(suffix: str, tmp_path: Path) -> None:
    """What is not finite is null in JSON."""
    frame = pd.DataFrame({"query": [f"q{i}" for i in range(len(VALUES))], "label": None, "score": VALUES})
    write_frame(frame, tmp_path / f"t{suffix}", {"unit": "cosine"})
    expected = [value if math.isfinite(value) or suffix != ".json" else None for value in VALUES]
    np.testing.assert_array_equal(read(tmp_path / f"t{suffix}"), expected)
    if suffix == ".json":
        document = json.loads((tmp_path / "t.json").read_text())
        assert document["config"] == {"unit": "cosine"}
        assert document["records"][0] == {"query": "q0", "label": None, "score": 3.2e-11}


def test_saved_scores_are_ranked_by_what_stands_in_them(tmp_path: Path) -> None:
    train = tuple(Example.from_prompt("a", "b", id=str(i)) for i in range(3))
    Scores(np.array([[1e-11, 3e-11, 2e-11]]), train[:1], train, "gradsim", "").save(tmp_path / "s.json")
    records = json.loads((tmp_path / "s.json").read_text())["records"]
    assert [(each["rank"], each["example"], each["score"]) for each in records] == [
        (1, "1", 3e-11),
        (2, "2", 2e-11),
        (3, "0", 1e-11),
    ]


@pytest.mark.parametrize("suffix", [".json", ".csv", ".parquet"])
def test_all_scores_are_written_without_the_texts_of_their_rows(suffix: str, tmp_path: Path) -> None:
    """A record each, with the prompt and the response, would take a hundred times the memory of the scores."""
    text = "so " * 40
    train = [Example.from_prompt(f"a {i}", text, id=f'r"{i}', label=("x", None)[i % 2]) for i in range(3000)]
    queries = tuple(Example.from_prompt("q", "b", id=f"q{i}") for i in range(2))
    values = np.random.default_rng(0).integers(0, 9, (2, 3000)).astype(float)
    scores = Scores(values, queries, tuple(train), "gradsim", "nats", {"at": "end"})
    frame = scores.top(3000).to_pandas().drop(columns=["kind", "prompt", "response"])
    write_frame(frame, tmp_path / f"t{suffix}", scores.describe())
    tracemalloc.start()
    scores.save(tmp_path / f"s{suffix}")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (tmp_path / f"s{suffix}").read_bytes() == (tmp_path / f"t{suffix}").read_bytes()
    assert peak < {".json": 500, ".csv": 450, ".parquet": 300}[suffix] * values.size


def test_a_table_without_lines_is_json_too(tmp_path: Path) -> None:
    write_frame(pd.DataFrame(columns=["a"]), tmp_path / "t.json", [{"unit": "nats"}], queries=[])
    assert json.loads((tmp_path / "t.json").read_text()) == {"config": [{"unit": "nats"}], "queries": [], "records": []}
