"""Benchmark data sets, built from what ships with the package."""

from finetrace.tasks.mixed import Task, alignment_rows, mixed

__all__ = ["Task", "alignment_rows", "mixed"]
