"""Intervals over queries and seeds: every resample that there is, written out by loops, and the cases without any."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from scipy.stats import norm
from scipy.stats import t as student

from finetrace.errors import FinetraceError
from finetrace.evaluation.intervals import bootstrap_mean, paired_difference
from finetrace.evaluation.seeds import bootstrap_crossed, over_seeds, paired_crossed

MANY = 40_000


def every_resample(values: np.ndarray) -> list[float]:
    """The mean of every equally likely draw of seeds x draw of queries, cells without a value left out."""
    seeds, queries = values.shape
    means = []
    for drawn_seeds in product(range(seeds), repeat=seeds):
        for drawn_queries in product(range(queries), repeat=queries):
            total, count = 0.0, 0
            for s in drawn_seeds:
                for q in drawn_queries:
                    if not np.isnan(values[s, q]):
                        total += values[s, q]
                        count += 1
            if count:
                means.append(total / count)
    return means


def ends(queries: int, level: float = 0.95) -> list[float]:
    """Which quantiles of the resamples the ends of an interval are."""
    out = (queries / (queries - 1)) ** 0.5 * student.ppf((1 + level) / 2, queries - 1)
    return [norm.cdf(-out), norm.cdf(out)]


@pytest.fixture
def values() -> np.ndarray:
    """3 seeds x 4 queries that differ along both."""
    rng = np.random.default_rng(3)
    return np.clip(0.5 + 0.2 * rng.standard_normal((3, 1)) + 0.15 * rng.standard_normal((3, 4)), 0, 1)


@pytest.mark.parametrize("level", [0.5, 0.7, 0.8])  # beyond, the ends of so few queries are among the last resamples
@pytest.mark.parametrize("holes", [(), ((0, 1),), ((0, 1), (2, 1), (1, 3), (1, 0))])
def test_the_interval_is_that_of_every_resample(values, level, holes):
    for hole in holes:
        values[hole] = np.nan
    low, high = np.quantile(every_resample(values), ends(4, level))
    found = bootstrap_crossed(values, level=level, resamples=MANY)
    assert found.value == pytest.approx(np.nanmean(values))
    assert found.low == pytest.approx(low, abs=0.006)
    assert found.high == pytest.approx(high, abs=0.006)
    assert found.n == 4


def test_a_paired_difference_is_that_of_every_resample(values):
    other = values[::-1, ::-1] * 0.7
    other[1, 2] = np.nan
    low, high = np.quantile(every_resample(values - other), ends(4, 0.8))
    found = paired_crossed(values, other, level=0.8, resamples=MANY)
    assert found.value == pytest.approx(np.nanmean(values - other))
    assert (found.low, found.high) == (pytest.approx(low, abs=0.006), pytest.approx(high, abs=0.006))


def test_draws_and_seeds_are_drawn_apart():
    rng = np.random.default_rng(4)
    values = np.clip(
        0.5 + 0.2 * rng.standard_normal((2, 1, 1)) + 0.1 * rng.standard_normal((1, 3, 1)), 0, 1
    ) + 0.05 * rng.random((2, 3, 2))
    values[1, 2, 0] = np.nan
    means = []
    for draws in product(range(2), repeat=2):
        for seeds in product(range(3), repeat=3):
            for queries in product(range(2), repeat=2):
                cells = [values[d, s, q] for d in draws for s in seeds for q in queries]
                if not np.isnan(cells).all():
                    means.append(np.nanmean(cells))
    found = bootstrap_crossed(values, resamples=MANY)
    low, high = np.quantile(means, ends(2))
    assert found.value == pytest.approx(np.nanmean(values))
    assert (found.low, found.high) == (pytest.approx(low, abs=0.006), pytest.approx(high, abs=0.006))
    assert found.n == 2


def test_as_many_draws_of_one_seed_are_no_seeds(values):
    def width(of):
        found = bootstrap_crossed(of, level=0.8, resamples=MANY)
        return found.high - found.low

    again = np.stack([values] * 4)  # four draws that make no difference
    assert width(again) == pytest.approx(width(values), rel=0.02)
    assert width(again) > 1.5 * width(again.reshape(12, 4))  # twelve seeds, as if each were another accident
    assert bootstrap_crossed(values[:1, None]) == bootstrap_mean(values[0])
    assert bootstrap_crossed(values[None]).value == bootstrap_crossed(values).value


@pytest.mark.parametrize("queries", [5, 10, 30])
def test_equal_seeds_say_no_more_than_one(queries):
    line = np.random.default_rng(5).normal(0.5, 0.1, queries)
    one, three = bootstrap_mean(line, resamples=MANY), np.tile(line, (3, 1))
    same = bootstrap_crossed(three, resamples=MANY)
    assert (same.value, same.low, same.high, same.n) == pytest.approx((one.value, one.low, one.high, queries))
    same, gap = paired_crossed(three, three * 0.9), paired_difference(line, line * 0.9)
    assert (same.value, same.low, same.high) == pytest.approx((gap.value, gap.low, gap.high))
    three[1:, 0] = np.nan  # a query that one seed has counts once
    assert bootstrap_crossed(three).value == pytest.approx(np.nanmean(three))
    three[1:, 0] = line[0]
    nearly = bootstrap_crossed(three + 1e-6 * np.arange(3)[:, None], resamples=MANY)
    # the percentiles alone are 0.7 to 0.95 as far apart
    assert nearly.high - nearly.low == pytest.approx(one.high - one.low, rel=0.025)


def test_both_a_lucky_seed_and_a_lucky_query_widen_the_interval():
    rng = np.random.default_rng(0)
    by_query = np.tile(rng.random(30), (5, 1))
    by_seed = np.tile(np.linspace(0.2, 0.8, 5)[:, None], (1, 30))
    both = (by_query + by_seed) / 2
    width = {name: (e := bootstrap_crossed(x)).high - e.low for name, x in [("q", by_query), ("s", by_seed)]}
    found = bootstrap_crossed(both)
    assert width["q"] > 0.1 and width["s"] > 0.1
    # halves of independent parts: variances add
    assert found.high - found.low == pytest.approx(np.hypot(width["q"], width["s"]) / 2, rel=0.1)


def test_what_methods_share_cancels(values):
    apart = bootstrap_crossed(values)
    found = paired_crossed(values * 0.5 + 0.01 * np.eye(3, 4) + 0.2, values * 0.5, level=0.8, resamples=MANY)
    assert apart.high - apart.low > 0.1
    assert 0.2 < found.low < found.high < 0.21


def test_a_query_that_no_seed_has_is_left_out(values):
    wider = np.insert(values, 2, np.nan, axis=1)
    assert bootstrap_crossed(wider) == bootstrap_crossed(values)
    assert paired_crossed(wider, wider**2) == paired_crossed(values, values**2)


def test_one_seed_is_an_interval_over_queries(values):
    line, other = values[:1], values[1:2]
    assert bootstrap_crossed(line) == bootstrap_mean(line[0])
    assert paired_crossed(line, other) == paired_difference(line[0], other[0])
    gap = np.insert(line, 1, np.nan, axis=1)
    assert bootstrap_crossed(gap) == bootstrap_mean(line[0])
    assert paired_crossed(gap, np.insert(other, 1, 0.5, axis=1)) == paired_difference(line[0], other[0])


@pytest.mark.parametrize("value", [0.0, 0.4, 1.0])
def test_all_equal_is_the_interval_over_queries(value):
    flat = np.full((3, 20), value)
    found, over_queries = bootstrap_crossed(flat), bootstrap_mean(flat[0])
    assert (found.value, found.low, found.high) == pytest.approx((value, over_queries.low, over_queries.high))
    assert found.n == 20 and found.low < found.high
    same = paired_crossed(flat, flat)
    assert (same.value, same.low < 0 < same.high) == (0, True)


def test_paired_differences_of_draws_count_queries_not_seeds(values):
    draws = np.stack([values, values[::-1]])  # (2, 3, 4)
    one_draw = paired_crossed(draws[:1], draws[:1] ** 2)
    assert one_draw.n == 4
    assert one_draw.value == pytest.approx(np.mean(values - values**2))
    flat = np.ones((2, 3, 20))
    assert paired_crossed(flat, flat) == paired_difference(flat[0, 0], flat[0, 0])


def test_equal_differences_come_from_the_cells_that_both_have():
    first = np.array([[0.5, 0.9, 0.3], [0.7, np.nan, 0.4]])
    second = first - 0.25
    second[0, 2] = np.nan  # of this query, the second seed alone has both
    found = paired_crossed(first, second)
    assert found.value == pytest.approx(0.25)
    assert found.n == 3


def test_the_order_of_seeds_and_queries_says_nothing(values):
    before = bootstrap_crossed(values, level=0.7, resamples=MANY)
    after = bootstrap_crossed(values[[2, 0, 1]][:, [3, 1, 0, 2]], level=0.7, resamples=MANY)
    assert after.value == pytest.approx(before.value, abs=1e-12)
    assert (after.low, after.high) == (pytest.approx(before.low, abs=0.006), pytest.approx(before.high, abs=0.006))
    assert bootstrap_crossed(values) == bootstrap_crossed(values)
    assert bootstrap_crossed(values, level=0.7, seed=1) != bootstrap_crossed(values, level=0.7, seed=2)


def test_what_cannot_be_averaged_is_said(values):
    with pytest.raises(FinetraceError, match=r"\(4,\) are not \(seeds, queries\)"):
        bootstrap_crossed(values[0])
    with pytest.raises(FinetraceError, match="no query is left"):
        bootstrap_crossed(np.full((2, 3), np.nan))
    with pytest.raises(FinetraceError, match="the same seeds and queries"):
        paired_crossed(values, values[:, :2])
    with pytest.raises(FinetraceError, match="no query is left"):
        paired_crossed(values, np.full_like(values, np.nan))


def test_one_value_a_seed_has_students_interval():
    found = over_seeds([1.0, 2.0, 3.0])
    reach = 4.302652729911275 / 3**0.5  # t of 2 degrees of freedom at 97.5%, and a standard deviation of 1
    assert (found.value, found.low, found.high, found.n) == pytest.approx((2.0, 2 - reach, 2 + reach, 3))
    cut = over_seeds([1.0, 2.0, np.nan, 3.0], bounds=(0, 4))
    assert (cut.low, cut.high, cut.n) == (0, 4, 3)
    for values in ([0.5], [0.5, 0.5, 0.5], [0.0, np.nan, 0.0]):  # of which none says how far seeds differ
        alone = over_seeds(values, bounds=(0, 1))
        assert (alone.value, alone.n) == (values[0], np.isfinite(values).sum())
        assert np.isnan([alone.low, alone.high]).all()
    with pytest.raises(FinetraceError, match="no seed"):
        over_seeds([np.nan])
