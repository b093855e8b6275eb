"""What a benchmark task is: training rows with a planted truth, and queries that should lead back to it."""

from __future__ import annotations

import math
import random
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

from finetrace.errors import FinetraceError
from finetrace.examples import Example


@dataclass(frozen=True)
class Task:
    """A training set whose labels say what is right, and queries with the same labels.

    Attributes:
        name: As results name it.
        train: Rows with a response and a label.
        queries: Held-out rows with a label; with a response, or without one where the model is to give it.
        target: The planted label, where queries ask for one class alone; `None` where every class is asked for.
    """

    name: str
    train: tuple[Example, ...]
    queries: tuple[Example, ...]
    target: str | None = None

    def without_target(self) -> tuple[Example, ...]:
        """The training rows that do not carry the planted label."""
        return tuple(example for example in self.train if example.label != self.target)

    @property
    def answered(self) -> bool:
        """Whether every query has its response; otherwise the fine-tuned model answers them."""
        return all(query.has_response for query in self.queries)

    @property
    def classes(self) -> dict[str, int]:
        """Training rows of each label, in order of first appearance."""
        return dict(Counter(str(example.label) for example in self.train))

    def shrunk(self, size: float) -> Task:
        """The first `size` of every class, training rows and queries alike, rounded up, so the balance stays.

        Raises:
            FinetraceError: `size` is not above 0 and at most 1.
        """
        check_size(size)
        if size == 1:
            return self
        return replace(self, train=_first(self.train, size), queries=_first(self.queries, size))


def check_size(size: float) -> None:
    """`FinetraceError` where `size` is no share that a task can be shrunk to."""
    if not 0 < size <= 1:
        raise FinetraceError(f"--size {size:g}: give a share above 0 and at most 1.")


def _first(rows: Sequence[Example], size: float) -> tuple[Example, ...]:
    """The first ceil(size x count) rows of each label, in the order they stood.

    Where a label says no more than whether a row's own was flipped, they are dealt out to the classes that rows are of.
    """
    totals: dict[str | None, Counter[str | None]] = defaultdict(Counter)
    for row in rows:
        totals[row.label][_class(row)] += 1
    room: dict[str | None, Counter[str | None]] = {}
    for label, classes in totals.items():
        count = math.ceil(size * classes.total() - 1e-9)
        room[label] = Counter(dict(zip(classes, quotas(list(classes.values()), count), strict=True)))
    kept = []
    for row in rows:
        if room[row.label][_class(row)] > 0:
            room[row.label][_class(row)] -= 1
            kept.append(row)
    return tuple(kept)


def _class(row: Example) -> str | None:
    """What a flipped or checked row was labelled first; nothing of other rows."""
    return row.metadata.get("original_label") if "given_label" in row.metadata else None


def quotas(sizes: list[int], count: int) -> list[int]:
    """`count` dealt out in proportion to the sizes; what rounding leaves goes to the largest remainders."""
    total = sum(sizes)
    quotas = [count * size // total for size in sizes]
    by_remainder = sorted(range(len(sizes)), key=lambda index: -(count * sizes[index] % total))
    for index in by_remainder[: count - sum(quotas)]:
        quotas[index] += 1
    return quotas


def split(rows: Sequence[Example], train_per_class: int, seed: int) -> tuple[tuple[Example, ...], tuple[Example, ...]]:
    """Each class shuffled and cut: its first `train_per_class` rows train, the rest are queries.

    Training rows come out shuffled over classes, as a training set is met; queries class by class.
    """
    chance = random.Random(seed)
    classes: dict[str | None, list[Example]] = defaultdict(list)
    for row in rows:
        classes[row.label].append(row)
    train: list[Example] = []
    queries: list[Example] = []
    for members in classes.values():
        chance.shuffle(members)
        train += members[:train_per_class]
        queries += members[train_per_class:]
    chance.shuffle(train)
    return tuple(train), tuple(queries)
