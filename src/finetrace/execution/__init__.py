"""Independent pieces of work: one after another in this process, side by side in several, or on a Ray cluster.

A piece is done whole or not at all, and its result does not depend on where it is done, so that every engine gives the same.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar, get_args

from finetrace.errors import FinetraceError
from finetrace.execution.dispatch import Pool, dispatch

Item = TypeVar("Item")
Result = TypeVar("Result")

EngineName = Literal["local", "processes", "ray"]


def cores() -> int:
    """That this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True)
class Engine:
    """Where pieces of work are done.

    Attributes:
        name: `local` (this process, one piece after another), `processes` (this machine) or `ray` (a Ray cluster).
        workers: Workers side by side.
        address: Of a running Ray cluster, `auto` or ray://HOST:PORT; without one a cluster is started on this machine.
        gpus_per_task: GPUs that each Ray worker reserves; `None` is one where the cluster has any.
        threads: Threads of each worker; `None` is `OMP_NUM_THREADS` if that is set, else an equal share of the cores that this
            process has (on a running Ray cluster, one).

    Raises:
        FinetraceError: The engine is not known, or does not take what it was given.
    """

    name: EngineName = "local"
    workers: int = 1
    address: str | None = None
    gpus_per_task: float | None = None
    threads: int | None = None

    def __post_init__(self) -> None:
        if self.name not in get_args(EngineName):
            raise FinetraceError(f"--engine {self.name}: not known; use {', '.join(get_args(EngineName))}.")
        if self.workers < 1:
            raise FinetraceError(f"--workers {self.workers}: give at least 1.")
        if self.name == "local" and self.workers > 1:
            raise FinetraceError("--engine local is this process alone; for --workers use --engine processes or ray.")
        if self.name != "ray" and (self.address is not None or self.gpus_per_task is not None):
            raise FinetraceError("--address and --gpus-per-task go with --engine ray.")
        if self.gpus_per_task is not None and self.gpus_per_task < 0:
            raise FinetraceError(f"--gpus-per-task {self.gpus_per_task}: give 0 or more.")

    @staticmethod
    def of(workers: int | Engine) -> Engine:
        """An engine as it is; so many workers as processes, or this process for one."""
        if isinstance(workers, Engine):
            return workers
        return Engine("local" if workers == 1 else "processes", workers)

    @property
    def in_process(self) -> bool:
        """Whether this process does the work."""
        return self.name == "local"

    def run_each(
        self,
        work: Callable[[Item], Result],
        items: Sequence[Item],
        *,
        name: Callable[[Item], str] | None = None,
        shared: Path | None = None,
    ) -> Generator[tuple[int, Result], None, None]:
        """(position, result) of every item, in the order in which they are done.

        Args:
            work: What is done with one item. Outside this process it is pickled, once a worker, and so are items and results.
            items: The items.
            name: What an item is called in a message; its number if not given.
            shared: A folder that workers read or write; on a Ray cluster it is made sure that they see it.

        Raises:
            FinetraceError: A worker died over the same item more than a few times, or could not be started. What `work`
                raises comes through. Items that are under way are then finished first, and no other is begun.
        """
        if self.in_process:
            for place, item in enumerate(items):
                yield place, work(item)
            return
        if not items:
            return
        workers = min(self.workers, len(items))
        with self._pool(work, workers, shared) as pool:
            yield from dispatch(pool, items, workers, name)

    def _pool(self, work: Callable[[Item], Result], workers: int, shared: Path | None) -> Pool:
        if self.name == "ray":
            from finetrace.execution.cluster import RayPool

            return RayPool(work, workers, self.address, self.gpus_per_task, self._threads(workers), shared)
        from finetrace.execution.processes import ProcessPool

        return ProcessPool(work, self._threads(workers))

    def cores_each(self, workers: int) -> float:
        """Cores that each of so many workers has to itself: as many as it has threads, or its share of this machine's."""
        threads = self._threads(workers)
        return threads if self.address is not None else min(threads, cores() / workers)

    def _threads(self, workers: int) -> int:
        if self.threads is not None:
            return max(1, self.threads)
        told = os.environ.get("OMP_NUM_THREADS", "")
        if told.isdigit() and int(told) > 0:
            return int(told)
        return 1 if self.address is not None else max(1, cores() // workers)


def run_each(
    work: Callable[[Item], Result], items: Sequence[Item], workers: int | Engine = 1
) -> Iterator[tuple[int, Result]]:
    """`Engine.run_each`, with a number of processes in place of an engine; one, or a single item: this process."""
    engine = Engine.of(workers)
    if len(items) <= 1 and not isinstance(workers, Engine):
        engine = Engine()
    return engine.run_each(work, items)
