"""The verdict of a trace without labels: what agreement of methods allows to be said."""

from __future__ import annotations

import numpy as np
import pytest

from finetrace.attribution import Scores, make
from finetrace.tracing import Result
from finetrace.verdict import TOP, verdict
from tiny import make_examples


def results(rows: int, lexical: str) -> list[Result]:
    """One query: gradcos ranks rows from the first to the last, and bm25 does so too, or the other way round."""
    falling = -np.arange(rows, dtype=np.float64)[None]
    given = {"gradcos": falling, "bm25": falling if lexical == "same" else -falling}
    train, queries = tuple(make_examples(rows)), tuple(make_examples(1, seed=1))
    return [Result(make(spec), Scores(values, queries, train, spec, "none")) for spec, values in given.items()]


@pytest.mark.parametrize(
    ("rows", "lexical", "explained"),
    [(60, "same", True), (60, "other", False), (12, "other", False), (TOP, "same", False)],
)
def test_words_explain_a_list_only_beyond_what_chance_shares(rows: int, lexical: str, explained: bool) -> None:
    """Of 12 rows any two lists of ten share eight at least, and of ten rows all: that says nothing of words."""
    said = " ".join(verdict(results(rows, lexical)))
    assert ("word overlap alone explains" in said) is explained
