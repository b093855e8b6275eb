"""The manifest: what an index holds, what it was made from, and which shards are whole.

While shards are collected they are noted in a journal beside it (`index.notes`): `read` reads both.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import nn

from finetrace.arithmetic import Setting
from finetrace.atomic import part_of, remove_part, write_atomically
from finetrace.collection.modules import Block, Tracking, track
from finetrace.collection.projection import Projection
from finetrace.errors import FinetraceError
from finetrace.index import journal
from finetrace.moments import Moment

FORMAT = 1
NAME = "manifest.json"
PART = part_of(NAME)
JOURNAL = "manifest.journal"


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class BlockRecord(_Strict):
    """A tracked matrix: name, shape as it is stored, first column, and the parameter's own shape where that is another."""

    name: str
    shape: tuple[int, ...]
    offset: int
    original: tuple[int, ...] | None = None

    def block(self) -> Block:
        """As the collection knows it."""
        return Block(self.name, self.shape, self.offset, self.original)

    @classmethod
    def of(cls, block: Block) -> BlockRecord:
        """As the manifest keeps it."""
        return cls(name=block.name, shape=block.shape, offset=block.offset, original=block.original)


class ShardRecord(_Strict):
    """Rows `start` to `stop` (exclusive) in one file, with its size and SHA-256.

    `rounding` is the largest relative error that storing made in a row's gradient: 0 where they are kept as computed.
    """

    file: str
    start: int
    stop: int
    bytes: int
    sha256: str
    rounding: float = 0.0


class LeftOutRecord(_Strict):
    """A row of the data, counted from 0, that is in no shard, and why."""

    id: str
    row: int
    reason: str


class Arrival(_Strict):
    """A shard that became whole, and the rows between its borders that are not in it: a line of the journal."""

    shard: ShardRecord
    left_out: tuple[LeftOutRecord, ...] = ()


class AppendRecord(_Strict):
    """Rows from `start` on that were appended later: the file of their examples, and the fingerprint of these rows alone."""

    start: int
    examples: str
    data_fingerprint: str


class ModelRecord(_Strict):
    """How to load the model again, the fingerprints that it must show, and where along its fine-tuning gradients are taken."""

    name: str
    dtype: str
    adapter: str | None
    base_fingerprint: str
    adapter_fingerprint: str | None
    tokenizer_fingerprint: str
    layers: int
    at: Moment = "end"
    scaling_fingerprint: str | None = None  # of the adapter; `None` in an index of before it was noted
    embeddings_fingerprint: str | None = None  # whole, of the base; `None` likewise
    settings: dict[str, Setting] | None = None  # of the base (`finetrace.arithmetic`); `None` likewise


class EncodingRecord(_Strict):
    """The encoding that training examples had and queries get."""

    loss_on: str
    max_length: int | None
    template: str | None
    pad_to: int | None = None


class Manifest(_Strict):
    """Everything about an index but the numbers."""

    format: Literal[1] = 1
    finetrace: str
    model: ModelRecord
    encoding: EncodingRecord
    data_fingerprint: str
    examples: int
    tokens: int
    feature_dtype: str
    batch_tokens: int
    rows_per_shard: int
    modules: tuple[str, ...] | None
    blocks: tuple[BlockRecord, ...]
    representations: tuple[str, ...]
    skipped: dict[str, str]
    projection: str = "none"
    projection_seed: int = 0
    shards: tuple[ShardRecord, ...] = ()
    lost: tuple[ShardRecord, ...] = ()
    left_out: tuple[LeftOutRecord, ...] = ()
    appended: tuple[AppendRecord, ...] = ()

    @property
    def kept(self) -> int:
        """Rows that have features: those of the data without the ones that were left out."""
        return self.examples - len(self.left_out)

    def borders(self) -> list[tuple[int, int]]:
        """First row and end (exclusive) of every shard, the missing ones too; appended rows begin a new shard."""
        ends = [*(part.start for part in self.appended), self.examples]
        return [
            (start, min(start + self.rows_per_shard, end))
            for begin, end in zip([0, *ends[:-1]], ends, strict=True)
            for start in range(begin, end, self.rows_per_shard)
        ]

    def track(self, model: nn.Module) -> Tracking:
        """The layers of `model` that the index tracks, their gradients projected as the index's are."""
        return track(model, self.modules, Projection.parse(self.projection, self.projection_seed))

    def having(self, arrivals: Iterable[Arrival]) -> Manifest:
        """With these shards too, or in place of those with the same first row."""
        done, gone = {shard.start: shard for shard in self.shards}, {each.row: each for each in self.left_out}
        for arrival in arrivals:
            done[arrival.shard.start] = arrival.shard
            gone |= {each.row: each for each in arrival.left_out}
        update = {
            "shards": tuple(done[start] for start in sorted(done)),
            "lost": tuple(shard for shard in self.lost if shard.start not in done),
            "left_out": tuple(gone[row] for row in sorted(gone)),
        }
        return self.model_copy(update=update)

    @property
    def computed_dtype(self) -> torch.dtype:
        """What gradients are computed in and widened to: float32, or float64 for a float64 model."""
        return torch.float64 if "float64" in (self.model.dtype, self.feature_dtype) else torch.float32

    @property
    def rounding(self) -> float:
        """The largest relative error ||stored - g|| / ||g|| of a stored gradient."""
        return max((shard.rounding for shard in self.shards), default=0.0)

    @property
    def complete(self) -> bool:
        """Whether the shards follow one another from the first row to the last."""
        stops = [0, *(shard.stop for shard in self.shards)]
        return [shard.start for shard in self.shards] == stops[:-1] and stops[-1] == self.examples


def left_out_sentence(about: Manifest) -> str:
    """How many rows an index left out, and the first five of them; empty where it has them all."""
    if not about.left_out:
        return ""
    named = "; ".join(f"example {each.id} (row {each.row + 1}): {each.reason}" for each in about.left_out[:5])
    more = "; ..." if len(about.left_out) > 5 else ""
    return f"{len(about.left_out)} of {about.examples} rows are left out: {named}{more}."


def read(folder: Path) -> Manifest:
    """The manifest of an index; `FinetraceError` where there is none or it cannot be one."""
    path = folder / NAME
    if not folder.is_dir() or not path.exists():
        raise FinetraceError(f"{folder}: no index there (no {NAME}); build one with finetrace index.")
    try:
        content, lines = _at_one_moment(folder)
        document = json.loads(content.decode())
        if isinstance(document, dict) and document.get("format") != FORMAT:
            raise FinetraceError(
                f"{path}: index format {document.get('format')}, this finetrace reads format {FORMAT}; build it again."
            )
        manifest = Manifest.model_validate(document)
        if lines:
            manifest = manifest.having(map(Arrival.model_validate_json, lines))
    except (ValidationError, ValueError, OSError) as error:
        detail = str(error).splitlines()[0]
        raise FinetraceError(f"{path}: not a readable manifest ({detail}); build the index again.") from error
    named = [("shard", shard.file) for shard in manifest.shards]
    for what, file in [*named, *(("examples", part.examples) for part in manifest.appended)]:
        if Path(file).name != file or file in ("", ".", ".."):
            raise FinetraceError(f"{path}: {what} file {file!r} leaves the index folder; this index is not used.")
    return manifest


def _at_one_moment(folder: Path) -> tuple[bytes, list[str]]:
    """The manifest and the lines of its journal: a writer may bring them into another manifest between two reads."""
    while True:
        content = (folder / NAME).read_bytes()
        lines = journal.read(folder / JOURNAL, content)
        if (folder / NAME).read_bytes() == content:
            return content, lines


def inside(folder: Path, name: str) -> Path:
    """A path that a manifest names, which may not leave the folder."""
    path = (folder / name).resolve()
    if not path.is_relative_to(folder.resolve()):
        raise FinetraceError(f"{folder}: the manifest's path {name!r} leaves the index folder; it is not followed.")
    return path


def write(folder: Path, manifest: Manifest) -> None:
    """Replace the manifest in one step, and remove the journal of the one before."""
    write_atomically(folder / NAME, (manifest.model_dump_json(indent=1) + "\n").encode())
    forget_journal(folder)


def fold(folder: Path) -> None:
    """Bring a journal that a killed run left into the manifest; the caller has the lock."""
    if (folder / JOURNAL).exists():
        write(folder, read(folder))


def forget_journal(folder: Path) -> None:
    """Remove the journal, and what a kill left of one that was begun."""
    for name in (JOURNAL, part_of(JOURNAL)):
        remove_part(folder / name)
