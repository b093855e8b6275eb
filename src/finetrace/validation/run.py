"""Is an index's attribution right on its own run? Retraining says: LDS, removing top rows, tail patches, and a verdict."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finetrace.attribution import Problem, make
from finetrace.errors import FinetraceError
from finetrace.evaluation.intervals import Estimate, bootstrap_mean
from finetrace.evaluation.lds import Comparison, compare, draw_subsets
from finetrace.evaluation.removal import CLASS, RANDOM, Effect, effects, groups, removals
from finetrace.evaluation.retraining import RESPONSE, Retraining, Subset
from finetrace.evaluation.tail_patch import tail_patch
from finetrace.examples import Example
from finetrace.finetune_config import FinetuneConfig
from finetrace.index.store import Index
from finetrace.models import DType, ModelSpec
from finetrace.tracing import BEST, prepare

MEASURES = ("lds", "drop", "tail-patch")
METHODS = (
    BEST,
    "ekfac:normalise=cosine",
    "exact:normalise=cosine",
    "exact",
    "datainf",
    "gradcos",
    "gradsim",
    "repsim",
    "bm25",
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
        workers: Processes.
    """

    methods: tuple[str, ...] = METHODS
    measures: tuple[str, ...] = MEASURES
    subsets: int = 30
    share: float = 0.5
    seeds: int = 2
    counts: tuple[int, ...] = ()
    draws: int = 5
    groups: int = 3
    patched: int = 10
    workers: int = 1

    def removed(self, n: int) -> tuple[int, ...]:
        """How many of n rows are removed."""
        return self.counts or tuple(dict.fromkeys(max(1, round(n * share)) for share in (0.1, 0.25)))


QUICK = Validation(
    methods=(BEST, "exact:normalise=cosine", "gradcos", "repsim", "bm25", "random"),
    measures=("lds", "tail-patch"),
    subsets=6,
    seeds=1,
)


@dataclass(frozen=True, eq=False)
class Validated:
    """What was found.

    Attributes:
        records: Flat, a measure and method each.
        verdict: Sentences, the headline first.
        lds, drops, patches: As measured; `None` or empty where they were not.
        losses: Mean loss of the queries by the index's own adapter (NaN where it is of other tokens), and after retraining on
            all rows.
    """

    records: list[dict[str, Any]]
    verdict: list[str]
    lds: Comparison | None = None
    drops: Sequence[Effect] = ()
    patches: Mapping[str, Estimate] = field(default_factory=dict)
    losses: tuple[float, float] | None = None


def validate(
    index: Index,
    queries: Sequence[Example],
    config: Validation,
    finetuning: FinetuneConfig,
    folder: Path,
    say: Callable[[str], None] = lambda text: None,
    device: str = "auto",
) -> Validated:
    """Retrain on subsets of the index's rows and without the rows that methods name, and compare.

    Args:
        index: Of the fine-tuned model.
        queries: Each with the response that is traced.
        config: What to do.
        finetuning: How the adapter was fine-tuned.
        folder: Where retrainings are kept.
        say: Hears what is done.
        device: For retraining.

    Raises:
        FinetraceError: A measure is not known, or the index is not of an adapter.
    """
    unknown = [each for each in config.measures if each not in MEASURES]
    if unknown or not config.measures:
        raise FinetraceError(f"--measure {' '.join(unknown)}: not known; use {', '.join(MEASURES)}.")
    if index.manifest.model.adapter is None:
        raise FinetraceError(
            f"{index.folder}: retraining needs a LoRA fine-tuning, and this index is of a model without one."
        )
    problem = Problem(index, queries)
    chosen = [make(spec) for spec in dict.fromkeys(make(spec).label for spec in config.methods)]
    say(f"scoring {problem.n} rows for {problem.m} queries by {len(chosen)} methods")
    prepare(problem, chosen)
    scores = {method.label: method.score(problem).values for method in chosen}
    patches = {}
    if "tail-patch" in config.measures:
        count = min(config.patched, problem.n)
        found = tail_patch(index, queries, scores, count, finetuning.learning_rate / 10)
        patches = {name: bootstrap_mean(values) for name, values in found.items()}
    lds: Comparison | None = None
    drops: list[Effect] = []
    losses: tuple[float, float] | None = None
    if {"lds", "drop"} & set(config.measures):
        dtype: DType = index.manifest.model.dtype  # type: ignore[assignment]
        base = ModelSpec(index.manifest.model.name, None, dtype, device)
        again = Retraining(base, finetuning, tuple(index.rows.examples), tuple(queries), folder)
        lds, drops, losses = _retrained(again, problem, scores, config, finetuning.seed, say)
    names = {method.label: method.title for method in chosen}
    records = _records(lds, drops, patches, names)
    return Validated(records, _verdict(lds, drops, losses, names), lds, drops, patches, losses)


def _retrained(
    again: Retraining,
    problem: Problem,
    scores: Mapping[str, NDArray[np.float64]],
    config: Validation,
    first: int,
    say: Callable[[str], None],
) -> tuple[Comparison | None, list[Effect], tuple[float, float]]:
    n, seeds = problem.n, range(first, first + config.seeds)
    members = (
        draw_subsets(n, config.subsets, config.share, first) if "lds" in config.measures else np.zeros((0, n), bool)
    )
    gone = []
    if "drop" in config.measures:
        asked = groups([query.label for query in again.queries], config.groups)
        named = {
            name: values for name, values in scores.items() if not name.startswith("random")
        }  # chance is drawn anew
        gone = removals(named, asked, config.removed(n), problem.rows.labels, draws=config.draws, seed=first)
    rows = [
        again.everything,
        *(tuple(np.flatnonzero(row).tolist()) for row in members),
        *(each.kept(n) for each in gone),
    ]
    plan = [Subset(each, seed) for each in rows for seed in seeds]
    done = again.run(plan, workers=config.workers, say=say)
    losses = np.stack([each.losses[RESPONSE] for each in done]).reshape(len(rows), config.seeds, problem.m)  # (., k, m)
    before = losses[0]
    lds = None
    if len(members):
        lds = compare(dict(scores), members, losses[1 : 1 + len(members)].transpose(1, 0, 2))
    drops = effects(gone, losses[1 + len(members) :], before) if gone else []
    tokens = problem.index.manifest.encoding.loss_on
    comparable = tokens == RESPONSE and problem.index.manifest.model.at == "end"
    own = float(problem.features.losses.mean()) if comparable else float("nan")
    return lds, drops, (own, float(before.mean()))


def _records(
    lds: Comparison | None, drops: Sequence[Effect], patches: Mapping[str, Estimate], names: Mapping[str, str]
) -> list[dict[str, Any]]:
    records: list[dict[str, Any]] = []

    def add(measure: str, name: str, value: Estimate, **more: Any) -> None:
        records.append(
            {"measure": measure, "method": names.get(name, name), "spec": name, **_numbers("value", value), **more}
        )

    if lds is not None:
        for name, value in lds.lds.items():
            ceiling: dict[str, Any] = {"above_chance": name in lds.sure}
            if lds.agreement is not None and lds.reachable is not None:
                ceiling |= {**_numbers("ceiling", lds.agreement), "reachable": round(lds.reachable, 6)}
            add("lds", name, value, **_numbers("difference", lds.differences[name]), **ceiling)
    for each in drops:
        over = _numbers("over_random", each.over_random) if each.over_random is not None else {}
        add("drop", each.what, each.change, removed=each.count, **over)
    for name, value in patches.items():
        add("tail-patch", name, value)
    return records


def _numbers(name: str, value: Estimate) -> dict[str, float | None]:
    ends = {"": value.value, "_low": value.low, "_high": value.high}
    return {f"{name}{end}": round(float(v), 6) if np.isfinite(v) else None for end, v in ends.items()}


def _verdict(
    lds: Comparison | None, drops: Sequence[Effect], losses: tuple[float, float] | None, names: Mapping[str, str]
) -> list[str]:
    """What may be believed, the headline first."""
    lines = []
    if lds is not None:
        ahead = max(lds.lds, key=lambda name: lds.lds[name].value)
        best = lds.lds[ahead]
        possible = f" of a possible {lds.reachable:.2f}" if lds.reachable is not None else ""
        word = "predicts" if ahead in lds.sure else "does not show that it predicts"
        lines.append(
            f"On this run {names[ahead]} {word} what training on other rows does to the answers: LDS "
            f"{best.value:.2f} [{best.low:.2f}, {best.high:.2f}]{possible}, the best of {len(lds.lds)} methods."
        )
        others = [name for name in lds.lds if name.split(":")[0] in ("repsim", "bm25")]
        lines += [f"{names[name]} has {_short(lds.lds[name])}." for name in others if name != ahead]
    for count in dict.fromkeys(each.count for each in drops):
        here = [each for each in drops if each.count == count and each.over_random is not None and each.what != CLASS]
        chance = next(each for each in drops if each.count == count and each.what == RANDOM)
        if here:
            most = max(here, key=lambda each: each.change.value)
            over = most.over_random
            assert over is not None
            word = "more than" if over.low > 0 else "not demonstrably more than"
            lines.append(
                f"Retraining without the top {count} rows of {names[most.what]} raises the answers' loss by "
                f"{_short(most.change)} nats, {word} without {count} random ones ({_short(chance.change)})."
            )
            idle = [names[e.what] for e in here if e.over_random is not None and not e.over_random.low > 0]
            if idle:
                lines.append(f"Not told apart from {count} random rows: {', '.join(idle)}.")
    if losses is not None and np.isfinite(losses[0]):
        own, again = losses
        lines.append(
            f"The answers' mean loss is {own:.2f} under the adapter and {again:.2f} after retraining on all rows"
            + (
                "."
                if abs(own - again) <= 0.25 * max(own, again)
                else "; so far apart that the settings may not be those that made the adapter."
            )
        )
    return lines or ["Tail patches alone were measured; they say nothing of removing rows."]


def _short(value: Estimate) -> str:
    ends = f" [{value.low:.2f}, {value.high:.2f}]" if np.isfinite(value.low) else ""
    return f"{value.value:.2f}{ends}"
