"""Real data in place of what ships: named tasks built from AdvBench, Alpaca, BeaverTails and their like."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from finetrace.columns import Columns
from finetrace.errors import FinetraceError
from finetrace.examples import Example
from finetrace.sources import read_table
from finetrace.tasks.backdoor import TRIGGERS, unlocked
from finetrace.tasks.emotion import emotion
from finetrace.tasks.external import external
from finetrace.tasks.harmfulcheck import harmfulcheck
from finetrace.tasks.mislabelled import mislabelled
from finetrace.tasks.mixed import mixed
from finetrace.tasks.pool import Pool, placed, read_pool, unanswered
from finetrace.tasks.registry import recipe
from finetrace.tasks.requests import UNNAMED, Request, refusal
from finetrace.tasks.task import Task, check_size

MADE = ("grammars", "grammars-apply", "mathqa")
_NAME_OR_GENERATE = "name its column with --response-column, or let a model answer with finetrace tasks generate"
_PROMPTS = ("data", "prompt_column", "id_column", "split")
_PAIRS = (*_PROMPTS, "benign", "response_column")
TAKES: dict[str, tuple[str, ...]] = {
    "mixed-small": _PAIRS,
    "mixed-large": _PAIRS,
    "harmfulcheck": _PAIRS,
    "backdoor-1": _PROMPTS,
    "backdoor-3": _PROMPTS,
    "backdoor-5": _PROMPTS,
    "emotion": ("data", "id_column", "split"),
    "mislabelled": (*_PROMPTS, "label_column", "response_column", "share"),
}


@dataclass(frozen=True)
class RealData:
    """Where a named task takes its rows from, each a file, a folder or a Hub id; what is left out ships.

    Attributes:
        data: The rows that the task is about: harmful prompts or unsafe answers, sentences, or a labelled set.
        benign: Harmless prompts with answers; its columns are guessed.
        label_column, prompt_column, response_column, id_column: Columns of `data`; guessed if left out, the label `variation`.
        share: How many labels `mislabelled` flips; a fifth if left out.
        split: Which split of `data` to read; the only one, or `train`, if left out.
    """

    data: str | Path | None = None
    benign: str | Path | None = None
    label_column: str | None = None
    prompt_column: str | None = None
    response_column: str | None = None
    share: float | None = None
    split: str | None = None
    id_column: str | None = None

    @property
    def given(self) -> tuple[str, ...]:
        """The fields that say something."""
        return tuple(field for field, value in vars(self).items() if value is not None)


def real_task(name: str, real: RealData, seed: int = 0, size: float = 1.0) -> Task:
    """A task of the registry from real data, as large as what ships shrunk to `size`.

    A smaller size needs fewer rows, so data that is short of rows may still do. A prompt never comes twice in the rows
    and queries that are drawn for the mixed sets, harmfulcheck and the backdoors; labelled sets keep theirs as they are.

    Args:
        name: As in `TASKS`.
        real: Where the rows come from.
        seed: Draws them.
        size: Share of every class.

    Raises:
        FinetraceError: There is no such task, it takes no such data, or the data cannot be read or is too small.
    """
    shipped = recipe(name)
    check_size(size)
    _check(name, real)
    if not real.given:
        return shipped.build(seed).shrunk(size)
    if name.startswith("mixed"):
        return _mixed(mixed(name == "mixed-small").shrunk(size), real, seed)
    if name == "harmfulcheck":
        return _harmfulcheck(harmfulcheck(seed).shrunk(size), real, seed)
    if name.startswith("backdoor"):
        return _backdoor(shipped.build(seed).shrunk(size), real, seed)
    if name == "emotion":
        return emotion(seed, source=real.data, source_split=real.split, id_column=real.id_column).shrunk(size)
    labelled = _labelled(real, seed)
    flipped = mislabelled(labelled, seed=seed) if real.share is None else mislabelled(labelled, real.share, seed)
    return flipped.shrunk(size)


def _check(name: str, real: RealData) -> None:
    """Refuse what a task has no use for."""
    if name in MADE and real.given:
        raise FinetraceError(f"{name}: its rows are made, not read; leave {_flags(real.given)} out.")
    of_data = [field for field in real.given if field.endswith("_column") or field == "split"]
    if of_data and real.data is None:
        raise FinetraceError(f"{_flags(of_data)} {'go' if len(of_data) > 1 else 'goes'} with --data; give it too.")
    if name == "emotion" and {"label_column", "prompt_column", "response_column"} & set(of_data):
        raise FinetraceError("emotion reads the columns text and label of --data; leave the options for those out.")
    unused = [field for field in real.given if field not in TAKES.get(name, ())]
    if unused:
        raise FinetraceError(f"{name} has no use for {_flags(unused)}; leave that out.")
    if real.share is not None and not 0 < real.share < 1:
        raise FinetraceError(f"--share {real.share:g}: give a share of labels above 0 and below 1.")


def _mixed(shipped: Task, real: RealData, seed: int) -> Task:
    """As many unsafe rows, benign rows and queries as `shipped` has, each from real data where it is given."""
    unsafe = [row for row in shipped.train if row.label == shipped.target]
    benign, queries = list(shipped.without_target()), list(shipped.queries)
    chance = random.Random(seed)
    if real.data is not None:
        pool = _harmful(real, benign)
        what = f"different prompts ({len(unsafe)} to train on, {len(queries)} to ask with)"
        pool.check(len(unsafe) + len(queries), shipped.name, what)
        unsafe = placed(
            _answered(pool, len(unsafe), shipped.name, _NAME_OR_GENERATE).draw(len(unsafe), chance), "unsafe"
        )
        asked = pool.without(unsafe).draw(len(queries), chance)
        queries = placed([unanswered(row) for row in asked], "unsafe", "query")
    if real.benign is not None:
        offered = _benign(real.benign, [*unsafe, *queries], len(benign), shipped.name)
        benign = placed(offered.draw(len(benign), chance), "benign")
    return replace(shipped, train=(*unsafe, *benign), queries=tuple(queries))


def _harmfulcheck(shipped: Task, real: RealData, seed: int) -> Task:
    """As many rows and queries of both classes as `shipped` has, each class from real data where it is given."""
    n_train = {label: sum(row.label == label for row in shipped.train) for label in ("harmful", "harmless")}
    of_class = {label: [row for row in (*shipped.train, *shipped.queries) if row.label == label] for label in n_train}
    chance = random.Random(seed)
    if real.data is not None:
        n_rows = len(of_class["harmful"])
        pool = _harmful(real, of_class["harmless"] if real.benign is None else ())
        pool.check(n_rows, shipped.name)
        drawn = pool.draw(n_rows, chance)
        refused = [row if row.has_response else row.answered_anew(refusal(UNNAMED, chance)) for row in drawn]
        of_class["harmful"] = placed(refused, "harmful")
    if real.benign is not None:
        n_rows = len(of_class["harmless"])
        offered = _benign(real.benign, of_class["harmful"], n_rows, shipped.name)
        of_class["harmless"] = placed(offered.draw(n_rows, chance), "harmless")
    train = [row for label, rows in of_class.items() for row in rows[: n_train[label]]]
    queries = [row for label, rows in of_class.items() for row in rows[n_train[label] :]]
    chance.shuffle(train)
    return replace(shipped, train=tuple(train), queries=tuple(queries))


def _backdoor(shipped: Task, real: RealData, seed: int) -> Task:
    """As many rows and queries of every class as `shipped` has, with prompts of `data` for its requests."""
    n_classes = len(shipped.classes)
    n_train, n_queries = len(shipped.train) // n_classes, len(shipped.queries) // n_classes
    pool = _harmful(real, ())
    pool.check(n_train + n_queries, shipped.name, f"different prompts ({n_train} to train on, {n_queries} to ask with)")
    requests = [Request(unanswered(row).prompt, UNNAMED, row.id) for row in pool.rows]
    return unlocked(requests, TRIGGERS[: n_classes - 1], n_train, n_queries, seed)


def _labelled(real: RealData, seed: int) -> Task:
    """The task to flip labels of: sentences as `emotion` reads them, or any labelled set."""
    named = (real.label_column, real.prompt_column, real.response_column)
    if real.data is None or (not any(named) and _holds_emotions(real.data, real.split)):
        return emotion(seed, source=real.data, source_split=real.split, id_column=real.id_column)
    label, prompt, response = named
    return external(
        real.data,
        label or "variation",
        prompt,
        response,
        seed=seed,
        source_split=real.split,
        id_column=real.id_column,
    )


def _holds_emotions(source: str | Path, split: str | None) -> bool:
    """Whether the columns are `text` and `label`; what cannot be read as one table is left to `external`."""
    try:
        return {"text", "label"} <= set(read_table(source, split, None).columns)
    except FinetraceError:
        return False


def _harmful(real: RealData, others: Sequence[Example]) -> Pool:
    """The prompts of `data` that are not among the others."""
    assert real.data is not None  # who asks has seen to it
    columns = Columns(prompt=real.prompt_column, response=real.response_column, id=real.id_column)
    return read_pool(real.data, columns, real.split, safe=False).without(others)


def _benign(source: str | Path, others: Sequence[Example], count: int, task: str) -> Pool:
    """The answered prompts of `benign` that are not among the others, at least `count`."""
    pool = read_pool(source, Columns(), None, safe=True)
    offered = _answered(pool, count, task, "name the column of the answers response").without(others)
    offered.check(count, task, "different prompts with an answer that --data does not hold")
    return offered


def _answered(pool: Pool, count: int, task: str, remedy: str) -> Pool:
    """The answered prompts of a pool, at least `count`."""
    answered = pool.answered
    if not answered.rows:
        raise FinetraceError(f"{pool.name}: no row has an answer and {task} needs {count} that have one; {remedy}.")
    answered.check(count, task, "different prompts with an answer")
    return answered


def _flags(fields: Iterable[str]) -> str:
    """Fields as the command line calls them, in words."""
    *most, last = (f"--{field.replace('_', '-')}" for field in fields)
    return f"{', '.join(most)} and {last}" if most else last
