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
    """The first ceil(size x count) rows of each label, in the order they stood."""
    totals = Counter(row.label for row in rows)
    seen: Counter[str | None] = Counter()
    kept = []
    for row in rows:
        seen[row.label] += 1
        if seen[row.label] <= math.ceil(size * totals[row.label] - 1e-9):
            kept.append(row)
    return tuple(kept)


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
