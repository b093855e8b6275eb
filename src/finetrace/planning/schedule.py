"""How long several workers take: whole shards are handed out one after another to whoever is free."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Schedule:
    """Workers side by side.

    Attributes:
        workers: How many.
        seconds: From the start to the end of the last one, start-up and what comes before and after included.
        busy: Share of the workers' time that goes into shards.
    """

    workers: int
    seconds: float
    busy: float


def schedule(
    shards: Sequence[float], workers: int, startup: float, before: float = 0.0, after: float = 0.0
) -> Schedule:
    """Time of `shards` (seconds each) with `workers` machines like this one.

    Args:
        shards: Seconds of each shard.
        workers: Machines; each takes `startup` seconds once. More than there are shards stand idle.
        startup: Loading the program and the model.
        before: Seconds before the shards that are not shared, reading and encoding the data.
        after: Seconds after them, Kronecker factors.
    """
    free = [startup] * min(workers, max(1, len(shards)))
    for each in shards:
        heapq.heapreplace(free, free[0] + each)
    end = max(free)
    total = before + end + after
    return Schedule(workers, total, sum(shards) / (workers * total) if total > 0 else 0.0)
