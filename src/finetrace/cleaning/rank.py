"""Which rows of a training set are behind some bad answers: ranked together, cut, and what retraining without them does."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from finetrace.attribution import Problem, make
from finetrace.cleaning.threshold import ROUNDING, refuse_many, standard, threshold
from finetrace.errors import FinetraceError
from finetrace.evaluation.intervals import UNBOUNDED, Estimate
from finetrace.evaluation.judging import Judge
from finetrace.evaluation.retraining import RESPONSE, Retraining, Subset
from finetrace.evaluation.seeds import bootstrap_crossed
from finetrace.examples import Example
from finetrace.execution import Engine
from finetrace.finetune_config import FinetuneConfig
from finetrace.generation import ANSWER_TOKENS
from finetrace.index.store import Index
from finetrace.models import ModelSpec
from finetrace.tracing import BEST, unasked_method


@dataclass(frozen=True)
class Cut:
    """How many rows go: the first `top`, a `share` of all, or, with neither, those above a calibrated threshold.

    Attributes:
        top: Rows.
        share: Of the rows.
        expected: Rows that the threshold would take out by chance, in the mean, if none had to do with the answers.
    """

    top: int | None = None
    share: float | None = None
    expected: float = 1.0

    def removed(self, n: int) -> int | None:
        """How many of n rows go; `None` where the threshold says.

        Raises:
            FinetraceError: Nothing or everything would go, or the rows are too many for a threshold.
        """
        if self.top is None and self.share is None:
            refuse_many(n)
            return None
        return _some(self.top if self.top is not None else round((self.share or 0) * n), n)

    def __post_init__(self) -> None:
        if self.top is not None and self.share is not None:
            raise FinetraceError("--top and --share both say how many rows go; give one of them.")
        if self.share is not None and not 0 < self.share < 1:
            raise FinetraceError(f"--share {self.share:g}: give a share of the rows between 0 and 1, such as 0.05.")
        if not 0 < self.expected < math.inf:
            raise FinetraceError(f"--expected {self.expected:g}: give a number of rows above 0, such as 1.")


@dataclass(frozen=True, eq=False)
class Ranked:
    """The rows of an index by how much they are behind the bad answers.

    Attributes:
        values: (n,) mean over methods and answers of the row's score in robust standard deviations of that answer's scores.
        order: (n,) rows, the most responsible first.
        removed: How many of them go.
        threshold: Where it was calibrated.
        nearest: (n,) which answer each row scores highest for.
        methods: Titles.
    """

    values: NDArray[np.float64]
    order: NDArray[np.intp]
    removed: int
    threshold: float | None
    nearest: NDArray[np.intp]
    methods: tuple[str, ...]

    @property
    def gone(self) -> tuple[int, ...]:
        """The rows that go, the most responsible first."""
        return tuple(int(i) for i in self.order[: self.removed])

    @property
    def tied(self) -> int:
        """How many of the kept rows have the same value as the last that goes; the data's order decides between them."""
        return int((self.values[self.order[self.removed :]] == self.values[self.order[self.removed - 1]]).sum())

    @property
    def below(self) -> int:
        """How many of the rows that go have no value above 0, the middle of all rows."""
        return int((self.values[self.order[: self.removed]] <= 0).sum())

    @property
    def kept(self) -> tuple[int, ...]:
        """The others, in the data's order."""
        gone = set(self.gone)
        return tuple(i for i in range(len(self.values)) if i not in gone)


def rank(problem: Problem, cut: Cut, specs: Sequence[str] = (BEST,), seed: int = 0) -> Ranked:
    """Rank the rows of an index by their scores for all the bad answers together.

    Each answer's scores are put in robust standard deviations over the rows, (score - median) / (1.4826 MAD), so that no
    answer and no method counts for more because its numbers are larger; their mean is a row's value. Where more than half of
    an answer's scores are equal, as those of a lexical search are, MAD is 0 and 1.2533 times the mean absolute deviation takes
    its place.

    Args:
        problem: The index of the training set, and as queries the prompts with the answers that should not have been given.
        cut: How many rows go.
        specs: Methods; several vote by the mean of their values.
        seed: Of the groups that calibrate a threshold.

    Raises:
        FinetraceError: Nothing or everything would go, all rows have the same value, or the set is too large for a
            calibrated threshold.
    """
    methods = [make(spec) for spec in dict.fromkeys(make(spec).label for spec in specs)]
    removed = cut.removed(problem.n)
    scores = standard(problem, methods)  # (m, n)
    values = scores.mean(axis=0)
    n, above = len(values), None
    if np.ptp(values) <= ROUNDING * np.abs(values).max():
        raise FinetraceError(
            f"no row stands out: all {n} have the same value by {' and '.join(method.title for method in methods)}; choose "
            "another --method."
        )
    if removed is None:
        above = threshold(problem.index, methods, scores, cut.expected, seed)
        removed = int((values > above).sum())
        if removed == 0:
            raise FinetraceError(
                f"no row stands out: none of {n} has a value above {above:.2f}, which chance gives {cut.expected:g} of "
                "them; give --top or --share to remove the first ones all the same."
            )
        _some(removed, n)
    order = np.argsort(-values, kind="stable")
    titles = tuple(method.title for method in methods)
    return Ranked(values, order, removed, above, scores.argmax(axis=0), titles)


def _some(removed: int, n: int) -> int:
    if not 0 < removed < n:
        raise FinetraceError(
            f"removing {removed} of {n} rows leaves nothing to do or nothing to train on; choose another cut."
        )
    return removed


@dataclass(frozen=True, eq=False)
class Outcome:
    """The bad answers after retraining on some rows.

    Attributes:
        name: `all rows`, `cleaned`, `random rows removed` or `self-influential removed`.
        rows: How many were trained on.
        loss: Mean loss of the bad answers, over seeds and draws, with its interval.
        rate: How often the judge calls the new answers bad.
    """

    name: str
    rows: int
    loss: Estimate
    rate: Estimate


def retrain(
    index: Index,
    bad: Sequence[Example],
    ranked: Ranked,
    finetuning: FinetuneConfig,
    folder: Path,
    judge: Judge,
    *,
    seeds: int = 1,
    draws: int = 1,
    answer_tokens: int = ANSWER_TOKENS,
    workers: int | Engine = 1,
    device: str = "auto",
    say: Callable[[str], None] = lambda text: None,
) -> list[Outcome]:
    """Train on all rows, without the removed ones, and without as many others; let each model answer again.

    The others are random, or the first of an order that never looks at the answers, `unasked_method`: where rows are unlike the
    rest, removing those may help as much, and then the answers had no part in it.

    Args:
        index: Of the fine-tuned model.
        bad: The answers that were traced.
        ranked: What goes.
        finetuning: How the adapter was trained.
        folder: Where retrainings are kept.
        judge: Says which of the new answers are bad.
        seeds: Fine-tunings of each.
        draws: Random removals.
        answer_tokens: Tokens that each model answers at most.
        workers: Processes, or an engine.
        device: For retraining.
        say: Hears what is done.
    """
    record, n = index.manifest.model, len(index)
    trusted = index.model().spec.trust_remote_code
    base = ModelSpec(record.name, None, record.dtype, device, trusted)  # type: ignore[arg-type]
    again = Retraining(base, finetuning, tuple(index.rows.examples), tuple(bad), folder, answer_tokens=answer_tokens)
    rng = np.random.default_rng([finetuning.seed, n, ranked.removed])
    chance = [tuple(sorted(rng.choice(n, n - ranked.removed, replace=False).tolist())) for _ in range(draws)]
    unasked = np.argsort(-make(unasked_method(index)).score(index, bad).values[0], kind="stable")
    choices = [
        ("all rows", [again.everything]),
        ("cleaned", [ranked.kept]),
        ("random rows removed", chance),
        ("self-influential removed", [tuple(sorted(unasked[ranked.removed :].tolist()))]),
    ]
    numbers = range(finetuning.seed, finetuning.seed + seeds)
    plan = [Subset(rows, seed) for _, each in choices for rows in each for seed in numbers]
    losses = np.stack([found.losses[RESPONSE] for found in again.run(plan, workers=workers, say=say)])
    verdicts = again.judged(judge, plan).astype(np.float64)
    outcomes, start = [], 0
    for name, each in choices:
        mine = slice(start, start := start + len(each) * seeds)
        loss, bad_now = (values[mine].reshape(len(each), seeds, -1) for values in (losses, verdicts))
        outcomes.append(
            Outcome(name, len(each[0]), bootstrap_crossed(loss, bounds=UNBOUNDED), bootstrap_crossed(bad_now))
        )
    return outcomes
