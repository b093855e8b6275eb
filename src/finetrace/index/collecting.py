"""Collecting the shards that an index lacks, here or by workers: each is written whole and noted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import get_args

from finetrace.collection import Collector
from finetrace.collection.factors import Labels
from finetrace.encoding import Encoded
from finetrace.examples import Example
from finetrace.execution import Engine
from finetrace.index import factors, manifest, sums
from finetrace.index.manifest import Arrival, Manifest
from finetrace.index.notes import Notes
from finetrace.index.sizing import SHARD_BYTES
from finetrace.index.work import Collected, Gathered, Piece, ShardWork, gather_piece, sweep, write_piece
from finetrace.models import ModelSpec
from finetrace.progress import Tracker


def collect_shards(
    folder: Path,
    started: Manifest,
    collector: Collector,
    examples: Sequence[Example],
    encoded: Sequence[Encoded],
    labels: Labels | None,
    spec: ModelSpec | None = None,
    engine: Engine = Engine(),
    *,
    skip_bad: bool = False,
    say: Callable[[str], None] = lambda text: None,
) -> None:
    """Collect the shards and factor sums that are missing, in any order, and finish the factors.

    Each shard is noted as soon as it is whole, so that a killed run goes on after those that are there; only then may
    its sums be folded.

    Args:
        folder: The index; this process holds its lock.
        started: Its manifest with the shards that are whole.
        collector: Of the model in this process.
        examples, encoded: All rows of the data, those too that `started` has left out.
        labels: Of the Kronecker factors, where some are wanted.
        spec: By which workers load the model; without it this process does the work, whatever the engine.
        engine: Where the shards are collected.
        skip_bad: As in `build_index`.
        say: Hears of batches that did not fit in memory.
    """
    done = {shard.start: shard for shard in started.shards}
    there_now = manifest.read(folder)
    notes = Notes(folder, started, there_now)
    before = {shard.start: shard.sha256 for shard in (*started.lost, *there_now.shards)}
    gone = {each.row: each for each in started.left_out}
    unfitted = labels if labels is not None and not factors.there(folder, labels) else None
    if unfitted is not None:
        factors.refuse_others(folder, unfitted)
    running = sums.Running(folder, started, unfitted) if unfitted is not None else None
    if running is not None and not running.agrees(started.shards):
        running.discard()
    pieces, there = [], []
    for start, stop in started.borders():
        known = {row: gone[row].reason for row in range(start, stop) if row in gone}
        shard = done.get(start)
        wanted = running is not None and not running.has(start, stop - start - len(known), shard)
        if shard is None or wanted:
            pieces.append(Piece(start, stop, shard, wanted, known))
        else:
            there.append(shard)
    tracker = Tracker("collecting gradients", len(examples), "examples")
    ids = [example.id for example in examples]

    halved = 0

    def arrived(piece: Piece, found: Collected) -> None:
        nonlocal halved
        halved += found.halved
        if found.shard is not None:
            if before.get(found.shard.start, found.shard.sha256) != found.shard.sha256:
                _forget_factors(folder, say)
            done[found.shard.start] = found.shard
            notes.add(Arrival(shard=found.shard, left_out=tuple(found.left_out)))
        if running is not None:
            running.arrived(done[piece.start])

    def gather(piece: Piece) -> Gathered:
        return gather_piece(started, collector, ids, encoded, piece, unfitted, tracker.advance, skip_bad=skip_bad)

    def write(gathered: Gathered) -> None:
        arrived(gathered.piece, write_piece(folder, started, ids, gathered))

    sweep(folder)
    try:
        with tracker:
            for shard in there:
                tracker.advance(shard.stop - shard.start)
                if running is not None:
                    running.arrived(shard)
            if spec is None or engine.in_process:
                _here(pieces, gather, write)
            else:
                work = ShardWork(folder.resolve(), started, spec, unfitted, skip_bad)
                each_piece = engine.run_each(work, pieces, name=lambda piece: piece.name, shared=folder)
                with closing(each_piece) as arriving:
                    for place, found in arriving:
                        tracker.advance(pieces[place].stop - pieces[place].start)
                        arrived(pieces[place], found)
    finally:
        sweep(folder)
    collector.release()
    if halved:
        say(f"{halved} batches did not fit in memory and were halved; smaller --batch-tokens spare the attempts.")
    notes.fold()
    finished = manifest.read(folder)
    if running is not None and not running.agrees(finished.shards):
        say(f"{folder}: a shard is not bit by bit what it was, so its sums and those of all others are collected again")
        running.discard()
        collect_shards(folder, finished, collector, examples, encoded, labels, spec, engine, skip_bad=skip_bad, say=say)
    elif unfitted is not None and finished.kept:
        factors.finish(folder, finished, unfitted)
    elif labels is not None:
        sums.tidy(folder, labels)  # what a run left that was killed while it removed them


def _here(pieces: Sequence[Piece], gather: Callable[[Piece], Gathered], write: Callable[[Gathered], None]) -> None:
    """Collect the pieces in this process; each is written, and noted, while the next one is collected.

    What is being written is written and noted whatever befalls the next piece. A large piece, and one with sums beside its
    rows, is written before the next one begins, so that memory holds one of them.
    """
    written: Future[None] | None = None
    with ThreadPoolExecutor(1, "writing") as thread:
        for piece in pieces:
            gathered = gather(piece)
            if written is not None:
                written.result()
            written = thread.submit(write, gathered)
            if gathered.sums is not None or gathered.features.gradients.nbytes > 2 * SHARD_BYTES:
                written.result()
            del gathered
        if written is not None:
            written.result()


def _forget_factors(folder: Path, say: Callable[[str], None]) -> None:
    """Finished factors go where a shard that was broken did not come out as it had been."""
    for labels in get_args(Labels):
        if factors.remove(folder, labels):
            say(f"{factors.path(folder, labels)}: removed, since a shard is not bit by bit what it was")
