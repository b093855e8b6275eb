"""What `finetrace validate` retrains, and how often."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from finetrace.errors import FinetraceError
from finetrace.index.store import Index
from finetrace.tracing import BEST, SIMILAR, UNASKED, default_method, has_similar, unasked_method

MEASURES = ("lds", "drop", "tail-patch", "loo")
RETRAINED = frozenset(("lds", "drop", "loo"))  # the tail patch takes its step from the index's own model
VALIDATED = "Validated by retraining"
FEW = "Looked at with few retrainings"
STEPS = "Not validated by retraining; single optimizer steps alone were looked at"
BASES = (STEPS, FEW, VALIDATED)  # what a verdict may rest on, the weakest first
USUAL = MEASURES[:3]  # a row left out alone is lost in the noise of training, unless the set is tiny
METHODS = (
    BEST,
    "exact:normalise=cosine,at=start",
    "gradcos:at=start",
    "ekfac:normalise=cosine",
    "exact:normalise=cosine",
    "exact",
    "datainf",
    "gradcos",
    "gradsim",
    "repsim",
    SIMILAR,
    "bm25",
    "bm25:text=response",
    UNASKED,
    "random",
)


@dataclass(frozen=True)
class Validation:
    """What to retrain.

    Attributes:
        methods: Specifications; they are compared with the first.
        measures: Of `MEASURES`.
        subsets: Random subsets of the rows for LDS.
        share: Of the rows that each has.
        seeds: Fine-tunings of each subset and removal.
        counts: How many rows are removed; a tenth and a quarter of them if not given.
        draws: Random removals of each number.
        groups: Classes of queries for which rows are removed, at most.
        patched: Rows a tail patch steps on, at most.
        left_out: Rows that are left out alone, at most.
        workers: Processes.
    """

    methods: tuple[str, ...] = METHODS
    measures: tuple[str, ...] = USUAL
    subsets: int = 30
    share: float = 0.5
    seeds: int = 2
    counts: tuple[int, ...] = ()
    draws: int = 5
    groups: int = 3
    patched: int = 10
    left_out: int = 40
    workers: int = 1

    def removed(self, n: int) -> tuple[int, ...]:
        """How many of n rows are removed."""
        return tuple(dict.fromkeys(self.counts or (max(1, round(n * share)) for share in (0.1, 0.25))))


QUICK = Validation(
    methods=(
        BEST,
        "exact:normalise=cosine,at=start",
        "exact:normalise=cosine",
        "gradcos",
        "repsim",
        "bm25",
        UNASKED,
        "random",
    ),
    measures=("lds", "tail-patch"),
    subsets=6,
    seeds=1,
)


def basis(plan: Validation, rows: int) -> str:
    """What a validation of an index of so many rows rests on, in the words that open its verdict on a page.

    A retraining measure that was asked for with less than the defaults, which are what was tried, makes it few.
    """
    if not RETRAINED & set(plan.measures):
        return STEPS
    least = Validation()
    few = {
        "lds": plan.subsets < least.subsets,
        "drop": plan.draws < least.draws,
        "loo": plan.left_out < min(least.left_out, rows),
    }
    return FEW if plan.seeds < least.seeds or any(few.get(name, False) for name in plan.measures) else VALIDATED


def refuse_unadapted(index: Index) -> None:
    """Stop where an index is of a model that has no adapter: what it has learnt cannot be taken back by training again.

    Raises:
        FinetraceError: It is.
    """
    if index.manifest.model.adapter is None:
        raise FinetraceError(
            f"{index.folder}: retraining needs a LoRA fine-tuning, and this index is of a model without one."
        )


def usual(methods: Sequence[str], index: Index) -> tuple[str, ...]:
    """The methods of a plan, with what stands in for those that the index has no start or no Kronecker factors for, and without
    those whose hidden states it lacks.
    """
    instead = {BEST: default_method(index), UNASKED: unasked_method(index)}
    found = [instead.get(name, name) for name in methods if name != SIMILAR or has_similar(index)]
    start, factors = index.has_start(), index.has_factors()
    here = (name for name in found if (start or "at=start" not in name) and (factors or "kfac" not in name))
    return tuple(dict.fromkeys(here))
