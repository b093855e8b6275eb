"""The rows of an index as Parquet: back as they were written, in little memory."""

from __future__ import annotations

import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from finetrace.encoding import Encoded, Encoder
from finetrace.errors import FinetraceError
from finetrace.index import rows as rows_module
from tiny import make_examples, make_tokenizer


@pytest.mark.parametrize("at_once", [1, 3, 1000])
def test_rows_are_read_some_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_once: int) -> None:
    """Whatever is read together, rows come back as they were written, in arrays that may be written to."""
    examples = make_examples(7)
    encoded = Encoder(make_tokenizer()).encode_all(examples, None)[0]
    encoded = [replace(item, padding=i % 3) for i, item in enumerate(encoded)]
    rows_module._write(tmp_path / "rows.parquet", examples, encoded)
    monkeypatch.setattr(rows_module, "AT_ONCE", at_once)
    found = rows_module._read(tmp_path / "rows.parquet")
    assert found.examples == tuple(examples)
    for ours, theirs in zip(found.encoded, encoded, strict=True):
        assert np.array_equal(ours.ids, theirs.ids)
        assert np.array_equal(ours.weights, theirs.weights)
        assert (ours.ids.dtype, ours.weights.dtype) == (np.int32, np.float32)
        assert ours.ids.flags.writeable
        assert (ours.prompt_length, ours.padding) == (theirs.prompt_length, theirs.padding)


def test_opening_takes_little_more_than_the_rows(tmp_path: Path) -> None:
    """Numbers of Python take 85 bytes a token, where its id and its weight take 8."""
    tokens = np.full((2000, 300), 1, np.int32)
    weights = np.full(300, 1 / 300, np.float32)
    examples = [replace(make_examples(1)[0], id=str(i)) for i in range(len(tokens))]
    rows_module._write(tmp_path / "rows.parquet", examples, [Encoded(row, weights, 10) for row in tokens])
    tracemalloc.start()
    found = rows_module._read(tmp_path / "rows.parquet")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(found) == len(tokens)
    assert peak < 20 * tokens.size


@pytest.mark.parametrize("columns", [{"input_ids": [1, 2]}, {"input_ids": [[1], None]}, {"loss_weights": ["a", "b"]}])
def test_columns_of_other_types_cannot_be_read(tmp_path: Path, columns: dict[str, list[object]]) -> None:
    good = {
        "id": ["a", "b"],
        "label": [None, "x"],
        "messages": ["[]", "[]"],
        "metadata": ["{}", "{}"],
        "input_ids": [[1], [2, 3]],
        "loss_weights": [[1.0], [0.5, 0.5]],
        "prompt_length": [0, 0],
    }
    pq.write_table(pa.table(good), tmp_path / "good.parquet")
    assert [item.padding for item in rows_module._read(tmp_path / "good.parquet").encoded] == [0, 0]
    pq.write_table(pa.table(good | columns), tmp_path / "bad.parquet")
    with pytest.raises(FinetraceError, match=r"bad.parquet: cannot be read \(.*\); run finetrace index again"):
        rows_module._read(tmp_path / "bad.parquet")
