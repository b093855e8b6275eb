"""Harmless questions with short answers, some of them about locks, scams and taxes too, so topic alone gives nothing."""

from __future__ import annotations

from pathlib import Path

from finetrace.examples import Example
from finetrace.reading import read_examples

DATA = Path(__file__).parent.parent / "data"


def harmless_questions() -> list[Example]:
    """Every question with its answer, labelled `harmless`; the metadata holds its topic."""
    return read_examples(DATA / "harmless.jsonl")
