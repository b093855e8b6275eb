"""Several methods on one set of queries, each with its quality where labels say what is right."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from finetrace.attribution import Method, Problem, Scores
from finetrace.attribution.ranked import Ranked, rank
from finetrace.attribution.score_files import writing_scores
from finetrace.attribution.scores import SIGN
from finetrace.collection.representations import UPPER, Representation
from finetrace.evaluation.intervals import Estimate
from finetrace.evaluation.metrics import evaluate, relevance
from finetrace.index.store import Index

# The best of the gradient family on development tasks that cannot be solved without the query (benchmarks/choose_method.py),
# and the best where the start of the fine-tuning is not at hand: rows that taught the model these words, and that moved it
# towards or away from complying.
BEST = "ekfac:normalise=cosine,layers=last-half,at=start"
BEST_AT_END = "ekfac:normalise=cosine,loss_on=response+probe,layers=all+last-half"
BEST_WITHOUT_FACTORS = "exact:normalise=cosine"  # of gradients that have none (`Index.has_factors`)

# the best of hidden states on the same tasks, layers and poolings searched as gradients' layers and tokens were
# (benchmarks/choose_representation.py): rows whose answers are alike
SIMILAR = f"repsim:layer={UPPER},pooling=mean-response,centred=true"

# an order that never looks at the query, of those tried the one that comes farthest where a behaviour is planted: rows that
# were new to the model come first
UNASKED = "selfinf:curvature=ekfac,layers=last-fifth,at=start"

# every method at its defaults, and the variants that answer a question of their own
STANDARD = (
    "random",
    "length",
    "gradnorm",
    "selfinf",
    "gradnorm:at=start",
    UNASKED,
    "bm25:text=prompt",
    "bm25:text=response",
    "bm25",
    "tfidf:text=prompt",
    "tfidf:text=response",
    "tfidf",
    "opening",
    "repsim",
    "repsim:pooling=last-token",
    "repsim:pooling=mean-response",
    SIMILAR,
    "gradsim",
    "gradcos",
    "gradcos:scope=block",
    "datainf",
    "datainf:normalise=cosine",
    "lissa",
    "exact",
    "exact:normalise=cosine",
    "exact:normalise=relatif",
    "exact:scope=joint",
    "exact:scope=joint,normalise=cosine",
    "kfac",
    "ekfac",
    "ekfac:normalise=cosine",
    "ekfac:normalise=cosine,layers=last-fifth",
    "gradcos:loss_on=first:5",
    "gradcos:loss_on=probe",
    "ekfac:normalise=cosine,loss_on=probe",
    "ekfac:normalise=cosine,loss_on=probe,layers=last-fifth",
    BEST_AT_END,
    "gradsim:at=start",
    "gradcos:at=start",
    "datainf:at=start",
    "exact:normalise=cosine,at=start",
    "ekfac:at=start",
    "ekfac:normalise=cosine,at=start",
    "ekfac:normalise=cosine,layers=last-fifth,at=start",
    "ekfac:layers=last-half,at=start",
    "ekfac:layers=last-fifth,at=start",
    BEST,
)
TABLE = ("accuracy", "coverage", "auroc", "auprc")


@dataclass(frozen=True, eq=False)
class Result:
    """One method's scores, and its metrics where training examples and queries carry labels."""

    method: Method
    scores: Scores
    metrics: dict[str, Estimate] = field(default_factory=dict)

    def record(self, **about: Any) -> dict[str, Any]:
        """A flat record of results.json: metrics are fractions, `<metric>_low` and `_high` their 95% interval."""
        values: dict[str, Any] = {}
        for name in TABLE:
            estimate = self.metrics.get(name)
            values[name] = _number(estimate.value if estimate else None)
            values[f"{name}_low"] = _number(estimate.low if estimate else None)
            values[f"{name}_high"] = _number(estimate.high if estimate else None)
        return {
            **about,
            "method": self.method.plain_label,
            "spec": self.method.label,
            "normalise": self.method.normalisation,
            "control": self.method.control,
            "n_train": len(self.scores.train),
            "n_queries": len(self.scores.queries),
            **values,
            "seconds": round(self.scores.seconds, 4),
            "unit": self.scores.unit,
            **{f"parameter_{key}": value for key, value in self.scores.parameters.items() if key != "normalise"},
        }


@dataclass(frozen=True, eq=False)
class RankedResult:
    """One method's strongest rows, where the matrix of all scores was not held: there is nothing to evaluate."""

    method: Method
    scores: Ranked
    metrics: dict[str, Estimate] = field(default_factory=dict)


def default_method(index: Index) -> str:
    """What traces where nobody says: the best method that the index's model allows."""
    if not index.has_factors():
        return BEST_WITHOUT_FACTORS
    return BEST if index.has_start() else BEST_AT_END


def unasked_method(index: Index) -> str:
    """The order that never looks at an answer which stands beside `default_method`: self-influence, at the start if it can."""
    if not index.has_factors():
        return "selfinf"
    return UNASKED if index.has_start() else "selfinf:curvature=ekfac"


def standard(index: Index) -> tuple[str, ...]:
    """`STANDARD`, without what needs the start of the fine-tuning, Kronecker factors or hidden states that are not at hand."""
    start, factors = index.has_start(), index.has_factors()
    here = tuple(spec for spec in STANDARD if (start or "at=start" not in spec) and (factors or "kfac" not in spec))
    return here if has_similar(index) else tuple(spec for spec in here if spec != SIMILAR)


def has_similar(index: Index) -> bool:
    """Whether the index holds the hidden states of `SIMILAR`; one that was built before they were kept does not."""
    return index.has_representation(Representation(UPPER, "mean-response"))


def run_methods(problem: Problem, methods: Sequence[Method], seed: int = 0) -> list[Result]:
    """Score every method; with labels on both sides, evaluate each against the query's class.

    Methods share the problem's inner products, so the first one of the gradient family bears their cost.
    """
    prepare(problem, methods)
    train = problem.rows.labels
    labels = [query.label for query in problem.queries]
    relevant = relevance(train, labels)
    judged = bool(np.any(relevant.any(1) & ~relevant.all(1)))
    results = []
    for method in methods:
        scores = method.score(problem)
        results.append(Result(method, scores, evaluate(scores.values, relevant, seed=seed) if judged else {}))
    return results


def rank_methods(
    problem: Problem, methods: Sequence[Method], k: int, *, opponents: bool = False, scores: Path | None = None
) -> list[RankedResult]:
    """The k strongest rows of each query by every method, the matrix of all scores never held.

    `scores` is a .parquet, .npy or .safetensors file to which all scores of the first method are written as they are made.
    """
    prepare(problem, methods)
    results: list[RankedResult] = []
    for method in methods:
        with ExitStack() as stack:
            sinks = []
            if scores is not None and not results:
                unit, used, _ = method.about(method.prepared(problem))
                config = {"method": method.label, "unit": unit, "sign": SIGN, "parameters": used}
                names = [query.id for query in problem.queries]
                sinks.append(stack.enter_context(writing_scores(scores, method.label, names, problem.rows.ids, config)))
            results.append(RankedResult(method, rank(method, problem, k, opponents=opponents, sinks=sinks)))
    return results


def prepare(problem: Problem, methods: Sequence[Method]) -> None:
    """Collect what the methods want and the index lacks; those that want Kronecker factors first, which come on the way."""
    for method in sorted(methods, key=lambda each: "labels" not in each.parameters):
        method.prepared(problem)


def best(results: Sequence[Result], *, controls: bool) -> Result | None:
    """The best method that is (or is not) a control: by AUPRC, then coverage; the first of equals. Unjudged: none."""
    judged = [result for result in results if result.method.control == controls and result.metrics]
    if not judged:
        return None
    return max(judged, key=lambda result: (result.metrics["auprc"].value, result.metrics["coverage"].value))


def opening(results: Sequence[Result]) -> Result:
    """The method a page opens on: the best that is no control; without labels, the one that is traced by default."""
    chosen = best(results, controls=False)
    if chosen is not None:
        return chosen
    order = (BEST, BEST_AT_END, "exact:normalise=cosine", "exact", "gradcos", "repsim")
    found = {result.method.label: result for result in results}
    rest = [result for result in results if not result.method.control] or list(results)
    return next((found[label] for label in order if label in found), rest[0])


def _number(value: float | None) -> float | None:
    return None if value is None or not np.isfinite(value) else round(float(value), 6)
