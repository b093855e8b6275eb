"""One shard's work: the same rows, the same bytes, in whichever process or on whichever machine it is done."""

from __future__ import annotations

import os
import socket
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

from finetrace.atomic import part_of, remove_part
from finetrace.collection import Collector, Features, Representation
from finetrace.collection.factors import FactorSums, Labels
from finetrace.encoding import Encoded
from finetrace.errors import FinetraceError
from finetrace.execution.worker import SEEN
from finetrace.index import rows, shards, sums
from finetrace.index.manifest import LeftOutRecord, Manifest, ShardRecord, inside
from finetrace.index.store import refuse_other_model
from finetrace.models import ModelSpec, load
from finetrace.moments import at_moment


@dataclass(frozen=True)
class Piece:
    """A shard to collect, or what is missing of it.

    Attributes:
        start, stop: Its rows, the last one not among them.
        there: What the manifest says of its file, where that is there; else the file is wanted.
        sums: Whether its part of the Kronecker factors is wanted.
        left_out: Rows of the data that are left out whatever their values, with the reason.
    """

    start: int
    stop: int
    there: ShardRecord | None = None
    sums: bool = True
    left_out: Mapping[int, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """For messages."""
        return f"rows {self.start + 1} to {self.stop}"


@dataclass(frozen=True)
class Collected:
    """What became of a piece.

    Attributes:
        shard: What the manifest is to say of the shard, `None` where its file was not wanted.
        left_out: Its rows without features, where its file was wanted.
        halved: How many batches did not fit in memory and were halved.
    """

    shard: ShardRecord | None
    left_out: tuple[LeftOutRecord, ...] = ()
    halved: int = 0


@dataclass(frozen=True)
class Gathered:
    """What was collected of a piece and is not written yet."""

    piece: Piece
    features: Features
    sums: FactorSums | None


def gather_piece(
    about: Manifest,
    collector: Collector,
    ids: Sequence[str],
    encoded: Sequence[Encoded],
    piece: Piece,
    labels: Labels | None = None,
    on_batch: Callable[[int], None] = lambda count: None,
    *,
    skip_bad: bool = False,
) -> Gathered:
    """Collect one piece.

    Args:
        about: What the manifest says.
        collector: Of the index's model.
        ids, encoded: Of all rows.
        piece: Which rows.
        labels: Of the Kronecker factors, where some are wanted.
        on_batch: Hears how many rows each batch finished.
        skip_bad: Leave out rows that are not finite, and say so; of a shard that is there no further row is left out.

    Raises:
        FinetraceError: As in `Collector.collect`.
    """
    start, stop = piece.start, piece.stop
    summed = collector.factor_sums(labels) if labels is not None and piece.sums else None
    with at_moment(collector.model, about.model.at):
        features = collector.collect(
            encoded[start:stop],
            ids[start:stop],
            on_batch,
            factors=summed,
            first=start,
            left_out={row - start: reason for row, reason in piece.left_out.items()},
            skip_bad=skip_bad and piece.there is None,
        )
    return Gathered(piece, features, summed)


def write_piece(folder: Path, about: Manifest, ids: Sequence[str], gathered: Gathered, writer: str = "") -> Collected:
    """Write what was collected of a piece, each file in one step; the manifest is the coordinator's.

    Args:
        folder: The index, with its manifest and examples.
        about: What the manifest says.
        ids: Of all rows.
        gathered: Of the piece.
        writer: A name that no other writer has, where several may be at the same shard.

    Raises:
        FinetraceError: A file cannot be written.
    """
    piece, features = gathered.piece, gathered.features
    start, stop = piece.start, piece.stop
    kept = [ids[row] for row in range(start, stop) if row - start not in features.left_out]
    shard = piece.there or shards.write(folder, features, start, stop, about, writer, kept)
    if gathered.sums is not None:
        sums.write_part(folder, gathered.sums, features.sampled, shard, about, writer)
    if piece.there is not None:
        return Collected(None, halved=features.halved)
    gone = sorted(features.left_out.items())
    return Collected(
        shard,
        tuple(LeftOutRecord(id=ids[start + i], row=start + i, reason=why) for i, why in gone),
        features.halved,
    )


@dataclass(frozen=True)
class ShardWork:
    """A piece collected and written in a worker: what it needs is in the folder of the index, and the base model.

    Attributes:
        folder: The index, by its whole path.
        about: Its manifest when collection began.
        spec: How the coordinator loaded the model (`Loaded.elsewhere`); a worker takes the adapter that the index keeps.
        labels: Of the Kronecker factors, where some are wanted.
        skip_bad: As in `gather_piece`.
    """

    folder: Path
    about: Manifest
    spec: ModelSpec
    labels: Labels | None = None
    skip_bad: bool = False

    def __call__(self, piece: Piece) -> Collected:
        """Collect one piece; the model and the rows are loaded with the first."""
        ids, encoded = self._rows.ids, self._rows.encoded
        gathered = gather_piece(self.about, self._collector, ids, encoded, piece, self.labels, skip_bad=self.skip_bad)
        return write_piece(self.folder, self.about, ids, gathered, writer_name())

    @cached_property
    def _rows(self) -> rows.Rows:
        return rows.read(self.folder, self.about)

    @cached_property
    def _collector(self) -> Collector:
        about = self.about
        adapter = str(inside(self.folder, about.model.adapter)) if about.model.adapter is not None else None
        spec = replace(self.spec, adapter=adapter, dtype=about.model.dtype)  # type: ignore[arg-type]
        loaded = load(spec)
        try:
            refuse_other_model(self.folder, about, loaded)
        except FinetraceError as error:
            raise FinetraceError(f"a worker loads another model than this process: {error}") from error
        tracking = about.track(loaded.model)
        if tracking.blocks != tuple(record.block() for record in about.blocks):
            raise FinetraceError(
                f"{self.folder}: a worker's model has other tracked layers than the index; use the same model and versions "
                "everywhere."
            )
        wanted = tuple(map(Representation.parse, about.representations))
        return Collector(loaded.model, tracking, wanted, about.batch_tokens)


_TOKEN = uuid.uuid4().hex[:8]  # containers may share host names and process ids


def writer_name() -> str:
    """A name that this process alone has among those that may write to one folder."""
    return f"{socket.gethostname()}-{os.getpid()}-{_TOKEN}"


def sweep(folder: Path) -> None:
    """Remove what a killed run left: files half written, and the one that its workers looked for.

    A writer that is still alive loses nothing but its attempt.
    """
    for place in (folder / shards.FOLDER, folder / sums.FOLDER, *(folder / sums.FOLDER).glob("*.parts-*")):
        for part in place.glob(part_of("*", "*")):
            remove_part(part)
    for token in folder.glob(f"{SEEN}*"):
        token.unlink(missing_ok=True)
