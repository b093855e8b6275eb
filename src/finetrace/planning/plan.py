"""The plan of an index: what there is to do, the disk it takes, and where a few batches were measured, time and memory."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from finetrace import placement
from finetrace.collection.factor_sizes import factor_bytes
from finetrace.errors import FinetraceError
from finetrace.index import factors, shards, sums
from finetrace.index.manifest import NAME, Manifest, read
from finetrace.planning.cost import Shape
from finetrace.planning.counts import Work, pieces_of
from finetrace.planning.disk import (
    Disk,
    RowFormat,
    adapter_bytes,
    examples_bytes,
    factor_words,
    manifest_bytes,
    shard_sizes,
)
from finetrace.planning.measure import Timing
from finetrace.planning.rounds import Rounds
from finetrace.planning.schedule import Schedule, schedule

if TYPE_CHECKING:
    from finetrace.collection import Collector
    from finetrace.collection.factors import Labels
    from finetrace.encoding import Encoded
    from finetrace.examples import Example


@dataclass(frozen=True)
class Memory:
    """Peak memory in bytes.

    Attributes:
        peak: Of the process: what it had after loading, a batch's activations, and a shard's features.
        weights: Of the model, wherever it is.
        activations: Of the largest batch, between its forward and its backward pass.
        features: Of one shard.
        device: Peak of the CUDA device, of several the fullest one's; 0 on the CPU.
    """

    peak: int
    weights: int
    activations: int
    features: int
    device: int


@dataclass(frozen=True)
class Measured:
    """What was measured, and what follows from it for the work that is left, in seconds of this machine.

    Attributes:
        timings: The batches measured; the one that warmed up is not among them.
        shards: Wall-clock time of each shard, its writing included.
        collecting, writing, finishing: Wall-clock time of the passes, of writing shards, of making Kronecker factors.
        cpu: Processor time of these three together.
        memory: Peak memory, `None` where it was not looked at.
    """

    timings: tuple[Timing, ...]
    shards: tuple[float, ...]
    collecting: float
    writing: float
    finishing: float
    cpu: float
    memory: Memory | None

    @property
    def seconds(self) -> float:
        """Of all that comes after loading and encoding, with one worker."""
        return self.collecting + self.writing + self.finishing


@dataclass(frozen=True)
class Plan:
    """What an index will take.

    Attributes:
        about: The manifest that the index will have, its shards not noted yet.
        whole: All batches of the index.
        left: Those that an unfinished index in the same folder does not have yet.
        shape: Of the model.
        labels: Of the Kronecker factors, or `None` where none are to be made.
        longest: Id and tokens of the longest example.
        parameters: Entries of the model's weights, the adapter's included.
        device: Where the model is; several, where its layers are on several.
        disk: Bytes of the finished index.
        free: Bytes free where it goes.
        there: Bytes that an unfinished index in the same folder takes already.
        row: What a shard holds of one example.
        summed: Bytes that the sums for Kronecker factors write for each shard, folding included.
        at_once: Batches that are collected side by side.
        startup: Seconds of loading the program and the model.
        encoding: Seconds of reading and encoding the data.
        measured: `None` where nothing was measured.
        workers: How long several machines take, where that was asked.
    """

    about: Manifest
    whole: Work
    left: Work
    shape: Shape
    labels: Labels | None
    longest: tuple[str, int]
    parameters: int
    device: str
    disk: Disk
    free: int
    row: RowFormat
    summed: int = 0
    there: int = 0
    at_once: int = 1
    startup: float = 0.0
    encoding: float = 0.0
    measured: Measured | None = None
    workers: tuple[Schedule, ...] = field(default=())

    @property
    def rounds(self) -> Rounds:
        """How batches go side by side."""
        return Rounds(self.at_once)

    def with_workers(self, count: int) -> Schedule:
        """So many machines like this one, each with the whole of its cores or its device."""
        assert self.measured is not None, "no batch was measured"
        return schedule(self.measured.shards, count, self.startup, self.encoding, self.measured.finishing)

    def record(self) -> dict[str, Any]:
        """Everything as JSON: bytes and seconds."""
        measured = self.measured
        return {
            "model": {
                "name": self.about.model.name,
                "parameters": self.parameters,
                "dtype": self.about.model.dtype,
                "device": self.device,
                "threads": torch.get_num_threads(),
            },
            "rows": self.whole.rows,
            "rows_left": self.left.rows,
            "tokens": self.whole.tokens,
            "padded_tokens": self.whole.padded,
            "padding_share": self.whole.padding,
            "loss_tokens": self.whole.loss_tokens,
            "batches": len(self.whole.pieces),
            "batches_at_once": self.at_once,
            "shards": len(self.whole.shards),
            "rows_per_shard": self.about.rows_per_shard,
            "longest": {"id": self.longest[0], "tokens": self.longest[1]},
            "row_bytes": self.row.row_bytes(),
            "disk": {**asdict(self.disk), "total": self.disk.total, "peak": self.disk.peak, "free": self.free},
            "seconds": {
                "startup": self.startup,
                "encoding": self.encoding,
                "collecting": measured.collecting,
                "writing": measured.writing,
                "finishing": measured.finishing,
                "total": self.startup + self.encoding + measured.seconds,
                "cpu_after_encoding": measured.cpu,
            }
            if measured
            else None,
            "tokens_per_second": self.left.tokens / measured.seconds if measured and measured.seconds else None,
            "memory": asdict(measured.memory) if measured and measured.memory else None,
            "measured_batches": [asdict(each) for each in measured.timings] if measured else [],
            "workers": [asdict(each) for each in self.workers],
        }


def plan_index(
    about: Manifest,
    collector: Collector,
    encoded: Sequence[Encoded],
    examples: Sequence[Example],
    labels: Labels | None,
    folder: Path,
) -> Plan:
    """Count what an index of these settings will go through and take; nothing is measured and nothing is kept.

    Args:
        about: The manifest that it will begin with.
        collector: What it will collect with.
        encoded: All examples, in order.
        examples: The same as texts.
        labels: Of the Kronecker factors, if they are fitted on the way.
        folder: Where it will go; an unfinished index there has some of the work behind it.
    """
    fitted = labels is not None and factors.there(folder, labels)
    unfitted = None if fitted else labels
    shape = Shape.of(collector.model, collector.tracking)
    lanes, beside = collector.side_by_side()
    pieces = pieces_of(encoded, about.rows_per_shard, about.batch_tokens, beside)
    begun = _begun(folder, about)
    done = _done(folder, begun, unfitted) if begun is not None else set()
    left = [shard for shard in pieces if any(row not in done for piece in shard for row in piece.rows)]
    longest = max(range(len(encoded)), key=lambda i: len(encoded[i].ids))
    row = RowFormat.of_index(about, collector.tracking.width, shape.hidden, collector.dtype)
    disk = _disk(about, collector, encoded, examples, labels, row)
    parameters = list(collector.model.parameters())
    summed = sums.written(collector.tracking.blocks, len(pieces), torch.finfo(collector.dtype).bits // 8)
    return Plan(
        about=about,
        whole=Work.of(pieces),
        left=Work.of(left),
        shape=shape,
        labels=unfitted,
        longest=(examples[longest].id, len(encoded[longest].ids)),
        parameters=sum(each.numel() for each in parameters),
        device=", ".join(map(str, placement.devices(collector.model))),
        disk=replace(disk, parts=0, factors=_factors_there(folder, labels)) if labels is not None and fitted else disk,
        free=_free(folder),
        row=row,
        summed=summed if unfitted is not None else 0,
        at_once=lanes if any(piece.beside for shard in pieces for piece in shard) else 1,
        there=_bytes_in(folder) if begun is not None else 0,
    )


def _disk(
    about: Manifest,
    collector: Collector,
    encoded: Sequence[Encoded],
    examples: Sequence[Example],
    labels: Labels | None,
    row: RowFormat,
) -> Disk:
    sizes = shard_sizes(len(encoded), about.rows_per_shard)
    blocks = collector.tracking.blocks
    entry = torch.finfo(collector.dtype).bits // 8
    parts = 0
    if labels is not None:
        parts = sums.disk(blocks, len(sizes), entry)
        parts += row.row_bytes("gradients") * len(encoded) if labels == "model" else 0
    matrices = [block.matrix for block in blocks]
    return Disk(
        shards=sum(row.shard_bytes(count) for count in sizes),
        factors=factor_bytes(matrices, entry) + factor_words([block.name for block in blocks], matrices)
        if labels is not None
        else 0,
        parts=parts,
        examples=examples_bytes(about, examples, encoded),
        adapter=adapter_bytes(collector.model),
        manifest=manifest_bytes(about, len(sizes)),
    )


def _begun(folder: Path, about: Manifest) -> Manifest | None:
    """The manifest of an index of the same data in `folder`, finished or not."""
    if not (folder / NAME).exists():
        return None
    try:
        there = read(folder)
    except FinetraceError:
        return None  # building it will say what is wrong
    same = (there.data_fingerprint, there.rows_per_shard) == (about.data_fingerprint, about.rows_per_shard)
    return there if same else None


def _done(folder: Path, begun: Manifest, labels: Labels | None) -> set[int]:
    """Rows in the shards that it has, with what the factors want of them; their checksums are not looked at.

    Rows that were appended lie in shards of their own, whose borders are others than those of an index built at once.
    """
    there = begun.shards if labels is None else sums.summed(folder, begun, labels)
    return {row for shard in there for row in range(shard.start, shard.stop)}


def _bytes_in(folder: Path) -> int:
    """Of the shards, and of factors and what they are made of."""
    places = (folder / shards.FOLDER, folder / sums.FOLDER)
    return sum(path.stat().st_size for place in places for path in place.rglob("*.safetensors") if path.is_file())


def _factors_there(folder: Path, labels: Labels) -> int:
    """Of finished factors: what two layers share is there once, which cannot be foreseen without a batch."""
    file = factors.path(folder, labels)
    return sum(each.stat().st_size for each in (file, file.with_suffix(".json")) if each.is_file())


def _free(folder: Path) -> int:
    there = next((each for each in (folder, *folder.absolute().parents) if os.path.isdir(each)), Path("."))
    return shutil.disk_usage(there).free
