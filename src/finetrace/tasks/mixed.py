"""Harmful data identification: a few unsafe answers hidden in a benign training set (arXiv 2409.19998, section 3)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from finetrace.examples import Example
from finetrace.reading import read_examples

DATA = Path(__file__).parent.parent / "data"
SMALL_BENIGN = 20  # the file's first rows are a balanced set by themselves


@dataclass(frozen=True)
class Task:
    """A training set with a planted class, and prompts that ask for what the class does.

    Attributes:
        name: As results name it.
        train: Rows with a response and a label.
        queries: Held-out prompts, labelled, without a response: the model gives it.
        target: The planted label.
    """

    name: str
    train: tuple[Example, ...]
    queries: tuple[Example, ...]
    target: str

    def without_target(self) -> tuple[Example, ...]:
        """The training rows that do not carry the planted label."""
        return tuple(example for example in self.train if example.label != self.target)


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
