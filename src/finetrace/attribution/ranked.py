"""The strongest rows of each query, kept while scores come block by block: the (m, n) matrix is never held."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from finetrace.attribution.method import Method
from finetrace.attribution.problem import Problem
from finetrace.attribution.scores import Top, about, at_least_one
from finetrace.attribution.streamed_gradient import StreamedMethod
from finetrace.attribution.streaming import all_blocks
from finetrace.errors import FinetraceError
from finetrace.examples import Example

CELL = 40  # bytes that a score takes in memory, with what is held on the way


class Sink(Protocol):
    """Takes scores as they come."""

    def take(self, queries: slice, rows: slice, values: NDArray[np.float64]) -> None:
        """(m, r) scores of some queries and rows."""
        ...


class Strongest:
    """A running list of the k highest values of each query; ties in row order, as a stable sort has them."""

    def __init__(self, m: int, k: int, sign: int = 1) -> None:
        """`sign` -1 keeps the lowest.

        Raises:
            FinetraceError: k is less than 1.
        """
        if k < 1:
            raise FinetraceError(f"the {k} strongest rows cannot be kept; ask for 1 or more.")
        self.k = k
        self.sign = sign
        self._kept: list[tuple[NDArray[np.int64], NDArray[np.float64]]] = [
            (np.zeros(0, np.int64), np.zeros(0)) for _ in range(m)
        ]

    def take(self, queries: slice, rows: slice, values: NDArray[np.float64]) -> None:
        """Rows come in order for every query."""
        for query, given in zip(range(queries.start, queries.stop), values, strict=True):
            row = self.sign * given
            order, kept = self._kept[query]
            fresh = np.flatnonzero(row > kept[-1]) if len(kept) == self.k else np.arange(len(row))
            if not len(fresh):
                continue
            if len(fresh) > 4 * self.k:  # all that reach the k-th of them, ties included
                least = np.partition(row[fresh], len(fresh) - self.k)[len(fresh) - self.k]
                fresh = fresh[row[fresh] >= least]
            order = np.concatenate([order, rows.start + fresh])
            kept = np.concatenate([kept, row[fresh]])
            best = np.argsort(-kept, kind="stable")[: self.k]
            self._kept[query] = order[best], kept[best]

    @property
    def order(self) -> NDArray[np.int64]:
        """(m, k) rows, strongest first."""
        return np.stack([order for order, _ in self._kept])

    @property
    def values(self) -> NDArray[np.float64]:
        """(m, k) their scores."""
        return self.sign * np.stack([kept for _, kept in self._kept])


@dataclass(frozen=True, eq=False)
class Ranked:
    """The outcome of one method whose whole matrix was never held: as `Scores`, but the strongest rows alone.

    Attributes:
        proponents: The highest of each query.
        opponents: The lowest, where they were asked for.
        queries: The m queries.
        train: The n training examples, in the index's row order.
        method: Name and parameters that differ from the defaults.
        unit: What a score of 1 means.
        parameters: Every parameter of the method.
        seconds: Wall-clock time of scoring; collecting the queries' features is not in it.
        computed: How.
    """

    proponents: Strongest
    opponents: Strongest | None
    queries: tuple[Example, ...]
    train: Sequence[Example]
    method: str
    unit: str
    parameters: Mapping[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    computed: Mapping[str, Any] = field(default_factory=dict)

    def top(self, k: int) -> Top:
        """The k strongest proponents of each query, best first; ties in row order."""
        return self._top(self.proponents, k, "proponent")

    def bottom(self, k: int) -> Top:
        """The k strongest opponents of each query, most negative first."""
        if self.opponents is None:
            raise FinetraceError(f"{self.method}: opponents were not kept; ask for them before scoring.")
        return self._top(self.opponents, k, "opponent")

    def describe(self) -> dict[str, Any]:
        """Method, unit, sign and parameters, as they belong beside any table."""
        return about(self)

    def _top(self, kept: Strongest, k: int, kind: Any) -> Top:
        if k > kept.k and kept.k < len(self.train):
            raise FinetraceError(f"{self.method}: the {kept.k} strongest rows were kept, not {k}.")
        return Top(self, kept.order[:, : at_least_one(k)], kept.values[:, :k], kind)


def fits(problem: Problem, methods: int = 1) -> bool:
    """Whether the (m, n) matrices of several methods may be held: in half of the problem's memory."""
    return problem.m * problem.n * (8 * methods + CELL - 8) <= problem.memory // 2


def beside(problem: Problem, methods: int) -> Problem:
    """The problem with the memory that the matrices of several methods leave to each; its own one a method counts itself."""
    return problem.beside(8 * problem.m * problem.n * (methods - 1)) if methods > 1 else problem


def rank(method: Method, problem: Problem, k: int, *, opponents: bool = False, sinks: Sequence[Sink] = ()) -> Ranked:
    """Score every row and keep the k strongest of each query.

    Args:
        method: Any method. One that streams is merged block by block; of another, as many queries at once as fit.
        problem: The queries against the index.
        k: Rows kept a query; fewer where the index has fewer.
        opponents: Keep the k lowest too.
        sinks: Take all scores as they come, for instance into a file.
    """
    problem = method.prepared(problem)
    method.warm(problem)
    k = min(k, problem.n)
    best = Strongest(problem.m, k)
    worst = Strongest(problem.m, k, -1) if opponents else None
    taking: list[Sink] = [best, *([worst] if worst is not None else []), *sinks]
    started = time.perf_counter()
    for queries, rows, values in _pieces(method, problem):
        finite = np.isfinite(values).all(1)
        if not finite.all():
            name = problem.queries[queries.start + int(np.argmin(finite))].id
            raise FinetraceError(f"{method.label}: the scores of query {name} are not finite; use more damping.")
        for each in taking:
            each.take(queries, rows, values)
    seconds = time.perf_counter() - started
    unit, used, computed = method.about(problem)
    train = problem.rows.examples
    return Ranked(best, worst, problem.queries, train, method.label, unit, used, seconds, computed)


def _pieces(method: Method, problem: Problem) -> Iterator[tuple[slice, slice, NDArray[np.float64]]]:
    """(queries, rows, scores) of all queries, rows in order for each."""
    run = method.run(problem) if isinstance(method, StreamedMethod) else None
    if run is not None:
        with method.factoring():
            for queries, where, scores in all_blocks(run, problem.m):
                yield queries, where, scores.numpy()
        problem.computed[method.computed_as] = run.describe()
        return
    several = max(1, problem.memory // 2 // (CELL * problem.n))
    for first in range(0, problem.m, several):
        chosen = slice(first, min(first + several, problem.m))
        part = method.prepared(problem if several >= problem.m else problem.some(chosen))
        yield chosen, slice(0, problem.n), method.checked_matrix(part)
        if part is not problem:
            for name, how in part.computed.items():
                problem.computed[name] = _worst(problem.computed.get(name, {}), how)


def _worst(known: Mapping[str, Any], found: Mapping[str, Any]) -> dict[str, Any]:
    """How all queries were computed, from how those before and those now were."""
    most = {name: max(known[name], found[name]) for name in ("residual", "rounding") if name in known and name in found}
    return {**known, **found, **most}
