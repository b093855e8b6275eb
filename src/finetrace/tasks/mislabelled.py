"""Mislabelled data identification: a share of the training rows answers with another class (arXiv 2310.00902)."""

from __future__ import annotations

import random
from collections import defaultdict
from dataclasses import replace

from finetrace.errors import FinetraceError
from finetrace.examples import Example
from finetrace.tasks.task import Task, quotas

MISLABELLED, CLEAN = "mislabelled", "clean"


def mislabelled(task: Task, share: float = 0.2, seed: int = 0) -> Task:
    """The task with a share of its training labels flipped, to be found by self-influence or by clean queries.

    A flipped row gets the response of a row of another class and keeps its id and its place. Rows are flipped from
    every class alike and to the other classes by turns. A label then says `mislabelled` or `clean`; the classes stand
    in the metadata, as `original_label` and `given_label`. The queries keep their responses: a clean validation set.

    Args:
        task: Classes told apart by their responses, with responses in the queries.
        share: How many of the training rows are flipped.
        seed: Draws the rows and their new responses.

    Raises:
        FinetraceError: The share flips no row or every row, or the task cannot be flipped or checked.
    """
    classes = _classes(task)
    count = round(share * len(task.train)) if 0 < share < 1 else 0
    if not 0 < count < len(task.train):
        raise FinetraceError(
            f"share={share:g} flips {count} of the {len(task.train)} training rows of {task.name}; "
            "give a share between 0 and 1 that flips some rows and leaves some"
        )
    others = _other_responses(task.name, {label: [task.train[place] for place in classes[label]] for label in classes})
    chance = random.Random(seed)
    flipped: dict[int, Example] = {}
    for (label, places), quota in zip(classes.items(), quotas([len(p) for p in classes.values()], count), strict=True):
        turns = list(others[label])
        chance.shuffle(turns)
        for turn, place in enumerate(sorted(chance.sample(places, quota))):
            given = turns[turn % len(turns)]
            wrong = task.train[place].answered_anew(chance.choice(others[label][given]))
            flipped[place] = _marked(wrong, MISLABELLED, given)
    train = tuple(flipped.get(place) or _marked(row, CLEAN, row.label) for place, row in enumerate(task.train))
    queries = tuple(_marked(query, CLEAN, query.label) for query in task.queries)
    return replace(task, name=f"{MISLABELLED}-{task.name}", train=train, queries=queries, target=MISLABELLED)


def _classes(task: Task) -> dict[str, list[int]]:
    """Where the rows of each class stand in the training set, once the task is known to be fit for flipping."""
    classes: dict[str, list[int]] = defaultdict(list)
    for place, row in enumerate(task.train):
        if row.label is None or not row.has_response:
            raise FinetraceError(
                f"the training row {row.id} of {task.name} has no {'label' if row.label is None else 'response'} "
                "to flip; give it one or leave the row out"
            )
        classes[row.label].append(place)
    if len(classes) < 2:
        raise FinetraceError(f"{task.name} has {len(classes)} classes and flipping needs two or more; use another task")
    if not task.queries or not task.answered:
        raise FinetraceError(
            f"{task.name} has queries without a response, or none, and the clean validation set needs the right "
            "answers; use a task whose queries have them"
        )
    return dict(classes)


def _other_responses(name: str, classes: dict[str, list[Example]]) -> dict[str, dict[str, list[str]]]:
    """For each class, the responses of every other class that no row of its own gives: those are wrong there."""
    own = {label: {row.response for row in rows} for label, rows in classes.items()}
    wrong = {}
    for label in classes:
        offers = {other: sorted(own[other] - own[label]) for other in classes if other != label}
        wrong[label] = {other: responses for other, responses in offers.items() if responses}
        if not wrong[label]:
            raise FinetraceError(
                f"{name}: no other class has a response that {label!r} lacks, so flipping its rows would change "
                "nothing; use a task whose classes differ in their responses"
            )
    return wrong


def _marked(row: Example, verdict: str, given: str | None) -> Example:
    metadata = {**row.metadata, "original_label": row.label, "given_label": given}
    return replace(row, label=verdict, metadata=metadata)
