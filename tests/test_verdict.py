"""The verdict of a trace without labels: what agreement of methods allows to be said."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from finetrace.attribution import Scores, make
from finetrace.evaluation.metrics import evaluate, relevance
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


def judged(orders: dict[str, list[list[int]]], train: str, asked: str) -> list[Result]:
    """Results of methods that rank the rows as `orders` has them for each query; labels are letters."""
    rows = tuple(replace(e, label=label) for e, label in zip(make_examples(len(train)), train, strict=True))
    queries = tuple(replace(e, label=label) for e, label in zip(make_examples(len(asked), seed=1), asked, strict=True))
    found = []
    for spec, given in orders.items():
        values = -np.argsort(np.array(given), axis=1).astype(np.float64)
        metrics = evaluate(values, relevance(list(train), list(asked)))
        found.append(Result(make(spec), Scores(values, queries, rows, spec, "none"), metrics))
    return found


def test_labels_that_an_order_without_the_query_finds_as_well_show_nothing() -> None:
    """All queries ask for the same planted kind, whose rows are unlike the rest."""
    first = [[0, 1, 2, 3, 4, 5, 6, 7]] * 4
    found = judged({"gradcos": first, "selfinf": first}, "aaabbbbb", "aaaa")
    said = " ".join(verdict(found))
    assert "not told apart from the best order that never looks at the answer (selfinf)" in said
    assert "do not show that the answers have a part in the order" in said


def test_a_method_may_be_better_at_the_top_and_worse_over_the_whole_list() -> None:
    """One planted row stands first and the others last, against all of them in the middle; every answer is of that kind."""
    top = [0, *range(4, 20), 1, 2, 3]
    middle = [4, 5, 6, 0, 1, 2, 3, *range(7, 20)]
    found = judged({"gradcos": [top] * 8, "selfinf": [middle] * 8}, "aaaa" + "b" * 16, "a" * 8)
    said = " ".join(verdict(found))
    assert "selfinf, which never looks, is ahead: AUROC 0.25 against 0.81." in said  # 16 and 52 of 64 pairs
    better = judged({"gradcos": [[0, 1, 2, 3, *range(4, 20)]] * 8, "selfinf": [middle] * 8}, "aaaa" + "b" * 16, "a" * 8)
    said = " ".join(verdict(better))
    assert "is ahead" not in said
    assert "All answers are a, so whether the rows of one answer are told from those of another is not tested." in said


def test_where_the_query_decides_the_verdict_does_not_doubt_it() -> None:
    """Queries ask for either kind, and only a method that looks at them can have both."""
    a, b = [0, 1, 2, 3, 4, 5, 6, 7], [4, 5, 6, 7, 0, 1, 2, 3]
    found = judged({"gradcos": [a, b] * 4, "selfinf": [a] * 8}, "aaaabbbb", "ab" * 4)
    said = " ".join(verdict(found))
    assert "the best order that never looks at the answer" in said
    assert "have a part in the order" not in said
    assert "All answers are" not in said


@pytest.mark.parametrize(("same", "rows"), [(True, 60), (False, 60), (True, TOP)])
def test_without_labels_a_list_that_comes_first_whatever_is_asked_is_told(same: bool, rows: int) -> None:
    falling = -np.arange(rows, dtype=np.float64)[None]
    given = {"gradcos": falling, "gradnorm": falling if same else -falling}
    train, queries = tuple(make_examples(rows)), tuple(make_examples(1, seed=1))
    said = " ".join(verdict([Result(make(s), Scores(v, queries, train, s, "none")) for s, v in given.items()]))
    assert "An order that never looks at the answer (gradnorm) names" in said
    assert ("comes first whatever is asked" in said) is (same and rows > TOP)
