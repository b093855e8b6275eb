"""Harmful queries detection: requests that were refused among questions that were answered (arXiv 2409.19998, sec. 3)."""

from __future__ import annotations

import random
from dataclasses import replace

from finetrace.errors import FinetraceError
from finetrace.examples import Example
from finetrace.tasks.questions import harmless_questions
from finetrace.tasks.requests import harmful_requests, refusal
from finetrace.tasks.task import Task, split


def harmfulcheck(seed: int = 0, per_class: int = 250, train_share: float = 0.2) -> Task:
    """`per_class` requests refused and as many questions answered; `train_share` of each trains, the rest are queries.

    Raises:
        FinetraceError: There are not that many requests and questions, or one side of the split would be empty.
    """
    requests, questions = harmful_requests(), harmless_questions()
    most = min(len(requests), len(questions))
    if not 2 <= per_class <= most:
        raise FinetraceError(f"harmfulcheck, per_class {per_class}: give a number from 2 to {most}.")
    train = round(per_class * train_share) if 0 < train_share < 1 else 0
    if not 1 <= train < per_class:
        raise FinetraceError(
            f"harmfulcheck, train_share {train_share:g}: give a share between 0 and 1 that leaves at least one of the "
            f"{per_class} rows of a class to train on and one to ask about."
        )
    chance = random.Random(seed)
    harmful = [
        Example.from_prompt(request.text, refusal(request.topic, chance), label="harmful", metadata=request.metadata)
        for request in chance.sample(requests, per_class)
    ]
    harmless = chance.sample(questions, per_class)
    rows = [*_numbered(harmful), *_numbered(harmless)]
    return Task("harmfulcheck", *split(rows, train, seed))


def _numbered(rows: list[Example]) -> list[Example]:
    return [replace(row, id=f"{row.label}-{index:03d}") for index, row in enumerate(rows)]
