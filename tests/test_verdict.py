"""The verdict of a trace without labels: what agreement of methods allows to be said."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from rich.console import Console

from finetrace.attribution import Scores, make
from finetrace.evaluation.metrics import evaluate, relevance
from finetrace.reporting.tables import print_methods
from finetrace.tracing import Result
from finetrace.verdict import TOP, _shared, verdict
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
    first = [[0, 1, 2, 3, 4, 5, 6, 7]] * 6
    found = judged({"gradcos": first, "selfinf": first}, "aaabbbbb", "aaaaaa")
    said = " ".join(verdict(found))
    assert "not told apart from the best order that never looks at the answer (selfinf)" in said
    assert "do not show that the answers have a part in the order; one that never looks at them does as well" in said


def test_a_lead_that_may_be_chance_is_not_called_a_draw() -> None:
    first, last = [*range(8)], [*range(7, -1, -1)]
    found = judged({"gradcos": [first] * 5 + [last], "selfinf": [first] * 3 + [last] * 3}, "aaabbbbb", "a" * 6)
    said = " ".join(verdict(found))
    assert "not told apart from the best order that never looks" in said
    assert "the lead over one that never looks at them may be chance" in said
    assert "does as well" not in said


@pytest.mark.parametrize(
    ("answers", "said"), [(1, "one query gives no interval"), (5, "5 answers are too few"), (6, "better")]
)
def test_few_answers_tell_no_methods_apart(answers: int, said: str) -> None:
    """Five that all speak for one method are no rarer than one sign in sixteen."""
    worse = [[3, 0, 1, 2, 4, 5, 6, 7], [3, 4, 0, 1, 2, 5, 6, 7]] * 3
    found = judged({"gradcos": [[*range(8)]] * answers, "random": worse[:answers]}, "aaabbbbb", "a" * answers)
    lines = verdict(found)
    assert ("It is better than random order" in lines[1]) is (said == "better")
    assert said in lines[1]
    assert lines[0].startswith(f"gradcos ranks an a training example first for 100% of {answers} answer")
    assert ("answers" in lines[0]) is (answers > 1)


def test_answers_without_rows_of_their_class_have_no_part_in_the_sentences() -> None:
    """One has no label, one a label that no row has; the others are all of one class."""
    middle = [[3, 4, 0, 1, 2, 5, 6, 7], [3, 0, 1, 4, 2, 5, 6, 7]]
    found = judged({"gradcos": [[*range(8)]] * 8, "selfinf": middle * 4}, "aaabbbbb", "aaaaaa.z")
    asked = found[0].scores.queries
    queries = tuple(replace(query, label=None if query.label == "." else query.label) for query in asked)
    unlabelled = [replace(each, scores=replace(each.scores, queries=queries)) for each in found]
    lines = verdict(unlabelled)
    assert lines[0].startswith("gradcos ranks an a training example first for 100% of 6 answers")
    assert any(line.startswith("All answers that count are a, so") for line in lines)


def test_controls_alone_are_no_method() -> None:
    lexical = results(20, "same")[1]
    random = replace(lexical, method=make("random"))
    said = verdict([lexical, random])
    assert (
        said[0]
        == "No labels say what is right, and only controls were run: what follows is of the top 10 rows of bm25."
    )


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


@pytest.mark.parametrize(("asked", "few"), [("a", True), ("a" * 5, True), ("a" * 6, False)])
def test_a_table_says_over_how_many_queries_its_intervals_are(asked: str, few: bool) -> None:
    found = judged({"gradcos": [[*range(8)]] * len(asked)}, "aaabbbbb", asked)
    console = Console(record=True, width=80)
    print_methods(found, console)
    said = " ".join(console.export_text().split())
    assert f"95% interval over {len(asked)} quer" in said
    assert ("too few to tell methods apart" in said) is few


def test_what_two_lists_share_does_not_hang_on_the_order_of_rows_that_tie() -> None:
    first = np.zeros((1, 100))
    first[0, :20] = np.arange(20, 0, -1)
    k = min(TOP, 100)
    assert _shared(first, np.zeros((1, 100))) == pytest.approx(k / 100)  # nothing is known of the second's order
    assert _shared(first, first) == pytest.approx(1)
    tied = np.zeros((1, 100))
    tied[0, :40] = 1
    assert _shared(first, tied) == pytest.approx(min(1, k / 40))
    turned = np.random.default_rng(0).permutation(100)
    assert _shared(first[:, turned], tied[:, turned]) == pytest.approx(_shared(first, tied))


@pytest.mark.parametrize("order", [0.0, 1.0])
def test_a_method_without_an_order_correlates_with_none(order: float) -> None:
    rows = -np.arange(30, dtype=np.float64)[None]
    found = results(30, "same")
    flat = Scores(order * rows, found[0].scores.queries, found[0].scores.train, "repsim", "none")
    said = " ".join(verdict([*found, Result(make("repsim"), flat)]))
    assert ("Rank correlation with the other methods over all rows: mean 1.00." in said) is (order == 1)
    assert "nan" not in said
