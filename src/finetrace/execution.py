"""Independent pieces of work, one after another in this process or side by side in several."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing.context import BaseContext
from typing import TypeVar

from finetrace.errors import FinetraceError

Item = TypeVar("Item")
Result = TypeVar("Result")


def each(work: Callable[[Item], Result], items: Sequence[Item], workers: int = 1) -> Iterator[tuple[int, Result]]:
    """(position, result) of every item, in the order in which they are done.

    Args:
        work: What is done with one item, a function that can be pickled where there are several workers.
        items: The items.
        workers: Processes; each gets its share of the cores. One, or a single item: this process.

    Raises:
        FinetraceError: `workers` is not positive. What `work` raises comes through, and no further item is begun.
    """
    if workers < 1:
        raise FinetraceError(f"--workers {workers}: give at least 1.")
    if workers == 1 or len(items) <= 1:
        for place, item in enumerate(items):
            yield place, work(item)
        return
    threads = max(1, (os.cpu_count() or 1) // workers)
    with ProcessPoolExecutor(workers, initializer=_few_threads, initargs=(threads,), mp_context=_spawn()) as pool:
        places = {pool.submit(work, item): place for place, item in enumerate(items)}
        try:
            for future in as_completed(places):
                yield places[future], future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _few_threads(count: int) -> None:
    import torch

    torch.set_num_threads(count)


def _spawn() -> BaseContext:
    import multiprocessing

    return multiprocessing.get_context("spawn")
