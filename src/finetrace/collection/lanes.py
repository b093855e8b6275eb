"""Batches side by side, each with threads of its own: threads that share every product wait for one another at its end."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from queue import SimpleQueue
from types import TracebackType
from typing import Generic, TypeVar

import torch

from finetrace.execution import cores
from finetrace.host_memory import total_memory

MOST = 8  # lanes: Python itself runs one of them at a time
SHARE = 4  # lanes may take one in so many bytes of the memory

Result = TypeVar("Result")


@dataclass(frozen=True)
class Lanes:
    """How batches are shared out.

    Attributes:
        count: Batches side by side.
        threads: Of each.
    """

    count: int = 1
    threads: int = 1

    @classmethod
    def of(cls, batch_bytes: int) -> Lanes:
        """As many as torch has threads here, and as fit in their share of the memory with `batch_bytes` each.

        It hangs on nothing that changes from run to run on one machine, since how many threads a batch has may decide how its
        products are rounded. A process that has some of the machine's cores reckons with as much of its memory.
        """
        threads, memory = torch.get_num_threads(), total_memory()
        room = threads
        if memory is not None:
            room = int(memory / SHARE * min(1.0, threads / cores()) / max(1, batch_bytes))
        count = max(1, min(threads, MOST, room))
        return cls(count, max(1, threads // count))

    def rounds(self, batches: int) -> int:
        """How many of so many batches go side by side: a last round that is at most half full is left to all threads."""
        last = batches % self.count
        return batches if 2 * last > self.count else batches - last


class Ahead(Generic[Result]):
    """While open, measures batches ahead of their turn, as many at a time as there are lanes.

    Results do not hang on which batch ends first. Torch has its threads again when the last batch was taken.
    """

    def __init__(
        self, measure: Callable[[int, list[int]], Result | None], batches: Sequence[list[int]], lanes: Lanes
    ) -> None:
        """`measure` gets a lane and a batch, and returns `None` where it does not fit in memory beside the others."""
        self._measure = measure
        self._lanes = lanes
        together = lanes.rounds(len(batches)) if lanes.count > 1 else 0
        self._waiting = deque(batches[:together])
        self._taken: deque[tuple[list[int], Future[Result | None]]] = deque()
        self._free: SimpleQueue[int] = SimpleQueue()
        for lane in range(lanes.count):
            self._free.put(lane)
        self._pool: ThreadPoolExecutor | None = None
        self._threads = torch.get_num_threads()

    def __enter__(self) -> Ahead[Result]:
        if self._waiting:
            self._pool = ThreadPoolExecutor(self._lanes.count, "collecting")
            try:
                self._fill()
            except BaseException:
                self._close()
                raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def take(self, batch: list[int]) -> Result | None:
        """The result of a batch, in the order given; `None` leaves it to the caller, with all threads, no other under way."""
        mine = bool(self._taken) and self._taken[0][0] is batch
        found = self._taken.popleft()[1].result() if mine else None
        if mine and found is None:
            self._waiting.clear()  # one after another from here on
        if found is None:
            wait([future for _, future in self._taken])
            torch.set_num_threads(self._threads)
        else:
            self._fill()
        return found

    def _fill(self) -> None:
        while self._pool is not None and self._waiting and len(self._taken) <= self._lanes.count:  # one of them is next
            torch.set_num_threads(self._lanes.threads)
            batch = self._waiting.popleft()
            self._taken.append((batch, self._pool.submit(self._run, batch)))
        if not self._taken:
            self._close()

    def _run(self, batch: list[int]) -> Result | None:
        lane = self._free.get()
        torch.set_num_threads(self._lanes.threads)  # each thread of a program is told for itself
        try:
            return self._measure(lane, batch)
        finally:
            self._free.put(lane)

    def _close(self) -> None:
        if self._pool is not None:
            try:
                self._pool.shutdown(cancel_futures=True)
            finally:
                self._pool = None
                torch.set_num_threads(self._threads)
