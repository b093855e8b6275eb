"""Tasks that no seed draws: their splits came with the data."""

from __future__ import annotations

from collections.abc import Callable

from finetrace.tasks.task import Task


def say_undrawn(flag: str, seed: int, task: Task, of_seed: Callable[[int], Task]) -> str:
    """A sentence where a seed that was asked for makes the same task as none; empty where it makes another."""
    if seed == 0 or task != of_seed(0):
        return ""
    return f"{flag} {seed}: {task.name} comes as it is split, so that its rows and queries are those of every seed"
