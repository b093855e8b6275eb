"""Scores in robust standard deviations, and how far up them chance goes for as many answers that are as alike."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finetrace.attribution import Method, Problem
from finetrace.errors import FinetraceError
from finetrace.index.store import Index
from finetrace.tracing import prepare

GROUPS = 200  # of training rows, drawn to see what values chance gives
MOST = 3000  # rows, each of which is a query of its own when a threshold is calibrated
MAD = 1.4826  # makes the median absolute deviation of a normal distribution its standard deviation
MEAN_AD = 1.2533  # and this its mean absolute deviation
ROUNDING = 4 * float(np.finfo(np.float32).eps)  # scores no further apart than this share of their size are equal

Values = NDArray[np.float64]


def spread(values: Values) -> tuple[Values, Values]:
    """Median and robust standard deviation over the last axis, kept as an axis of one.

    The deviation is 1.4826 MAD. Where more than half of the values are equal, up to the rounding of float32, MAD says nothing
    and 1.2533 times the mean absolute deviation takes its place. It is infinite where all are equal: nothing is learnt of them.
    """
    middle, deviation = _median_deviation(values)
    mostly_equal = deviation <= _rounding(values)
    if mostly_equal.any():
        deviation = np.where(mostly_equal, _mean_deviation(values)[1], deviation)
    return middle, np.where(deviation > _rounding(values), deviation, np.inf)


def _rounding(values: Values) -> Values:
    return np.asarray(ROUNDING * np.abs(values).max(axis=-1, keepdims=True))


def _median_deviation(values: Values) -> tuple[Values, Values]:
    middle = np.median(values, axis=-1, keepdims=True)
    return middle, np.asarray(MAD * np.median(np.abs(values - middle), axis=-1, keepdims=True))


def _mean_deviation(values: Values) -> tuple[Values, Values]:
    middle = np.median(values, axis=-1, keepdims=True)
    return middle, np.asarray(MEAN_AD * np.abs(values - middle).mean(axis=-1, keepdims=True))


def standard(problem: Problem, methods: Sequence[Method]) -> Values:
    """(m, n) mean over methods of the scores in robust standard deviations of each query's."""
    prepare(problem, methods)
    total = np.zeros((problem.m, problem.n))
    for method in methods:
        total += standardised(np.asarray(method.score(problem).values, dtype=np.float64))
    return total / len(methods)


def threshold(index: Index, methods: Sequence[Method], scores: NDArray[Any], expected: float, seed: int) -> float:
    """The value that `expected` of the rows would pass if none had to do with the answers.

    A row's value is its mean over m answers. Answers that have nothing to do with the rows give values that spread by
    sqrt((1 + (m - 1) r) / m) times as much as those of one answer where their scores correlate by r: by chance the more, the
    more alike the answers are. So values are read in their own robust deviation, and compared with those of groups of training
    rows, in theirs. A group has 1 / (that ratio)^2 rows, a quarter of all at most: the answers are worth as many unlike ones.
    They are drawn from the half of the rows with the lowest values, so that bad rows do not pass for chance. A row's value for
    a group that it is in is left out.

    Rows that have much in common make the threshold too high rather than too low, and two halves that differ too low.

    Args:
        index: Of the training set.
        methods: That gave the scores.
        scores: (m, n), as `standard` has them.
        expected: Rows, above 0.
        seed: Of the groups.

    Raises:
        FinetraceError: The set is too large.
    """
    refuse_many(len(index))
    own = standard(Problem(index, index.rows.examples, kept_queries=index), methods)  # (n, n)
    return calibrated(own, scores, expected, seed)


def refuse_many(n: int) -> None:
    """Stop where a threshold of n rows would be calibrated on too many pairs.

    Raises:
        FinetraceError: The set is too large.
    """
    if n > MOST:
        raise FinetraceError(
            f"a threshold is calibrated on all pairs of rows, and {n} rows are many; give --top or --share."
        )


def calibrated(own: Values, scores: Values, expected: float, seed: int) -> float:
    """`threshold` of (n, n) standardised scores of the rows for each other and (m, n) of the answers."""
    n, values = len(own), scores.mean(axis=0)
    sparse = np.median(_median_deviation(own)[1] <= _rounding(own)) == 1
    # means of scores that are mostly equal spread, but not by their median
    measure = _mean_deviation if sparse else spread
    middle, deviation = (float(each.item()) for each in measure(values))
    each_answer = measure(scores)[1]
    alone = float(np.median(each_answer[np.isfinite(each_answer) & (each_answer > 0)]))
    size = min(max(1, round((alone / deviation) ** 2)), len(scores), max(1, n // 4))
    others = np.argsort(values, kind="stable")[: (n + 1) // 2]
    rng = np.random.default_rng([seed, n, len(scores)])
    drawn = []
    for _ in range(GROUPS):
        group = rng.choice(others, size, replace=False)
        outside = np.ones(n, dtype=bool)
        outside[group] = False
        drawn.append(standardised(own[group][:, outside].mean(axis=0), measure))
    return middle + deviation * float(np.quantile(np.concatenate(drawn), max(0.0, 1 - expected / n)))


def standardised(values: Values, measure: Callable[[Values], tuple[Values, Values]] = spread) -> Values:
    """In robust standard deviations from the median over the last axis; 0 where all are equal."""
    middle, deviation = measure(values)
    return np.asarray((values - middle) / np.where(deviation > 0, deviation, np.inf))
