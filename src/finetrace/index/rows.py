"""The examples of an index as Parquet: text, token ids, loss weights."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from finetrace import fingerprint
from finetrace.atomic import write_atomically
from finetrace.encoding import Encoded
from finetrace.errors import FinetraceError
from finetrace.examples import Example, Message
from finetrace.index.manifest import Manifest

NAME = "examples.parquet"
AT_ONCE = 512  # rows that are read at a time
BUFFER = 1 << 20  # bytes of a column that are read at a time
REMEDY = "run finetrace index again on this folder to write it anew."

N = TypeVar("N", np.int32, np.float32)


@dataclass(frozen=True)
class Rows:
    """The examples and their encodings, one a row."""

    examples: tuple[Example, ...]
    encoded: tuple[Encoded, ...]

    def __len__(self) -> int:
        return len(self.examples)

    def only(self, chosen: Sequence[int]) -> Rows:
        """The rows at these positions."""
        return Rows(tuple(self.examples[i] for i in chosen), tuple(self.encoded[i] for i in chosen))

    @property
    def ids(self) -> tuple[str, ...]:
        """Ids in row order."""
        return tuple(example.id for example in self.examples)

    @property
    def labels(self) -> tuple[str | None, ...]:
        """Labels in row order."""
        return tuple(example.label for example in self.examples)


def parts(about: Manifest) -> list[tuple[str, int, int]]:
    """File, first row and end (exclusive) of the rows that were there first, and of those appended each time."""
    names = [NAME, *(part.examples for part in about.appended)]
    starts = [0, *(part.start for part in about.appended)]
    return list(zip(names, starts, [*starts[1:], about.examples], strict=True))


def write(folder: Path, about: Manifest, examples: Sequence[Example], encoded: Sequence[Encoded]) -> None:
    """Write the examples of an index, each file in one step."""
    for name, start, stop in parts(about):
        _write(folder / name, examples[start:stop], encoded[start:stop])


def _write(path: Path, examples: Sequence[Example], encoded: Sequence[Encoded]) -> None:
    table = pa.table(
        {
            "id": [example.id for example in examples],
            "label": pa.array([example.label for example in examples], pa.string()),
            "prompt": [example.prompt for example in examples],
            "response": [example.response for example in examples],
            "messages": [json.dumps([list(turn) for turn in example.messages]) for example in examples],
            "metadata": [json.dumps(dict(example.metadata), default=str) for example in examples],
            "input_ids": pa.array([item.ids for item in encoded], pa.list_(pa.int32())),
            "loss_weights": pa.array([item.weights for item in encoded], pa.list_(pa.float32())),
            "prompt_length": pa.array([item.prompt_length for item in encoded], pa.int32()),
            "padding": pa.array([item.padding for item in encoded], pa.int32()),
        }
    )
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd", write_page_checksum=True)
    write_atomically(path, buffer.getvalue())


def read(folder: Path, about: Manifest) -> Rows:
    """Read the examples of an index back; `FinetraceError` where they are broken or of other data than the manifest says."""
    found = [_read(folder / name) for name, _, _ in parts(about)]
    pa.default_memory_pool().release_unused()  # else Arrow keeps about half as much again
    whole = Rows(
        tuple(each for part in found for each in part.examples), tuple(each for part in found for each in part.encoded)
    )
    if fingerprint.of_data(whole.ids, whole.encoded) != about.data_fingerprint:
        raise FinetraceError(f"{folder / NAME}: these are not the examples the index was built from; {REMEDY}")
    return whole


def _read(path: Path) -> Rows:
    """The rows of one file, some at a time, so that little but what is returned is in memory."""
    examples: list[Example] = []
    encoded: list[Encoded] = []
    try:
        with pq.ParquetFile(path, buffer_size=BUFFER, page_checksum_verification=True) as file:
            for batch in file.iter_batches(AT_ONCE):
                texts = batch.select(["id", "messages", "label", "metadata"]).to_pydict()
                examples += (
                    Example(id_, tuple(Message(*turn) for turn in json.loads(messages)), label, json.loads(metadata))
                    for id_, messages, label, metadata in zip(*texts.values(), strict=True)
                )
                padded = "padding" in batch.schema.names
                encoded += (
                    Encoded(ids, weights, length, padding)
                    for ids, weights, length, padding in zip(
                        _lists(batch["input_ids"], np.int32),
                        _lists(batch["loss_weights"], np.float32),
                        batch["prompt_length"].to_pylist(),
                        batch["padding"].to_pylist() if padded else [0] * len(batch),
                        strict=True,
                    )
                )
    except (OSError, KeyError, ValueError, TypeError) as error:
        raise FinetraceError(f"{path}: cannot be read ({error}); {REMEDY}") from error
    return Rows(tuple(examples), tuple(encoded))


def _lists(column: pa.Array, dtype: type[N]) -> list[NDArray[N]]:
    """A column of lists as slices of one array."""
    if not pa.types.is_list(column.type) or column.null_count:
        raise TypeError(f"a column of {column.type} where lists should be")
    offsets = column.offsets.to_numpy()
    values = column.values.slice(offsets[0], offsets[-1] - offsets[0]).to_numpy(zero_copy_only=False).astype(dtype)
    return np.split(values, offsets[1:-1] - offsets[0]) if len(column) else []
