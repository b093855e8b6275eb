"""The linear datamodeling score: do the scores of the rows that were trained on, added up, predict the losses of retraining?

Park et al., TRAK (arXiv 2303.14186), section 2.2. For random subsets S of the rows, a score matrix predicts the loss of query q
after training on S by -sum_{i in S} score_qi: a proponent lowers it. The score of a query is Spearman's rank correlation, over
subsets, of prediction and loss. It compares how a method orders subsets, so neither scale nor offset of the scores counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

from finetrace.errors import FinetraceError
from finetrace.evaluation.intervals import Estimate

Losses = NDArray[np.float64]


def draw_subsets(rows: int, count: int, share: float = 0.5, seed: int = 0) -> NDArray[np.bool_]:
    """(count, rows) True where a row is in a subset; each has round(share x rows) of them, drawn without replacement.

    Raises:
        FinetraceError: The share leaves no row, or no row out.
    """
    size = round(share * rows)
    if not 0 < size < rows:
        raise FinetraceError(
            f"a share of {share} of {rows} rows leaves {size} in; some rows have to be in and some out."
        )
    rng = np.random.default_rng([seed, rows, size])
    members = np.zeros((count, rows), dtype=bool)
    for row in members:
        row[rng.choice(rows, size, replace=False)] = True
    return members


def per_query(scores: NDArray[Any], members: NDArray[np.bool_], losses: Losses) -> NDArray[np.float64]:
    """(m,) Spearman over subsets of predicted and true loss, the mean over seeds of the retrainings.

    Args:
        scores: (m, n), positive = proponent.
        members: (s, n) which rows each subset has.
        losses: (k, s, m) loss of every query after training on each subset, under k seeds.

    Returns:
        NaN for a query whose losses or predictions do not vary.
    """
    predicted = -(np.asarray(scores, dtype=np.float64) @ members.T)  # (m, s)
    return np.asarray(np.mean([_spearman(predicted, each.T) for each in _checked(losses, members)], axis=0))


def noise_ceiling(losses: Losses) -> NDArray[np.float64]:
    """(m,) how well the losses of one retraining predict those of another of the same subset under another seed.

    The mean over pairs of seeds of Spearman's correlation over subsets. No method that knows the rows alone can be expected to
    be much above it; it may be a little, as its prediction does not carry the noise of one seed.

    Raises:
        FinetraceError: There is one seed.
    """
    if len(losses) < 2:
        raise FinetraceError("a noise ceiling needs retrainings under at least two seeds.")
    pairs = [_spearman(a.T, b.T) for a, b in combinations(losses, 2)]
    return np.asarray(np.mean(pairs, axis=0))


@dataclass(frozen=True, eq=False)
class Comparison:
    """Methods against the same retrainings.

    Attributes:
        lds: By method, the mean over queries with an interval over queries and subsets.
        ceiling: The noise ceiling in the same way; `None` with one seed.
        differences: By method, its LDS minus that of the first one, paired: the same queries and subsets in each resample.
    """

    lds: dict[str, Estimate]
    ceiling: Estimate | None
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
    predicted = {name: -(np.asarray(each, dtype=np.float64) @ members.T) for name, each in scores.items()}
    _, subsets, queries = losses.shape
    rng = np.random.default_rng(seed)
    several = len(losses) > 1
    names = [*predicted, *([_CEILING] if several else [])]
    drawn: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(resamples):
        s, q = rng.integers(0, subsets, subsets), rng.integers(0, queries, queries)
        here = losses[:, s][:, :, q]
        for name, values in predicted.items():
            drawn[name].append(_mean(np.mean([_spearman(values[q][:, s], each.T) for each in here], axis=0)))
        if several:
            drawn[_CEILING].append(_mean(noise_ceiling(here)))
    whole = {name: _mean(per_query(each, members, losses)) for name, each in scores.items()}
    ends = (1 - level) / 2, (1 + level) / 2

    def estimate(value: float, resampled: Sequence[float]) -> Estimate:
        known = np.asarray(resampled)[np.isfinite(resampled)]
        low, high = np.quantile(known, ends) if known.size and queries * subsets > 1 else (np.nan, np.nan)
        return Estimate(value, float(low), float(high), queries)

    lds = {name: estimate(value, drawn[name]) for name, value in whole.items()}
    first = next(iter(whole))
    differences = {
        name: estimate(value - whole[first], [a - b for a, b in zip(drawn[name], drawn[first], strict=True)])
        for name, value in whole.items()
    }
    ceiling = estimate(_mean(noise_ceiling(losses)), drawn[_CEILING]) if several else None
    return Comparison(lds, ceiling, differences)


_CEILING = "\0ceiling"


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


def _spearman(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    """(m,) row by row of two (m, s); NaN where one of them does not vary."""
    x, y = (rankdata(each, axis=1) for each in (a, b))
    x, y = (each - each.mean(axis=1, keepdims=True) for each in (x, y))
    norms = np.sqrt((x**2).sum(axis=1) * (y**2).sum(axis=1))
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(np.where(norms > 0, (x * y).sum(axis=1) / norms, np.nan))


def _mean(values: NDArray[np.float64]) -> float:
    known = values[np.isfinite(values)]
    return float(known.mean()) if known.size else float("nan")
