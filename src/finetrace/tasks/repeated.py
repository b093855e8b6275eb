"""Queries that were trained on word for word: what they find is their own copy."""

from __future__ import annotations

from finetrace.tasks.task import Task


def repeated(task: Task) -> list[str]:
    """Ids of the answered queries whose prompt and response stand in the training rows."""
    trained = {row.messages for row in task.train}
    return [query.id for query in task.queries if query.has_response and query.messages in trained]


def say_repeated(task: Task, source: str) -> str:
    """A sentence with how many there are and the first of them; empty where there are none."""
    ids = repeated(task)
    if not ids:
        return ""
    which = f"{len(ids)} of {len(task.queries)} queries, the first {ids[0]!r},"
    copies = f"{which} {'stand' if len(ids) > 1 else 'stands'} in the training rows word for word and can be traced"
    return f"{source}: {copies} to a copy; remove repeated rows to measure more than that."
