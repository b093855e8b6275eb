"""Intervals over queries and seeds together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr
from scipy.stats import t as student

from finetrace.errors import FinetraceError
from finetrace.evaluation.intervals import SHARE, Bounds, Estimate, bootstrap_mean, paired_difference, reach


def bootstrap_crossed(
    values: NDArray[Any], *, bounds: Bounds = SHARE, level: float = 0.95, resamples: int = 2000, seed: int = 0
) -> Estimate:
    """Mean of (seeds, queries) values with a percentile bootstrap interval over both.

    Each resample draws seeds and queries with replacement, independently, and takes the mean of the crossed cells, so
    both a lucky fine-tuning and a lucky choice of queries widen the interval. Its ends are taken as far out as those of
    `bootstrap_mean` over as many queries. NaN marks a query that a seed does not have; a cell drawn that is NaN is left
    out. With one seed, seeds that all have the queries and say the same of each, or values that are all equal, the interval
    is `bootstrap_mean`'s over queries. With few seeds it is rough: three seeds have ten different resamples.
    Values of (draws, seeds, queries) are drawn along all three: what fine-tunings of one seed have in common is no accident
    of a draw, and does not count as often as there are draws.

    Raises:
        FinetraceError: There is no value.
    """
    values = _cells(values)
    if _alike(values):
        each = np.nanmean(values, axis=_others(values))
        return bootstrap_mean(each, bounds=bounds, level=level, resamples=resamples, seed=seed)
    means = _resampled(values, resamples, seed)
    queries = values.shape[-1]
    share = ndtr(reach(queries, level)) if queries > 1 else 0.5 + level / 2
    low, high = np.nanquantile(means, [1 - share, share])
    return Estimate(float(np.nanmean(values)), float(low), float(high), queries)


def paired_crossed(
    a: NDArray[Any],
    b: NDArray[Any],
    *,
    bounds: Bounds = SHARE,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Estimate:
    """Mean of a - b, both (seeds, queries) or (draws, seeds, queries), as `bootstrap_crossed`; what both share cancels."""
    first, second = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if first.shape != second.shape:
        raise FinetraceError(
            f"a paired difference needs the same seeds and queries, not {first.shape} and {second.shape}."
        )
    difference = _cells(first - second)
    if _alike(difference):
        there, others = np.isfinite(first - second), _others(difference)
        both = [np.where(there, each, np.nan)[..., there.any(others)] for each in (first, second)]
        means = [np.nanmean(each, axis=others) for each in both]
        return paired_difference(means[0], means[1], bounds=bounds, level=level, resamples=resamples, seed=seed)
    return bootstrap_crossed(difference, bounds=bounds, level=level, resamples=resamples, seed=seed)


def over_seeds(
    values: Sequence[float], *, bounds: tuple[float, float] = (-np.inf, np.inf), level: float = 0.95
) -> Estimate:
    """Mean of one value a seed with Student's t interval, S - 1 degrees of freedom, cut at the bounds of one value.

    NaN marks a seed without a value. One seed has no interval, nor have seeds that all have the same value, whose spread
    of 0 is no estimate of that of others: low and high are NaN. With three seeds the interval is 2.5 standard deviations
    to each side; that is what three values say.

    Raises:
        FinetraceError: There is no value.
    """
    known = np.asarray(values, dtype=np.float64)
    known = known[~np.isnan(known)]
    if not known.size:
        raise FinetraceError("no seed has a value to average.")
    mean, n = float(known.mean()), int(known.size)
    if np.ptp(known) <= 1e-12 * np.abs(known).max():
        return Estimate(mean, np.nan, np.nan, n)
    out = float(student.ppf(0.5 + level / 2, n - 1) * known.std(ddof=1) / np.sqrt(n))
    return Estimate(mean, max(bounds[0], mean - out), min(bounds[1], mean + out), n)


def _cells(values: NDArray[Any]) -> NDArray[np.float64]:
    """(S, Q) or (D, S, Q) float64 without the queries that no seed has."""
    values = np.asarray(values, dtype=np.float64)
    if values.ndim not in (2, 3):
        raise FinetraceError(f"values of shape {values.shape} are not (seeds, queries) or (draws, seeds, queries).")
    values = values[..., np.isfinite(values).any(axis=_others(values))]
    if not values.size:
        raise FinetraceError("no query is left to average: all are excluded (NaN).")
    return np.asarray(values)


def _alike(values: NDArray[np.float64]) -> bool:
    """Whether all values are equal, or every seed has every query and says the same of it."""
    if np.nanmax(values) - np.nanmin(values) <= 1e-12:
        return True
    # not where one is missing: the mean is over cells, of which a query that every seed has gives more
    return bool((np.ptp(values, axis=_others(values)) <= 1e-12).all())


def _others(values: NDArray[np.float64]) -> tuple[int, ...]:
    """The axes besides that of the queries."""
    return tuple(range(values.ndim - 1))


def _resampled(values: NDArray[np.float64], resamples: int, seed: int) -> NDArray[np.float64]:
    """(resamples,) means over what is drawn along every axis, missing cells left out.

    Drawing with replacement is weighting by counts, so a resample is s^T X q / s^T M q with M the cells that exist.
    """
    rng = np.random.default_rng(seed)
    drawn = [rng.multinomial(k, np.full(k, 1 / k), size=resamples).astype(np.float64) for k in values.shape]
    axes = "dsq"[-values.ndim :]
    form = ",".join((axes, *(f"r{axis}" for axis in axes))) + "->r"
    there = np.isfinite(values).astype(np.float64)
    total = np.einsum(form, np.nan_to_num(values), *drawn, optimize=True)
    count = np.einsum(form, there, *drawn, optimize=True)
    return np.asarray(np.where(count > 0, total / np.maximum(count, 1e-300), np.nan))
