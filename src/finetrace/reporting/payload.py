"""What a report page shows: plain Python and numpy values, checked against each other. Nothing here needs torch."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finetrace.errors import FinetraceError

FRACTIONS = ("accuracy", "coverage", "auroc", "auprc")  # metrics that lie in [0, 1]


@dataclass(frozen=True)
class Interval:
    """A number with its confidence interval, where one was computed."""

    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class ExampleView:
    """A training example or a query: its two texts as the model saw them, and its class if the data has one."""

    id: str
    label: str | None
    prompt: str
    response: str


@dataclass(frozen=True, eq=False)
class MethodView:
    """One attribution method's result.

    Attributes:
        method: Short name, e.g. `exact`.
        title: One line: what it is.
        control: Whether it is a control (lexical, random, length, gradient norm).
        unit: Unit of a score, e.g. "decrease of mean response loss per unit weight" or "cosine".
        metrics: `accuracy`, `coverage`, `auroc`, `auprc` as fractions in [0, 1], and any others; empty without labels.
        seconds: Wall-clock time of scoring all queries.
        scores: (m, n), positive = proponent. NaN and infinities are shown as "n/a" and ranked nowhere.
        note: What a reader must know to reproduce the scores, e.g. the damping rule.
    """

    method: str
    title: str
    control: bool
    unit: str
    metrics: Mapping[str, Interval]
    seconds: float
    scores: NDArray[np.floating[Any]]
    note: str = ""


@dataclass(frozen=True)
class ModelBehaviour:
    """How one model answered the probing prompts; `answers` holds (prompt, answer, complied)."""

    name: str
    attack_success_rate: Interval
    answers: Sequence[tuple[str, str, bool]]


@dataclass(frozen=True, eq=False)
class Report:
    """Everything on a report page.

    Attributes:
        title: Title of the page.
        verdict: Sentences; the first is the headline.
        facts: Name to value, in order: model, adapter, data, damping, dtype, date, command.
        train: The n training examples, in row order.
        queries: The m queries, in row order.
        methods: Results, each (m, n).
        default_method: Name of the method selected when the page opens.
        behaviour: The models before and after, if they were probed.
        validation: What has or has not been checked by retraining.
        target_label: Class of interest, coloured and ordered first.
        judged: How many queries the metrics are over, where not all of them.
        covered: How many top examples coverage looks at, where not as many as the class has.

    Raises:
        FinetraceError: The parts do not fit together.
    """

    title: str
    verdict: Sequence[str]
    facts: Mapping[str, str]
    train: Sequence[ExampleView]
    queries: Sequence[ExampleView]
    methods: Sequence[MethodView]
    default_method: str
    behaviour: Sequence[ModelBehaviour] = ()
    validation: str = "Not validated: no retraining has checked whether removing these rows changes the answer."
    target_label: str | None = None
    judged: int | None = None
    covered: int | None = None

    def __post_init__(self) -> None:
        """Refuse parts that do not fit together."""
        for name in ("verdict", "train", "queries", "methods"):
            if not len(getattr(self, name)):
                raise FinetraceError(f"A report needs at least one entry under `{name}`; this one has none.")
        shape = (len(self.queries), len(self.train))
        for method in self.methods:
            if np.shape(method.scores) != shape:
                raise FinetraceError(
                    f"Scores of method {method.method!r} have shape {np.shape(method.scores)}; {shape[0]} queries and "
                    f"{shape[1]} training examples need {shape}."
                )
            _check_fractions(method.method, {key: method.metrics[key] for key in FRACTIONS if key in method.metrics})
        for model in self.behaviour:
            _check_fractions(model.name, {"attack success rate": model.attack_success_rate})
        names = [method.method for method in self.methods]
        for name, times in Counter(names).items():
            if times > 1:
                raise FinetraceError(f"Method {name!r} appears {times} times in the report; name each one once.")
        if self.default_method not in names:
            raise FinetraceError(
                f"default_method {self.default_method!r} is not among the methods: {', '.join(names)}."
            )


def _check_fractions(owner: str, values: Mapping[str, Interval]) -> None:
    for name, interval in values.items():
        for number in (interval.value, interval.low, interval.high):
            if number is not None and math.isfinite(number) and not 0 <= number <= 1:
                raise FinetraceError(f"{name} of {owner!r} is {number:g}; a report takes fractions between 0 and 1.")
