"""What `finetrace index` says before its long work, soon after it began, and at its end."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from finetrace.errors import FinetraceError
from finetrace.execution import Engine
from finetrace.host_memory import available_memory
from finetrace.planning import measure, words
from finetrace.planning.counts import Piece
from finetrace.planning.extrapolation import extrapolate, measure_plan
from finetrace.planning.measure import Timing
from finetrace.planning.plan import Plan, plan_index
from finetrace.planning.schedule import Schedule, schedule
from finetrace.progress import hearing
from finetrace.units import duration

if TYPE_CHECKING:
    from finetrace.collection import Collector
    from finetrace.collection.factors import Labels
    from finetrace.encoding import Encoded
    from finetrace.examples import Example
    from finetrace.index.manifest import Manifest

SHARE = 0.02  # of the work that measuring may cost before it begins; else the work's own first batches are looked at
WORKERS_SHARE = 0.1  # the same where workers do it, whose own batches are not heard
BATCHES = 3  # of its own that are looked at, at least, after the one that warms up
TITLE = "collecting gradients"


class Announcer:
    """Says what an index will take.

    Counts and disk are said before anything is written. Time and memory are measured on a few batches where those are at
    most `SHARE` of the work, or `WORKERS_SHARE` with workers; else the time is said once the work's own first batches, `SHARE`
    of it and `BATCHES` at least, are done. Workers are taken to be as fast as this process by thread, or each on a device like
    this one; nothing is heard of their batches, so of work too short to be measured beforehand no time is said. The last line
    is how long it took.
    """

    def __init__(self, say: Callable[[str], None], engine: Engine = Engine()) -> None:
        """`say` hears the lines; `engine` does the work."""
        self._say = say
        self._engine = engine
        self._plan: Plan | None = None
        self._said: float | None = None  # seconds of the whole work
        self._coming: list[Piece | int] = []  # batches, or the rows of a shard that is there already
        self._seen: list[Piece] = []
        self._clock = (0.0, 0.0)
        self._warm = 0
        self._ends: set[tuple[int, ...]] = set()  # batches after which none is under way that began with them

    @contextmanager
    def announcing(
        self, examples: Sequence[Example], folder: Path, labels: Labels | None, began: float, startup: float
    ) -> Iterator[None]:
        """While open, the work's own batches are heard; at the end the time is said.

        Args:
            examples: The data.
            folder: Of the index.
            labels: Of the Kronecker factors.
            began: When the program did (`time.perf_counter`).
            startup: Seconds that it then took to load itself and the model.
        """
        self.examples, self.folder, self.labels = examples, folder, labels
        self.began, self.startup = began, startup
        with hearing(self._advanced):
            yield
        if self._plan is not None:
            said = f" (said: about {duration(self._said)})" if self._said is not None else ""
            self._say(f"took {duration(time.perf_counter() - self._worked)}{said}")

    def begin(self, about: Manifest, collector: Collector, encoded: Sequence[Encoded]) -> None:
        """Say what there is to do, and how long it takes if that can be measured at little cost."""
        plan = plan_index(about, collector, encoded, self.examples, self.labels, self.folder)
        self._say(words.to_do(plan))
        self._say(words.disk(plan))
        self._warn(plan)
        probes = measure.choose(plan.left.pieces, plan.shape)
        share = SHARE if self._engine.in_process else WORKERS_SHARE
        if probes and plan.at_once * sum(piece.padded for piece in probes) <= share * plan.left.padded:
            plan = self._measured(plan, collector, encoded, len(probes))
        elif self._engine.in_process:
            left = set(plan.left.shards)
            there = [shard for shard in plan.whole.shards if shard not in left]
            self._coming = [sum(len(piece.rows) for piece in shard) for shard in there]  # they are heard of first
            self._coming += [piece for shard in plan.whole.shards if shard in left for piece in shard]
            self._ends = {
                shard[k].rows for shard in plan.left.shards for k in range(len(shard)) if plan.rounds.ends(shard, k)
            }
            self._coming.reverse()
        self._plan = plan
        self._worked = time.perf_counter()

    def _measured(self, plan: Plan, collector: Collector, encoded: Sequence[Encoded], probes: int) -> Plan:
        """The plan with its time and memory, which are said; as it was where workers do what this process cannot."""
        try:
            plan = measure_plan(plan, collector, encoded, self.folder)
        except (RuntimeError, MemoryError, FinetraceError):  # memory, as a rule: workers may have more of it
            if self._engine.in_process:
                raise
            return plan
        finally:
            if not self._engine.in_process and torch.cuda.is_available():
                torch.cuda.empty_cache()  # workers may share the device
            if not self._engine.in_process:
                collector.release()
        assert plan.measured is not None
        self._said, line = plan.measured.seconds, words.time(plan)
        if not self._engine.in_process:
            shared = self._shared(plan)
            self._said, line = shared.seconds, words.shared(plan, shared)
        self._say(f"{line}, from {probes} batches measured")
        return plan

    def _shared(self, plan: Plan) -> Schedule:
        """The time of the engine's workers, each of which loads the model once."""
        measured, workers = plan.measured, min(self._engine.workers, max(1, len(plan.left.shards)))
        assert measured is not None
        slower = 1.0
        if plan.device == "cpu":
            slower = torch.get_num_threads() / self._engine.cores_each(workers)
        shards = [slower * seconds for seconds in measured.shards]
        return schedule(shards, self._engine.workers, self.startup, after=measured.finishing)

    def _warn(self, plan: Plan) -> None:
        """Say before any batch runs where memory may not suffice: a system that is out of it may end the process unasked."""
        if tight := words.tight(plan, [example.id for example in self.examples], available_memory()):
            self._say(tight)

    def _advanced(self, title: str, units: int) -> None:
        """One batch is done; enough of them say how long the rest takes."""
        plan = self._plan
        if plan is None or title != TITLE or not self._coming:
            return
        now = (time.perf_counter(), time.process_time())
        piece = self._coming.pop()
        if isinstance(piece, int):
            if piece != units:
                self._coming.clear()
            return
        if len(piece.rows) != units:  # somebody else's order
            self._coming.clear()
            return
        if self._clock == (0.0, 0.0):
            self._warm += 1
            if piece.rows in self._ends:
                self._clock = now  # these warmed up
            return
        self._seen.append(piece)
        operations = sum(plan.shape.collection(*each.shape, plan.labels) for each in self._seen)
        whole = sum(plan.shape.collection(*each.shape, plan.labels) for each in plan.left.pieces)
        if len(self._seen) < BATCHES or operations < SHARE * whole or piece.rows not in self._ends:
            return
        self._coming.clear()
        padded, tokens = sum(each.padded for each in self._seen), sum(each.tokens for each in self._seen)
        timing = Timing(operations, padded, tokens, now[0] - self._clock[0], now[1] - self._clock[1])
        plan = replace(plan, measured=extrapolate(plan, [timing], self.folder, None))
        assert plan.measured is not None
        self._said = plan.measured.seconds
        self._say(f"{words.time(plan)}, from its own first {len(self._seen) + self._warm} batches")
