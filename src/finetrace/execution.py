"""Independent pieces of work, one after another in this process or side by side in several."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.context import BaseContext
from typing import TypeVar

from finetrace.errors import FinetraceError

Item = TypeVar("Item")
Result = TypeVar("Result")


def run_each(work: Callable[[Item], Result], items: Sequence[Item], workers: int = 1) -> Iterator[tuple[int, Result]]:
    """(position, result) of every item, in the order in which they are done.

    Args:
        work: What is done with one item, a function that can be pickled where there are several workers.
        items: The items.
        workers: Processes; each gets its share of the cores. One, or a single item: this process.

    Raises:
        FinetraceError: `workers` is not positive, or a worker died. What `work` raises comes through; those that are under
            way are then waited for, and no other is begun.
    """
    if workers < 1:
        raise FinetraceError(f"--workers {workers}: give at least 1.")
    if workers == 1 or len(items) <= 1:
        for place, item in enumerate(items):
            yield place, work(item)
        return
    threads = max(1, (os.cpu_count() or 1) // workers)
    with ProcessPoolExecutor(workers, initializer=_few_threads, initargs=(threads,), mp_context=_spawn()) as pool:
        waiting = iter(enumerate(items))
        running: dict[Future[Result], int] = {}
        try:
            while True:
                while len(running) < workers and (following := next(waiting, None)) is not None:
                    running[pool.submit(work, following[1])] = following[
                        0
                    ]  # no more than can run: a failure begins none
                if not running:
                    return
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    yield running.pop(future), future.result()
        except BrokenProcessPool as error:
            raise FinetraceError(
                f"a worker process died, most likely for want of memory; try again with fewer --workers than {workers}. What "
                "is finished is kept."
            ) from error


def _few_threads(count: int) -> None:
    import torch

    torch.set_num_threads(count)


def _spawn() -> BaseContext:
    import multiprocessing

    return multiprocessing.get_context("spawn")
