"""Real rows in the place of those that ship: AdvBench, Alpaca, BeaverTails, or a file of one's own."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

from finetrace.columns import Columns
from finetrace.errors import FinetraceError
from finetrace.examples import Example
from finetrace.reading import read_examples
from finetrace.tasks.backdoor import backdoor
from finetrace.tasks.emotion import emotion
from finetrace.tasks.external import external
from finetrace.tasks.harmfulcheck import harmfulcheck
from finetrace.tasks.mislabelled import mislabelled
from finetrace.tasks.mixed import SMALL_BENIGN, mixed
from finetrace.tasks.registry import recipe
from finetrace.tasks.requests import Request, harmful_requests
from finetrace.tasks.task import Task

TOPIC = "that"  # what a refusal names where a row has no topic
SHARE = 0.2  # of labels flipped


@dataclass(frozen=True)
class RealData:
    """Where a named task takes its rows from.

    Attributes:
        data: Unsafe rows of the mixed sets, harmful prompts of harmfulcheck and the backdoors, labelled rows of emotion and
            mislabelled: a file, a folder or a dataset of the Hub. What ships if not given.
        benign: Benign rows of the mixed sets and of harmfulcheck, with responses; likewise.
        label_column, prompt_column, response_column: Of `data`; guessed if not given, the label `variation`.
        share: Of the labels that `mislabelled` flips.
    """

    data: str | None = None
    benign: str | None = None
    label_column: str | None = None
    prompt_column: str | None = None
    response_column: str | None = None
    share: float | None = None


def real_task(name: str, real: RealData, seed: int = 0) -> Task:
    """A task of the list with real rows.

    Raises:
        FinetraceError: There is no such task, it does not take such data, or there are too few rows.
    """
    recipe(name)
    _fits(name, real)
    if name.startswith("mixed"):
        return _mixed(name, real, seed)
    if name == "harmfulcheck":
        questions = _rows(real.benign, Columns()) if real.benign else None
        return harmfulcheck(seed, requests=_requests(real), questions=questions)
    if name.startswith("backdoor"):
        return backdoor(int(name.rpartition("-")[2]), seed, requests=_requests(real))
    if name == "emotion":
        return emotion(seed, source=real.data)
    return mislabelled(_labelled(real, seed), share=SHARE if real.share is None else real.share, seed=seed)


def _fits(name: str, real: RealData) -> None:
    """Refuse what a task has no use for."""
    if real.data is None and (real.label_column or real.prompt_column or real.response_column):
        raise FinetraceError("--label-column, --prompt-column and --response-column go with --data.")
    if name == "emotion" and (real.label_column or real.prompt_column or real.response_column):
        raise FinetraceError("emotion reads the columns text and label of --data; leave the column options out.")
    if name in ("grammars", "grammars-apply", "mathqa"):
        raise FinetraceError(f"{name}: its rows are made, not read; leave --data, --benign and --share out.")
    if real.benign is not None and not (name.startswith("mixed") or name == "harmfulcheck"):
        raise FinetraceError(f"{name}: --benign goes with mixed-small, mixed-large and harmfulcheck; leave it out.")
    if real.share is not None and name != "mislabelled":
        raise FinetraceError(f"{name}: --share goes with mislabelled; leave it out.")
    if real.label_column is not None and name != "mislabelled":
        raise FinetraceError(f"{name}: --label-column goes with mislabelled, or with --data and no name; leave it out.")


def _mixed(name: str, real: RealData, seed: int) -> Task:
    """As many unsafe and benign rows as ship, and as many further unsafe prompts to ask."""
    shipped = mixed(name == "mixed-small")
    unsafe = [row for row in shipped.train if row.label == shipped.target]
    chance = random.Random(seed)
    chosen, queries = unsafe, list(shipped.queries)
    if real.data is not None:
        columns = Columns(prompt=real.prompt_column, response=real.response_column)
        found = _rows(real.data, columns)
        wanted = len(unsafe) + len(queries)
        if len(found) < wanted:
            raise FinetraceError(
                f"{real.data}: {len(found)} unsafe rows with a response and a prompt of their own, and {name} needs {wanted}, "
                f"{len(unsafe)} to train on and {len(queries)} to ask about; give more."
            )
        drawn = chance.sample(found, wanted)
        chosen = _numbered(drawn[: len(unsafe)], "unsafe")
        asked = [Example.from_prompt(row.prompt, metadata=row.metadata) for row in drawn[len(unsafe) :]]
        queries = _numbered(asked, "unsafe", "query")
    benign = [row for row in shipped.train if row.label != shipped.target]
    if real.benign is not None:
        found = _rows(real.benign, Columns())
        count = SMALL_BENIGN if name == "mixed-small" else len(benign)
        if len(found) < count:
            raise FinetraceError(f"{real.benign}: {len(found)} benign rows, and {name} needs {count}; give more.")
        benign = _numbered(chance.sample(found, count), "benign")
    return replace(shipped, train=(*chosen, *benign), queries=tuple(queries))


def _requests(real: RealData) -> list[Request] | None:
    """Harmful prompts; those that ship where none are given."""
    if real.data is None:
        return None
    columns = Columns(prompt=real.prompt_column, response=real.response_column)
    rows = read_examples(real.data, columns, responses=False)
    known = {request.text: request.topic for request in harmful_requests()}
    return [Request(text, known.get(text, TOPIC)) for text in dict.fromkeys(row.prompt for row in rows)]


def _labelled(real: RealData, seed: int) -> Task:
    """Rows whose labels are flipped: emotion's own columns where nothing else is named, else any labelled set."""
    columns = (real.label_column, real.prompt_column, real.response_column)
    if real.data is None:
        return emotion(seed)
    if not any(columns):
        try:
            return emotion(seed, source=real.data)
        except FinetraceError as error:
            try:
                return external(real.data, "variation", seed=seed)
            except FinetraceError:
                raise error from None
    return external(real.data, columns[0] or "variation", columns[1], columns[2], seed=seed)


def _rows(source: str, columns: Columns) -> list[Example]:
    """Rows with a response, the first of each prompt."""
    found: dict[str, Example] = {}
    for row in read_examples(source, columns):
        if row.has_response:
            found.setdefault(row.prompt, row)
    return list(found.values())


def _numbered(rows: Sequence[Example], label: str, name: str | None = None) -> list[Example]:
    return [replace(row, id=f"{name or label}-{place:03d}", label=label) for place, row in enumerate(rows)]
