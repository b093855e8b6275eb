"""Removing what a method names: which rows, beside which others, and what it did to the queries.

Retraining without the top k of a method says whether these rows made the answer. It says little alone: any k rows that are
taken out change a model a little. So the same number of rows is removed at random, several times, and, where classes are known,
from the queries' own class, the best that class labels can do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import t as student

from finetrace.errors import FinetraceError
from finetrace.evaluation.intervals import UNBOUNDED, Estimate
from finetrace.evaluation.seeds import bootstrap_crossed, paired_crossed

RANDOM, CLASS = "random rows", "rows of the class"


@dataclass(frozen=True)
class Group:
    """Queries that are asked about together: those of one class, or all of them.

    Attributes:
        name: The class; `None` for all queries together.
        queries: Their positions.
    """

    name: str | None
    queries: tuple[int, ...]


@dataclass(frozen=True)
class Removal:
    """Rows to take out for a group of queries.

    Attributes:
        what: A method's label, `RANDOM` or `CLASS`.
        draw: Which random draw; 0 where nothing is drawn.
        group: For whom.
        rows: Positions of the rows, the first to go first.
    """

    what: str
    draw: int
    group: Group
    rows: tuple[int, ...]

    def kept(self, n: int) -> tuple[int, ...]:
        """What is left to train on, in the data's order."""
        gone = set(self.rows)
        return tuple(i for i in range(n) if i not in gone)


def groups(labels: Sequence[str | None], most: int | None = None) -> list[Group]:
    """One a class of the queries, in the order in which they come, at most `most`; all together where some have no class."""
    names = list(dict.fromkeys(labels))
    if None in names:
        return [Group(None, tuple(range(len(labels))))]
    return [Group(name, tuple(i for i, label in enumerate(labels) if label == name)) for name in names][:most]


def order(scores: NDArray[Any], group: Group) -> NDArray[np.intp]:
    """(n,) rows by their mean score for a group's queries, proponents first; of equals the first in the data."""
    return np.argsort(-np.asarray(scores, dtype=np.float64)[list(group.queries)].mean(axis=0), kind="stable")


def refuse_counts(counts: Sequence[int], n: int) -> None:
    """Stop where one of the numbers of rows leaves nothing of n to train on.

    Raises:
        FinetraceError: It does.
    """
    for count in counts:
        if not 0 < count < n:
            raise FinetraceError(f"removing {count} of {n} rows cannot be tried; give a number from 1 to {n - 1}.")


def removals(
    scores: Mapping[str, NDArray[Any]],
    asked: Sequence[Group],
    counts: Sequence[int],
    train_labels: Sequence[str | None],
    *,
    draws: int = 5,
    seed: int = 0,
) -> list[Removal]:
    """Top k of each method for each group and k in `counts`, k random rows in several draws, and k of the group's class.

    Args:
        scores: By method, (m, n).
        asked: Groups of queries.
        counts: How many rows to remove.
        train_labels: (n,) classes, `None` where unknown.
        draws: Random draws, and draws from the class where it has more than k rows.
        seed: Of the draws.

    Raises:
        FinetraceError: A count leaves nothing to train on.
    """
    n = len(train_labels)
    refuse_counts(counts, n)
    found = []
    for place, group in enumerate(asked):
        own = np.flatnonzero([label is not None and label == group.name for label in train_labels])
        for count in counts:
            for name, values in scores.items():
                found.append(Removal(name, 0, group, tuple(order(values, group)[:count].tolist())))
            rng = np.random.default_rng([seed, place, count])
            for draw in range(draws):
                found.append(Removal(RANDOM, draw, group, tuple(rng.choice(n, count, replace=False).tolist())))
            for draw in range(draws if len(own) > count else 1 if len(own) == count else 0):
                found.append(Removal(CLASS, draw, group, tuple(rng.choice(own, count, replace=False).tolist())))
    return found


@dataclass(frozen=True, eq=False)
class Effect:
    """What removing rows did to the queries asked about.

    Attributes:
        what, count: A method, or `RANDOM` or `CLASS`, and how many rows it took out.
        change: Mean rise of the queries' loss in nats, over seeds, draws and queries, with its interval over seeds and queries.
        over_random: The same minus what random rows of that number did to the same queries; `None` for random rows. Its
            interval is for these queries: it says how far other random rows would have differed (`_over_random`).
        sure: Whether it is above random rows with all the methods that removed as many taken into account (Bonferroni, at the
            same level), so that the best of them may be said to be.
        over_first: The change minus that of the first method that removed as many, for the same queries under the same seeds;
            `None` for that method, random rows and rows of the class. Its interval is over seeds and queries.
    """

    what: str
    count: int
    change: Estimate
    over_random: Estimate | None
    sure: bool = False
    over_first: Estimate | None = None


def effects(
    done: Sequence[Removal],
    after: NDArray[np.float64],
    before: NDArray[np.float64],
    *,
    step: float = 0.0,
    resamples: int = 2000,
) -> list[Effect]:
    """Each kind and number of removed rows, over all groups; methods are compared with the first one on the same queries.

    Args:
        done: The removals.
        after: (r, k, m) loss of every query after each removal, under k seeds.
        before: (k, m) after training on all rows, under the same seeds.
        step: The difference that one query can make: 1 for verdicts, which are 0 or -1 here; 0 for losses, which have no steps.
        resamples: Of the bootstrap.
    """
    after, before = np.asarray(after, dtype=np.float64), np.asarray(before, dtype=np.float64)
    if after.shape != (len(done), *before.shape):
        raise FinetraceError(
            f"losses of shape {after.shape} and {before.shape} are not those of {len(done)} removals before and after."
        )
    kinds = list(dict.fromkeys((each.what, len(each.rows)) for each in done))
    firsts: dict[int, NDArray[np.float64]] = {}
    found = []
    for what, count in kinds:
        changes = _changes((what, count), done, after, before)
        if step:  # two rates differ by -1 to 1, where an interval of one value would be cut at 0
            left, silent = (np.clip(each + step, 0, step) for each in (before + changes, before))
            change = paired_crossed(left, silent, bounds=(0, step), resamples=resamples)
        else:
            left, change = changes, bootstrap_crossed(changes, bounds=UNBOUNDED, resamples=resamples)
        if what == RANDOM:
            found.append(Effect(what, count, change, None))
            continue
        over = _over_random(what, count, done, after, before, step=step)
        tried = sum(other not in (RANDOM, CLASS) and k == count for other, k in kinds)
        strict = _over_random(what, count, done, after, before, 1 - 0.05 / max(1, tried), step)
        over_first = None
        if what != CLASS and firsts.setdefault(count, left) is not left:
            bounds = (0, step) if step else UNBOUNDED
            over_first = paired_crossed(left, firsts[count], bounds=bounds, resamples=resamples)
        found.append(Effect(what, count, change, over, strict is not None and strict.low > 0, over_first))
    return found


def _over_random(
    what: str,
    count: int,
    done: Sequence[Removal],
    after: NDArray[np.float64],
    before: NDArray[np.float64],
    level: float = 0.95,
    step: float = 0.0,
) -> Estimate | None:
    """Mean over queries of the change minus that of chance, with Student's t interval of one more random removal.

    All queries of a group share a removal, and what random rows do differs from draw to draw: the rows that happened to be
    drawn, and the noise of training. With D draws a group, of pooled variance s^2 within groups, the difference to their mean
    of one removal that is random itself has the variance s^2 (1 + 1/D); groups weigh as much as they have queries. Without a
    second draw there is no interval.
    """
    means: dict[tuple[str, Group], list[float]] = {}
    for removal, losses in zip(done, after, strict=True):
        if len(removal.rows) == count:
            mine = list(removal.group.queries)
            change = float((losses[:, mine] - before[:, mine]).mean())
            means.setdefault((removal.what, removal.group), []).append(change)
    asked = [group for name, group in means if name == what and (RANDOM, group) in means]
    if not asked:
        return None
    differences, squares, freedom = [], 0.0, 0
    shares, steps = [], []
    for group in asked:
        chance = np.array(means[RANDOM, group])
        differences.append(float(np.mean(means[what, group])) - float(chance.mean()))
        squares += float(((chance - chance.mean()) ** 2).sum())
        freedom += len(chance) - 1
        shares.append(1 + 1 / len(chance))
        steps.append(step / (len(before) * len(group.queries)))
    sizes = np.array([len(group.queries) for group in asked])
    weights, queries = sizes / sizes.sum(), int(sizes.sum())
    value = float(weights @ differences)
    if freedom == 0 or (squares == 0 and step == 0):
        return Estimate(value, float("nan"), float("nan"), queries)
    variances = np.maximum(squares / freedom, np.square(steps))  # (groups,)
    error = float(np.sqrt(np.dot(weights**2 * variances, shares)))
    reach = float(student.ppf(0.5 + level / 2, freedom)) * error
    bound = step or np.inf  # rates lie no further apart
    return Estimate(value, max(-bound, value - reach), min(bound, value + reach), queries)


def _changes(
    kind: tuple[str, int], done: Sequence[Removal], after: NDArray[np.float64], before: NDArray[np.float64]
) -> NDArray[np.float64]:
    """(k, m) rise of the loss under each seed, the mean over draws; NaN for a query that nobody asked about."""
    total, times = np.zeros_like(before), np.zeros(before.shape[1])
    for removal, losses in zip(done, after, strict=True):
        if (removal.what, len(removal.rows)) == kind:
            mine = list(removal.group.queries)
            total[:, mine] += losses[:, mine] - before[:, mine]
            times[mine] += 1
    return np.asarray(np.where(times > 0, total / np.maximum(times, 1), np.nan))
