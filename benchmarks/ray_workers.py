"""Two Ray workers against one process: python benchmarks/ray_workers.py [--rows 96] [--rounds 5] [--workers 2].

The same shards of an index of the embedded model are collected by as many local Ray workers as there are threads, one thread
each, and by one process with all the threads, in turn. Both begin with nothing in memory. Start-up is the time until every
worker has the program, the model and one row behind it; where Ray is, it includes the start of its cluster. The steady rate
begins there, for all workers at once, and ends with the last shard. The goal is a steady rate of 85% of the one process's.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from collection import with_adapter
from finetrace.encoding import Encoder
from finetrace.examples import Example
from finetrace.execution import Engine
from finetrace.index import build_index, shards
from finetrace.index.manifest import Manifest
from finetrace.index.starting import make_folder, start
from finetrace.index.work import Collected, Piece, ShardWork
from finetrace.models import EMBEDDED
from finetrace.tasks import build

GOAL = 0.85
PATIENCE = 1800.0  # seconds that workers wait for one another


@dataclass(frozen=True)
class Together(ShardWork):
    """`ShardWork` whose workers begin with their first shard at once, when the last of them has its model.

    Attributes:
        marks: A folder of this round, where each worker says that it is ready.
        workers: How many there are.
    """

    marks: Path = Path()
    workers: int = 1

    def __call__(self, piece: Piece) -> Collected:
        """Collect one piece, the first time after all are ready.

        Ray sends this class by value, so that nothing of it may be a `cached_property`: in Python 3.11 that has a lock.
        """
        if "_begun" not in self.__dict__:
            self._begin()
            self.__dict__["_begun"] = True
        return super().__call__(piece)

    def _begin(self) -> None:
        self._collector.collect(self._rows.encoded[:1], self._rows.ids[:1])
        (self.marks / f"{os.getpid()}").write_text(repr(time.time()))
        until = time.monotonic() + PATIENCE
        while len(list(self.marks.iterdir())) < self.workers:
            if time.monotonic() > until:
                raise RuntimeError(f"after {PATIENCE:.0f} s fewer than {self.workers} workers are ready")
            time.sleep(0.005)


@dataclass(frozen=True)
class Round:
    """Seconds of one round: until the last worker was ready, and from then to the end."""

    startup: float
    steady: float


def started(folder: Path, examples: Sequence[Example], rows_per_shard: int, dtype: str, model: str) -> tuple[Any, Any]:
    """An index up to its first shard; its manifest, and how its model was loaded."""
    loaded = with_adapter(dtype, model)
    encoder = Encoder(loaded.tokenizer)
    found: list[tuple[Manifest, Any]] = []

    class Begun(Exception):
        """Nothing is written yet."""

    def begin(about: Manifest, collector: Any, encoded: Any) -> None:
        found.append((about, encoded))
        raise Begun

    try:
        build_index(loaded, examples, folder, encoder, rows_per_shard=rows_per_shard, begin=begin)
    except Begun:
        about, encoded = found[0]
    make_folder(folder)
    return start(folder, about, loaded, examples, encoded, 0), loaded.spec


def once(folder: Path, about: Manifest, spec: Any, engine: Engine) -> Round:
    """All shards by one engine; they are removed again."""
    pieces = [Piece(first, end, sums=False) for first, end in about.borders()]
    with tempfile.TemporaryDirectory() as marks:
        work = Together(folder, about, spec, marks=Path(marks), workers=min(engine.workers, len(pieces)))
        began = time.time()
        done = [collected for _, collected in engine.run_each(work, pieces, shared=folder)]
        # leaving the pool, and Ray, is in neither
        ended = max((folder / shards.FOLDER / each.shard.file).stat().st_mtime for each in done if each.shard)
        ready = max(float(mark.read_text()) for mark in Path(marks).iterdir())
    shutil.rmtree(folder / shards.FOLDER)
    return Round(ready - began, ended - ready)


def words(name: str, rounds: Sequence[Round], tokens: int) -> str:
    """Medians of one engine."""
    steady = statistics.median(tokens / each.steady for each in rounds)
    whole = statistics.median(tokens / (each.startup + each.steady) for each in rounds)
    startup = statistics.median(each.startup for each in rounds)
    return f"{name}: steady {steady:.0f} tokens/s; start-up {startup:.1f} s; start-up included {whole:.0f} tokens/s"


def spread(ratios: Sequence[float]) -> str:
    """Median, least and most."""
    return f"{statistics.median(ratios):.3f} [{min(ratios):.3f}, {max(ratios):.3f}]"


def main() -> None:
    """Print both rates, and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=96)
    parser.add_argument("--rows-per-shard", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=2, help="Ray workers, and threads of the one process")
    parser.add_argument("--task", default="grammars")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--model", default=EMBEDDED, help="a folder in place of the embedded model, to try this out")
    args = parser.parse_args()
    rows = list(build(args.task).train)
    examples = rows[:: max(1, len(rows) // args.rows)][: args.rows]
    engines = {
        f"one process, {args.workers} threads": Engine("processes", 1, threads=args.workers),
        f"{args.workers} Ray workers, 1 thread each": Engine("ray", args.workers, threads=1),
    }
    times: dict[str, list[Round]] = {name: [] for name in engines}
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work) / "index"
        about, spec = started(folder, examples, args.rows_per_shard, args.dtype, args.model)
        for turn in range(args.rounds):
            for name in list(engines)[:: 1 if turn % 2 == 0 else -1]:  # neither is always the first
                times[name].append(once(folder, about, spec, engines[name]))
    print(
        f"{args.task}, {len(examples)} rows, {about.tokens} tokens, {len(about.borders())} shards, {args.dtype}, "
        f"{args.rounds} rounds in turn"
    )
    for name, rounds in times.items():
        print(words(name, rounds, about.tokens))
    one, ray = times.values()
    steady = [a.steady / b.steady for a, b in zip(one, ray, strict=True)]
    whole = [(a.startup + a.steady) / (b.startup + b.steady) for a, b in zip(one, ray, strict=True)]
    reached = "reached" if statistics.median(steady) >= GOAL else "missed"
    print(
        f"Ray workers over one process: steady {spread(steady)} (goal {GOAL}: {reached}); start-up included {spread(whole)}"
    )


if __name__ == "__main__":
    main()
