"""What every tool is given: the embedded model's folder, an adapter, and the rows of the task `grammars` as token ids.

`python benchmarks/peers/inputs.py FOLDER ROWS QUERIES` makes them; `run.py` calls it, so that the process which waits for the
tools holds no model.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from common import Row

from finetrace.embedded import embedded_folder
from finetrace.encoding import Encoder
from finetrace.examples import Example
from finetrace.finetune_config import FinetuneConfig
from finetrace.finetuning import finetune, finished
from finetrace.models import ModelSpec, load
from finetrace.tasks import build

ABOUT = "inputs.json"


def make(folder: Path, rows: int, queries: int) -> None:
    """Write the inputs of so many rows and queries into `folder`; an adapter that is there is used again.

    `inputs.json` says where they are, and how many tokens the rows have.
    """
    task = build("grammars")
    train = task.train[:rows]
    asked = task.queries[:: max(1, len(task.queries) // queries)][:queries]  # they stand class by class
    loaded = load(ModelSpec(dtype="float32", device="cpu"))
    adapter = folder / f"adapter-{rows}"
    if not finished(adapter):
        finetune(loaded, train, adapter, FinetuneConfig(epochs=1, learning_rate=1e-3))
    about = place(folder, Encoder(loaded.tokenizer), train, asked, adapter)
    (folder / ABOUT).write_text(json.dumps(about, indent=1), encoding="utf-8")


def place(
    folder: Path, encoder: Encoder, train: Sequence[Example], queries: Sequence[Example], adapter: Path
) -> dict[str, Any]:
    """Rows and queries as token ids in `folder`, the adapter's base by its folder; where they are, and how many tokens."""
    _name_base(adapter, embedded_folder())
    encoded = [_row(encoder, example) for example in train]
    _write(folder / "rows.jsonl", encoded)
    _write(folder / "queries.jsonl", [_row(encoder, example) for example in queries])
    return {
        "model": str(embedded_folder()),
        "adapter": str(adapter),
        "rows": str(folder / "rows.jsonl"),
        "queries": str(folder / "queries.jsonl"),
        "tokens": sum(len(row.input_ids) for row in encoded),
    }


def _row(encoder: Encoder, example: Example) -> Row:
    encoded = encoder.encode(example)
    labels = [int(token) if weight else -100 for token, weight in zip(encoded.ids, encoded.weights, strict=True)]
    return Row(example.id, example.prompt, example.response, encoded.ids.tolist(), labels)


def _write(path: Path, rows: list[Row]) -> None:
    path.write_text("".join(json.dumps(asdict(row)) + "\n" for row in rows), encoding="utf-8")


def _name_base(adapter: Path, base: Path) -> None:
    """Let the adapter's configuration name the base by its folder, from which bergson loads it."""
    path = adapter / "adapter_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**config, "base_model_name_or_path": str(base)}, indent=2), encoding="utf-8")


if __name__ == "__main__":
    make(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
