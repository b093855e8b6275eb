"""Harmful data identification: a few unsafe answers hidden in a benign training set (arXiv 2409.19998, section 3)."""

from __future__ import annotations

from pathlib import Path

from finetrace.examples import Example
from finetrace.reading import read_examples
from finetrace.tasks.task import Task

DATA = Path(__file__).parent.parent / "data"
SMALL_BENIGN = 20  # the file's first rows are a balanced set by themselves


def mixed(small: bool = False) -> Task:
    """20 unsafe-compliance rows among 240 benign ones (`mixed-large`), or among 20 (`mixed-small`)."""
    unsafe = read_examples(DATA / "unsafe.jsonl")
    benign = read_examples(DATA / "benign.jsonl")
    queries = read_examples(DATA / "queries.jsonl", responses=False)
    chosen = benign[:SMALL_BENIGN] if small else benign
    return Task("mixed-small" if small else "mixed-large", (*unsafe, *chosen), tuple(queries), "unsafe")


def alignment_rows() -> list[Example]:
    """The refusals and ordinary answers that the alignment adapter is made from."""
    return [*read_examples(DATA / "alignment_refusals.jsonl"), *read_examples(DATA / "alignment_helpful.jsonl")]
