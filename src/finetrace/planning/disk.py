"""Bytes that an index takes, file by file."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from finetrace.collection import Features
from finetrace.encoding import Encoded
from finetrace.examples import Example
from finetrace.index import rows, shards
from finetrace.index.manifest import Manifest, ShardRecord
from finetrace.models import save_adapter

WHOLE = 20_000  # rows up to which the table of examples is really written; of more, so many are
WORDS = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}  # bytes


@dataclass(frozen=True)
class Disk:
    """Bytes of an index.

    Attributes:
        shards: Gradients, representations and losses.
        factors: Kronecker factors, once they are finished.
        parts: Sums over tokens at their most, and gradients of the drawn labels: what factors are made of, and what then goes.
        examples: Texts, tokens and loss weights.
        adapter: The adapter.
        manifest: The manifest, and what lies beside the factors.
    """

    shards: int
    factors: int
    parts: int
    examples: int
    adapter: int
    manifest: int

    @property
    def total(self) -> int:
        """What a finished index takes."""
        return self.shards + self.factors + self.examples + self.adapter + self.manifest

    @property
    def peak(self) -> int:
        """More than it takes at any time before it is finished."""
        return self.total + self.parts


@dataclass(frozen=True)
class RowFormat:
    """The tensors of a shard, as one example has them.

    Attributes:
        tensors: By name, the sides of one example's part (none for a scalar) and safetensors' word for the dtype.
    """

    tensors: Mapping[str, tuple[tuple[int, ...], str]]

    @classmethod
    def of_index(cls, about: Manifest, width: int, hidden: int, dtype: torch.dtype) -> RowFormat:
        """As an index writes it: a shard of zeros is written, its header read, and the file removed.

        Args:
            about: The index.
            width: Entries of a gradient.
            hidden: Entries of a representation.
            dtype: Of collected features.
        """
        zero = torch.zeros(1, width, dtype=dtype)
        pooled = {name: torch.zeros(1, hidden, dtype=dtype) for name in about.representations}
        with tempfile.TemporaryDirectory() as work:
            record = shards.write(Path(work), Features(zero, torch.zeros(1, dtype=dtype), pooled), 0, 1, about)
            with safe_open(str(Path(work) / shards.FOLDER / record.file), framework="pt") as file:
                parts = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
                return cls({name: (tuple(part.get_shape()[1:]), part.get_dtype()) for name, part in parts.items()})

    def row_bytes(self, prefix: str = "") -> int:
        """Bytes of one example, of the tensors whose names begin so."""
        chosen = [each for name, each in self.tensors.items() if name.startswith(prefix)]
        return sum(math.prod(shape) * WORDS[dtype] for shape, dtype in chosen)

    def shard_bytes(self, count: int) -> int:
        """Bytes of the safetensors file of `count` examples: the numbers and the header."""
        header, end = {}, 0
        for name, (shape, dtype) in self.tensors.items():
            start, end = end, end + count * math.prod(shape) * WORDS[dtype]
            header[name] = {"dtype": dtype, "shape": [count, *shape], "data_offsets": [start, end]}
        text = len(json.dumps(header, separators=(",", ":")))
        return 8 + -(-text // 8) * 8 + end


def shard_sizes(total: int, rows_per_shard: int) -> list[int]:
    """Examples of each shard."""
    return [min(rows_per_shard, total - start) for start in range(0, total, rows_per_shard)]


def factor_words(names: Sequence[str], matrices: Sequence[tuple[int, int]]) -> int:
    """Bytes of the header of the factors' file and of the JSON beside it."""
    header: dict[str, object] = {}
    records = []
    for i, (name, (r, c)) in enumerate(zip(names, matrices, strict=True)):
        for key, shape in (("left", [r, r]), ("right", [c, c]), ("kfac", [r, c]), ("ekfac", [r, c])):
            header[f"{key}.{i}"] = {"dtype": "F64", "shape": shape, "data_offsets": [10**7, 10**7]}
        records.append({"name": name, "tokens": 10**6, "left": f"left.{i}", "right": f"right.{i}"})
    text = json.dumps({"blocks": records}, indent=1)
    return len(json.dumps(header, separators=(",", ":"))) + len(text) + 240  # fingerprints and a checksum


def manifest_bytes(manifest: Manifest, shards: int) -> int:
    """Bytes of manifest.json with so many shards noted."""
    one = ShardRecord(file="000000000.safetensors", start=10**5, stop=10**5, bytes=10**8, sha256="0" * 64)
    noted = len(manifest.model_copy(update={"shards": (one,)}).model_dump_json(indent=1))
    empty = len(manifest.model_copy(update={"shards": ()}).model_dump_json(indent=1))
    return empty + shards * (noted - empty)


def examples_bytes(about: Manifest, examples: Sequence[Example], encoded: Sequence[Encoded]) -> int:
    """Bytes of examples.parquet: written and weighed; of more than `WHOLE` rows, an even sample is."""
    step = max(1, -(-len(examples) // WHOLE))
    with tempfile.TemporaryDirectory() as work:
        rows.write(
            Path(work), about.model_copy(update={"examples": len(examples[::step])}), examples[::step], encoded[::step]
        )
        size = (Path(work) / rows.NAME).stat().st_size
    return round(size * len(examples) / len(examples[::step]))


def adapter_bytes(model: Any) -> int:
    """Bytes of the adapter as PEFT saves it, 0 without one."""
    if not hasattr(model, "peft_config"):
        return 0
    with tempfile.TemporaryDirectory() as work:
        save_adapter(model, Path(work))
        return sum(path.stat().st_size for path in Path(work).rglob("*") if path.is_file())
