"""Every score in a file, written block by block as the scores are made."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from finetrace.atomic import replacing
from finetrace.errors import FinetraceError

MATRIX = (".npy", ".safetensors")
KINDS = (".parquet", *MATRIX)


class _Matrix:
    """An (m, n) float64 matrix in row-major order after a header."""

    def __init__(self, file: BinaryIO, header: bytes, m: int, n: int) -> None:
        self.file = file
        self.begin = len(header)
        self.n = n
        file.write(header)
        file.truncate(self.begin + 8 * m * n)

    def take(self, queries: slice, rows: slice, values: NDArray[np.float64]) -> None:
        """(m, r) scores of some queries and rows."""
        for query, row in zip(range(queries.start, queries.stop), values, strict=True):
            self.file.seek(self.begin + 8 * (query * self.n + rows.start))
            self.file.write(np.ascontiguousarray(row, dtype="<f8").tobytes())


class _Long:
    """Parquet, one line a query and row, in the order in which scores come."""

    def __init__(self, path: Path, method: str, queries: Sequence[str], train: Sequence[str], about: Any) -> None:
        self.queries, self.train, self.method = queries, train, method
        text = pa.dictionary(pa.int32(), pa.string())
        names = {"method": text, "query": text, "score": pa.float64(), "example": pa.string()}
        self.schema = pa.schema(list(names.items()), metadata={"config": json.dumps(about, default=str)})
        self.writer = pq.ParquetWriter(path, self.schema, compression="zstd")

    def take(self, queries: slice, rows: slice, values: NDArray[np.float64]) -> None:
        """(m, r) scores of some queries and rows."""
        examples = pa.array(self.train[rows.start : rows.stop])
        for query, row in zip(range(queries.start, queries.stop), values, strict=True):
            words = [self._same(word, len(row)) for word in (self.method, self.queries[query])]
            self.writer.write_table(pa.table([*words, pa.array(row), examples], schema=self.schema))

    @staticmethod
    def _same(word: str, count: int) -> pa.DictionaryArray:
        return pa.DictionaryArray.from_arrays(pa.array(np.zeros(count, np.int32)), pa.array([word]))


@contextmanager
def writing_scores(
    path: Path, method: str, queries: Sequence[str], train: Sequence[str], about: Any
) -> Iterator[_Matrix | _Long]:
    """A sink (`attribution.ranked`) that writes to `path`; the file is whole or not there.

    `.npy` and `.safetensors` (tensor `scores`) hold the (m, n) matrix, queries and rows in the order of the index;
    `.parquet` holds a line a query and row. Ids and `about` are in the metadata of the last two.

    Raises:
        FinetraceError: Another suffix, or the file cannot be written.
    """
    m, n = len(queries), len(train)
    if path.suffix not in KINDS:
        raise FinetraceError(f"{path}: scores that are written as they are made go to {', '.join(KINDS)}.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FinetraceError(f"{path}: cannot be written ({error}).") from error
    with replacing(path) as part:
        if path.suffix == ".parquet":
            long = _Long(part, method, queries, train, about)
            try:
                yield long
            finally:
                long.writer.close()
            return
        header = _npy(m, n) if path.suffix == ".npy" else _safetensors(m, n, method, queries, train, about)
        with part.open("wb") as file:
            yield _Matrix(file, header, m, n)
            file.flush()
            os.fsync(file.fileno())


def _npy(m: int, n: int) -> bytes:
    text = f"{{'descr': '<f8', 'fortran_order': False, 'shape': ({m}, {n}), }}"
    room = -(10 + len(text) + 1) % 64
    body = (text + " " * room + "\n").encode("ascii")
    return b"\x93NUMPY\x01\x00" + len(body).to_bytes(2, "little") + body


def _safetensors(m: int, n: int, method: str, queries: Sequence[str], train: Sequence[str], about: Any) -> bytes:
    words = {"method": method, "queries": list(queries), "examples": list(train), "config": about}
    header = {
        "__metadata__": {
            key: word if isinstance(word, str) else json.dumps(word, default=str) for key, word in words.items()
        },
        "scores": {"dtype": "F64", "shape": [m, n], "data_offsets": [0, 8 * m * n]},
    }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
