"""Benchmark data sets, built from what ships with the package or from data of one's own."""

from finetrace.tasks.external import external
from finetrace.tasks.mixed import alignment_rows, mixed
from finetrace.tasks.real import RealData, real_task
from finetrace.tasks.registry import TASKS, Recipe, build, recipe
from finetrace.tasks.repeated import say_repeated
from finetrace.tasks.task import Task
from finetrace.tasks.undrawn import say_undrawn

__all__ = [
    "TASKS",
    "RealData",
    "Recipe",
    "Task",
    "alignment_rows",
    "build",
    "external",
    "mixed",
    "real_task",
    "recipe",
    "say_repeated",
    "say_undrawn",
]
