"""The examples of an index as Parquet: text, token ids, loss weights."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from finetrace import fingerprint
from finetrace.encoding import Encoded
from finetrace.errors import FinetraceError
from finetrace.examples import Example, Message
from finetrace.index.manifest import write_atomically

NAME = "examples.parquet"


@dataclass(frozen=True)
class Rows:
    """The examples and their encodings, one a row."""

    examples: tuple[Example, ...]
    encoded: tuple[Encoded, ...]

    def __len__(self) -> int:
        return len(self.examples)

    @property
    def ids(self) -> tuple[str, ...]:
        """Ids in row order."""
        return tuple(example.id for example in self.examples)

    @property
    def labels(self) -> tuple[str | None, ...]:
        """Labels in row order."""
        return tuple(example.label for example in self.examples)


def write(folder: Path, examples: Sequence[Example], encoded: Sequence[Encoded]) -> None:
    """Write `examples.parquet` in one step."""
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
    write_atomically(folder / NAME, buffer.getvalue())


def read(folder: Path, data_fingerprint: str) -> Rows:
    """Read `examples.parquet` back; `FinetraceError` where it is broken or of other data than `data_fingerprint` says."""
    remedy = "run finetrace index again on this folder to write it anew."
    try:
        columns = pq.read_table(folder / NAME, page_checksum_verification=True).to_pydict()
        examples = tuple(
            Example(id_, tuple(Message(*turn) for turn in json.loads(messages)), label, json.loads(metadata))
            for id_, messages, label, metadata in zip(
                columns["id"], columns["messages"], columns["label"], columns["metadata"], strict=True
            )
        )
        encoded = tuple(
            Encoded(np.asarray(ids, dtype=np.int32), np.asarray(weights, dtype=np.float32), length, padding)
            for ids, weights, length, padding in zip(
                columns["input_ids"],
                columns["loss_weights"],
                columns["prompt_length"],
                columns.get("padding") or [0] * len(columns["id"]),
                strict=True,
            )
        )
    except (OSError, KeyError, ValueError, TypeError) as error:
        raise FinetraceError(f"{folder / NAME}: cannot be read ({error}); {remedy}") from error
    found = Rows(examples, encoded)
    if fingerprint.of_data(found.ids, encoded) != data_fingerprint:
        raise FinetraceError(f"{folder / NAME}: these are not the examples the index was built from; {remedy}")
    return found
