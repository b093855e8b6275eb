"""A mean over queries with its bootstrap interval, and the paired difference of two such means."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr, ndtri
from scipy.stats import t as student

from finetrace.errors import FinetraceError

__all__ = ["UNBOUNDED", "Estimate", "bootstrap_mean", "paired_difference", "reach"]

Bounds = tuple[float, float]
SHARE: Bounds = (0.0, 1.0)  # of one value of a metric
UNBOUNDED: Bounds = (float("nan"), float("nan"))  # of one value of a loss

_BLOCK = 4_000_000  # values drawn at a time: bounds the memory of a bootstrap over many queries
_ROUNDING = 1e-12  # differences below this share of the values' size are the arithmetic's, not the data's


@dataclass(frozen=True)
class Estimate:
    """A mean over queries and its confidence interval.

    Attributes:
        value: The mean over the queries used.
        low: Lower end of the interval; NaN where none can be given.
        high: Upper end; NaN where none can be given.
        n: Number of queries used, those that were excluded (NaN) left out.
    """

    value: float
    low: float
    high: float
    n: int


def bootstrap_mean(
    per_query: NDArray[Any], *, bounds: Bounds = SHARE, level: float = 0.95, resamples: int = 2000, seed: int = 0
) -> Estimate:
    """Mean of per-query values (m,) with a BCa bootstrap interval over queries; NaN marks an excluded query.

    BCa is the bias-corrected and accelerated bootstrap (Efron, 1987, "Better Bootstrap Confidence Intervals"), which
    follows the skewness of metrics that crowd at 1, widened for few queries (Hesterberg, 2015, "What Teachers Should
    Know About the Bootstrap"), whose resamples vary less than the queries do. Two cases where resampling has nothing to
    say:

    - One query: low and high are NaN, since one value has no spread.
    - All n values equal c (20 queries of 20 right): every resample has the same mean, and [c, c] would claim a
      certainty that 20 queries do not give. The Wilson interval for n successes of n says that a share
      w = z^2 / (n + z^2) of unseen queries may still differ, and they may lie anywhere in [0, 1], the bounds of a
      metric: the interval is [c - w c, c + w (1 - c)]. For c = 1 and c = 0 this is the Wilson interval itself (20 of
      20: [0.839, 1]); in between it is conservative. Of values without bounds, and outside them, low and high are NaN.

    The interval answers for other queries drawn like these, independently of each other. It does not cover another
    training run, another training set or queries that repeat one another.

    Args:
        per_query: (m,), one value a query.
        bounds: The least and the largest that one value can be, those of a metric if not given; `UNBOUNDED` for losses.
        level: Confidence, between 0 and 1.
        resamples: Number of bootstrap resamples.
        seed: Seed of the resampling; equal seeds and equal n draw the same queries.

    Raises:
        FinetraceError: If no query is left, or a value is infinite.
    """
    values = _used(per_query)
    return _estimate(values, bounds, level, resamples, seed)


def paired_difference(
    a: NDArray[Any],
    b: NDArray[Any],
    *,
    bounds: Bounds = SHARE,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Estimate:
    """Mean of a - b over the queries that both have, with a BCa bootstrap interval of the paired difference.

    Each resample draws the same queries for both, so what makes a query easy for both methods cancels. A query that is
    NaN in either is left out; a difference of rounding is none. One query, or differences that are all equal: as in
    `bootstrap_mean`, with a - b of two metrics bounded by -1 and 1 (two methods that are both right on 20 of 20 differ
    by 0 [-0.161, 0.161]), and NaN where values have no bounds or lie outside. A comparison such as `low > 0` is False
    for NaN.

    Args:
        a: (m,), per-query values of one method.
        b: (m,), those of the other, same queries in the same order.
        bounds: Of one value of either, not of their difference.
        level: Confidence, between 0 and 1.
        resamples: Number of bootstrap resamples.
        seed: Seed of the resampling.

    Raises:
        FinetraceError: If the shapes differ, no query is left, or a value is infinite.
    """
    first, second = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if first.shape != second.shape:
        raise FinetraceError(
            f"A paired difference needs the same queries in both arrays, but their shapes are {first.shape} and "
            f"{second.shape}; pass one value a query for each method."
        )
    both = np.concatenate([first[~np.isnan(first)], second[~np.isnan(second)]])
    lowest, highest = bounds
    within = bool(np.all((both >= lowest) & (both <= highest)))  # never where the bounds are NaN
    apart = highest - lowest if within else float("nan")
    gap, size = first - second, np.maximum(np.abs(first), np.abs(second))
    rounding = np.isfinite(size) & (np.abs(gap) <= _ROUNDING * size)  # of two sums of the same, in another order
    return _estimate(_used(np.where(rounding, 0.0, gap)), (-apart, apart), level, resamples, seed)


def reach(n: int, level: float) -> float:
    """How many standard deviations out the ends of a bootstrap interval over n >= 2 queries are taken.

    sqrt(n / (n - 1)) t with t Student's quantile of (1 + level) / 2 and n - 1 degrees of freedom: resamples spread by
    sqrt((n - 1) / n) too little, and by an estimate (Hesterberg, 2015).
    """
    return float(np.sqrt(n / (n - 1)) * student.ppf(0.5 + level / 2, n - 1))


def _used(per_query: NDArray[Any]) -> NDArray[np.float64]:
    """The values that are not NaN, (n,) float64, checked to be some and finite."""
    values = np.asarray(per_query, dtype=np.float64)
    if values.ndim != 1:
        raise FinetraceError(
            f"An interval over queries needs one value a query, but the array has shape {values.shape}."
        )
    used: NDArray[np.float64] = values[~np.isnan(values)]
    if not used.size:
        raise FinetraceError(
            f"No query is left to average: all {values.size} are excluded (NaN); a query counts if some but not all "
            "training examples are relevant to it."
        )
    if np.isinf(used).any():
        row = int(np.flatnonzero(np.isinf(values))[0])
        raise FinetraceError(f"The value of query row {row} is infinite; an average needs finite values.")
    return used


def _estimate(values: NDArray[np.float64], bounds: Bounds, level: float, resamples: int, seed: int) -> Estimate:
    """Mean and interval of values (n,); `bounds` are those of one value, NaN if unknown."""
    if not 0 < level < 1:
        raise FinetraceError(f"The confidence level is {level}; give a number between 0 and 1, such as 0.95.")
    if resamples < 1:
        raise FinetraceError(f"The number of bootstrap resamples is {resamples}; give at least 1, such as 2000.")
    n = values.size
    if n == 1:
        return Estimate(float(values[0]), np.nan, np.nan, 1)
    if np.ptp(values) <= _ROUNDING * np.abs(values).max():
        low, high = _unanimous(float(values[0]), n, bounds, level)
        return Estimate(float(values[0]), low, high, n)
    low, high = _bca(values, _resampled_means(values, resamples, seed), level)
    return Estimate(float(values.mean()), low, high, n)


def _unanimous(value: float, n: int, bounds: Bounds, level: float) -> tuple[float, float]:
    """Interval of a mean when all n observations equal `value`: Wilson's for n of n, times the room in `bounds`."""
    lowest, highest = bounds
    if not lowest <= value <= highest:  # also where the bounds are NaN
        return np.nan, np.nan
    z_squared = float(ndtri(0.5 + level / 2)) ** 2
    unseen = z_squared / (n + z_squared)
    return value - unseen * (value - lowest), value + unseen * (highest - value)


def _resampled_means(values: NDArray[np.float64], resamples: int, seed: int) -> NDArray[np.float64]:
    """Means of `resamples` draws of n values with replacement, (resamples,)."""
    rng = np.random.default_rng(seed)
    n = values.size
    means = np.empty(resamples)
    rows = max(1, _BLOCK // n)
    for start in range(0, resamples, rows):
        block = means[start : start + rows]
        block[:] = values[rng.integers(0, n, size=(block.size, n))].mean(axis=1)
    return means


def _bca(values: NDArray[np.float64], means: NDArray[np.float64], level: float) -> tuple[float, float]:
    """BCa interval of the mean of `values` (n,), not all equal, from its resampled `means` (resamples,).

    With z0 = Phi^-1(share of resampled means below the mean, ties counted half) and a = sum d^3 / (6 (sum d^2)^(3/2)),
    d the deviations from the mean (the jackknife's acceleration, in closed form for a mean), the ends are the quantiles
    Phi(z0 + (z0 + z) / (1 - a (z0 + z))) of the resampled means for z = -+ `reach`.
    """
    mean, out = values.mean(), reach(values.size, level)
    deviations = (values - mean) / np.ptp(values)
    acceleration = np.sum(deviations**3) / (6 * np.sum(deviations**2) ** 1.5)
    margin = _ROUNDING * np.abs(values).max()  # a resample of the same mean, summed in another order, is a tie
    share = np.mean(means < mean - margin) + np.mean(np.abs(means - mean) <= margin) / 2
    half = 0.5 / means.size
    bias = ndtri(np.clip(share, half, 1 - half))
    shifted = bias + np.array([-out, out])
    shares = ndtr(bias + shifted / np.maximum(1 - acceleration * shifted, 1e-9))
    low, high = np.quantile(means, shares)
    return float(low), float(high)
