"""Metrics against hand-worked cases and against every order of tied examples; intervals against known distributions."""

from __future__ import annotations

import itertools
import subprocess
import sys
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.stats import beta, binomtest, bootstrap, norm
from scipy.stats import t as student

from finetrace.errors import FinetraceError
from finetrace.evaluation.intervals import Estimate, bootstrap_mean, paired_difference
from finetrace.evaluation.metrics import (
    METRICS,
    MORE_METRICS,
    Metric,
    accuracy,
    auprc,
    auroc,
    coverage,
    evaluate,
    mrr,
    recall_at,
    relevance,
)

ALL = {**METRICS, **MORE_METRICS, "recall@2": recall_at(2)}
# 1st relevant, 2nd not, 3rd relevant, 4th not; a tie of three below one irrelevant; a constant score
SCORES = np.array([[4.0, 3.0, 2.0, 1.0], [5.0, 1.0, 1.0, 1.0], [7.0, 7.0, 7.0, 7.0]])
RELEVANT = np.array([[1, 0, 1, 0], [0, 1, 1, 0], [0, 0, 0, 1]], dtype=bool)


@st.composite
def tied_rows(draw: st.DrawFn) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """One query with few distinct scores and both relevant and irrelevant examples: (1, n) each, n <= 5."""
    n = draw(st.integers(2, 5))
    scores = draw(st.lists(st.sampled_from([-np.inf, -1.0, 0.0, 2.0]), min_size=n, max_size=n))
    relevant = draw(st.lists(st.booleans(), min_size=n, max_size=n).filter(lambda row: 0 < sum(row) < n))
    return np.array([scores]), np.array([relevant])


def in_expectation(
    scores: NDArray[np.float64], relevant: NDArray[np.bool_], k: int
) -> tuple[float, float, float, float, float]:
    """Accuracy, coverage, AUROC, recall at k and reciprocal rank, averaged over all orders of the columns."""
    rows = []
    for order in itertools.permutations(range(scores.size)):
        ranked = sorted(order, key=lambda column: -scores[column])  # stable: the order decides among ties
        hits = relevant[ranked]
        c = int(hits.sum())
        pairs = [bool(first) for first, second in itertools.combinations(hits, 2) if first != second]
        rows.append((hits[0], hits[:c].mean(), np.mean(pairs), hits[:k].sum() / c, 1 / (1 + np.flatnonzero(hits)[0])))
    means = np.mean(np.array(rows, dtype=np.float64), axis=0)
    return tuple(means)


def test_relevance_is_equality_of_labels_and_none_matches_nothing() -> None:
    expected = [[True, False, True, False], [False, False, False, False], [False, False, False, False]]
    result = relevance(["a", "b", "a", None], ["a", None, "c"])
    assert result.dtype == np.bool_
    assert result.tolist() == expected
    assert relevance([], ["a"]).shape == (1, 0)
    assert relevance(["a"], []).shape == (0, 1)


@pytest.mark.parametrize(
    ("metric", "expected"),
    [
        (accuracy, [1, 0, 1 / 4]),
        (coverage, [1 / 2, (0 + 2 / 3) / 2, 1 / 4]),
        (auroc, [3 / 4, (0 + 0 + 1 / 2 + 1 / 2) / 4, 1 / 2]),
        (auprc, [(1 + 2 / 3) / 2, 1 / 2, 1 / 4]),
        (recall_at(1), [1 / 2, 0, 1 / 4]),
        (recall_at(3), [1, (4 / 3) / 2, 3 / 4]),
        (recall_at(9), [1, 1, 1]),
        (mrr, [1, 2 / 3 * 1 / 2 + 1 / 3 * 1 / 3, (1 + 1 / 2 + 1 / 3 + 1 / 4) / 4]),
    ],
)
def test_hand_worked(metric: Metric, expected: list[float]) -> None:
    np.testing.assert_allclose(metric(SCORES, RELEVANT), expected, rtol=1e-12)


@given(tied_rows(), st.integers(1, 6))
@settings(max_examples=80, deadline=None)
def test_ties_count_as_the_average_over_all_their_orders(
    case: tuple[NDArray[np.float64], NDArray[np.bool_]], k: int
) -> None:
    scores, relevant = case
    closed = [float(metric(scores, relevant)[0]) for metric in (accuracy, coverage, auroc, recall_at(k), mrr)]
    np.testing.assert_allclose(closed, in_expectation(scores[0], relevant[0], k), atol=1e-12)


@given(tied_rows())
@settings(max_examples=60, deadline=None)
def test_auprc_takes_a_tied_group_as_one_threshold(case: tuple[NDArray[np.float64], NDArray[np.bool_]]) -> None:
    scores, relevant = case[0][0], case[1][0]
    expected, recall = 0.0, 0.0
    for threshold in sorted(set(scores), reverse=True):
        found = relevant[scores >= threshold]
        expected += (found.sum() / relevant.sum() - recall) * found.mean()
        recall = found.sum() / relevant.sum()
    assert auprc(*case)[0] == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("name", ALL)
@given(case=tied_rows(), data=st.data())
@settings(max_examples=25, deadline=None)
def test_only_the_order_of_scores_counts(
    name: str, case: tuple[NDArray[np.float64], NDArray[np.bool_]], data: st.DataObject
) -> None:
    scores, relevant = case
    expected = ALL[name](scores, relevant)
    columns = data.draw(st.permutations(range(scores.shape[1])))
    np.testing.assert_allclose(ALL[name](scores[:, columns], relevant[:, columns]), expected, rtol=1e-12)
    for transformed in (np.exp(scores), 1e-30 * np.arctan(scores), scores.astype(np.float16)):
        np.testing.assert_array_equal(ALL[name](transformed, relevant), expected)


@pytest.mark.parametrize("relevant_rows", [[0, 1, 2, 3], [9, 8, 7, 6]])
def test_a_constant_score_gets_the_share_of_the_class_wherever_the_class_stands(relevant_rows: list[int]) -> None:
    relevant = np.zeros((1, 10), dtype=bool)
    relevant[0, relevant_rows] = True
    values = {name: float(metric(np.ones((1, 10)), relevant)[0]) for name, metric in METRICS.items()}
    assert values == pytest.approx({"accuracy": 0.4, "coverage": 0.4, "auroc": 0.5, "auprc": 0.4})


@pytest.mark.parametrize("name", ALL)
def test_queries_without_a_choice_are_excluded(name: str) -> None:
    relevant = np.array([[1, 0, 1], [0, 0, 0], [1, 1, 1]], dtype=bool)
    values = ALL[name](np.arange(9.0).reshape(3, 3), relevant)
    assert np.isnan(values).tolist() == [False, True, True]


@pytest.mark.parametrize("name", ALL)
def test_nan_names_the_query_row(name: str) -> None:
    scores = SCORES.copy()
    scores[1, 2] = np.nan
    with pytest.raises(FinetraceError, match=r"query row 1 .*column 2"):
        ALL[name](scores, RELEVANT)


def test_arrays_that_do_not_belong_together() -> None:
    with pytest.raises(FinetraceError, match=r"\(3, 4\).*\(4, 3\)"):
        accuracy(SCORES, RELEVANT.T)
    with pytest.raises(FinetraceError, match="at least one training example"):
        evaluate(np.empty((2, 0)), np.empty((2, 0), dtype=bool))
    with pytest.raises(FinetraceError, match="k of at least 1"):
        recall_at(0)


def test_evaluate_reports_the_table_in_order_and_counts_the_queries_used() -> None:
    rng = np.random.default_rng(3)
    relevant = relevance(["a"] * 20 + ["b"] * 20, ["a", "b"] * 20 + [None, "c"])
    scores = rng.normal(size=relevant.shape) + relevant
    result = evaluate(scores, relevant)
    assert list(result) == ["accuracy", "coverage", "auroc", "auprc"]
    for name, estimate in result.items():
        assert estimate.n == 40
        assert estimate.value == pytest.approx(np.nanmean(METRICS[name](scores, relevant)))
        assert 0 <= estimate.low < estimate.value < estimate.high <= 1
    assert evaluate(scores, relevant) == result
    assert evaluate(scores, relevant, seed=1) != result
    assert list(evaluate(scores, relevant, metrics=MORE_METRICS)) == ["recall@10", "mrr"]


def test_evaluate_says_so_when_there_is_nothing_to_measure() -> None:
    with pytest.raises(FinetraceError, match="None of the 2 queries has both relevant and irrelevant") as caught:
        evaluate(np.zeros((2, 3)), relevance(["a", "b", None], ["c", None]))
    assert "\n" not in str(caught.value)
    with pytest.raises(FinetraceError, match="query row 0"):
        evaluate(np.full((1, 3), np.nan), np.ones((1, 3), dtype=bool))


def test_twenty_of_twenty_is_wilson_not_certainty() -> None:
    relevant = np.tile([True, False, False], (20, 1))
    result = evaluate(np.tile([3.0, 1.0, 2.0], (20, 1)), relevant)
    wilson = binomtest(20, 20).proportion_ci(0.95, method="wilson")
    for estimate in result.values():
        assert estimate.value == 1
        assert (estimate.low, estimate.high) == pytest.approx((wilson.low, wilson.high))
    none = binomtest(0, 7).proportion_ci(0.9, method="wilson")
    estimate = bootstrap_mean(np.zeros(7, dtype=bool), level=0.9)
    assert (estimate.value, estimate.low, estimate.high) == pytest.approx((0, none.low, none.high))


def test_equal_values_between_the_bounds_take_the_room_that_is_left() -> None:
    w = 1 - binomtest(12, 12).proportion_ci(0.95, method="wilson").low
    estimate = bootstrap_mean(np.full(12, 0.3))
    assert (estimate.low, estimate.high) == pytest.approx((0.3 - 0.3 * w, 0.3 + 0.7 * w))
    unbounded = bootstrap_mean(np.full(12, 3.0))
    assert (unbounded.value, unbounded.n) == (3, 12)
    assert np.isnan([unbounded.low, unbounded.high]).all()


def test_one_query_has_no_interval_and_none_is_an_error() -> None:
    single = bootstrap_mean(np.array([np.nan, 1.0, np.nan]))
    assert (single.value, single.n) == (1, 1)
    assert np.isnan([single.low, single.high]).all()
    with pytest.raises(FinetraceError, match="all 2 are excluded"):
        bootstrap_mean(np.array([np.nan, np.nan]))
    with pytest.raises(FinetraceError, match="query row 1 is infinite"):
        bootstrap_mean(np.array([np.nan, np.inf, 1.0]))


@pytest.mark.parametrize("settings_", [{"level": 1.0}, {"level": 95}, {"resamples": 0}])
def test_settings_out_of_range(settings_: dict[str, float]) -> None:
    with pytest.raises(FinetraceError, match="give"):
        bootstrap_mean(np.array([0.0, 1.0]), **settings_)  # type: ignore[arg-type]


def test_the_interval_of_two_queries_spans_their_values() -> None:
    found = bootstrap_mean(np.array([0.2, 0.7]))
    assert (found.low, found.high) == (0.2, 0.7)


@pytest.mark.parametrize("n", [3, 12, 60])
def test_interval_is_scipys_bca_at_the_level_that_few_values_need(n: int) -> None:
    wider = 2 * norm.cdf((n / (n - 1)) ** 0.5 * student.ppf(0.975, n - 1)) - 1
    values = np.random.default_rng(n).beta(6, 1, size=n)
    ours = bootstrap_mean(np.append(values, np.nan), resamples=40_000)
    with np.errstate(all="ignore"):
        theirs = bootstrap(
            (values,), np.mean, n_resamples=40_000, confidence_level=wider, method="BCa"
        )  # unseeded: the keyword varies
    low, high = theirs.confidence_interval
    assert ours.n == n
    assert (ours.low, ours.high) == pytest.approx((low, high), abs=0.03 * (high - low))


def test_intervals_hold_the_true_mean_as_often_as_they_say() -> None:
    rng = np.random.default_rng(0)
    for level in (0.8, 0.95):
        estimates = [bootstrap_mean(rng.beta(8, 2, 40), level=level, resamples=800, seed=i) for i in range(600)]
        hits = sum(estimate.low <= beta(8, 2).mean() <= estimate.high for estimate in estimates)
        assert abs(hits / 600 - level) < 0.04


def test_of_six_queries_neither_of_two_like_methods_is_often_called_better() -> None:
    rng = np.random.default_rng(0)
    found = [paired_difference(*rng.beta(3, 0.5, (2, 6)), resamples=400, seed=i) for i in range(1000)]
    assert sum(each.low > 0 for each in found) / 1000 < 0.055  # 0.1 if resamples are taken as they come
    assert sum(each.high < 0 for each in found) / 1000 < 0.055


def test_many_queries_are_resampled_in_bounded_memory() -> None:
    values = np.random.default_rng(0).random(300_000)
    estimate = bootstrap_mean(values, resamples=30)
    assert estimate.low < estimate.value < estimate.high
    assert estimate.high - estimate.low < 0.01


def test_pairing_removes_what_the_queries_share() -> None:
    rng = np.random.default_rng(5)
    easy = rng.uniform(0.1, 0.8, size=50)
    a, b = easy + rng.uniform(0.05, 0.15, size=50), easy.copy()
    difference = paired_difference(a, b)
    alone = bootstrap_mean(a)
    assert 0.05 < difference.low < difference.value < difference.high < 0.15
    assert difference.high - difference.low < 0.2 * (alone.high - alone.low)
    swapped = paired_difference(b, a)
    assert swapped.value == pytest.approx(-difference.value)
    assert (swapped.low, swapped.high) == pytest.approx((-difference.high, -difference.low), abs=1e-3)
    assert difference == bootstrap_mean(a - b)


def test_paired_difference_leaves_out_queries_missing_in_either() -> None:
    a, b = np.array([1.0, np.nan, 0.5, 0.75]), np.array([0.0, 0.0, np.nan, 0.5])
    assert paired_difference(a, b).n == 2
    assert paired_difference(a, b).value == pytest.approx(0.625)
    with pytest.raises(FinetraceError, match="same queries"):
        paired_difference(a, b[:3])
    with pytest.raises(FinetraceError, match="No query is left"):
        paired_difference(a, np.full(4, np.nan))


def test_a_difference_of_rounding_is_none() -> None:
    """Both find all of a class first; the precisions of one, added row by row, come to less than 1 for some class sizes."""
    relevant = np.array([np.arange(60) < size for size in (24, 28, 10, 30)] * 5)
    in_one, row_by_row = relevant.astype(float), np.where(relevant, 100.0, 0) - np.arange(60)
    a, b = auprc(in_one, relevant), auprc(row_by_row, relevant)
    assert len(set(b)) > 1
    assert paired_difference(a, b) == paired_difference(a, a)
    assert paired_difference(a, b).low < 0


def test_equal_differences_are_not_certain() -> None:
    ones, zeros = np.ones(20), np.zeros(20)
    w = 1 - binomtest(20, 20).proportion_ci(0.95, method="wilson").low
    same, apart = paired_difference(ones, ones), paired_difference(ones, zeros)
    assert (same.value, same.low, same.high) == pytest.approx((0, -w, w))
    assert (apart.value, apart.low, apart.high) == pytest.approx((1, 1 - 2 * w, 1))
    unbounded = paired_difference(np.arange(5.0) + 0.1, np.arange(5.0))
    assert unbounded.value == pytest.approx(0.1)
    assert np.isnan([unbounded.low, unbounded.high]).all()


def test_a_hundred_queries_by_five_thousand_examples_take_under_a_second() -> None:
    rng = np.random.default_rng(0)
    relevant = rng.integers(0, 10, (100, 1)) == rng.integers(0, 10, (1, 5000))
    scores = rng.integers(0, 300, (100, 5000)).astype(np.float32)
    start = time.process_time()
    result = evaluate(scores, relevant, metrics={**METRICS, **MORE_METRICS})
    assert time.process_time() - start < 1.5  # 0.2 s where this was written
    assert all(isinstance(estimate, Estimate) for estimate in result.values())


def test_needs_no_torch() -> None:
    code = "import sys, finetrace.evaluation.metrics; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
