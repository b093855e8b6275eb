"""Does an attribution find the training examples of the query's class? One number a query, then mean and interval.

The metrics are those of arXiv 2409.19998, section 3 (accuracy, coverage), and the usual ones of ranking beside them.

Shapes and conventions, the same in every function:

- `scores` (m, n): one row a query, one column a training example; higher = proponent. Only the order within a row
  counts. Infinities are ordered like other numbers; NaN is an error that names the query row.
- `relevant` (m, n) bool: whether the training example is of the query's class, see `relevance`.
- The result is (m,) float64 in [0, 1]. NaN marks a query to which no training example is relevant, or every one: no
  ranking of these can be right or wrong, and averages leave them out.
- Ties never depend on the order of the columns. Accuracy, coverage, recall and MRR are the expectation over all orders
  of the tied examples, in closed form; AUROC counts a tied pair half, which is the same expectation; AUPRC treats a
  tied group as one step, see `auprc`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata
from sklearn.metrics import average_precision_score, roc_auc_score

from finetrace.errors import FinetraceError
from finetrace.evaluation.intervals import Estimate, bootstrap_mean

__all__ = [
    "METRICS",
    "MORE_METRICS",
    "Metric",
    "accuracy",
    "auprc",
    "auroc",
    "coverage",
    "evaluate",
    "mrr",
    "precision_at",
    "recall_at",
    "relevance",
]

Metric = Callable[[NDArray[Any], NDArray[np.bool_]], NDArray[np.float64]]
"""Scores (m, n) and relevance (m, n) to one value a query, (m,)."""


def relevance(train_labels: Sequence[str | None], query_labels: Sequence[str | None]) -> NDArray[np.bool_]:
    """(m, n) bool: whether query and training example have the same label; None matches nothing, not even None."""
    codes = {label: code for code, label in enumerate(dict.fromkeys([*train_labels, *query_labels]))}
    train = np.array([-1 if label is None else codes[label] for label in train_labels], dtype=np.int64)
    query = np.array([-2 if label is None else codes[label] for label in query_labels], dtype=np.int64)
    return np.asarray(query[:, None] == train[None, :])


def accuracy(scores: NDArray[Any], relevant: NDArray[np.bool_]) -> NDArray[np.float64]:
    """(m,): is the top-scored training example relevant? The paper's Accuracy is the mean over queries.

    Ties at the top: the share of the tied examples that are relevant, so a constant score gets the class's share.
    """
    scores, relevant = _checked(scores, relevant)
    return _masked(_found(scores, relevant, np.ones(len(scores), dtype=np.int64)), relevant)


def coverage(scores: NDArray[Any], relevant: NDArray[np.bool_]) -> NDArray[np.float64]:
    """(m,): share of the top c training examples that are relevant, c = number of relevant ones (the paper's Coverage).

    Equal to recall at c and to R-precision. Ties at the cut-off: full credit above it, and from the tied group the
    places left times its share of relevant examples, so a constant score gets the class's share.
    """
    scores, relevant = _checked(scores, relevant)
    counts = relevant.sum(axis=1)
    return _masked(_found(scores, relevant, counts) / np.maximum(counts, 1), relevant)


def auroc(scores: NDArray[Any], relevant: NDArray[np.bool_]) -> NDArray[np.float64]:
    """(m,): probability that a relevant example outscores an irrelevant one, a tie counting half; constant: 0.5."""
    return _by_sklearn(roc_auc_score, scores, relevant)


def auprc(scores: NDArray[Any], relevant: NDArray[np.bool_]) -> NDArray[np.float64]:
    """(m,): average precision, the sum over score thresholds of (gain in recall) x precision, without interpolation.

    A tied group is one threshold: its relevant examples all count with the precision at the group's end. That does not
    depend on the order of columns and gives a constant score the class's share, but it is not the expectation over
    orders of the tied examples, and may lie on either side of it.
    """
    return _by_sklearn(average_precision_score, scores, relevant)


def recall_at(k: int) -> Metric:
    """The metric (m,): share of a query's relevant examples among its k top-scored, in expectation over ties.

    At most k / c where c > k examples are relevant.

    Raises:
        FinetraceError: If k is below 1.
    """
    if k < 1:
        raise FinetraceError(f"recall at {k} is not defined; give a k of at least 1.")

    def recall(scores: NDArray[Any], relevant: NDArray[np.bool_]) -> NDArray[np.float64]:
        scores, relevant = _checked(scores, relevant)
        top = np.full(len(scores), min(k, scores.shape[1]), dtype=np.int64)
        return _masked(_found(scores, relevant, top) / np.maximum(relevant.sum(axis=1), 1), relevant)

    return recall


def precision_at(k: int) -> Metric:
    """The metric (m,): share of a query's k top-scored examples that are relevant, in expectation over ties.

    With k = training examples / classes this is the coverage of the study's released code, at most c / k where c < k
    examples are relevant.

    Raises:
        FinetraceError: If k is below 1.
    """
    if k < 1:
        raise FinetraceError(f"precision at {k} is not defined; give a k of at least 1.")

    def precision(scores: NDArray[Any], relevant: NDArray[np.bool_]) -> NDArray[np.float64]:
        scores, relevant = _checked(scores, relevant)
        size = min(k, scores.shape[1])
        return _masked(_found(scores, relevant, np.full(len(scores), size, dtype=np.int64)) / size, relevant)

    return precision


def mrr(scores: NDArray[Any], relevant: NDArray[np.bool_]) -> NDArray[np.float64]:
    """(m,): reciprocal rank of the first relevant example, in expectation over ties; the mean over queries is the MRR.

    With a examples above the best relevant score, and t at it of which r relevant, the first relevant one stands at
    place j of the tied group with probability C(t - j, r - 1) / C(t, r) and counts 1 / (a + j).
    """
    scores, relevant = _checked(scores, relevant)
    result = np.full(len(scores), np.nan)
    for row in np.flatnonzero(_usable(relevant)):
        best = scores[row][relevant[row]].max()
        tied = scores[row] == best
        above, size, good = int((scores[row] > best).sum()), int(tied.sum()), int(relevant[row][tied].sum())
        place = np.arange(1, size - good + 2)
        # chance that the j-th is relevant given none before, times the chance of none before
        hit = good / (size - place + 1)
        miss = np.concatenate([[1.0], np.cumprod(1 - hit[:-1])])
        result[row] = np.sum(hit * miss / (above + place))
    return np.clip(result, 0, 1)


METRICS: dict[str, Metric] = {"accuracy": accuracy, "coverage": coverage, "auroc": auroc, "auprc": auprc}
"""The columns of every table, in order."""

MORE_METRICS: dict[str, Metric] = {"recall@10": recall_at(10), "mrr": mrr}
"""Metrics that are computed on request: `evaluate(..., metrics={**METRICS, **MORE_METRICS})`."""


def evaluate(
    scores: NDArray[Any], relevant: NDArray[np.bool_], *, seed: int = 0, metrics: Mapping[str, Metric] = METRICS
) -> dict[str, Estimate]:
    """Each metric's mean over queries with its 95% interval (`bootstrap_mean`; `Estimate.n` says how many counted).

    Args:
        scores: (m, n), higher = proponent.
        relevant: (m, n) bool.
        seed: Seed of the bootstrap; every metric is resampled with the same queries.
        metrics: What to compute, by name.

    Raises:
        FinetraceError: If shapes differ, a score is NaN, or no query has both relevant and irrelevant examples.
    """
    scores, relevant = _checked(scores, relevant)
    if not _usable(relevant).any():
        raise FinetraceError(
            f"None of the {len(scores)} queries has both relevant and irrelevant ones among the {scores.shape[1]} "
            "training examples, so there is nothing to measure; check that queries and training examples share labels."
        )
    return {name: bootstrap_mean(metric(scores, relevant), seed=seed) for name, metric in metrics.items()}


def _checked(scores: NDArray[Any], relevant: NDArray[np.bool_]) -> tuple[NDArray[Any], NDArray[np.bool_]]:
    """Both as (m, n) arrays of numbers and of bool; NaN and unlike shapes are errors."""
    scores, relevant = np.asarray(scores), np.asarray(relevant)
    if scores.ndim != 2 or scores.shape != relevant.shape or not scores.shape[1]:
        raise FinetraceError(
            f"Scores of shape {scores.shape} and relevance of shape {relevant.shape} do not belong together; both must "
            "be (queries, training examples), with at least one training example."
        )
    missing = np.isnan(scores)
    if missing.any():
        row, column = (int(index) for index in np.argwhere(missing)[0])
        raise FinetraceError(
            f"The scores of query row {row} hold NaN (first at training column {column}; {int(missing.sum())} in all), "
            "which no ranking can place; recompute them, or drop that query or column."
        )
    return scores, relevant.astype(bool, copy=False)


def _usable(relevant: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """(m,): whether some, but not all, training examples are relevant."""
    return np.asarray(relevant.any(axis=1) & ~relevant.all(axis=1))


def _masked(values: NDArray[np.float64], relevant: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Values (m,) kept in [0, 1] against rounding, NaN where the query is excluded."""
    return np.where(_usable(relevant), np.clip(values, 0, 1), np.nan)


def _found(scores: NDArray[Any], relevant: NDArray[np.bool_], top: NDArray[np.int64]) -> NDArray[np.float64]:
    """(m,): expected number of relevant examples among the `top` (m,) best of each row, over random orders of ties."""
    last = scores.shape[1] - np.maximum(top, 1)
    cut = np.take_along_axis(np.sort(scores, axis=1), last[:, None], axis=1)  # (m, 1), score of the last place
    above, tied = scores > cut, scores == cut
    places = top - above.sum(axis=1)
    share = (relevant & tied).sum(axis=1) / tied.sum(axis=1)
    return np.asarray((relevant & above).sum(axis=1) + places * share)


def _by_sklearn(metric: Callable[..., float], scores: NDArray[Any], relevant: NDArray[np.bool_]) -> NDArray[np.float64]:
    """A scikit-learn ranking metric (y_true, y_score), row by row.

    It sees dense ranks: equal scores stay equal, and infinities, which scikit-learn refuses, become numbers.
    """
    scores, relevant = _checked(scores, relevant)
    result = np.full(len(scores), np.nan)
    usable = np.flatnonzero(_usable(relevant))
    for row in usable:
        result[row] = metric(relevant[row], rankdata(scores[row], method="dense"))
    return np.clip(result, 0, 1)
