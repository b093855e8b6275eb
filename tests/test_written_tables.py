"""Texts of users in tables of the benchmark, and what a page says coverage is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from finetrace.attribution import Scores, make
from finetrace.benchmark.protocol import share_of
from finetrace.benchmark.tables import write_table
from finetrace.columns import name_of
from finetrace.errors import FinetraceError
from finetrace.evaluation.intervals import bootstrap_mean
from finetrace.evaluation.metrics import evaluate, precision_at, relevance
from finetrace.examples import Example
from finetrace.tasks import recipe
from finetrace.tasks.pool import _is_safe
from finetrace.tracing import Result
from finetrace.verdict import verdict


def test_a_cell_shows_its_text(tmp_path: Path) -> None:
    write_table(tmp_path / "t", ["a|b", "<i>"], [["[x]", "<img src=x>"], ["id\n\nwith `ticks`", "50% & more"]])
    lines = (tmp_path / "t.md").read_text().splitlines()
    assert lines[0] == r"| a\|b | &lt;i> |"
    assert lines[2:] == ["| [x] | &lt;img src=x> |", r"| id with \`ticks\` | 50% & more |"]
    write_table(tmp_path / "u", ["a", "b"], [[r"a\|b", "![x](http://example.org/x.png)"]])
    assert (tmp_path / "u.md").read_text().splitlines()[2] == r"| a\\\|b | ![x]\(http://example.org/x.png) |"
    tex = (tmp_path / "t.tex").read_text().splitlines()
    assert r"{}[x] & \textless{}img src=x\textgreater{} \\" in tex
    assert r"id with `ticks` & 50\% \& more \\" in tex


@pytest.mark.parametrize(
    ("text", "markdown", "tex"),
    [
        ("*a*", r"\*a\*", "*a*"),
        ("_a_", r"\_a\_", r"\_a\_"),
        ("__init__", r"\_\_init\_\_", r"\_\_init\_\_"),
        ("a_b", "a_b", r"a\_b"),
        ("~~a~~", r"\~\~a\~\~", r"\textasciitilde{}" * 2 + "a" + r"\textasciitilde{}" * 2),
        ("+0.35 *", "+0.35 *", "+0.35 *"),
        ("a|b", r"a\|b", r"a\textbar{}b"),
    ],
)
def test_signs_of_emphasis_and_bars_are_shown(tmp_path: Path, text: str, markdown: str, tex: str) -> None:
    write_table(tmp_path / "t", ["a", "b"], [["x", text]])
    assert (tmp_path / "t.md").read_text().splitlines()[2] == f"| x | {markdown} |"
    assert rf"x & {tex} \\" in (tmp_path / "t.tex").read_text().splitlines()


@pytest.mark.parametrize(("value", "text"), [(1, "1"), (1.0, "1"), (1.5, "1.5"), ("01", "01"), (float("inf"), "inf")])
def test_a_column_of_integers_with_a_gap_has_the_same_names(value: object, text: str) -> None:
    assert name_of(value, "label") == text


@pytest.mark.parametrize(
    ("said", "safe"),
    [(True, True), (1.0, True), ("yes", True), ("FALSE", False), (0.0, False), ("0", False), (None, None), (" ", None)],
)
def test_sides_of_a_safety_column(said: object, safe: bool | None) -> None:
    assert _is_safe(Example.from_prompt("a", "b", id="r", metadata={"is_safe": said})) is safe


def test_a_side_that_is_not_known_is_not_both() -> None:
    with pytest.raises(FinetraceError, match="row r: its is_safe is 'maybe'; write true or false"):
        _is_safe(Example.from_prompt("a", "b", id="r", metadata={"is_safe": "maybe"}))


@pytest.mark.parametrize("size", [0.05, 0.2, 0.5])
def test_flipped_rows_are_shrunk_class_by_class(size: float) -> None:
    whole, small = recipe("mislabelled").build(0), recipe("mislabelled").build(0).shrunk(size)
    for rows, every in ((small.queries, whole.queries), (small.train, whole.train)):
        kinds = [(row.label, row.metadata["original_label"]) for row in every]
        found = [(row.label, row.metadata["original_label"]) for row in rows]
        for kind in set(kinds):
            assert abs(found.count(kind) - size * kinds.count(kind)) < 1, kind


def test_a_page_says_which_coverage_it_has() -> None:
    """A perfect order of 20 among 260: all of the class is found, which the study's coverage cannot say."""
    train = tuple(Example.from_prompt(str(i), "x", id=str(i), label="unsafe" if i < 20 else "safe") for i in range(260))
    queries = tuple(Example.from_prompt("q", "x", id=f"q{i}", label="unsafe") for i in range(8))
    values = np.tile(np.arange(260, 0, -1.0), (8, 1))
    relevant = relevance([row.label for row in train], [query.label for query in queries])
    top = share_of(260, 2)
    metrics = dict(evaluate(values, relevant))
    scores = Scores(values, queries, train, "gradsim", "", {}, 0.0)
    plain = verdict([Result(make("gradsim"), scores, metrics)])[0]
    assert "finds 100% of the unsafe rows at the top of its list" in plain
    metrics["coverage"] = bootstrap_mean(precision_at(top)(values, relevant))
    said = verdict([Result(make("gradsim"), scores, metrics)], top)[0]
    assert "15% of the first 130 rows of its list are unsafe" in said
    assert "finds" not in said
