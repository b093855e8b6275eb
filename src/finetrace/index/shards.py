"""Shards: safetensors files with the features of consecutive rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from finetrace import fingerprint
from finetrace.atomic import write_tensors
from finetrace.collection import Features
from finetrace.errors import FinetraceError
from finetrace.index.manifest import Manifest, ShardRecord
from finetrace.index.stored import Narrowed, narrow, scale, widen

FOLDER = "shards"
PIECE = 64 << 20  # bytes of widened gradients at a time


def write(
    folder: Path, features: Features, start: int, stop: int, about: Manifest, writer: str = "", ids: Sequence[str] = ()
) -> ShardRecord:
    """Write the features of rows `start` to `stop` of the data in one step and describe the file.

    It holds a line for every row but those that were left out, gradients in the index's `feature_dtype`. `writer` tells apart
    processes that may be at the same file; `ids`, one a line, are for messages.
    """
    narrowed = narrowed_rows(features.gradients, about, ids)
    tensors = named("gradients", narrowed) | {"losses": features.losses}
    tensors |= {f"representation.{name}": value for name, value in features.representations.items()}
    name = f"{start:09d}.safetensors"
    path = folder / FOLDER / name
    write_tensors(path, tensors, writer=writer)
    return ShardRecord(
        file=name,
        start=start,
        stop=stop,
        bytes=path.stat().st_size,
        sha256=fingerprint.of_file(path),
        rounding=narrowed.rounding,
    )


def whole(folder: Path, shard: ShardRecord) -> bool:
    """Whether a shard is there, can be read, and has the size and the checksum that the manifest has."""
    path = folder / FOLDER / shard.file
    try:
        return path.is_file() and _unchanged(path, shard)
    except OSError:
        return False


def _unchanged(path: Path, shard: ShardRecord) -> bool:
    return path.stat().st_size == shard.bytes and fingerprint.of_file(path) == shard.sha256


def narrowed_rows(rows: Tensor, about: Manifest, ids: Sequence[str] = ()) -> Narrowed:
    """(rows, D) gradients as an index keeps them."""
    return narrow(rows, getattr(torch, about.feature_dtype), [record.block() for record in about.blocks], ids)


def named(name: str, narrowed: Narrowed) -> dict[str, Tensor]:
    """The tensors that gradients become in a safetensors file."""
    exponents = {} if narrowed.exponents is None else {f"{name}.exponents": narrowed.exponents}
    return {name: narrowed.rows} | exponents


def columns_of(file: safe_open, name: str, columns: slice, about: Manifest) -> Tensor:
    """(rows, columns) of gradients in an open safetensors file, widened."""
    exponents = file.get_tensor(f"{name}.exponents") if about.feature_dtype == "float16" else None
    return widen(file.get_tensor(name), exponents, columns, [r.block() for r in about.blocks], about.computed_dtype)


class ShardReader:
    """Reads columns of the shards of one index; each file's checksum is compared when it is first opened.

    Rows are counted without those that were left out. Gradients come back in the dtype in which they were computed,
    whatever they are stored in.
    """

    def __init__(self, folder: Path, about: Manifest, remedy: str | None = None) -> None:
        self.folder = folder / FOLDER
        self.remedy = remedy
        self.shards = about.shards
        self.dtype = about.computed_dtype
        self._blocks = tuple(record.block() for record in about.blocks)
        self._scaled = about.feature_dtype == "float16"
        gone = [each.row for each in about.left_out]
        self._before = [shard.start - sum(row < shard.start for row in gone) for shard in about.shards]
        self._before.append(about.kept)
        self._mapped: dict[str, Tensor] = {}
        self._exponents: dict[str, Tensor] = {}
        self._checked: set[str] = set()

    def gradients(self, columns: slice, rows: slice) -> Tensor:
        """(rows, columns) of the gradients of all shards, copied into memory."""
        parts = []
        for shard, start, stop in self.places():
            first, last = max(rows.start, start), min(rows.stop, stop)
            if first < last:
                parts.append(self._wide(shard, columns, slice(first - start, last - start)))
        return torch.cat(parts) if len(parts) != 1 else parts[0].clone()

    def places(self) -> Iterator[tuple[ShardRecord, int, int]]:
        """Each shard with its first and its end row, counted without those that were left out."""
        yield from zip(self.shards, self._before, self._before[1:], strict=False)

    def mapped(self, columns: slice = slice(None)) -> Iterator[Tensor]:
        """(rows, columns) gradients of one shard after another, mapped and not copied; narrow ones widened in pieces."""
        for shard in self.shards:
            stored = self._map(shard)[:, columns]
            if stored.dtype == self.dtype:
                yield stored
                continue
            step = max(1, PIECE // max(1, stored.shape[1] * self.dtype.itemsize))
            for first in range(0, len(stored), step):
                yield self._wide(shard, columns, slice(first, first + step))

    def _wide(self, shard: ShardRecord, columns: slice, rows: slice) -> Tensor:
        stored = self._map(shard)[rows]
        exponents = self._exponents[shard.file][rows] if self._scaled else None
        return widen(stored, exponents, columns, self._blocks, self.dtype)

    def _map(self, shard: ShardRecord) -> Tensor:
        """(rows, D) gradients of one shard, mapped and not read: the system pages in what is touched."""
        if shard.file not in self._mapped:
            with self._open(shard) as file:
                if self._scaled:
                    self._exponents[shard.file] = file.get_tensor("gradients.exponents")
                self._mapped[shard.file] = file.get_tensor("gradients")
        return self._mapped[shard.file]

    def scale(self, shard: ShardRecord, part: Tensor, rows: slice, start: int) -> None:
        """Bring (rows, c) columns from `start` on of a float16 shard, widened, to the gradients' own size, in place."""
        if shard.file not in self._exponents:
            with self._open(shard) as file:
                self._exponents[shard.file] = file.get_tensor("gradients.exponents")
        scale(part, self._exponents[shard.file][rows], start, self._blocks)

    def tensor(self, name: str) -> Tensor:
        """A tensor that has one row an example, from all shards."""
        return torch.cat(list(self.tensors(name)))

    def tensors(self, name: str) -> Iterator[Tensor]:
        """A tensor that has one row an example, a shard at a time, mapped while it is looked at."""
        for shard in self.shards:
            with self._open(shard) as file:
                yield file.get_tensor(name)

    def checked(self, shard: ShardRecord) -> Path:
        """The shard's file, its checksum compared with the manifest's the first time it is asked for."""
        path = self.folder / shard.file
        again = f"run finetrace index again on this folder to compute rows {shard.start + 1} to {shard.stop} anew."
        remedy = self.remedy or again
        if not path.is_file():
            raise FinetraceError(f"{path}: this shard is missing; {remedy}")
        try:
            if shard.file not in self._checked:
                if not _unchanged(path, shard):
                    raise FinetraceError(
                        f"{path}: this shard is broken (its checksum differs from the manifest's); {remedy}"
                    )
                self._checked.add(shard.file)
            return path
        except OSError as error:
            raise FinetraceError(f"{path}: this shard cannot be read ({error}); {remedy}") from error

    def _open(self, shard: ShardRecord) -> safe_open:
        path = self.checked(shard)
        try:
            return safe_open(str(path), framework="pt")
        except (OSError, SafetensorError, RuntimeError) as error:
            remedy = self.remedy or "run finetrace index again on this folder."
            raise FinetraceError(f"{path}: this shard cannot be read ({error}); {remedy}") from error
