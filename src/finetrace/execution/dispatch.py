"""Handing items to workers that may fail or die: who gets what, what is tried again, and when it is enough."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter, deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal, TypeVar

from finetrace.errors import FinetraceError

Item = TypeVar("Item")

TRIES = 3  # times that an item is begun before its workers' deaths are taken for its own fault


@dataclass(frozen=True)
class Event:
    """What a pool has to say of one of its workers.

    Attributes:
        worker: Which.
        kind: It is `ready` for its first item, has `done` one, `failed` at one (and is ready for another), or `died`.
        value: The result, or the error.
    """

    worker: Hashable
    kind: Literal["ready", "done", "failed", "died"]
    value: Any = None


class Pool(ABC):
    """Workers of one kind; a context manager that leaves none behind."""

    @abstractmethod
    def start(self) -> None:
        """Start one more worker; it will say that it is ready."""

    @abstractmethod
    def give(self, worker: Hashable, item: Any) -> None:
        """Let a worker that is ready do an item; one that has died meanwhile is said to have."""

    @abstractmethod
    def wait(self) -> list[Event]:
        """Wait for something to happen."""

    @abstractmethod
    def close(self) -> None:
        """End all workers, whatever they are at."""

    def __enter__(self) -> Pool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def dispatch(
    pool: Pool, items: Sequence[Item], workers: int, name: Callable[[Item], str] | None = None
) -> Iterator[tuple[int, Any]]:
    """(position, result) of every item, in the order in which they are done.

    A worker that dies is replaced, and its item is tried again. After a failure nothing more is begun; what is under way is
    finished and its results come before the error.

    Raises:
        FinetraceError: An item has been begun `TRIES` times and its worker died each time, or so many workers that had none
            died while no item was done.
    """
    waiting = deque(range(len(items)))
    given: dict[Hashable, int] = {}
    idle: set[Hashable] = set()
    deaths: Counter[int] = Counter()
    unborn = 0
    failure: BaseException | None = None
    for _ in range(workers):
        pool.start()
    while given or (waiting and failure is None):
        for event in pool.wait():
            place = given.pop(event.worker, None)
            idle.discard(event.worker)
            if event.kind != "died":
                idle.add(event.worker)
            if event.kind == "done" and place is not None:
                unborn = 0  # work goes on, so that machines which come and go over a long run do not end it
                yield place, event.value
            elif event.kind == "failed":
                failure = failure or event.value
            elif event.kind == "died":
                if place is None:
                    unborn += 1
                else:
                    deaths[place] += 1
                    waiting.appendleft(place)
                failure = failure or _hopeless(event.value, items, place, deaths, unborn, name)
                if failure is None and waiting:
                    pool.start()
        while failure is None and waiting and idle:
            worker, place = idle.pop(), waiting.popleft()
            given[worker] = place
            pool.give(worker, items[place])
    if failure is not None:
        raise failure


def _hopeless(
    how: object,
    items: Sequence[Item],
    place: int | None,
    deaths: Counter[int],
    unborn: int,
    name: Callable[[Item], str] | None,
) -> FinetraceError | None:
    """The error where a death was one too many."""
    kept = "What is finished is kept."
    if place is not None and deaths[place] >= TRIES:
        what = name(items[place]) if name is not None else f"piece {place + 1} of {len(items)}"
        return FinetraceError(
            f"{what}: a worker process died over it {TRIES} times ({how}), most likely for want of memory; try "
            f"again with fewer --workers. {kept}"
        )
    if unborn >= TRIES:
        return FinetraceError(
            f"a worker process died {TRIES} times while it had nothing to do and nothing was done meanwhile ({how}); try again "
            f"with fewer --workers. {kept}"
        )
    return None
