"""The linear datamodeling score: do the scores of the rows that were trained on, added up, predict the losses of retraining?

Park et al., TRAK (arXiv 2303.14186), section 2.2. For random subsets S of the rows, a score matrix predicts the loss of query q
after training on S by -sum_{i in S} score_qi: a proponent lowers it. The score of a query is Spearman's rank correlation, over
subsets, of prediction and loss. It compares how a method orders subsets, so neither scale nor offset of the scores counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from math import comb, factorial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata
from scipy.stats import t as student

from finetrace.errors import FinetraceError
from finetrace.evaluation.intervals import Estimate

Losses = NDArray[np.float64]


def draw_subsets(rows: int, count: int, share: float = 0.5, seed: int = 0) -> NDArray[np.bool_]:
    """(count, rows) True where a row is in a subset; each has round(share x rows) of them, drawn without replacement.

    No two are alike: the same fine-tuning twice would count as two, and say no more than one.

    Raises:
        FinetraceError: The share leaves no row, or no row out, or there are fewer such subsets.
    """
    size = round(share * rows) if 0 < share < 1 else 0  # a share need not be a number
    if not 0 < size < rows:
        if not 0 < share < 1:
            raise FinetraceError(f"a share of {share:g} of the rows: give one between 0 and 1, such as 0.5.")
        raise FinetraceError(
            f"a share of {share} of {rows} rows leaves {size} in; some rows have to be in and some out."
        )
    if count > comb(rows, size):
        raise FinetraceError(
            f"{rows} rows have {comb(rows, size)} subsets of {size}, not {count}; ask for fewer subsets."
        )
    rng, drawn = np.random.default_rng([seed, rows, size]), dict[tuple[int, ...], None]()
    while len(drawn) < count:
        drawn[tuple(sorted(rng.choice(rows, size, replace=False).tolist()))] = None
    members = np.zeros((count, rows), dtype=bool)
    for row, chosen in zip(members, drawn, strict=True):
        row[list(chosen)] = True
    return members


def leave_out(rows: int, most: int, seed: int = 0) -> NDArray[np.bool_]:
    """(min(rows, most), rows) subsets without a single row each: every row, or as many drawn ones, in the data's order.

    Over such subsets the score of `per_query` is the rank correlation of a method's scores with what leaving the rows out does.
    """
    gone: NDArray[np.intp] = np.arange(rows)
    if rows > most:
        gone = np.sort(np.random.default_rng([seed, rows, most]).choice(rows, most, replace=False))
    members = np.ones((len(gone), rows), dtype=bool)
    members[np.arange(len(gone)), gone] = False
    return members


def per_query(scores: NDArray[Any], members: NDArray[np.bool_], losses: Losses) -> NDArray[np.float64]:
    """(m,) Spearman over subsets of predicted and true loss, the mean over seeds of the retrainings.

    Args:
        scores: (m, n), positive = proponent.
        members: (s, n) which rows each subset has.
        losses: (k, s, m) loss of every query after training on each subset, under k seeds.

    Returns:
        0 for a query of which the scores say nothing, NaN for one whose losses do not vary, which no method can predict.

    Raises:
        FinetraceError: The shapes do not fit.
    """
    losses = _checked(losses, members)
    return _against(_predicted(scores, members, losses), losses, _ranked(losses.swapaxes(1, 2)))


def agreement(losses: Losses) -> NDArray[np.float64]:
    """(m,) the noise ceiling: how well one retraining predicts another of the same subset under another seed.

    The mean over pairs of seeds of Spearman's correlation over subsets; NaN where losses do not vary.

    Raises:
        FinetraceError: There is one seed.
    """
    if len(losses) < 2:
        raise FinetraceError("a noise ceiling needs retrainings under at least two seeds.")
    return _agreed(_ranked(losses.swapaxes(1, 2)))


def reachable(losses: Losses) -> float:
    """The LDS that a method has which knows the expected loss of every subset: the square root of the mean agreement.

    Two retrainings of a subset are the expected loss and noise of their own each. Where they correlate by r, either correlates
    with what they have in common by sqrt(r), so a perfect prediction lies above the agreement of seeds, not at it. Of queries
    that agree by different amounts the root of their mean is a little high.
    """
    return float(np.sqrt(max(0.0, _mean(agreement(losses)))))


@dataclass(frozen=True, eq=False)
class Comparison:
    """Methods against the same retrainings.

    Attributes:
        lds: By method, the mean over queries with an interval over queries and subsets.
        sure: Methods whose LDS is above 0 with all the methods tried taken into account (Bonferroni, at the same level); none
            where subsets are so few that chance orders them right too often, four or fewer for one method.
        agreement: How far two seeds agree, in the same way; `None` with one seed.
        reachable: What a perfect prediction would have, its square root; `None` with one seed, and where the seeds may not
            agree at all (the interval of `agreement` does not lie above 0, or is of four subsets or fewer), so that nothing is
            known of what is possible.
        differences: By method, its LDS minus that of the first one, paired: the same queries and subsets in each resample.
    """

    lds: dict[str, Estimate]
    sure: frozenset[str]
    agreement: Estimate | None
    reachable: float | None
    differences: dict[str, Estimate]


def compare(
    scores: dict[str, NDArray[Any]],
    members: NDArray[np.bool_],
    losses: Losses,
    *,
    resamples: int = 500,
    level: float = 0.95,
    seed: int = 0,
) -> Comparison:
    """LDS of several methods with percentile bootstrap intervals; a resample draws queries and subsets with replacement.

    Args:
        scores: By method, (m, n).
        members: (s, n).
        losses: (k, s, m).
        resamples: Draws.
        level: Confidence.
        seed: Of the draws.
    """
    losses = _checked(losses, members)
    predicted = {name: _predicted(each, members, losses) for name, each in scores.items()}
    _, subsets, queries = losses.shape
    rng = np.random.default_rng(seed)
    drawn: dict[str, list[float]] = {name: [] for name in predicted}
    agreed: list[float] = []
    for _ in range(resamples):
        s, q = rng.integers(0, subsets, subsets), rng.integers(0, queries, queries)
        here = losses[:, s][:, :, q]
        ranked = _ranked(here.swapaxes(1, 2))
        for name, values in predicted.items():
            drawn[name].append(_mean(_against(values[q][:, s], here, ranked)))
        if len(losses) > 1:
            agreed.append(_mean(_agreed(ranked)))
    ranked = _ranked(losses.swapaxes(1, 2))
    each_query = {name: _against(values, losses, ranked) for name, values in predicted.items()}
    counted = int(np.isfinite(next(iter(each_query.values()))).sum())
    ends = (1 - level) / 2, (1 + level) / 2

    def estimate(value: float, resampled: Sequence[float]) -> Estimate:
        finite = np.asarray(resampled)[np.isfinite(resampled)]
        low, high = np.quantile(finite, ends) if finite.size else (np.nan, np.nan)
        return Estimate(value, float(low), float(high), counted)

    lds = {name: estimate(_mean(values), drawn[name]) for name, values in each_query.items()}
    # a few subsets' bootstrap is too narrow by sqrt((s - 1) / s), and has tails that are Student's
    strict = float(student.ppf(1 - (1 - level) / 2 / len(lds), subsets - 1)) * float(np.sqrt(subsets / (subsets - 1)))
    spread = {name: float(np.nanstd(values)) for name, values in drawn.items()}
    enough = factorial(min(subsets, 20)) * (1 - level) / 2  # things that s subsets show: chance finds one order in s!
    sure = frozenset(
        name for name, each in lds.items() if enough >= len(lds) and each.value > strict * spread[name] > 0
    )
    first = next(iter(lds))
    differences = {
        name: estimate(
            _mean(values - each_query[first]), [a - b for a, b in zip(drawn[name], drawn[first], strict=True)]
        )
        for name, values in each_query.items()
    }
    if len(losses) == 1:
        return Comparison(lds, sure, None, None, differences)
    ceiling = estimate(_mean(agreement(losses)), agreed)
    known = ceiling.low > 0 and enough >= 1
    return Comparison(lds, sure, ceiling, reachable(losses) if known else None, differences)


def _predicted(scores: NDArray[Any], members: NDArray[np.bool_], losses: Losses) -> NDArray[np.float64]:
    """(m, s) minus the sum of the scores of each subset's rows, in units of a query's largest.

    Sums that differ in the thirteenth digit alone are of the same scores, added in another order, and are made equal.
    """
    values = np.asarray(scores, dtype=np.float64)
    if values.shape != (losses.shape[2], members.shape[1]):
        raise FinetraceError(
            f"scores of shape {values.shape} are not those of {losses.shape[2]} queries and {members.shape[1]} rows."
        )
    sums = values @ members.T
    largest = np.abs(sums).max(axis=1, keepdims=True)
    return np.asarray(-np.round(sums / np.where(largest > 0, largest, 1.0), 12))


def _against(predicted: NDArray[np.float64], losses: Losses, ranked: NDArray[np.float64]) -> NDArray[np.float64]:
    """(m,) mean over seeds of Spearman's correlation with losses and their `_ranked`; silence counts as 0."""
    found = (_ranked(predicted) * ranked).sum(axis=-1).mean(axis=0)
    silent = (np.ptp(predicted, axis=1) == 0) & (np.ptp(losses, axis=1) > 0).all(0)
    return np.asarray(np.where(silent, 0.0, found))


def _agreed(ranked: NDArray[np.float64]) -> NDArray[np.float64]:
    """(m,) mean over pairs of seeds of their correlation, of (k, m, s) `_ranked` losses."""
    return np.asarray(np.mean([(a * b).sum(axis=-1) for a, b in combinations(ranked, 2)], axis=0))


def _checked(losses: Losses, members: NDArray[np.bool_]) -> Losses:
    losses = np.asarray(losses, dtype=np.float64)
    if losses.ndim != 3 or losses.shape[1] != len(members):
        raise FinetraceError(
            f"losses of shape {losses.shape} are not (seeds, subsets, queries) of {len(members)} subsets."
        )
    if len(members) < 3:
        raise FinetraceError(f"{len(members)} subsets give no rank correlation; take at least 3, better 30.")
    if not np.isfinite(losses).all():
        raise FinetraceError("a loss after retraining is not finite.")
    return losses


def _ranked(rows: NDArray[np.float64]) -> NDArray[np.float64]:
    """Ranks along the last axis, centred and of length 1, so that the sum of products of two is Spearman's correlation.

    NaN where they do not vary.
    """
    ranks = rankdata(rows, axis=-1)
    ranks -= ranks.mean(axis=-1, keepdims=True)
    norms = np.sqrt((ranks**2).sum(axis=-1, keepdims=True))
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(ranks / norms)


def _mean(values: NDArray[np.float64]) -> float:
    known = values[np.isfinite(values)]
    return float(known.mean()) if known.size else float("nan")
