"""Is an index's attribution right on its own run? Retraining says: LDS, removing top rows, tail patches, and a verdict."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finetrace.attribution import Problem, make
from finetrace.errors import FinetraceError
from finetrace.evaluation.intervals import UNBOUNDED, Estimate, bootstrap_mean, paired_difference
from finetrace.evaluation.judging import Judge
from finetrace.evaluation.lds import Comparison, compare, draw_subsets, leave_out
from finetrace.evaluation.metrics import relevance
from finetrace.evaluation.own_loss import own_loss
from finetrace.evaluation.removal import CLASS, Effect, effects, groups, refuse_counts, removals
from finetrace.evaluation.retrained import Retrained
from finetrace.evaluation.retraining import RESPONSE, Retraining, Subset, run_all
from finetrace.evaluation.tail_patch import refuse_projected, tail_patch
from finetrace.examples import Example
from finetrace.execution import Engine
from finetrace.finetune_config import FinetuneConfig
from finetrace.generation import ANSWER_TOKENS
from finetrace.index.store import Index
from finetrace.models import DType, ModelSpec
from finetrace.tracing import prepare
from finetrace.units import many
from finetrace.validation.plan import MEASURES, RETRAINED, Validation, refuse_unadapted
from finetrace.validation.verdict import verdict


@dataclass(frozen=True, eq=False)
class Validated:
    """What was found.

    Attributes:
        records: Flat, a measure and method each.
        verdict: Sentences, the headline first.
        lds, loo, drops, rates, patches: As measured; `None` or empty where they were not.
        losses: Mean loss of the queries by the index's own adapter (NaN where it is of other tokens), and after retraining on
            all rows.
    """

    records: list[dict[str, Any]]
    verdict: list[str]
    lds: Comparison | None = None
    loo: Comparison | None = None
    drops: Sequence[Effect] = ()
    rates: Sequence[Effect] = ()
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
    judge: Judge | None = None,
    engine: Engine | None = None,
    begin: Callable[[], None] = lambda: None,
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
        judge: Lets every model without the rows that a method names answer again, and says which answers count.
        engine: Where retrainings are done, in place of `config.workers`.
        begin: Called when all that was asked for has been checked, before any work is done.

    Raises:
        FinetraceError: A measure is not known, the index is not of an adapter, or a subset or removal leaves too few rows.
    """
    unknown = [each for each in config.measures if each not in MEASURES]
    if unknown or not config.measures:
        raise FinetraceError(f"--measure {' '.join(unknown)}: not known; use {', '.join(MEASURES)}.")
    refuse_unadapted(index)
    if "lds" in config.measures:
        draw_subsets(len(index), config.subsets, config.share)
    if "loo" in config.measures and len(index) < 3:
        raise FinetraceError(
            f"{index.folder}: leaving single rows out of {len(index)} gives no rank correlation; it takes 3 rows at least."
        )
    if "drop" in config.measures:
        refuse_counts(config.removed(len(index)), len(index))
    if "tail-patch" in config.measures:
        refuse_projected(index)
    problem = Problem(index, queries)
    chosen = [make(spec) for spec in dict.fromkeys(make(spec).label for spec in config.methods)]
    begin()
    say(f"scoring {many(problem.n, 'row')} for {many(problem.m, 'query')} by {many(len(chosen), 'method')}")
    prepare(problem, chosen)
    scores = {method.label: method.score(problem).values for method in chosen}
    patches, beside = {}, {}
    if "tail-patch" in config.measures:
        count = min(config.patched, problem.n)
        falls = tail_patch(index, queries, scores, count, finetuning.learning_rate / 10)
        patches = {name: bootstrap_mean(values, bounds=UNBOUNDED) for name, values in falls.items()}
        first = next(iter(falls.values()))
        beside = {name: paired_difference(values, first, bounds=UNBOUNDED) for name, values in falls.items()}
    found = _Found()
    if RETRAINED & set(config.measures):
        dtype: DType = index.manifest.model.dtype  # type: ignore[assignment]
        base = ModelSpec(index.manifest.model.name, None, dtype, device, index.model().spec.trust_remote_code)
        again = Retraining(base, finetuning, tuple(index.rows.examples), tuple(queries), folder)
        found = _retrained(again, problem, scores, config, finetuning.seed, say, judge, engine or config.workers)
    names = {method.label: method.title for method in chosen}
    records = _records(found, patches, beside, names)
    extent = f"{many(problem.m, 'answer')}, {many(config.subsets, 'subset')} and {many(config.seeds, 'seed')}"
    said = verdict(
        found.lds,
        found.drops,
        found.losses,
        names,
        loo=found.loo,
        rates=found.rates,
        before=found.rate,
        extent=extent,
        asked=_asked([query.label for query in queries], config.groups) if found.drops else "",
    )
    return Validated(records, said, found.lds, found.loo, found.drops, found.rates, patches, found.losses)


@dataclass(eq=False)
class _Found:
    """What retraining found; `rate` is the share of answers that the judge counts after training on all rows, of the queries
    for which rows were removed.
    """

    lds: Comparison | None = None
    loo: Comparison | None = None
    drops: Sequence[Effect] = ()
    rates: Sequence[Effect] = ()
    rate: float = float("nan")
    losses: tuple[float, float] | None = None


def _retrained(
    again: Retraining,
    problem: Problem,
    scores: Mapping[str, NDArray[np.float64]],
    config: Validation,
    first: int,
    say: Callable[[str], None],
    judge: Judge | None,
    workers: int | Engine,
) -> _Found:
    n, seeds = problem.n, range(first, first + config.seeds)
    none = np.zeros((0, n), dtype=bool)
    subsets = draw_subsets(n, config.subsets, config.share, first) if "lds" in config.measures else none
    singly = leave_out(n, config.left_out, first) if "loo" in config.measures else none
    gone = []
    if "drop" in config.measures:
        asked = groups([query.label for query in again.queries], config.groups)
        named = {
            name: values for name, values in scores.items() if not name.startswith("random")
        }  # chance is drawn anew
        gone = removals(named, asked, config.removed(n), problem.rows.labels, draws=config.draws, seed=first)

    def under(rows: Sequence[tuple[int, ...]]) -> list[Subset]:
        return [Subset(each, seed) for each in rows for seed in seeds]

    def losses(done: Sequence[Retrained]) -> NDArray[np.float64]:  # (rows, k, m)
        return np.stack([each.losses[RESPONSE] for each in done]).reshape(-1, config.seeds, problem.m)

    members = [tuple(np.flatnonzero(row).tolist()) for row in (*subsets, *singly)]
    kept = [each.kept(n) for each in gone]
    named_rows, seeds_each = under([again.everything, *kept]), config.seeds
    talking = replace(again, answer_tokens=ANSWER_TOKENS if judge is not None and kept else 0)
    if talking.answer_tokens:
        told, drawn = run_all([(talking, named_rows), (again, under(members))], workers=workers, say=say)
    else:  # all alike, so that no worker waits for one kind to end
        done = again.run(named_rows + under(members), workers=workers, say=say)
        told, drawn = done[: len(named_rows)], done[len(named_rows) :]
    whole, removed = told[:seeds_each], told[seeds_each:]
    before = losses(whole)[0]
    after = losses(drawn).transpose(1, 0, 2) if members else before[:, None]
    found = _Found(losses=(own_loss(problem), float(before.mean())))
    if len(subsets):
        found.lds = compare({**scores, **_labels_alone(problem)}, subsets, after[:, : len(subsets)])
    if len(singly):
        found.loo = compare(dict(scores), singly, after[:, len(subsets) :])
    if gone:
        found.drops = effects(gone, losses(removed), before)
    if judge is not None and talking.answer_tokens:
        refused = -talking.judged(judge, named_rows).astype(np.float64).reshape(-1, config.seeds, problem.m)
        silent = refused[0]  # a fall of the rate counts as a rise
        found.rates = effects(gone, refused[1:], silent, step=1)
        asked_about = sorted(
            {query for each in gone for query in each.group.queries}
        )  # not those of classes beyond --groups
        found.rate = -float(silent[:, asked_about].mean())
    return found


def _asked(labels: Sequence[str | None], most: int) -> str:
    """Of which answers removals are, in a sentence; nothing where they are of all."""
    every, chosen = groups(labels), groups(labels, most)
    if len(chosen) == len(every):
        return ""
    count = sum(len(group.queries) for group in chosen)
    return (
        f"Rows were removed for {count} of {many(len(labels), 'answer')} alone, those of {len(chosen)} of {len(every)} "
        "classes, the first that come; --groups takes more."
    )


def _labels_alone(problem: Problem) -> dict[str, NDArray[np.float64]]:
    """What class labels predict by themselves, 1 for each row of the query's class; nothing where they tell no rows apart."""
    relevant = relevance(problem.rows.labels, [query.label for query in problem.queries])
    return {CLASS: relevant.astype(np.float64)} if relevant.any() and not relevant.all() else {}


def _records(
    found: _Found, patches: Mapping[str, Estimate], beside: Mapping[str, Estimate], names: Mapping[str, str]
) -> list[dict[str, Any]]:
    records: list[dict[str, Any]] = []

    def add(measure: str, name: str, value: Estimate, **more: Any) -> None:
        records.append(
            {"measure": measure, "method": names.get(name, name), "spec": name, **_numbers("value", value), **more}
        )

    for measure, compared in (("lds", found.lds), ("loo", found.loo)):
        if compared is None:
            continue
        for name, value in compared.lds.items():
            ceiling: dict[str, Any] = {"above_chance": name in compared.sure}
            if compared.agreement is not None:
                possible = None if compared.reachable is None else round(compared.reachable, 6)
                ceiling |= {**_numbers("ceiling", compared.agreement), "reachable": possible}
            add(measure, name, value, **_beside(name, compared.differences), **ceiling)
    for measure, changed in (("drop", found.drops), ("drop-rate", found.rates)):
        for each in changed:
            over: dict[str, Any] = {}
            if each.over_random is not None:
                over = {**_numbers("over_random", each.over_random), "above_chance": each.sure}
            if each.over_first is not None:
                over |= _numbers("difference", each.over_first)
            add(measure, each.what, each.change, removed=each.count, answers=each.change.n, **over)
    for name, value in patches.items():
        add("tail-patch", name, value, **_beside(name, beside))
    return records


def _beside(name: str, differences: Mapping[str, Estimate]) -> dict[str, float | None]:
    """Of a method to the first one, which has none to itself."""
    return {} if name == next(iter(differences)) else _numbers("difference", differences[name])


def _numbers(name: str, value: Estimate) -> dict[str, float | None]:
    ends = {"": value.value, "_low": value.low, "_high": value.high}
    return {f"{name}{end}": float(f"{v:.6g}") if np.isfinite(v) else None for end, v in ends.items()}
